"""Checkpoints for resuming under Lightning: atomic, verified, in the folder that they are asked for.

`mm.training.checkpoint_file` is the file; here are the plugin that writes it and the probe that looks first whether it
can be written.
"""

from __future__ import annotations

import copy
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from mm.training.checkpoint_file import MARGIN, check_space, sweep, verify_checkpoint, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, atomic and verified. `mm fit` uses it unless `trainer.plugins` names another.

    Args:
        asynchronous: write in a thread, from a copy in memory, while training goes on. One write at a time; an old
            checkpoint is removed only when the one that replaces it has been verified; a failed write stops the run at
            the next save.

    Raises:
        OSError: no space or no right to write: the message names the folder; the previous checkpoint is untouched.
        ValueError: a checkpoint that is damaged, foreign, or not on a local (or mounted) file system.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise ValueError("checkpoints take no storage_options: they are written to a local folder")
        path = _local(path)
        if not self.asynchronous:
            write_checkpoint(checkpoint, path)
            return
        self._wait()
        self._submit(write_checkpoint, _snapshot(checkpoint), path)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values only, unless `weights_only=False` says that the file is trusted to run code."""
        path = _local(path)
        self._wait()
        verify_checkpoint(path)
        return torch.load(path, map_location=map_location, weights_only=weights_only is not False)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        path = _local(path)
        if self._pending:  # after the write that replaces it, and not at all if that fails
            self._submit(_remove, path)
        else:
            _remove(path)

    @override
    def teardown(self) -> None:
        try:
            self._wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _submit(self, work: Any, *args: Any) -> None:
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        before = self._pending[-1] if self._pending else None

        def after() -> None:
            if before is not None:
                before.result()  # raises what that raised: then this is not done either
            work(*args)

        self._pending.append(self._writer.submit(after))

    def _wait(self) -> None:
        """Until all is written; raises the first error."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()


class CheckpointProbe(Callback):
    """Before the first step: every folder of checkpoints can be written to and has room for one, halves are swept.

    Raises OSError, on every rank, naming the folder: an hour earlier than the first save would.
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        problem = self._probe(trainer) if trainer.is_global_zero and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise OSError(problem)

    def _probe(self, trainer: pl.Trainer) -> str | None:
        # Adam keeps two numbers for each that is trained.
        parameters = trainer.lightning_module.parameters()
        need = sum(p.nbytes * (3 if p.requires_grad else 1) for p in parameters) + MARGIN
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
                continue
            try:
                folder = _local(callback.dirpath)
                folder.mkdir(parents=True, exist_ok=True)
                sweep(folder)
                probe = folder / f".probe.{os.getpid()}"
                try:
                    probe.write_bytes(b"can this folder be written to?")
                finally:
                    probe.unlink(missing_ok=True)
                check_space(folder, need)
            except (OSError, ValueError) as error:
                return f"checkpoints cannot be saved: {error}"
        return None


def _snapshot(value: Any) -> Any:
    """A copy, tensors in main memory, that training does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: _snapshot(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_snapshot(item) for item in value)
    return copy.deepcopy(value)


def _local(path: Any) -> Path:
    if "://" in str(path):
        raise ValueError(
            f"{path}: checkpoints are written to a local or mounted folder, where a rename is atomic; for another "
            "store, give trainer.plugins a CheckpointIO of its own"
        )
    return Path(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
