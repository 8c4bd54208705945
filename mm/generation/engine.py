"""The decoding loop: prompts are read once into a cache, then one token a step until every request has ended.

`B` rows (requests decoded together), `T` positions, `V` vocabulary. A request gets in a batch what it gets alone: rows
never see one another, and a row's random numbers come from its own seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mm.datasets.packing import collate
from mm.generation.requests import (
    GenerativeModel,
    Request,
    batches,
    check_at_least_one,
    check_model,
    encode_requests,
    pad_right,
    request_generator,
    stop_ids,
)
from mm.generation.sampling import INVALID, Sampler
from mm.tokenizers.text import StreamDecoder
from mm.types import Sample

FinishReason = Literal["stop", "length"]
Steps = Generator[tuple[list[int], list[int]], None, None]  # (rows still going, the id that each of them got)


@dataclass(frozen=True)
class Generation:
    """An answer. `ids` are its tokens without the closing special; `finish_reason` is "stop" when the model closed its
    turn and "length" when `max_new_tokens` cut it; `prompt_length` counts decoder positions, media included."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_length: int


def generate(
    model: GenerativeModel,
    samples: Iterable[Sample],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    batch_tokens: int = 16_384,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Answers each sample's chat; results come in the order of `samples`, whatever order they are decoded in.

    Requests of like length decode together: at most `batch_size` of them, and at most `batch_tokens` positions (prompts
    padded to the longest, plus the answers). `seed` is a whole number, from which each request's own seed is made with
    its `Sample.key`, or a list of each request's own: so an answer depends neither on the batch nor on the order.
    `max_length` bounds prompt plus answer, in positions. `progress` is called with how many requests just finished.

    Raises ValueError naming the argument or the sample: nonsense options, an empty prompt, branches, a chat that ends
    with the assistant's turn (`mm.datasets.chat_template.without_answer` removes it), too long a context, a kind of
    media that the model does not take, a model in training mode, logits that are NaN. Raises MediaError naming the file
    for media that cannot be read.
    """
    check_model(model)
    check_at_least_one(
        max_new_tokens=max_new_tokens, batch_size=batch_size, batch_tokens=batch_tokens, max_length=max_length
    )
    sampler = Sampler(temperature, top_k, top_p, min_p)
    requests = encode_requests(model, samples, seed, max_new_tokens, max_length)
    results: dict[int, Generation] = {}
    # A window of batches is encoded ahead and sorted: enough to find requests of like length, and never all the media.
    while window := list(itertools.islice(requests, 8 * batch_size)):
        for batch in batches(window, batch_size, batch_tokens, max_new_tokens):
            answers = _answer(model, batch, sampler, max_new_tokens)
            results |= {request.index: answer for request, answer in zip(batch, answers, strict=True)}
            if progress is not None:
                progress(len(batch))
    return [results[index] for index in range(len(results))]


class Stream(Iterator[str]):
    """One answer as it is written: an iterator of text pieces, whole characters each.

    `ids` grows as tokens come; `finish_reason` is None until the answer has ended. `close()` stops decoding at once and
    frees the cache; dropping the stream does the same.
    """

    def __init__(self, model: GenerativeModel, request: Request, sampler: Sampler, max_new_tokens: int) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_length = request.encoded.length
        self._pieces = self._read(model, request, sampler, max_new_tokens)

    def _read(
        self, model: GenerativeModel, request: Request, sampler: Sampler, max_new_tokens: int
    ) -> Generator[str, None, None]:
        decoder = StreamDecoder(model.tokenizer)
        stops = stop_ids(model)
        reason: FinishReason = "length"
        for _, (token,) in _decode_requests(model, [request], sampler, max_new_tokens):
            if token in stops:
                reason = "stop"
                break
            self.ids.append(token)
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece
        self.finish_reason = reason

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()


def stream(
    model: GenerativeModel,
    sample: Sample,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    max_length: int | None = None,
) -> Stream:
    """The answer to one chat, piece by piece: the pieces together are the text that `generate` gives.

    Options and errors as in `generate`. What is wrong with the request is raised by this call, before any piece is
    asked for; only NaN logits come later.
    """
    check_model(model)
    check_at_least_one(max_new_tokens=max_new_tokens, max_length=max_length)
    sampler = Sampler(temperature, top_k, top_p, min_p)
    (request,) = encode_requests(model, [sample], seed, max_new_tokens, max_length)
    return Stream(model, request, sampler, max_new_tokens)


def generate_ids(
    model: GenerativeModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] | None = None,
    pad_id: int = 0,
) -> Tensor:
    """Continues text given as ids (B, T) int64: the new ids alone, (B, <= max_new_tokens) int64 on the model's device.

    `attention_mask` (B, T) is 1 at real tokens; padding may stand on either side. A row ends with the first id that is
    in `stop` (default: the template's closing special; an empty collection never stops), and `pad_id` fills it up to
    the longest row. `seed` is a whole number, from which each row's own is made with its number, or each row's own.

    Raises ValueError as `generate` does, and for a row that has no token, naming it.
    """
    check_model(model)
    check_at_least_one(max_new_tokens=max_new_tokens)
    sampler = Sampler(temperature, top_k, top_p, min_p)
    ids, mask = pad_right(input_ids, attention_mask)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    names = [f"row {row} of input_ids" for row in range(len(ids))]
    generators = [request_generator(seed, row, key=str(row)) for row in range(len(ids))]
    stops = stop_ids(model) if stop is None else stop
    collected: list[list[int]] = [[] for _ in names]
    for rows, chosen in _decode(model, inputs, names, sampler, generators, stops, max_new_tokens):
        for row, token in zip(rows, chosen, strict=True):
            collected[row].append(token)
    answers = [torch.tensor(row) for row in collected]
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad_id).to(model.device)


def _answer(model: GenerativeModel, requests: list[Request], sampler: Sampler, max_new_tokens: int) -> list[Generation]:
    stops = stop_ids(model)
    collected: list[list[int]] = [[] for _ in requests]
    for rows, chosen in _decode_requests(model, requests, sampler, max_new_tokens):
        for row, token in zip(rows, chosen, strict=True):
            collected[row].append(token)
    answers: list[Generation] = []
    for request, ids in zip(requests, collected, strict=True):
        reason: FinishReason = "stop" if ids[-1] in stops else "length"
        ids = ids[:-1] if reason == "stop" else ids
        answers.append(Generation(model.tokenizer.decode(ids), ids, reason, request.encoded.length))
    return answers


def _decode_requests(model: GenerativeModel, requests: list[Request], sampler: Sampler, max_new_tokens: int) -> Steps:
    batch = collate([[request.encoded] for request in requests]).to(model.device)
    names = [request.name for request in requests]
    generators = [request.generator for request in requests]
    return _decode(model, {"batch": batch}, names, sampler, generators, stop_ids(model), max_new_tokens)


@torch.inference_mode()
def _decode(
    model: GenerativeModel,
    inputs: dict[str, Any],
    names: list[str],
    sampler: Sampler,
    generators: list[torch.Generator],
    stops: Collection[int],
    max_new_tokens: int,
) -> Steps:
    """One yield a step. A row that got an id in `stops` is not in the next; the loop ends with the last row.

    `inputs` are what the model is called with; `names` and `generators` are the rows'. Raises ValueError naming the row
    when its logits are no numbers.
    """
    cache = model.new_cache()
    output = model(**inputs, cache=cache)
    last = output.sequence.mask.sum(dim=1) - 1
    # The head is applied to one position a row: logits of a whole prompt would be by far the largest tensor.
    logits = output.head(output.hidden[torch.arange(len(last), device=last.device), last]).float()
    del output
    rows = list(range(len(names)))
    for step in range(1, max_new_tokens + 1):
        chosen = sampler.choose(logits, [generators[row] for row in rows])
        ids = chosen.tolist()  # the one wait for the device in a step
        if INVALID in ids:
            raise ValueError(
                f"{names[rows[ids.index(INVALID)]]}: the logits for token {step} of the answer are NaN or infinite; "
                "the model's weights are damaged, or overflow in this precision"
            )
        yield rows, ids
        going = [place for place, token in enumerate(ids) if token not in stops]
        if not going or step == max_new_tokens:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going, device=chosen.device)
            cache.keep(kept)
            chosen, rows = chosen[kept], [rows[place] for place in going]
        logits = model.step(chosen, cache).float()
