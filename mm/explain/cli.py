"""`mm explain MODEL [--image F] [--audio F] [--video F] TEXT --out FILE`: an answer's page.

Only argument parsing happens before the first heavy import, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, whole or not at all, and says where; returns 0. Raises ValueError, MediaError or OSError."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if not Path(args.model).exists():
        raise ValueError(f"no model at {args.model}: give the directory of a trained model")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")

    import torch

    import mm
    from mm.explain.collect import explain
    from mm.explain.page import render
    from mm.types import Media, Sample

    media = [Media(kind, Path(path).expanduser().absolute(), path) for kind, path in args.media]
    parts: list[dict[str, Any]] = [{"type": item.kind, "media": number} for number, item in enumerate(media)]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": args.text}]}
    system = [{"role": "system", "content": args.system}] if args.system else []
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = explain(
        mm.load(args.model).to(device),
        Sample("question", [*system, question], media),
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        answer=args.answer,
        top=args.top,
        temperature=args.temperature,
    )
    draft = args.out.with_name(f".{args.out.name}.tmp")
    draft.write_text(render(found, args.model), encoding="utf-8")
    os.replace(draft, args.out)
    print(f"{args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mm explain",
        usage="mm explain MODEL [--image F] [--audio F] [--video F] [options] TEXT",
        description="Ask a model one question and write a page that shows how its answer came about: where each layer "
        "looked, which experts each token used, and what else was likely at every step.",
        examples=[
            "mm explain runs/demo/model --image shape.png 'what color is the shape?' --out explain.html",
            "mm explain runs/demo/model --image shape.png 'what color is the shape?' --answer blue",
        ],
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a model, ours or a published one")
    parser.add_argument("text", metavar="TEXT", help="the question")
    for kind, what in (("image", "an image"), ("audio", "a sound"), ("video", "a video")):
        text = f"{what} that the question is about; may be repeated"
        pair = lambda path, kind=kind: (kind, path)  # noqa: E731 - one list, in the order of the command line
        parser.add_argument(f"--{kind}", action="append", type=pair, dest="media", metavar="F", default=[], help=text)
    out = Path("explain.html")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"page to write (default: {out})")
    parser.add_argument("--answer", metavar="TEXT", help="explain this answer instead of the model's own")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="likeliest tokens to name (default: 8)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (default: 0)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser.parse_intermixed_args(argv)
