"""What an evaluation's answers cost: static batches, questions that share a picture, and continuous batching.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_decoding.py MODEL [--questions 300] [--texts 120] [--rounds 2]

Two sets. easy-VQA's test questions (ten a picture, answers of two tokens or so) go to MODEL. Texts of unlike length,
half of them one of a few that are asked for ten times, whose answers are of geometric length (34 tokens on average, 256
at most), go to a random decoder of 4 layers and width 256. Printed are seconds of this process's CPU time, the smallest
of the rounds, which the ways take in turn, and whether all ways gave the same texts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import mm
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.evaluation.benchmarks.easy_vqa import EasyVQABenchmark
from mm.evaluation.shared_media import generate_shared
from mm.generation import generate
from mm.generation.batching import Engine
from mm.model import MultimodalModel
from mm.testing import tiny_tokenizer
from mm.types import Sample

WORDS = "what color is the shape red green or blue how many beeps two".split()
LONGEST = 256


def continuous(model: Any, samples: list[Sample], new: int, rows: int, **options: Any) -> list[str]:
    engine, waiting, texts = Engine(model, pages=None, max_rows=rows), deque[Any](), []
    for sample in samples:
        waiting.append(engine.submit(sample, new, **options))
        if len(waiting) > 2 * rows:
            texts.append(waiting.popleft().text())
    return [*texts, *(ticket.text() for ticket in waiting)]


def talker() -> MultimodalModel:
    """A random model that closes its turn about once in 34 tokens, when its tokens are drawn."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    attention, ffn = (lambda w: GroupedAttention(w, heads=8, kv_heads=4)), (lambda w: GatedFFN(w, hidden=3 * w))
    decoder = Decoder(256, {"full": attention}, {"dense": ffn}, [LayerGroup(["full/dense"], 4)], tokenizer.vocab_size)
    model = MultimodalModel(tokenizer, decoder).eval()
    bias, logits = torch.zeros(tokenizer.vocab_size), decoder.logits
    bias[list(model.template.stop_ids(tokenizer))] = 2.2
    decoder.logits = lambda hidden: 0.2 * logits(hidden) + bias  # pyright: ignore[reportAttributeAccessIssue]
    return model


def mixed(count: int) -> list[Sample]:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.choice([4, 10, 30, 80]))) for _ in range(count // 2)]
    again = [text for text in texts[: count // 20] for _ in range(10)]
    return [Sample(f"q{i}", [{"role": "user", "content": text}]) for i, text in enumerate([*texts, *again])]


def texts_of(answers: Iterable[Any]) -> list[str]:
    return [answer.text for answer in answers]


def compare(title: str, ways: dict[str, Callable[[int], list[str]]], rounds: int) -> None:
    for rows in (16, 64):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        said: list[list[str]] = []
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.process_time()
                said.append(way(rows))
                seconds[name].append(time.process_time() - start)
        spent = " | ".join(f"{name} {min(values):.2f} s" for name, values in seconds.items())
        print(f"{title}, {rows} rows | {spent} | same texts: {all(texts == said[0] for texts in said)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--texts", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeing, talking = mm.load(options.model), talker()
    benchmark = EasyVQABenchmark()
    asked, texts, new = benchmark.samples()[: options.questions], mixed(options.texts), benchmark.max_new_tokens
    vqa: dict[str, Callable[[int], list[str]]] = {
        "shared": lambda rows: texts_of(generate_shared(seeing, asked, max_new_tokens=new, batch_size=rows)),
        "static": lambda rows: texts_of(generate(seeing, asked, new, batch_size=rows)),
        "continuous": lambda rows: continuous(seeing, asked, new, rows),
    }
    talk: dict[str, Callable[[int], list[str]]] = {
        "static": lambda rows: texts_of(generate(talking, texts, LONGEST, batch_size=rows, temperature=1.0)),
        "continuous": lambda rows: continuous(talking, texts, LONGEST, rows, temperature=1.0),
    }
    compare(f"easy-VQA, {len(asked)} questions", vqa, options.rounds)
    compare(f"mixed lengths, {len(texts)} texts", talk, options.rounds)


if __name__ == "__main__":
    main()
