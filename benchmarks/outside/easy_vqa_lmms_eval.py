"""easy-VQA three ways: `mm validate`, lmms-eval with our model, and our scorer on saved predictions. One number.

    python benchmarks/outside/easy_vqa_lmms_eval.py MODEL ENV [--questions 500]

ENV is a folder for lmms-eval's environment (about 150 packages, made on the first run). lmms-eval reads the questions
from a parquet file that this script writes, by a task that it writes too; lmms-eval itself is unchanged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from environment import make, run

TASK = """
task: easy_vqa_mm
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {parquet}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "question"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: {max_new_tokens}, temperature: 0, do_sample: false}}
process_results: !function utils.score
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""
UTILS = '''
import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(doc["image"]))]


def score(doc, results):
    """Exact match, whatever the case: easy-VQA's answers are single words."""
    return {"accuracy": float(results[0].strip().lower() == doc["answer"])}
'''


def write_task(folder: Path, questions: int | None) -> None:
    import pyarrow
    import pyarrow.parquet

    from mm.evaluation.benchmarks.easy_vqa import EasyVQABenchmark

    benchmark = EasyVQABenchmark()
    rows = [
        {"id": s.key, "question": s.meta["question"], "answer": s.meta["answers"][0], "image": s.media[0].data}
        for s in benchmark.samples()[:questions]
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    text = TASK.format(parquet=folder / "test.parquet", max_new_tokens=benchmark.max_new_tokens)
    (folder / "easy_vqa_mm.yaml").write_text(text)
    (folder / "utils.py").write_text(UTILS)


def validate(model: Path, out: Path, questions: int | None) -> None:
    limit = ["--model.limit", str(questions)] if questions else []
    line = [sys.executable, "-m", "mm.cli", "validate", "--benchmarks", "easy_vqa", "--model.model", str(model)]
    run(*line, "--model.output", str(out), "--no-controls", "--trainer.accelerator", "cpu", *limit)


def rescored(out: Path) -> float:
    """Our scorer on the saved predictions, without the model."""
    from mm.evaluation import results
    from mm.evaluation.benchmarks.base import exact_match

    records = results.read_records(out / "easy_vqa.predictions.jsonl")
    return sum(exact_match(record.prediction, record.answers) for record in records) / len(records)


def outside(python: Path, model: Path, folder: Path, out: Path) -> float:
    line = [str(python), "-m", "lmms_eval", "--model", "mm", "--model_args", f"model={model.resolve()},device=cpu"]
    line += ["--tasks", "easy_vqa_mm", "--include_path", str(folder), "--batch_size", "64", "--output_path", str(out)]
    run(*line)
    files = sorted(out.rglob("*results.json"))
    if not files:  # lmms-eval exits 0 after a failed evaluation
        raise SystemExit(f"lmms-eval wrote no results under {out}: its log above says why")
    scores = json.loads(files[-1].read_text())["results"]["easy_vqa_mm"]
    return next(value for name, value in scores.items() if name.startswith("accuracy,"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--questions", type=int, help="only the first so many (default: all 9,673)")
    options = parser.parse_args()
    python = make(options.environment, "lmms-eval==0.7.3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, options.questions)
        validate(options.model, folder / "ours", options.questions)
        result = json.loads((folder / "ours" / "easy_vqa.json").read_text())
        numbers = {
            "mm validate": result["scores"]["accuracy"],
            "scorer on saved predictions": rescored(folder / "ours"),
            "lmms-eval": outside(python, options.model, folder, folder / "theirs"),
        }
    for way, number in numbers.items():
        print(f"{way:<30}{number:.6f}   ({result['n']:,} questions)")
    same = max(numbers.values()) - min(numbers.values()) < 1e-9
    print("the same number" if same else "DIFFERENT numbers")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
