"""POPE: yes/no questions about objects that may not be there (Li et al. 2023), as lmms-eval reports it."""

from __future__ import annotations

from collections.abc import Sequence


def evaluate(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """{"accuracy", "precision", "recall", "f1", "yes_ratio"} of (prediction, "yes" | "no") pairs.

    Exact match after strip and lower-case; anything else ("yes.") is wrong but no false positive or negative.
    `yes_ratio` is the share of questions whose ANSWER is yes (upstream). Raises ValueError without pairs.
    """
    if not pairs:
        raise ValueError("no answers to score")
    cleaned = [(prediction.strip().lower(), answer.strip().lower()) for prediction, answer in pairs]
    right_yes = sum(pair == ("yes", "yes") for pair in cleaned)
    said_yes = right_yes + sum(pair == ("yes", "no") for pair in cleaned)
    found_yes = right_yes + sum(pair == ("no", "yes") for pair in cleaned)
    precision = right_yes / said_yes if said_yes else 0.0
    recall = right_yes / found_yes if found_yes else 0.0
    return {
        "accuracy": sum(prediction == answer for prediction, answer in cleaned) / len(cleaned),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(answer == "yes" for _, answer in cleaned) / len(cleaned),
    }
