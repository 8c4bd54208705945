"""Balance of a mixture of experts, each rule a switch; padding is in none of the statistics.

loss    switch    E * sum_e f_e P_e             (Switch Transformer, arXiv 2101.03961, eq. 4-6; GShard, 2006.16668)
loss    variance  CV^2 of the experts' counts   (Shazeer et al. 2017, arXiv 1701.06538, section 4 and appendix A)
loss    sequence  E * sum_e f_e P_e a document  (DeepSeek-V3, arXiv 2412.19437, eq. 17-20)
loss    z         mean logsumexp(logits)^2      (ST-MoE, arXiv 2202.08906, eq. 5)
update  bias      the selection bias of over-used experts falls, of under-used ones rises (arXiv 2408.15664)

Shape legend: `S` tokens, `E` experts, `K` chosen each, `N` documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.decoder.ffn.moe import SparseMoE
from mm.types import Routing


def switch_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e: f the share of choices that went to e, P the mean probability of e; 1 when even."""
    demand, mass = routing.demand(), _mass(routing)
    share = demand / demand.sum().clamp(min=1)
    return len(share) * (share * mass / routing.mask.sum().clamp(min=1)).sum()


def variance_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the experts' counts: 0 when even, E - 1 when one expert has all.

    Counts have no gradient; the one used is that of the probabilities that stand for them, each expert's share.
    """
    demand, mass = routing.demand(), _mass(routing)
    share = demand / demand.sum().clamp(min=1)
    soft = mass / mass.detach().sum().clamp(min=1)
    share = share + (soft - soft.detach())
    return len(share) * (share - 1 / len(share)).square().sum() * (demand.sum() > 0)


def sequence_loss(routing: Routing, documents: Tensor) -> Tensor:
    """The switch rule within each document, averaged over documents: 1 when each is even by itself.

    `documents` (B, T) int64 as in Sequence, B * T = S.
    """
    rows = torch.arange(len(documents), device=documents.device)[:, None]
    many = int(documents.max()) + 1 if documents.numel() else 1
    member = (rows * many + documents).reshape(-1)  # (S,) which of the N = B * many documents
    tokens = routing.mask.float()
    experts = routing.logits.shape[-1]
    length_N = tokens.new_zeros(len(documents) * many).index_add_(0, member, tokens)
    cells = (member[:, None] * experts + routing.indices).reshape(-1)
    counts_NE = tokens.new_zeros(len(length_N) * experts).index_add_(0, cells, routing.chosen().reshape(-1).float())
    counts_NE = counts_NE.view(-1, experts)
    mass_NE = torch.zeros_like(counts_NE).index_add(0, member, routing.scores * tokens[:, None])
    share_NE = counts_NE / counts_NE.sum(-1, keepdim=True).clamp(min=1)
    losses_N = experts * (share_NE * mass_NE).sum(-1) / length_N.clamp(min=1)
    return losses_N.sum() / (length_N > 0).sum().clamp(min=1)


def z_loss(routing: Routing) -> Tensor:
    """Mean squared logsumexp of the router logits: keeps them small."""
    squared = routing.logits.logsumexp(-1).square() * routing.mask
    return squared.sum() / routing.mask.sum().clamp(min=1)


def dropped_share(routings: Seq[Routing]) -> Tensor | None:
    """The share of choices that experts had no room for, over the layers with a capacity; None without such layers."""
    limited = [routing for routing in routings if routing.dropped is not None]
    if not limited:
        return None
    dropped = torch.stack([routing.dropped.sum() for routing in limited if routing.dropped is not None]).sum()
    return dropped / torch.stack([routing.demand().sum() for routing in limited]).sum().clamp(min=1)


@dataclass
class Balance:
    """Which rules hold, and how strongly: 0 switches a rule off. They add up.

    `switch`, `variance`, `sequence` and `z` weigh losses. `bias_rate` is the speed at which selection biases move once
    an optimizer step (DeepSeek-V3: 0.001); experts within `bias_tolerance` of the mean load, as a share of it, stay.
    """

    switch: float = 0.01
    z: float = 0.001
    bias_rate: float = 0.0
    variance: float = 0.0
    sequence: float = 0.0
    bias_tolerance: float = 0.0

    def losses(self, routings: Seq[Routing], documents: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted losses by name, averaged over the MoE layers; empty without MoE layers.

        `documents` (B, T), the document of each token, is what the sequence rule needs.
        """
        if not routings:
            return {}
        rules = {"switch": switch_loss, "variance": variance_loss, "z": z_loss}
        terms = {f"balance/{name}": [rule(r) for r in routings] for name, rule in rules.items() if getattr(self, name)}
        if self.sequence:
            if documents is None:
                raise ValueError(
                    "Balance.sequence needs the documents of the tokens; this objective does not give them"
                )
            terms["balance/sequence"] = [sequence_loss(r, documents) for r in routings]
        return {
            name: getattr(self, name.removeprefix("balance/")) * torch.stack(each).mean()
            for name, each in terms.items()
        }

    @torch.no_grad()
    def update_biases(self, layers: Seq[SparseMoE], loads: Iterable[Tensor]) -> None:
        """After an optimizer step: moves each layer's selection bias by `bias_rate` against its load, (E,) a layer.

        Raises ValueError for a router that a bias cannot steer.
        """
        for layer, load in zip(layers, loads, strict=True):
            if not layer.router.steerable:
                raise ValueError(
                    f"Balance.bias_rate {self.bias_rate}: {type(layer.router).__name__} has no selection bias to move "
                    "(its experts choose, so they are even already); set bias_rate: 0"
                )
            error = load.mean() - load
            layer.router.bias += self.bias_rate * torch.sign(error) * (error.abs() > self.bias_tolerance * load.mean())


def _mass(routing: Routing) -> Tensor:
    """(E,) the experts' probabilities, summed over unpadded tokens."""
    return (routing.scores * routing.mask[:, None]).sum(0)
