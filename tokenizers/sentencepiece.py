"""SentencePiece `.model` files (unigram and BPE) as `tokenizers.Tokenizer`, with equal encodings.

The file is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto). The few fields needed
are read here, so that neither `sentencepiece` nor `protobuf` is a dependency.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

SPACE = "\u2581"  # "▁", which stands for a space in pieces

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `type` is SentencePiece.Type."""

    text: str
    score: float
    type: int

    @property
    def ordinary(self) -> bool:
        """Whether text makes it: a user-defined piece of one character or of spaces only is text too."""
        return self.type == _NORMAL or (self.type == _USER_DEFINED and len(self.text.replace(SPACE, "")) <= 1)


def from_sentencepiece(data: bytes) -> Tokenizer:
    """The tokenizer of a `.model` file's bytes; ids are unchanged.

    Control and user-defined pieces become added tokens. Raises ValueError when the bytes are no such file, or when the
    model is of a kind that `tokenizers` cannot express (word, char, whitespace as suffix).
    """
    try:
        model = list(_fields(data))
        pieces = [_piece(value) for number, value in model if number == 1]
        trainer = dict(_fields(_last(model, 2)))
        normalizer = dict(_fields(_last(model, 3)))
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError("it is not a SentencePiece model") from error
    if trainer.get(24, 0):
        raise ValueError("it writes spaces as suffixes (treat_whitespace_as_suffix), which is not supported")
    surface = _bytes(trainer[44]).decode() if 44 in trainer else " \u2047 "
    return from_pieces(
        pieces,
        trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        charsmap=_bytes(normalizer[2]) if normalizer.get(2) else b"",
        surface=surface,
    )


def from_pieces(
    pieces: list[Piece],
    kind: int | bytes,
    byte_fallback: bool,
    prefix: bool,
    squeeze: bool,
    charsmap: bytes = b"",
    surface: str = " \u2047 ",
) -> Tokenizer:
    """The tokenizer of a vocabulary and of how text is prepared for it.

    `kind` is TrainerSpec.ModelType; `prefix` puts a space before a text, `squeeze` makes one space of several,
    `charsmap` is the compiled normalisation, `surface` what the unknown piece is written as. Raises ValueError as
    `from_sentencepiece`.
    """
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN), None)
    if unknown is None:
        raise ValueError("it is not a SentencePiece model: it has no unknown piece")
    if kind == _UNIGRAM:
        tokenizer = Tokenizer(_unigram(pieces, unknown, byte_fallback))
    elif kind == BPE:
        tokenizer = Tokenizer(_bpe(pieces, unknown, byte_fallback))
    else:
        raise ValueError(f"it is a SentencePiece model of type {kind}; unigram (1) and BPE (2) are supported")
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if squeeze:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    # Not the Metaspace pre-tokenizer: it leaves out the prefix where a text starts with a space, and it splits at
    # spaces, which a piece may contain.
    steps += [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace(SPACE, " "), decoders.Replace(pieces[unknown].text, surface), decoders.ByteFallback()]
    undo += [decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefix or squeeze else [])]
    tokenizer.decoder = decoders.Sequence(undo)
    for piece in pieces:
        if piece.type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.text, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED and not piece.ordinary:
            tokenizer.add_tokens([AddedToken(piece.text, normalized=False)])
    return tokenizer


def _unigram(pieces: list[Piece], unknown: int, byte_fallback: bool) -> models.Unigram:
    vocab = [(f" {i}" if p.type == _UNUSED else p.text, p.score) for i, p in enumerate(pieces)]
    return models.Unigram(vocab, unk_id=unknown, byte_fallback=byte_fallback)


def _bpe(pieces: list[Piece], unknown: int, byte_fallback: bool) -> models.BPE:
    """SentencePiece merges the pair whose joint piece scores best: as a list, all splits of all pieces, best first."""
    ordinary = {piece.text for piece in pieces if piece.ordinary}
    merges: list[tuple[str, str]] = []
    for piece in sorted((p for p in pieces if p.ordinary), key=lambda p: -p.score):
        splits = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        merges += [(left, right) for left, right in splits if left in ordinary and right in ordinary]
    return models.BPE(
        vocab={piece.text: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token=pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _piece(data: int | bytes) -> Piece:
    fields = dict(_fields(_bytes(data)))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))
    kind = fields.get(3, _NORMAL)
    assert isinstance(kind, int)
    return Piece(_bytes(fields[1]).decode(), score, kind)


def _last(fields: list[tuple[int, int | bytes]], number: int) -> bytes:
    return [_bytes(value) for key, value in fields if key == number][-1]


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError(f"{value} is a number where bytes should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message: an int for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise IndexError("the message ends early")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
