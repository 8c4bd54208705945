"""Reading shards: what is damaged is named, few files are open, and remote ones are kept in bounded space."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from mm.datasets import shard_cache, shard_reader
from mm.datasets.shard_cache import ShardCache, ShardError
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.types import Media, Sample


def samples(number: int) -> list[Sample]:
    return [
        Sample(f"s_{i:03}", [{"role": "user", "content": str(i)}], [Media("image", bytes([i]) * 3000, "a.png")])
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "shards"
    write_shards(samples(24), path, samples_per_shard=3)
    return path


def local(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if not file.name.startswith(".lock"))


def test_few_shards_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "MAX_OPEN", 2)
    data = ShardDataset(folder)
    assert [data[i].key for i in (0, 9, 20, 1, 10)] == ["s_000", "s_009", "s_020", "s_001", "s_010"]
    assert list(data._open) == [0, 3]  # the last two of them


def test_says_where_a_sample_lies(folder: Path) -> None:
    found = ShardDataset(folder).locate(4)
    assert found["shard"] == f"{folder}/shard-000001.tar" and found["key"] == "s_004"
    with (folder / "shard-000001.tar").open("rb") as tar:
        tar.seek(found["offset"])
        assert tar.read(11) == b"s_004.json\0"


def test_blocks_are_whole_shards(folder: Path) -> None:
    assert ShardDataset(folder).block() == 1002  # 334 shards of 3


@pytest.mark.parametrize("byte", [20, 130, 140, 200, 230])
def test_a_damaged_index_ends_the_run(tmp_path: Path, byte: int) -> None:
    write_shards(samples(3), tmp_path / "d")
    index = tmp_path / "d" / "shard-000000.index.npy"
    data = bytearray(index.read_bytes())
    data[byte] ^= 1
    index.write_bytes(data)
    with pytest.raises(ShardError, match=r"index\.npy: damaged"):
        ShardDataset(tmp_path / "d")[0]


def test_no_wrong_bytes_of_a_flipped_tar(tmp_path: Path) -> None:
    """One bit at a time over the whole shard: every sample is either the right one or an error."""
    want = samples(2)
    write_shards(want, tmp_path / "d")
    path = tmp_path / "d" / "shard-000000.tar"
    data = path.read_bytes()
    for bit in range(0, len(data) * 8, 997):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        reader, damaged = ShardDataset(tmp_path / "d"), 0
        for index in range(2):
            try:
                assert reader[index] == want[index]
            except ValueError as error:
                assert "damaged (CRC-32" in str(error)
                damaged += 1
        assert damaged == 1 or bit // 8 >= len(data) - 1024  # the end of the tar holds no sample


# Remote


class Counting(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    Counting.asked = []
    handler = functools.partial(Counting, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", Counting.asked
        httpd.shutdown()


def test_reads_from_a_web_server_and_downloads_once(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    data = pickle.loads(pickle.dumps(ShardDataset(url, ShardCache(str(tmp_path), 1))))
    assert [data[i] for i in range(6)] == samples(6)
    assert data.locate(3)["shard"] == f"{url}/shard-000001.tar"
    again = ShardDataset(url, ShardCache(str(tmp_path), 1))
    assert again[3] == samples(4)[3]
    assert sum(path.endswith("shard-000001.tar") for path in asked) == 1


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_cache_keeps_within_its_bound(folder: Path, tmp_path: Path, scheme: str) -> None:
    url = f"file://{folder}"
    if scheme == "memory":
        url = "memory://bucket/shards"
        for path in folder.iterdir():
            fsspec.filesystem("memory").pipe(f"/bucket/shards/{path.name}", path.read_bytes())
    size = (folder / "shard-000000.tar").stat().st_size
    data = ShardDataset(url, ShardCache(str(tmp_path), 2.9 * size / 1e9))
    for index in [*range(24), 0, 23, 5]:
        assert data[index] == samples(24)[index]
        assert local(tmp_path) <= 2.9 * size
    assert local(tmp_path) > size


def test_the_least_recently_used_goes(folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).write_bytes(bytes(1000))
    for number, when in enumerate((30, 10, 20)):
        os.utime(tmp_path / str(number), (when, when))
    ShardCache(str(tmp_path), 3000 / 1e9).make_room(1500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]
    with pytest.raises(ShardError, match="5,000 bytes is more than the cache holds"):
        ShardCache(str(tmp_path), 3000 / 1e9).make_room(5000)


def test_remote_failures_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0,))
    with pytest.raises(ShardError, match=r"memory://nowhere/manifest\.json: no such file"):
        ShardDataset("memory://nowhere", ShardCache(str(tmp_path / "c")))
    with pytest.raises(ShardError, match=r"http://127\.0\.0\.1:9/manifest\.json: not read in 2 tries"):
        ShardDataset("http://127.0.0.1:9", ShardCache(str(tmp_path / "c")))
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        data = path.read_bytes()
        store.pipe(f"/bad/{path.name}", data[:-1] + b"x" if path.name == "shard-000001.tar" else data)
    remote = ShardDataset("memory://bad", ShardCache(str(tmp_path / "c")))
    assert remote[0] == samples(1)[0]
    with pytest.raises(ShardError, match=r"shard-000001\.tar: not read in 2 tries: .* SHA-256"):
        remote[3]
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_a_killed_download_is_swept_for_room(tmp_path: Path) -> None:
    (tmp_path / ".abc.1.tmp").write_bytes(bytes(2000))  # nobody holds its lock
    ShardCache(str(tmp_path), 3000 / 1e9).make_room(2000)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache\.gigabytes=0"):
        ShardCache(gigabytes=0)
