"""Greedy decoding, tokens a second: `model.generate` against transformers' on the same random weights, and the memory.

    OMP_NUM_THREADS=1 python benchmarks/decode.py --clock cpu      a shared machine: CPU seconds of one thread
    python benchmarks/decode.py [--models llama,moe] [--dtypes float32,bfloat16] [--batches 1,8]

A Llama of 47M parameters and a Qwen3-MoE of 97M (26 experts, 4 chosen), a prompt of 16 tokens and 32 new ones, the
prompt's time taken off. The limit of a step is the time in which its weights can be read once (a sum over 512 MiB, in
the same run); with 8 rows every expert counts that some row is expected to choose. Runs alternate; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import Bench, spread
from torch import Tensor

import mm

PROMPT, NEW = 16, 32
LARGE = {"llama_3b": (3072, 8192, 28, 24, 8), "llama_tiny": (64, 128, 2, 4, 2)}  # of benchmarks/gpu
RATIOS = {("llama", 1): (2.0, 2.5), ("moe", 1): (2.5, 3.5), ("llama", 8): (1.2, 2.5), ("moe", 8): (1.2, 2.5)}
SHARES = {  # of the dense model with one row
    "llama, torch.float32": (0.75, 0.9),
    "llama, torch.bfloat16": (0.55, 0.8),
    "llama_3b, torch.bfloat16": (0.65, 0.8),
}
COMMON: dict[str, Any] = {"vocab_size": 16384, "num_hidden_layers": 8, "tie_word_embeddings": True}


HEADS: dict[str, Any] = {"head_dim": 64}


def reference(name: str) -> Any:
    torch.manual_seed(0)
    if name in LARGE:
        width, hidden, layers, heads, groups = LARGE[name]
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=16384, num_hidden_layers=layers, tie_word_embeddings=True, hidden_size=width,
                intermediate_size=hidden, num_attention_heads=heads, num_key_value_heads=groups,
            )
        )  # fmt: skip
    if name == "llama":
        config = transformers.LlamaConfig(
            **COMMON, hidden_size=640, intermediate_size=1728, num_attention_heads=10, num_key_value_heads=5
        )
        return transformers.LlamaForCausalLM(config)
    config: Any = transformers.Qwen3MoeConfig(
        **COMMON, **HEADS, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_attention_heads=8,
        num_key_value_heads=4, num_experts=26, num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def bytes_per_step(model: Any, rows: int) -> float:
    """Of the weights that a step reads; of experts, as many as so many rows are expected to choose."""
    numbers, config = sum(p.numel() for p in model.parameters()), model.config
    if chosen := getattr(config, "num_experts_per_tok", 0):
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        idle = config.num_experts * (1 - chosen / config.num_experts) ** rows
        numbers -= config.num_hidden_layers * expert * idle
    return numbers * next(model.parameters()).element_size()


def per_token(generate: Callable[[int], Any], clock: Callable[[], float]) -> float:
    """Seconds of a step, without what the prompt takes."""
    start = clock()
    generate(1)
    first = clock()
    generate(NEW)
    return (clock() - first - (first - start)) / (NEW - 1)


def measure(bench: Bench, name: str, dtype: torch.dtype, rows: int, caches: list[str]) -> None:
    theirs = reference(name).to(bench.device, dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = mm.load(folder).eval().to(bench.device, dtype)
    ids = torch.randint(0, 16384, (rows, PROMPT), generator=torch.Generator().manual_seed(1)).to(bench.device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    if bench.device.type == "cuda":
        options["cache_implementation"] = "static"  # their fastest: a compiled step

    def by_transformers(count: int) -> Tensor:
        return theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)[:, PROMPT:]

    runs = {"transformers": by_transformers} | {
        f"mm, cache {cache}": lambda count, cache=cache: ours.generate(ids, max_new_tokens=count, stop=(), cache=cache)
        for cache in caches
    }
    memory, expected = torch.ones(2**27, device=bench.device), by_transformers(NEW)
    same = {run: float((generate(NEW) == expected).float().mean()) for run, generate in runs.items()}
    times: dict[str, list[float]] = {run: [] for run in runs}
    speeds: list[float] = []
    for _ in range(bench.args.repeats):
        for run, generate in runs.items():
            start = bench.clock()
            memory.sum()
            speeds.append(2**29 / (bench.clock() - start))
            times[run].append(per_token(generate, bench.clock))
    limit = statistics.median(speeds) / bytes_per_step(theirs, rows)  # steps a second
    base = statistics.median(times["transformers"])
    what = f"{name}, {str(dtype).removeprefix('torch.')}, {rows} row{'s' * (rows > 1)}"
    for run, taken in times.items():
        seconds = statistics.median(taken)
        common = {"what": what, "run": run, "rate": rows / seconds, "unit": "tokens/s", "noise": spread(taken)}
        share = {"limit": "the bandwidth", "share": 1 / seconds / limit, "judged": "share"}
        if run == "transformers":
            bench.add(**common, **share)
            continue
        judged = run == "mm, cache static"
        floor, goal = RATIOS.get((name, rows), (None, None)) if judged else (None, None)
        bench.add(**common, peer="transformers", ratio=base / seconds, judged="ratio", floor=floor, goal=goal)
        floor, goal = SHARES.get(f"{name}, {dtype}", (None, None)) if judged and rows == 1 else (None, None)
        bench.add(**common, **share, floor=floor, goal=goal)
        if same[run] < 1:
            bench.note(f"{what}, {run}: {same[run]:.0%} of its tokens are transformers' (random weights, rounding)")


def main() -> int:
    bench = Bench(__doc__, _arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    args = bench.args
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for count in map(int, args.batches.split(",")):
                with torch.inference_mode():
                    measure(bench, name, getattr(torch, dtype), count, args.caches.split(","))
    return bench.end()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="llama,moe")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--caches", default="dynamic,static")


if __name__ == "__main__":
    sys.exit(main())
