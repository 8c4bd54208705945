"""torch's scaled_dot_product_attention, and the same maths written out for what that does not take.

Runs everywhere, and is what the other backends are tested against.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.decoder.attention.apart import apart
from mm.decoder.attention.one_query import one_query, suits
from mm.decoder.attention.windows import Window
from mm.decoder.attention.written_out import to_query_heads, written_out
from mm.decoder.layout import Layout

BLOCK = 512  # queries of a call that needs a mask, which is BLOCK x S, or with a window BLOCK x (BLOCK + window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: Window | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, T, H, d), k (B, S, G, d) and v (B, S, G, e) with H a multiple of G -> (B, T, H, e); 0 at padding of long
    rows.

    One query a row, as in decoding, has a kernel of its own on a CPU. One document a row takes one causal call, as do
    packed documents of long rows, one by one; those of short rows become rows of their own on a CPU, where that is less
    work. All else needs a mask, made once a forward pass; for long rows it is made of blocks, so that none of T x S is
    ever held. Soft caps and sinks write the scores out.
    """
    if slopes is None and suits(q, k, v):
        seen = layout.mask(window)[:, 0, 0].expand(len(q), -1)
        return one_query(q[:, 0], k, v, seen, scale, softcap, sinks)[:, None]
    plain = window is None and slopes is None and softcap is None and sinks is None
    if plain and layout.is_plain_causal:
        return _sdpa(q, k, v, None, True, scale)
    options = {"scale": scale, "window": window, "slopes": slopes, "softcap": softcap, "sinks": sinks}
    if q.shape[1] < BLOCK:
        documents = apart(layout) if q.is_cpu and layout.offset == 0 else None  # a GPU would wait for their bounds
        if documents is None:
            return _masked(q, k, v, layout, **options)
        q, k, v = (documents.take(part) for part in (q, k, v))
        return documents.put(attend(q, k, v, documents.layout, **options), layout)
    return _in_blocks(q, k, v, layout, plain and layout.offset == 0 and not layout.has_branches, options)


def attend_rows(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """One query of each row, q (B, 1, H, d), that sees all of its row's keys (S_row, G, d) and values (S_row, G, e)
    -> (B, 1, H, e). What a long row has costs the short ones nothing."""
    if suits(q, keys[0], values[0]):
        rows = zip(q.unbind(0), keys, values, strict=True)
        return torch.stack([one_query(row, k[None], v[None], None, scale) for row, k, v in rows])
    groups = keys[0].shape[1]
    grouped = q.unflatten(2, (groups, -1)).unbind(0)  # (1, G, H / G, d): a group's heads as queries of the same keys
    parts = [
        F.scaled_dot_product_attention(row, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
        for row, k, v in zip(grouped, keys, values, strict=True)
    ]
    return torch.cat(parts).flatten(1, 2)[:, None]


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, layout: Layout, plain: bool, options: dict[str, Any]) -> Tensor:
    """Document by document, or with a cache row by row; and where one needs a mask, BLOCK queries at a time."""
    if layout.offset == 0:
        spans = layout.documents()
        lengths = [end - start for _, start, end in spans]
        documents = (_cut(part.flatten(0, 1)[None], lengths) for part in (q, k, v))
    else:
        spans = [(row, 0, q.shape[1]) for row in range(len(q))]
        documents = (part.split(1) for part in (q, k, v))
    parts: list[Tensor] = []
    for (row, start, end), queries, keys, values in zip(spans, *documents, strict=True):
        if layout.offset == 0 and layout.is_padding(row, start):
            parts.append(q.new_zeros(1, end - start, q.shape[2], v.shape[3]))
        elif plain:
            parts.append(_sdpa(queries, keys, values, None, True, options["scale"]))
        else:
            parts += _masked_blocks(queries, keys, values, layout, row, start, options)
    return torch.cat(parts, 1).view(*q.shape[:-1], v.shape[-1])


def _masked_blocks(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, row: int, start: int, options: dict[str, Any]
) -> list[Tensor]:
    """One document, whose first query stands in column `start` of `row`, as blocks of queries with a mask each."""
    length, offset, window = q.shape[1], layout.offset, options["window"]
    # Of a document without branches, a window's keys are the columns before the query. With a cache they need not be.
    near = window if isinstance(window, int) and offset == 0 and not layout.has_branches else None
    step = BLOCK if near is None else min(BLOCK, max(128, near))
    steps = [min(step, length - a) for a in range(0, length, step)]
    keys, values = ((part,) if near is None else _cut(part, steps) for part in (k, v))
    keeps_scores = options["softcap"] is not None or options["sinks"] is not None
    parts = []
    for number, queries in enumerate(_cut(q, steps)):
        a, b = number * step, number * step + steps[number]
        if near is None:
            first, given = 0, (queries, k[:, : offset + b], v[:, : offset + b])
        else:
            reach = max(0, number - -(-(near - 1) // step))  # the first block of keys that the first query sees
            first = reach * step
            given = queries, torch.cat(keys[reach : number + 1], 1), torch.cat(values[reach : number + 1], 1)
        # All blocks' masks together would be T x S / 2 without a window.
        block = layout.block(row, start + a, start + b, start + first, keep=near is not None)
        if keeps_scores and torch.is_grad_enabled():  # they would be kept for the backward pass, of all blocks
            parts.append(checkpoint(_masked, *given, block, use_reentrant=False, **options))  # type: ignore[arg-type]
        else:
            parts.append(_masked(*given, block, **options))
    return parts


def _cut(part: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Along the second axis, at once: the gradient of a slice is a tensor as large as what it was cut from, filled with
    zeros and added to the others', and that for every slice; that of this is one concatenation."""
    return part.split(lengths, 1)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    window: Window | None,
    slopes: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    mask = layout.mask(window)
    bias = None if slopes is None else _bias(layout, slopes)
    if softcap is not None or sinks is not None:
        return written_out(q, k, v, mask, bias, scale, softcap, sinks)
    if bias is not None:
        return _sdpa(q, k, v, bias.masked_fill(~mask, float("-inf")).to(q.dtype), False, scale)
    return _sdpa(q, k, v, mask, False, scale)


def _bias(layout: Layout, slopes: Tensor) -> Tensor:
    """(B, H, T, S) float32: -slope_h * (query's place - key's place)."""
    distance = layout.queries.index[:, :, None] - layout.keys.index[:, None, :]
    return -slopes[None, :, None, None] * distance[:, None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    if q.shape[1] == 1 and groups > 1 and (mask is None or mask.shape[1] == 1):
        # One query: those of the heads that share a key stand as so many queries of it, and no key is repeated.
        q = q.view(len(q), k.shape[2], groups, -1)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).flatten(1, 2)[:, None]
    if _slow_backward(q, k):
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), mask, causal, scale).to(v.dtype)
    q, k, v = q.transpose(1, 2), *to_query_heads(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)


def _slow_backward(q: Tensor, k: Tensor) -> bool:
    """Whether torch's backward pass takes several times as long as in float32, as for short rows on a CPU it does."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return learns and q.is_cpu and q.dtype == torch.bfloat16 and k.shape[1] < BLOCK
