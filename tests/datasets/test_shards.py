"""Shards: what goes in comes out, for this reader and for plain WebDataset; damage and kills are noticed."""

import json
import pickle
import tarfile

import numpy as np
import pytest

from mm.datasets.manifest import MANIFEST, UNFINISHED, read_manifest
from mm.datasets.shard_format import INDEX_DTYPE, decode_sample, encode_sample, read_index, write_file
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import remove_shards, write_shards
from mm.datasets.source import Source
from mm.datasets.sources.world_audio import AudioWorld
from mm.types import Media, Sample


class Numbers(Source[int]):
    """`n` small samples of every shape; `fail` is a record that raises."""

    def __init__(self, n=10, fail=None):
        self.n, self.fail = n, fail

    def records(self):
        return range(self.n)

    def sample(self, record):
        if record == self.fail:
            raise ValueError(f"record {record} is bad")
        media = [Media("image", bytes([record]) * record, f"{record}.v2.PNG"), Media("audio", b"RIFF", "ä.wav")]
        media = media[: record % 3]
        chat = [{"role": "user", "content": [{"type": m.kind, "media": i} for i, m in enumerate(media)]}]
        branches = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "ü\n<image>"}]] * (record % 2)
        return Sample(f"n_{record}", chat, media, branches, {"number": record, "nested": {"a": [1.5, None]}})


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_samples_come_back_identical(tmp_path):
    manifest = write_shards(Numbers(10), tmp_path, samples_per_shard=4)
    samples = ShardDataset(tmp_path)
    assert len(samples) == 10
    assert list(samples) == list(Numbers(10))
    assert [samples[index].key for index in (9, 0, 4, 3)] == ["n_9", "n_0", "n_4", "n_3"]
    assert pickle.loads(pickle.dumps(samples))[7] == samples[7]  # as a loader's worker gets it
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 2]
    assert (manifest["samples"], manifest["branches"]) == (10, 5)
    assert manifest["media"] == {"image": 6, "audio": 3, "video": 0}
    assert manifest == read_manifest(tmp_path)
    samples.verify()
    for index in (10, -1):
        with pytest.raises(IndexError):
            samples[index]


