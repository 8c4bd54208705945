"""Steering carried out: at each token the past is moved along a gradient before the token is chosen (`Steering`).

Two caches: one as the model reads the text, and one of the moved past. Shape legend: `B` rows, `S` cached positions,
`D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mm.decoder.cache import Cache
from mm.decoder.layout import Places
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts
from mm.generation.rows import Rows
from mm.generation.steering import Steering
from mm.types import Sequence

Moves = list[dict[str, Tensor]]  # of what each layer keeps, by name: how far it is moved, (B, S, ...) float32


class SteeredRows(Rows):
    """Rows whose logits are of the steered distribution; `own` are the model's. Needs gradients, so no inference mode.

    Raises ValueError for a model that keeps anything but a past of positions.
    """

    def __init__(self, model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int]) -> None:
        super().__init__(model, prompts, decoding, stops)
        assert decoding.steer is not None
        self.network: Any = model
        self.steering: Steering = decoding.steer
        _check_has_past(model)
        self.looks_ahead = self.steering.horizon if any(a.reads_states for a in self.steering.attributes) else 0

    def read(self) -> Tensor:
        """The prompts are read once; their last tokens again, so that there is a past to move before them."""
        output = self.model(**self.prompts.inputs, cache=self.cache)
        mask = output.sequence.mask.clone()
        rows, last = torch.arange(len(mask), device=mask.device), mask.sum(1) - 1
        self.own = output.head(output.hidden[rows, last]).float()
        self.begin(self.own)
        mask[rows, last] = False
        self.total = (output.hidden.float() * mask[..., None]).sum(1)  # of the hidden states before the newest
        self.count = mask.sum(1, keepdim=True)
        places = self.cache.places
        assert places is not None
        documents = places.document_ids.clone()
        documents[rows, last] = 0  # as padding, which nothing sees
        self.moved = Past.of(self.cache, Places(places.index, documents, places.branch_ids))
        newest = _column(output.sequence, last)
        # The same token by the same kernels as the moved ones, so that their difference is the steering alone.
        again, own = self._pass(newest, Past.of(self.moved))
        return self.own + self._shift(newest, again, own.log_softmax(-1))

    def step(self, ids: Tensor) -> Tensor:
        self.push(ids)
        cache = self.cache
        newest = self.network.text_after(ids[:, None], cache.next_index, cache.next_position)
        newest.cross = cache.cross
        hidden = self.model.advance(ids[:, None], cache)[:, 0]
        self.own = self.model.logits(hidden).float()
        return self.own + self._shift(newest, hidden, self.own.log_softmax(-1))

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.moved.keep(rows)
        self.total, self.count = self.total[rows], self.count[rows]

    def _shift(self, newest: Sequence, hidden: Tensor, own_log_p: Tensor) -> Tensor:
        """(B, V) to be added to the model's logits, so that they are those of p_moved^g * p^(1-g). The moved past is
        kept; `hidden` (B, D) and `own_log_p` (B, V) are the model's own for the newest token."""
        moves: Moves = [
            {name: torch.zeros_like(x, dtype=torch.float32) for name, x in layer.items()} for layer in self.moved.layers
        ]
        for _ in range(self.steering.steps):
            moves = self._moved_on(moves, newest, own_log_p)
        past = Past.of(self.moved, moves=moves)
        _, logits = self._pass(newest, past)
        self.moved = past
        self.total, self.count = self.total + hidden.float(), self.count + 1
        return self.steering.gm_scale * (logits.log_softmax(-1) - own_log_p)

    def _moved_on(self, moves: Moves, newest: Sequence, own_log_p: Tensor) -> Moves:
        """One gradient step further."""
        with torch.enable_grad():
            moves = [{name: x.detach().requires_grad_() for name, x in layer.items()} for layer in moves]
            wanted = [x for layer in moves for x in layer.values()]
            # A sum over rows that do not see one another: each row's gradient is its own.
            found = torch.autograd.grad(self._loss(moves, newest, own_log_p).sum(), wanted, materialize_grads=True)
        gradients, seen = iter(found), self._movable(newest)
        return [self._stepped(layer, {name: next(gradients) for name in layer}, seen) for layer in moves]

    def _loss(self, moves: Moves, newest: Sequence, own_log_p: Tensor) -> Tensor:
        """(B,): - log p(attributes) + kl_scale * KL(moved || model)."""
        past = Past.of(self.moved, moves=moves)
        hidden, logits = self._pass(newest, past)
        log_p = logits.log_softmax(-1)
        total, expected, token = self.total + hidden.float(), log_p, newest
        for _ in range(self.looks_ahead):
            token = self._expected(expected.exp(), token)
            hidden, logits = self._pass(token, past)
            total, expected = total + hidden.float(), logits.log_softmax(-1)
        mean = total / (self.count + 1 + self.looks_ahead)
        attributes = torch.stack([each.log_p(mean, log_p) for each in self.steering.attributes]).sum(0)
        return self.steering.kl_scale * (log_p.exp() * (log_p - own_log_p)).sum(-1) - attributes

    def _stepped(self, moves: dict[str, Tensor], gradients: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        """One layer's, each row by the length of its own gradient."""
        gradients = {name: g * seen.view(*seen.shape, *[1] * (g.ndim - 2)) for name, g in gradients.items()}
        length = torch.stack([g.square().flatten(1).sum(1) for g in gradients.values()]).sum(0).sqrt()
        # A row with nothing before its newest token has no gradient, and does not move.
        factor = torch.where(length > 0, self.steering.step_size / length**self.steering.gamma, 0.0)
        return {name: x.detach() - factor.view(-1, *[1] * (x.ndim - 1)) * gradients[name] for name, x in moves.items()}

    def _movable(self, newest: Sequence) -> Tensor:
        """(B, S) bool: the positions that may be moved."""
        assert self.moved.places is not None
        places, window = self.moved.places, self.steering.window
        real = places.document_ids > 0
        return real if window is None else real & (newest.index - places.index <= window)

    def _pass(self, token: Sequence, past: Past) -> tuple[Tensor, Tensor]:
        """One token of each row after a past, which grows by it -> hidden (B, D), logits (B, V) float32."""
        hidden, _ = self.network.decoder(token, past)
        return hidden[:, 0], self.model.logits(hidden[:, 0]).float()

    def _expected(self, p: Tensor, before: Sequence) -> Sequence:
        """The token that is expected after `before`: the mean of all embeddings by p (B, V)."""
        embed = self.network.decoder.embed
        mean = p.to(embed.weight.dtype) @ embed.weight.detach() * embed.scale
        any_token = torch.zeros_like(before.index)
        token = self.network.text_after(any_token, before.index[:, 0] + 1, before.positions.amax((1, 2)) + 1)
        token.embeddings, token.cross = mean[:, None], before.cross
        return token


class Past(Cache):
    """A cache that never writes into the tensors that it has, so that gradients reach what they are made of."""

    @staticmethod
    def of(cache: Cache, places: Places | None = None, moves: Moves | None = None) -> Past:
        """What a cache keeps, moved; the cache stays as it is. `places` stand instead of its own."""
        past = Past(len(cache.layers))
        past.layers = [dict(layer) for layer in cache.layers]
        if moves is not None:
            past.layers = [
                {name: (x.float() + by[name]).to(x.dtype) for name, x in layer.items()}
                for layer, by in zip(cache.layers, moves, strict=True)
            ]
        past.places = cache.places if places is None else places
        return past

    def _append(self, layer: int, name: str, x: Tensor) -> Tensor:
        kept = self.layers[layer].get(name)
        self.layers[layer][name] = x if kept is None else torch.cat([kept, x], 1)
        return self.layers[layer][name]


def _column(sequence: Sequence, columns: Tensor) -> Sequence:
    """One position of each row, (B, 1), by its column (B,)."""
    rows = torch.arange(len(columns), device=columns.device)

    def pick(x: Tensor) -> Tensor:
        return x[rows, columns][:, None]

    return Sequence(
        embeddings=pick(sequence.embeddings),
        index=pick(sequence.index),
        positions=pick(sequence.positions),
        document_ids=pick(sequence.document_ids),
        branch_ids=pick(sequence.branch_ids),
        modality_ids=pick(sequence.modality_ids),
        labels=pick(sequence.labels),
        predecessor=pick(sequence.predecessor),
        cross=sequence.cross,
    )


def _check_has_past(model: Any) -> None:
    """Raises ValueError for a model whose cache is not keys and values (or latents) of positions, naming the part."""
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        raise ValueError(f"steer: {type(model).__name__} has no decoder with a past that could be moved")
    recurrent = {type(module).__name__ for module in decoder.modules() if hasattr(module, "cache_numbers_fixed")}
    if recurrent or decoder.rereader.lengths:
        what = ", ".join(sorted(recurrent)) or "LongRoPE (which reads the past again at its original length)"
        raise ValueError(f"steer: {what} keeps no past of positions that could be moved")
