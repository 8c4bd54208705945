"""`mm validate`: Lightning's own, with short ways to say what evaluations need.

    mm validate --config configs/evaluation/mmmu.yaml --model.model DIR
    mm validate --benchmarks mmmu,vqav2 --model.model DIR [--controls | --no-controls] [--allow-code-execution]
    mm validate --reproduce RESULT.json [--model.model DIR]

`--benchmarks` puts the named configs of `configs/evaluation` together; anything else on the line is Lightning's.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

import mm
from mm.evaluation.sandbox.run import code_execution_allowed

HERE = Path("configs/evaluation")
CHECKOUT = Path(mm.__file__).resolve().parents[1] / HERE  # where an installed checkout has them


def main(argv: Sequence[str]) -> int:
    """`argv[0]` is "validate". Raises ValueError for what a user can mend; 1 if a result was not reproduced."""
    name, *rest = argv
    if "-h" in rest or "--help" in rest:
        _lightning([name, "--help"])
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--benchmarks")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction)
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--reproduce", type=Path)
    ours, theirs = parser.parse_known_args(rest)
    # Only this line can allow generated programs to run: no config can.
    with code_execution_allowed() if ours.allow_code_execution else nullcontext():
        if ours.reproduce is not None:
            return _reproduce(ours.reproduce, theirs)
        extra = [] if ours.controls is None else ["--model.controls", str(ours.controls).lower()]
        if ours.benchmarks is None:
            _lightning([name, *theirs, *extra])
            return 0
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "benchmarks.yaml"
            config.write_text(yaml.safe_dump(combine(ours.benchmarks.split(",")), sort_keys=False), encoding="utf-8")
            _lightning([name, "--config", str(config), *theirs, *extra])
    return 0


def _lightning(arguments: list[str]) -> None:
    from mm.training.command import main as lightning  # slow to import, and an error above needs none of it

    lightning(arguments)


def combine(names: Sequence[str]) -> dict[str, Any]:
    """One config of several: the first one's, with all their benchmarks and the smallest of their batch sizes.

    A name is that of a file in `configs/evaluation`, or a path. Raises ValueError naming one that does not exist, or
    that is no config of an evaluation.
    """
    whole: dict[str, Any] = {}
    for name in filter(None, (name.strip() for name in names)):
        config = _read(name)
        arguments = config["model"]["init_args"]
        if not whole:
            whole = copy.deepcopy(config)
            continue
        together = whole["model"]["init_args"]
        together["benchmarks"] += arguments["benchmarks"]
        sizes = [options["batch_size"] for options in (together, arguments) if "batch_size" in options]
        together |= {"batch_size": min(sizes)} if sizes else {}
    if not whole:
        raise ValueError("--benchmarks: give one name or several, with commas between them")
    return whole


def _read(name: str) -> dict[str, Any]:
    folders = [folder for folder in (HERE, CHECKOUT) if folder.is_dir()]
    tried = [Path(name), *(folder / f"{name}.yaml" for folder in folders)]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        raise ValueError(f"--benchmarks: no {name!r}; there is {', '.join(known) or 'no configs/evaluation here'}")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        benchmarks = config["model"]["init_args"]["benchmarks"]
    except (KeyError, TypeError):
        benchmarks = None
    if not isinstance(benchmarks, list):
        raise ValueError(f"{path}: not the config of an evaluation: it has no model.init_args.benchmarks")
    return config


def _reproduce(file: Path, rest: Sequence[str]) -> int:
    from rich.console import Console

    from mm.evaluation.reproduce import reproduce, show

    parser = argparse.ArgumentParser(prog="mm validate --reproduce", allow_abbrev=False)
    parser.add_argument("--model.model", dest="model", help="where the model lies now")
    parser.add_argument("--output", type=Path, help="keep the new result here")
    options = parser.parse_args(rest)
    with tempfile.TemporaryDirectory() as folder:
        found = reproduce(file, options.output or Path(folder), options.model)
    show(Console(), file, found)
    return 0 if found.same else 1
