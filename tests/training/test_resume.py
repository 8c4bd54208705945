"""Resuming: the same samples, losses, draws and weights, or a refusal that names what differs."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from mm import cli
from mm.datasets.datamodule import DataSet, StreamingDataModule
from mm.objectives.base import Loss
from mm.objectives.instruct import NextToken
from mm.testing import tiny_model
from mm.training.callbacks import SampleLog
from mm.training.checkpoints import AtomicCheckpointIO
from mm.training.module import ObjectiveModule
from mm.training.resume import ResumeCheck
from mm.training.testing import make_run, weights_of


class Noisy(NextToken):
    """Draws in every step, as dropout does; `calls` moves the generators besides."""

    def __call__(self, model: Any, batch: Any) -> Loss:
        loss = super().__call__(model, batch)
        loss.total = loss.total * (1 + torch.rand(()))
        return loss


class Stop(Exception):
    pass


class Crash(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(7)  # what another callback may draw
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batches:
            raise Stop


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, samples=24)
    return folder


def fit(run: Path, folder: Path, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> dict[str, Any]:
    """Trains some steps (or until a crash), and returns the weights."""
    os.environ["PL_GLOBAL_SEED"] = "1"
    torch.manual_seed(0)
    module = ObjectiveModule(tiny_model(), Noisy())
    sets = {name: DataSet(str(run / "shards" / name)) for name in ("pictures", "sounds")}
    data = StreamingDataModule(sets, samples_per_batch=4, row_length=96, max_branches=None)
    config = {"model": {"width": options.pop("width", 32)}, "trainer": {"devices": 1}}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=options.pop("steps", 6), logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder, plugins=[AtomicCheckpointIO()], enable_checkpointing=bool(callbacks),
        callbacks=[SampleLog(), ResumeCheck(config, options.pop("allow", ())), *callbacks], **options,
    )  # fmt: skip
    try:
        trainer.fit(module, data, ckpt_path=ckpt)
    except Stop:
        pass
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_draws_losses_and_weights_go_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    whole = fit(run, tmp_path / "whole")
    lines = log(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(1, 7)) and {line["rank"] for line in lines} == {0}
    assert all(len(line["keys"]) == 4 and float.fromhex(line["loss"]) > 0 for line in lines)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(run, tmp_path / "part", saver, Crash(5))
    assert len(log(tmp_path / "part")) == 5  # two of them of steps that are trained again
    resumed = fit(run, tmp_path / "part", ckpt=tmp_path / "ckpt" / "step=3.ckpt")
    assert (tmp_path / "part" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_within_an_accumulated_step_is_of_its_beginning(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "steps": 3}
    whole = fit(run, tmp_path / "whole", **options)

    class Within(Callback):
        """Saves within the first step, within the second, and between them and the third."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            if done in (1, 5, 6):
                trainer.save_checkpoint(tmp_path / f"{done}.ckpt")

    fit(run, tmp_path / "part", Within(), Crash(7), **options)
    for done in (1, 5, 6):
        resumed = fit(run, tmp_path / "part", ckpt=tmp_path / f"{done}.ckpt", **options)
        assert log(tmp_path / "part") == log(tmp_path / "whole"), done
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), done


def test_the_step_of_an_accumulated_batch_is_one_line(run: Path, tmp_path: Path) -> None:
    fit(run, tmp_path, accumulate_grad_batches=2, steps=3)
    assert [(line["step"], len(line["keys"])) for line in log(tmp_path)] == [(step, 8) for step in range(1, 4)]


def test_another_config_is_refused_by_key_before_weights_are_loaded(run: Path, tmp_path: Path) -> None:
    fit(run, tmp_path, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3), Crash(4))
    checkpoint = tmp_path / "step=3.ckpt"
    with pytest.raises(ValueError, match=r"step=3\.ckpt: .* model\.width: 32 -> 64\. .*--allow-change model\.width"):
        fit(run, tmp_path, ckpt=checkpoint, width=64)
    fit(run, tmp_path, ckpt=checkpoint, width=64, allow=["model"])


def test_a_batch_of_another_size_goes_on_at_the_same_sample(run: Path, tmp_path: Path) -> None:
    sets = {"pictures": DataSet(str(run / "shards" / "pictures"))}
    model = tiny_model()
    first, then = (StreamingDataModule(sets, samples_per_batch=size, row_length=96) for size in (4, 6))
    first.attach(model)
    then.attach(model)
    stream = [key for batch in first.train_dataloader() for key in batch.keys]
    state = {"batches": 3, "samples": 12, "settings": first.state_dict()["settings"]}
    then.load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.samples_per_batch: 4 -> 6"):
        then.train_dataloader()
    then.allow_change = ["data.samples_per_batch"]
    loader = then.train_dataloader()
    assert loader.batches[3].keys == stream[12:18] and loader.batches[4].keys == stream[18:24]
    assert loader.batches.first_sample(5) == 24


# The whole command, in processes that are killed


def start(arguments: list[str], output: Path) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = output.open("w", buffering=1)  # pytest's own would swallow what is said
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os._exit(cli.main(arguments))
    return pid


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_mm_fit_killed_and_resumed_is_the_unbroken_run(tmp_path: Path) -> None:
    """One of the fifty of benchmarks/kill_train.py, with the command itself."""
    outcomes = []
    for kill in (False, True):
        folder = tmp_path / str(kill)
        folder.mkdir()
        config = make_run(folder, samples=24, steps=10)
        command = ["fit", "--config", str(config)]
        pid = start(command, folder / "output.txt")
        lines = folder / "log" / "samples.jsonl"
        while kill and (not lines.exists() or lines.read_bytes().count(b"\n") < 5):
            time.sleep(0.005)
        if kill:
            os.kill(pid, signal.SIGKILL)
            assert end(pid) == -signal.SIGKILL
            pid = start([*command, "--data.workers", "1", "--ckpt_path", "last"], folder / "output.txt")
        assert end(pid) == 0, (folder / "output.txt").read_text()
        outcomes.append((lines.read_bytes(), weights_of(folder / "checkpoints" / "last.ckpt")))
    (one, weights), (other, same) = outcomes
    assert one == other and all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.slow
def test_mm_fit_refuses_what_has_changed(tmp_path: Path) -> None:
    config = make_run(tmp_path, samples=24, steps=2)
    assert end(start(["fit", "--config", str(config)], tmp_path / "output.txt")) == 0
    again = ["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_steps", "4"]
    changes = [
        "--model.optim.lr",
        "0.02",
        "--data.seed",
        "9",
        "--data.workers",
        "1",
        "--trainer.log_every_n_steps",
        "2",
    ]
    assert end(start([*again, *changes], tmp_path / "output.txt")) == 2
    message = (tmp_path / "output.txt").read_text()
    assert all(key in message for key in ("model.optim.lr: 0.01 -> 0.02", "data.seed: 3 -> 9", "trainer.max_steps"))
    assert "data.workers" not in message and "log_every_n_steps" not in message
    allowed = [word for key in ("model.optim.lr", "data", "trainer.max_steps") for word in ("--allow-change", key)]
    assert end(start([*again, *changes, *allowed], tmp_path / "output.txt")) == 0
    assert yaml.safe_load(config.read_text())["seed_everything"] == 5
