"""What a training run shows and leaves behind: throughput, routing by modality, a compact progress bar, the model.

Each callback reads `pl_module.last_step`, a record of the batch just trained on (`mm.training.module.StepInfo`), so
none of them touches the model's forward. Shape legend: `S` positions of the batch, `E` experts, `K` chosen experts.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from mm import checkpoint
from mm.decoder.ffn.moe import max_over_mean_load
from mm.training.logs import open_log
from mm.types import MODALITIES, Routing

ROUTING_FILE = "routing.jsonl"
SAMPLES_FILE = "samples.jsonl"


class Step(Protocol):
    """What the callbacks need to know of one training step: this rank's counts, and each layer's routing.

    `positions` is rows x length of the batch, `tokens` those of them that are not padding. `loss` is a sum over `count`
    things. `routings` has one entry per
    decoder layer, None where the layer is dense; `modality_ids` (B, T) indexes `MODALITIES`.
    """

    tokens: int
    positions: int
    samples: int
    routings: list[Routing | None]
    modality_ids: Tensor
    loss: Tensor
    count: Tensor


class Throughput(Callback):
    """Logs `throughput/tokens_per_second`, `throughput/samples_per_second` and `throughput/non_padding`.

    Rates are wall-clock, data loading included and validation excluded, over the last `window` batches, so that the
    slow first ones are forgotten. They are this rank's times the number of ranks: no step waits to be measured.
    `non_padding` is the share of positions that hold a token.

    Raises ValueError if `window` is not positive.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"Throughput: window must be at least 1 batch, not {window}")
        self.window = window
        self._restart()

    def _restart(self) -> None:
        # (seconds, tokens, positions, samples), each summed since the start; the window is last minus first
        self._marks: deque[tuple[float, int, int, int]] = deque(maxlen=self.window + 1)
        self._marks.append((time.perf_counter(), 0, 0, 0))
        self._paused = 0.0
        self._pause_start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused += time.perf_counter() - self._pause_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step: Step = pl_module.last_step  # type: ignore[assignment]
        _, tokens, positions, samples = self._marks[-1]
        now = time.perf_counter() - self._paused
        self._marks.append((now, tokens + step.tokens, positions + step.positions, samples + step.samples))
        seconds, tokens, positions, samples = (b - a for a, b in zip(self._marks[0], self._marks[-1], strict=True))
        pl_module.log_dict(
            {
                "throughput/tokens_per_second": trainer.world_size * tokens / seconds,
                "throughput/samples_per_second": trainer.world_size * samples / seconds,
                "throughput/non_padding": tokens / positions,
            },
            on_step=True,
            on_epoch=False,
            batch_size=step.samples,
        )


def expert_counts(routing: Routing, modality_ids: Tensor) -> Tensor:
    """(len(MODALITIES), E) int64: how many unpadded tokens of each modality chose each expert.

    `modality_ids` is (S,) or (B, T) with B * T = S. Stays on the device: nothing here waits for a GPU.
    """
    experts = routing.logits.shape[-1]
    cells_SK = modality_ids.reshape(-1, 1) * experts + routing.indices
    chosen_SK = routing.chosen().long()
    counts = torch.zeros(len(MODALITIES) * experts, dtype=torch.int64, device=cells_SK.device)
    return counts.index_add_(0, cells_SK.reshape(-1), chosen_SK.reshape(-1)).view(len(MODALITIES), experts)


