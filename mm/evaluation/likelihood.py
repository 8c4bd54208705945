"""How likely a model finds given text: the choices of a question, or a document, window by window.

    context, continuations -> one row: the context once, each continuation a branch -> log-likelihoods

Tokens are split as lm-eval splits them, so that its numbers can be compared: a context's trailing spaces belong to the
continuation, and the continuation's tokens are what remains of the whole text's after as many as the context alone has.

Shape legend: `B` rows, `P` predicted positions, `V` vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm.datasets.packing import collate
from mm.datasets.processor import Encoded, Processor
from mm.types import IGNORE, Sample

BLOCK = 512  # positions whose logits exist at once


@dataclass(frozen=True)
class Scored:
    """Log-likelihood in nats of `tokens` tokens; `greedy`: each was the model's first choice."""

    loglikelihood: float
    tokens: int
    greedy: bool


def score_choices(
    model: Any,
    samples: Sequence[Sample],
    choices: Sequence[Sequence[str]],
    *,
    plain: bool,
    batch_size: int,
    batch_tokens: int = 16_384,
) -> list[list[Scored]]:
    """Each sample's choices as continuations of its chat.

    `plain` gives the text of its one message as it is; else the chat template opens the assistant's turn, which the
    choice continues (its closing special is not scored). Raises ValueError for a choice that makes no token, and as
    `Processor.encode` does.
    """
    processor = Processor(model.tokenizer, model.template, model.media_specs(), max_length=None)
    rows: list[Encoded] = []
    for sample, texts in zip(samples, choices, strict=True):
        if plain:
            pairs = [encode_pair(model, text_of(sample), text) for text in texts]
            rows.append(_plain_row(sample, pairs))
        else:
            prompt = processor.encode(sample, generation_prompt=True)
            rows.append(_with_branches(prompt, [model.tokenizer.encode(text) for text in texts]))
        if any(int((rows[-1].branch_ids == n).sum()) == 0 for n in range(1, len(texts) + 1)):
            raise ValueError(f"sample {sample.key}: a choice is empty: {list(texts)!r}")
    return [
        _per_branch(row, len(c)) for row, c in zip(_score(model, rows, batch_size, batch_tokens), choices, strict=True)
    ]


def score_documents(
    model: Any, texts: Sequence[str], *, max_length: int, batch_size: int, batch_tokens: int = 16_384
) -> list[Scored]:
    """Each text from its first token on, in windows of `max_length` tokens that are each predicted once.

    The first window begins after `start_id`; a later one sees as much before it as fits (one token, unless it is the
    last): lm-eval's rolling windows. Raises ValueError for a text that makes no token.
    """
    rows: list[Encoded] = []
    owners: list[int] = []
    for index, text in enumerate(texts):
        windows = list(rolling_windows(model.tokenizer.encode(text), start_id(model), max_length))
        if not windows:
            raise ValueError(f"text {index} is empty: there is nothing to predict")
        rows += [_plain_row(Sample(f"text {index}", []), [window]) for window in windows]
        owners += [index] * len(windows)
    found = [Scored(0.0, 0, True)] * len(texts)
    for owner, row in zip(owners, _score(model, rows, batch_size, batch_tokens), strict=True):
        (part,), so_far = _per_branch(row, 1), found[owner]
        found[owner] = Scored(
            so_far.loglikelihood + part.loglikelihood, so_far.tokens + part.tokens, so_far.greedy and part.greedy
        )
    return found


