import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from rich.console import Console
from torch import nn

import mm.evaluation.module as module
from mm.evaluation.module import EvaluationModule, score_table
from mm.evaluation.runner import evaluate

from .toys import ColorBenchmark, Seer

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "evaluation").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(config):
    parser = ArgumentParser()
    parser.add_subclass_arguments(EvaluationModule, "model")
    parser.add_class_arguments(Trainer, "trainer")
    parser.add_argument("--verbose", type=bool)  # of Trainer.validate
    built: Any = parser.instantiate(parser.parse_object(yaml.safe_load(config.read_text())))
    assert [benchmark.name for benchmark in built.model.benchmarks] == [config.stem]


def test_every_benchmark_has_a_config():
    files = {path.stem for path in (Path(module.__file__).parent / "benchmarks").glob("*.py")} - {"__init__", "base"}
    named = set(re.findall(r"mm\.evaluation\.benchmarks\.(\w+)\.", "".join(path.read_text() for path in CONFIGS)))
    assert named == files


def test_validation_through_lightning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.mm, "load", lambda path: nn.Linear(1, 1).eval(), raising=False)
    monkeypatch.setattr(module, "evaluate", lambda *args, **options: evaluate(*args, **options, respond=Seer()))
    (tmp_path / "model").mkdir()
    evaluation = EvaluationModule(str(tmp_path / "model"), [ColorBenchmark()], show_progress=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        barebones=False,
    )
    [logged] = trainer.validate(evaluation, verbose=False)
    assert logged["colors/accuracy"] == 1.0
    assert logged["colors/question_only/color_accuracy"] == 0.25
    assert (tmp_path / "results" / "colors.json").is_file()
    assert "shuffled" in capsys.readouterr().out  # controls are columns; a narrow terminal breaks their titles


def test_table_shows_scores_beside_chance_and_controls():
    result = evaluate(None, ColorBenchmark(), show_progress=False, respond=Seer())
    console = Console(width=150, record=True, file=open("/dev/null", "w"))
    console.print(score_table([result]))
    row = next(line for line in console.export_text().splitlines() if re.search(r" color  ", line))
    assert re.findall(r"\d+\.\d", row) == ["100.0", "100.0", "100.0", "25.0", "25.0", "0.0"]


def test_a_benchmark_may_be_given_once():
    with pytest.raises(ValueError, match="colors, colors"):
        EvaluationModule("model", [ColorBenchmark(), ColorBenchmark()])
