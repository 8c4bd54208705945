"""`mm doctor DATA|CONFIG|CHECKPOINT`: exit status 0 says train, 1 says do not, 2 that the question was wrong.

mm doctor runs/demo/shards/easy-vqa-train
mm doctor configs/demo/instruct.yaml --json
mm doctor runs/demo/model
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mm.arguments import Parser
from mm.checkpoint import verify
from mm.datasets.manifest import MANIFEST, UNFINISHED
from mm.datasets.shard_reader import ShardDataset
from mm.doctor.config import check_encoding, data_sets, open_model, read_config
from mm.doctor.data import check_shards
from mm.doctor.findings import Finding, Histogram, all_well, as_json, plot, show, show_histogram
from mm.doctor.machine import check_machine
from mm.training.checkpoint_file import verify_checkpoint


class Report:
    """Findings as they come: printed at once, or kept for --json."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.findings: list[Finding] = []
        self.histograms: list[Histogram] = []

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            if not self.quiet:
                show(self.console, finding)

    def title(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"\n[bold]{text}[/]", highlight=False)

    def chart(self, histograms: list[Histogram]) -> None:
        self.histograms += histograms
        for histogram in () if self.quiet else histograms:
            show_histogram(self.console, histogram)


def main(argv: Sequence[str]) -> int:
    """Prints what it finds, or JSON. Raises ValueError for an argument that is none of the three."""
    parser = Parser(
        "mm doctor",
        "Check data, a config or a checkpoint, and the machine, before training. The exit status says whether to "
        "train: 0 yes, 1 no.",
        examples=[
            "mm doctor runs/demo/shards/easy-vqa-train",
            "mm doctor configs/demo/instruct.yaml --plot lengths.png",
        ],
    )
    add = parser.add_argument
    add("what", type=Path, metavar="DATA|CONFIG|CHECKPOINT", help="folder of shards, YAML, model folder or .ckpt file")
    add(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="samples of every shard, or set, to decode (%(default)s)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the choice of samples (%(default)s)")
    add("--plot", metavar="FILE", help="the histograms as a picture (.png, .svg, .pdf)")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: expected 1 or more")
    report = Report(Console(), options.json)
    examine(options.what, report, options.samples, options.seed)
    if options.plot:
        plot(report.histograms, options.plot)
    well = all_well(report.findings)
    if options.json:
        print(json.dumps(as_json(report.findings, report.histograms, {"what": str(options.what)}), indent=1))
    else:
        warned = sum(finding.status == "warn" for finding in report.findings)
        verdict = "[bold green]ready to train[/]" if well else "[bold red]do not train on this[/]"
        report.console.print(f"\n{verdict}" + (f" ({warned} warnings)" if warned else ""))
    return 0 if well else 1


def examine(what: Path, report: Report, samples: int, seed: int) -> None:
    """Finds out what `what` is, and checks it."""
    if what.is_dir() and (what / "config.yaml").is_file():
        _verified(report, "model directory", verify, what)
    elif what.is_dir():
        shards = sorted(folder.parent for folder in what.glob(f"*/{MANIFEST}")) if not _is_data(what) else [what]
        for folder in shards or [what]:
            _data(folder, report, samples, seed)
        report.title("machine")
        report.add(*check_machine(what))
    elif what.suffix in (".yaml", ".yml"):
        _config(what, report, samples, seed)
    elif what.suffix == ".ckpt" and what.is_file():
        _verified(report, "checkpoint", verify_checkpoint, what)
    else:
        raise ValueError(f"{what}: neither a folder of shards, a config (.yaml), a model folder nor a .ckpt file")


def _is_data(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (folder / UNFINISHED).exists() or any(folder.glob("*.tar"))


def _verified(report: Report, name: str, check: Any, path: Path) -> None:
    try:
        check(path)
    except ValueError as error:
        report.add(Finding(name, "fail", str(error)))
    else:
        report.add(Finding(name, "ok", f"{path}: every byte has its hash"))


def _data(folder: Path, report: Report, samples: int, seed: int) -> None:
    report.title(str(folder))
    findings, survey = check_shards(folder, samples, seed)
    report.add(*findings)
    report.chart(survey.histograms())


def _config(path: Path, report: Report, samples: int, seed: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    config = read_config(path)
    sets = data_sets(config)
    for name, folder in sets.items():
        report.title(f"{name}: {folder}")
        findings, _ = check_shards(Path(folder), samples, seed)
        report.add(*findings)
    if not sets:
        report.add(Finding("data", "fail", f"{path}: data.init_args names no set under train or val"))
    if all_well(report.findings):
        _try_model(path, config, {name: ShardDataset(folder) for name, folder in sets.items()}, report, samples)
    report.title("machine")
    trainer, data = config.get("trainer") or {}, config["data"].get("init_args") or {}
    place = Path(trainer.get("default_root_dir") or ".")
    report.add(*check_machine(place, int(data.get("workers", 0))))


def _try_model(path: Path, config: dict[str, Any], sets: dict[str, ShardDataset], report: Report, samples: int) -> None:
    report.title("model")
    try:
        model, with_weights = open_model(config, path)
    except (ValueError, OSError) as error:
        report.add(Finding("model", "fail", " ".join(str(error).split())))
        return
    report.add(Finding("model", "ok", f"{sum(weight.numel() for weight in model.parameters()):,} parameters"))
    row_length = (config["data"].get("init_args") or {}).get("row_length", 1024)
    findings, encodings = check_encoding(model, with_weights, sets, row_length, samples)
    report.add(*findings)
    if not report.quiet:
        report.console.print("\n[bold]what is learned[/] ([bold green]green[/]), of what is read")
        for name, text in encodings.shown:
            report.console.print(f"[cyan]{name}[/]", highlight=False)
            report.console.print(text)
    report.chart(encodings.histograms())
