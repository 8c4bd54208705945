"""From what a caller asks to what the decoding loop reads: checks, encoded prompts, seeds, batches of like length."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from mm.datasets.chat_template import ChatTemplate
from mm.datasets.packing import collate
from mm.datasets.processor import Encoded, Processor
from mm.generation.logprobs import TokenLogprob
from mm.tokenizers.text import TextTokenizer
from mm.types import IGNORE, MediaSpec, Sample


class Step(NamedTuple):
    """One step of a decoding loop: the rows still going, the id that each of them got and, if asked for, how likely."""

    rows: list[int]
    ids: list[int]
    logprobs: list[TokenLogprob] | None = None


Steps = Generator[Step, None, None]


class GenerativeModel(Protocol):
    """What decoding needs of a model (`mm.model.MultimodalModel` is one).

    Called with a `batch`, or with `input_ids` and `attention_mask` (B, T), and a new `cache`, it returns an object with
    `hidden` (B, T, D), `head` (D -> V) and `sequence.mask` (B, T), padded on the right. `step(ids (B,), cache)` returns
    the logits (B, V) that follow `ids`, `advance(ids (B, T), cache)` the hidden states (B, T, D) of more ids and
    `logits` those of hidden states. `cache.keep(rows)` drops all other rows; one may be named twice.
    """

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def template(self) -> ChatTemplate: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def training(self) -> bool: ...
    def media_specs(self) -> dict[Any, MediaSpec]: ...
    def new_cache(self) -> Any: ...
    def step(self, ids: Tensor, cache: Any) -> Tensor: ...
    def advance(self, ids: Tensor, cache: Any) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass
class Request:
    """A prompt to be continued: its place in the caller's list, its tokens and media, its own random numbers."""

    index: int
    name: str
    encoded: Encoded
    generator: torch.Generator

    @property
    def opening(self) -> Tensor:
        """The ids (n,) with which the template opened the answer's turn."""
        return self.encoded.ids[len(self.encoded.ids) - self.encoded.opened :]


@dataclass
class Prompts:
    """Rows to be continued together: what the model is called with, each row's ids (T,) int64 (media slots below 0),
    what error messages call it, and its own random numbers. `openings` are the ids with which the template opened each
    answer's turn; by default a row's ids, which came without a template."""

    inputs: dict[str, Any]
    ids: list[Tensor]
    names: list[str]
    generators: list[torch.Generator]
    openings: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.openings = self.openings or self.ids

    @staticmethod
    def of(model: GenerativeModel, requests: Sequence[Request]) -> Prompts:
        batch = collate([[request.encoded] for request in requests]).to(model.device)
        return Prompts(
            {"batch": batch},
            [request.encoded.ids for request in requests],
            [request.name for request in requests],
            [request.generator for request in requests],
            [request.opening for request in requests],
        )

    def alone(self) -> Iterator[Prompts]:
        """Each row by itself."""
        if len(self.names) == 1:
            yield self
            return
        for row, ids in enumerate(self.ids):
            if "batch" in self.inputs:
                raise ValueError("prompts of a batch do not come apart; make each of its own request")
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids, dtype=torch.bool)[None]}
            yield Prompts(inputs, [ids], [self.names[row]], [self.generators[row]])

    def refuse(self, row: int, step: int) -> NoReturn:
        """Raises the ValueError for logits that are no numbers."""
        raise ValueError(
            f"{self.names[row]}: the logits for token {step} of the answer are NaN or infinite; "
            "the model's weights are damaged, or overflow in this precision"
        )


def read(model: GenerativeModel, prompts: Prompts, cache: Any) -> Tensor:
    """Reads the prompts into a new cache -> logits (R, V) float32 after each row's last position."""
    output = model(**prompts.inputs, cache=cache)
    last = output.sequence.mask.sum(dim=1) - 1
    # The head is applied to one position a row: logits of a whole prompt would be by far the largest tensor.
    return output.head(output.hidden[torch.arange(len(last), device=last.device), last]).float()


def check_model(model: GenerativeModel) -> None:
    """Raises ValueError for a model in training mode: its dropout would make answers random without saying so."""
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before generating")


def same_tokenizer(argument: str, other: GenerativeModel, model: GenerativeModel) -> None:
    """Raises ValueError for a second model that cannot work with the first: in training mode, or with other ids."""
    check_model(other)
    if other.tokenizer.vocabulary() != model.tokenizer.vocabulary():
        raise ValueError(
            f"{argument}: its tokenizer is another than the model's, so its ids mean other text; give one of the same "
            "family"
        )


def check_at_least_one(**arguments: int | None) -> None:
    """Raises ValueError naming the first argument that is given and below 1."""
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give a whole number from 1 up")


