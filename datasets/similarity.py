"""Fingerprints that tell alike samples: perceptual hashes of images, MinHashes and word n-grams of texts.

Images are alike when their 64-bit DCT hashes (ImageHash's phash) differ in few bits: resizing, re-encoding and slight
changes of colour keep most bits. Texts are alike when the sets of their runs of words have a large Jaccard index, which
MinHash estimates (Broder, 1997; datasketch).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import lru_cache

import numpy as np

from mm.datasets.decode import decode_image
from mm.types import Media, Sample

PERMUTATIONS = 128  # of a MinHash: the Jaccard index is estimated to about 1 / sqrt(128) = 0.09
SHINGLE = 5  # words
FLAT = 4.0  # grey levels of standard deviation below which an image has no structure to compare
# Chinese, Japanese and Korean put no spaces between words: each of their characters counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0 modulo 2^64


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and forms that only look different (NFKC)."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def content_hash(sample: Sample) -> bytes:
    """16 bytes, the same for samples with the same messages, branches and media; keys and file names do not count."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([sample.messages, sample.branches], sort_keys=True, ensure_ascii=False).encode())
    for item in sample.media:
        digest.update(item.kind.encode() + media_hash(item))
    return digest.digest()


def media_hash(item: Media) -> bytes:
    """16 bytes of a medium's own bytes."""
    data = item.data if isinstance(item.data, bytes) else item.data.read_bytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def image_hash(item: Media) -> int | None:
    """The 64-bit perceptual hash of an image; None for one that is flat (blank pages would all be alike).

    Raises MediaError as `decode_image` does, ValueError without the package ImageHash.
    """
    try:
        import imagehash
    except ImportError:
        raise ValueError("comparing images needs the package ImageHash: pip install 'mm[curate]'") from None
    from PIL import Image

    grey = Image.fromarray(decode_image(item).permute(1, 2, 0).numpy()).convert("L")
    if np.asarray(grey).std() < FLAT:
        return None
    bits = np.packbits(imagehash.phash(grey).hash.ravel())
    return int.from_bytes(bits.tobytes(), "big")


def text_signature(text: str) -> np.ndarray | None:
    """(PERMUTATIONS,) uint32 MinHash of a text's runs of SHINGLE words; None for a shorter text.

    Raises ValueError without the package datasketch.
    """
    try:
        from datasketch import MinHash
    except ImportError:
        raise ValueError("comparing texts needs the package datasketch: pip install 'mm[curate]'") from None
    hashes = ngram_hashes(words(text), SHINGLE)
    if not len(hashes):
        return None
    sketch = MinHash(PERMUTATIONS, seed=1, hashfunc=lambda value: int(value) >> 32)
    sketch.update_batch(np.unique(hashes))  # type: ignore[arg-type]
    return np.asarray(sketch.hashvalues, np.uint32)


def ngram_hashes(tokens: list[str], n: int) -> np.ndarray:
    """(max(0, len(tokens) - n + 1),) uint64: a hash of every run of n words, the same in every process."""
    if len(tokens) < n:
        return np.empty(0, np.uint64)
    values = np.array([_word_hash(token) for token in tokens], np.uint64)
    result = np.zeros(len(tokens) - n + 1, np.uint64)
    for offset in range(n):
        result = result * _PRIME + values[offset : offset + len(result)]
    return _mixed(result)


def distances(value: int, others: np.ndarray) -> np.ndarray:
    """Bits in which a hash differs from each of (N,) uint64 `others`."""
    return np.bitwise_count(others ^ np.uint64(value))


@lru_cache(maxsize=100_000)
def _word_hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "big")


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of a sum reaches every bit of the hash."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
