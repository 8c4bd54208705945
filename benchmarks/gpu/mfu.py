"""Training steps in bfloat16, dense (1.2B) and a mixture of experts, as shares of the GPU's FLOP/s.

    python benchmarks/gpu/mfu.py

Forward, backward and fused AdamW under bfloat16 autocast, rows of 4,096 random tokens, real routers. FLOPs of a token
are `mm info`'s for training, with half of attention's, which is what a causal row's queries see on average (PaLM,
arXiv 2204.02311, appendix B); a token's idle experts do not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from on_gpu import GpuBench
from torch import nn

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.info.counting import describe
from mm.model import MultimodalModel
from mm.objectives.instruct import NextToken
from mm.testing import tiny_tokenizer
from mm.training.optim import OptimConfig
from mm.types import Batch

GOALS = {"dense 1.2B": (0.40, 0.50), "mixture of experts, 64 of which 8": (0.30, 0.40)}


def model(bench: GpuBench, ffn: Callable[[int], nn.Module], layers: int, backend: Any) -> MultimodalModel:
    torch.manual_seed(0)
    width, heads, words, layers = (64, 4, 512, 2) if bench.tiny else (2048, 16, 32_768, layers)
    mixer = partial(GroupedAttention, heads=heads, kv_heads=heads // 4, backend=backend)
    with bench.device:
        decoder = Decoder(width, {"m": mixer}, {"f": ffn}, [LayerGroup(["m/f"], layers)], words)
        return MultimodalModel(tiny_tokenizer(), decoder, {}).to(bench.device).train()


def stepping(network: MultimodalModel, batch: Batch) -> Callable[[], float]:
    optimizer, objective = OptimConfig(lr=1e-5).optimizer(network), NextToken()

    def step() -> float:
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
            loss = objective(network, batch)
        mean = loss.total / loss.count
        mean.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(mean.detach())

    return step


def main(argv: Sequence[str] | None = None) -> int:
    bench = GpuBench(__doc__, argv)
    rows, length = (2, 64) if bench.tiny else (4, 4096)
    backend = "sdpa" if bench.device.type == "cpu" else "auto"
    peak = bench.peak()
    hidden = (96, 48) if bench.tiny else (8192, 768)
    experts = (8, 2) if bench.tiny else (64, 8)
    ffns: list[tuple[Callable[[int], nn.Module], int]] = [
        (partial(GatedFFN, hidden=hidden[0]), 18),
        (partial(SparseMoE, hidden=hidden[1], num_experts=experts[0], experts_per_token=experts[1]), 12),
    ]
    for (what, (floor, goal)), (ffn, layers) in zip(GOALS.items(), ffns, strict=True):
        network = model(bench, ffn, layers, backend)
        ids = torch.randint(0, 500, (rows, length), device=bench.device)
        batch = Batch(ids, ids.clone(), torch.ones_like(ids), torch.zeros_like(ids))
        info = describe(network, length)
        flops = info.flops_training - 1.5 * info.flops_attention
        step = stepping(network, batch)
        assert step() > 0
        seconds, noise = bench.times({what: step})[what]
        rate = rows * length / seconds
        bench.add(
            what=what, run="mm", rate=rate, unit="tokens/s", noise=noise, limit="the GPU's FLOP/s",
            share=rate * flops / peak, judged="share", floor=floor, goal=goal,
        )  # fmt: skip
        bench.note_memory(f"{what}, {info.parameters / 1e9:.2f}B weights, {info.active / 1e9:.2f}B of a token")
        del network, step, batch
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
