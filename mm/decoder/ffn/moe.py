"""The sparse mixture-of-experts layer: a router, experts, and optionally experts that every token visits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.few_rows import Linear
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.experts import Experts, SwigluExperts
from mm.decoder.ffn.routers.base import Router
from mm.decoder.ffn.routers.topk import TopKRouter
from mm.types import Routing

RouterFactory = Callable[[int, int, int], Router]  # (width, num_experts, experts_per_token)
ExpertsFactory = Callable[[int, int, int], Experts]  # (width, hidden, num_experts)


class SparseMoE(nn.Module):
    """x (B, T, width), mask (B, T) -> (B, T, width) and the Routing over its B*T tokens.

    `hidden` is one expert's inner width. `router` and `experts` are parts, by default top-k softmax (`gate` is its
    option) and SwiGLU. `shared` experts of that width see every token (DeepSeekMoE, arXiv 2401.06066), as one SwiGLU
    that is `shared` times as wide, or `shared_hidden` wide; with `shared_gate` what it says is times the sigmoid of a
    learned projection of the token (Qwen2-MoE).

    Dropless, unless `capacity` is set: then, in training only, an expert has room for capacity times its even share of
    the batch, earlier tokens first, and what finds no room is skipped and counted (`Routing.dropped`; GShard, arXiv
    2006.16668). Earlier first keeps a document causal, but a token's outcome depends on what stands before it in the
    batch.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int = 8,
        experts_per_token: int = 2,
        shared: int = 0,
        gate: Literal["chosen", "all"] = "chosen",
        router: RouterFactory | None = None,
        experts: ExpertsFactory | None = None,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        capacity: float | None = None,
    ) -> None:
        super().__init__()
        _check(gate, router, shared, shared_hidden, shared_gate, capacity)
        self.num_experts, self.experts_per_token, self.capacity = num_experts, experts_per_token, capacity
        self.router = (router or _top_k(gate))(width, num_experts, experts_per_token)
        if capacity is not None and not self.router.steerable:
            raise ValueError(f"SparseMoE: capacity {capacity} with {type(self.router).__name__}: its experts choose")
        self.experts = (experts or SwigluExperts)(width, hidden, num_experts)
        shared_width = shared_hidden or shared * hidden
        self.shared = GatedFFN(width, shared_width) if shared_width else None
        self.shared_gate = Linear(width, 1, bias=False) if shared_gate else None

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, mask.flatten())
        if self.capacity is not None and self.training:
            routing = limit_capacity(routing, self.capacity)
        y = self.experts(tokens, routing).view_as(x).to(x.dtype)
        return (y if self.shared is None else y + self._shared(x)), routing

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        y = self.shared(x)
        return y if self.shared_gate is None else self.shared_gate(x).sigmoid() * y


def limit_capacity(routing: Routing, capacity: float) -> Routing:
    """The routing with at most ceil(capacity * choices / E) choices kept an expert, the first ones; the rest counted.

    Choices stand in the order of tokens, a token's own in the order of its indices. Padding takes no room.
    """
    indices, experts = routing.indices, routing.logits.shape[-1]
    taken = routing.taken()
    places = torch.where(taken, indices, experts).reshape(-1)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=places.device)
    counts.index_add_(0, places, torch.ones_like(places))
    order = places.argsort(stable=True)
    rank = torch.empty_like(order)  # how many choices of the same expert stand before
    rank[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[places[order]]
    room = (capacity * taken.sum() / experts).ceil().long()
    kept = taken & (rank.view_as(indices) < room)
    return replace(routing, kept=kept, dropped=(counts[:experts] - room).clamp(min=0).float())


def moe_layers(module: nn.Module) -> list[SparseMoE]:
    """Every SparseMoE in a module, in order."""
    return [part for part in module.modules() if isinstance(part, SparseMoE)]


def max_over_mean_load(load: Tensor) -> float:
    """Load imbalance of one layer from counts (E,): 1 is even, E is one expert alone; 0 where nothing was routed."""
    return float(load.max() / load.mean()) if torch.any(load > 0) else 0.0


def _top_k(gate: Literal["chosen", "all"]) -> RouterFactory:
    return lambda width, num_experts, experts_per_token: TopKRouter(width, num_experts, experts_per_token, gate)


def _check(
    gate: str,
    router: RouterFactory | None,
    shared: int,
    shared_hidden: int | None,
    shared_gate: bool,
    capacity: float | None,
) -> None:
    if router is not None and gate != "chosen":
        raise ValueError(f"SparseMoE: gate {gate!r} is the default router's option; set it in router.init_args")
    if shared and shared_hidden:
        raise ValueError(f"SparseMoE: give shared ({shared}) or shared_hidden ({shared_hidden}), not both")
    if shared_gate and not (shared or shared_hidden):
        raise ValueError("SparseMoE: shared_gate without shared experts; set shared or shared_hidden")
    if capacity is not None and capacity <= 0:
        raise ValueError(f"SparseMoE: capacity must be positive, not {capacity}")
