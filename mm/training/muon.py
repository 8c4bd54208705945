"""Muon: momentum that is made orthogonal, for matrices; AdamW for everything else, in one optimizer.

Shape legend: `N` matrices of one size, `R` their rows, `C` their columns, R <= C.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from mm.decoder.decoder import Decoder
from mm.decoder.ffn.experts import Experts
from mm.decoder.many_rows import LEAST_AGAIN, onednn_if
from mm.model import EmbeddingHead

# Polar Express (Amsel et al. 2025, arXiv 2505.16932): step i is a x + b (x x^T) x + c (x x^T)^2 x. Five of them bring
# singular values from 1e-3 to 1 between 0.87 and 1.13; a sixth, to 0.2 % of 1, would be of no more use to learning.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


class Muon(Optimizer):
    """Of each of `matrices` the momentum, made orthogonal, is what it moves by (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon); `others`, groups with their own `weight_decay`, learn by fused AdamW.

    A matrix moves by lr * 0.2 * sqrt(C) times it, as far as by AdamW's usual step, so that one rate and one decay serve
    both (Liu et al. 2025, arXiv 2502.16982). A convolution's weight is the matrix (out, in * taps), an experts' stack
    (N, R, C) so many matrices. Products are in bfloat16 on a GPU, in float32 elsewhere. Every rank does all of the
    work. Raises ValueError for a parameter that is split over ranks: its rows alone say nothing.
    """

    _step_supports_amp_scaling = False  # though AdamW's part is fused: as of OptimConfig's other optimizer

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
    ) -> None:
        groups: list[dict[str, Any]] = [dict(group, orthogonal=False) for group in others]
        self._rest = AdamW(groups, lr=lr, betas=betas, fused=True) if groups else None
        if self._rest is not None:
            groups = self._rest.param_groups
        own = {"params": list(matrices), "orthogonal": True, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([*([own] if own["params"] else []), *groups], {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if isinstance(parameter, DTensor) or parameter.ndim < 2:  # FSDP's shards are one or the other
                    raise ValueError("Muon needs whole matrices on every rank, but these are split: use adamw or ddp")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._move(group)
        if self._rest is not None:  # loading a checkpoint makes groups and state anew
            self._rest.param_groups = [group for group in self.param_groups if not group["orthogonal"]]
            self._rest.state = self.state
            self._rest.step()
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        """Matrices of one size are made orthogonal together: a model has many, and each alone is little work."""
        learning = [parameter for parameter in group["params"] if parameter.grad is not None]
        sizes: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
        for parameter in learning:
            update = as_matrices(self._momentum(parameter, group["momentum"]))
            tall = update.shape[1] > update.shape[2]
            update = update.mT if tall else update
            sizes[update.shape[1], update.shape[2]].append((parameter, update, tall))
        for (_, columns), same in sizes.items():
            updates = orthogonal(torch.cat([update for _, update, _ in same]))
            parts = updates.split([len(update) for _, update, _ in same])
            for (parameter, _, tall), part in zip(same, parts, strict=True):
                part = part.mT if tall else part
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"] * 0.2 * columns**0.5)

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """Nesterov's: the mean of past gradients with this one counted once more."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"].lerp_(parameter.grad, 1 - decay)
        return parameter.grad.lerp(mean, decay)


def orthogonal(x: Tensor) -> Tensor:
    """(N, R, C), R <= C -> near U V^T of each x = U S V^T, in x's dtype; zero where x is zero."""
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    y = (x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)).to(dtype)
    with onednn_if(y, y.numel() * y.shape[1], LEAST_AGAIN):
        for a, b, c in COEFFICIENTS:
            square = y @ y.mT
            square = torch.baddbmm(square, square, square, beta=b, alpha=c)
            y = torch.baddbmm(y, square, y, beta=a)
    return y.to(x.dtype)


def as_matrices(weight: Tensor) -> Tensor:
    """(R, C), (N, R, C) or a convolution's (out, in, taps, taps) -> (N, R, C)."""
    return weight.flatten(1)[None] if weight.ndim in (2, 4) else weight


def matrices_of(module: nn.Module) -> list[str]:
    """Names of the weights that map one hidden state to another: of linear layers, dense convolutions of images and
    experts. Not those that map from or to tokens or embeddings (embeddings, heads), nor routers."""
    apart = {id(parameter) for part in module.modules() for parameter in _ends(part)}
    found = {id(parameter) for part in module.modules() for parameter in _matrices(part)}
    return [name for name, parameter in module.named_parameters() if id(parameter) in found - apart]


def _matrices(part: nn.Module) -> list[Tensor]:
    if isinstance(part, Experts):
        return [part.get_parameter(part.first_name), part.down]
    if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1):
        return [part.weight]
    return []


def _ends(part: nn.Module) -> list[Tensor]:
    if isinstance(part, nn.Embedding):
        return [part.weight]
    if isinstance(part, Decoder):
        return list(part.head.parameters())
    return list(part.parameters()) if isinstance(part, EmbeddingHead) else []
