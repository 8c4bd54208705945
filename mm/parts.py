"""Parts from configs: class_path and init_args, from an allowlist of packages only."""

from __future__ import annotations

from typing import Any, TypeVar

import jsonargparse

from mm.allowlist import allow_imports

_T = TypeVar("_T")


def build(config: dict[str, Any], base: type[_T]) -> _T:
    """Builds a part from its `{class_path, init_args}` tree. Raises ValueError naming the key that is wrong."""
    allow_imports()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part", required=True)
    try:
        parsed = parser.parse_object({"part": config})
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{config.get('class_path', base.__name__)}: {error}") from error
    return parser.instantiate(parsed).part
