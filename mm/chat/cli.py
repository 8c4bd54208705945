"""`mm chat`: talk with a model in the terminal, or ask it one question and get the answer alone on standard output.

Only argument parsing happens before the first heavy import, so that `--help` and mistakes answer at once. Errors that a
user can cause are raised as ValueError or OSError; `mm.cli` prints them as one line and exits with 2.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.arguments import Parser

if TYPE_CHECKING:
    from mm.chat.session import ChatSession

DEFAULT_MODEL = "runs/demo/model"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `mm chat`; returns 0. Raises ValueError, MediaError or OSError."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    if args.text is None and not sys.stdin.isatty():
        args.text = sys.stdin.read().strip()
        if not args.text:
            raise ValueError("standard input is empty; give the question as TEXT, or pipe it")
    gc.disable()  # what imports and a model make stays: looking through it for garbage is a tenth of the time to start
    try:
        session = _open(args)
    finally:
        gc.freeze()  # nor is it looked through later: at the end of the process that took as long again
        gc.enable()
    for kind, path in args.media:
        session.attach(kind, path)
    if args.text is None:
        return _interactive(session, args.model)
    return _one_shot(session, args.text)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mm chat",
        usage="mm chat [MODEL] [--image F] [--audio F] [--video F] [options] [TEXT]",
        description="Talk with a model about images, sounds and videos. With TEXT, or with text piped in, it answers "
        "once and prints the answer alone; otherwise it chats.",
        examples=[
            "mm chat runs/demo/model",
            "mm chat runs/demo/model --image shape.png 'what color is the shape?'",
            "echo 'what color is it?' | mm chat runs/demo/model --image shape.png > answer.txt",
        ],
        notes="In a chat, /help lists its commands; the path of a media file in a line attaches it.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="MODEL TEXT", help=f"model directory (default: {DEFAULT_MODEL}), then the question"
    )
    for kind, what in (("image", "an image"), ("audio", "a sound"), ("video", "a video")):
        text = f"{what} that the question is about; may be repeated"
        pair = lambda path, kind=kind: (kind, path)  # noqa: E731 - one list, in the order of the command line
        parser.add_argument(f"--{kind}", action="append", type=pair, dest="media", metavar="F", default=[], help=text)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--index", metavar="DIR", help="answer from the documents of this index (mm index)")
    parser.add_argument(
        "--tools", metavar="NAMES", default="", help="what the model may call: calculator, retrieval, code (sandboxed)"
    )
    parser.add_argument("--probe", metavar="F", help="use a tool only where this probe says so (mm probe)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="largest context, prompt and answer together (default: no limit)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default), above draws"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the first"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (default: 0)")
    parser.add_argument(
        "--thinking", choices=("on", "off"), help="reason before answering, or answer at once, where the model has both"
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    args = parser.parse_intermixed_args(argv)
    args.model, args.text = _model_and_text(args.words)
    args.tools = [name.strip() for name in args.tools.split(",") if name.strip()]
    if args.probe is not None and args.index is None and not args.tools:
        raise ValueError("--probe says when a tool is needed; give --index DIR or --tools NAMES too")
    return args


def _model_and_text(words: list[str]) -> tuple[str, str | None]:
    """The one or two words of the command line: the model comes first, and either may be missing."""
    if len(words) > 2:
        raise ValueError(f"{len(words)} arguments where MODEL and TEXT were expected; put the question in quotes")
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return DEFAULT_MODEL, None
    (word,) = words
    # A question has spaces; a single word with a slash is meant as a directory even if it is not there.
    is_model = Path(word).is_dir() or (os.sep in word and not any(character.isspace() for character in word))
    return (word, None) if is_model else (DEFAULT_MODEL, word)


def _open(args: argparse.Namespace) -> ChatSession:
    if not Path(args.model).exists():
        how = "train it with `make demo`" if args.model == DEFAULT_MODEL else "give the directory of a trained model"
        raise ValueError(f"no model at {args.model}: {how}, as in mm chat MODEL")

    import torch

    import mm
    from mm.chat.session import ChatSession, Settings

    options = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "max_length")
    thinking = None if args.thinking is None else args.thinking == "on"
    settings = Settings(**{name: getattr(args, name) for name in options}, thinking=thinking)
    model = mm.load(args.model)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # how torch says that there is no such device
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    session = ChatSession(model, settings, args.system)
    if args.index is not None or args.tools:
        from mm.tools.choose import Tools

        session.tools = Tools.open(model, args.tools, args.index, args.probe)
    return session


def _one_shot(session: ChatSession, text: str) -> int:
    show: Callable[[str], str] = str  # a pipe gets the text as it is
    if sys.stdout.isatty():
        from mm.chat.answer import printable as show
    try:
        for piece in session.ask(text):
            print(show(piece), end="", flush=True)
        print(flush=True)
        if session.sources:
            print(f"\n{show(session.sources)}", flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `mm chat ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _interactive(session: ChatSession, name: str) -> int:
    from rich.console import Console

    from mm.chat.reader import line_reader
    from mm.chat.terminal import HELP, Terminal

    console = Console()
    commands = {command: effect for command, (_, effect) in HELP.items()}
    Terminal(session, console, line_reader(console, commands)).run(name)
    return 0
