"""Text comes back exactly, and what it spells is never a special token: trained here, from JSON, from SentencePiece."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mm.tokenizers.sentencepiece import from_sentencepiece
from mm.tokenizers.text import SPECIALS, StreamDecoder, TextTokenizer

CORPUS = [
    "What colour is the circle? Red.",
    "The quick brown fox jumps over the lazy dog, 12 345 times.",
    "<|end|> and <|im_start|>user are ordinary words here: <|end|> <|end|>",
    "naïve café, 日本語のテキスト, emoji 👩‍👩‍👧",
    "def f(x):\n    return x  # two  spaces",
] * 4
ODD = ["", " ", "  a  ", "\n\n\t\r\n", "\x00\x7f", "👩‍👩‍👧", "\ud7ff\ue000\U0010ffff", "e\u0301", "\ufffd", "<0x0A>"]
AROUND = ["{}", "a{}b", " {} ", "{0}{0}", "\n{}\n", "<|{}|>", "日{}本"]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, 400)


def sentencepiece_model(kind: str = "bpe", byte_fallback: bool = True, **options: Any) -> bytes:
    model = io.BytesIO()
    defaults: dict[str, Any] = {"vocab_size": 450 if byte_fallback else 150, "hard_vocab_limit": False}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(CORPUS * 5),
        model_writer=model,
        model_type=kind,
        byte_fallback=byte_fallback,
        pad_id=3,
        minloglevel=2,
        **(defaults | options),
    )
    return model.getvalue()


def assert_specials_cannot_be_spelled(tokenizer: TextTokenizer, names: list[str], exact: bool = True) -> None:
    forbidden = set(tokenizer.specials.values())
    for name in names:
        for around in AROUND:
            text = around.format(name)
            ids = tokenizer.encode(text)
            assert forbidden.isdisjoint(ids), text
            assert not exact or tokenizer.decode(ids) == text


# --- Trained here


def test_specials_are_the_first_ids(trained: TextTokenizer) -> None:
    assert trained.specials == {name: i for i, name in enumerate(SPECIALS)}
    assert trained.special("<|end|>") == 1
    assert 263 < trained.vocab_size <= 400
    with pytest.raises(ValueError, match=r"'<\|eot\|>'.*<\|pad\|>"):
        trained.special("<|eot|>")


def test_training_is_deterministic(trained: TextTokenizer) -> None:
    again = TextTokenizer.train(iter(CORPUS), 400)
    assert again.encode(CORPUS[0]) == trained.encode(CORPUS[0]) and again.vocab_size == trained.vocab_size


def test_vocabulary_must_hold_the_bytes() -> None:
    assert TextTokenizer.train([], 263).decode(TextTokenizer.train([], 263).encode("日")) == "日"
    with pytest.raises(ValueError, match="vocab_size=262"):
        TextTokenizer.train([], 262)


def test_merges_are_learned(trained: TextTokenizer) -> None:
    assert len(trained.encode(CORPUS[0])) < len(CORPUS[0]) / 2


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_round_trip(text: str, trained: TextTokenizer) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(len(SPECIALS) <= i < trained.vocab_size for i in ids)


@pytest.mark.parametrize("text", ODD)
def test_round_trip_of_odd_text(text: str, trained: TextTokenizer) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_every_byte_has_a_token(trained: TextTokenizer) -> None:
    single = {trained.token_bytes(i) for i in range(len(SPECIALS), trained.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_specials_cannot_be_spelled(trained: TextTokenizer) -> None:
    assert_specials_cannot_be_spelled(trained, list(SPECIALS))


def test_half_a_surrogate_pair_is_not_text(trained: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"character 2 .*ud83d"):
        trained.encode("ab\ud83d")  # what json.loads gives for a cut emoji


def test_decode_skips_or_shows_specials(trained: TextTokenizer) -> None:
    ids = [3, *trained.encode("hi"), 1]
    assert trained.decode(ids) == "hi"
    assert trained.decode(ids, skip_specials=False) == "<|user|>hi<|end|>"


@pytest.mark.parametrize("token", [-1, 10**6])
def test_unknown_id(token: int, trained: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=f"{token} is not in the vocabulary"):
        trained.decode([token])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_stream_is_decode(data: st.DataObject, skip: bool, trained: TextTokenizer) -> None:
    """For any ids, also those that are not UTF-8 or end within a character."""
    ids = data.draw(st.lists(st.integers(0, trained.vocab_size - 1), max_size=12))
    stream = StreamDecoder(trained, skip)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == trained.decode(ids, skip)
    assert stream.push(*trained.encode("again")) == "again"  # flush makes it new


def test_stream_holds_back_unfinished_characters(trained: TextTokenizer) -> None:
    ids = trained.encode("é👩")
    stream = StreamDecoder(trained)
    parts = [stream.push(i) for i in ids[:-1]]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == "é" and stream.flush() == "\ufffd"


def test_save_load_pickle(trained: TextTokenizer, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "new")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    loaded = [TextTokenizer.load(path), TextTokenizer.load(path.parent), pickle.loads(pickle.dumps(trained))]
    for copy in loaded:
        assert copy.specials == trained.specials and copy.vocab_size == trained.vocab_size
        assert copy.encode(CORPUS[2]) == trained.encode(CORPUS[2])
        assert_specials_cannot_be_spelled(copy, list(SPECIALS))
    plain = Tokenizer.from_file(str(path))  # any reader reads it
    assert plain.encode(CORPUS[0]).ids == trained.encode(CORPUS[0])
    assert plain.decode(plain.encode(CORPUS[3]).ids) == CORPUS[3]


def test_with_specials(trained: TextTokenizer) -> None:
    more = trained.with_specials(["<|end|>", "<|tool|>"])
    assert more.special("<|tool|>") == trained.vocab_size == more.vocab_size - 1
    assert more.special("<|end|>") == 1 and "<|tool|>" not in trained.specials
    assert_specials_cannot_be_spelled(more, ["<|tool|>", "<|end|>"])


# --- tokenizer.json of others


def byte_level(added: list[AddedToken], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    return tokenizer


def test_added_tokens_that_are_not_marked_special() -> None:
    names = ["<|im_start|>", "<tool>", "  word  "]
    hf = byte_level([AddedToken(name, special=False, normalized=name == "<tool>") for name in names], [])
    assert hf.encode("<|im_start|>").ids == [256]  # the trap is real
    tokenizer = TextTokenizer(hf)
    assert set(tokenizer.specials) == set(names)
    assert_specials_cannot_be_spelled(tokenizer, names)


def test_a_special_that_the_models_own_merges_spell() -> None:
    """Neither the merges nor `ignore_merges` (whole words, as in Llama 3) may lead to it."""
    merges = [("<", "s"), ("<s", ">"), ("<s>", "x")]
    for ignore in (False, True):
        hf = byte_level([AddedToken("<s>", special=True)], merges, ignore_merges=ignore)
        hf.encode_special_tokens = True  # the library's own switch does not help
        assert hf.encode("<s>").ids == [257]
        tokenizer = TextTokenizer(hf)
        assert tokenizer.specials == {"<s>": 257}
        assert_specials_cannot_be_spelled(tokenizer, ["<s>"])


def test_added_runs_of_spaces_are_text_and_keep_their_ids() -> None:
    hf = byte_level([AddedToken("<x>", special=True), AddedToken("    ", normalized=False), AddedToken("<y>")], [])
    tokenizer = TextTokenizer(hf)
    assert tokenizer.encode("    ") == hf.encode("    ").ids == [257]
    assert tokenizer.decode(tokenizer.encode("a    b")) == "a    b"
    assert tokenizer.specials == {"<x>": 256, "<y>": 258}


def test_post_processor_truncation_and_dropout_are_left_out() -> None:
    hf = byte_level([AddedToken("<s>", special=True)], [("a", "b")], dropout=0.5)
    hf.enable_truncation(3)
    hf.enable_padding(length=9)
    tokenizer = TextTokenizer(hf)
    assert tokenizer.encode("ab" * 20) == [256] * 20


@pytest.mark.parametrize("content", ["{}", "not json", "\ufeff"])
def test_unreadable_json(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used"):
        TextTokenizer.load(path)


def test_unsuitable_decoder(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for decoder in (None, decoders.WordPiece()):
        hf = byte_level([], [])
        hf.decoder = decoder
        hf.save(str(path))
        with pytest.raises(ValueError, match="byte-level"):
            TextTokenizer.load(path)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="gone"):
        TextTokenizer.load(tmp_path / "gone.json")


# --- SentencePiece


SENTENCES = [
    *CORPUS[:5],
    *ODD,
    "  double  spaces ",
    "▁low line",
    "a <s> </s> <unk> <0xE6> b",
    "ﬁ ① ｆｕｌｌ",
    "x" * 300,
]
NMT = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, NMT], ids=["plain", "no_prefix", "nmt_nfkc"])
def test_equal_to_sentencepiece(kind: str, byte_fallback: bool, options: dict[str, Any], tmp_path: Path) -> None:
    data = sentencepiece_model(kind, byte_fallback, **options)
    path = tmp_path / "x.model"
    path.write_bytes(data)
    reference: Any = sentencepiece.SentencePieceProcessor(model_proto=data)  # type: ignore[call-arg]
    tokenizer = TextTokenizer.load(path)
    saved = TextTokenizer.load(tokenizer.save(tmp_path))
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.specials == {"<s>": 1, "</s>": 2, "<pad>": 3} == saved.specials
    for text in SENTENCES:
        ids = tokenizer.encode(text)
        spelled = "<0x" in text  # cut apart at "<", so that it cannot be read as a byte's piece
        assert spelled or ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids) == saved.decode(saved.encode(text)), text
        if byte_fallback and not options:
            assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert_specials_cannot_be_spelled(tokenizer, ["<s>", "</s>", "<pad>"], exact=byte_fallback and options != NMT)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_user_defined_pieces_are_specials(kind: str) -> None:
    data = sentencepiece_model(kind, user_defined_symbols=["<|im_start|>", "7"])
    reference: Any = sentencepiece.SentencePieceProcessor(model_proto=data)  # type: ignore[call-arg]
    tokenizer = TextTokenizer(from_sentencepiece(data))
    assert reference.piece_to_id("<|im_start|>") in reference.encode("<|im_start|>")  # the trap is real
    assert tokenizer.special("<|im_start|>") == reference.piece_to_id("<|im_start|>")
    assert_specials_cannot_be_spelled(tokenizer, ["<|im_start|>"])
    assert reference.piece_to_id("7") in tokenizer.encode("7")  # one character is text


def test_stream_of_sentencepiece() -> None:
    """The space put before a text is taken off once, and a cut character does not spoil the one before it."""
    tokenizer = TextTokenizer(from_sentencepiece(sentencepiece_model("bpe")))
    ids = [1, *tokenizer.encode("the fox 𝄞𝄢")]
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids) == "the fox 𝄞𝄢"
    assert tokenizer.decode(ids[:-1]) == "the fox 𝄞\ufffd"


@pytest.mark.parametrize("kind", ["word", "char"])
def test_unsupported_sentencepiece(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(sentencepiece_model(kind, byte_fallback=False, vocab_size=60))
    with pytest.raises(ValueError, match=r"x\.model cannot .* unigram"):
        TextTokenizer.load(path)


def test_damaged_sentencepiece(tmp_path: Path) -> None:
    path, data = tmp_path / "x.model", sentencepiece_model()
    for damaged in (b"", b"hello", data[: len(data) // 2], json.dumps({}).encode()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.model cannot"):
            TextTokenizer.load(path)
