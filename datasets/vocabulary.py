"""`mm tokenizer SOURCE... --out DIR`: a byte-level BPE vocabulary from the text of shards or of plain text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mm.arguments import Parser
from mm.datasets.manifest import MANIFEST
from mm.datasets.shard_reader import ShardDataset
from mm.tokenizers.text import TextTokenizer
from mm.types import Sample


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "mm tokenizer",
        "Train a byte-level BPE tokenizer on the messages of shards, or on text files.",
        examples=["mm tokenizer runs/demo/shards/easy-vqa-train notes.txt --out runs/tokenizer --vocab-size 4096"],
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="a folder of shards, or a UTF-8 text file"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="at most so many entries (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    tokenizer = TextTokenizer.train(texts(arguments.sources), arguments.vocab_size)
    tokenizer.save(arguments.out)
    print(f"{arguments.out / 'tokenizer.json'}: {tokenizer.vocab_size:,} entries")
    return 0


def texts(sources: Iterable[Path]) -> Iterator[str]:
    """Every text of every source, in order. Raises ValueError naming a source that is neither shards nor a file."""
    for source in sources:
        if (source / MANIFEST).is_file():
            for sample in ShardDataset(source):
                yield from texts_of(sample)
        elif source.is_file():
            with open(source, encoding="utf-8") as file:
                try:
                    yield from file
                except UnicodeDecodeError as error:
                    raise ValueError(f"{source}: not UTF-8 text: {error}") from error
        else:
            raise ValueError(f"{source}: neither a folder of shards (with a {MANIFEST}) nor a text file")


def texts_of(sample: Sample) -> Iterator[str]:
    """The text of every message and text part, branches included."""
    for message in (*sample.messages, *(message for branch in sample.branches for message in branch)):
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")
