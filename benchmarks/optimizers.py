"""One step of the optimizers: fused AdamW, mm's Muon and torch.optim.Muon, each of the same matrices.

    python benchmarks/optimizers.py [--threads 2]

The matrices of the demo's decoder (width 128, 8 experts) and of a wider one (width 512, 16 experts), random gradients,
in turn, medians of 15. torch's takes single matrices only, so that experts are given to it one by one, and computes in
bfloat16. FLOPs are those of five iterations, 4 R^2 C + 2 R^3 each; the limit is a product of 2048 x 2048.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mm.training.muon import Muon

REPEATS = 15


def shapes(width: int, experts: int) -> list[tuple[int, ...]]:
    """Two layers, one dense and one sparse."""
    hidden = 5 * width // 2
    attention = [(2 * width, width), (width, width)]
    sparse = [(experts, hidden, width), (experts, width, hidden // 2)]
    return [*attention, (2 * hidden, width), (width, hidden), *attention, *sparse]


def timed(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            took[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in took.items()}


def parameters(sizes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def flops(size: tuple[int, ...]) -> float:
    rows, columns = sorted(size[-2:])
    return (size[0] if len(size) == 3 else 1) * 5.0 * (4 * rows * rows * columns + 2 * rows**3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    a: Tensor = torch.randn(2048, 2048)
    limit = 2 * 2048**3 / timed({"product": lambda: a @ a})["product"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; a product: {limit / 1e9:.0f} GFLOP/s")
    print("| matrices | AdamW, ms | mm's Muon | torch's Muon | mm's of the limit |\n| --- | --- | --- | --- | --- |")
    for width, experts in ((128, 8), (512, 16)):
        sizes = shapes(width, experts)
        single = [each for size in sizes for each in ([size] if len(size) == 2 else [size[1:]] * size[0])]
        each = timed(
            {
                "adamw": torch.optim.AdamW(parameters(sizes), fused=True).step,
                "mm": Muon(parameters(sizes), []).step,
                "torch": torch.optim.Muon(parameters(single)).step,
            }
        )
        share = sum(map(flops, sizes)) / each["mm"] / limit
        ms = {name: f"{1e3 * seconds:.1f}" for name, seconds in each.items()}
        print(
            f"| width {width}, {experts} experts | {ms['adamw']} | {ms['mm']} | {ms['torch']} | {share:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
