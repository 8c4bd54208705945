"""AdamW, or Muon for matrices, with decay on matrices only, and a warm-up + cosine learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mm.training.muon import Muon, matrices_of


@dataclass
class OptimConfig:
    """`warmup` is a share of all steps if below 1, else a number of steps; the rate ends at `final` times `lr`.

    It falls over the last `decay` of the steps after the warm-up, as a cosine: over all of them by default; at 0.2 it
    stays and then falls (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395). Raises ValueError for no such share.

    `matrices` is how the weights between hidden states learn: "adamw" as all else, or "muon", which takes fewer steps
    and some arithmetic in each (mm.training.muon).
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.05
    final: float = 0.1
    decay: float = 1.0
    matrices: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"optim.decay: {self.decay} is not a share of the steps, 0 to 1")

    def optimizer(self, module: nn.Module) -> AdamW | Muon:
        """Fused AdamW (the fastest on CPU and GPU): matrices decay; biases, norms, gates and scales do not."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("nothing to train: every parameter is frozen; check the stage's `train` patterns")
        # The biases of experts are rows of a matrix, one an expert.
        decays = {name for name, p in trained.items() if p.ndim >= 2 and not name.endswith("bias")}
        turned = trained.keys() & matrices_of(module) if self.matrices == "muon" else set[str]()
        groups = [
            {"params": [trained[name] for name in trained if name in names], "weight_decay": decay}
            for names, decay in ((decays - turned, self.weight_decay), (trained.keys() - decays - turned, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        if self.matrices == "muon":
            own = [trained[name] for name in trained if name in turned]
            return Muon(own, groups, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)
        optimizer = AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        # A fused step could take the scale of float16's gradients away itself; the trainer then could not clip them,
        # and refuses to in any mixed precision. So it takes the scale away before, as of any other optimizer.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        warmup = max(1, round(self.warmup * steps if self.warmup < 1 else self.warmup))
        falling = self.decay * (steps - warmup)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, max(0.0, 1 - (steps - step) / max(1.0, falling)))
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))

        return LambdaLR(optimizer, rate)


def freeze_all_but(module: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Trains only parameters whose dotted name starts with one of `patterns` ("towers.image.bridge").

    Returns their names. Raises ValueError naming a pattern that matches nothing.
    """
    patterns = list(patterns)
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(_starts(name, pattern) for name in names):
            parts = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise ValueError(f"train: {pattern!r} matches no parameter; the top-level parts are {parts}")
    trained = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(_starts(name, pattern) for pattern in patterns))
        if parameter.requires_grad:
            trained.append(name)
    return trained


def _starts(name: str, pattern: str) -> bool:
    return pattern == "all" or name == pattern or name.startswith(pattern + ".")
