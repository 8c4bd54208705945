"""GQA's main metric (Hudson and Manning 2019): exact match, overall and by kind of question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def evaluate(questions: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, str]) -> dict[str, float]:
    """{"accuracy", "binary", "open", then each structural and semantic type} as fractions, over balanced questions.

    `questions` is the official file; a prediction counts if it equals the answer exactly, case included. Raises
    ValueError, naming the id, for a balanced question without a prediction and a prediction for no question.
    """
    groups: dict[str, list[float]] = {}
    for key in predictions:
        if key not in questions:
            raise ValueError(f"predictions: unknown question id {key!r}")
    for key, question in questions.items():
        if not question.get("isBalanced", True):
            continue
        if key not in predictions:
            raise ValueError(f"predictions: no prediction for question id {key!r}")
        score = float(predictions[key] == question["answer"])
        for group in ("accuracy", *groups_of(question)):
            groups.setdefault(group, []).append(score)
    if not groups:
        raise ValueError("questions: none is balanced")
    return {name: sum(scores) / len(scores) for name, scores in groups.items()}


def groups_of(question: Mapping[str, Any]) -> list[str]:
    """ "binary" or "open" (the structural type "query"), then the structural and the semantic type."""
    types = question.get("types") or {}
    structural, semantic = types.get("structural"), types.get("semantic")
    kind = [] if structural is None else ["open" if structural == "query" else "binary"]
    return [*kind, *(name for name in (structural, semantic) if name)]
