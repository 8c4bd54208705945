"""timm and open_clip imported without torch's compiler, which takes over a second to load and which a chat never calls.

Two of their imports want it: `torchvision.ops.roi_align` takes a function from `torch._dynamo.utils`, and timm's
NaFlexViT decorates methods with `torch.compiler.disable`. While the import lasts each finds a stand-in, which does the
same and loads the compiler when it is first called.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._compile import _disable_dynamo

UTILS = "torch._dynamo.utils"


@contextmanager
def compiler_put_off() -> Iterator[None]:
    """Inside, an import does not load torch's compiler for these two. Where it is loaded already nothing changes."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    utils, disable = _Utils(UTILS), torch.compiler.disable
    sys.modules[UTILS], torch.compiler.disable = utils, _disable
    try:
        yield
    finally:
        torch.compiler.disable = disable
        utils.make_way()


class _Utils(types.ModuleType):
    """Has `is_compile_supported`; whatever else is asked for, it makes way for the real module."""

    def is_compile_supported(self, device_type: str) -> bool:
        return importlib.import_module(UTILS).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks every module for its __file__
            raise AttributeError(f"module {UTILS!r} has no attribute {name!r} yet")
        self.make_way()
        return getattr(importlib.import_module(UTILS), name)

    def make_way(self) -> None:
        if sys.modules.get(UTILS) is self:
            del sys.modules[UTILS]


def _disable(fn: Callable[..., Any] | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """`torch.compiler.disable` as torch uses it for its own functions: nothing is loaded before the first call."""
    if fn is None:
        return partial(_disable, recursive=recursive, reason=reason)
    return _disable_dynamo(fn, recursive)
