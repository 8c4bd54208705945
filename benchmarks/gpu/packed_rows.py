"""Training steps in bfloat16 on packed rows against padded ones: tokens a second on samples of mixed lengths.

    python benchmarks/gpu/packed_rows.py

Lengths are log-normal (median 350, longest 4,096), as of instructions with some images among them. Padded batches are
what most scripts make: 16 samples in the order they come, as long as the longest. Packed ones hold rows of 4,096, as
many positions a batch as the padded batches have on average. The model has 0.3B parameters.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from mfu import model, stepping
from on_gpu import GpuBench

from mm.decoder.ffn.dense import GatedFFN
from mm.types import IGNORE, Batch

GOALS = {"mixed lengths": (1.8, 2.2)}


def batch_of(rows: list[list[int]], device: torch.device) -> Batch:
    """Rows of documents' lengths; what is left of a row is padding."""
    width = max(map(sum, rows))
    documents = torch.zeros(len(rows), width, dtype=torch.long)
    for row, lengths in enumerate(rows):
        numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
        documents[row, : len(numbers)] = numbers
    ids = torch.randint(5, 500, documents.shape).masked_fill(documents == 0, 0)
    labels = ids.masked_fill(documents == 0, IGNORE)
    return Batch(ids, labels, documents, torch.zeros_like(ids)).to(device)


def packed(lengths: list[int], room: int) -> list[list[int]]:
    """First fit, the longest first."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        for row in rows:
            if sum(row) + length <= room:
                row.append(length)
                break
        else:
            rows.append([length])
    return rows


def all_of(steps: list[Callable[[], float]]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


def main(argv: Sequence[str] | None = None) -> int:
    bench = GpuBench(__doc__, argv)
    generator = random.Random(0)
    longest, size, count = (128, 4, 2) if bench.tiny else (4096, 16, 4)
    median = longest // 12
    lengths = [min(longest, 8 + int(median * generator.lognormvariate(0, 0.9))) for _ in range(size * count)]
    rows = packed(lengths, longest)
    each = -(-len(rows) // count)
    shapes = {
        "padded": [[[length] for length in lengths[i : i + size]] for i in range(0, len(lengths), size)],
        "mm, packed": [rows[i : i + each] for i in range(0, len(rows), each)],
    }
    backend = "sdpa" if bench.device.type == "cpu" else "auto"
    network = model(bench, partial(GatedFFN, hidden=96 if bench.tiny else 4096), 8, backend)
    calls = {}
    for name, batches in shapes.items():
        made = [batch_of(batch, bench.device) for batch in batches]
        assert sum(int((batch.document_ids > 0).sum()) for batch in made) == sum(lengths)
        calls[name] = all_of([stepping(network, batch) for batch in made])
    seconds = bench.times(calls)
    taken, noise = seconds["mm, packed"]
    floor, goal = GOALS["mixed lengths"]
    bench.add(
        what="mixed lengths", run="mm, packed", rate=sum(lengths) / taken, unit="tokens/s", noise=noise, peer="padded",
        ratio=seconds["padded"][0] / taken, judged="ratio", floor=floor, goal=goal,
    )  # fmt: skip
    for name, batches in shapes.items():
        positions = sum(len(batch) * max(map(sum, batch)) for batch in batches)
        bench.note(f"{name}: {sum(lengths) / positions:.2f} of the positions are tokens")
    bench.note_memory("both")
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
