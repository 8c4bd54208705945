"""An expert layer in bfloat16, forward and backward, against a dense layer of as many FLOPs a token, and transformers'.

    python benchmarks/gpu/moe_layer.py

The shapes are Mixtral's, Qwen3-30B-A3B's and a quarter of DeepSeek-V3's experts. Values and gradients are compared with
transformers' grouped_mm on the same weights before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from on_gpu import GpuBench

from mm.decoder.ffn.dense import GatedFFN
from moe import ours, run, theirs

SHAPES = {  # width, hidden, experts, chosen, tokens
    "Mixtral, 8 experts, 2 chosen": (4096, 14336, 8, 2, 8192),
    "Qwen3-30B-A3B, 128 experts, 8 chosen": (2048, 768, 128, 8, 16384),
    "DeepSeek-V3, 64 of its 256 experts, 8 chosen": (7168, 2048, 64, 8, 8192),
}
GOALS = dict.fromkeys(SHAPES, (0.70, 0.85))


def main(argv: Sequence[str] | None = None) -> int:
    bench = GpuBench(__doc__, argv)
    for what, shape in SHAPES.items():
        width, hidden, experts, chosen, tokens = (64, 32, shape[2] // 8 + 3, 2, 64) if bench.tiny else shape
        with bench.device:
            block = theirs(experts, chosen, "grouped_mm", width, hidden)
            layers = {"transformers grouped_mm": block, "mm": ours(block, experts, chosen)}
            layers["dense"] = GatedFFN(width, chosen * hidden)
            x, grad = (torch.randn(1, tokens, width, dtype=torch.bfloat16) for _ in range(2))
        calls = {name: partial(run, layer.to(bench.device, torch.bfloat16), x, grad) for name, layer in layers.items()}
        for found, wanted in zip(calls["mm"](), calls["transformers grouped_mm"](), strict=True):
            tolerance = 0.05 * float(wanted.abs().max())  # bfloat16 keeps 8 bits, and sums are in another order
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        seconds = bench.times(calls)
        mine, noise = seconds["mm"]
        base = {"what": what, "run": "mm", "rate": 18 * tokens * chosen * width * hidden / mine / 1e12}
        base |= {"unit": "TFLOP/s", "noise": noise}
        floor, goal = GOALS[what]
        bench.add(
            **base, limit="the dense layer", share=seconds["dense"][0] / mine, judged="share", floor=floor, goal=goal
        )
        bench.add(**base, peer="transformers grouped_mm", ratio=seconds["transformers grouped_mm"][0] / mine)
        bench.note_memory(what)
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
