"""The machine: versions, accelerators, memory, disk, shared memory, and whether a run may write where it means to."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mm.doctor.findings import Finding

GIB = 2**30
SHM = Path("/dev/shm")


def check_machine(folder: Path, workers: int = 0) -> Iterator[Finding]:
    """`folder` is where the run will write; `workers` are the loader processes that it will start."""
    yield Finding("versions", "ok", f"Python {platform.python_version()}, torch {torch.__version__}")
    yield from _accelerators()
    cores = len(os.sched_getaffinity(0))
    status = "warn" if workers + 1 > cores else "ok"
    yield Finding("cores", status, f"{cores} for 1 training and {workers} loader processes")
    yield from _room(folder)
    if workers:
        yield from _shared_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        yield Finding("open files", "warn", f"a process may open {soft} (ulimit -n); its hard limit is {hard}")


def _accelerators() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        fast = torch.backends.cpu.get_cpu_capability()
        yield Finding("GPU", "ok", f"none: training on the CPU ({fast})")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        status = "warn" if free < 0.9 * total else "ok"
        used = f", {(total - free) / GIB:.1f} GiB of it taken" if status == "warn" else ""
        yield Finding("GPU", status, f"{number}: {about.name}, {total / GIB:.0f} GiB{used}")
    if importlib.util.find_spec("flash_attn") is None:
        yield Finding("flash-attn", "warn", "not installed: PyTorch's attention does the same, and is slower in places")
        return
    try:
        import flash_attn  # type: ignore[import-not-found]
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        yield Finding("flash-attn", "fail", f"installed, but cannot be loaded: {' '.join(str(error).split())}")
    else:
        yield Finding("flash-attn", "ok", str(flash_attn.__version__))


def _room(folder: Path) -> Iterator[Finding]:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    status = "fail" if free < GIB else "warn" if free < 20 * GIB else "ok"
    yield Finding("disk", status, f"{free / GIB:,.1f} GiB free at {place}")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("disk", "fail", f"{place}: cannot be written ({error.strerror})")


def _shared_memory() -> Iterator[Finding]:
    if not SHM.is_dir():
        yield Finding("shared memory", "warn", f"{SHM} is not there: loader processes need another way to send batches")
        return
    total = shutil.disk_usage(SHM).total
    status = "fail" if total < GIB // 16 else "warn" if total < GIB else "ok"
    hint = "; loader processes send batches through it (docker run --shm-size 8g)" if status != "ok" else ""
    yield Finding("shared memory", status, f"{total / GIB:.2f} GiB at {SHM}{hint}")
