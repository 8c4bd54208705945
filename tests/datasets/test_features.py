"""Stored features: training from them is training from the media, and they are refused where they would not be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset
import yaml

from mm.checkpoint import load, save
from mm.cli import main as mm
from mm.datasets.datamodule import DataSet, Reading, StreamingDataModule
from mm.datasets.shard_index import index_shards
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.model import MultimodalModel
from mm.objectives.instruct import NextToken
from mm.parts import build
from mm.shard import TowerFeatures
from mm.testing import spread
from mm.training.optim import freeze_all_but
from mm.training.testing import make_run
from mm.types import Media, Sample

KINDS = ("image", "audio")
BRIDGES = ("towers.image.bridge", "towers.audio.bridge", "decoder")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/pictures, shards/sounds (some of text alone), and a model directory with a transformer for images."""
    folder = tmp_path_factory.mktemp("run")
    config = yaml.safe_load(make_run(folder).read_text())["model"]["init_args"]["model"]
    config["init_args"]["towers"]["image"]["encoder"] = {
        "class_path": "mm.encoders.transformer.TransformerEncoder",
        "init_args": {"width": 16, "layers": 1, "heads": 2},
    }
    torch.manual_seed(0)
    model = spread(build(config, MultimodalModel))
    model.config = config
    save(model, folder / "model")
    for name in ("pictures", "sounds"):
        assert shard(folder / "shards" / name, folder / name, folder / "model") == 0
    return folder


def shard(source: Path | str, out: Path, model: Path | str, *options: str) -> int:
    given = ("--features", str(model), "--workers", "1", "--quiet", "--samples-per-shard", "7", *options)
    return mm(["shard", str(source), "--out", str(out), *given])


def module(sets: dict[str, Path], model: MultimodalModel, **options: Any) -> StreamingDataModule:
    data = StreamingDataModule(
        {name: DataSet(str(path)) for name, path in sets.items()},
        samples_per_batch=6, row_length=96, media_budget=60, **options,
    )  # fmt: skip
    data.attach(model)
    return data


def frozen(run: Path) -> MultimodalModel:
    model = load(run / "model").train()
    freeze_all_but(model, BRIDGES)
    return model.train()


