"""Looking something up for a question: an index, opened for the model that asks, and who decides whether to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mm.generation.requests import GenerativeModel
from mm.model import MultimodalModel
from mm.tools.answer import question
from mm.tools.dense import OTHER
from mm.tools.documents import cite, with_documents
from mm.tools.embeddings import TextEmbedder
from mm.tools.index import Hit, Index, embedding_of
from mm.tools.probe import ToolProbe
from mm.tools.router import Router
from mm.types import Sample

TOOL = "retrieval"


class Lookup:
    """The best `k` chunks for a chat's last question; with a probe, only where that calls for retrieval."""

    def __init__(self, index: Index, k: int = 3, probe: ToolProbe | None = None) -> None:
        if probe is not None and TOOL not in probe.tools:
            raise ValueError(f"this probe knows {', '.join(probe.tools)}, not {TOOL}: it cannot say when to look up")
        self.index, self.k = index, k
        self.router = None if probe is None else Router([TOOL], probe)

    @staticmethod
    def open(folder: str | Path, model: GenerativeModel, k: int = 3, probe: str | Path | None = None) -> Lookup:
        """Opens an index and, by its file, a probe. An index with vectors is searched by words and vectors, and must be
        of this model. Raises ValueError naming the folder or the file."""
        kind = embedding_of(Path(folder))
        embed = None
        if kind is not None:
            if not isinstance(model, MultimodalModel):
                raise ValueError(f"{folder}: has vectors, and this model makes none; index by words, without --model")
            if kind == "tower" and model.embedding_head is None:
                raise ValueError(f"{folder}: its vectors (tower) are of another model; {OTHER}")
            embed = TextEmbedder(model, "tower" if kind == "tower" else "mean")
        return Lookup(Index.load(folder, embed), k, None if probe is None else ToolProbe.load(probe, model))

    def __call__(self, model: GenerativeModel, sample: Sample) -> tuple[Sample, list[Hit]]:
        """The chat with the documents in it, and the hits that they are; as it was, where nothing is looked up."""
        if self.router is not None and self.router.by_prompt(model, sample).tool != TOOL:
            return sample, []
        hits = self.index.search(question(sample.messages), self.k)
        return replace(sample, messages=with_documents(sample.messages, hits)), hits

    @staticmethod
    def sources(answer: str, hits: Sequence[Hit]) -> str:
        """What is shown below an answer: the documents that it rests on."""
        return cite(answer, hits).footer
