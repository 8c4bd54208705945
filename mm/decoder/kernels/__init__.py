"""Kernels in C++, for what torch's own do slowly on a CPU; each is an operator of torch's in the namespace `mm`.

The files beside this one are compiled when they are first needed, by the machine's own compiler and for its own
processor, and kept in the user's cache folder. Where there is no compiler torch's operations are used, and a warning
says so once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")

library = torch.library.Library("mm", "FRAGMENT")


@cache
def available() -> bool:
    """Loads the compiled kernels; False on a machine without a C++ compiler, which a warning says."""
    try:
        if (found := compiler()) is None:
            raise OSError("there is no c++, g++ or clang++; CXX can name another")
        torch.ops.load_library(_build(found))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"decoding uses torch's slower operations: {FOLDER} was not built: {said}", stacklevel=2)
        return False
    return True


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _build(compiler: str) -> Path:
    """The shared library for these sources, compiler, torch and processor; made if it is not there."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    texts = [path.read_bytes() for path in (*sorted(FOLDER.glob("*.h")), *SOURCES)]
    parts = [*texts, version, *(part.encode() for part in (*FLAGS, torch.__version__, _processor()))]
    name = hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm"
    made = folder / f"kernels-{name}.so"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        fresh = Path(unfinished) / made.name
        torchs = [f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        subprocess.run([compiler, *FLAGS, "-o", fresh, *SOURCES, *torchs], check=True, capture_output=True)
        fresh.replace(made)  # whole or not at all: several processes may build it at once
    return made


def _processor() -> str:
    """What `-march=native` goes by: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
