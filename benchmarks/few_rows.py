"""Products of few rows with large matrices: mm's, torch's, and the memory.

    OMP_NUM_THREADS=1 python benchmarks/few_rows.py

float32, one thread, process CPU time, alternatives in turn, medians of 7. Each shape's matrices fill 160 MB, more than
the caches hold. GB/s of weights read, and the share of what a sum over the same memory reads. Goal: mm's at least as
fast as torch's with 1, 2, 4 and 8 rows.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from common import in_turn

from mm.decoder.few_rows import MOST_ROWS, few_rows

SHAPES = [(1280, 640), (3456, 640), (640, 1728), (16384, 640), (512, 256)]
BYTES = 160e6


@torch.inference_mode()
def main() -> int:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n| matrix | rows | sum, GB/s | torch | mm | mm against torch |\n{'| --- ' * 6}|")
    reached = True
    for outputs, inputs in SHAPES:
        weights = torch.randn(int(BYTES / 4 / outputs / inputs), outputs, inputs)
        for rows in (1, 2, 4, 8, MOST_ROWS):
            x = torch.randn(rows, inputs)
            ways = {
                "sum": lambda weights=weights: weights.sum(),
                "torch": lambda x=x, weights=weights: [F.linear(x, weight) for weight in weights],
                "mm": lambda x=x, weights=weights: [few_rows(x, weight) for weight in weights],
            }
            took = in_turn(ways)
            rate, share = 4e-9 * weights.numel() / took["sum"], {name: took["sum"] / took[name] for name in ways}
            print(
                f"| {outputs} x {inputs} | {rows} | {rate:.1f} | {share['torch']:.2f} | {share['mm']:.2f} "
                f"| {took['torch'] / took['mm']:.2f}x |",
                flush=True,
            )
            reached &= rows > 8 or took["mm"] <= took["torch"]
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
