"""The splice: features take the place of their slots, and everything that runs along the sequence expands with them.

Shape legend: `B` rows, `L` elements (a text token or a slot), `T` positions after the splice, `M` items, `N` tokens of
an item, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm.types import IGNORE, KINDS, MODALITIES, SLOT_IDS, Batch, CrossMedia, MediaBatch, Sequence, Tokens


@dataclass
class Features:
    """What the bridge of one kind of media gave: tokens (M, N, D), and whether they stand in the sequence."""

    tokens: Tokens
    inline: bool


def splice(
    batch: Batch, embed: nn.Embedding, features: Mapping[str, Features], slot_embedding: nn.Embedding
) -> Sequence:
    """Expands ids, labels, positions, document and branch ids together, and puts the features in.

    `slot_embedding` (kinds, D) stands at the slots of media that stay beside the sequence. Raises ValueError naming the
    item and both numbers if a bridge gave another number of tokens than the data side counted.
    """
    real = batch.document_ids > 0
    # Padding takes no place once media expand, so that rows stay short; without media every element keeps its column.
    lengths = real.long() if batch.media else torch.ones_like(batch.input_ids)
    advance = real.long()
    for kind, media in batch.media.items():
        _check_counts(media, features[kind])
        if features[kind].inline:
            tokens = features[kind].tokens
            lengths = lengths.index_put((media.rows, media.columns), media.lengths)
            extent = (
                (tokens.positions.amax(-1).masked_fill(~tokens.mask, 0).amax(-1) + 1) if len(tokens) else media.lengths
            )
            advance = advance.index_put((media.rows, media.columns), extent)

    starts = lengths.cumsum(1) - lengths
    width = int((starts + lengths).amax()) if lengths.numel() else 0
    element = _element_of(lengths, starts, width)
    padding = element < 0
    element = element.clamp(min=0)

    def expand(values: Tensor, fill: int) -> Tensor:
        return values.gather(1, element).masked_fill(padding, fill)

    first, trunk, branch = _runs(batch)
    offset = torch.arange(width, device=element.device) - starts.gather(1, element)
    index = (_places(starts, lengths, first, trunk, branch).gather(1, element) + offset).masked_fill(padding, 0)
    base = (
        _places(advance.cumsum(1) - advance, advance, first, trunk, branch).gather(1, element).masked_fill(padding, 0)
    )
    ids = expand(batch.input_ids, 0)
    positions = base[..., None].expand(-1, -1, 3).clone()
    modality = torch.zeros_like(ids)
    embeddings = embed(ids.clamp(min=0))
    for number, kind in enumerate(KINDS):
        modality = modality.masked_fill(ids == SLOT_IDS[kind], MODALITIES.index(kind))
        if kind not in features:
            continue
        values = features[kind].tokens.values
        if kind not in batch.media:
            embeddings = embeddings + values.sum()  # of no items: a tower unused here gets zero gradients, not none
            continue
        media, tokens = batch.media[kind], features[kind].tokens
        if features[kind].inline:
            item, place = tokens.mask.nonzero(as_tuple=True)
            row = media.rows[item]
            column = starts[row, media.columns[item]] + place_in_item(tokens.mask)[item, place]
            embeddings = embeddings.index_put((row, column), values[item, place].to(embeddings.dtype))
            positions = positions.index_put((row, column), positions[row, column] + tokens.positions[item, place])
        else:
            slot = starts[media.rows, media.columns]
            marker = slot_embedding.weight[number].to(embeddings.dtype)
            embeddings = embeddings.index_put((media.rows, slot), marker.expand(len(slot), -1))
    sequence = Sequence(
        embeddings=embeddings,
        index=index,
        positions=positions,
        document_ids=expand(batch.document_ids, 0),
        branch_ids=expand(batch.branch_ids, 0),
        modality_ids=modality,
        labels=expand(batch.labels, IGNORE),
        predecessor=_predecessors(starts, lengths, first, trunk, branch, element, offset, padding),
    )
    beside = {kind: feature for kind, feature in features.items() if not feature.inline}
    if beside:
        sequence.cross = _beside(batch, beside, sequence, starts)
    return sequence


def place_in_item(mask: Tensor) -> Tensor:
    """(M, N) int64: how many unpadded tokens of the item come before each token."""
    return mask.long().cumsum(1) - mask.long()


def _check_counts(media: MediaBatch, features: Features) -> None:
    given = features.tokens.mask.sum(1) if features.inline else torch.ones_like(media.lengths)
    wrong = (given != media.lengths).nonzero()
    if len(wrong):
        item = int(wrong[0])
        raise ValueError(
            f"{media.names[item]}: the bridge gave {int(given[item])} tokens where the data side counted "
            f"{int(media.lengths[item])}; the data module must use the model's own media_specs()"
        )


def _element_of(lengths: Tensor, starts: Tensor, width: int) -> Tensor:
    """(B, T) int64: which element stands at each position; -1 at padding."""
    rows, elements = lengths.shape
    flat = torch.repeat_interleave(torch.arange(rows * elements, device=lengths.device), lengths.reshape(-1))
    row, element = flat // elements, flat % elements
    total = lengths.sum(1)
    column = torch.arange(len(flat), device=lengths.device) - (total.cumsum(0) - total)[row]
    out = torch.full((rows, width), -1, dtype=torch.long, device=lengths.device)
    out[row, column] = element
    return out


def _runs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Per element: the first element of its (document, branch) run, the first of its document, is it in a branch."""
    documents, branches = batch.document_ids, batch.branch_ids
    columns = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    new_document = torch.ones_like(documents, dtype=torch.bool)
    new_document[:, 1:] = documents[:, 1:] != documents[:, :-1]
    new_run = new_document.clone()
    new_run[:, 1:] |= branches[:, 1:] != branches[:, :-1]
    first = torch.where(new_run, columns, 0).cummax(1).values
    trunk = torch.where(new_document, columns, 0).cummax(1).values
    return first, trunk, branches > 0


