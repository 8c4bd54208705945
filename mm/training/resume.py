"""A resumed run is the run that it resumes: its config travels in the checkpoint and is compared before it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from mm.datasets.fingerprint import below, describe, differing, flatten

CONFIG = "mm_config"

# What may change between a run and its resume, because no weight depends on it: how many processes and ranks work
# (the global batch stays), what is written, watched or validated.
FREE = (
    "config", "ckpt_path", "weights_only",
    *(f"trainer.{key}" for key in (
        "devices", "num_nodes", "strategy", "logger", "callbacks", "plugins", "default_root_dir", "profiler",
        "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams",
        "log_every_n_steps", "num_sanity_val_steps", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
        "val_check_interval", "check_val_every_n_epoch", "detect_anomaly", "max_time", "min_steps", "min_epochs",
    )),
)  # fmt: skip


class ResumeCheck(Callback):
    """Refuses to go on from a checkpoint of another config or other data. `mm fit` adds it to every run.

    Args:
        config: the config of `mm fit`, as a tree.
        allow: keys that may differ, with all below them ("model.optim.lr", "data.seed", "model").

    Raises ValueError naming every key that differs, with both values, before any weight is loaded.
    """

    def __init__(self, config: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
        self.config = {key: value for key, value in flatten(config).items() if not below(key, FREE)}
        self.allow = tuple(allow)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "allow_change"):
            data.allow_change = self.allow

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG] = self.config

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check(trainer, checkpoint)

    def check(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or CONFIG not in checkpoint:
            return
        data: Any = getattr(trainer, "datamodule", None)
        state = checkpoint.get(type(data).__qualname__)
        itself = hasattr(data, "changes") and state is not None
        allowed = (*self.allow, "data") if itself else self.allow
        changed = differing(checkpoint[CONFIG], self.config, allowed)
        if itself:  # it compares what its batches are made of, wherever that lies
            changed |= data.changes(state)
        if changed:
            raise ValueError(f"{trainer.ckpt_path}: the checkpoint was made with another config: {describe(changed)}")
