"""Parts from configs: class_path and init_args, from an allowlist of packages only."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import jsonargparse
import yaml

from mm.allowlist import allow_imports
from mm.config_errors import shorten

_T = TypeVar("_T")


def build(config: dict[str, Any], base: type[_T]) -> _T:
    """Builds a part from its `{class_path, init_args}` tree. Raises ValueError naming the key that is wrong."""
    parser, parsed = _parse(config, base)
    return parser.instantiate(parsed).part


def normal_form(config: dict[str, Any], base: type) -> dict[str, Any]:
    """The tree with every default spelled out: what two trees that mean the same have in common. Errors as `build`."""
    parser, parsed = _parse(config, base)
    return yaml.safe_load(parser.dump(parsed, skip_unset=False))["part"]


def _parse(config: dict[str, Any], base: type) -> tuple[jsonargparse.ArgumentParser, jsonargparse.Namespace]:
    allow_imports()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part", required=True)
    try:
        return parser, parser.parse_object({"part": copy.deepcopy(config)})  # the parser writes into what it reads
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        reason = shorten(getattr(error, "message", str(error))).removeprefix("part.").removeprefix("part: ")
        raise ValueError(f"{config.get('class_path', base.__name__)}: {reason}") from error
