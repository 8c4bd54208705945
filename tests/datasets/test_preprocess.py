"""`mm shard`: what it prints, what it refuses, and that a second run keeps what the first one made."""

import json

import pytest

from mm.cli import main as mm
from mm.datasets.preprocess import main
from mm.datasets.shard_reader import ShardDataset


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    return tmp_path / "data"


def shard(*arguments):
    return mm(["shard", *(str(argument) for argument in (*arguments, "--workers", 1))])


def test_a_recognised_path(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert shard(folder, "--out", out, "--samples-per-shard", 2) == 0
    assert "3 samples (text only) in 2 shards" in " ".join(capsys.readouterr().err.split())
    samples = ShardDataset(out)
    assert [sample.messages[0]["content"] for sample in samples] == ["one", "two", "three"]
    manifest = samples.manifest
    assert manifest["settings"]["source"] == str(folder)
    assert manifest["settings"]["samples_per_shard"] == 2
    assert set(manifest["fingerprint"]) == {"metadata.jsonl"}
    assert {"python", "mm"} <= set(manifest["versions"])


def test_a_second_run_keeps_the_same_and_refuses_other_settings(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert shard(folder, "--out", out) == 0
    before = (out / "manifest.json").stat().st_mtime_ns
    assert shard(folder, "--out", out) == 0
    assert "kept" in capsys.readouterr().err
    assert (out / "manifest.json").stat().st_mtime_ns == before

    assert shard(folder, "--out", out, "--limit", 2) == 2
    assert "limit: None, now 2" in capsys.readouterr().err
    (folder / "metadata.jsonl").write_text('{"text": "other"}\n')
    assert shard(folder, "--out", out) == 2
    assert "fingerprint" in capsys.readouterr().err

    assert shard(folder, "--out", out, "--overwrite") == 0
    assert len(ShardDataset(out)) == 1


def test_options_reach_the_source(tmp_path):
    assert shard("world_audio", "--out", tmp_path, "--set", "n=2", "--seed", 3, "--split", "test") == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["options"] == {"n": "2", "seed": 3, "split": "test"}
    assert ShardDataset(tmp_path)[1].key == "audio_world_test_3_000001"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["nothing", "neither a file or folder nor one of the sources", "easy_vqa"]),
        (["world_audio", "--set", "m=1"], ["no option 'm'", "seed"]),
        (["world_audio", "--set", "n=many"], ["option n", "expected int", "'many'"]),
        (["world_audio", "--set", "n"], ["KEY=VALUE"]),
        (["world_audio", "--split", "dev"], ["option split", "'dev'"]),
        (["openmoji", "--seed", "1"], ["--seed", "openmoji"]),
        (["folder"], ["folder", "'path'"]),
        (["world_audio:x"], ["reads no path", "'x'"]),
        (["folder:/nowhere"], ["/nowhere", "metadata.jsonl"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, arguments, words):
    assert shard(*arguments, "--out", tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err


def test_a_bad_line_names_file_line_and_key(folder, tmp_path, capsys):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"text": "a", "file_name": "../../etc/passwd"}\n')
    assert shard(folder, "--out", tmp_path / "out") == 2
    assert (
        f"{folder}/metadata.jsonl: line 4: key 'file_name': '../../etc/passwd' lies outside" in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_help_lists_the_sources(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in ("coco_captions", "easy_vqa", "folder", "llava", "mmmu", "openmoji", "vqav2", "world_audio"):
        assert f"  {name} " in printed
