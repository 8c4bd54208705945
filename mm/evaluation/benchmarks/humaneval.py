"""HumanEval (Chen et al. 2021): 164 functions to be written from their docstrings, run against hidden checks.

File (https://github.com/openai/human-eval): `HumanEval.jsonl.gz`. What the model writes is run, so nothing happens
without `--allow-code-execution`; it runs in `mm.evaluation.sandbox`, where it can do no harm.
"""

from __future__ import annotations

import contextvars
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mm.datasets.source import field
from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.files import json_lines
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.sandbox.run import require_allowed, run
from mm.evaluation.scorers import code
from mm.evaluation.statistics import Mean
from mm.types import Sample

SIDE_BY_SIDE = 2  # programs that run at the same time
KEPT = ("prompt", "test", "entry_point")


class HumanEvalBenchmark(Benchmark):
    """pass@k: with one greedy completion a problem pass@1, with `n` sampled ones pass@1, @10 and @100 up to n.

    Args:
        path: the file, gzipped or not.
        n: completions a problem; above 1 they need a `temperature`.
        temperature: of sampling; 0 is greedy.
        timeout: seconds that a program may run.
        memory_mb: address space that it may have.
    """

    name = "humaneval"
    plain = True
    max_new_tokens = 512
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # the paper's: the function ends there
    guessable = False
    running_score = False  # programs are run when all are written

    def __init__(
        self, path: Path, n: int = 1, temperature: float = 0.0, timeout: float = 3.0, memory_mb: int = 512
    ) -> None:
        if n < 1 or (n > 1 and temperature <= 0):
            raise ValueError(f"humaneval: {n} completions at temperature {temperature}: several need one above 0")
        self.path = path
        self.n = n
        self.temperature = temperature
        self.timeout = timeout
        self.memory_mb = memory_mb

    def samples(self) -> list[Sample]:
        """One sample a completion: `HumanEval/0`, or `HumanEval/0#0`, ... where there are several."""
        require_allowed(self.name)
        samples = []
        for where, item in json_lines(self.path):
            task = field(item, "task_id", str, where)
            given = {key: field(item, key, str, where) for key in KEPT}
            solution = field(item, "canonical_solution", str, where)
            for number in range(self.n):
                meta = {"question": given["prompt"], "category": "all", "answers": [solution], "task": task, **given}
                key = task if self.n == 1 else f"{task}#{number}"
                samples.append(Sample(key, [{"role": "user", "content": given["prompt"]}], meta=meta))
        return samples

    def origin(self) -> str:
        return str(self.path)

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        """1.0 where the program ran to its end; details say what became of it."""
        require_allowed(self.name)

        def judge(sample: Sample, response: Response) -> Mark:
            meta = sample.meta
            program = f"{meta['prompt']}{response.text}\n{meta['test']}\ncheck({meta['entry_point']})"
            outcome = run(program, timeout=self.timeout, memory=self.memory_mb * 2**20)
            return Mark(float(outcome.passed), details={"task": meta["task"], "outcome": outcome.reason})

        # A thread has the permission of whoever starts it only in a copy of its context.
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            jobs = [
                pool.submit(contextvars.copy_context().run, judge, sample, response)
                for sample, response in zip(samples, responses, strict=True)
            ]
            return [job.result() for job in jobs]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """pass@k as means over problems."""
        counts: dict[str, list[float]] = {}
        for record in records:
            counts.setdefault(record.details["task"], []).append(record.score)
        tries = [len(scores) for scores in counts.values()]
        right = [round(sum(scores)) for scores in counts.values()]
        return {
            f"pass@{k}": Mean([code.pass_at_k(n, c, k) for n, c in zip(tries, right, strict=True)])
            for k in (1, 10, 100)
            if min(tries) >= k
        }

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """`samples.jsonl` as the official `evaluate_functional_correctness` reads it."""
        lines = [{"task_id": record.id.partition("#")[0], "completion": record.prediction} for record in records]
        return {"samples.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}
