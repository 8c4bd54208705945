"""ScienceQA: multiple choice answered with a letter (Lu et al. 2022), as lmms-eval scores it."""

from __future__ import annotations


def score(prediction: str, answer: int) -> float:
    """1.0 if the prediction is the letter of option `answer` (any case), or begins with that capital and a period."""
    letter = chr(ord("A") + answer)
    text = prediction.strip()
    return float(text.upper() == letter or text[:2] == f"{letter}.")
