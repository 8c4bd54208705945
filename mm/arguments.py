"""The arguments of every command: one look of `--help`, and mistakes in one line."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

WIDEST = 100  # columns: longer lines are hard to read, however wide the terminal is


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are a ValueError of one line that names the help, and whose help ends with `notes`, text
    whose line ends stay and whose lines are wrapped, and `examples`, command lines that are not: they are copied."""

    def __init__(
        self, command: str, description: str, examples: Sequence[str] = (), notes: str = "", **options: Any
    ) -> None:
        shown = ["example:" if len(examples) == 1 else "examples:", *(f"  {line}" for line in examples)]
        epilog = "\n\n".join(part for part in (notes, "\n".join(shown) if examples else "") if part)
        super().__init__(prog=command, description=description, epilog=epilog, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDEST + 2) - 2
        super().__init__(prog, max_help_position=32, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help and action.help.replace("(%(default)s)", "(default: %(default)s)")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        shown = next((n for n, line in enumerate(lines) if line in ("example:", "examples:")), len(lines))
        return "\n".join([*(_wrap(line, width, indent) for line in lines[:shown]), *lines[shown:]])

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _wrap(line: str, width: int, indent: str) -> str:
    """A line goes on below its own first word, or two columns further in; a table's row below its second column."""
    start = len(line) - len(line.lstrip())
    column = line.find("  ", start)
    hang = len(line) - len(line[column:].lstrip()) if column > 0 else start + 2 if start else 0
    options = {"initial_indent": indent, "subsequent_indent": indent + " " * hang, "break_on_hyphens": False}
    return textwrap.fill(line, width, drop_whitespace=True, replace_whitespace=False, **options) if line else ""
