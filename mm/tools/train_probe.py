"""`mm probe MODEL --data FILE --out FILE`: a probe that tells from a prompt's last hidden state which tool it needs.

A line of the data is what `mm generate` reads, with "tool": a name or "none", or "tools": a list of names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.arguments import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from mm.tools.probe import ToolProbe
    from mm.types import Sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `mm probe`. Raises ValueError or OSError."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if not 0 <= args.holdout < 1:
        raise ValueError(f"--holdout {args.holdout}: give a share from 0 to below 1")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: the name must end in .safetensors")
    samples, tools = read_labelled(args.data)
    names = sorted({name for named in tools for name in named})
    if not names:
        raise ValueError(f"{args.data}: no line names a tool, so there is nothing to learn")

    import torch

    import mm
    from mm.tools.probe import CHECK, ToolProbe, last_states

    model = mm.load(args.model).to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    states = last_states(model, samples)
    labels = torch.tensor([[name in named for name in names] for named in tools])
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(args.seed))
    held, seen = order[: round(args.holdout * len(order))], order[round(args.holdout * len(order)) :]
    for column, name in enumerate(names):
        if labels[seen, column].all() or not labels[seen, column].any():
            raise ValueError(f"{args.data}: {name!r} must be in some lines and not in others, held-out ones aside")
    probe = ToolProbe(states.shape[1], names, args.threshold)
    trained = probe.fit(states[seen], labels[seen], args.decay)
    (probe.check,) = last_states(model, [CHECK])
    about = {"model": str(args.model), "prompts": len(seen), "held_out": len(held), "loss": trained.loss}
    about |= {"seed": args.seed, "decay": args.decay, "scores": scores(probe, states[held], labels[held])}
    beside = probe.save(args.out, about)
    print(f"{args.out}, {beside.name}: {len(names)} tools, {len(seen)} prompts")
    for name, score in about["scores"].items():
        print(f"  {name:<12} {score:.3f} of {len(held)} held-out prompts right")
    return 0


def scores(probe: ToolProbe, states: Tensor, labels: Tensor) -> dict[str, float]:
    """Tool -> the share of prompts (N, D) that it is rightly called for or not; "all" of them at once. {} for none."""
    if not len(states):
        return {}
    right = (probe(states).sigmoid() >= probe.threshold) == labels
    return {
        **{name: float(right[:, column].float().mean()) for column, name in enumerate(probe.tools)},
        "all": float(right.all(1).float().mean()),
    }


def read_labelled(path: Path) -> tuple[list[Sample], list[set[str]]]:
    """The prompts of a file and the tools of each. Raises ValueError naming the file, the line and what is wrong."""
    from mm.generate import read_prompts

    if not path.is_file():
        raise ValueError(f"--data {path}: there is no such file")
    samples = list(read_prompts(path))
    tools = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            tools.append(_tools(json.loads(line), f"{path} line {number}"))
    if not samples:
        raise ValueError(f"{path}: no prompts")
    return samples, tools


def _tools(record: dict[str, Any], where: str) -> set[str]:
    if ("tool" in record) == ("tools" in record):
        raise ValueError(f'{where}: give either "tool", a name or "none", or "tools", a list of names')
    named = [record["tool"]] if "tool" in record else record["tools"]
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        raise ValueError(f"{where}: {named!r} is not the name of a tool, or a list of them")
    return {name for name in named if name != "none"}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mm probe",
        "Train a linear probe on a model's last hidden state that says which tools a prompt needs. The model stays as "
        "it is. Writes the weights and, beside them, a .json with its held-out accuracy.",
        usage="mm probe MODEL --data FILE --out FILE [options]",
        notes='A line of --data is {"prompt": "what is 12 * 34?", "tool": "calculator"}; "tool" may be "none", and '
        '"messages" may stand for "prompt", as in mm generate.',
        examples=["mm probe runs/demo/model --data labelled.jsonl --out runs/probe.safetensors"],
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a model, ours or a published one, or a GGUF file")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="labelled prompts, JSON lines")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the probe: a .safetensors file")
    parser.add_argument("--holdout", type=float, default=0.2, metavar="P", help="share kept to score (default: 0.2)")
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="P", help="probability that calls for a tool (default: 0.5)"
    )
    parser.add_argument("--decay", type=float, default=0.01, metavar="X", help="weight decay (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw of held-out prompts (default: 0)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser.parse_args(argv)
