"""Greedy decoding, tokens a second: `model.generate` against transformers' on the same random weights, and the memory.

    OMP_NUM_THREADS=1 python benchmarks/decode.py --clock cpu      a shared machine: CPU seconds of one thread
    python benchmarks/decode.py [--models llama,moe] [--dtypes float32,bfloat16] [--batches 1,8] [--json FILE]

A Llama of 47M parameters and a Qwen3-MoE of 97M (26 experts, 4 chosen), a prompt of 16 tokens and 32 new ones, the
prompt's time taken off. The limit of a step is the time in which its weights can be read once (a sum over 512 MiB, in
the same run); with 8 rows every expert counts that some row is expected to choose. Runs alternate; medians.

Goals: one row against transformers 2x dense and 2.5x MoE, and .75 (float32) and .55 (bfloat16) of the limit for the
dense model; eight rows 1.2x.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import mm

PROMPT, NEW = 16, 32
GOALS = {("llama", 1): 2.0, ("moe", 1): 2.5, ("llama", 8): 1.2, ("moe", 8): 1.2}
LIMIT_GOALS = {"float32": 0.75, "bfloat16": 0.55}
LINE = (
    "| {model} | {dtype} | {rows} | {run} | {tokens_per_second:.1f} | {share_of_limit:.2f} | {ratio:.2f} "
    "| {spread:.0%} | {same_tokens:.2f} |"
)
COMMON: dict[str, Any] = {"vocab_size": 16384, "num_hidden_layers": 8, "tie_word_embeddings": True}


HEADS: dict[str, Any] = {"head_dim": 64}


def reference(name: str) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            **COMMON, hidden_size=640, intermediate_size=1728, num_attention_heads=10, num_key_value_heads=5
        )
        return transformers.LlamaForCausalLM(config)
    config: Any = transformers.Qwen3MoeConfig(
        **COMMON, **HEADS, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_attention_heads=8,
        num_key_value_heads=4, num_experts=26, num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def bytes_per_step(model: Any, rows: int) -> float:
    """Of the weights that a step reads; of experts, as many as so many rows are expected to choose."""
    numbers, config = sum(p.numel() for p in model.parameters()), model.config
    if chosen := getattr(config, "num_experts_per_tok", 0):
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        idle = config.num_experts * (1 - chosen / config.num_experts) ** rows
        numbers -= config.num_hidden_layers * expert * idle
    return numbers * next(model.parameters()).element_size()


def per_token(generate: Callable[[int], Any], clock: Callable[[], float]) -> float:
    """Seconds of a step, without what the prompt takes."""
    start = clock()
    generate(1)
    first = clock()
    generate(NEW)
    return (clock() - first - (first - start)) / (NEW - 1)


def measure(name: str, dtype: torch.dtype, rows: int, caches: list[str], repeats: int, clock: Any) -> list[dict]:
    theirs = reference(name).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = mm.load(folder).eval().to(dtype)
    ids = torch.randint(0, 16384, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}

    def by_transformers(count: int) -> Tensor:
        return theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)[:, PROMPT:]

    runs = {"transformers": by_transformers} | {
        f"mm, cache {cache}": lambda count, cache=cache: ours.generate(ids, max_new_tokens=count, stop=(), cache=cache)
        for cache in caches
    }
    memory = torch.ones(2**27)

    def bandwidth() -> float:
        start = clock()
        memory.sum()
        return 2**29 / (clock() - start)

    expected = by_transformers(NEW)
    same = {run: float((generate(NEW) == expected).float().mean()) for run, generate in runs.items()}
    times: dict[str, list[float]] = {run: [] for run in runs}
    speeds: list[float] = []
    for _ in range(repeats):
        for run, generate in runs.items():
            speeds.append(bandwidth())
            times[run].append(per_token(generate, clock))
    limit = statistics.median(speeds) / bytes_per_step(theirs, rows)  # steps a second
    base = statistics.median(times["transformers"])
    return [
        {
            "model": name, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "run": run,
            "tokens_per_second": rows / statistics.median(taken),
            "share_of_limit": 1 / statistics.median(taken) / limit,
            "ratio": base / statistics.median(taken), "spread": (max(taken) - min(taken)) / statistics.median(taken),
            "same_tokens": same[run],
        }
        for run, taken in times.items()
    ]  # fmt: skip


def missed(row: dict[str, Any]) -> list[str]:
    """The goals that a row of `mm` with the static cache falls short of."""
    if row["run"] != "mm, cache static":
        return []
    found = []
    if row["ratio"] < (goal := GOALS[row["model"], row["rows"]]):
        found.append(f"{row['ratio']:.2f}x of {goal}x")
    if row["model"] == "llama" and row["rows"] == 1 and row["share_of_limit"] < (goal := LIMIT_GOALS[row["dtype"]]):
        found.append(f"{row['share_of_limit']:.2f} of the limit, goal {goal}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama,moe")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--caches", default="dynamic,static")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {args.clock} clock")
    print("| model | dtype | rows | run | tokens/s | of the limit | against transformers | spread | same tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows, failures = [], []
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for count in map(int, args.batches.split(",")):
                with torch.inference_mode():
                    found = measure(name, getattr(torch, dtype), count, args.caches.split(","), args.repeats, clock)
                for row in found:
                    print(LINE.format(**row), flush=True)
                    failures += [f"{name} {dtype} {count} rows: {what}" for what in missed(row)]
                rows += found
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for failure in failures:
        print("missed:", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
