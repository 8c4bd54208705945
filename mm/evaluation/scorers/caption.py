"""Captions: CIDEr (Vedantam et al. 2015) and BLEU-1 to -4 by pycocoevalcap, the official COCO code (extra `captions`).

It tokenises with Stanford's PTBTokenizer, a Java program that it brings along: `java` must be on the path.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any


def cider_bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> dict[str, Any]:
    """Scores of one hypothesis an image against its references, as the COCO server computes them.

    Returns "cider" (10 is a perfect match), "bleu1" ... "bleu4", and per image "cider_per_image" and "bleu_per_image"
    (four lists). CIDEr weighs words by how many images of THIS set they describe, so a subset scores differently.

    Raises ValueError for lists of different lengths, none at all, or an image without references, and RuntimeError
    where pycocoevalcap or Java is missing.
    """
    if len(references) != len(hypotheses) or not len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses have {len(references)} lists of references")
    for image, texts in enumerate(references):
        if not texts:
            raise ValueError(f"image {image} has no reference captions")
    try:
        from pycocoevalcap.bleu.bleu import Bleu  # pyright: ignore[reportMissingImports]
        from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(f"captions are scored with pycocoevalcap: pip install 'mm[captions]' ({error})") from error
    if shutil.which("java") is None:
        raise RuntimeError("captions are tokenised by a Java program: install a Java runtime, so that `java` is found")
    gold = {image: [{"caption": text} for text in texts] for image, texts in enumerate(references)}
    said = {image: [{"caption": text}] for image, text in enumerate(hypotheses)}
    tokenizer = PTBTokenizer()
    gold_words, said_words = tokenizer.tokenize(gold), tokenizer.tokenize(said)
    cider, cider_each = Cider().compute_score(gold_words, said_words)
    bleu, bleu_each = Bleu(4).compute_score(gold_words, said_words, verbose=0)
    return {
        "cider": float(cider),
        **{f"bleu{order}": float(value) for order, value in enumerate(bleu, start=1)},
        "cider_per_image": [float(value) for value in cider_each],
        "bleu_per_image": [[float(value) for value in each] for each in bleu_each],
    }
