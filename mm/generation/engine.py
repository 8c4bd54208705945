"""The decoding loop: prompts are read once into a cache, then one token a step until every request has ended.

`B` rows (requests decoded together), `T` positions, `V` vocabulary. A request gets in a batch what it gets alone: rows
never see one another, and a row's random numbers come from its own seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from mm.generation.beams import beam_search
from mm.generation.contrastive import contrastive_search
from mm.generation.logprobs import TokenLogprob, likelihoods
from mm.generation.options import Decoding, Options
from mm.generation.requests import (
    GenerativeModel,
    Prompts,
    Request,
    Step,
    Steps,
    batches,
    check_at_least_one,
    check_model,
    encode_requests,
    pad_right,
    request_generator,
    stop_ids,
)
from mm.generation.rows import Rows
from mm.generation.sampling import INVALID
from mm.generation.speculative import speculate
from mm.generation.steered import SteeredRows
from mm.generation.stopping import Cutter, cut_before
from mm.tokenizers.text import StreamDecoder
from mm.types import Sample

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """An answer. `ids` are its tokens without the closing special; `text` ends before a stop string. `finish_reason` is
    "stop" when the model closed its turn or wrote a stop string, and "length" when `max_new_tokens` cut it;
    `prompt_length` counts decoder positions, media included; `logprobs`, if asked for, are of `ids`, one each; `score`
    is that of beam search (`mm.generation.beams.Hypothesis`), which counts the closing special too."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_length: int
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None


class Decoded(NamedTuple):
    """What the loop made of one prompt: ids, the one that stopped it included, with their likelihoods if asked for, and
    the score of the best beam."""

    ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None


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
    requests = encode_requests(model, samples, seed, max_new_tokens, max_length)
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
    """One answer as it is written: an iterator of text pieces, whole characters each.

    `ids` grows as tokens come, and so do their `logprobs` if asked for; `finish_reason` is None until the answer has
    ended. `close()` stops decoding at once and frees the cache; dropping the stream does the same.
    """

    def __init__(self, model: GenerativeModel, request: Request, decoding: Decoding, max_new_tokens: int) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if decoding.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.prompt_length = request.encoded.length
        self._pieces = self._read(model, request, decoding, max_new_tokens)

    def _read(
        self, model: GenerativeModel, request: Request, decoding: Decoding, max_new_tokens: int
    ) -> Generator[str, None, None]:
        decoder, cutter = StreamDecoder(model.tokenizer), Cutter(decoding.stop_strings)
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
            if piece := cutter.push(decoder.push(token)):
                yield piece
        if piece := cutter.push(decoder.flush()) + cutter.flush():
            yield piece
        self.finish_reason = "stop" if cutter.done else reason

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
    (request,) = encode_requests(model, [sample], seed, max_new_tokens, max_length)
    return Stream(model, request, decoding, max_new_tokens)


def generate_ids(
    model: GenerativeModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 32,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] | None = None,
    pad_id: int = 0,
    **options: Unpack[Options],
) -> Tensor:
    """Continues text given as ids (B, T) int64: the new ids alone, (B, <= max_new_tokens) int64 on the model's device.

    `attention_mask` (B, T) is 1 at real tokens; padding may stand on either side. A row ends with the first id that is
    in `stop` (default: the template's closing special; an empty collection never stops), and `pad_id` fills it up to
    the longest row. `seed` is a whole number, from which each row's own is made with its number, or each row's own.

    Raises ValueError as `generate` does, and for a row that has no token, naming it.
    """
    check_model(model)
    check_at_least_one(max_new_tokens=max_new_tokens)
    decoding = Decoding(**options)
    ids, mask = pad_right(input_ids, attention_mask)
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
        whole = model.tokenizer.decode(ids)
        text = cut_before(whole, decoding.stop_strings)
        reason: FinishReason = "stop" if closed or len(text) < len(whole) else "length"
        logprobs = None if logprobs is None else logprobs[: len(ids)]
        answers.append(Generation(text, ids, reason, request.encoded.length, logprobs, score))
    return answers


def decode(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> list[Decoded]:
    """Each prompt's answer, to the first id that is in `stops`."""
    asked = decoding.logprobs is not None
    if decoding.num_beams > 1:
        found = beam_search(model, prompts, decoding, stops, max_new_tokens)
        return [Decoded(best.ids, best.logprobs if asked else None, best.score) for best, *_ in found]
    collected: list[list[int]] = [[] for _ in prompts.names]
    logprobs: list[list[TokenLogprob]] = [[] for _ in prompts.names]
    for step in steps(model, prompts, decoding, stops, max_new_tokens):
        for place, row in enumerate(step.rows):
            collected[row].append(step.ids[place])
            if step.logprobs is not None:
                logprobs[row].append(step.logprobs[place])
    return [Decoded(ids, likely if asked else None) for ids, likely in zip(collected, logprobs, strict=True)]


def steps(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    """One yield a step. A row that got an id in `stops` is not in the next; the loop ends with the last row.

    Raises ValueError naming the row when its logits are no numbers.
    """
    if decoding.draft is not None:
        return _in_turn(speculate, model, prompts, decoding, stops, max_new_tokens)
    if decoding.steer is not None and decoding.steer.moves:
        return _steered(model, prompts, decoding, stops, max_new_tokens)
    method = _one_by_one if decoding.penalty_alpha is None else contrastive_search
    return method(model, prompts, decoding, stops, max_new_tokens)


def _in_turn(
    method: Callable[..., Steps],
    model: GenerativeModel,
    prompts: Prompts,
    decoding: Decoding,
    stops: Collection[int],
    max_new_tokens: int,
) -> Steps:
    """A method that knows one prompt at a time, for several."""
    for row, alone in enumerate(prompts.alone()):
        for step in method(model, alone, decoding, stops, max_new_tokens):
            yield step._replace(rows=[row])


@torch.inference_mode()
def _one_by_one(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    yield from _plainly(Rows(model, prompts, decoding, stops), max_new_tokens)


@torch.inference_mode(False)
@torch.no_grad()
def _steered(
    model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int], max_new_tokens: int
) -> Steps:
    yield from _plainly(SteeredRows(model, prompts, decoding, stops), max_new_tokens)


def _plainly(carried: Rows, max_new_tokens: int) -> Steps:
    """Greedy decoding and sampling: each token is chosen from the model's distribution, and that is that."""
    prompts, decoding = carried.prompts, carried.decoding
    logits = carried.read()
    rows = list(range(len(prompts.names)))
    for step in range(1, max_new_tokens + 1):
        chosen = decoding.choose(carried.mask(logits), [prompts.generators[row] for row in rows], carried.history)
        ids = chosen.tolist()  # the one wait for the device in a step
        if INVALID in ids:
            prompts.refuse(rows[ids.index(INVALID)], step)
        yield Step(rows, ids, None if decoding.logprobs is None else likelihoods(carried.own, ids, decoding.logprobs))
        going = carried.going(ids)
        if not going or step == max_new_tokens:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going, device=chosen.device)
            carried.keep(kept)
            chosen, rows = chosen[kept], [rows[place] for place in going]
        logits = carried.step(chosen)
