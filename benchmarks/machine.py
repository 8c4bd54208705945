"""What this machine can do at most: matrix products, reading memory, decoding a JPEG. The limits of the other tables.

OMP_NUM_THREADS=1 python benchmarks/machine.py --clock cpu
"""

from __future__ import annotations

import sys

import simplejpeg
import torch
import torch.nn.functional as F
from common import Bench, has_bfloat16
from images import photograph

SIDE = 1024
MEGABYTES = 512


def main() -> int:
    bench = Bench(__doc__)
    calls, amounts = {}, {}
    for dtype in (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,):
        a = torch.randn(SIDE, SIDE, dtype=dtype)
        name = f"product of {SIDE}^3, {str(dtype).removeprefix('torch.')}"
        calls[name], amounts[name] = (lambda a=a: a @ a), (2 * SIDE**3 / 1e9, "GFLOP/s")
    memory = torch.ones(MEGABYTES * 2**18)
    calls["a sum over memory"], amounts["a sum over memory"] = memory.sum, (MEGABYTES * 2**20 / 1e9, "GB/s")
    weight, row = memory[: 8192 * 8192].view(8192, 8192), torch.randn(1, 8192)
    name = "F.linear, one row, 256 MiB"
    calls[name], amounts[name] = (lambda: F.linear(row, weight)), (weight.numel() * 4 / 1e9, "GB/s")
    jpeg = photograph(1600, 1200, 0)
    name = "JPEG of 1600 x 1200"
    calls[name], amounts[name] = (lambda: simplejpeg.decode_jpeg(jpeg)), (1, "a second")
    with torch.inference_mode():
        for name, (seconds, noise) in bench.times(calls).items():
            amount, unit = amounts[name]
            bench.add(what=name, run="this machine", rate=amount / seconds, unit=unit, noise=noise)
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
