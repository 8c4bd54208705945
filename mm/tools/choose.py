"""Which tools a chat has, and who decides for a question which of them it needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.generation.requests import GenerativeModel
from mm.model import MultimodalModel
from mm.tools.calls import describe
from mm.tools.code import CodeTool
from mm.tools.dense import OTHER
from mm.tools.documents import cite, with_documents
from mm.tools.embeddings import TextEmbedder
from mm.tools.index import Hit, Index, embedding_of
from mm.tools.probe import ToolProbe
from mm.tools.router import NONE, Decision, Router
from mm.tools.toolbox import NAMES, Toolbox
from mm.types import Sample

Message = dict[str, Any]
RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class Plan:
    """A chat made ready for its answer: its messages, the tools described in them, the documents put into them, and
    what the probe decided (None without one)."""

    messages: list[Message]
    offered: tuple[str, ...] = ()
    hits: list[Hit] = field(default_factory=list)
    decision: Decision | None = None


class Tools:
    """With a probe, that decides for each question: documents before it, one tool, or none. Without, `offered` tools
    (default: all of the toolbox) are described to the model, which calls them; an index that is not among them gives
    its documents before every question.

    Raises ValueError for a probe that knows none of the tools, and an offered one that is not in the toolbox.
    """

    def __init__(
        self, toolbox: Toolbox, probe: ToolProbe | None = None, offered: Collection[str] | None = None
    ) -> None:
        if probe is not None and not set(probe.tools) & set(toolbox.names):
            raise ValueError(f"this probe knows {', '.join(probe.tools)}; there are {', '.join(toolbox.names)}")
        self.toolbox = toolbox
        self.offered = toolbox.names if offered is None else tuple(offered)
        if missing := set(self.offered) - set(toolbox.names):
            raise ValueError(f"no tool {min(missing)!r} here; there are {', '.join(toolbox.names)}")
        self.router = Router(toolbox.names, probe)

    @staticmethod
    def open(
        model: GenerativeModel,
        names: Collection[str] = (),
        index: str | Path | None = None,
        probe: str | Path | None = None,
    ) -> Tools:
        """Tools by name (of NAMES), an index and a probe by their files. An index with vectors is searched by words and
        vectors, and must be of this model. Raises ValueError naming what is wrong."""
        if unknown := set(names) - set(NAMES):
            raise ValueError(f"no tool {min(unknown)!r}; there are {', '.join(NAMES)}")
        if RETRIEVAL in names and index is None:
            raise ValueError(f"{RETRIEVAL} needs an index: mm index DOCUMENTS --out DIR makes one")
        opened = None if index is None else open_index(index, model)
        toolbox = Toolbox(opened, CodeTool() if "code" in names else None)
        return Tools(toolbox, None if probe is None else ToolProbe.load(probe, model), names)

    def plan(self, model: GenerativeModel, sample: Sample) -> Plan:
        """The chat with what its last question needs."""
        decision = None if self.router.probe is None else self.router.by_prompt(model, sample)
        if decision is None:
            offered, documents = self.offered, RETRIEVAL not in self.offered
        else:
            documents = decision.tool == RETRIEVAL
            offered = () if documents or decision.tool == NONE else (decision.tool,)
        messages = list(sample.messages)
        hits = self.toolbox.search(question(messages)) if documents else []
        if documents:
            messages = with_documents(messages, hits)
        if offered:
            messages = _with_system(messages, describe(self.toolbox.declarations(*offered)))
        return Plan(messages, offered, hits, decision)

    @staticmethod
    def sources(answer: str, hits: Sequence[Hit]) -> str:
        """What is shown below an answer: the documents that it rests on."""
        return cite(answer, hits).footer


def open_index(folder: str | Path, model: GenerativeModel) -> Index:
    kind = embedding_of(Path(folder))
    embed = None
    if kind is not None:
        if not isinstance(model, MultimodalModel):
            raise ValueError(f"{folder}: has vectors, and this model makes none; index by words, without --model")
        if kind == "tower" and model.embedding_head is None:
            raise ValueError(f"{folder}: its vectors (tower) are of another model; {OTHER}")
        embed = TextEmbedder(model, "tower" if kind == "tower" else "mean")
    return Index.load(folder, embed)


def question(messages: Sequence[Message]) -> str:
    """The text of the last message."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """The chat with a text at the end of its system prompt."""
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = messages[0]["content"]
    joined = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": f"\n\n{text}"}]
    return [{**messages[0], "content": joined}, *messages[1:]]
