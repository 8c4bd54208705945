"""An answer on the terminal as it is written: Markdown whose finished blocks stand, and whose last one is redrawn."""

from __future__ import annotations

import re
from types import TracebackType

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.segment import Segment, Segments
from rich.spinner import Spinner

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: a model must not steer the terminal
# Directions that letters do not have of themselves: text that reads otherwise than it is spelled.
OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]")
# HTML is text here, as everything that an answer may contain: rich would leave it out without a word.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def printable(text: str) -> str:
    """The text without control characters, which could move the cursor, recolour or retitle the terminal."""
    return OVERRIDES.sub("", CONTROL.sub("", text))


class LeftHeading(Heading):
    """A heading where the text below it begins; rich would centre it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class AnswerMarkdown(Markdown):
    elements = {**Markdown.elements, "heading_open": LeftHeading}


def markdown(text: str) -> Markdown:
    """How an answer is drawn: line ends kept, addresses of links shown, and nothing that can be clicked unseen."""
    drawn = AnswerMarkdown("", hyperlinks=False)
    drawn.parsed = PARSER.parse(text)
    for token in drawn.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return drawn


def blocks(text: str) -> list[str]:
    """Markdown cut into its blocks; all but the last are what they are, whatever text follows."""
    starts = [token.map[0] for token in PARSER.parse(text) if token.level == 0 and token.map]
    lines = text.split("\n")
    return ["\n".join(lines[a:b]) for a, b in zip([0, *starts[1:]], [*starts[1:], None], strict=True)]


def _trimmed(line: list[Segment]) -> list[Segment]:
    """A drawn line without the spaces at its end, which would be copied along, and wrap when the window narrows."""
    line = list(line)
    while line and not line[-1].text.strip() and not (line[-1].style and line[-1].style.bgcolor):
        line.pop()
    if line and not (line[-1].style and line[-1].style.bgcolor):
        line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
    return line


class AnswerView:
    """`with AnswerView(console) as view: view.push(piece)`. Until there is a piece it shows that the model reads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.text = ""  # what does not stand yet
        self.stands = False
        self.live = Live(
            Spinner("dots", "reading"), console=console, transient=True, refresh_per_second=12, redirect_stdout=False
        )

    def __enter__(self) -> AnswerView:
        self.live.start(refresh=True)
        return self

    def push(self, piece: str) -> None:
        self.text += printable(piece)
        *done, self.text = blocks(self.text)
        for block in done:
            self._stand(block)
        if self.text.strip():
            drawn = markdown(self.text)
            self.live.update(Group("", drawn) if self.stands else drawn)

    def _stand(self, text: str) -> None:
        if text.strip():
            if self.stands:
                self.console.print()
            lines = [_trimmed(line) for line in self.console.render_lines(markdown(text), pad=False)]
            while lines and not lines[0]:
                lines.pop(0)
            while lines and not lines[-1]:
                lines.pop()
            self.console.print(Segments([part for line in lines for part in (*line, Segment.line())]), end="")
            self.stands = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        for block in blocks(self.text):
            self._stand(block)
