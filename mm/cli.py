"""The command line: `mm COMMAND ...`.

This file only finds the command and reports its errors. It imports nothing heavy, so that `mm --help` answers at once;
each command's own module is imported when it is called, and reads the rest of the line.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mm

# Of a torch thread that waits, before it sleeps. The 300,000 of OpenMP's library all but halt training on shared cores:
# beside one busy neighbour on two, the demo reads below 9 samples/s instead of 35 to 55 (benchmarks/RESULTS.md).
SPINS = "10000"
INTERRUPTED = 130  # what shells report after Ctrl-C: 128 + SIGINT


@dataclass(frozen=True)
class Command:
    """`target` is `module:function`; the function takes the arguments after the command's name. With `pass_name`, it
    takes the name too: one module serves several commands."""

    target: str
    summary: str
    pass_name: bool = False

    def load(self) -> Callable[[list[str]], int | None]:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


GROUPS: dict[str, dict[str, Command]] = {
    "Data": {
        "shard": Command("mm.shard:main", "turn a source of samples into checked WebDataset shards"),
        "doctor": Command("mm.doctor.cli:main", "check data, a config, checkpoints and the machine before training"),
        "tokenizer": Command("mm.datasets.vocabulary:main", "train a text tokenizer on shards or text files"),
        "index": Command("mm.tools.build:main", "index documents, for answers that name their sources"),
    },
    "Training": {
        "fit": Command("mm.training.command:main", "train a stage from a config: align, instruct", pass_name=True),
        "validate": Command("mm.validate:main", "score a stage or model: benchmarks with controls", pass_name=True),
        "test": Command("mm.training.command:main", "run a module's test loop", pass_name=True),
        "predict": Command("mm.training.command:main", "run a module's prediction loop", pass_name=True),
        "probe": Command("mm.tools.train_probe:main", "train what tells from a prompt which tool it needs"),
    },
    "A model at hand": {
        "chat": Command("mm.chat.cli:main", "talk with it about images, sounds and videos"),
        "serve": Command("mm.serve.cli:main", "serve it: an OpenAI API, and a page to talk with it"),
        "explain": Command("mm.explain.cli:main", "show how an answer came about: attention, experts, likely tokens"),
        "generate": Command("mm.generate:main", "answer a file of prompts; goes on where it was interrupted"),
        "info": Command("mm.info:main", "print parameters, FLOPs and cache bytes per token"),
        "upcycle": Command("mm.upcycle:main", "make a mixture of experts of a dense model"),
    },
    "Other formats": {
        "import": Command("mm.export:import_main", "make a model directory of a Hugging Face directory or a GGUF file"),
        "export": Command("mm.export:main", "write a model in another library's format"),
    },
    "Runs": {
        "compare": Command("mm.evaluation.compare:main", "test whether one run's scores are better than another's"),
        "report": Command("mm.report.page:main", "make a run's self-contained report.html"),
    },
}
COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


def usage() -> str:
    lines = ["usage: mm COMMAND [ARGUMENTS]", "", "Multimodal research from raw files to a model that chats.", ""]
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:<11}{command.summary}" for name, command in commands.items()]
        lines.append("")
    lines.append("`mm COMMAND --help` describes a command; `mm --version` prints the version.")
    lines.append("With --debug (or MM_DEBUG=1), an error also shows where it arose.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 2 the user's mistake (one line on stderr), 130 Ctrl-C."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read once, when a command imports torch
    args = list(sys.argv[1:] if argv is None else argv)
    args, debug = _take_debug(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] in ("-V", "--version", "version"):
        print(f"mm {mm.__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        return _fail("mm", f"unknown command {name!r}{_nearest(name)} `mm --help` lists the commands.")
    return _run(name, rest, debug)


def _run(name: str, rest: list[str], debug: bool) -> int:
    command = COMMANDS[name]
    try:
        return command.load()([name, *rest] if command.pass_name else rest) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)  # leave the line with ^C in it
        return INTERRUPTED
    except (ValueError, OSError) as error:  # MediaError and config errors are ValueErrors; any other exception is a bug
        if debug:
            traceback.print_exc()
        return _fail(f"mm {name}", str(error) or type(error).__name__)


def _fail(who: str, message: str) -> int:
    """One line on stderr, whatever the message's own line breaks."""
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean `mm {close[0]}`?" if close else "."


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """Removes `--debug` from the options (what follows `--` is not ours)."""
    end = args.index("--") if "--" in args else len(args)
    options = [arg for arg in args[:end] if arg != "--debug"]
    given = len(options) < end or os.environ.get("MM_DEBUG", "") not in ("", "0")
    return options + args[end:], given


if __name__ == "__main__":
    sys.exit(main())
