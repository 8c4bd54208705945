"""Text -> ids and back, exactly: byte-level BPE trained here, a Hugging Face `tokenizer.json`, or SentencePiece.

Two rules that the rest of the project leans on:

- What text spells is text. `encode` never gives the id of a special token, also where text contains its spelling;
  the chat template places specials by id.
- Nothing is lost. A byte-level vocabulary can write every byte, so decode(encode(text)) == text. (A loaded tokenizer
  that normalises gives the normalised text back; one without bytes writes unknown characters as its unknown token.)
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mm.tokenizers.sentencepiece import from_sentencepiece

SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>")

# What merges stay within: contractions, letters with one sign before them, up to three digits, signs, line ends,
# spaces. As in GPT-4's cl100k and Llama 3.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer:
    """Wraps a `tokenizers.Tokenizer`.

    vocab_size  one more than the largest id
    specials    spelling -> id of the tokens that mark structure: all added tokens, marked special or not, except plain
                white space and single characters not marked special (GPT-NeoX adds runs of spaces: those are text);
                SentencePiece's control and user-defined pieces are added tokens. The unknown token is not among
                them: a vocabulary without bytes writes text with it
    """

    has_text = True  # False where a checkpoint brought no tokenizer (mm.tokenizers.missing)

    def __init__(self, tokenizer: Tokenizer) -> None:
        state = json.loads(tokenizer.to_str())
        unknown = _unknown_token(state["model"])
        self._tokenizer = tokenizer
        vocabulary, added = state["model"]["vocab"], state["added_tokens"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # a list for unigram
        self.vocab_size: int = max([*ids, *(token["id"] for token in added)]) + 1
        self.specials: dict[str, int] = {
            token["content"]: token["id"]
            for token in added
            if (token["special"] or len(token["content"].strip()) > 1) and token["content"] != unknown
        }
        self._special_ids = frozenset(self.specials.values())
        self._pieces = _Pieces(tokenizer, state)
        self._encoder, self._renumbered = _text_only(state, self.specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Byte-level BPE with SPECIALS as ids 0.. and every byte in the vocabulary; deterministic.

        The vocabulary is smaller than `vocab_size` where the texts run out of pairs to merge.
        """
        smallest = len(SPECIALS) + 256
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size}: {len(SPECIALS)} specials and 256 bytes need {smallest}")
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(name, normalized=False, special=True) for name in SPECIALS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """A `tokenizer.json`, a directory with one (or with a `tokenizer.model`), or a SentencePiece `.model` file.

        Raises ValueError, naming the path, when there is none, or when it cannot be read or used.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
            if not found:
                raise ValueError(f"{path} has no tokenizer.json and no tokenizer.model")
            path = found[0]
        if not path.is_file():
            raise ValueError(f"{path}: there is no such tokenizer file")
        data = path.read_bytes()
        try:
            return cls(_from_json(data) if path.suffix == ".json" else from_sentencepiece(data))
        except ValueError as error:
            raise ValueError(f"{path} cannot be used as a tokenizer: {error}") from error

    def save(self, directory: str | Path) -> Path:
        """Writes `directory`/tokenizer.json, whole or not at all, and returns its path."""
        path = Path(directory) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".tokenizer.json.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write(self._tokenizer.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        return path

    def with_specials(self, names: Iterable[str]) -> TextTokenizer:
        """A copy that also knows these special tokens; new ones take the ids after the vocabulary."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        new = [name for name in names if name not in self.specials]
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in new])
        return TextTokenizer(tokenizer)

    def special(self, name: str) -> int:
        """The id of a special token. Raises ValueError naming it and the ones there are."""
        if name not in self.specials:
            known = ", ".join(sorted(self.specials, key=self.specials.__getitem__)[:20]) or "none"
            raise ValueError(f"the tokenizer has no special token {name!r}; it has {known}")
        return self.specials[name]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; never a special's. Raises ValueError for half a surrogate pair, which is not text."""
        ids: list[int] = self._encode(text).ids
        return [self._renumbered.get(i, i) for i in ids] if self._renumbered else ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the ids of `encode` stand: (first character, the one after the last) of each. Errors as `encode`."""
        return self._encode(text).offsets

    def _encode(self, text: str) -> Any:
        try:
            return self._encoder.encode(text, add_special_tokens=False)
        except TypeError as error:
            if (half := re.search("[\ud800-\udfff]", text)) is None:
                raise
            raise ValueError(f"character {half.start()} of the text is half a surrogate pair ({half[0]!r})") from error

    def decode(self, ids: Sequence[int], skip_specials: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        stream = StreamDecoder(self, skip_specials)
        return stream.push(*ids) + stream.flush()

    def vocabulary(self) -> dict[str, int]:
        """Every entry's spelling and id. Two tokenizers whose ids mean the same have equal ones."""
        return self._tokenizer.get_vocab()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a special's are its spelling."""
        return self._pieces[token]

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[Tokenizer]]:
        return TextTokenizer, (self._tokenizer,)


