"""An expert layer, forward and backward: `mm`'s against transformers' on the same weights, and against a dense layer.

    OMP_NUM_THREADS=1 python benchmarks/moe.py --clock cpu

The dense layer is a SwiGLU of the active width: as many FLOPs a token, and no routing; the share of its rate is what
dispatch leaves. With `--moving` each call gets other tokens, as in training: experts then have other numbers of rows
each time, which oneDNN may have to compile for. Values and gradients are compared with transformers' eager loop before
anything is timed: of tokens that both send to the same experts, which in bfloat16, where the last of the chosen is
often nearly as good as the next, must be 97 of 100. Memory is what a layer keeps between its forward and its backward
pass, beside its weights.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from common import Bench, has_bfloat16
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.moe import SparseMoE

WIDTH, HIDDEN = 512, 512
# experts, chosen, tokens, dtype -> floor and goal against grouped_mm, against eager, of the dense layer's rate
Goals = tuple[float, float] | None
CASES: list[tuple[int, int, int, torch.dtype, Goals, Goals, Goals]] = [
    (64, 8, 512, torch.float32, (1.2, 1.6), (10, 20), None),
    (32, 2, 4096, torch.float32, (1.2, 1.6), None, None),
    (8, 2, 4096, torch.float32, None, None, None),
    (8, 2, 4096, torch.bfloat16, None, None, (0.75, 0.85)),
    (64, 8, 512, torch.bfloat16, None, None, (0.55, 0.65)),
]


def theirs(experts: int, chosen: int, implementation: str, width: int = WIDTH, hidden: int = HIDDEN) -> nn.Module:
    config: Any = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=chosen,
        norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def ours(block: Any, experts: int, chosen: int) -> SparseMoE:
    """With the block's weights."""
    layer = SparseMoE(block.gate.weight.shape[1], block.experts.down_proj.shape[2], experts, chosen)
    with torch.no_grad():
        layer.router.weight.copy_(block.gate.weight)
        layer.experts.get_parameter("gate_up").copy_(block.experts.gate_up_proj)
        layer.experts.down.copy_(block.experts.down_proj)
    return layer


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, SparseMoE):
        return layer(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))[0]
    return layer(x)


class Moving:
    """(1, T, width) each time it is called, eight rows further on among more than there are calls."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.tokens, self.start = tokens, 0
        self.all = torch.randn(1, tokens + 4096, WIDTH, dtype=dtype)

    def __call__(self) -> Tensor:
        self.start = (self.start + 8) % 4096
        return self.all[:, self.start : self.start + self.tokens]


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output and its input's gradient; gradients of weights are thrown away, as an optimizer would."""
    x = x.clone().requires_grad_()
    out = forward(layer, x)
    out.backward(grad)
    for parameter in layer.parameters():
        parameter.grad = None
    assert x.grad is not None
    return out.detach(), x.grad


def run_next(layer: nn.Module, moving: Moving, grad: Tensor) -> tuple[Tensor, Tensor]:
    return run(layer, moving(), grad)


@torch.no_grad()
def alike(mine: Any, block: Any, x: Tensor) -> Tensor:
    """(1, T): which tokens go to the same experts in both layers."""
    rows = x.flatten(0, 1)
    found = mine.router(rows, torch.ones(len(rows), dtype=torch.bool)).indices
    return (found.sort().values == block.gate(rows)[2].sort().values).all(1).view(x.shape[:2])


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that wait for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    found: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        forward(layer, x.clone().requires_grad_())
    return sum(found.values())


def main() -> int:
    bench = Bench(
        __doc__, lambda parser: parser.add_argument("--moving", action="store_true", help="other tokens in each call")
    )
    cases = [case for case in CASES if case[3] == torch.float32 or has_bfloat16()]
    if len(cases) < len(CASES):
        bench.note("this processor has no bfloat16: the cases in it are left out")
    for experts, chosen, tokens, dtype, grouped, eager, dense in cases:
        block = theirs(experts, chosen, "eager")
        layers: dict[str, nn.Module] = {
            "transformers eager": block,
            "transformers grouped_mm": theirs(experts, chosen, "grouped_mm"),
            "mm": ours(block, experts, chosen),
            "dense": GatedFFN(WIDTH, chosen * HIDDEN),
        }
        x, grad = torch.randn(1, tokens, WIDTH, dtype=dtype), torch.randn(1, tokens, WIDTH, dtype=dtype)
        calls = {name: partial(run, layer.to(dtype), x, grad) for name, layer in layers.items()}
        same = alike(layers["mm"], block, x)
        assert same.float().mean() >= (1 if dtype == torch.float32 else 0.97), same.float().mean()
        for found, wanted in zip(calls["mm"](), calls["transformers eager"](), strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 0.05  # of their largest; sums are in another order
            torch.testing.assert_close(found[same], wanted[same], rtol=0, atol=tolerance * float(wanted.abs().max()))
        if bench.args.moving:
            calls = {name: partial(run_next, layer, Moving(tokens, dtype), grad) for name, layer in layers.items()}
        slow = {"transformers eager": calls.pop("transformers eager")}
        seconds = bench.times(calls)
        if eager is not None:
            seconds |= bench.times(slow, warmup=0, repeats=1)  # it takes ten times as long: noise hides none of that
        what = f"E{experts} k{chosen} T{tokens} {str(dtype).removeprefix('torch.')}"
        mine, noise = seconds["mm"]
        flops = 3 * tokens * chosen * 6 * WIDTH * HIDDEN
        base = {"what": what, "run": "mm", "rate": flops / mine / 1e9, "unit": "GFLOP/s", "noise": noise}
        for peer, goals in (("transformers grouped_mm", grouped), ("transformers eager", eager)):
            if peer in seconds:
                floor, goal = goals or (None, None)
                ratio = seconds[peer][0] / mine
                bench.add(**base, peer=peer, ratio=ratio, judged="ratio", floor=floor, goal=goal)
        floor, goal = dense or (None, None)
        share = seconds["dense"][0] / mine
        bench.add(**base, limit="the dense layer", share=share, judged="share", floor=floor, goal=goal)
        memory = ", ".join(f"{name} {kept(layer, x) / 2**20:.0f} MiB" for name, layer in layers.items())
        bench.note(f"{what}, kept for the backward pass: {memory}")
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
