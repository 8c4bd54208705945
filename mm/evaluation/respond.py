"""What a benchmark asks of a model, by what it asks for: generated text, likelihoods, or embeddings.

The one place where samples meet the model: everything before is files, everything after is arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from mm.datasets.packing import collate
from mm.datasets.processor import Processor
from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.likelihood import score_choices, score_documents, start_id, text_of
from mm.evaluation.records import Response
from mm.evaluation.shared_media import generate_shared
from mm.generation.engine import generate, generate_ids
from mm.generation.options import Options
from mm.generation.stopping import cut_before
from mm.types import Sample


class Respond(Protocol):
    """`respond`, or a stand-in: one response a sample, in order, whatever the batch size."""

    def __call__(
        self, model: Any, benchmark: Benchmark, samples: Sequence[Sample], batch_size: int
    ) -> Sequence[Response]: ...


def respond(model: Any, benchmark: Benchmark, samples: Sequence[Sample], batch_size: int) -> list[Response]:
    """Raises ValueError naming the sample or what the model lacks, and MediaError naming the file."""
    if not samples:
        return []
    match benchmark.ask:
        case "text":
            return _generate(model, benchmark, samples, batch_size)
        case "choices":
            return _choose(model, benchmark, samples, batch_size)
        case "document":
            return _documents(model, benchmark, samples, batch_size)
        case "embedding":
            return _embed(model, samples, batch_size)


def _generate(model: Any, benchmark: Benchmark, samples: Sequence[Sample], batch_size: int) -> list[Response]:
    if benchmark.plain:
        texts = continue_texts(
            model,
            samples,
            benchmark.max_new_tokens,
            temperature=benchmark.temperature,
            stop=benchmark.stop,
            batch_size=batch_size,
        )
        responses = [Response(text) for text in texts]
    elif benchmark.temperature:
        seeds = [seed_of(sample) for sample in samples]
        options: Options = {"temperature": benchmark.temperature, "stop_strings": benchmark.stop}
        given = generate(model, samples, benchmark.max_new_tokens, seeds, batch_size, **options)
        responses = [Response(answer.text) for answer in given]
    else:
        responses = generate_shared(model, samples, max_new_tokens=benchmark.max_new_tokens, batch_size=batch_size)
    return [_stopped(response, benchmark.stop) for response in responses]


def _stopped(response: Response, stop: Sequence[str]) -> Response:
    """The text before the first of the `stop` texts; the confidence was that of the whole."""
    text = cut_before(response.text, stop)
    return response if text == response.text else Response(text)


def continue_texts(
    model: Any,
    samples: Sequence[Sample],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> list[str]:
    """Each sample's text continued without a chat template, in batches of like length; sampled by `seed_of`.

    A row leaves its batch with the first of the `stop` texts, which is no longer in its text.
    """
    prompts = [torch.tensor(model.tokenizer.encode(text_of(sample)) or [start_id(model)]) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: (-len(prompts[index]), index))
    stops = model.template.stop_ids(model.tokenizer)
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([prompts[index] for index in batch], batch_first=True)
        mask = pad([torch.ones_like(prompts[index]) for index in batch], batch_first=True)
        seeds = [seed_of(samples[index]) for index in batch]
        options: Options = {"temperature": temperature, "stop_strings": stop}
        rows = generate_ids(model, ids, mask, max_new_tokens, seeds, stops, pad_id=-1, **options)
        for index, row in zip(batch, rows.tolist(), strict=True):
            whole = model.tokenizer.decode([token for token in row if token >= 0 and token not in stops])
            texts[index] = cut_before(whole, stop)
    return [texts[index] for index in range(len(samples))]


def seed_of(sample: Sample) -> int:
    """A request's own random numbers, whatever its batch and rank."""
    return int.from_bytes(hashlib.blake2b(sample.key.encode(), digest_size=7).digest(), "big")


def _choose(model: Any, benchmark: Benchmark, samples: Sequence[Sample], batch_size: int) -> list[Response]:
    choices: list[list[str]] = [sample.meta["choices"] for sample in samples]
    scored = score_choices(model, samples, choices, plain=benchmark.plain, batch_size=batch_size)
    responses = []
    for texts, found in zip(choices, scored, strict=True):
        logs = [choice.loglikelihood for choice in found]
        best = max(range(len(logs)), key=logs.__getitem__)
        confidence = torch.tensor(logs, dtype=torch.float64).softmax(-1)[best].item()
        counts = tuple(choice.tokens for choice in found)
        responses.append(Response(texts[best].strip(), tuple(logs), counts, confidence))
    return responses


def _documents(model: Any, benchmark: Benchmark, samples: Sequence[Sample], batch_size: int) -> list[Response]:
    texts = [sample.meta["text"] for sample in samples]
    length = int(getattr(benchmark, "max_length"))  # noqa: B009 - a document benchmark states its window
    scored = score_documents(model, texts, max_length=length, batch_size=batch_size)
    return [Response("", (found.loglikelihood,), (found.tokens,)) for found in scored]


@torch.inference_mode()
def _embed(model: Any, samples: Sequence[Sample], batch_size: int) -> list[Response]:
    """Vectors of each sample's one media item and of its captions, as contrastive alignment makes them."""
    head = model.embedding_head
    if head is None:
        raise ValueError("retrieval needs a model with an embedding head: set its embedding_dim, and train it to align")
    processor = Processor(model.tokenizer, model.template, model.media_specs(), max_length=None)
    end = model.tokenizer.special(model.template.end)
    responses = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        batch = collate([[processor.encode(sample)] for sample in chosen]).to(model.device)
        (kind,) = batch.media
        media = head.embed_media(model.encode_media(batch)[kind]).cpu().tolist()
        for sample, vector in zip(chosen, media, strict=True):
            rows = [torch.tensor([*model.tokenizer.encode(text), end]) for text in sample.meta["captions"]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            lengths = torch.tensor([len(row) for row in rows], device=model.device)
            mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
            texts = head.embed_text(model(input_ids=ids, attention_mask=mask).hidden, mask).cpu().tolist()
            responses.append(Response(vectors=(tuple(vector), *map(tuple, texts))))
    return responses
