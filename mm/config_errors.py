"""What jsonargparse says of a config that does not fit, in one line that a person can act on."""

from __future__ import annotations

import re

from mm.allowlist import ALLOWED

UNION = "Does not validate against any of the Union"
_NOISE = re.compile(r"Does not validate against|Subtypes:|Errors:|Given value|Problem with given class_path")
_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_CALLABLE = re.compile(r"Type \S*Callable.* expects a function or a callable class: ")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")


def shorten(message: str) -> str:
    """jsonargparse's report as one line: the path of keys, and the reason of the branch that got furthest.

    It reports a nested error once per alternative of every type on the way, as an indented tree; the deepest leaf is
    what the user wrote wrong, and the others say that it is not None, or not a string.
    """
    keys: list[tuple[int, str]] = []
    leaves: list[tuple[int, str]] = []
    lines = message.splitlines()
    if not any(_KEY.search(line) or line.strip() == "Errors:" for line in lines):
        return _reason(" ".join(line.strip() for line in lines if not _NOISE.search(line)))
    for line in lines:
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        text = _CALLABLE.sub("", text)
        keys = [(depth, key) for depth, key in keys if depth < indent]
        if match := _KEY.match(text):
            keys.append((indent, match[1]))
            text = match[2]
        if text and not _NOISE.match(text):
            path = ".".join(key for _, key in keys)
            leaves.append((indent, f"{path}: {_reason(text)}" if path else _reason(text)))
    # Of a part whose own constructor refused it, all that is said beside is what else might have stood there.
    own = [leaf for leaf in leaves if not leaf[1].startswith("Expected a ")] or leaves
    return max(own, key=lambda leaf: leaf[0])[1]


def _reason(text: str) -> str:
    if match := _DENIED.search(text):
        package = match[1].split(".")[0]
        if package in ALLOWED:
            return f"class_path {match[1]!r} is refused: it can load code or start processes"
        return (
            f"class_path {match[1]!r} is refused: configs may name {', '.join(ALLOWED)} only "
            f"(if you trust it: --allow-import {package})"
        )
    text = re.sub(r"\.*\s*Got value: Namespace\(.*", "", text)
    text = re.sub(r"<class '([\w.]+)'>|typing\.(?=\w)", r"\1", text)
    return text.replace("required: fit.model", "required: model (give --config FILE)")
