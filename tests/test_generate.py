"""`mm generate`: answers in order, whatever was interrupted; what is wrong is said once, by line or by prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mm import checkpoint
from mm.cli import main
from mm.generate import read_prompts
from mm.generation import generate
from mm.model import MultimodalModel
from mm.parts import build
from mm.testing import spread, tiny_tokenizer

CONFIG = """
class_path: mm.model.MultimodalModel
init_args:
  towers:
    image:
      tokenizer: {class_path: mm.tokenizers.image.ImageTokenizer, init_args: {patch: 2, max_tokens: 16}}
      encoder: {class_path: mm.encoders.none.NoEncoder}
      bridge: {class_path: mm.fusion.projector.LinearProjector}
  decoder:
    class_path: mm.decoder.decoder.Decoder
    init_args:
      width: 16
      mixers: {full: {class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {heads: 2}}}
      ffns: {dense: {class_path: mm.decoder.ffn.dense.GatedFFN, init_args: {hidden: 24}}}
      layers: [{pattern: [full/dense], repeat: 2}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = yaml.safe_load(CONFIG)
    config["init_args"]["tokenizer"] = str(tiny_tokenizer().save(folder))
    model = spread(build(config, MultimodalModel)).eval()
    model.config = config
    checkpoint.save(model, folder / "model")
    return folder / "model"


def part(path: str) -> dict[str, str]:
    return {"type": "image", "path": path}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "media").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "media" / f"{number}.png")
    text: dict[str, str] = {"type": "text", "text": "what is it?"}
    lines: list[Any] = [
        {"prompt": "one"},
        {"id": "two", "messages": [{"role": "user", "content": [part("media/0.png"), text]}]},
        {"id": 3, "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "why?"}]},
        {"id": "gone", "messages": [{"role": "user", "content": [part("media/9.png"), text]}]},
        {"messages": [{"role": "user", "content": [part("media/1.png"), part("media/2.png"), text]}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def run(model: Path, prompts: Path, out: Path, *more: str) -> int:
    return main(["generate", str(model), "--in", str(prompts), "--out", str(out), "--max-new-tokens", "6", *more])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


METHODS = [[], ["--temperature", "1", "--seed", "5"], ["--num-beams", "2"], ["--draft", "lookup"]]


@pytest.mark.parametrize("more", METHODS, ids=lambda more: " ".join(more) or "greedy")
def test_answers_in_order(model: Path, prompts: Path, tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(model, prompts, out, *more) == 1  # one picture is not there
    found = records(out)
    assert [record["id"] for record in found] == ["1", "two", "3", "gone", "5"]
    assert "9.png" in found[3]["error"] and set(found[3]) == {"id", "error"}
    options = {name.strip("-").replace("-", "_"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    options = {name: value if name == "draft" else int(value) for name, value in options.items()}
    good = [sample for sample in read_prompts(prompts) if sample.key != "gone"]
    expected = generate(checkpoint.load(model), good, max_new_tokens=6, **options)  # pyright: ignore[reportArgumentType]
    kept = [record for record in found if "error" not in record]
    assert [record["text"] for record in kept] == [answer.text for answer in expected]
    assert [record["finish_reason"] for record in kept] == [answer.finish_reason for answer in expected]
    assert [record["prompt_length"] for record in kept] == [answer.prompt_length for answer in expected]


def test_thinking_off_and_log_probabilities(model: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    plain, off = tmp_path / "plain.jsonl", tmp_path / "off.jsonl"
    run(model, prompts, plain)
    run(model, prompts, off, "--thinking", "off", "--logprobs", "2")
    block = len(tiny_tokenizer().encode("<think>")) + len(tiny_tokenizer().encode("</think>"))
    for before, after in zip(records(plain), records(off), strict=True):
        if "error" not in before:
            assert after["prompt_length"] - before["prompt_length"] >= block + 2 and "logprobs" not in before
            assert len(after["logprobs"]) == after["answer_length"] and len(after["logprobs"][0][2]) == 2
    assert run(model, prompts, off, "--thinking", "maybe") == 2
    assert "'maybe' is neither on nor off" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, -1, -30])
def test_it_goes_on_where_it_was_interrupted(model: Path, prompts: Path, tmp_path: Path, cut: int) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    run(model, prompts, whole, "--temperature", "1")
    run(model, prompts, out, "--temperature", "1")
    out.write_bytes(out.read_bytes()[:cut])
    run(model, prompts, out, "--temperature", "1")
    assert out.read_bytes() == whole.read_bytes()


def test_twice_in_a_row_does_nothing(model: Path, prompts: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    out = tmp_path / "answers.jsonl"
    run(model, prompts, out)
    before = out.stat().st_mtime_ns
    monkeypatch.setattr("mm.load", None)  # not even opened
    assert run(model, prompts, out) == 1
    assert out.stat().st_mtime_ns == before and "all 5 answers are there" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(model: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "answers.jsonl"
    run(model, prompts, out)
    first = out.read_bytes()
    assert run(model, prompts, out, "--temperature", "2") == 2
    assert "was made with another temperature" in capsys.readouterr().err
    assert out.read_bytes() == first
    assert run(model, prompts, out, "--temperature", "2", "--seed", "1", "--overwrite") == 1
    prompts.write_text('{"prompt": "other"}\n')
    assert run(model, prompts, out, "--temperature", "2", "--seed", "1") == 2
    assert "another prompts" in capsys.readouterr().err
    (tmp_path / "answers.jsonl.settings.json").unlink()
    assert run(model, prompts, out) == 2


def test_a_model_trained_anew_is_another(model: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    moved = shutil.copytree(model, tmp_path / "model")
    assert run(moved, prompts, tmp_path / "answers.jsonl") == 1
    manifest = moved / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert run(moved, prompts, tmp_path / "answers.jsonl") == 2
    assert "another model_manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", 'line 2: give an object with either "messages" or "prompt"'),
        ('{"prompt": "a", "messages": []}', "line 2: give an object"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', 'line 2, message 1: "role" must be'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'line 2, message 1: "content" must be text or a list'),
        ('{"messages": [{"role": "user", "content": [{"type": "smell"}]}]}', '{"type": "smell"} is no part'),
        ('{"prompt": 3}', '"content" must be text'),
        ('{"id": "1", "prompt": "again"}', "the id '1' is that of line 1 too"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(model: Path, tmp_path: Path, capsys: Any, line: str, message: str) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    assert run(model, path, out) == 2
    assert message in capsys.readouterr().err


def test_mistakes_of_the_command_line(model: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(model, tmp_path / "none.jsonl", out) == 2
    assert run(model, prompts, out, "--num-beams", "2", "--temperature", "1") == 2
    assert "num_beams and temperature do not go together" in capsys.readouterr().err
    assert run(model, prompts, out, "--overwrite", "--json-schema", "@" + str(tmp_path / "no.json")) == 2
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert run(model, empty, tmp_path / "nothing.jsonl") == 0
