"""Float32 products of many rows: mm's linear and torch's, forward and backward.

    python benchmarks/many_rows.py [--threads 1]

Rows, inputs and outputs of each product; alternatives in turn, medians of 15. "new shapes": each repeat has a number of
rows that no one before had, for which oneDNN compiles anew. Where mm's is not the faster, a processor has none of
oneDNN's gain, and mm leaves all to torch (`mm.decoder.many_rows.is_faster`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.many_rows import is_faster, linear

SHAPES = [(512, 256, 256), (2048, 128, 256), (2688, 128, 640), (512, 1024, 1024), (4096, 1024, 2048)]
REPEATS = 15


def seconds(product: Callable[[Tensor, Tensor], Tensor], rows: int, weight: Tensor) -> float:
    x = torch.randn(rows, weight.shape[1], requires_grad=True)
    grad = torch.randn(rows, weight.shape[0])
    start = time.perf_counter()
    torch.autograd.grad(product(x, weight), (x, weight), grad)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    taken = "is" if is_faster() else "is not"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; oneDNN {taken} taken")
    print(f"| product | rows | torch, GFLOP/s | mm | mm against torch |\n{'| --- ' * 5}|")
    ways = {"torch": F.linear, "mm": linear}
    for rows, inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs, requires_grad=True)
        for kind, grows in (("the same", 0), ("new shapes", 1)):
            took: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(REPEATS + 1):
                for name, product in ways.items():
                    took[name].append(seconds(product, rows + grows * (repeat + 1), weight))
            each = {name: statistics.median(times[1:]) for name, times in took.items()}
            rate = {name: 6e-9 * rows * inputs * outputs / each[name] for name in ways}
            print(
                f"| {rows} x {inputs} x {outputs} | {kind} | {rate['torch']:.0f} | {rate['mm']:.0f} "
                f"| {each['torch'] / each['mm']:.2f}x |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
