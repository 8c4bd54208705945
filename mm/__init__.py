"""mm: a multimodal research framework. `mm.load(path)` opens a trained model; the command line is `mm --help`.

Importing this package is cheap on purpose: torch and everything above it load on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from mm.checkpoint import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from mm.checkpoint import load

        return load
    raise AttributeError(f"module 'mm' has no attribute {name!r}")
