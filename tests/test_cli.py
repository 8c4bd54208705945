"""The `mm` command: help at once, mistakes in one line, and configs that cannot run code of their choice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mm import cli
from mm.training import cli as training_cli
from mm.types import MediaError

PARTS = '''
"""A stage small enough to train in a test; what configs outside the project look like."""
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Bridge(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, shuffle: int = 1, kind: Literal["linear", "mlp"] = "mlp"):
        super().__init__()
        self.net = nn.Linear(in_dim, out_dim)


class Network(nn.Module):
    def __init__(self, width: int, bridges: dict[str, Callable[[int, int], Bridge]] | None = None):
        super().__init__()
        if width > 100:
            raise ValueError(f"Network: width {width} is more than 100")
        self.bridges = nn.ModuleDict({name: make(width, 1) for name, make in (bridges or {}).items()})


class Stage(LightningModule):
    def __init__(self, model: Network | str, notes: dict[str, Any] | None = None, interrupt: bool = False):
        super().__init__()
        self.model, self.notes, self.interrupt = model, notes, interrupt
        self.scale = nn.Parameter(torch.ones(()))

    def on_fit_start(self):
        print("network config:", getattr(self.model, "config", None))
        print("notes:", self.notes)

    def training_step(self, batch, index):
        if self.interrupt:
            raise KeyboardInterrupt
        return self.model.bridges["image"].net(batch).square().mean()

    def test_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 3))

    test_dataloader = train_dataloader
'''


def config(folder: Path) -> dict:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder / "run")}}
    logger["init_args"].update(name="", version="")
    network = {"width": 3, "bridges": {"image": {"class_path": "house_parts.Bridge", "init_args": {"shuffle": 2}}}}
    return {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "logger": logger}
        | {"enable_checkpointing": False, "enable_model_summary": False},
        "model": {
            "class_path": "house_parts.Stage",
            "init_args": {"model": {"class_path": "house_parts.Network", "init_args": network}},
        },
    }


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A config that trains; `house_parts` is importable, but no config may name it unasked."""
    (tmp_path / "house_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield config(tmp_path)
    sys.modules.pop("house_parts", None)


@pytest.fixture(autouse=True)
def _own_import_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What configs may name is a setting of the process: each test starts from jsonargparse's own."""
    from jsonargparse import _common

    monkeypatch.setattr(_common, "parsing_settings", dict(_common.parsing_settings))


def network(stage: dict) -> dict:
    return stage["model"]["init_args"]["model"]["init_args"]


def run(stage: dict, *options: str, command: str = "fit", trust: bool = True) -> int:
    Path("stage.yaml").write_text(yaml.safe_dump(stage))
    trusted = ["--allow-import", "house_parts"] if trust else []
    return cli.main([command, "--config", "stage.yaml", *trusted, *options])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which is the whole of the error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert sum("error:" in line for line in lines) == 1
    return lines[-1]


# ---- the command itself


def test_help_answers_within_a_second() -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mm.cli", "--help"], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert min(seconds) < 1.0
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<11}{command.summary}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert callable(cli.COMMANDS[name].load())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "mm 0.1.0\n"


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: mm COMMAND")


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shrad", "easy_vqa"]) == 2
    assert "unknown command 'shrad'; did you mean `mm shard`?" in error(capsys)
    assert cli.main(["frobnicate"]) == 2
    assert "did you mean" not in error(capsys)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes `mm info` raise what the test says."""

    def install(exception: BaseException) -> None:
        def fail(argv: list[str]) -> None:
            raise exception

        monkeypatch.setattr(cli.Command, "load", lambda self: fail)

    return install


@pytest.mark.parametrize(
    "exception",
    [ValueError("size: 0 is\n  too small"), MediaError("a.png: size: 0 is too small"), OSError("size: 0 is too small")],
)
def test_users_mistake_is_one_line(exception: Exception, failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(exception)
    assert cli.main(["info", "x"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("mm info: error: ") and message.endswith("size: 0 is too small\n")
    assert message.count("\n") == 1


def test_debug_shows_where(failing, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ValueError("size"))
    for args in (["--debug", "info"], ["info", "--debug"]):
        assert cli.main(args) == 2
        assert "Traceback" in capsys.readouterr().err
    assert cli.main(["info", "--", "--debug"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("MM_DEBUG", "1")
    assert cli.main(["info"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(failing) -> None:
    failing(KeyboardInterrupt())
    assert cli.main(["info"]) == 130


def test_a_bug_is_not_dressed_up_as_a_mistake(failing) -> None:
    failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


# ---- mm fit | validate | test | predict


def test_fit_trains_saves_its_config_and_tells_the_model(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stage) == 0
    assert "network config: {'class_path': 'house_parts.Network'" in capsys.readouterr().out
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["seed_everything"] == training_cli.SEED
    assert saved["trainer"]["precision"] is None, "the config decides"
    bridge = saved["model"]["init_args"]["model"]["init_args"]["bridges"]["image"]
    assert bridge == {"class_path": "house_parts.Bridge", "init_args": {"shuffle": 2, "kind": "mlp"}}


def test_saved_config_runs_again_and_scoring_leaves_it(stage: dict) -> None:
    assert run(stage) == 0
    first = Path("run/config.yaml").read_text()
    assert cli.main(["fit", "--config", "run/config.yaml", "--allow-import", "house_parts"]) == 0
    assert Path("run/config.yaml").read_text() == first
    assert run(stage, command="test") == 0
    assert Path("run/config.yaml").read_text() == first
    assert Path("run/config-test.yaml").exists()


def test_checkpoint_path_leaves_model_config_alone(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    stage["model"]["init_args"] = {"model": "runs/aligned/model", "interrupt": True}
    assert run(stage) == 130, "Ctrl-C while training"
    assert "network config: None" in capsys.readouterr().out


def test_network_in_a_file_of_its_own(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """The name is relative to the config, and the model still learns the whole tree."""
    Path("configs").mkdir()
    arguments = stage["model"]["init_args"]
    Path("configs/network.yaml").write_text(yaml.safe_dump(arguments["model"]))
    arguments["model"] = "network.yaml"
    Path("configs/stage.yaml").write_text(yaml.safe_dump(stage))
    assert cli.main(["fit", "--config", "configs/stage.yaml", "--allow-import", "house_parts"]) == 0
    assert "network config: {'class_path': 'house_parts.Network', 'init_args': {'width': 3," in capsys.readouterr().out


def test_without_a_logger_nothing_is_littered(stage: dict) -> None:
    stage["trainer"]["logger"] = False
    assert run(stage) == 0
    assert not Path("config.yaml").exists()


def _typo_deep(stage: dict) -> None:
    network(stage)["bridges"]["image"]["init_args"] = {"shufle": 2}


def _bad_literal(stage: dict) -> None:
    network(stage)["bridges"]["image"]["init_args"] = {"kind": "cnn"}


def _typo_in_trainer(stage: dict) -> None:
    stage["trainer"]["max_stepz"] = 3


def _typo_at_the_top(stage: dict) -> None:
    stage["modle"] = stage.pop("model")


def _wrong_type(stage: dict) -> None:
    network(stage)["width"] = "wide"


def _missing(stage: dict) -> None:
    del network(stage)["width"]


def _no_such_class(stage: dict) -> None:
    network(stage)["bridges"]["image"]["class_path"] = "house_parts.Brigde"


def _wrong_class(stage: dict) -> None:
    network(stage)["bridges"]["image"] = {"class_path": "house_parts.Network", "init_args": {"width": 1}}


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_typo_deep, ("stage.yaml: model.model.bridges: ", "'shufle' is not accepted")),
        (_bad_literal, ("model.model.bridges.kind: ", "'linear', 'mlp'", "cnn")),
        (_typo_in_trainer, ("'trainer.max_stepz'",)),
        (_typo_at_the_top, ("'modle",)),
        (_wrong_type, ("model.model.width: Expected a int", "wide")),
        (_missing, ("required: width",)),
        (_no_such_class, ("model.model.bridges: ", "no attribute 'Brigde'")),
        (_wrong_class, ("model.model.bridges: ", "'house_parts.Network' to be a subclass of Bridge")),
    ],
)
def test_config_error_names_the_key_in_one_short_line(
    break_it, words: tuple[str, ...], stage: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(stage)
    assert run(stage) == 2
    message = error(capsys)
    assert message.startswith("mm fit: error: ")
    assert len(message) < 160
    for word in words:
        assert word in message


def test_what_a_part_refuses_is_all_that_is_said(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    network(stage)["width"] = 101
    assert run(stage) == 2
    assert error(capsys) == "mm fit: error: Network: width 101 is more than 100"


def test_error_names_the_file_among_several(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("trainer: {max_steps: [")
    assert run(stage, "--config", "broken.yaml") == 2
    message = error(capsys)
    assert "broken.yaml" in message and "line " in message


def test_missing_file_model_and_device(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in error(capsys)
    assert cli.main(["fit"]) == 2
    assert "required: model (give --config FILE)" in error(capsys)
    assert run(stage, "--trainer.accelerator", "mps") == 2
    assert "mm fit: error: " in error(capsys)


# ---- configs from strangers


def test_no_config_names_a_package_unasked(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stage, trust=False) == 2
    message = error(capsys)
    assert "class_path 'house_parts.Stage' is refused" in message
    assert "--allow-import house_parts" in message


def _import_runs_code(stage: dict, marker: Path) -> None:
    Path("evil_parts.py").write_text(f"open({str(marker)!r}, 'w')")
    stage["model"]["class_path"] = "evil_parts.Stage"


def _bridge_is_a_shell(stage: dict, marker: Path) -> None:
    network(stage)["bridges"]["image"] = {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}


def _through_an_allowed_module(stage: dict, marker: Path) -> None:
    network(stage)["bridges"]["image"] = {"class_path": "torch.os.system", "init_args": {"command": f"touch {marker}"}}


_SUBPROCESS = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"


def _process(marker: Path) -> dict:
    arguments = {"entrypoint": "touch", "args": [str(marker)], "env": {}, "stdout": None, "stderr": None}
    return {"class_path": _SUBPROCESS, "init_args": arguments | {"local_rank_id": 0, "numa_options": None}}


def _in_keyword_arguments_of_a_logger(stage: dict, marker: Path) -> None:
    """torch's own launcher starts a process when it is built; a logger's **kwargs take anything."""
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "run"}}
    stage["trainer"]["logger"] = logger | {"dict_kwargs": {"comment": _process(marker)}}


def _reads_a_pickle(stage: dict, marker: Path) -> None:
    network(stage)["bridges"]["image"] = {"class_path": "torch.load", "init_args": {"f": "evil.pt"}}


def _allows_itself(stage: dict, marker: Path) -> None:
    stage["allow_import"] = ["evil_parts"]
    _import_runs_code(stage, marker)


@pytest.mark.parametrize(
    ("break_it", "name"),
    [
        (_import_runs_code, "evil_parts.Stage"),
        (_bridge_is_a_shell, "os.system"),
        (_through_an_allowed_module, "posix.system"),
        (_in_keyword_arguments_of_a_logger, _SUBPROCESS),
        (_reads_a_pickle, "torch.load"),
        (_allows_itself, "evil_parts.Stage"),
    ],
)
def test_evil_config_is_refused_by_name(
    break_it, name: str, stage: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    break_it(stage, marker)
    assert run(stage) == 2
    assert name in error(capsys)
    assert not marker.exists()


def test_data_that_looks_like_a_class_stays_data(stage: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """An argument typed Any is where jsonargparse would build whatever it is told."""
    stage["model"]["init_args"]["notes"] = {"todo": {"class_path": "torch.nn.Identity"}}
    assert run(stage) == 0
    notes = capsys.readouterr().out.partition("notes: ")[2]
    assert "class_path" in notes and "Identity()" not in notes


def test_allow_import_takes_dotted_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("*", "a/b", "../x"):
        assert cli.main(["fit", "--allow-import", name]) == 2
        assert name in error(capsys)


def test_waiting_threads_leave_the_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    cli.main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == cli.SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    cli.main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"  # who says otherwise is heard
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cli.main(["--version"])
    assert "GOMP_SPINCOUNT" not in os.environ
