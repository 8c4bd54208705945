"""Every shipped config is covered: its folder is globbed by a contract test, and it names only classes that exist."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm import cli
from mm.allowlist import ALLOWED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TESTS = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
}
PART = {"class_path", "init_args"}
STAGE = {"seed_everything", "model", "data", "trainer", "ckpt_path", "verbose"}
STAGES = [path for path in CONFIGS if "model" in yaml.safe_load(path.read_text(encoding="utf-8"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def class_paths(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if "class_path" in tree:
            yield tree["class_path"]
        for value in tree.values():
            yield from class_paths(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from class_paths(value)


def test_configs_lie_in_folders_by_kind() -> None:
    assert [name(path) for path in (ROOT / "configs").iterdir() if not path.is_dir()] == []
    assert [name(path) for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix != ".yaml"] == []


@pytest.mark.parametrize("kind", sorted({path.parent.name for path in CONFIGS}))
def test_folder_is_globbed_by_a_contract_test(kind: str) -> None:
    """So that a new part is one new file and one new config, tested without an edit to any test."""
    globs = [path for path, text in TESTS.items() if f'"configs" / "{kind}"' in text and "glob(" in text]
    assert globs, f"no test globs configs/{kind}: its files are never run"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_is_a_part_or_a_stage(path: Path) -> None:
    keys = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert keys <= PART or ("model" in keys and keys <= STAGE)


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_stage_config_is_accepted_key_by_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = "fit" if "data" in stage else "test"
    with pytest.raises(SystemExit) as done:  # how --print_config ends
        cli.main([command, "--config", str(path), "--print_config"])
    assert done.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == stage["model"]["class_path"]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_named_classes_exist(path: Path) -> None:
    found = list(class_paths(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert found
    for class_path in found:
        module, _, attribute = class_path.rpartition(".")
        assert class_path.split(".")[0] in ALLOWED
        assert isinstance(getattr(importlib.import_module(module), attribute), type), class_path
