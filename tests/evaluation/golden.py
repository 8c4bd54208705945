"""The golden cases: what the official scorers gave, case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GOLD = Path(__file__).parent / "gold"


def cases(name: str, *, leave_out: frozenset[str] | set[str] = frozenset()) -> list[Any]:
    """Parameters of a test: every case of a file but the kinds that the file itself calls advisory."""
    data = json.loads((GOLD / f"{name}.public.json").read_text(encoding="utf-8"))
    return [pytest.param(unwrap(case), id=case["id"]) for case in data["cases"] if case["kind"] not in leave_out]


def header(name: str) -> dict[str, Any]:
    data = json.loads((GOLD / f"{name}.public.json").read_text(encoding="utf-8"))
    return {key: value for key, value in data.items() if key != "cases"}


def unwrap(value: Any) -> Any:
    """{"float": "nan"} -> nan, all the way down."""
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: unwrap(v) for k, v in value.items()}
    return [unwrap(v) for v in value] if isinstance(value, list) else value
