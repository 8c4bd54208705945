"""Perplexity on WikiText-2 (Merity et al. 2017), article by article, as lm-eval measures it.

File: `wiki.test.raw` of wikitext-2-raw-v1 (or wikitext-103), or any text in its form: articles that begin with a line
` = Title = `. The model reads ordinary text (the corpus's separated punctuation is joined again); perplexity is per
word and per byte of the text as published.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.statistics import Mean, identity
from mm.types import Sample

TITLE = re.compile(r"^ = (?!=)[^\n]*[^=\n] = $", re.MULTILINE)
# What lm-eval's task does to an article, in its order: (pattern, replacement).
_JOINED: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    *((f" @{mark}@ ", joined) for mark, joined in (("-", "-"), (",", ","), (r"\.", "."))),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    *((" ".join("=" * count), "=" * count) for count in (4, 3, 2)),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


class WikitextBenchmark(Benchmark):
    """Token, word and byte perplexity and bits per byte (lower is better); a record's score is the geometric mean of
    its tokens' probabilities.

    Args:
        path: the file.
        max_length: tokens of a window; each token is predicted once, from what its window holds before it.
        detokenise: whether the corpus's separated punctuation is joined again; off for ordinary text.
    """

    name = "wikitext"
    ask = "document"
    plain = True
    guessable = False

    def __init__(self, path: Path, max_length: int = 2048, detokenise: bool = True) -> None:
        if max_length < 1:
            raise ValueError(f"wikitext: max_length must be 1 or more, got {max_length}")
        self.path = path
        self.max_length = max_length
        self.detokenise = detokenise

    def samples(self) -> list[Sample]:
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        samples = []
        for number, page in enumerate(articles(self.path.read_text(encoding="utf-8"))):
            title = page.strip().split("\n", 1)[0].strip(" =")
            text = detokenise(page) if self.detokenise else page
            meta = {"question": title, "category": "all", "answers": [title or "?"], "text": text, "page": page}
            samples.append(Sample(str(number), [{"role": "user", "content": text}], meta=meta))
        return samples

    def origin(self) -> str:
        return str(self.path)

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        marks = []
        for sample, response in zip(samples, responses, strict=True):
            (log,), (tokens,) = response.loglikelihoods, response.tokens
            page = sample.meta["page"]
            units = {"words": len(re.split(r"\s+", page)), "bytes": len(page.encode())}
            marks.append(Mark(math.exp(log / tokens), details={"loglikelihoods": [log], "tokens": [tokens], **units}))
        return marks

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        found = {}
        for unit in ("word", "byte", "token"):
            counted = [record.details[f"{unit}s"] for record in records]
            counts = [float(n[0] if unit == "token" else n) for n in counted]
            costs = [-r.details["loglikelihoods"][0] / n for r, n in zip(records, counts, strict=True)]
            found[f"{unit}_perplexity"] = Mean(costs, counts, math.exp)
            if unit == "byte":
                found["bits_per_byte"] = Mean([cost / math.log(2) for cost in costs], counts, identity)
        return found


def articles(text: str) -> list[str]:
    """The text cut before each line ` = Title = `; what stands before the first is an article if it is not blank."""
    starts = [0, *(match.start() for match in TITLE.finditer(text)), len(text)]
    pages = [text[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    return [page for page in pages if page.strip()]


def detokenise(page: str) -> str:
    for pattern, replacement in _JOINED:
        page = re.sub(pattern, replacement, page)
    return page
