"""Attention of one query a row over a cache: mm's, torch's, and the memory.

    OMP_NUM_THREADS=1 python benchmarks/one_query.py

One thread, process CPU time, alternatives in turn, medians of 7. The caches of each shape fill at least 200 MB, more
than the caches of the processor hold, but for those of 64 keys. Rows x keys, key/value heads x queries of each x width;
GB/s of keys and values read, and how many times as fast as torch's scaled_dot_product_attention, in which the queries
that share a head stand as so many queries of it. Goal: never slower.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from common import in_turn

from mm.decoder.attention.one_query import one_query

SHAPES = [
    (1, 64, 5, 2, 64), (8, 64, 5, 2, 64), (1, 2048, 5, 2, 64), (8, 2048, 5, 2, 64), (1, 16384, 5, 2, 64),
    (1, 8192, 8, 4, 128), (1, 8192, 8, 8, 64), (1, 4096, 32, 1, 128), (1, 4096, 1, 16, 512),
]  # fmt: skip


@torch.inference_mode()
def main() -> int:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n| dtype | cache | sum, GB/s | torch | mm | mm against torch |\n{'| --- ' * 6}|")
    reached = True
    for dtype in (torch.float32, torch.bfloat16):
        for rows, keys, groups, shared, width in SHAPES:
            size = 2 * rows * keys * groups * width * dtype.itemsize
            count = max(1, min(64, int(200e6 / size)))
            caches = torch.randn(count, 2, rows, keys, groups, width).to(dtype)
            q, seen = torch.randn(rows, groups * shared, width).to(dtype), torch.ones(rows, keys, dtype=torch.bool)
            queries = q.unflatten(1, (groups, shared))
            memory = torch.ones(count * size // 4)
            ways = {
                "sum": lambda memory=memory: memory.sum(),
                "torch": lambda caches=caches, queries=queries, seen=seen: [
                    F.scaled_dot_product_attention(
                        queries, k.transpose(1, 2), v.transpose(1, 2), seen[:, None, None], scale=0.1
                    )
                    for k, v in caches
                ],
                "mm": lambda caches=caches, q=q, seen=seen: [one_query(q, k, v, seen, 0.1) for k, v in caches],
            }
            took = in_turn(ways)
            rate = {name: count * size / took[name] / 1e9 for name in ways}
            print(
                f"| {str(dtype).removeprefix('torch.')} | {rows} x {keys}, {groups} x {shared} x {width} "
                f"| {rate['sum']:.1f} | {rate['torch']:.1f} | {rate['mm']:.1f} | {took['torch'] / took['mm']:.1f}x |",
                flush=True,
            )
            reached &= took["mm"] <= took["torch"]
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
