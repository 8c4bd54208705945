"""Answers: of a list of chats in batches, of one chat as it is written, of ids. mm.generation.loop decodes them.

`B` rows (requests decoded together), `T` positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from mm.generation.logprobs import TokenLogprob
from mm.generation.loop import decode, steps
from mm.generation.options import Decoding, Options
from mm.generation.requests import (
    GenerativeModel,
    Prompts,
    Request,
    batches,
    check_at_least_one,
    check_context,
    check_model,
    encode_requests,
    pad_right,
    request_generator,
    stop_ids,
)
from mm.generation.speaker import Speaker
from mm.types import Sample

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """An answer. `ids` are its tokens without the closing special; `text` ends before a stop string. `finish_reason` is
    "stop" when the model closed its turn or wrote a stop string, and "length" when `max_new_tokens` cut it;
    `prompt_length` counts decoder positions, media included; `logprobs`, if asked for, are of `ids`, one each; `score`
    is that of beam search (`mm.generation.beams.Hypothesis`), which counts the closing special too; `reasoning` is what
    stood before `text` between the thinking tags, None where there were none. `ids` hold all of it."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_length: int
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None
    reasoning: str | None = None


def generate(
    model: GenerativeModel,
    samples: Iterable[Sample],
    max_new_tokens: int = 32,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    batch_tokens: int = 16_384,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Unpack[Options],
) -> list[Generation]:
    """Answers each sample's chat; results come in the order of `samples`, whatever order they are decoded in.

    Requests of like length decode together: at most `batch_size` of them, and at most `batch_tokens` positions (prompts
    padded to the longest, plus the answers). `seed` is a whole number, from which each request's own seed is made with
    its `Sample.key`, or a list of each request's own: so an answer depends neither on the batch nor on the order.
    `max_length` bounds prompt plus answer, in positions. `progress` is called with how many requests just finished.
    `options` are those of `Decoding`: how tokens are chosen.

    Raises ValueError naming the argument or the sample: nonsense options, an empty prompt, branches, a chat that ends
    with the assistant's turn (`mm.datasets.chat_template.without_answer` removes it), too long a context, a kind of
    media that the model does not take, a model in training mode, logits that are NaN. Raises MediaError naming the file
    for media that cannot be read.
    """
    check_model(model)
    check_at_least_one(
        max_new_tokens=max_new_tokens, batch_size=batch_size, batch_tokens=batch_tokens, max_length=max_length
    )
    decoding = Decoding(**options)
    if decoding.draft is not None:
        batch_size = 1  # each request has a draft of its own length
    requests = encode_requests(model, samples, seed, max_new_tokens, max_length, decoding.thinking)
    results: dict[int, Generation] = {}
    # A window of batches is encoded ahead and sorted: enough to find requests of like length, and never all the media.
    while window := list(itertools.islice(requests, 8 * batch_size)):
        for batch in batches(window, batch_size, batch_tokens, max_new_tokens):
            answers = _answer(model, batch, decoding, max_new_tokens)
            results |= {request.index: answer for request, answer in zip(batch, answers, strict=True)}
            if progress is not None:
                progress(len(batch))
    return [results[index] for index in range(len(results))]


class Stream(Iterator[str]):
    """One answer as it is written: an iterator of text pieces, whole characters each, without its `reasoning` so far.

    `ids` grows as tokens come, and so do their `logprobs` if asked for; `finish_reason` is None until the answer has
    ended. `close()` stops decoding at once and frees the cache; dropping the stream does the same.
    """

    def __init__(self, model: GenerativeModel, request: Request, decoding: Decoding, max_new_tokens: int) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if decoding.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.prompt_length = request.encoded.length
        self._speaker = Speaker(model, decoding, request.opening)
        self._pieces = self._read(model, request, decoding, max_new_tokens)

    def _read(
        self, model: GenerativeModel, request: Request, decoding: Decoding, max_new_tokens: int
    ) -> Generator[str, None, None]:
        stops = stop_ids(model)
        reason: FinishReason = "length"
        for step in steps(model, Prompts.of(model, [request]), decoding, stops, max_new_tokens):
            token = step.ids[0]
            if token in stops:
                reason = "stop"
                break
            self.ids.append(token)
            if self.logprobs is not None and step.logprobs is not None:
                self.logprobs.append(step.logprobs[0])
            if piece := self._speaker.push(token):
                yield piece
        if piece := self._speaker.flush():
            yield piece
        self.finish_reason = "stop" if self._speaker.stopped else reason

    @property
    def reasoning(self) -> str | None:
        return self._speaker.reasoning

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()


