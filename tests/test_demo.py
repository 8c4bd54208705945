"""The demo without its training: its configs parse and fit together, and its summary is what the stages left."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from rich.console import Console

from mm import cli, demo
from mm.allowlist import allow_imports
from mm.datasets import preprocess
from mm.model import MultimodalModel

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs" / "demo").glob("*.yaml"))}
STAGES = {"align": "fit", "instruct": "fit", "evaluate": "validate"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def callback(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of the one callback of this class."""
    [found] = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(f".{name}")]
    return found["init_args"]


def test_every_config_is_a_stage_or_the_model() -> None:
    assert set(CONFIGS) == {*STAGES, "model"}


def test_the_scores_parse_with_the_command_that_makes_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The other stages are read by `mm fit`, as test_configs.py does."""
    with pytest.raises(SystemExit) as done:  # how --print_config ends
        cli.main([STAGES["evaluate"], "--config", str(CONFIGS["evaluate"]), "--print_config"])
    assert done.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == read("evaluate")["model"]["class_path"]
    assert all(command == "fit" and "data" in read(name) for name, command in STAGES.items() if name != "evaluate")


def test_model_parses_and_its_classes_exist() -> None:
    allow_imports()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MultimodalModel, "model", required=True)
    parser.parse_object({"model": read("model")})

    def check(tree: Any) -> int:
        if isinstance(tree, list):
            return sum(map(check, tree))
        if not isinstance(tree, dict):
            return 0
        if "class_path" in tree:
            module, _, name = tree["class_path"].rpartition(".")
            assert isinstance(getattr(importlib.import_module(module), name), type)
        return ("class_path" in tree) + sum(map(check, tree.values()))

    assert sum(check(read(name)) for name in CONFIGS) > 20


def test_each_stage_reads_what_an_earlier_one_wrote() -> None:
    align, instruct, evaluate = read("align"), read("instruct"), read("evaluate")
    assert instruct["model"]["init_args"]["model"] == callback(align, "SaveModelDirectory")["path"]
    assert evaluate["model"]["init_args"]["model"] == callback(instruct, "SaveModelDirectory")["path"]
    assert (CONFIGS["align"].parent / align["model"]["init_args"]["model"]) == CONFIGS["model"]
    assert read("model")["init_args"]["tokenizer"] == str(demo.RUN / "tokenizer")
    for config in (align, instruct):
        used = [data["path"] for data in config["data"]["init_args"]["train"].values()]
        assert set(used) <= {str(demo.RUN / "shards" / name) for name in demo.SHARDS}
        assert not any(path.endswith("-test") for path in used)  # nothing is trained on what it is scored with
    held_out = [data["path"] for data in align["data"]["init_args"]["val"].values()]
    assert held_out == [str(demo.RUN / "shards" / "openmoji-test")]


@pytest.mark.parametrize("name", demo.SHARDS)
def test_shard_commands_name_sources_and_options_that_exist(name: str) -> None:
    arguments = preprocess.parser().parse_args([*demo.SHARDS[name], "--out", "unused"])
    source = preprocess.open_source(arguments.source, **preprocess._options(arguments))
    assert source.fingerprint() is not None


def test_chats_are_about_items_that_training_never_saw() -> None:
    for kind, (source, question) in demo.CHAT.items():
        assert getattr(source, "split", "test") == "test" and question.endswith("?")
        assert next(iter(source)).media[0].kind == kind


def test_load_imbalance_is_the_worst_layers_at_the_end(tmp_path: Path) -> None:
    first = {"step": 10, "layers": [{"layer": 1, "counts": {"text": [100, 0]}}]}
    last = {
        "step": 20,
        "layers": [
            {"layer": 1, "counts": {"text": [6, 2], "image": [2, 6]}},  # even, all modalities together
            {"layer": 2, "counts": {"text": [9, 3], "image": [0, 0], "audio": [0, 4]}},  # 9 and 7: mean 8
        ],
    }
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, last)))
    assert demo.max_over_mean_load(tmp_path / "routing.jsonl") == 9 / 8


def write_run(run: Path) -> None:
    for name, scores in {
        "easy_vqa": {"accuracy": 0.98, "color_shape_accuracy": 0.96},
        "world_audio": {"accuracy": 0.95},
        "world_video": {"accuracy": 0.9},
    }.items():
        controls = {"question_only": dict.fromkeys(scores, 0.25), "shuffled_media": dict.fromkeys(scores, 0.3)}
        (run / "results").mkdir(parents=True, exist_ok=True)
        (run / "results" / f"{name}.json").write_text(json.dumps({"scores": scores, "controls": controls}))
    for stage in ("align", "instruct"):
        (run / stage).mkdir()
    (run / "align/metrics.csv").write_text(
        "step,train/loss,val/recall_at_10,val/chance_at_10\n10,3.2,,\n10,,0.2,0.01\n20,3.1,,\n20,,0.25,0.0125\n20,3.0,,\n"
    )
    (run / "instruct/routing.jsonl").write_text('{"step": 1, "layers": [{"layer": 1, "counts": {"text": [3, 1]}}]}\n')


def test_summary_has_the_promised_keys_from_the_stages_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RUN", tmp_path)
    write_run(tmp_path)
    console = Console(file=io.StringIO(), width=160)
    answers = [{"file": "image.png", "question": "what color?", "answer": "red"}]
    summary = demo.summarise(demo.Demo(console, []), answers)
    expected = {
        "easy_vqa.accuracy": 0.98, "easy_vqa.color_shape_accuracy": 0.96, "easy_vqa.question_only": 0.25,
        "easy_vqa.shuffled_media": 0.3, "audio.accuracy": 0.95, "audio.shuffled_media": 0.3,
        "video.accuracy": 0.9, "video.shuffled_media": 0.3, "alignment.recall_at_10": 0.25,
        "alignment.chance_at_10": 0.0125, "routing.max_over_mean_load": 1.5,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected  # the last validation's recall, not the first's
    assert isinstance(summary["seconds.install"], float)
    json.dumps(summary)
    demo.show(console, summary)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "easy_vqa.accuracy" in shown and "0.980" in shown and "red" in shown


def test_a_failing_command_ends_the_demo_and_is_named() -> None:
    stages = demo.Demo(Console(file=io.StringIO()), [])
    assert stages.run_pairs({"Version": ["--version"]})[0].startswith("mm ")
    assert stages.stages[0]["command"] == "mm --version" and stages.stages[0]["seconds"] >= 0
    with pytest.raises(SystemExit, match=r"demo: `mm chat 'no such model' hello` failed with exit status 2"):
        stages.run("Chat", "chat", "no such model", "hello")
    with pytest.raises(SystemExit, match=r"`mm chat 'no such model' hello` failed with exit status 2"):
        stages.run_pairs({"Chat": ["chat", "no such model", "hello"]})
    assert len(stages.stages) == 1
