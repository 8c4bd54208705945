"""Published decoders, one file each: settings to a config, and a weight map. A file here with a `FAMILY` is found."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from mm.decoder.interchange.family import Family


@cache
def families() -> dict[str, Family]:
    """model_type -> Family, of every file of this folder."""
    found: dict[str, Family] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for family in getattr(module, "FAMILIES", None) or [module.FAMILY]:
            assert family.model_type not in found, f"two families are called {family.model_type}"
            found[family.model_type] = family
    return found


def family_of(model_type: str, where: str) -> Family:
    """Raises ValueError naming the model_type and the ones there are."""
    if model_type not in families():
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; there are {', '.join(sorted(families()))}"
        )
    return families()[model_type]
