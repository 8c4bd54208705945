"""`mm doctor`: its verdict is its exit status, and every fault is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mm.cli import main
from mm.datasets.shards import write_shards
from mm.datasets.source import Source
from mm.datasets.sources.world_audio import AudioWorld
from mm.doctor import machine
from mm.doctor.config import check_encoding, data_sets, read_config, spans
from mm.doctor.findings import Histogram
from mm.testing import tiny_model
from mm.training.checkpoint_file import write_checkpoint
from mm.types import Media, Sample


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_shards(AudioWorld(6), folder, samples_per_shard=3)
    return folder


@pytest.fixture
def shards(world, tmp_path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "shards"))


def doctor(capsys, *arguments) -> tuple[int, dict]:
    status = main(["doctor", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def failures(report: dict) -> str:
    return "; ".join(finding["message"] for finding in report["findings"] if finding["status"] == "fail")


def test_whole_shards_are_fit_for_training(shards, capsys):
    status, report = doctor(capsys, shards)
    assert (status, report["ok"]) == (0, True)
    assert {"manifest", "hashes", "index", "samples", "modalities", "versions", "disk"} <= {
        finding["check"] for finding in report["findings"]
    }
    assert [sum(histogram["counts"]) for histogram in report["histograms"]] == [6, 0, 6]


def test_a_reader_sees_verdict_and_histograms(shards, capsys, tmp_path):
    assert main(["doctor", str(shards), "--plot", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr().out
    assert "ready to train" in printed
    assert "words of a sample (words)" in printed
    assert "█" in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000000.index.npy", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(shards, capsys, name):
    data = bytearray((shards / name).read_bytes())
    data[len(data) // 2] ^= 1
    (shards / name).write_bytes(data)
    status, report = doctor(capsys, shards)
    assert (status, report["ok"]) == (1, False)
    assert name in failures(report)


def test_missing_and_unfinished_data_is_named(shards, capsys):
    (shards / "shard-000000.tar").unlink()
    status, report = doctor(capsys, shards)
    assert status == 1
    assert "shard-000000.tar: missing" in failures(report)
    (shards / "manifest.json").unlink()
    (shards / ".unfinished").mkdir()
    assert "mm shard was interrupted; run it again" in failures(doctor(capsys, shards)[1])


class Mixed(Source[int]):
    def __init__(self, samples) -> None:
        self.samples = samples

    def records(self):
        return range(len(self.samples))

    def sample(self, record):
        return self.samples[record]


def test_broken_media_and_missing_answers_are_found(tmp_path, capsys):
    question = [{"role": "user", "content": "what?"}]
    answer = [*question, {"role": "assistant", "content": "that"}]
    broken = Sample("broken", answer, [Media("image", b"not an image", "x.png")])
    write_shards(Mixed([Sample("mute", question), Sample("fine", answer), broken]), tmp_path / "a")
    status, report = doctor(capsys, tmp_path / "a")
    assert status == 1
    assert re.search(
        r"1 of 3 that were decoded are broken; .*shard-000000\.tar.*'x\.png' is not an image", failures(report)
    )
    write_shards(Mixed([Sample("mute", question)]), tmp_path / "b")
    assert "1 of 1 samples have no answer" in failures(doctor(capsys, tmp_path / "b")[1])


def test_checkpoints_and_model_folders(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {"weight": torch.arange(100.0)}, "global_step": 3}, path)
    assert doctor(capsys, path)[0] == 0
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    status, report = doctor(capsys, path)
    assert status == 1
    assert "last.ckpt: damaged" in failures(report)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").write_text("{}")
    assert "has no manifest.json" in failures(doctor(capsys, tmp_path / "model")[1])


def test_what_is_none_of_these_is_a_usage_error(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("trainer: {}")
    for argument, message in (
        (tmp_path / "nothing", "neither a folder of shards, a config"),
        (tmp_path / "a.yaml", "no `data:` in it"),
        (tmp_path / "b.yaml", "no such file"),
    ):
        assert main(["doctor", str(argument)]) == 2
        assert message in capsys.readouterr().err
    assert main(["doctor", str(tmp_path), "--samples", "0"]) == 2


def test_a_config_names_its_sets(tmp_path):
    data = {"class_path": "x", "init_args": {"train": {"a": {"path": "p", "weight": 2}}, "val": {"b": {"path": "q"}}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": data}))
    assert data_sets(read_config(tmp_path / "c.yaml")) == {"train a": "p", "val b": "q"}


def test_a_config_whose_model_is_missing_is_not_fit(shards, tmp_path, capsys):
    data = {"init_args": {"train": {"a": {"path": str(shards)}}, "workers": 1}}
    config = {"data": data, "model": {"init_args": {"model": str(tmp_path / "none")}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    status, report = doctor(capsys, tmp_path / "c.yaml")
    assert status == 1
    assert "no such file" in failures(report)
    assert "shared memory" in {finding["check"] for finding in report["findings"]}


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def test_slots_labels_and_lengths_are_counted(model, shards):
    from mm.datasets.shard_reader import ShardDataset

    findings, encodings = check_encoding(model, True, {"train a": ShardDataset(shards)}, 100_000, 3)
    by_check = {finding.check: finding for finding in findings}
    assert by_check["slots"].message == "features fill their slots in 3 samples"
    assert by_check["labels"].status == "ok"
    assert encodings.tried == 3
    shown = encodings.shown[0][1].plain
    assert re.search(r"\[audio: \d+\]", shown)
    assert any(span.style == "bold green" for span in encodings.shown[0][1].spans)
    findings, _ = check_encoding(model, True, {"train a": ShardDataset(shards)}, 4, 3)
    assert any(finding.check == "length" and finding.status == "fail" for finding in findings)


def test_a_model_that_counts_wrongly_is_found(model, shards, monkeypatch):
    from mm.datasets.shard_reader import ShardDataset
    from mm.types import Reduction

    monkeypatch.setattr(model.tower("audio").bridge, "reduction", Reduction(fixed=3), raising=False)
    findings, _ = check_encoding(model, True, {"train a": ShardDataset(shards)}, 100_000, 1)
    assert any(re.search(r"\d+ features for 3 places", finding.message) for finding in findings)


def test_learned_spans_are_marked(model):
    from mm.datasets.processor import Processor

    sample = Sample("s", [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}])
    processor = Processor(model.tokenizer, model.template, model.media_specs(), None)
    text = spans(processor.encode(sample), model)
    [green] = [span for span in text.spans if span.style == "bold green"]
    assert text.plain[green.start : green.end].startswith("blue")
    assert "red" not in text.plain[green.start : green.end]


def test_the_machine_is_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(
        machine.shutil, "disk_usage", lambda place: type("U", (), {"free": 5 << 20, "total": 6 << 20})()
    )
    found = {finding.check: finding for finding in machine.check_machine(tmp_path, workers=2)}
    assert found["disk"].status == found["shared memory"].status == "fail"
    assert "docker run --shm-size" in found["shared memory"].message


def test_histograms_hold_every_value():
    assert Histogram.of("x", "y", [1, 2, 3, 4], bins=3).counts == [1, 1, 2]
    assert Histogram.of("x", "y", [5, 5]).counts == [2]
    assert Histogram.of("x", "y", []).counts == []
