"""What the GPU benchmarks share: the device and its limits, a clock that waits for it, and toy sizes for a CPU.

Every script runs alone, `python benchmarks/gpu/NAME.py`, or with the others, `python benchmarks/suite.py --gpu`.
`--device cpu --tiny` runs the same code at toy sizes anywhere: that is what the tests do, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # this folder's scripts are run by their path

from common import Bench

from mm.info.plan import GPUS


class GpuBench(Bench):
    """A Bench on `device`; without a GPU it exits with 2, unless it is told to use the CPU at toy sizes."""

    def __init__(self, doc: str | None, argv: Sequence[str] | None = None) -> None:
        super().__init__(doc, _arguments, argv=argv)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def choose_clock(self) -> Callable[[], float]:
        self.device, self.tiny = torch.device(self.args.device), self.args.tiny
        if self.device.type == "cuda" and not torch.cuda.is_available():
            print("no CUDA GPU that torch sees; toy sizes on a CPU: --device cpu --tiny", file=sys.stderr)
            raise SystemExit(2)
        if self.device.type == "cpu" and not self.tiny:
            print("on a CPU these sizes take hours; toy sizes: --device cpu --tiny", file=sys.stderr)
            raise SystemExit(2)
        return self._now

    def _now(self) -> float:
        """Wall-clock seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def about(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu, toy sizes: no figures"
        return {"device": name, **super().about()}

    def peak(self) -> float:
        """FLOP/s of dense bfloat16: what the maker says, where the card is known, else that of a product."""
        name = torch.cuda.get_device_name().lower() if self.device.type == "cuda" else ""
        for known, gpu in GPUS.items():
            if known in name:
                return gpu.flops
        size = 256 if self.tiny else 8192
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.times({"product": lambda: a @ a})["product"][0]

    def note_memory(self, what: str) -> None:
        """Says the highest use of memory since this was last said."""
        if self.device.type == "cuda":
            self.note(f"{what}: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")
            torch.cuda.reset_peak_memory_stats()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", metavar="D", help="cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script runs")
