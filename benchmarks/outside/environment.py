"""An environment of its own for an outside harness: made once, with this project in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, *packages: str) -> Path:
    """The Python of an environment with `packages` and this checkout (editable); an existing one is used as it is.

    The project's torch set comes from constraints.txt; what else the packages want is theirs to say.
    """
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv is None:
            raise SystemExit("these scripts use uv: pip install uv")
        pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch")]
        if not python.exists():
            run(uv, "venv", "--python", sys.executable, str(folder))
        run(uv, "pip", "install", "--python", str(python), *packages, "-e", f"{ROOT}[eval,demo]", *pins)
        (folder / ".made").touch()
    return python


def run(*command: str, **extra: str) -> None:
    """Raises SystemExit naming a command that fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env=os.environ | offline | extra).returncode
    if status:
        raise SystemExit(f"{command[0]} failed with exit status {status}")
