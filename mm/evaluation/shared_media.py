"""Greedy answers to many questions: media that several ask about are read once, and every question goes on from there.

    common prefix (media) -> cache, one row a group -> a row a question -> question -> answer

Benchmarks ask ten questions about a picture of 64 tokens or more; this saves most of the work. The answers are those of
`mm.generation.engine.generate`, up to rounding, with the probability that the model gave to each.

Shape legend: `G` groups, `R` rows (questions), `T` tokens of a question after the prefix, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor

from mm.datasets.chat_template import Elements
from mm.datasets.packing import collate
from mm.datasets.processor import Encoded, Processor
from mm.evaluation.records import Response
from mm.types import Sample

WINDOW = 8  # batches of groups that are encoded ahead and sorted by length


@dataclass
class Group:
    """Questions that begin alike. `prefix` is what they share; `rests` are each one's further ids (at least one)."""

    indices: list[int]
    prefix: Encoded
    rests: list[Tensor]

    @property
    def length(self) -> int:
        """Decoder positions of its longest question."""
        return self.prefix.length + max(map(len, self.rests))


def generate_shared(
    model: Any,
    samples: Sequence[Sample],
    /,
    *,
    max_new_tokens: int,
    batch_size: int,
    batch_tokens: int = 65_536,
) -> list[Response]:
    """One response a sample, in order: text, and `confidence`, the probability of that whole answer.

    At most `batch_size` questions are decoded together, and at most `batch_tokens` positions (but for one group).
    Groups of like length go together. Raises ValueError and MediaError as `mm.generation.engine.generate` does.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before evaluating")
    processor = Processor(model.tokenizer, model.template, model.media_specs(), max_length=None)
    responses: dict[int, Response] = {}
    groups = _group(model, processor, samples)
    while window := list(islice(groups, WINDOW * batch_size)):
        window.sort(key=lambda group: (-group.length, group.indices[0]))
        for batch in _batches(window, batch_size, batch_tokens, max_new_tokens):
            indices = [index for group in batch for index in group.indices]
            names = [samples[index].key for index in indices]
            for index, (ids, confidence) in zip(indices, _decode(model, batch, names, max_new_tokens), strict=True):
                responses[index] = Response(model.tokenizer.decode(ids), confidence=confidence)
    return [responses[index] for index in range(len(samples))]


def _group(model: Any, processor: Processor, samples: Sequence[Sample]) -> Iterator[Group]:
    """Groups of samples with the same media, encoded as they are asked for; a sample that shares none is alone."""
    rendered: list[Elements] = []
    together: dict[Any, list[int]] = {}
    for index, sample in enumerate(samples):
        rendered.append(model.template.render(sample, model.tokenizer, generation_prompt=True))
        media = tuple((item.kind, item.data) for item in sample.media)
        together.setdefault((media, tuple(rendered[index].slots)) if media else index, []).append(index)
    for indices in together.values():
        ids = [rendered[index].ids.tolist() for index in indices]
        common = min(_common_length(ids), *(len(row) - 1 for row in ids))
        shared = all(token >= 0 for row in ids for token in row[common:])  # every slot is in the prefix
        for members in [indices] if shared else [[index] for index in indices]:
            common = common if shared else len(rendered[members[0]].ids) - 1
            whole = processor.encode(samples[members[0]], generation_prompt=True)
            rests = [rendered[index].ids[common:] for index in members]
            yield Group(members, _cut(whole, common), rests)


def _cut(whole: Encoded, common: int) -> Encoded:
    """Its first `common` elements; what is cut off is text."""
    length = whole.length - (len(whole.ids) - common)
    ids, labels, branches = whole.ids[:common], whole.labels[:common], whole.branch_ids[:common]
    return replace(whole, ids=ids, labels=labels, branch_ids=branches, length=length)


def _common_length(rows: list[list[int]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _batches(groups: Sequence[Group], batch_size: int, batch_tokens: int, max_new_tokens: int) -> Iterator[list[Group]]:
    """Groups in their order (longest first), cut by questions and by positions."""
    batch: list[Group] = []
    rows = 0
    for group in groups:
        width = (batch[0] if batch else group).length + max_new_tokens
        more = rows + len(group.indices)
        if batch and (more > batch_size or more * width > batch_tokens):
            yield batch
            batch, more = [], len(group.indices)
        batch.append(group)
        rows = more
    if batch:
        yield batch


@torch.inference_mode()
def _decode(model: Any, groups: list[Group], names: list[str], max_new_tokens: int) -> list[tuple[list[int], float]]:
    """Of every question of the groups the answer's ids, without the closing special, and their probability."""
    cache = model.new_cache()
    model(collate([[group.prefix] for group in groups]).to(model.device), cache=cache)
    owners = [place for place, group in enumerate(groups) for _ in group.indices]
    cache.keep(torch.tensor(owners, device=model.device))  # from a row a group to a row a question
    logits = _read(model, [rest for group in groups for rest in group.rests], cache)
    stops = model.template.stop_ids(model.tokenizer)
    answers: list[list[int]] = [[] for _ in names]
    logs = [0.0] * len(names)
    rows = list(range(len(names)))
    for step in range(max_new_tokens):
        best, chosen = logits.log_softmax(-1).max(-1)
        gained, ids = best.tolist(), chosen.tolist()
        for place, log in enumerate(gained):
            if not math.isfinite(log):
                raise ValueError(
                    f"sample {names[rows[place]]}: the model's logits are NaN or infinite: damaged weights?"
                )
            logs[rows[place]] += log
        going = [place for place, token in enumerate(ids) if token not in stops]
        for place in going:
            answers[rows[place]].append(ids[place])
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=chosen.device)
            cache.keep(kept)
            chosen, rows = chosen[kept], [rows[place] for place in going]
        logits = model.step(chosen, cache)
    return [(ids, math.exp(log)) for ids, log in zip(answers, logs, strict=True)]


def _read(model: Any, rests: list[Tensor], cache: Any) -> Tensor:
    """Reads further text, one row of ids each, into the cache -> logits (R, V) float32 after each row's last id."""
    ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True).to(model.device)
    lengths = torch.tensor([len(rest) for rest in rests], device=model.device)
    hidden = model.advance(ids, cache, lengths)
    return model.logits(hidden[torch.arange(len(rests), device=model.device), lengths - 1])
