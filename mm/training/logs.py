"""Files of a run with one line a step, which a resumed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl

from mm.checkpoint import write_atomically


def open_log(trainer: pl.Trainer, name: str) -> Path:
    """A file of steps in the run's folder, cut back to the step that training sets out from. Every rank must ask.

    Steps after the checkpoint are trained again: their old lines would be there twice.
    """
    directory = trainer.log_dir  # asks rank zero, so every rank must
    path = Path(directory or trainer.default_root_dir) / name
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = lines_until(path, trainer.global_step) if path.exists() else []
        write_atomically(path, "".join(line + "\n" for line in kept).encode())
    trainer.strategy.barrier("open_log")
    return path


def lines_until(path: Path, last_step: int) -> list[str]:
    """The lines of a file of steps up to one. A last line torn by a killed run is left out."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            break
        if step <= last_step:
            kept.append(line)
    return kept