def stop_ids(model: GenerativeModel) -> frozenset[int]:
    """The ids that close the assistant's turn."""
    return model.template.stop_ids(model.tokenizer)


def encode_requests(
    model: GenerativeModel,
    samples: Iterable[Sample],
    seed: int | Sequence[int],
    max_new_tokens: int,
    max_length: int | None,
    thinking: bool | None = None,
) -> Iterator[Request]:
    """Encodes the samples one by one, as they are asked for: media of a long list are never all in memory. `thinking`
    is that of `ChatTemplate.render`.

    Raises ValueError naming the sample: no content, branches, the assistant's turn last, a kind of media that the model
    does not take, too long a context; MediaError naming the file.
    """
    # No length limit: a prompt is never shortened behind the caller's back. Too long is an error instead.
    processor = Processor(model.tokenizer, model.template, model.media_specs(), max_length=None)
    for index, sample in enumerate(samples):
        if not any(_says_something(message.get("content")) for message in sample.messages):
            raise ValueError(f"sample {sample.key}: the prompt is empty; give it a message with text or media")
        encoded = processor.encode(sample, generation_prompt=True, thinking=thinking)
        check_context(f"sample {sample.key}", encoded.length, max_new_tokens, max_length)
        yield Request(index, f"sample {sample.key}", encoded, request_generator(seed, index, sample.key))


def _says_something(content: Any) -> bool:
    """Whether a message has any text or media."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return bool(content)
    return any(part.get("type") != "text" or part.get("text") for part in content if isinstance(part, dict))


def ids_request(
    model: GenerativeModel, ids: Sequence[int], seed: int, max_new_tokens: int, max_length: int | None
) -> Request:
    """A request that continues text given as ids. Raises ValueError for none, for what is no id of the model's text,
    and for too long a context."""
    size = model.tokenizer.vocab_size
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise ValueError(f"input_ids: {wrong[0]} is no id of this model's text; they go from 0 to {size - 1}")
    if not ids:
        raise ValueError("input_ids is empty; a prompt needs at least one token")
    check_context("input_ids", len(ids), max_new_tokens, max_length)
    tensor = torch.tensor(ids, dtype=torch.int64)
    labels = torch.full_like(tensor, IGNORE)
    encoded = Encoded(Sample("input_ids", []), tensor, labels, torch.zeros_like(tensor), [], len(ids))
    return Request(0, "input_ids", encoded, request_generator(seed, 0, "input_ids"))


class ContextTooLong(ValueError):
    """A prompt and its answer do not fit."""


def check_context(name: str, length: int, max_new_tokens: int, max_length: int | None) -> None:
    """Raises ContextTooLong, beginning with `name`, for a prompt that leaves no room for its answer in the context."""
    if max_length is not None and length + max_new_tokens > max_length:
        raise ContextTooLong(
            f"{name}: a prompt of {length} positions and max_new_tokens={max_new_tokens} exceed the context of "
            f"{max_length}; shorten the chat, its media or the answer"
        )


def request_generator(seed: int | Sequence[int], index: int, key: str) -> torch.Generator:
    """The random numbers of one request: from a common seed and the request's key, or from its own, `seed[index]`."""
    if isinstance(seed, int):
        # Mixed with the key: with one seed for all, every request would draw the same numbers, and a batch would be
        # lucky or unlucky together. Python's own hash() differs from run to run.
        own = int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest())
    elif index < len(seed):
        own = seed[index]
    else:
        raise ValueError(f"seed: {len(seed)} numbers given, but request {index} (from 0) needs one too")
    return torch.Generator().manual_seed(own)


def batches(
    requests: list[Request], batch_size: int, batch_tokens: int, max_new_tokens: int
) -> Iterator[list[Request]]:
    """Requests by length, longest first, cut so that rows x (longest prompt + answer) stays within `batch_tokens`.

    A request larger than the budget goes alone. Longest first, so that running out of memory happens at the start.
    """
    batch: list[Request] = []
    for request in sorted(requests, key=lambda request: (-request.encoded.length, request.index)):
        width = (batch[0] if batch else request).encoded.length + max_new_tokens
        if batch and (len(batch) == batch_size or (len(batch) + 1) * width > batch_tokens):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def pad_right(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Moves the real tokens of each row (B, T) to its left: (B, T') int64 ids, 0 at padding, and (B, T') bool mask.

    Raises ValueError for shapes that do not fit and, naming it, for a row without a real token.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (rows, tokens)")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
    rows = [ids[real] for ids, real in zip(input_ids, mask, strict=True)]
    if not rows:
        raise ValueError("input_ids has no rows")
    for index, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"row {index} of input_ids is empty; a prompt needs at least one token")
    lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=input_ids.device) < lengths[:, None]