def steps(data: StreamingDataModule, model: MultimodalModel, number: int = 4) -> list[tuple[torch.Tensor, ...]]:
    """The loss and the gradients of what learns, batch by batch."""
    found, loader = [], iter(data.train_dataloader())
    for _ in range(number):
        loss = NextToken()(model, next(loader))
        model.zero_grad()
        loss.total.backward()
        found.append((loss.total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    return found


def test_training_from_features_is_training_from_media(run: Path) -> None:
    model = frozen(run)
    media = module({name: run / "shards" / name for name in ("pictures", "sounds")}, model, workers=0)
    cached = module({name: run / name for name in ("pictures", "sounds")}, model, workers=0)
    plain, stored = next(iter(media.train_dataloader())), next(iter(cached.train_dataloader()))
    assert plain.keys == stored.keys and torch.equal(plain.input_ids, stored.input_ids)
    for kind in KINDS:
        assert stored.media[kind].encoded and not plain.media[kind].encoded
        assert stored.media[kind].tokens.values.dtype == torch.float16
        assert torch.equal(plain.media[kind].lengths, stored.media[kind].lengths)
    for one, other in zip(steps(media, model), steps(cached, model), strict=True):
        assert len(one) == len(other) > 5
        for a, b in zip(one, other, strict=True):
            # float16 rounds a feature by 2^-11 of itself; what comes of that is not above a few times as much
            torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-3 * float(a.abs().max()))


def test_float32_features_give_the_same_loss_to_the_last_digits(run: Path, tmp_path: Path) -> None:
    assert shard(run / "shards" / "pictures", tmp_path / "out", run / "model", "--feature-dtype", "float32") == 0
    model = frozen(run)
    data = [module({"p": path}, model) for path in (run / "shards" / "pictures", tmp_path / "out")]
    for (one, *_), (other, *_) in zip(*(steps(each, model) for each in data), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)  # batches of other sizes sum in another order


def test_nothing_is_decoded_tokenized_or_encoded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(run)
    data = module({name: run / name for name in ("pictures", "sounds")}, model)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the features were there")

    monkeypatch.setattr("mm.datasets.processor.decode", never)
    for kind in KINDS:
        monkeypatch.setattr(type(model.tower(kind).tokenizer), "__call__", never)
        monkeypatch.setattr(type(model.tower(kind).encoder), "forward", never)
    assert all(torch.isfinite(loss) for loss, *_ in steps(data, model, number=8))


def test_shards_stay_plain_tars_with_the_media_beside_the_features(run: Path) -> None:
    manifest = ShardDataset(run / "pictures").manifest
    about = manifest["features"]
    assert about["model"] == json.loads((run / "model" / "manifest.json").read_text())["self_sha256"]
    assert about["dtype"] == "float16" and set(about["towers"]) == set(KINDS)
    assert about["towers"]["image"]["tokenizer"]["patch"] == 2 and len(about["towers"]["image"]["weights"]) == 64
    paths = sorted(str(path) for path in (run / "pictures").glob("*.tar"))
    reader: Any = webdataset  # its types do not say what it has
    read = list(reader.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(read) == manifest["samples"] == 40
    before = list(ShardDataset(run / "shards" / "pictures"))
    for files, sample in zip(read, before, strict=True):
        assert files["0.png"] == sample.media[0].data
        tensors = safetensors.torch.load(files["0.features.safetensors"])
        assert len(tensors["features"]) == int(tensors["grid"].prod())
    for index in (run / "pictures").glob("*.npy"):  # an index can be made again, as of any shards
        whole = index.read_bytes()
        index.unlink()
        index_shards(run / "pictures")
        assert index.read_bytes() == whole


def test_the_same_bytes_by_one_worker_and_two_and_after_an_interruption(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shard(run / "shards" / "sounds", tmp_path / "two", run / "model", "--workers", "2") == 0
    whole = TowerFeatures.__call__
    done = []

    def stop(self: TowerFeatures, samples: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(samples))
        return whole(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(TowerFeatures, "__call__", stop)
        assert shard(run / "shards" / "sounds", tmp_path / "cut", run / "model") == 130
    kept = sorted((tmp_path / "cut" / ".unfinished").glob("chunk-*.tar"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2
    assert shard(run / "shards" / "sounds", tmp_path / "cut", run / "model") == 0
    tars = sorted((tmp_path / "cut").glob("*.tar"))
    assert [path.stat().st_mtime_ns for path in tars[:2]] == stamps
    digests = [[s["sha256"] for s in ShardDataset(d).manifest["shards"]] for d in (
        run / "sounds", tmp_path / "two", tmp_path / "cut")]  # fmt: skip
    assert digests[0] == digests[1] == digests[2]


def test_a_second_run_keeps_them_and_another_model_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(run / "shards" / "pictures", run / "pictures", run / "model") == 0
    assert "kept" in capsys.readouterr().err
    assert shard(run / "shards" / "pictures", run / "pictures", changed(run, tmp_path)) == 2
    assert "other settings (features" in " ".join(capsys.readouterr().err.split())
    assert mm(["shard", str(run / "shards" / "pictures"), "--out", str(run / "pictures"), "--workers", "1"]) == 2


def changed(run: Path, folder: Path) -> Path:
    """A model whose image encoder has moved by one weight."""
    model = load(run / "model")
    with torch.no_grad():
        next(model.tower("image").encoder.parameters()).flatten()[3] += 1e-4
    save(model, folder / "changed")
    return folder / "changed"


def test_another_towers_features_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    model = load(changed(run, tmp_path)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"set pictures .*its image features were made by another tower \(weights "):
        module({"pictures": run / "pictures"}, model).train_dataloader()
    model = frozen(run)
    model.tower("image").tokenizer.max_tokens = 9  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"image features .*another tower \(tokenizer.max_tokens 16, here 9\)"):
        module({"pictures": run / "pictures"}, model).train_dataloader()
    model = frozen(run)
    blocks: Any = model.tower("image").encoder.blocks
    blocks[0].heads = 4  # shows in no weight
    with pytest.raises(ValueError, match=r"image features .*another tower \(architecture "):
        module({"pictures": run / "pictures"}, model).train_dataloader()


def test_a_stage_that_trains_the_encoder_is_refused_unless_it_reads_the_media(run: Path) -> None:
    model = load(run / "model").train()
    with pytest.raises(ValueError, match=r"set pictures .*this stage trains towers.image.encoder: .*stale.*features: "):
        module({"pictures": run / "pictures"}, model).train_dataloader()
    batch = next(iter(module({"pictures": run / "pictures"}, model, features=False).train_dataloader()))
    assert not batch.media["image"].encoded
    data = module({"pictures": run / "shards" / "pictures"}, model)
    data.val = {"held": DataSet(str(run / "pictures"))}
    with pytest.raises(ValueError, match="stale"):
        data.val_dataloader()


def test_sets_with_and_without_features_are_not_mixed(run: Path, tmp_path: Path) -> None:
    sets = {"made": run / "pictures", "raw": run / "shards" / "pictures"}
    with pytest.raises(ValueError, match="set made holds image features and set raw holds none"):
        module(sets, frozen(run)).train_dataloader()
    # a set without any media of the kind does not stand in the way
    next(iter(module({"made": run / "pictures", "sounds": run / "shards" / "sounds"}, frozen(run)).train_dataloader()))
    assert shard(run / "shards" / "pictures", tmp_path / "out", run / "model", "--feature-dtype", "bfloat16") == 0
    with pytest.raises(ValueError, match="of dtypes bfloat16, float16"):
        module({"a": run / "pictures", "b": tmp_path / "out"}, frozen(run)).train_dataloader()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "has no features"),
        (b"", "no safetensors file"),
        (b"x" * 40, "no safetensors file"),
        ({"features": torch.zeros(4, 16)}, r"tensors features, not features and grid \(3,\)"),
        (
            {"features": torch.zeros(4, 16), "grid": torch.tensor([1, 2, 2])},
            r"\(4, 16\) float32, not \(4, 16\) float16",
        ),
        ({"features": torch.zeros(5, 16).half(), "grid": torch.tensor([1, 2, 2])}, r"\(5, 16\) float16, not \(4, 16\)"),
        ({"features": torch.zeros(4, 8).half(), "grid": torch.tensor([1, 2, 2])}, r"\(4, 8\) float16, not \(4, 16\)"),
        ({"features": torch.zeros(0, 16).half(), "grid": torch.tensor([1, 0, 2])}, r"of a grid \(1, 0, 2\)"),
    ],
)
def test_bad_features_are_passed_over_and_noted_as_other_bad_samples(
    run: Path, tmp_path: Path, made: Any, words: str
) -> None:
    """Written so, and with CRC-32 and SHA-256 of their own: damage to the file itself is found as in any shard."""
    data = safetensors.torch.save(made) if isinstance(made, dict) else made

    class Broken(TowerFeatures):
        def __call__(self, samples: Any) -> Any:
            found: list[Any] = super().__call__(samples)
            spoilt = [replace(item, features=data) for item in found[1].media]
            return [found[0], replace(found[1], media=spoilt), *found[2:]]

    samples = list(ShardDataset(run / "shards" / "pictures"))[:6]
    write_shards(samples, tmp_path / "out", features=Broken(str(run / "model")))
    model = frozen(run)
    batch = next(iter(module({"p": tmp_path / "out"}, model, reading=Reading(max_bad=0.5)).train_dataloader()))
    assert len(batch.keys) == 5 and len(batch.bad) == 1
    assert batch.bad[0]["key"] == samples[1].key
    assert re.search(words, batch.bad[0]["cause"]), batch.bad[0]["cause"]


def test_what_cannot_be_made_is_quarantined_as_other_bad_samples(run: Path, tmp_path: Path) -> None:
    good = list(ShardDataset(run / "shards" / "pictures"))[:3]
    message = {"role": "user", "content": [{"type": "image", "media": 0}]}
    bad = Sample("bad", [message], [Media("image", b"no picture", "bad.png")])
    empty = Sample("empty", [message], [Media("image", b"", "empty.png")])
    text = Sample("text", [{"role": "assistant", "content": "only text"}])
    samples, features = [good[0], bad, text, empty, *good[1:]], TowerFeatures(str(run / "model"))
    made = write_shards(samples, tmp_path / "out", features=features, max_bad=0.5)
    assert made["samples"] == 4 and made["quarantined"] == 2
    notes = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [note["key"] for note in notes] == ["bad", "empty"] and "'bad.png'" in notes[0]["cause"]
    assert [bool(s.media and s.media[0].features) for s in ShardDataset(tmp_path / "out")] == [True, False, True, True]


def test_features_beyond_the_range_of_float16_are_refused_with_what_to_take(run: Path, tmp_path: Path) -> None:
    model = load(run / "model")
    encoder: Any = model.tower("image").encoder
    torch.nn.init.constant_(encoder.norm.weight, 1e6)
    save(model, tmp_path / "model")
    samples = list(ShardDataset(run / "shards" / "pictures"))[:3]
    with pytest.raises(ValueError, match="3 of 3 records are bad.*float16 ends before; take bfloat16"):
        write_shards(samples, tmp_path / "out", features=TowerFeatures(str(tmp_path / "model")))
    made = write_shards(samples, tmp_path / "wide", features=TowerFeatures(str(tmp_path / "model"), dtype="bfloat16"))
    assert made["samples"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--feature-kinds", "video"], "--feature-kinds video: the model"),
        (["--feature-batch", "0"], "--feature-batch must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert shard(run / "shards" / "pictures", tmp_path / "out", run / "model", *options) == 2
    assert words in capsys.readouterr().err
    assert shard(run / "shards" / "pictures", tmp_path / "out", tmp_path / "nowhere") == 2
    assert "no such model directory" in capsys.readouterr().err


def test_one_kind_alone(run: Path, tmp_path: Path) -> None:
    assert shard(run / "shards" / "sounds", tmp_path / "out", run / "model", "--feature-kinds", "image") == 0
    assert all(item.features is None for sample in ShardDataset(tmp_path / "out") for item in sample.media)


def test_shards_made_from_shards_with_features_do_not_carry_stale_ones(run: Path, tmp_path: Path) -> None:
    options = ["--transform", "image_side=3", "--workers", "1", "--quiet"]
    assert mm(["shard", str(run / "pictures"), "--out", str(tmp_path / "small"), *options]) == 0
    found = ShardDataset(tmp_path / "small")
    assert "features" not in found.manifest
    assert all(item.features is None for sample in found for item in sample.media)


def test_workers_get_features_through_shared_memory(run: Path) -> None:
    loader = module({"pictures": run / "pictures"}, frozen(run), workers=1).train_dataloader()
    batch = next(iter(loader))
    loader.close()
    assert batch.media["image"].tokens.values.is_shared() and batch.input_ids.is_shared()
    assert all(not item.data and item.features is None for row in batch.samples for s in row for item in s.media)
