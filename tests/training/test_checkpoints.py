"""Checkpoint files: whole or not there, every flipped bit noticed, and no old one lost to a new one that failed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mm.training import checkpoint_file
from mm.training.checkpoint_file import sweep, verify_checkpoint, write_checkpoint
from mm.training.checkpoints import AtomicCheckpointIO, CheckpointProbe

Usage = namedtuple("Usage", "total used free")


def state(step: int, numbers: int = 1000) -> dict[str, Any]:
    return {"global_step": step, "epoch": 1, "state_dict": {"w": torch.full((numbers,), float(step))}, "x": [1, "y"]}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_an_ordinary_archive_with_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    write_checkpoint(state(7), path)
    about = verify_checkpoint(path)
    assert (about["step"], about["epoch"], about["format"]) == (7, 1, "mm-checkpoint-1")
    assert torch.equal(torch.load(path)["state_dict"]["w"], torch.full((1000,), 7.0))
    assert zipfile.ZipFile(path).testzip() is None
    assert files(path.parent) == ["a.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(path)["x"] == [1, "y"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(7, 10), path)
    data = path.read_bytes()
    for bit in [*range(0, len(data) * 8, 41), *range((len(data) - 64) * 8, len(data) * 8, 7)]:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a\.ckpt: damaged"):
            verify_checkpoint(path)


@pytest.mark.parametrize("length", [0, 10, 100, 3000])
def test_cut_off_files_and_those_of_others(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(state(1), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.ckpt: damaged, or not a checkpoint of this project"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "marker"),)

    write_checkpoint({"a": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert files(tmp_path) == ["a.ckpt"]


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, 1_000_000))
    with pytest.raises(OSError, match=r"takes 4,\d{3},\d{3} bytes and 1,000,000 are free; make room"):
        write_checkpoint(state(2), path)
    monkeypatch.undo()

    class Full:
        """A file on a file system that ends after 2000 bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            if self.file.tell() > 2000:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = checkpoint_file._HashingWriter
    monkeypatch.setattr(checkpoint_file, "_HashingWriter", lambda file: real(Full(file)))  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"no space left for a checkpoint .* a\.ckpt is as it was"):
        write_checkpoint(state(2), path)
    assert verify_checkpoint(path)["step"] == 1 and files(tmp_path) == ["a.ckpt"]


def test_what_was_written_is_read_back_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)

    def rot(file: Any) -> None:
        partial = Path(file.name)
        data = bytearray(partial.read_bytes())
        data[500] ^= 1
        partial.write_bytes(data)

    monkeypatch.setattr(checkpoint_file, "_drop_cache", rot)
    with pytest.raises(OSError, match="read back is not what was written"):
        write_checkpoint(state(2), path)
    assert verify_checkpoint(path)["step"] == 1 and files(tmp_path) == ["a.ckpt"]


def test_the_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    write_checkpoint(state(1), tmp_path / "a.ckpt")
    assert verify_checkpoint(tmp_path / "a.ckpt")["step"] == 1


def test_kills_while_saving(tmp_path: Path) -> None:
    """Five of the two hundred of benchmarks/kill_checkpoint.py."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(0, 50_000), path)
    for wait in (0.0, 0.003, 0.006, 0.01, 0.02):
        ready, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(said, b"!")
            step = 0
            while True:
                step += 1
                write_checkpoint(state(step, 50_000), path)
        os.read(ready, 1)
        threading.Event().wait(wait)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = verify_checkpoint(path)["step"]
        assert bool((torch.load(path)["state_dict"]["w"] == step).all())
        sweep(tmp_path)
        assert files(tmp_path) == ["a.ckpt"]


def test_sweeping_spares_a_write_under_way(tmp_path: Path) -> None:
    for name in (".a.ckpt.1-1.tmp", ".b.ckpt.2-2.tmp", "mine.txt"):
        (tmp_path / name).write_bytes(b"half")
    with (tmp_path / ".a.ckpt.1-1.tmp").open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        assert sweep(tmp_path) == [tmp_path / ".b.ckpt.2-2.tmp"]
    assert files(tmp_path) == [".a.ckpt.1-1.tmp", "mine.txt"]


# In a thread


def test_asynchronous_writes_are_of_the_moment_they_were_asked_for(tmp_path: Path) -> None:
    io, content = AtomicCheckpointIO(asynchronous=True), state(1)
    io.save_checkpoint(content, tmp_path / "a.ckpt")
    content["state_dict"]["w"].fill_(99)
    content["x"].append("later")
    io.save_checkpoint(content, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    found = io.load_checkpoint(tmp_path / "b.ckpt")
    io.teardown()
    assert found["x"] == [1, "y", "later"] and files(tmp_path) == ["b.ckpt"]
    io.save_checkpoint(state(1), tmp_path / "a.ckpt")  # and it can be used again
    io.teardown()
    assert torch.equal(torch.load(tmp_path / "a.ckpt")["state_dict"]["w"], torch.ones(1000))


def test_a_failed_asynchronous_write_keeps_the_old_one_and_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = AtomicCheckpointIO(asynchronous=True)
    io.save_checkpoint(state(1), tmp_path / "a.ckpt")
    io._wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 1, 0))
    io.save_checkpoint(state(2), tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")  # what Lightning asks for next
    with pytest.raises(OSError, match="0 are free"):
        io.teardown()
    assert files(tmp_path) == ["a.ckpt"]


# Under Lightning


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def train_dataloader(self) -> Any:
        rows: Any = torch.ones(8, 1)
        return torch.utils.data.DataLoader(rows)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder: Path, ckpt: Any = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=2, save_last=True), CheckpointProbe()],
        plugins=[AtomicCheckpointIO(**options)],
    )  # fmt: skip
    trainer.fit(Line(), ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_trainer_saves_and_resumes_with_it(tmp_path: Path, asynchronous: bool) -> None:
    (tmp_path / ".last.ckpt.9-9.tmp").write_bytes(b"half")
    trainer = fit(tmp_path, asynchronous=asynchronous)
    assert files(tmp_path) == ["epoch=0-step=6.ckpt", "last.ckpt"]
    assert verify_checkpoint(tmp_path / "last.ckpt")["step"] == 6
    assert fit(tmp_path, "last").global_step == 6
    weights = torch.load(tmp_path / "last.ckpt")["state_dict"]
    module: Any = trainer.lightning_module
    assert torch.equal(weights["layer.weight"], module.layer.weight)


def test_the_probe_says_before_the_first_step_that_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 1, 5))
    with pytest.raises(OSError, match=rf"checkpoints cannot be saved: {tmp_path}: .* 5 are free"):
        fit(tmp_path)
    monkeypatch.undo()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="checkpoints cannot be saved"):
        fit(tmp_path / "file")


def test_remote_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/a\.ckpt: checkpoints are written to a local or mounted folder"):
        AtomicCheckpointIO().save_checkpoint(state(1), "s3://bucket/a.ckpt")