class StreamDecoder:
    """Ids to text as they come: each `push` gives the text that is complete, holding back a character's first bytes.

    What all pushes and the final `flush` give, joined, is what `decode` gives for all the ids. `continues`: as what
    follows other text, whose spaces are its own from the first on.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_specials: bool = True, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_specials else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._leading = 0 if continues else tokenizer._pieces.leading_spaces
        self._spaces = self._leading  # still to be taken off the start

    def push(self, *ids: int) -> str:
        data = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids if int(i) not in self._skipped)
        while data and self._spaces:
            data, self._spaces = (data[1:], self._spaces - 1) if data[:1] == b" " else (data, 0)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD where the ids ended within a character. Ready for another text afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._spaces = self._leading
        return rest


class _Pieces:
    """id -> bytes, read off the tokenizer's decoder, which is byte-level or SentencePiece's.

    Hugging Face's own decoders give strings: they cannot stop within a character, and ByteFallback turns a whole run of
    bytes into U+FFFD when only its last character is incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, state: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {token["id"]: token["content"].encode() for token in state["added_tokens"]}
        self._spellings: list[tuple[str, str]] = []  # (in the vocabulary, in text)
        self._byte_level = self._byte_fallback = False
        self.leading_spaces = 0  # that decoding takes off the start of a text, because encoding put them there
        for step in _decoder_steps(state["decoder"]):
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                    self._spellings.append((mark, " "))
                    self.leading_spaces = int(scheme != "never")
                case {"type": "Replace", "pattern": {"String": mark}, "content": written}:
                    self._spellings.append((mark, written))
                case {"type": "Strip", "content": " ", "start": count, "stop": 0}:
                    self.leading_spaces = count
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case _:
                    raise ValueError(f"its decoder {step} is neither byte-level nor SentencePiece's")
        if not self._byte_level and not self._spellings:
            raise ValueError("it has no decoder that is byte-level or SentencePiece's")

    def __getitem__(self, token: int) -> bytes:
        if token not in self._known:
            spelling = self._tokenizer.id_to_token(token) if token >= 0 else None
            if spelling is None:
                raise ValueError(f"token id {token} is not in the vocabulary")
            self._known[token] = self._read(spelling)
        return self._known[token]

    def _read(self, spelling: str) -> bytes:
        if self._byte_level:
            return bytes(_BYTE_OF[char] for char in spelling)
        if self._byte_fallback and re.fullmatch(_BYTE_PIECE, spelling):
            return bytes([int(spelling[3:5], 16)])
        for mark, written in self._spellings:
            spelling = spelling.replace(mark, written)
        return spelling.encode()


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte, inverted (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_PIECE = "<0x[0-9A-F]{2}>"
_BYTE_OF = _byte_alphabet()


def _text_only(state: dict[str, Any], specials: Collection[str]) -> tuple[Tokenizer, dict[int, int]]:
    """A tokenizer for text alone, and its ids that differ from the original's.

    It knows no special added tokens, and its model spells special and unknown tokens as no text can: spellings
    in a vocabulary never hold a plain space, which is always written as another character. (Turning specials off with
    `encode_special_tokens` is not enough: that leaves added tokens that are not marked special, is not saved, and does
    not stop a model whose own vocabulary holds the spelling.)
    """
    model, unknown = dict(state["model"]), _unknown_token(state["model"])
    hidden = {*specials, unknown}
    if model["type"] == "Unigram":
        model["vocab"] = [[f" {i}" if name in hidden else name, p] for i, (name, p) in enumerate(model["vocab"])]
    else:
        if unknown is not None:
            model["unk_token"] = f" {model['vocab'][unknown]}"
        model["vocab"] = {f" {i}" if name in hidden else name: i for name, i in model["vocab"].items()}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if hidden.isdisjoint([*pair, "".join(pair)])]
        model["dropout"] = None
    split = state["pre_tokenizer"]
    if model.get("byte_fallback"):  # cut "<0x0A>" where text spells it, or it would be read as the piece of byte 10
        bracket = {"Regex": f"<(?={_BYTE_PIECE[1:]})"}
        cut = {"type": "Split", "pattern": bracket, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [*([split] if split else []), cut]}
    kept = [token for token in state["added_tokens"] if token["content"] not in hidden]
    removed = {"post_processor": None, "truncation": None, "padding": None}
    text_only = state | removed | {"model": model, "pre_tokenizer": split, "added_tokens": kept}
    tokenizer = Tokenizer.from_str(json.dumps(text_only))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return tokenizer, {ids[token["content"]]: token["id"] for token in kept if ids[token["content"]] != token["id"]}


def _unknown_token(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _from_json(data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError("it is not JSON text") from error
    except Exception as error:  # the library raises bare Exception for whatever the file lacks
        raise ValueError(str(error)) from error
