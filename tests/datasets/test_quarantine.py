"""Bad samples are passed over, written down and counted; too many of them end the run; nothing else moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm.datasets.chat_template import ChatTemplate
from mm.datasets.datamodule import DataSet, Reading, StreamingDataModule
from mm.datasets.processor import NoTower
from mm.datasets.quarantine import Quarantine, read_quarantine
from mm.datasets.shard_cache import ShardError
from mm.datasets.shards import write_shards
from mm.testing import picture
from mm.tokenizers.image import ImageTokenizer
from mm.types import Media, MediaSpec, Sample


class Reader:
    """As much of a model as the data side asks for."""

    def __init__(self, **specs: MediaSpec) -> None:
        self.tokenizer, self.template, self.specs = self, ChatTemplate("compact"), specs

    def encode(self, text: str) -> list[int]:
        return [100 + ord(c) for c in text]

    def special(self, name: str) -> int:
        return len(name)

    def media_specs(self) -> dict[str, MediaSpec]:
        return self.specs

    def encoder_learns(self, kind: str) -> bool:
        raise AssertionError("these shards hold no features")

    def encoder_identity(self, kind: str) -> dict[str, Any]:
        raise AssertionError("these shards hold no features")


def chat(i: int, media: Media) -> Sample:
    parts = [{"type": "image", "media": 0}, {"type": "text", "text": "?"}]
    return Sample(f"s{i:02}", [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}], [media])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twenty pictures; number 3 is no picture, and a bit of number 8 is flipped."""
    samples = [chat(i, Media("image", b"junk", "3.png") if i == 3 else picture(i)) for i in range(20)]
    write_shards(samples, tmp_path / "shards", samples_per_shard=5)
    tar = tmp_path / "shards" / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"s08.0.png") + 600] ^= 8
    tar.write_bytes(data)
    return tmp_path / "shards"


def module(shards: Path, folder: Path | None = None, **options: Any) -> StreamingDataModule:
    data = StreamingDataModule({"a": DataSet(str(shards))}, samples_per_batch=4, row_length=40, **options)
    data.attach(Reader(image=MediaSpec(ImageTokenizer(patch=2))))
    data._run_file = lambda name: None if folder is None else folder / name  # type: ignore[method-assign]
    return data


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_leave_gaps_and_move_nothing(shards: Path, tmp_path: Path, workers: int) -> None:
    data = module(shards, tmp_path / "run", workers=workers)
    with pytest.warns(UserWarning, match="samples so far are passed over: they cannot be read; quarantine.jsonl"):
        found = list(data.train_dataloader())
    order = [data._mixture()[place].index for place in range(20)]
    assert [key for batch in found for key in batch.keys] == [f"s{i:02}" for i in order if i not in (3, 8)]
    assert data.counts["samples"] == 20 and data.counts["bad_samples"] == 2
    notes = {note["key"]: note for note in read_quarantine(tmp_path / "run" / "quarantine.jsonl")}
    assert notes.keys() == {"s03", "s08"}
    assert notes["s03"]["shard"] == f"{shards}/shard-000000.tar" and "'3.png' is not an image" in notes["s03"]["cause"]
    assert notes["s08"]["shard"] == f"{shards}/shard-000001.tar" and "CRC-32" in notes["s08"]["cause"]
    assert notes["s08"]["offset"] > 0
    list(data.train_dataloader())  # the same again are not written again
    assert len(list(read_quarantine(tmp_path / "run" / "quarantine.jsonl"))) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_end_the_run_and_validation_tolerates_none(shards: Path, workers: int) -> None:
    data = module(shards, reading=Reading(max_bad=0.0), workers=workers)
    with pytest.raises(
        ShardError, match=r"1 of \d+ samples cannot be used, more than max_bad=0 allows; the last: .*s0"
    ):
        list(data.train_dataloader())
    data.val = data.train
    with pytest.raises(ShardError, match="1 of 4 samples cannot be used.*s03"):
        list(data.val_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_the_config_is_no_bad_sample(shards: Path, workers: int) -> None:
    data = module(shards, workers=workers)
    data.attach(Reader())
    with pytest.raises(NoTower, match=r"^sample s\d\d: .*png is image, but the model takes text only; add a tower"):
        list(data.train_dataloader())


def test_the_rate_is_of_a_thousand_samples_at_least(tmp_path: Path) -> None:
    keeper = Quarantine(None, 0.002)
    note = {"shard": "a.tar", "offset": 0, "key": "k", "cause": "why"}
    keeper.add(1, [note])
    keeper.add(1, [note])
    with pytest.raises(ShardError, match="3 of 3 samples"):
        keeper.add(1, [note])
    patient = Quarantine(None, 0.002)
    patient.add(2000, [note] * 3)
    with pytest.raises(ValueError, match="max_bad=2: a share"):
        Quarantine(None, 2)


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text(json.dumps({"key": "a"}) + '\n{"key": "b')
    assert list(read_quarantine(path)) == [{"key": "a"}]
