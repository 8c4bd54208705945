"""The GPU's benchmarks run, at toy sizes on a CPU: what has never run is not ready."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = sorted(file.stem for file in (FOLDER / "gpu").glob("*.py") if file.stem not in ("demo", "on_gpu"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script by name, as it imports its neighbours; afterwards nobody finds them."""
    before = set(sys.modules)
    for folder in (FOLDER, FOLDER / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_has_its_rows(script: Any, name: str, tmp_path: Path) -> None:
    module, file = script(name), tmp_path / "rows.json"
    assert module.main(["--device", "cpu", "--tiny", "--repeats", "1", "--json", str(file)]) in (0, 1)
    rows = json.loads(file.read_text())["rows"]
    assert rows and all(row["rate"] >= 0 for row in rows)
    if name != "decode_step":  # whose toy is another model, without goals
        assert {row["what"]: (row["floor"], row["goal"]) for row in rows if row["floor"]} == module.GOALS


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_it_says_so(script: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [] if not torch.cuda.is_available() else ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        script(name).main(options)
    assert stopped.value.code == 2 and "--device cpu --tiny" in capsys.readouterr().err


def test_the_suite_knows_them_and_lists_what_is_not_measured(script: Any) -> None:
    suite = script("suite")
    assert sorted(suite.GPU) == [f"gpu/{name}" for name in NAMES]
    assert suite._unmeasured("gpu/mfu")[0] == "| dense 1.2B | not yet measured | | | | | 0.4 / 0.5 | |"
    assert suite._unmeasured("gpu/parity") == ["| all of it | not yet measured | | | | |  | |"]
