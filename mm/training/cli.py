"""`mm fit | validate | test | predict`: Lightning's command line over the project's configs.

    mm fit --config configs/demo/instruct.yaml --trainer.max_steps 100

`model` is any LightningModule, `data` any LightningDataModule (a module may bring its own loaders instead).
Threads, precision and devices are as the config says; nothing is changed behind it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

import mm
from mm.allowlist import ALLOWED, allow_imports
from mm.checkpoint import write_atomically
from mm.config_errors import UNION, shorten
from mm.training.checkpoints import AtomicCheckpointIO, CheckpointProbe
from mm.training.resume import ResumeCheck

SUBCOMMANDS = ("fit", "validate", "test", "predict")
SEED = 0


class ConfigError(ValueError):
    """A config or an option that does not fit: the message names the file, the key and the reason."""


class ConfigFile(ActionConfigFile):
    """Says in an error which of several `--config` files it came from."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            super().__call__(parser, cfg, values, option_string)
        except (argparse.ArgumentError, TypeError) as error:  # jsonargparse raises either
            raise ConfigError(f"{values}: {shorten(getattr(error, 'message', str(error)))}") from error


class SaveConfig(SaveConfigCallback):
    """Writes the parsed config into the logger's folder: `config.yaml` by `mm fit`, and `config-test.yaml` (-validate,
    -predict) by the others, so that scoring a run in its own folder leaves the config that trained it."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # a collective: asked on every rank
        if trainer.loggers and folder and trainer.is_global_zero:
            path = Path(folder) / ("config.yaml" if stage == "fit" else "config-" + stage + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.parser.dump(self.config, skip_unset=False).encode())


class MultimodalCLI(LightningCLI):
    """LightningCLI with errors that are short, and a model that knows its own config (so that checkpoints carry it)."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        header = [f"mm=={mm.__version__}", f"torch=={torch.__version__}"]
        parser = self.parser_class(**kwargs, exit_on_error=False, dump_header=header)
        parser.add_argument("-c", "--config", action=ConfigFile, help="A YAML file; later ones override earlier ones.")
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def __init__(self, args: Sequence[str], allow_change: Sequence[str] = ()) -> None:
        self.allow_change = allow_change  # keys of the config that a resumed run may change
        super().__init__(
            args=list(args),
            parser_kwargs={"prog": "mm", **{name: {"epilog": _EPILOG} for name in SUBCOMMANDS}},
            save_config_callback=SaveConfig,
            seed_everything_default=SEED,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The subcommand's config, parsed and completed, as plain values."""
        return yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.subcommand]

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Checkpoints are written atomically, unless the config names another plugin for them, and a run is resumed
        with the config that it was started with."""
        config = self._get(self.config_init, "trainer", default={})
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if self.subcommand == "fit":
            self.trainer_defaults["callbacks"] = [CheckpointProbe(), ResumeCheck(self.plain, self.allow_change)]
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    @override
    def after_instantiate_classes(self) -> None:
        """Gives the network the plain dict that rebuilds it, if the config spells it out (and does not name a
        checkpoint, which carries its own)."""
        network = self.plain["model"].get("init_args", {}).get("model")
        if isinstance(network, dict):
            self.model.model.config = network  # type: ignore[union-attr]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:  # Lightning ends the process with 1 after Ctrl-C; say what it was
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise


def main(argv: Sequence[str]) -> None:
    """Runs `argv[0]` (fit, validate, test, predict) with its options. Raises ConfigError for what a user can mend."""
    own, args = _own_options().parse_known_args(list(argv))
    allow_imports(own.allow_import)
    _quieten()
    try:
        MultimodalCLI(args, own.allow_change)
    except argparse.ArgumentError as error:
        raise ConfigError(shorten(error.message)) from error
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:  # a part's own, inside what jsonargparse says of the types that it might have had
        if UNION in (said := str(error)):
            raise ConfigError(shorten(said)) from error
        raise
    except RuntimeError as error:
        raise (_lost_process(str(error)) or error) from error


_EPILOG = (
    f"class_path may name {', '.join(ALLOWED)} only; --allow-import NAME (repeatable) adds a package that you trust. "
    "It is an option of the command line alone: no config can allow itself. --allow-change KEY (repeatable) lets a "
    "resumed run differ from its checkpoint in KEY and all below it (model.optim.lr, data.seed)."
)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is |exited )?([\w: ]+)")
_PEER = re.compile(r"(?i)connection (?:closed|reset) by peer|remote process exited|socket timeout|broken pipe")


def _lost_process(message: str) -> ChildProcessError | None:
    """What PyTorch reports when a loader worker or another rank has died, as a line that says which and what to do."""
    if match := _WORKER.search(message):
        return ChildProcessError(
            f"a loader worker has died (process {match[1]}: {match[2]}). Mostly it is memory: fewer data.workers or a "
            "smaller data.samples_per_batch take less. --ckpt_path last goes on from the last checkpoint"
        )
    if _PEER.search(message):
        return ChildProcessError(
            f"rank {os.environ.get('LOCAL_RANK', '0')} has lost another rank, which has died or cannot be reached; its "
            f"own output says why. --ckpt_path last goes on from the last checkpoint. {message.strip().splitlines()[0]}"
        )
    return None


def _own_options() -> argparse.ArgumentParser:
    """Options of the command line alone, which no config can carry."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow-import", action="append", default=[], metavar="NAME")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY")
    return parser


def _quieten() -> None:
    """Drops what says nothing about the run: Lightning's advertisements, its own use of deprecated names, and that
    there is no validation where none was asked for."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage())
    nothing = "Total length of `list` across ranks is zero"
    for name in ("LeafSpec", "instantiate_classes", "JSONARGPARSE_DEPRECATION_WARNINGS", nothing):
        warnings.filterwarnings("ignore", message=rf"[\s\S]*{name}")
