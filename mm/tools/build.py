"""`mm index SOURCE... --out DIR`: documents cut into chunks, and an index of them to search by words and vectors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mm.arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `mm index`. Raises ValueError or OSError."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if args.embed != "none" and args.model is None:
        args.embed = "none" if args.embed is None else _needs_model(args.embed)

    from mm.tools import chunks, index

    spans, embed, settings = chunks.words, None, dict[str, Any](counted="words")
    if args.model is not None:
        spans, embed, settings = _with_model(args)
    settings["sources"] = [str(source) for source in args.sources]
    documents = (document for path in args.sources for document in chunks.read_documents(path, args.key, args.by))
    show = (lambda done: print(f"\r{done:,} chunks", end="", file=sys.stderr)) if sys.stderr.isatty() else None
    made = index.build(documents, args.out, spans, args.chunk, args.overlap, embed, settings, show)
    vectors = "words" if made["vectors"] is None else f"words and vectors ({made['vectors']['kind']})"
    print(f"{args.out}: {made['chunks']:,} chunks of at most {args.chunk} {settings['counted']}, searched by {vectors}")
    return 0


def _needs_model(kind: str) -> NoReturn:
    raise ValueError(f"--embed {kind} needs --model")


def _with_model(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """What counts tokens, what makes vectors (None: nothing), and what the manifest says of it."""
    import torch

    import mm
    from mm.tools.embeddings import TextEmbedder

    model = mm.load(args.model)
    if not model.tokenizer.has_text:
        raise ValueError(f"--model {args.model}: it came without a tokenizer, so it cannot read text")
    settings = {"counted": "tokens", "model": str(args.model)}
    # Means of hidden states found little where they were measured (benchmarks/RESULTS.md): they must be asked for.
    kind = args.embed or ("none" if model.embedding_head is None else "tower")
    if kind == "none":
        return model.tokenizer.spans, None, settings
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.tokenizer.spans, TextEmbedder(model.to(device), kind), settings


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mm index",
        "Cut documents into chunks and build an index of them: by words (BM25) and, with --model, by vectors (FAISS). "
        "mm chat --index DIR answers from it.",
        usage="mm index SOURCE... --out DIR [options]",
        examples=[
            "mm index notes/ papers.jsonl --out runs/notes",
            "mm index notes/ --out runs/notes --model runs/demo/model",
        ],
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="a folder of shards, or .txt, .md and .jsonl files"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the index; a new one")
    parser.add_argument("--model", metavar="M", help="counts tokens and makes vectors: whatever mm chat opens")
    parser.add_argument(
        "--embed",
        choices=["tower", "mean", "none"],
        help="vectors by the model's alignment tower or by the mean of its last hidden states, or none (default: tower "
        "where it has one, else none)",
    )
    parser.add_argument(
        "--chunk", type=int, default=256, metavar="N", help="tokens of a chunk (default: 256; words without --model)"
    )
    parser.add_argument("--overlap", type=int, default=32, metavar="N", help="tokens two chunks share (default: 32)")
    parser.add_argument("--key", default="text", metavar="K", help="where JSONL has the text (default: text)")
    parser.add_argument("--by", choices=["file", "line"], default="file", help="what a document of .txt and .md is")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser.parse_args(argv)