def stream(
    model: GenerativeModel,
    sample: Sample,
    max_new_tokens: int = 512,
    seed: int = 0,
    max_length: int | None = None,
    **options: Unpack[Options],
) -> Stream:
    """The answer to one chat, piece by piece: the pieces together are the text that `generate` gives.

    Options and errors as in `generate`. What is wrong with the request is raised by this call, before any piece is
    asked for; only NaN logits come later.
    """
    check_model(model)
    check_at_least_one(max_new_tokens=max_new_tokens, max_length=max_length)
    decoding = Decoding(**options)
    if decoding.num_beams > 1:
        raise ValueError("num_beams: which beam is best is known when all have ended; use generate, or num_beams=1")
    (request,) = encode_requests(model, [sample], seed, max_new_tokens, max_length, decoding.thinking)
    return Stream(model, request, decoding, max_new_tokens)


def generate_ids(
    model: GenerativeModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 32,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] | None = None,
    pad_id: int = 0,
    max_length: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Continues text given as ids (B, T) int64: the new ids alone, (B, <= max_new_tokens) int64 on the model's device.

    `attention_mask` (B, T) is 1 at real tokens; padding may stand on either side. A row ends with the first id that is
    in `stop` (default: the template's closing special; an empty collection never stops), and `pad_id` fills it up to
    the longest row. `seed` is a whole number, from which each row's own is made with its number, or each row's own.
    `max_length` bounds prompt plus answer.

    Raises ValueError as `generate` does, and for a row that has no token, naming it.
    """
    check_model(model)
    check_at_least_one(max_new_tokens=max_new_tokens, max_length=max_length)
    decoding = Decoding(**options)
    if decoding.thinking is not None:
        raise ValueError(f"thinking={decoding.thinking} is for chats; ids are continued as they are")
    ids, mask = pad_right(input_ids, attention_mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        check_context(f"row {row} of input_ids", length, max_new_tokens, max_length)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    rows = range(len(ids))
    prompts = Prompts(
        inputs,
        [row[real] for row, real in zip(ids, mask, strict=True)],
        [f"row {row} of input_ids" for row in rows],
        [request_generator(seed, row, key=str(row)) for row in rows],
    )
    stops = stop_ids(model) if stop is None else stop
    collected = decode(model, prompts, decoding, stops, max_new_tokens)
    answers = [torch.tensor(each.ids) for each in collected]
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad_id).to(model.device)


def _answer(
    model: GenerativeModel, requests: list[Request], decoding: Decoding, max_new_tokens: int
) -> list[Generation]:
    stops = stop_ids(model)
    answers: list[Generation] = []
    found = decode(model, Prompts.of(model, requests), decoding, stops, max_new_tokens)
    for request, (ids, logprobs, score) in zip(requests, found, strict=True):
        closed = ids[-1] in stops
        ids = ids[:-1] if closed else ids
        speaker = Speaker(model, decoding, request.opening)
        text = speaker.whole(ids)
        reason: FinishReason = "stop" if closed or speaker.stopped else "length"
        logprobs = None if logprobs is None else logprobs[: len(ids)]
        answers.append(Generation(text, ids, reason, request.encoded.length, logprobs, score, speaker.reasoning))
    return answers
