"""Upcycling: a trained dense decoder becomes a mixture of experts (Komatsuzaki et al. 2023, arXiv 2212.05055).

Every expert starts as a copy of the dense feed-forward part. Where a token's weights add up to a constant, the copies
are divided by it, and the mixture computes what the dense part did, whatever the router says.
"""

from __future__ import annotations

from collections.abc import Container
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mm.decoder.decoder import Decoder
from mm.decoder.ffn.dense import ClampedFFN, GatedFFN, PlainFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.decoder.interchange.family import Tree, fold, part
from mm.decoder.interchange.transfer import state

_DENSE = {f"{kind.__module__}.{kind.__name__}": kind for kind in (GatedFFN, ClampedFFN, PlainFFN)}
_EXPERTS = "mm.decoder.ffn.experts."


@dataclass(frozen=True)
class Upcycling:
    """`num_experts` experts, of which a token visits `experts_per_token`, in place of dense feed-forward parts.

    The first `keep_dense` layers stay as they are, and of the rest every `every`-th is changed. `router` is the tree of
    a router (top-k softmax by default). `noise` adds normal numbers to each expert's matrices, as a share of their
    standard deviation: experts then differ from the start, and the output is the dense one's no longer. `start` is how
    the router's weights begin: random lets tokens spread; zero sends all to the first experts until balance moves them.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    keep_dense: int = 0
    every: int = 1
    noise: float = 0.0
    start: Literal["random", "zero"] = "random"
    router: Tree | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_dense < 0 or self.noise < 0:
            raise ValueError(
                f"Upcycling: every {self.every} must be at least 1, keep_dense {self.keep_dense} and "
                f"noise {self.noise} at least 0"
            )

    def tree(self, decoder: Tree) -> Tree:
        """The `{class_path, init_args}` tree of the sparse decoder. Raises ValueError naming what cannot be changed."""
        decoder = deepcopy(decoder)
        arguments = decoder["init_args"]
        kinds = [kind for g in arguments["layers"] for kind in g["pattern"] * g.get("repeat", 1)]
        chosen = self._layers(len(kinds))
        renamed = []
        for number, kind in enumerate(kinds):
            mixer, _, ffn = kind.partition("/")
            if number in chosen:
                sparse = f"{ffn}_experts"
                arguments["ffns"].setdefault(sparse, self._sparse(arguments["ffns"].get(ffn), f"layer {number}: {ffn}"))
                ffn = sparse
            renamed.append(f"{mixer}/{ffn}")
        arguments["layers"] = fold(renamed)
        used = {kind.partition("/")[2] for kind in renamed}
        arguments["ffns"] = {name: tree for name, tree in arguments["ffns"].items() if name in used}
        return decoder

    def _layers(self, count: int) -> Container[int]:
        chosen = range(self.keep_dense + self.every - 1, count, self.every)
        if not len(chosen):
            raise ValueError(
                f"Upcycling: keep_dense {self.keep_dense} and every {self.every} leave none of the {count} layers"
            )
        return chosen

    def _sparse(self, dense: Tree | None, where: str) -> Tree:
        """The tree of a SparseMoE whose experts are built like a dense part."""
        kind = None if dense is None else _DENSE.get(dense["class_path"])
        if dense is None or kind is None:
            raise ValueError(
                f"Upcycling: {where} is {'no feed-forward part' if dense is None else dense['class_path']}; only "
                f"{', '.join(each.__name__ for each in _DENSE.values())} can be copied into experts"
            )
        arguments = dict(dense.get("init_args") or {})
        hidden, activation = arguments.pop("hidden"), arguments.get("activation", "silu")
        if kind is GatedFFN:
            if activation == "silu":
                arguments.pop("activation", None)
            elif activation not in ("gelu", "gelu_tanh"):
                raise ValueError(f"Upcycling: {where}: there are no experts gated by {activation}")
            name = "SwigluExperts" if activation == "silu" else "GegluExperts"
        else:
            name = "ClampedSwigluExperts" if kind is ClampedFFN else "PlainExperts"
        return part(
            "mm.decoder.ffn.moe.SparseMoE",
            hidden=hidden,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            router=self.router,
            experts=part(_EXPERTS + name, **arguments),
        )


@torch.no_grad()
def copy_into_experts(
    dense: Decoder, sparse: Decoder, upcycling: Upcycling, generator: torch.Generator | None = None
) -> bool:
    """Fills `sparse`, built from `upcycling.tree`, from `dense`; says whether both compute the same.

    They do, up to rounding, without noise and with a router whose weights add up to a constant.
    """
    own, theirs = state(sparse), state(dense)
    for name in own.keys() & theirs.keys():
        own[name].copy_(theirs[name])
    same = upcycling.noise == 0
    for before, after in zip(dense.layers, sparse.layers, strict=True):
        old, new = before.get_submodule("ffn") if before.ffn is not None else None, after.ffn
        if isinstance(new, SparseMoE) and not isinstance(old, SparseMoE):
            assert old is not None
            total = new.router.weight_sum()
            same = same and total is not None
            _copy(old, new, 1.0 if total is None else total, upcycling.noise, generator)
            if upcycling.start == "zero":
                for weight in new.router.parameters():
                    nn.init.zeros_(weight)
    return same


def _copy(old: nn.Module, new: SparseMoE, total: float, noise: float, generator: torch.Generator | None) -> None:
    """Every expert a copy, what it says divided by `total`."""
    for name, weight in old.named_parameters():
        layer, kind = name.rsplit(".", 1)
        ours = new.experts.get_parameter(layer if kind == "weight" else f"{layer}_bias")
        copy = weight / total if layer == "down" else weight
        ours.copy_(copy.expand_as(ours))
        if noise and kind == "weight":
            ours.add_(_normal(ours, generator) * (noise * copy.std()))


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
