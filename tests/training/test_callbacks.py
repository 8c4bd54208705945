"""Callbacks on a real Trainer and a module that only pretends to route."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mm.training import callbacks
from mm.training.callbacks import ProgressBar, RoutingMonitor, SaveModelDirectory, Throughput, expert_counts
from mm.types import MODALITIES, Routing

EXPERTS = 3


@dataclass
class Info:
    tokens: int
    positions: int
    samples: int
    routings: list[Routing | None]
    modality_ids: Tensor


def routing_of(indices: Tensor, mask: Tensor) -> Routing:
    logits = torch.zeros(len(indices), EXPERTS)
    return Routing(indices, torch.ones(indices.shape), logits, logits.softmax(-1), mask)


class Module(pl.LightningModule):
    """Eight positions a step, six of them tokens; layer 0 is dense, layer 1 sends text to 0 and images to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        modality_ids = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0]])
        mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
        routing = routing_of(modality_ids.reshape(-1, 1), mask)
        self.last_step = Info(6, 8, 2, [None, routing], modality_ids)
        loss = self.model(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(root: Path, *extra: pl.Callback, steps: int = 6, resume: str | None = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, log_every_n_steps=1, logger=CSVLogger(root, name="", version=""),
        callbacks=list(extra), enable_model_summary=False, enable_checkpointing=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in extra), **options,
    )  # fmt: skip
    rows: Any = torch.ones(20, 1)
    trainer.fit(Module(), DataLoader(rows, batch_size=1), ckpt_path=resume)
    return trainer


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "routing.jsonl").read_text().splitlines()]


def test_expert_counts_by_hand() -> None:
    indices = torch.tensor([[0, 1], [0, 2], [2, 1], [1, 0]])
    mask = torch.tensor([True, True, True, False])
    counts = expert_counts(routing_of(indices, mask), torch.tensor([[0, 0], [3, 2]]))
    text, video = MODALITIES.index("text"), MODALITIES.index("video")
    assert counts[text].tolist() == [2, 1, 1]
    assert counts[video].tolist() == [0, 1, 1]
    assert counts.sum() == 6  # the padded position, though it has indices and a modality, is nowhere
    assert counts.sum(0).tolist() == routing_of(indices, mask).load().tolist()


def test_routing_file_sums_between_lines_and_keeps_the_rest(tmp_path: Path) -> None:
    trainer = fit(tmp_path, RoutingMonitor(every_n_steps=4))
    first, last = lines(tmp_path)
    assert (first["step"], last["step"]) == (4, 6)  # the two steps after the last full line are not lost
    assert first["layers"] == [{"layer": 1, "max_over_mean": 2.0, "counts": {"text": [16, 0, 0], "image": [0, 8, 0]}}]
    assert last["layers"][0]["counts"] == {"text": [8, 0, 0], "image": [0, 4, 0]}
    assert trainer.callback_metrics["routing/max_over_mean"] == 2.0


def test_accumulation_counts_batches_by_optimizer_step(tmp_path: Path) -> None:
    fit(tmp_path, RoutingMonitor(every_n_steps=2), steps=4, accumulate_grad_batches=3)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert lines(tmp_path)[0]["layers"][0]["counts"]["text"] == [4 * 6, 0, 0]


def test_resumed_run_goes_on_and_a_new_one_starts_over(tmp_path: Path) -> None:
    trainer = fit(tmp_path, RoutingMonitor(every_n_steps=2), steps=4)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    with (tmp_path / "routing.jsonl").open("a") as file:
        file.write('{"step": 6, "layers": []}\n{"step": 8, "lay')  # steps after the checkpoint, and a torn line
    fit(tmp_path, RoutingMonitor(every_n_steps=2), steps=6, resume=str(tmp_path / "at4.ckpt"))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert lines(tmp_path)[-1]["layers"]
    fit(tmp_path, RoutingMonitor(every_n_steps=2), steps=2)
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_dense_model_writes_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Module.training_step

    def step(self: Module, batch: Tensor, index: int) -> Tensor:
        loss = plain(self, batch, index)
        self.last_step.routings = [None, None]
        return loss

    monkeypatch.setattr(Module, "training_step", step)
    trainer = fit(tmp_path, RoutingMonitor(every_n_steps=1), steps=2)
    assert lines(tmp_path) == []
    assert "routing/max_over_mean" not in trainer.callback_metrics


def test_throughput_over_a_window_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    now, logged = [0.0], {}
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    module: Any = SimpleNamespace(log_dict=lambda values, **_: logged.update(values))
    module.last_step = Info(60, 80, 4, [], torch.zeros(1))
    trainer: Any = SimpleNamespace(world_size=2)
    meter = Throughput(window=2)
    meter.on_train_start(trainer, module)
    for seconds in (100.0, 1.0, 1.0):  # the first batch is slow, and leaves the window
        now[0] += seconds
        meter.on_train_batch_end(trainer, module, None, None, 0)
    assert logged == {
        "throughput/tokens_per_second": 2 * 60.0,
        "throughput/samples_per_second": 2 * 4.0,
        "throughput/non_padding": 0.75,
    }
    meter.on_validation_start(trainer, module)
    now[0] += 1000.0
    meter.on_validation_end(trainer, module)
    now[0] += 1.0
    meter.on_train_batch_end(trainer, module, None, None, 0)
    assert logged["throughput/tokens_per_second"] == 2 * 60.0


def test_metrics_reach_the_csv(tmp_path: Path) -> None:
    fit(tmp_path, Throughput(), RoutingMonitor(every_n_steps=3))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["throughput/non_padding"]) == 0.75 for row in rows)
    assert all(float(row["throughput/tokens_per_second"]) > 0 for row in rows)
    assert [row["routing/max_over_mean"] for row in rows[:3]] == ["", "", "2.0"]


def test_progress_bar_says_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output of a test is no terminal: plain lines."""
    fit(tmp_path, Throughput(), RoutingMonitor(every_n_steps=1), ProgressBar(plain_lines=2), accumulate_grad_batches=2)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("  ")[0] for line in printed] == ["step 3/6", "step 6/6"]
    for words in ("loss ", "tok/s ", "samples/s ", "non-pad 75%", "max/mean load 2.00"):
        assert words in printed[0]


def test_progress_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    fit(tmp_path, Throughput(), RoutingMonitor(every_n_steps=1), ProgressBar(), limit_train_batches=6)
    shown = capsys.readouterr().out
    assert "6/6" in shown and "non-pad=75%" in shown and "max/mean load=2.00" in shown
    assert "step 6/6" not in shown


@pytest.mark.parametrize(
    ("value", "spelled"), [(0.01234, "0.0123"), (7.314, "7.31"), (412.4, "412"), (12345, "12.3k"), (1.2e6, "1.20M")]
)
def test_short_number(value: float, spelled: str) -> None:
    assert callbacks.short_number(value) == spelled


def test_model_directory_is_saved_once_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[Any, Path]] = []
    monkeypatch.setattr(callbacks.checkpoint, "save", lambda model, path: saved.append((model, path)))
    trainer = fit(tmp_path, SaveModelDirectory(str(tmp_path / "model")), steps=2)
    assert saved == [(trainer.lightning_module.model, tmp_path / "model")]
    fit(tmp_path, SaveModelDirectory(str(tmp_path / "model")), fast_dev_run=True)
    assert len(saved) == 1


@pytest.mark.parametrize("build", [lambda: Throughput(window=0), lambda: RoutingMonitor(every_n_steps=0)])
def test_nonpositive_periods(build: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build()
