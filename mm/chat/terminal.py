"""The interactive chat: a line is a question, a media file, or a /command; the answer appears as it is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mm.chat.answer import AnswerView, printable
from mm.chat.paste import media_in
from mm.chat.session import ChatSession
from mm.types import Kind

HELP: dict[str, tuple[str, str]] = {
    "image": ("FILE", "show the model an image with the next question"),
    "audio": ("FILE", "let it hear a sound"),
    "video": ("FILE", "show it a video"),
    "system": ("[TEXT]", "set the system prompt; without TEXT, remove it"),
    "reset": ("", "forget the chat and its media"),
    "save": ("FILE", "write the chat to a JSON file"),
    "load": ("FILE", "go on with a saved chat"),
    "stats": ("", "tokens and seconds of the last answer"),
    "thoughts": ("", "what the model thought before its last answer"),
    "help": ("", "this list"),
    "quit": ("", "leave (Ctrl-D too)"),
}
KEYS = (
    "The path of a media file in a line attaches it. Enter sends; Alt-Enter, or a \\ at the end, begins another line. "
    "Tab completes, the up arrow brings back, Ctrl-C stops an answer and keeps the chat."
)


class Terminal:
    """Reads lines, answers them on `console`. `read(prompt)` gives a line or raises EOFError or KeyboardInterrupt."""

    def __init__(self, session: ChatSession, console: Console, read: Callable[[str], str] = input) -> None:
        self.session = session
        self.console = console
        self.read = read
        self.open = True

    def run(self, name: str) -> None:
        """Chats until /quit or end of input. `name` says in the greeting whom with."""
        kinds = ", ".join(("text", *self.session.model.media_specs()))
        self.note(f"{name} · reads {kinds} · /help lists the commands, Ctrl-D leaves")
        if self.session.rereads:
            self.note(f"(each turn reads the whole chat anew: {self.session.rereads})")
        while self.open:
            try:
                line = self._read_line()
            except KeyboardInterrupt:
                self.note("\n(Ctrl-D or /quit leaves)")
            except EOFError:
                self.console.print()
                return
            else:
                self.handle(line)

    def handle(self, line: str) -> None:
        """One line of the user. What is wrong with it is shown, and the chat goes on."""
        name, _, argument = line.removeprefix("/").partition(" ")
        is_command = line.startswith("/") and name in HELP
        text, files = (line, []) if is_command else media_in(line)
        try:
            for kind, path in files:
                self._attach(kind, path)
            if is_command:
                self._command(name, argument.strip())
            elif line.startswith("/") and not files:
                raise ValueError(f"/{name} is no command; /help lists them")
            elif text.strip():
                self._answer(text)
        except (ValueError, OSError) as error:
            self.console.print(f"error: {printable(' '.join(str(error).split()))}", style="red", markup=False)

    def note(self, text: str) -> None:
        self.console.print(printable(text), style="dim", markup=False, highlight=False)

    def _read_line(self) -> str:
        """A line; one that ends in a backslash goes on in the next."""
        line = self.read("you> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.read("...> ")
        return line

    def _answer(self, text: str) -> None:
        stopped = False
        with closing(self.session.ask(text)) as answer, AnswerView(self.console) as view:
            try:
                for piece in answer:
                    view.push(piece)
            except KeyboardInterrupt:
                stopped = True
        last = self.session.last
        for call, result in self.session.steps:
            self.note(f"({call.name} {' '.join(map(str, call.arguments.values()))} → {result.text})")
        if self.session.sources and not stopped:
            self.note(self.session.sources)
        if stopped:
            self.note("(stopped)")
        elif last is not None and last.finish_reason == "length":
            self.note(f"(cut after {last.tokens} tokens: --max-new-tokens)")
        self.console.print()

    def _attach(self, kind: Kind, path: str) -> None:
        positions = self.session.attach(kind, path)
        self.note(f"({kind} {path}: {positions} tokens, goes with the next question)")

    def _command(self, name: str, argument: str) -> None:
        match name:
            case "image" | "audio" | "video":
                self._attach(name, _file(name, argument))
            case "system":
                self.session.system = argument or None
                self.note("(system prompt set)" if argument else "(no system prompt)")
            case "reset":
                self.session.reset()
                self.note("(forgotten)")
            case "save":
                self.session.save(_file(name, argument))
                self.note(f"(saved {self.session.turns} turns to {argument})")
            case "load":
                self.session.load(_file(name, argument))
                self.note(f"(loaded {self.session.turns} turns from {argument})")
            case "stats":
                self.note(self._statistics())
            case "thoughts":
                last = self.session.last
                self.note((last.reasoning if last else None) or "(none)")
            case "help":
                self._help()
            case "quit":
                self.open = False

    def _help(self) -> None:
        table = Table.grid(padding=(0, 2))
        for command, (what, effect) in HELP.items():
            table.add_row(Text(f"/{command} {what}"), Text(effect, style="dim"))
        self.console.print(table)
        self.note(KEYS)

    def _statistics(self) -> str:
        last = self.session.last
        if last is None:
            return "(no answer yet)"
        known = f" ({last.kept} known from before)" if last.kept else ""
        ended = {"stop": "ended by the model", "length": "cut at the limit", None: "stopped"}[last.finish_reason]
        rate = (
            f", then {(last.tokens - 1) / (last.seconds - last.first_seconds):.1f} tokens/s" if last.tokens > 1 else ""
        )
        return (
            f"turn {self.session.turns}: prompt {last.prompt_length} positions{known}, answer {last.tokens} "
            f"token{'s' * (last.tokens != 1)} ({ended}); first text after {last.first_seconds:.2f} s{rate}"
        )


def _file(command: str, argument: str) -> str:
    if not argument:
        raise ValueError(f"/{command} needs the name of a file")
    return argument.strip("'\"")