def encode_pair(model: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, where the pair is one text."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [start_id(model)], model.tokenizer.encode(continuation)
    before = model.tokenizer.encode(context)
    return before, model.tokenizer.encode(context + continuation)[len(before) :]


def rolling_windows(ids: Sequence[int], start: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, predicted) pairs that predict every id once; context and predicted take `length + 1` ids at most."""
    if length < 1:
        raise ValueError(f"max_length={length}: a window has at least one token")
    whole = [start, *ids]
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        first = begin if begin == 0 else max(0, end - length)  # whole[i] predicts ids[i]
        yield whole[first : begin + 1], list(ids[begin:end])


def start_id(model: Any) -> int:
    """What stands before a text's first token: a published model's BOS or else EOS, or what closes a turn of ours."""
    origin = getattr(model, "origin", None)
    if origin is None:
        return model.tokenizer.special(model.template.end)
    named = json.loads(origin["files"].get("tokenizer_config.json", "{}"))
    for token in filter(None, (named.get("bos_token"), named.get("eos_token"))):
        return model.tokenizer.special(token if isinstance(token, str) else token["content"])
    for given in (origin["config"].get("bos_token_id"), origin["config"].get("eos_token_id")):
        if given is not None:
            return int(given[0] if isinstance(given, list) else given)
    raise ValueError("the model states neither a BOS nor an EOS token: nothing can stand before a text")


def text_of(sample: Sample) -> str:
    """The text of a sample that is one user turn of text. Raises ValueError for any other."""
    if len(sample.messages) != 1 or sample.media or not isinstance(sample.messages[0]["content"], str):
        raise ValueError(f"sample {sample.key}: without a chat template only one message of text can be given")
    return sample.messages[0]["content"]


def _plain_row(sample: Sample, pairs: Sequence[tuple[list[int], list[int]]]) -> Encoded:
    """What all pairs begin with once, and a branch for the rest of each; labels stand on continuations alone."""
    common = min(len(context) for context, _ in pairs)
    rows = [context + continuation for context, continuation in pairs]
    while any(row[:common] != rows[0][:common] for row in rows):
        common -= 1
    head = torch.tensor(rows[0][:common], dtype=torch.int64)
    empty = Encoded(sample, head, torch.full_like(head, IGNORE), torch.zeros_like(head), [], common)
    rests = [row[common:] for row in rows]
    return _with_branches(empty, rests, [len(context) - common for context, _ in pairs])


def _with_branches(prompt: Encoded, rests: Sequence[list[int]], unscored: Sequence[int] | None = None) -> Encoded:
    """The prompt with a branch for each list of ids, of which the first `unscored` are only read."""
    ids, labels, branches = [prompt.ids], [torch.full_like(prompt.labels, IGNORE)], [prompt.branch_ids]
    for number, rest in enumerate(rests, start=1):
        row = torch.tensor(rest, dtype=torch.int64)
        target = row.clone()
        target[: 0 if unscored is None else unscored[number - 1]] = IGNORE
        ids, labels = [*ids, row], [*labels, target]
        branches.append(torch.full_like(row, number))
    length = prompt.length + sum(map(len, rests))
    return replace(prompt, ids=torch.cat(ids), labels=torch.cat(labels), branch_ids=torch.cat(branches), length=length)


@dataclass
class _Row:
    """Of every predicted position of a row: its branch, log-probability, and whether it was the first choice."""

    branches: Tensor
    logs: Tensor
    first: Tensor


def _per_branch(row: _Row, count: int) -> list[Scored]:
    scored = []
    for number in range(1, count + 1):
        own = row.branches == number
        scored.append(Scored(float(row.logs[own].sum()), int(own.sum()), bool(row.first[own].all())))
    return scored


@torch.inference_mode()
def _score(model: Any, rows: Sequence[Encoded], batch_size: int, batch_tokens: int) -> list[_Row]:
    """In the order of `rows`; computed longest first, in batches of like length."""
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before evaluating")
    found: dict[int, _Row] = {}
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].length, index))
    while order:
        width = max(1, batch_tokens // rows[order[0]].length)
        batch, order = order[: min(batch_size, width)], order[min(batch_size, width) :]
        output = model(collate([[rows[index]] for index in batch]).to(model.device))
        sequence = output.sequence
        row, column = (sequence.labels != IGNORE).nonzero(as_tuple=True)
        states = output.hidden[row, sequence.predecessor[row, column]]
        labels = sequence.labels[row, column]
        logs, first = _log_probabilities(output.head, states, labels)
        if not bool(logs.isfinite().all()):
            bad = rows[batch[int(row[int((~logs.isfinite()).nonzero()[0])])]].sample.key
            raise ValueError(f"sample {bad}: the model's logits are NaN or infinite: damaged weights?")
        branches, row = sequence.branch_ids[row, column].cpu(), row.cpu()
        for place, index in enumerate(batch):
            own = row == place
            found[index] = _Row(branches[own], logs[own], first[own])
    return [found[index] for index in range(len(rows))]


def _log_probabilities(head: Any, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) float64 log-probabilities of the labels and (P,) bool first choices, on the CPU."""
    logs, first = [], []
    for start in range(0, len(labels), BLOCK):
        logits = head(states[start : start + BLOCK]).float()
        label = labels[start : start + BLOCK]
        logs.append(logits.log_softmax(-1).gather(-1, label[:, None])[:, 0].double().cpu())
        first.append((logits.argmax(-1) == label).cpu())
    return torch.cat(logs), torch.cat(first)
