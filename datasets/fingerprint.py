"""Settings as a flat dictionary, and what differs between two: a resumed run must be the run that it resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"init_args": {"b": 1}}} -> {"a.b": 1}: dotted keys to plain values, an item of a list by its number."""
    if isinstance(settings, Mapping):
        items = list(settings.items())
    elif isinstance(settings, (list, tuple)):
        items = list(enumerate(settings))
    else:
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in items:
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
        flat |= flatten(value, name)
    return flat


def below(key: str, prefixes: Sequence[str]) -> bool:
    """Whether `key` is one of `prefixes`, or inside one: "a.b" is inside "a"."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def differing(then: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both, but for those below `allowed`. A key that only one has is None there."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return {key: (then.get(key), now.get(key)) for key in keys if not below(key, allowed)}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The changes on one line, and what can be done about them."""
    listed = "; ".join(f"{key}: {then} -> {now}" for key, (then, now) in changed.items())
    options = " ".join(f"--allow-change {key}" for key in changed)
    return (
        f"{listed}. A resumed run would not be the same run: restore the settings, or say that it is meant: {options}"
    )
