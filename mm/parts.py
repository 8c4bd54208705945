"""Parts from configs: class_path and init_args, from an allowlist of packages only."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from inspect import signature
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse._common import parser_context  # there is no public way

from mm.allowlist import allow_imports
from mm.config_errors import shorten

_T = TypeVar("_T")
# Marks of objects that jsonargparse takes apart as defaults: dataclasses, those of attrs and pydantic, and its own.
TAKEN_APART = ("__dataclass_fields__", "__attrs_attrs__", "model_fields", "lazy_get_init_data")
WRONG = (ArgumentError, TypeError, ValueError, LookupError, AttributeError)


def build(config: dict[str, Any], base: type[_T]) -> _T:
    """Builds a part from its `{class_path, init_args}` tree. Raises ValueError naming the key that is wrong."""
    parser = _parser(base)
    with suppress(*WRONG):  # the full parse says what is wrong
        parsed = _parse_once(parser, config)
        if _says_enough(parsed.part):
            return parser.instantiate(parsed).part
    parsed = _parse(parser, config, base)
    try:
        return parser.instantiate(parsed).part
    except ValueError as error:
        raise ValueError(f"{_name(config, base)}: {shorten(str(error))}") from error


def normal_form(config: dict[str, Any], base: type) -> dict[str, Any]:
    """The tree with every default spelled out: what two trees that mean the same have in common. Errors as `build`."""
    parser = _parser(base)
    return yaml.safe_load(parser.dump(_parse(parser, config, base), skip_unset=False))["part"]


def _parser(base: type) -> ArgumentParser:
    allow_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part", required=True)
    return parser


def _parse(parser: ArgumentParser, config: dict[str, Any], base: type) -> Namespace:
    try:
        return parser.parse_object({"part": copy.deepcopy(config)})  # the parser writes into what it reads
    except (ArgumentError, ValueError, TypeError) as error:
        reason = shorten(getattr(error, "message", str(error))).removeprefix("part.").removeprefix("part: ")
        raise ValueError(f"{_name(config, base)}: {reason}") from error


def _name(config: dict[str, Any], base: type) -> str:
    return config.get("class_path", base.__name__)


def _parse_once(parser: ArgumentParser, config: dict[str, Any]) -> Namespace:
    """What the tree says, without defaults, and not checked for arguments that are missing.

    Each of the two goes through all that lies below a part once more, at every part: with them a small model takes five
    times as long, over a second. A part has its defaults itself, and says what it misses.
    """
    with parser_context(lenient_check=True):
        return parser.parse_object({"part": copy.deepcopy(config)}, defaults=False)


def _says_enough(value: Any, part: Any = None) -> bool:
    """Whether `value`, parsed without defaults, makes the same as with them. In doubt False.

    It does not below an argument such as `positions: Rotary = Rotary(pairs="adjacent")`: where the tree leaves fields
    out they are that object's, and what is built without defaults has those of its class.
    """
    if isinstance(value, dict):
        return all(map(_says_enough, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_says_enough, value))
    if not isinstance(value, Namespace):
        return True
    given = vars(value)
    if "class_path" in given:
        module, _, name = given["class_path"].rpartition(".")
        part, given = getattr(sys.modules[module], name), vars(given.get("init_args", Namespace()))
    arguments = signature(part).parameters
    for name, argument in arguments.items():
        default, kind = argument.default, type(argument.default)
        if argument.kind is argument.VAR_KEYWORD or not _says_enough(given.get(name), kind):
            return False  # behind **arguments stand those of another class
        if any(hasattr(kind, mark) for mark in TAKEN_APART):
            if default != kind() or (name not in given and not _says_enough(Namespace(), kind)):
                return False
    return given.keys() <= arguments.keys()
