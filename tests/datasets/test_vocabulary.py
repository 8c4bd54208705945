"""`mm tokenizer`: a vocabulary from shards and from text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm import cli
from mm.datasets.shards import write_shards
from mm.datasets.vocabulary import main, texts, texts_of
from mm.testing import picture
from mm.tokenizers.text import TextTokenizer
from mm.types import Sample


def sample(key: str) -> Sample:
    parts: list[dict[str, Any]] = [{"type": "image", "media": 0}, {"type": "text", "text": "Look here."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    branches = [
        [{"role": "user", "content": f"zebra {i}?"}, {"role": "assistant", "content": "giraffe"}] for i in range(2)
    ]
    return Sample(key, messages, [picture(1)], branches)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards([sample("a"), sample("b")], tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("naïve café\nnaïve café\n" * 20, encoding="utf-8")
    return path


def test_every_text_of_a_sample_is_read_and_nothing_else() -> None:
    told = ["Be brief.", "Look here.", "zebra 0?", "giraffe", "zebra 1?", "giraffe"]
    assert list(texts_of(sample("a"))) == told


def test_sources_are_read_in_order(shards: Path, text: Path) -> None:
    read = list(texts([shards, text]))
    assert read[:12] == [*texts_of(sample("a")), *texts_of(sample("b"))]
    assert read[12:] == ["naïve café\n"] * 40


def test_shards_and_text_files_make_one_vocabulary(
    shards: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main([str(shards), str(text), "--out", str(out), "--vocab-size", "320"]) == 0
    tokenizer = TextTokenizer.load(out)
    assert capsys.readouterr().out == f"{out / 'tokenizer.json'}: {tokenizer.vocab_size:,} entries\n"
    assert 263 < tokenizer.vocab_size <= 320  # 256 bytes and seven specials, then merges
    for word in (" giraffe", " café"):
        assert len(tokenizer.encode(word)) < len(word.encode()), word  # merges were learned from both sources
    assert tokenizer.decode(tokenizer.encode("naïve zebra <|end|>")) == "naïve zebra <|end|>"


def test_the_same_sources_give_the_same_file(shards: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        main([str(shards), "--out", str(tmp_path / name), "--vocab-size", "300"])
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through `mm`, which reports them."""
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    for arguments, told in {
        (str(tmp_path / "absent"), *out): f"{tmp_path / 'absent'}: neither a folder of shards",
        (str(tmp_path / "empty"), *out): f"{tmp_path / 'empty'}: neither a folder of shards",
        (str(binary), *out): f"{binary}: not UTF-8 text",
    }.items():
        assert cli.main(["tokenizer", *arguments]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and told in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_too_small_for_bytes_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="100"):
        main([str(text), "--out", str(tmp_path / "out"), "--vocab-size", "100"])
