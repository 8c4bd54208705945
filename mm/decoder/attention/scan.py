"""The linear recurrence that state-space models and linear attention share, computed chunk by chunk.

    S_t = exp(a_t) S_{t-1} + x_t b_t^T        y_t = S_t c_t

Within a chunk it is attention with a decaying mask, between chunks a recurrence of states ("state-space duality", Dao
and Gu 2024, arXiv 2405.21060, section 6). Shape legend: `B` rows, `T` positions, `Z` chunks of `Q` positions, `H` heads
of width `P`, `G` groups of `n` heads that share b and c, `N` (in einsums `m`) state size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decoder.attention.paths import Paths


def scan(
    x: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, paths: Paths, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, T, H, P), b and c (B, T, G, N), decay a (B, T, H), at most 0, or None for none -> y (B, T, H, P) and the
    state (B, H, P, N) after the last position, all float32.

    Every document starts from nothing, or from `state` where it goes on from a cache; every branch starts from the end
    of its common part. At padding x and decay must be 0. `chunk` changes the cost and not the result.
    """
    x, b, c = x.float(), b.float(), c.float()
    if paths.has_branches:
        return _scan_runs(x, b, c, decay, paths, chunk)
    return _scan_rows(x, b, c, decay, paths.segment, chunk, state)


def _scan_runs(
    x: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, paths: Paths, chunk: int
) -> tuple[Tensor, Tensor]:
    """Common parts and branches as rows of their own: a pass over the former, then one from their states."""
    common, branches = paths.runs.columns

    def take(values: Tensor, columns: Tensor) -> Tensor:
        padded = F.pad(values.flatten(0, 1), (0, 0) * (values.ndim - 2) + (0, 1))  # what padding takes: zeros
        return padded.index_select(0, columns.reshape(-1)).unflatten(0, columns.shape)

    def run(columns: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        decays = None if decay is None else take(decay, columns)
        segment = torch.zeros_like(columns)
        return _scan_rows(take(x, columns), take(b, columns), take(c, columns), decays, segment, chunk, state)

    y, ends = run(common, None)
    starts = F.pad(ends, (0, 0, 0, 0, 0, 0, 0, 1)).index_select(0, paths.runs.parent)  # the one past the end is zero
    y_branches, _ = run(branches, starts)
    flat = x.new_zeros(x.shape[0] * x.shape[1] + 1, *x.shape[2:])
    flat = flat.index_put((common.reshape(-1),), y.flatten(0, 1))
    flat = flat.index_put((branches.reshape(-1),), y_branches.flatten(0, 1))
    return flat[:-1].view_as(x), ends  # with branches there is no cache: nobody reads these states


def _scan_rows(
    x: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, segment: Tensor, chunk: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows in which the state starts anew whenever `segment` (B, T) rises; `state` is that of segment 0."""
    rows, length, heads, width = x.shape
    groups = b.shape[2]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    short = chunks * chunk - length

    def split(part: Tensor) -> Tensor:  # (B, T, ...) -> (B, Z, Q, ...)
        padded = F.pad(part, (0, 0) * (part.ndim - 2) + (0, short)) if short else part
        return padded.unflatten(1, (chunks, chunk))

    def by_head(part: Tensor) -> Tensor:  # (B, T, H, ...) -> (B, Z, G, n, Q, ...), n heads a group
        return split(part).unflatten(3, (groups, -1)).movedim(2, 4)

    x, b, c = by_head(x), split(b).movedim(2, 3), split(c).movedim(2, 3)  # b and c (B, Z, G, Q, N)
    segment = torch.cat([segment, segment[:, -1:].expand(-1, short)], 1).unflatten(1, (chunks, chunk))
    within, entry = _decays(None if decay is None else by_head(decay), segment)

    y = ((c @ b.mT)[:, :, :, None] * within) @ x  # within each chunk
    added = torch.einsum("bzgnqp,bzgqm->bzgnpm", x * within[..., -1, :, None], b)  # to the state, by the chunk's end
    now = x.new_zeros(rows, *added.shape[2:]) if state is None else state.unflatten(1, (groups, -1))
    before = []
    for z in range(chunks):
        before.append(now)
        now = now * entry[:, z, ..., -1, None, None] + added[:, z]
    y = y + torch.einsum("bzgqm,bzgnpm->bzgnqp", c, torch.stack(before, 1)) * entry[..., None]  # from chunks before
    y = y.movedim(4, 2).reshape(rows, chunks * chunk, heads, width)[:, :length]
    return y, now.flatten(1, 2)


def _decays(decay: Tensor | None, segment: Tensor) -> tuple[Tensor, Tensor]:
    """decay (B, Z, G, n, Q), segment (B, Z, Q) -> what is left at q of what came in at s, (B, Z, G, n, Q, Q), and of
    the state before the chunk, (B, Z, G, n, Q): nothing across the start of a document.

    Sums run from s to q. The differences of one running sum, which are cheaper, lose the digits that matter after a
    strong decay.
    """
    places = torch.arange(segment.shape[-1], device=segment.device)
    after = places[:, None] > places
    sees = (segment[..., :, None] == segment[..., None, :]) & (after | (places[:, None] == places))
    carried = F.pad(segment[:, :-1, -1], (1, 0))
    enters = (segment == carried[..., None])[:, :, None, None]
    sees = sees[:, :, None, None]
    if decay is None:
        return sees.float(), enters.float()
    sums = decay[..., :, None].masked_fill(~after, 0.0).cumsum(-2)
    return sums.masked_fill(~sees, -torch.inf).exp(), decay.cumsum(-1).exp() * enters
