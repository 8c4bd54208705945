"""`mm validate` beyond Lightning's: many benchmarks by name, controls, permission, reproduction."""

import json

import pytest
import yaml

import mm.evaluation.reproduce as reproduction
from mm import cli, validate
from mm.evaluation import results
from mm.evaluation.runner import evaluate
from mm.evaluation.sandbox.run import require_allowed

from .toys import ColorBenchmark, Seer


@pytest.fixture
def lightning(monkeypatch):
    """What Lightning would have been asked, and the config that it would have read."""
    calls = []

    def record(arguments):
        config = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
        try:
            require_allowed("x")
            allowed = True
        except ValueError:
            allowed = False
        calls.append((arguments, yaml.safe_load(open(config).read()) if config else None, allowed))

    monkeypatch.setattr(validate, "_lightning", record)
    return calls


def test_benchmarks_by_name_are_one_config(lightning):
    assert cli.main(["validate", "--benchmarks", "mmmu, vqav2,easy_vqa", "--model.model", "m", "--no-controls"]) == 0
    [(arguments, config, allowed)] = lightning
    paths = [b["class_path"].rpartition(".")[2] for b in config["model"]["init_args"]["benchmarks"]]
    assert paths == ["MMMUBenchmark", "VQAv2Benchmark", "EasyVQABenchmark"]
    assert config["model"]["init_args"]["batch_size"] == 8
    assert arguments[-4:] == ["--model.model", "m", "--model.controls", "false"]
    assert not allowed


def test_only_the_command_line_allows_code(lightning):
    cli.main(["validate", "--benchmarks", "humaneval", "--allow-code-execution"])
    assert lightning[0][2] is True
    with pytest.raises(ValueError):
        require_allowed("x")


def test_other_lines_are_lightnings(lightning):
    cli.main(["validate", "--config", "configs/demo/evaluate.yaml", "--controls"])
    assert lightning[0][0] == ["validate", "--config", "configs/demo/evaluate.yaml", "--model.controls", "true"]


def test_unknown_benchmarks_are_named(tmp_path, capsys):
    assert cli.main(["validate", "--benchmarks", "mmmu,nonsense"]) == 2
    assert "no 'nonsense'; there is chartqa" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match="not the config of an evaluation"):
        validate.combine([str(tmp_path / "x.yaml")])
    with pytest.raises(ValueError, match="give one name"):
        validate.combine([""])


@pytest.fixture
def result(tmp_path, monkeypatch):
    """A result whose model is a stand-in that can see."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}")
    evaluate(
        None,
        ColorBenchmark(),
        output=tmp_path / "results",
        model_path=tmp_path / "model",
        respond=Seer(),
        show_progress=False,
    )
    monkeypatch.setattr(reproduction.mm, "load", lambda path: None, raising=False)
    monkeypatch.setattr(reproduction, "build", lambda config, base: ColorBenchmark(**config["init_args"]))
    use(monkeypatch, Seer())
    return tmp_path / "results" / "colors.json"


def use(monkeypatch, seer):
    monkeypatch.setattr(reproduction, "evaluate", lambda *args, **options: evaluate(*args, respond=seer, **options))


def test_a_result_is_reproduced(result, capsys, monkeypatch):
    assert cli.main(["validate", "--reproduce", str(result)]) == 0
    assert "the same scores and the same 13 predictions" in capsys.readouterr().out.replace("\n", " ")

    class Blind(Seer):
        def _answer(self, sample):
            return "red"

    use(monkeypatch, Blind())
    assert cli.main(["validate", "--reproduce", str(result)]) == 1
    told = capsys.readouterr().out.replace("\n", " ")
    assert "NOT reproduced" in told and "10 of 13 predictions differ" in told and "q1: was 'green', is 'red'" in told


def test_another_model_or_other_data_is_no_reproduction(result, capsys):
    before = json.loads(result.read_text())
    for path, what in ((("model", "manifest_sha256"), "model"), (("dataset", "fingerprint"), "data")):
        changed = json.loads(json.dumps(before))
        changed["provenance"][path[0]][path[1]] = "0" * 64
        result.write_text(json.dumps(changed))
        assert cli.main(["validate", "--reproduce", str(result)]) == 2
        assert f"not the same {what}" in capsys.readouterr().err
    result.write_text("[]")
    with pytest.raises(ValueError, match="not a result of an evaluation"):
        results.read_result(result)