def _trunk_totals(lengths: Tensor, trunk: Tensor, branch: Tensor) -> Tensor:
    """Per element: the sum of `lengths` over the common part of its document."""
    totals = torch.zeros_like(lengths).scatter_add(1, trunk, torch.where(branch, 0, lengths))
    return totals.gather(1, trunk)


def _places(starts: Tensor, lengths: Tensor, first: Tensor, trunk: Tensor, branch: Tensor) -> Tensor:
    """Per element: its place in its document, where a branch goes on from the end of the common part."""
    return starts - starts.gather(1, first) + torch.where(branch, _trunk_totals(lengths, trunk, branch), 0)


def _predecessors(
    starts: Tensor,
    lengths: Tensor,
    first: Tensor,
    trunk: Tensor,
    branch: Tensor,
    element: Tensor,
    offset: Tensor,
    padding: Tensor,
) -> Tensor:
    """(B, T): the column before each position; for a branch's first the last common one; -1 at a document's first."""
    trunk_total = _trunk_totals(lengths, trunk, branch)
    end_of_trunk = torch.where(trunk_total > 0, starts.gather(1, trunk) + trunk_total - 1, -1)
    run_start = torch.where(branch, end_of_trunk, -1).gather(1, element)
    opens_run = (first.gather(1, element) == element) & (offset == 0)
    columns = torch.arange(element.shape[1], device=element.device).expand_as(element)
    return torch.where(opens_run, run_start, columns - 1).masked_fill(padding, -1)


def _beside(batch: Batch, features: Mapping[str, Features], sequence: Sequence, starts: Tensor) -> CrossMedia:
    """The media of each row side by side, padded; always at least one (hidden) key, so that shapes never degenerate."""
    rows, width = batch.input_ids.shape[0], sequence.embeddings.shape[-1]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # per kind: row (n,), slot column (n,), values (n, D)
    for kind, feature in features.items():
        if kind in batch.media:
            media = batch.media[kind]
            item, place = feature.tokens.mask.nonzero(as_tuple=True)
            slot = starts[media.rows, media.columns]
            parts.append((media.rows[item], slot[item], feature.tokens.values[item, place]))
    device = sequence.embeddings.device
    empty = torch.zeros(0, dtype=torch.long, device=device)
    row = torch.cat([part[0] for part in parts] or [empty])
    slot = torch.cat([part[1] for part in parts] or [empty])
    order = row.argsort(stable=True)
    row, slot = row[order], slot[order]
    counts = torch.bincount(row, minlength=rows)
    column = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
    longest = max(int(counts.max()) if rows else 0, 1)
    values = sequence.embeddings.new_zeros(rows, longest, width)
    if parts:
        values = values.index_put((row, column), torch.cat([part[2] for part in parts])[order].to(values.dtype))
    out = [torch.zeros(rows, longest, dtype=torch.long, device=device) for _ in range(3)]
    for target, source in zip(out, (sequence.document_ids, sequence.branch_ids, sequence.index), strict=True):
        target[row, column] = source[row, slot]
    return CrossMedia(values, *out)