def test_media_files_are_read_into_the_shard(tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    sample = Sample("a", [], [Media("image", tmp_path / "a.png", "a.png")])
    write_shards([sample], tmp_path / "out")
    assert ShardDataset(tmp_path / "out")[0].media == [Media("image", b"pixels", "a.png")]


def test_plain_webdataset_reads_the_tars(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_shards(Numbers(7), tmp_path, samples_per_shard=4)
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    for mine, theirs in zip(Numbers(7), read, strict=True):
        assert theirs["__key__"] == mine.key
        described = json.loads(theirs["json"])
        assert described["messages"] == mine.messages
        assert described["branches"] == mine.branches
        assert [theirs[item["file"]] for item in described["media"]] == [item.data for item in mine.media]
    with tarfile.open(urls[0]) as tar:
        assert tar.getnames()[:4] == ["n_0.json", "n_1.json", "n_1.0.png", "n_2.json"]


def test_bytes_do_not_depend_on_workers(tmp_path):
    write_shards(AudioWorld(5), tmp_path / "one", samples_per_shard=2)
    write_shards(AudioWorld(5), tmp_path / "two", samples_per_shard=2, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    write_shards(Numbers(10), tmp_path / "whole", samples_per_shard=3)
    out = tmp_path / "broken"
    with pytest.raises(ValueError, match="record 7 is bad"):
        write_shards(Numbers(10, fail=7), out, samples_per_shard=3)
    assert [path.name for path in sorted(out.iterdir())] == [
        UNFINISHED,
        "quarantine.jsonl",
    ]  # nothing under a final name
    assert json.loads((out / "quarantine.jsonl").read_text()) == {"record": 7, "key": None, "cause": "record 7 is bad"}
    with pytest.raises(ValueError, match="interrupted; run it again"):
        ShardDataset(out)
    (out / UNFINISHED / ".chunk-000002.00.tar.99.tmp").write_bytes(b"half")  # what a kill leaves
    first = (out / UNFINISHED / "chunk-000000.00.tar").stat().st_mtime_ns
    damaged = bytearray((out / UNFINISHED / "chunk-000001.00.tar").read_bytes())
    damaged[600] ^= 1
    (out / UNFINISHED / "chunk-000001.00.tar").write_bytes(damaged)
    write_shards(Numbers(10), out, samples_per_shard=3)
    assert files(out) == files(tmp_path / "whole")
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first  # kept, not written again


def test_other_settings_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="record 4 is bad"):
        write_shards(Numbers(10, fail=4), tmp_path, samples_per_shard=3)
    with pytest.raises(ValueError, match="unfinished shards of other settings.*--overwrite"):
        write_shards(Numbers(10), tmp_path, samples_per_shard=2)
    write_shards(Numbers(10), tmp_path, samples_per_shard=3)
    with pytest.raises(ValueError, match="holds finished shards already"):
        write_shards(Numbers(10), tmp_path, samples_per_shard=3)
    (tmp_path / "mine.txt").write_text("kept")
    remove_shards(tmp_path)
    assert list(files(tmp_path)) == ["mine.txt"]


@pytest.mark.parametrize("byte", [0, 100, 130, 600, 1500])
def test_a_flipped_bit_is_noticed(tmp_path, byte):
    write_shards(Numbers(3), tmp_path)
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)
    samples = ShardDataset(tmp_path)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: offset \d+: sample n_\d: damaged"):
        list(samples)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: damaged \(SHA-256"):
        samples.verify()


def test_a_damaged_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no manifest.json"):
        ShardDataset(tmp_path)
    write_shards(Numbers(3), tmp_path)
    tar, index = tmp_path / "shard-000000.tar", tmp_path / "shard-000000.index.npy"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"shard-000000\.tar has [\d,]+ bytes, the manifest says"):
        ShardDataset(tmp_path)
    tar.unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.tar is missing"):
        ShardDataset(tmp_path)
    tar.write_bytes(whole)
    index.write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"index\.npy: damaged"):
        ShardDataset(tmp_path)[0]
    np.save(index, np.array([object()]), allow_pickle=True)  # an index is never unpickled
    for content in (index.read_bytes(), b"no index", b""):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.npy: not an index"):
            read_index(index)
    (tmp_path / MANIFEST).write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not a manifest of format"):
        ShardDataset(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        ShardDataset(tmp_path)


def test_only_regular_members_are_read():
    link = tarfile.TarInfo("a.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(ValueError, match="not a regular file"):
        decode_sample("a", link.tobuf(tarfile.USTAR_FORMAT))
    huge = tarfile.TarInfo("a.json")
    huge.size = 50 * 2**30 // 8
    with pytest.raises(ValueError, match="claims 6,710,886,400 bytes, of which 512 are there"):
        decode_sample("a", huge.tobuf(tarfile.USTAR_FORMAT) + bytes(512))
    with pytest.raises(ValueError, match="no tar header at byte 0"):
        decode_sample("a", b"x" * 512)
    with pytest.raises(ValueError, match="member 'a.json' is not of sample 'b'"):
        decode_sample("b", b"".join(encode_sample(Sample("a", []))))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "the source gave no samples"),
        ([Sample("a", []), Sample("a", [])], "two samples have the key 'a'"),
        ([Sample("a.b", [])], "sample key 'a.b'"),
        ([Sample("../a", [])], "sample key '../a'"),
        ([Sample("x" * 65, [])], "1 to 64"),
        ([Sample("a", [], [Media("image", b"", "a.exe")])], "'a.exe' has no suffix of kind image"),
        ([Sample("a", [], [Media("image", b"", "a.wav")])], "'a.wav' has no suffix of kind image"),
    ],
)
def test_samples_that_no_shard_can_hold(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        write_shards(samples, tmp_path)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("options", [{"samples_per_shard": 0}, {"workers": 0}])
def test_bad_sizes(tmp_path, options):
    with pytest.raises(ValueError, match="must be 1 or more"):
        write_shards(Numbers(), tmp_path, **options)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def parts():
        yield b"half"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_file(path, parts())
    assert files(tmp_path) == {"file": b"before"}
    write_file(path, [b"af", b"ter"])
    assert files(tmp_path) == {"file": b"after"}


def test_the_index_is_plain_numpy(tmp_path):
    write_shards(Numbers(3), tmp_path)
    index = np.load(tmp_path / "shard-000000.index.npy")
    assert index.dtype == INDEX_DTYPE
    assert index["key"].tolist() == [b"n_0", b"n_1", b"n_2"]
    assert (index["offset"][1:] == np.cumsum(index["length"])[:-1]).all()
