"""Typed lines: editing over several of them, completion of commands and files, and the questions of earlier chats."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console

FILES = ("image", "audio", "video", "load", "save")  # commands that take the name of a file


class CommandCompleter(Completer):
    """Tab: the names of commands, and files where a command takes one. `commands` maps a name to what it does."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self.commands = commands
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for command, effect in self.commands.items():
                if command.startswith(name):
                    yield Completion(command, start_position=-len(name), display=f"/{command}", display_meta=effect)
        elif name in FILES:
            yield from self.paths.get_completions(Document(argument, len(argument)), complete_event)


def keys() -> KeyBindings:
    """Enter sends, also with several lines in hand; Alt-Enter begins a new one. A pasted line end stays a line end."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def line_reader(console: Console, commands: Mapping[str, str]) -> Callable[[str], str]:
    """What asks for a line with a prompt; it raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
    session: PromptSession[str] = PromptSession(
        history=_history(console),
        completer=CommandCompleter(commands),
        complete_while_typing=False,
        key_bindings=keys(),
        multiline=True,
        prompt_continuation="...> ",
        reserve_space_for_menu=5,
    )
    return lambda prompt: session.prompt([("bold ansicyan", prompt)])


def _history(console: Console) -> History:
    """Kept in $XDG_STATE_HOME/mm/chat_history (~/.local/state by default), readable by the user alone."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "mm" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("a"):
            pass
    except OSError as error:
        console.print(f"the history is not kept: {error}", style="dim", markup=False)
        return InMemoryHistory()
    return FileHistory(str(file))
