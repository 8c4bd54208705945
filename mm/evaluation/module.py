"""`mm validate --config configs/evaluation/NAME.yaml`: benchmarks for a trained model, by Lightning's command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

import mm
from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.runner import evaluate


class _Benchmarks(IterableDataset[Benchmark]):
    """Every rank gets every benchmark: the ranks share each one's questions, not the benchmarks."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self.benchmarks = benchmarks

    def __iter__(self) -> Iterator[Benchmark]:
        return iter(self.benchmarks)


class EvaluationModule(LightningModule):
    """Scores of a model on benchmarks. One "batch" of validation is one whole benchmark, which all ranks share.

    Args:
        model: directory of a checkpoint, opened with `mm.load`.
        benchmarks: what to ask, in this order.
        output: where results are written; default: `results` beside the model directory.
        controls: also ask without media, and with shuffled media.
        limit: only the first questions of each benchmark.
        batch_size: requests decoded together.
        seed: of the shuffled media.
        show_progress: a progress bar with the running score.
    """

    def __init__(
        self,
        model: str,
        benchmarks: list[Benchmark],
        output: str | None = None,
        controls: bool = True,
        limit: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        super().__init__()
        names = [benchmark.name for benchmark in benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks: {', '.join(names)}: each may be given once, for its results bear its name")
        self.path = Path(model)
        self.benchmarks = benchmarks
        self.output = self.path.parent / "results" if output is None else Path(output)
        self.options: dict[str, Any] = {
            "controls": controls,
            "limit": limit,
            "batch_size": batch_size,
            "seed": seed,
            "show_progress": show_progress,
        }
        self.results: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        self.model = mm.load(self.path)

    def val_dataloader(self) -> DataLoader[Benchmark]:
        return DataLoader(_Benchmarks(self.benchmarks), batch_size=None)

    def transfer_batch_to_device(self, batch: Benchmark, device: Any, dataloader_idx: int) -> Benchmark:
        return batch

    def on_validation_start(self) -> None:
        self.results = []

    def validation_step(self, batch: Benchmark, batch_idx: int) -> None:
        result = evaluate(self.model, batch, output=self.output, model_path=self.path, **self.options)
        self.results.append(result)
        numbers = {f"{batch.name}/{name}": value for name, value in result["scores"].items()}
        for control, scores in result["controls"].items():
            numbers |= {f"{batch.name}/{control}/{name}": value for name, value in scores.items()}
        self.log_dict(numbers, batch_size=1, rank_zero_only=True)  # every rank has the same

    def on_validation_end(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(score_table(self.results))

    def predict_step(self, batch: Benchmark, batch_idx: int) -> dict[str, Any]:
        """`mm predict`: the answers, written with their scores, without the controls."""
        options: dict[str, Any] = self.options | {"controls": False}
        return evaluate(self.model, batch, output=self.output, model_path=self.path, **options)

    predict_dataloader = val_dataloader

    # `mm test` does the same as `mm validate`.
    test_dataloader = val_dataloader
    test_step = validation_step
    on_test_start = on_validation_start
    on_test_end = on_validation_end


def score_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Scores with their intervals beside chance and controls; a dash where a control does not ask those questions.

    Fractions are shown in percent, other scores (perplexities, recalls) as they are.
    """
    controls = list(dict.fromkeys(name for result in results for name in result["controls"]))
    table = Table(title="Scores (fractions in percent)", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in ("benchmark", "score"):
        table.add_column(heading, no_wrap=True)
    for heading in ("model", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("chance", *(name.replace("_", " ") for name in controls)):
        table.add_column(heading, justify="right")
    for result in results:
        labels = [str(result["benchmark"]), f"n = {result['n']:,}"]
        if not result["scores"]:
            table.add_row(" ".join(labels), "answers hidden: see its submission folder", *["-"] * (3 + len(controls)))
        for row, (name, score) in enumerate(result["scores"].items()):
            beside = [result["chance"], *(result["controls"].get(control, {}) for control in controls)]
            table.add_row(
                " ".join(labels) if len(result["scores"]) == 1 else labels[row] if row < 2 else "",
                name.replace("_", " ").removesuffix(" accuracy"),
                spell(name, score),
                "–".join(spell(name, end) for end in result["intervals"].get(name, ())) or "-",
                *(spell(name, scores[name]) if name in scores else "-" for scores in beside),
                end_section=row == len(result["scores"]) - 1,
            )
    return table


ABSOLUTE = (
    "perplexity",
    "bits_per",
    "cider",
    "txt_r",
    "img_r",
    "r_mean",
)  # parts of the names of scores in their own unit


def spell(name: str, score: float) -> str:
    return f"{score:.3f}" if any(part in name for part in ABSOLUTE) else f"{100 * score:.1f}"
