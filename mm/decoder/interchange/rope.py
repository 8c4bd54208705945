"""Rotary settings as config.json files spell them, old and new, as the tree of our Rotary.

New files have `rope_parameters`, one object or one for each kind of layer; older ones `rope_theta`, `rope_scaling` and
`partial_rotary_factor` beside it.
"""

from __future__ import annotations

from typing import Any

from mm.decoder.interchange.family import Tree, part
from mm.decoder.interchange.settings import Settings

KINDS = {
    "linear": "linear",
    "ntk": "ntk",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",  # as the first Phi-3 files call it
}
_NUMBERS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
)
_NEEDED = {"llama3": ("low_freq_factor", "high_freq_factor")}


def rotary(s: Settings, default_theta: float = 10_000.0, section: str | None = None, **more: Any) -> Tree:
    """The tree of `mm.decoder.positions.Rotary`; `section` names the kind of layer where the file keeps them apart.

    `more` are further arguments of Rotary. Raises ValueError for a kind of scaling that is unknown, or that depends on
    the length of the call ("dynamic").
    """
    theta, fraction = s.number("rope_theta", default_theta), s.number("partial_rotary_factor", 1.0)
    longest = s.integer("max_position_embeddings", None)
    original = s.integer("original_max_position_embeddings", None)
    rope = _rope(s, section)
    scaling = None
    if rope is not None:
        theta, fraction = rope.number("rope_theta", theta), rope.number("partial_rotary_factor", fraction)
        scaling = _scaling(rope, original, longest)
    return part(
        "mm.decoder.positions.Rotary",
        theta=theta,
        fraction=None if fraction == 1.0 else fraction,
        scaling=scaling,
        **more,
    )


def _rope(s: Settings, section: str | None) -> Settings | None:
    rope, old = s.section("rope_parameters"), s.section("rope_scaling")
    if rope is None:
        return old
    if old is not None and old.values != rope.values:
        s.refuse("rope_scaling", "stands beside rope_parameters and says something else")
    if old is not None:
        old.read.update(old.values)
    return rope if section is None else rope.section(section)


def _scaling(rope: Settings, original: int | None, longest: int | None) -> Tree | None:
    """The arguments of RopeScaling, or None without scaling."""
    word = rope.text("rope_type", None) or rope.text("type", "default")
    rope.read.add("type")
    if word == "default":
        return None
    if word not in KINDS:
        rope.refuse("rope_type", f"must be default, {', '.join(KINDS)}", word)
    kind = KINDS[word]
    start = rope.integer("original_max_position_embeddings", None)
    start = original or start or longest
    arguments: dict[str, Any] = {"kind": kind, "factor": _factor(rope, kind, start, longest)}
    if kind in ("yarn", "llama3", "longrope"):
        if start is None:
            rope.refuse("original_max_position_embeddings", f"{kind} needs it")
        arguments["original_length"] = start
    for name in _NUMBERS:
        value = rope.number(name, None)
        if value is not None:
            arguments[name] = value
        elif name in _NEEDED.get(kind, ()):
            rope.refuse(name, f"{kind} needs it")
    truncate = rope.flag("truncate", None)
    if truncate is not None:
        arguments["truncate"] = truncate
    if kind == "longrope":
        arguments |= {name: [float(x) for x in rope.items(name)] for name in ("short_factor", "long_factor")}
    return arguments


def _factor(rope: Settings, kind: str, original: int | None, longest: int | None) -> float:
    """How far the length is stretched; where the file does not say, the quotient of its two lengths."""
    if kind != "linear" and not rope.has("factor") and original is not None and longest is not None:
        rope.read.add("factor")
        return longest / original
    return rope.number("factor")
