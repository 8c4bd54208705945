"""Benchmarks while a model trains: every so many steps, on a subset, by the same runner as `mm validate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.runner import evaluate

FILE = "evaluation.jsonl"


class EvaluateDuringTraining(Callback):
    """Scores `pl_module.model` on the first `limit` questions of each benchmark, every `every_n_steps` optimizer steps.

    Logs `eval/BENCHMARK/SCORE` and, with `controls`, `eval/BENCHMARK/CONTROL/SCORE`; appends a line {"step",
    "benchmark", "n", "scores", "intervals", "chance", "controls"} to `evaluation.jsonl` in the trainer's log directory.
    A resumed run goes on with its file. Training is not disturbed: dropout and random numbers go on as if nothing was.

    Raises ValueError if `every_n_steps` or `limit` is not positive, or a benchmark is given twice.
    """

    def __init__(
        self,
        benchmarks: list[Benchmark],
        every_n_steps: int,
        limit: int | None = 100,
        controls: bool = False,
        batch_size: int = 32,
    ) -> None:
        if every_n_steps < 1 or (limit is not None and limit < 1):
            raise ValueError(
                f"EvaluateDuringTraining: every_n_steps={every_n_steps} and limit={limit} must be 1 or more"
            )
        names = [benchmark.name for benchmark in benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks: {', '.join(names)}: each may be given once, for its scores bear its name")
        self.benchmarks = benchmarks
        self.every_n_steps = every_n_steps
        self.limit = limit
        self.controls = controls
        self.batch_size = batch_size
        self._evaluated_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated_step = trainer.global_step
        path = self._path(trainer)
        if trainer.is_global_zero and path.exists():
            # Steps after the checkpoint are trained again: their old lines would stand twice.
            kept = [line for line in _lines(path) if line["step"] <= trainer.global_step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._evaluated_step or step % self.every_n_steps:
            return
        self._evaluated_step = step
        model: Any = pl_module.model
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with trainer.strategy.precision_plugin.forward_context():
                for benchmark in self.benchmarks:
                    self._evaluate(trainer, pl_module, model, benchmark)
        finally:
            for module in training:
                module.training = True

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: Any, benchmark: Benchmark) -> None:
        result = evaluate(
            model,
            benchmark,
            controls=self.controls,
            limit=self.limit,
            batch_size=self.batch_size,
            show_progress=False,
        )
        scores = {f"eval/{benchmark.name}/{name}": value for name, value in result["scores"].items()}
        for control, found in result["controls"].items():
            scores |= {f"eval/{benchmark.name}/{control}/{name}": value for name, value in found.items()}
        pl_module.log_dict(scores, on_step=True, on_epoch=False, batch_size=1, rank_zero_only=True)
        path = self._path(trainer)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = ("benchmark", "n", "scores", "intervals", "chance", "controls")
            line = {"step": trainer.global_step, **{name: result[name] for name in kept}}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _path(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / FILE  # asks rank zero, so every rank must


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    """A last line torn by a killed run is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
