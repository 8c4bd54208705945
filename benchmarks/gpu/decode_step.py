"""Greedy decoding of a Llama of 3B parameters in bfloat16, against the memory's speed and transformers' static cache.

    python benchmarks/gpu/decode_step.py

Random weights, one row and eight; everything else is benchmarks/decode.py's, which see.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
import transformers
from on_gpu import GpuBench

from decode import SHARES, measure

GOALS = {"llama_3b, bfloat16, 1 row": SHARES["llama_3b, torch.bfloat16"]}


def main(argv: Sequence[str] | None = None) -> int:
    bench = GpuBench(__doc__, argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    name, caches = ("llama_tiny", ["dynamic"]) if bench.tiny else ("llama_3b", ["dynamic", "static"])
    for rows in (1, 8):
        with torch.inference_mode():
            measure(bench, name, torch.bfloat16, rows, caches)
        bench.note_memory(f"{rows} rows")
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
