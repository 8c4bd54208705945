"""The tokenizer that a GGUF file carries in its metadata, as a `tokenizers.Tokenizer` with equal encodings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mm.tokenizers.sentencepiece import BPE, Piece, from_pieces

_CONTROL, _USER_DEFINED = 3, 4  # llama_token_type, as in SentencePiece

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What merges stay within, by `tokenizer.ggml.pre`; None: GPT-2's own pattern.
_WORDS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
}


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE ("gpt2") or SentencePiece BPE ("llama"); ids are unchanged.

    Raises ValueError naming the metadata key that is missing, or that has an unsupported value.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(metadata)
    if kind == "gpt2":
        return _byte_level(metadata)
    raise ValueError(f"tokenizer.ggml.model = {kind!r} is not supported; only gpt2 and llama")


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _WORDS:
        raise ValueError(f"tokenizer.ggml.pre = {pre!r} is not supported; only {', '.join(_WORDS)}")
    tokens, merges = _need(metadata, "tokens"), _need(metadata, "merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, even where the merges would not make it.
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    words = _WORDS[pre]
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False):
        if type_ == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    columns = (_need(metadata, name) for name in ("tokens", "scores", "token_type"))
    return from_pieces(
        [Piece(text, score, type_) for text, score, type_ in zip(*columns, strict=True)],
        BPE,
        byte_fallback=True,
        prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        squeeze=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )


def _need(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise ValueError(f"tokenizer.ggml.{name} is missing")
    return value
