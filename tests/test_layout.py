"""The layout that lets folders called `tokenizers` and `datasets` stand at the root beside Hugging Face's packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenizers", "encoders", "fusion", "datasets")
HEAVY = ("torch", "lightning", "transformers", "numpy", "jsonargparse")


def python(code: str, cwd: Path = ROOT) -> str:
    """What `code` prints in a fresh interpreter started in `cwd` (which is then first on its path)."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("stage", STAGES)
def test_stage_folder_is_linked_below_mm(stage: str) -> None:
    link = ROOT / "mm" / stage
    assert link.is_symlink()
    assert os.readlink(link) == f"../{stage}", "relative, so that any clone of the repository has it right"
    assert link.resolve() == ROOT / stage


@pytest.mark.parametrize("stage", STAGES)
def test_stage_folder_is_no_package_of_its_own(stage: str) -> None:
    """With an __init__.py, `import tokenizers` at the root would find this folder instead of Hugging Face's."""
    assert list((ROOT / stage).rglob("*.py")), "a stage folder without code"
    assert not (ROOT / stage / "__init__.py").exists()


def test_hugging_face_keeps_its_names_at_the_root() -> None:
    import_path = python("import tokenizers; tokenizers.Tokenizer; print(tokenizers.__file__)")
    assert "site-packages" in import_path


def test_stages_import_as_parts_of_mm(tmp_path: Path) -> None:
    """Also from another folder, where only the installed package can be found."""
    path = python("import mm.tokenizers.image as module; print(module.__file__)", cwd=tmp_path)
    assert Path(path).name == "image.py"


def test_other_folders_of_mm_are_packages() -> None:
    folders = {path.parent for path in (ROOT / "mm").rglob("*.py") if path.resolve().is_relative_to(ROOT / "mm")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("module", ["mm", "mm.cli"])
def test_import_is_light(module: str) -> None:
    loaded = json.loads(python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in HEAVY if name in loaded] == []


def test_repository_stands_alone() -> None:
    """Whatever else lies beside the clone, neither the code nor the tests nor a reader may need it."""
    beside = "../" + "shared"
    files = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("configs/**/*.yaml")]
    files += [path for folder in ("tests", "benchmarks", "mm", *STAGES) for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in files if beside in path.read_text(encoding="utf-8")] == []


def test_constraints_are_plain_pins() -> None:
    """No address of an index or of a file, nothing unpinned, and each requirement of the core is there."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert all("/" not in line and "@" not in line for line in lines if not line.startswith("#"))
    assert {"torch", "torchvision", "torchaudio", "lightning", "webdataset", "jsonargparse"} <= set(pins)
    assert pins["lightning"] not in ("2.6.2", "2.6.3"), "malicious releases: GHSA-w37p-236h-pfx3"
