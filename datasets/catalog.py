"""The sources by name: every file of `mm/datasets/sources` is one, found by listing the folder.

A new source is one new file; nothing here changes. The help of a source is the first line of its file's docstring, read
without importing it (some need packages that not every installation has).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from mm.datasets.source import Source

FOLDER = Path(__file__).parent / "sources"


def names() -> list[str]:
    """Of every source, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def helps() -> dict[str, str]:
    """Name -> one-line help of every source. It parses every file, so this is for those who show it."""
    found = {}
    for name in names():
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text("utf-8")))
        found[name] = (docstring or "").partition("\n")[0]
    return found


def source_class(name: str) -> type[Source[Any]]:
    """The class of a source. Raises ValueError naming the known sources, or the package that an import lacks."""
    if name not in names():
        raise ValueError(f"no source named {name!r}; there are: {', '.join(names())}")
    module = importlib.import_module(f"mm.datasets.sources.{name}")
    [found] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Source) and value.__module__ == module.__name__
    ]
    return found


def open_source(text: str, **options: Any) -> Source[Any]:
    """Builds the source that `text` names: "NAME", "NAME:PATH", or a bare path whose format is recognised.

    Options are the constructor's arguments; strings are converted to their annotated types ("3" -> 3, "yes" -> True,
    "a,b" -> ("a", "b")).

    Raises ValueError for an unknown name, a path of no or several known formats, an option that the source does not
    have, a value of another type, and a missing option.
    """
    name, colon, path = text.partition(":")
    if name not in names():
        name, path = _recognise(Path(text)), text
    cls = source_class(name)
    parameters = inspect.signature(cls).parameters
    if path:
        if "path" not in parameters:
            raise ValueError(f"source {name} reads no path, got {path!r}")
        options["path"] = path
    hints = typing.get_type_hints(cls.__init__)
    for key, value in options.items():
        if key not in parameters:
            raise ValueError(f"source {name} has no option {key!r}; it has: {', '.join(parameters) or 'none'}")
        if isinstance(value, str):
            options[key] = convert(value, hints[key], f"source {name}: option {key}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in options:
            hint = f"write {name}:PATH" if key == "path" else f"set {key}=..."
            raise ValueError(f"source {name} needs {key!r} ({hint})")
    return cls(**options)


def defaults(text: str) -> Mapping[str, Any]:
    """The options of a source and their defaults (`inspect.Parameter.empty` where there is none)."""
    name = text.partition(":")[0]
    cls = source_class(name if name in names() else _recognise(Path(text)))
    return {key: parameter.default for key, parameter in inspect.signature(cls).parameters.items()}


def _recognise(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"{path}: neither a file or folder nor one of the sources {', '.join(names())}")
    found = [name for name in names() if source_class(name).recognises(path)]
    if len(found) != 1:
        formats = f"several formats ({', '.join(found)})" if found else "no known format"
        raise ValueError(f"{path}: looks like {formats}; say which: mm shard NAME:{path}")
    return found[0]


def convert(text: str, hint: Any, where: str) -> Any:
    """`text` as the annotated type: bool, int, float, str, Path, Literal, None, a union or a tuple of these."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is str):  # text fits anything: it comes last
            try:
                return convert(text, choice, where)
            except ValueError:
                continue
    elif origin is Literal:
        if text in arguments:
            return text
        raise ValueError(f"{where}: expected one of {', '.join(arguments)}, got {text!r}")
    elif origin is tuple:
        return tuple(convert(part.strip(), arguments[0], where) for part in text.split(",") if part.strip())
    elif hint is bool:
        values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in values:
            return values[text.lower()]
    elif hint is type(None):
        if text.lower() in ("none", "null", ""):
            return None
    elif hint in (int, float, str, Path):
        try:
            return hint(text)
        except ValueError:
            pass
    expected = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}: expected {expected}, got {text!r}")
