"""Greedy answers to many questions about the same media: these are read once, and every question goes on from there.

    common prefix (media) -> cache, one row a group -> a row a question -> question -> answer

Benchmarks ask ten questions about a picture of 64 tokens or more; this saves most of the work. The answers are those of
`mm.generation.engine.generate`, up to rounding.

Shape legend: `G` groups, `R` rows (questions), `T` tokens of a question after the prefix, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mm.datasets.chat_template import Elements
from mm.datasets.packing import collate
from mm.datasets.processor import Encoded, Processor
from mm.generation.engine import generate
from mm.types import IGNORE, Sample
from mm.types import Sequence as DecoderInput


@dataclass(frozen=True)
class Answer:
    text: str


@dataclass
class Group:
    """Questions that begin alike. `prefix` is what they share; `rests` are each one's further ids (at least one)."""

    indices: list[int]
    prefix: Encoded
    rests: list[Tensor]


def generate_shared(model: Any, samples: Sequence[Sample], /, *, max_new_tokens: int, batch_size: int) -> list[Answer]:
    """One answer a sample, in order. `batch_size` bounds the questions that are decoded together (but for one group).

    Samples that share their media with no other are left to `generate`; errors are as there.
    """
    processor = Processor(model.tokenizer, model.template, model.media_specs(), max_length=None)
    answers: dict[int, Answer] = {}
    groups, alone = _group(model, processor, samples)
    for batch in _batches(groups, batch_size):
        indices = [index for group in batch for index in group.indices]
        names = [samples[index].key for index in indices]
        for index, ids in zip(indices, _decode(model, batch, names, max_new_tokens), strict=True):
            answers[index] = Answer(model.tokenizer.decode(ids))
    single = generate(model, [samples[i] for i in alone], max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers |= {index: Answer(answer.text) for index, answer in zip(alone, single, strict=True)}
    return [answers[index] for index in range(len(samples))]


def _group(model: Any, processor: Processor, samples: Sequence[Sample]) -> tuple[Iterator[Group], list[int]]:
    """Groups of samples with the same media (encoded as they are asked for), and the indices of the others."""
    by_media: dict[Any, list[int]] = {}
    rendered: dict[int, Elements] = {}
    for index, sample in enumerate(samples):
        if sample.media:
            rendered[index] = model.template.render(sample, model.tokenizer, generation_prompt=True)
            media = tuple((item.kind, item.data) for item in sample.media)
            by_media.setdefault((media, tuple(rendered[index].slots)), []).append(index)
    found: list[tuple[list[int], int]] = []
    for indices in by_media.values():
        ids = [rendered[index].ids.tolist() for index in indices]
        common = min(_common_length(ids), *(len(row) - 1 for row in ids))
        if len(indices) > 1 and all(token >= 0 for row in ids for token in row[common:]):  # every slot is shared
            found.append((indices, common))

    def encode() -> Iterator[Group]:
        for indices, common in found:
            whole = processor.encode(samples[indices[0]], generation_prompt=True)
            prefix = replace(
                whole, ids=whole.ids[:common], labels=whole.labels[:common], branch_ids=whole.branch_ids[:common]
            )
            yield Group(indices, prefix, [rendered[index].ids[common:] for index in indices])

    shared = {index for indices, _ in found for index in indices}
    return encode(), [index for index in range(len(samples)) if index not in shared]


def _common_length(rows: list[list[int]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _batches(groups: Iterator[Group], batch_size: int) -> Iterator[list[Group]]:
    batch: list[Group] = []
    for group in groups:
        if batch and sum(len(g.indices) for g in batch) + len(group.indices) > batch_size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


@torch.inference_mode()
def _decode(model: Any, groups: list[Group], names: list[str], max_new_tokens: int) -> list[list[int]]:
    """The answer ids of every question of the groups, without the closing special."""
    cache = model.new_cache()
    model(collate([[group.prefix] for group in groups]).to(model.device), cache=cache)
    owners = [place for place, group in enumerate(groups) for _ in group.indices]
    cache.keep(torch.tensor(owners, device=model.device))  # from a row a group to a row a question
    logits = _read(model, [rest for group in groups for rest in group.rests], cache)
    stop = model.tokenizer.special(model.template.end)
    answers: list[list[int]] = [[] for _ in names]
    rows = list(range(len(names)))
    for step in range(max_new_tokens):
        if not bool(logits.amax(-1).isfinite().all()):
            bad = int((~logits.amax(-1).isfinite()).nonzero()[0])
            raise ValueError(f"sample {names[rows[bad]]}: the model's logits are NaN or infinite: damaged weights?")
        chosen = logits.argmax(-1)
        ids = chosen.tolist()
        going = [place for place, token in enumerate(ids) if token != stop]
        for place in going:
            answers[rows[place]].append(ids[place])
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=chosen.device)
            cache.keep(kept)
            chosen, rows = chosen[kept], [rows[place] for place in going]
        logits = model.step(chosen, cache)
    return answers


def _read(model: Any, rests: list[Tensor], cache: Any) -> Tensor:
    """Reads further text, one row of ids each, into the cache -> logits (R, V) float32 after each row's last id."""
    device = model.device
    ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True).to(device)
    lengths = torch.tensor([len(rest) for rest in rests], device=device)
    steps = torch.arange(ids.shape[1], device=device)
    real = (steps < lengths[:, None]).long()  # document 1; 0 at padding
    sequence = DecoderInput(
        embeddings=model.decoder.embed(ids),
        index=cache.next_index[:, None] + steps,
        positions=(cache.next_position[:, None] + steps)[..., None].expand(-1, -1, 3),
        document_ids=real,
        branch_ids=torch.zeros_like(ids),
        modality_ids=torch.zeros_like(ids),
        labels=torch.full_like(ids, IGNORE),
        predecessor=torch.full_like(ids, -1),
        cross=cache.cross,
    )
    hidden, _ = model.decoder(sequence, cache)
    cache.next_index, cache.next_position = cache.next_index + lengths, cache.next_position + lengths
    last = hidden[torch.arange(len(rests), device=device), lengths - 1]
    return model.decoder.head(last).float()
