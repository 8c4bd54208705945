"""Matrix products with few rows, the work of decoding, on a CPU: torch's own are made for many.

The C++ beside this file is compiled when it is first needed, by the machine's own compiler and for its own processor,
and kept in the user's cache folder. Where there is no compiler torch's products are used, and a warning says so once.

Shape legend: `M` rows, `N` outputs, `K` inputs, `E` matrices.
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
import torch.nn.functional as F
from torch import Tensor, nn

from mm.decoder import many_rows

MOST_ROWS = 16  # with as many it is 0.9 to 2.1 times as fast as torch, by shape (benchmarks/few_rows.py)
DTYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).with_suffix(".cpp")
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")


class Linear(nn.Linear):
    """torch's, with products of few rows by `few_rows`, of many by what is fastest for them."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N): torch's linear, or `few_rows` where that is made for it."""
    if not suits(x, weight):
        return many_rows.linear(x, weight, bias)
    y = few_rows(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., K) has few rows, on a CPU, in a dtype that `few_rows` takes, with no gradient and no autocast."""
    return (
        x.is_cpu
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def few_rows(x: Tensor, weight: Tensor, group: Tensor | None = None) -> Tensor:
    """x (M, K), weight (N, K) -> x W^T (M, N); or weight (E, N, K) and group (M,) int64, row m with W[group[m]], zero
    where group[m] is below 0.

    On a CPU, x and a contiguous weight both float32 or both bfloat16; sums in float32. A row's result does not depend,
    to the last bit, on which rows stand beside it.
    """
    return torch.ops.mm.few_rows(x, weight, group)


def _first(x: Tensor, weight: Tensor, group: Tensor | None = None) -> Tensor:
    """What the operator does until its kernel is there, which then stands before this; and where there can be none."""
    return torch.ops.mm.few_rows(x, weight, group) if x.is_cpu and has_kernel() else _with_torch(x, weight, group)


def _with_torch(x: Tensor, weight: Tensor, group: Tensor | None) -> Tensor:
    if group is None:
        return F.linear(x, weight)
    y = x.new_zeros(len(x), weight.shape[-2])
    for row, matrix in enumerate(group.tolist()):
        if matrix >= 0:
            y[row] = weight[matrix] @ x[row]
    return y


_library = torch.library.Library("mm", "FRAGMENT")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? group) -> Tensor")
_library.impl("few_rows", _first, "CompositeExplicitAutograd")


@torch.library.register_fake("mm::few_rows")
def _(x: Tensor, weight: Tensor, group: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-2])


@cache
def has_kernel() -> bool:
    """Loads the compiled kernel; False on a machine without a C++ compiler, which a warning says."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    try:
        if compiler is None:
            raise OSError("there is no c++, g++ or clang++; CXX can name another")
        torch.ops.load_library(_build(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"decoding uses torch's slower products: {SOURCE.name} was not built: {said}", stacklevel=2)
        return False
    return True


def _build(compiler: str) -> Path:
    """The shared library for this source, compiler, torch and processor; made if it is not there."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    parts = [SOURCE.read_bytes(), version, *(part.encode() for part in (*FLAGS, torch.__version__, _processor()))]
    name = hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm"
    library = folder / f"few_rows-{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        made = Path(unfinished) / library.name
        torchs = [f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        subprocess.run([compiler, *FLAGS, "-o", made, SOURCE, *torchs], check=True, capture_output=True)
        made.replace(library)  # whole or not at all: several processes may build it at once
    return library


def _processor() -> str:
    """What `-march=native` goes by: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
