"""Word error rate (jiwer's definition) and perplexity (lm-eval's)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jiwer


def wer(reference: str | list[str], hypothesis: str | list[str], normalise: bool = False) -> dict[str, float]:
    """Word and character error rates of a transcript, or of a corpus (lists of equal length, errors pooled).

    jiwer's default transforms: strip, collapse spaces, split; case and punctuation count. With `normalise`, Whisper's
    English normaliser goes first (LibriSpeech style). Returns wer, mer, wil, wip, cer and the counts hits,
    substitutions, deletions, insertions.

    Raises ValueError for lists of different lengths or a reference that is empty as a whole.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    hypotheses = [hypothesis] if isinstance(hypothesis, str) else list(hypothesis)
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references have {len(hypotheses)} hypotheses")
    if normalise:
        from whisper_normalizer.english import EnglishTextNormalizer  # slow to import, rarely used

        english = EnglishTextNormalizer()
        references, hypotheses = [english(t) for t in references], [english(t) for t in hypotheses]
    words = jiwer.process_words(references, hypotheses)
    return {
        "wer": words.wer,
        "mer": words.mer,
        "wil": words.wil,
        "wip": words.wip,
        "hits": words.hits,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "cer": jiwer.process_characters(references, hypotheses).cer,
    }


def perplexity(loglikelihoods: Sequence[float], texts: Sequence[str], tokens: Sequence[int]) -> dict[str, float]:
    """Perplexity of a corpus: exp(-sum of log-likelihoods / number of units of the ORIGINAL text).

    `loglikelihoods` in nats, one per text; `tokens` how many tokens each text made. Returns token_perplexity,
    word_perplexity (words split at white space, as lm-eval counts them), byte_perplexity and bits_per_byte (UTF-8).
    """
    if not len(loglikelihoods) == len(texts) == len(tokens):
        raise ValueError(f"{len(loglikelihoods)} log-likelihoods, {len(texts)} texts and {len(tokens)} token counts")
    words = [len(re.split(r"\s+", text)) for text in texts]
    in_bytes = [len(text.encode()) for text in texts]
    return {
        "token_perplexity": weighted_perplexity(loglikelihoods, tokens),
        "word_perplexity": weighted_perplexity(loglikelihoods, words),
        "byte_perplexity": weighted_perplexity(loglikelihoods, in_bytes),
        "bits_per_byte": bits_per_byte(loglikelihoods, in_bytes),
    }


def weighted_perplexity(loglikelihoods: Sequence[float], weights: Sequence[int]) -> float:
    """exp(-sum of log-likelihoods / sum of weights)."""
    if not sum(weights):
        raise ValueError("perplexity of no text: the weights sum to 0")
    return math.exp(-sum(loglikelihoods) / sum(weights))


def bits_per_byte(loglikelihoods: Sequence[float], in_bytes: Sequence[int]) -> float:
    """Bits that the model needs for a byte of the text."""
    if not sum(in_bytes):
        raise ValueError("bits per byte of no text: there are 0 bytes")
    return -sum(loglikelihoods) / sum(in_bytes) / math.log(2)