class RoutingMonitor(Callback):
    """Writes which experts read which modality to `routing.jsonl` in the trainer's log directory.

    One line per `every_n_steps` optimizer steps, summed over the batches since the line before and over all ranks:
    `{"step": 50, "layers": [{"layer": 1, "max_over_mean": 1.2, "counts": {"text": [E numbers], "image": [...]}}]}`.
    Dense layers and absent modalities are left out. Logs `routing/max_over_mean`, that of the least even layer.
    A resumed run goes on with its file; a run from step 0 starts a new one.

    Raises ValueError if `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"RoutingMonitor: every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._counts: dict[int, Tensor] = {}
        self._written_step = 0
        self._path = Path()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._path = open_log(trainer, ROUTING_FILE)
        self._counts, self._written_step = {}, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step: Step = pl_module.last_step  # type: ignore[assignment]
        for layer, routing in enumerate(step.routings):
            if routing is None:
                continue
            counts = expert_counts(routing, step.modality_ids)
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
        if trainer.global_step // self.every_n_steps > self._written_step // self.every_n_steps:
            imbalance = self._write(trainer)
            if imbalance is not None:
                pl_module.log("routing/max_over_mean", imbalance, on_step=True, on_epoch=False, batch_size=step.samples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._written_step:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> float | None:
        """Writes the counts gathered so far as one line and forgets them; returns the worst imbalance, if any."""
        layers = []
        for layer, counts in sorted(self._counts.items()):
            total = trainer.strategy.reduce(counts, reduce_op="sum")
            assert isinstance(total, Tensor)
            by_modality = dict(zip(MODALITIES, total.cpu(), strict=True))
            named = {name: load.tolist() for name, load in by_modality.items() if load.any()}
            imbalance = max_over_mean_load(total.sum(dim=0).float())
            layers.append({"layer": layer, "max_over_mean": round(imbalance, 4), "counts": named})
        self._counts, self._written_step = {}, trainer.global_step
        if not layers:
            return None
        if trainer.is_global_zero:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, "layers": layers}) + "\n")
        return max(entry["max_over_mean"] for entry in layers)


class SampleLog(Callback):
    """Writes what was trained on to `samples.jsonl` in the trainer's log directory, one line a step and rank:

        {"step": 12, "rank": 0, "keys": ["a_7", ...], "loss": "0x1.8p+0"}

    The keys are this rank's, in the order of the stream: those of all ranks, one after another, are the global batch.
    The loss is the mean over this rank's batch (all batches of the step, where gradients are accumulated), exact: a
    hexadecimal float. A resumed run goes on with its file, and its lines are those of an unbroken one, bit for bit.
    Reading the loss waits for the step to end, which costs some speed on a GPU.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._step = 0
        self._keys: list[str] = []
        self._losses: list[tuple[float, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._path, self._step = open_log(trainer, SAMPLES_FILE), trainer.global_step
        self._keys, self._losses = [], []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step: Step = pl_module.last_step  # type: ignore[assignment]
        self._keys += batch.keys
        self._losses.append((float(step.loss), float(step.count)))
        if trainer.global_step == self._step:
            return  # more batches of this step are to come
        self._step = trainer.global_step
        loss = sum(loss for loss, _ in self._losses) / max(1.0, sum(count for _, count in self._losses))
        line = {"step": self._step, "rank": trainer.global_rank, "keys": self._keys, "loss": loss.hex()}
        with self._path.open("ab", buffering=0) as file:  # one write a line: the ranks of a machine share the file
            file.write((json.dumps(line) + "\n").encode())
        self._keys, self._losses = [], []


def short_number(value: float) -> str:
    """Three figures: 0.0123, 7.31, 412, 12.3k, 1.20M."""
    return tqdm.format_sizeof(value) if value >= 1000 else f"{value:.3g}"


class ProgressBar(TQDMProgressBar):
    """One line: loss, tokens/s, samples/s, share of non-padding positions and load imbalance (busiest / mean expert).

    Shows what the module logs with `prog_bar=True`, then what `Throughput` and `RoutingMonitor` log, if they are there.
    Where standard output is not a terminal (a log file, CI), it prints about `plain_lines` lines a run instead.
    """

    BAR_FORMAT = "{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"

    def __init__(self, refresh_rate: int = 1, plain_lines: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.plain_lines = plain_lines
        self._steps = 0.0
        self._printed_step = 0

    @property
    def is_disabled(self) -> bool:
        return super().is_disabled or not sys.stdout.isatty()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The numbers as the bar spells them, in their order."""
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = {name: short_number(float(value)) for name, value in trainer.progress_bar_metrics.items()}
        for name, label, spell in (
            ("throughput/tokens_per_second", "tok/s", short_number),
            ("throughput/samples_per_second", "samples/s", short_number),
            ("throughput/non_padding", "non-pad", "{:.0%}".format),
            ("routing/max_over_mean", "max/mean load", "{:.2f}".format),
        ):
            if name in known:
                shown[label] = spell(known[name])
        return {name.removeprefix("train/"): value for name, value in shown.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # type: ignore[override]
        super().on_train_start()
        self._steps, self._printed_step = float(trainer.estimated_stepping_batches), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        done = trainer.global_step
        if not self.is_enabled or sys.stdout.isatty() or done == self._printed_step:
            return
        endless = math.isinf(self._steps)
        every = 100 if endless else max(1, round(self._steps / self.plain_lines))
        if done % every == 0 or done == self._steps:
            self._printed_step = done
            numbers = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            print(f"step {done}" + ("" if endless else f"/{self._steps:.0f}") + f"  {numbers}", flush=True)


class SaveModelDirectory(Callback):
    """At the end of fitting, writes the model as a directory anyone can read (`mm.checkpoint.save`), on rank zero.

    Not after a `fast_dev_run`: its two batches must not replace a trained model.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            checkpoint.save(pl_module.model, Path(self.path))  # type: ignore[arg-type]
