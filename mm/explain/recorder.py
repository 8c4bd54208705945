"""Attention, written down while the model's own modules run: nothing in them changes, and nothing is kept afterwards.

A mixer that attends calls its backend with queries and keys; the recorder stands in front of the backend, hands the
call on, and writes the same softmax out for the queries that are wanted. Cross-attention layers and resamplers are
watched by hooks. One row a batch.

Shape legend: `T` queries, `S` wanted ones, `K` keys, `H` heads, `N` media tokens, `Q` latents.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mm.decoder.attention.backends import Attend
from mm.decoder.attention.cross import GatedCrossAttention
from mm.decoder.attention.windows import Window
from mm.decoder.layout import Layout
from mm.fusion.resampler import PerceiverResampler, ResamplerLayer


class Recorder(ExitStack):
    """`with Recorder(model, columns): model(batch)` leaves here, as means over heads, float32 on the CPU:

    own     layer -> (S, T)    what each of `columns` attended to of the sequence; with learned sinks (gpt-oss) a row
                               adds up to less than 1
    beside  layer -> (S, N)    the same of the media beside the sequence; zeros where a column sees none
    squares layer -> (T, T)    with `squares`: all of the sequence's attention, which a rollout needs
    read    kind  -> (M, Q, N) how much of each media token stands in each latent of a resampler, rows adding up to 1

    Layers without attention (state-space, linear) are in none of them.
    """

    def __init__(self, model: Any, columns: Tensor, squares: bool = False) -> None:
        super().__init__()
        self.model, self.columns, self.keep_squares = model, columns, squares
        self.own: dict[int, Tensor] = {}
        self.beside: dict[int, Tensor] = {}
        self.squares: dict[int, Tensor] = {}
        self.read: dict[str, Tensor] = {}

    def __enter__(self) -> Recorder:
        super().__enter__()
        for number, layer in enumerate(self.model.decoder.layers):
            if isinstance(layer.cross, GatedCrossAttention):
                self._hook(layer.cross, lambda part, args, n=number: self._see_beside(n, part, *args))
            if hasattr(layer.mixer, "attend"):
                self._stand_before(layer.mixer, number)
        for kind in self.model.towers:
            for part in self.model.tower(kind).bridge.modules():
                if isinstance(part, PerceiverResampler):
                    for place in part.layers:
                        self._hook(place, lambda layer, args, kind=kind: self._see_read(kind, layer, *args))
        return self

    def _hook(self, part: nn.Module, see: Callable[[Any, tuple[Any, ...]], None]) -> None:
        self.callback(part.register_forward_pre_hook(see).remove)

    def _stand_before(self, mixer: Any, number: int) -> None:
        backend: Attend = mixer.attend

        def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, **options: Any) -> Tensor:
            self._see_own(number, q, k, layout, **options)
            return backend(q, k, v, layout, **options)

        mixer.attend = attend
        self.callback(setattr, mixer, "attend", backend)

    def _see_own(self, number: int, q: Tensor, k: Tensor, layout: Layout, **options: Any) -> None:
        rows = torch.arange(q.shape[1], device=q.device) if self.keep_squares else self.columns
        seen = attention(q, k, layout, rows, **options)[0].cpu()
        if self.keep_squares:
            self.squares[number] = seen
        self.own[number] = seen[self.columns.cpu()] if self.keep_squares else seen

    def _see_beside(self, number: int, part: GatedCrossAttention, x: Tensor, layout: Layout) -> None:
        if layout.cross is None:
            return
        q = part.q(part.norm(x[:, self.columns])).unflatten(-1, (part.heads, -1)).transpose(1, 2)
        k, _ = part.kv(layout.cross.values).unflatten(-1, (2 * part.heads, -1)).transpose(1, 2).chunk(2, 1)
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~layout.cross_mask()[:, :, self.columns], float("-inf"))
        self.beside[number] = scores.softmax(-1).nan_to_num(0.0).mean(1)[0].cpu()  # NaN: a softmax over nothing

    def _see_read(self, kind: str, layer: ResamplerLayer, latents: Tensor, media: Tensor, mask: Tensor | None) -> None:
        """One more round of a resampler: half of what a latent is stays, half is what it reads (as in a rollout)."""
        normed = layer.norm_latents(latents)
        keys = torch.cat([layer.norm_media(media), normed], dim=1)
        k = layer.kv(keys).unflatten(-1, (2, layer.heads, -1))[:, :, 0].transpose(1, 2)
        q = layer.q(normed).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1).mean(1).cpu()
        from_media, from_latents = weights.split([media.shape[1], latents.shape[1]], -1)
        before = self.read.get(kind, torch.zeros_like(from_media))
        after = before + from_media + from_latents @ before
        self.read[kind] = after / after.sum(-1, keepdim=True).clamp(min=1e-9)


def attention(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    rows: Tensor,
    *,
    scale: float,
    window: Window | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What a backend of mm.decoder.attention.backends weighs values with: q (B, T, H, d), k (B, K, G, d) and `rows`
    (S,) int64 of the queries -> (B, S, K) float32, the mean over heads. One head at a time: all may not fit."""
    mask = layout.mask(window)[:, 0, rows]
    total = torch.zeros(mask.shape, device=q.device)
    heads, share = q.shape[2], q.shape[2] // k.shape[2]
    for head in range(heads):
        scores = (q[:, rows, head] @ k[:, :, head // share].transpose(1, 2)).float() * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if slopes is not None:
            scores = scores - slopes[head] * (layout.queries.index[:, rows, None] - layout.keys.index[:, None])
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sink = sinks[head].float().expand(*scores.shape[:2], 1)
            total += torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            total += scores.softmax(-1)
    return total / heads


def rollout(squares: dict[int, Tensor], columns: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): how much of each position (T,) flows into each of
    `columns` (S,) through all layers, half of every layer being what passes by it -> (S, T), rows adding up to 1."""
    layers = [squares[number] for number in sorted(squares)]
    flow = torch.eye(len(layers[0]))[columns.cpu()]
    for weights in reversed(layers):
        through = flow @ weights
        flow = 0.5 * flow + 0.5 * through / through.sum(-1, keepdim=True).clamp(min=1e-9)
    return flow
