"""Tars of others: what WebDataset wrote is read; what is evil is refused by name, and never runs."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mm.cli import main
from mm.datasets.manifest import MANIFEST, read_manifest, write_manifest
from mm.datasets.shard_format import INDEX_DTYPE, decode_sample
from mm.datasets.shard_index import index_shards
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.datasets.source import sha256_file
from mm.types import Media, Sample

MARKER = "the-shard-ran-code"


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (open, (str(self.folder / MARKER), "w"))


def member(name: str, data: bytes = b"", **changes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def tar(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


def test_shards_of_webdataset_are_read_after_index(tmp_path, capsys):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "wds-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"pic{number:03d}", "png": b"\x89PNG" + bytes([number]), "txt": f"picture {number}"}
            )
        writer.write({"__key__": "last", "wav": b"RIFF", "json": {"caption": "a sound", "language": "en"}})
    assert main(["shard", "--index", str(tmp_path), "--workers", "1"]) == 0
    assert "6 samples (5 image, 1 audio) in 3 shards" in " ".join(capsys.readouterr().err.split())
    samples = ShardDataset(tmp_path)
    samples.verify()
    assert samples[3].media == [Media("image", b"\x89PNG\x03", "pic003.png")]
    assert samples[3].messages == [
        {"role": "user", "content": [{"type": "image", "media": 0}]},
        {"role": "assistant", "content": "picture 3"},
    ]
    assert samples[5].meta == {"caption": "a sound", "language": "en"}
    assert samples[5].messages[1]["content"] == "a sound"


def test_our_own_tars_are_indexed_to_the_same_bytes(tmp_path):
    write_shards([Sample(f"a{n}", [], [Media("image", b"x" * n, "x.png")]) for n in range(5)], tmp_path)
    index = tmp_path / "shard-000000.index.npy"
    before = index.read_bytes()
    index.write_bytes(b"damaged")
    manifest = index_shards(tmp_path)  # repairs
    assert index.read_bytes() == before
    assert manifest == read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    index.unlink()
    index_shards(tmp_path)  # from nothing
    assert index.read_bytes() == before
    index.unlink()
    with (tmp_path / "shard-000000.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"?")
    with pytest.raises(ValueError, match="damaged, so its index cannot be made"):
        index_shards(tmp_path)


def test_what_tar_itself_writes_is_read(tmp_path):
    """PAX headers with long names and fractions of seconds, folders, and GNU's long names."""
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as file:
            folder = tarfile.TarInfo(f"d{number}")
            folder.type = tarfile.DIRTYPE
            file.addfile(folder)
            for name, data in (("a.txt", b"one"), (f"a.{'x' * 90}.png", b"pixels"), ("b.txt", b"two")):
                info = tarfile.TarInfo(f"d{number}/{name}")
                info.size, info.mtime = len(data), 1700000000.25
                file.addfile(info, io.BytesIO(data))
    index_shards(tmp_path)
    samples = list(ShardDataset(tmp_path))
    assert [sample.key for sample in samples] == ["d0/a", "d0/b", "d1/a", "d1/b", "d2/a", "d2/b"]
    assert [sample.media[0].data for sample in samples[::2]] == [b"pixels"] * 3
    assert [sample.messages[-1]["content"] for sample in samples] == ["one", "two"] * 3


EVIL = {
    "pickle": (member("a.txt", b"fine") + member("a.pyd", b"PICKLE"), "a.pyd.*'.pyd' is not read.*pickle"),
    "torch": (member("a.pth", b"PICKLE"), "a.pth.*'.pth' is not read"),
    "numpy": (member("a.npy", b"PICKLE"), "a.npy.*'.npy' is not read"),
    "pipe": (member("pipe:touch MARKER.txt", b"x"), "member 'pipe:touch MARKER.txt'.*not KEY.SUFFIX"),
    "traversal": (member("../../escaped.txt", b"x"), r"member '\.\./\.\./escaped.txt'.*not KEY.SUFFIX"),
    "absolute": (member("/etc/cron.d/x.txt", b"x"), "member '/etc/cron.d/x.txt'.*not KEY.SUFFIX"),
    "symlink": (member("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'a.txt' is not a regular.*symbolic"),
    "hard link": (member("a.txt", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "'a.txt' is not a regular.*hard"),
    "device": (member("a.txt", type=tarfile.CHRTYPE), "'a.txt' is not a regular file but a device"),
    "fifo": (member("a.txt", type=tarfile.FIFOTYPE), "'a.txt' is not a regular file but a pipe"),
    "50 GiB": (member("a.txt", size=50 * 2**30), r"'a.txt' claims 53,687,091,200 bytes, of which [\d,]+ are there"),
    "no tar": (b"no tar at all" * 100, "no tar header at byte 0"),
    "deep": (member("a.json", b"[" * 100_000), "a.json' is not JSON"),
    "nothing": (member("a.cls", b"3"), "neither media nor text in cls"),
    "long key": (member("k" * 65 + ".txt", b"x"), "a key of 1 to 64"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_evil_shard_is_refused_by_name(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, message = EVIL[kind]
    bomb = pickle.dumps(Evil(tmp_path))
    content = content.replace(b"PICKLE", bomb[: len(b"PICKLE")]).replace(b"MARKER", MARKER[:6].encode())
    message = message.replace("MARKER", MARKER[:6])
    path = tar(tmp_path / "evil.tar", content)
    with pytest.raises(ValueError, match=rf"evil\.tar.*{message}"):
        index_shards(tmp_path)
    assert main(["shard", "--index", str(tmp_path), "--workers", "1"]) == 2
    assert "evil.tar" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]  # neither a marker nor an index nor a manifest


def test_an_evil_shard_with_an_index_of_its_own_is_refused_on_reading(tmp_path):
    """Whoever makes the tar may make its index and manifest too: reading must not rely on `--index`."""
    bomb = pickle.dumps(Evil(tmp_path))
    content = {
        "a": member("a.pyd", bomb),
        "b": member("b.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "c": member("c.txt", size=50 * 2**30),
        "d": member("../e.txt", b"x"),
        "e": member("e.json", json.dumps({"messages": [], "branches": [], "meta": {}, "media": [3]}).encode()),
    }
    import zlib

    entries, offset = [], 0
    for key, data in content.items():
        entries.append((key.encode(), offset, len(data), zlib.crc32(data)))
        offset += len(data)
    path = tar(tmp_path / "evil.tar", *content.values())
    np.save(tmp_path / "evil.index.npy", np.array(entries, INDEX_DTYPE))
    shard = {"file": "evil.tar", "index": "evil.index.npy", "samples": 5, "branches": 0, "media": {}}
    shard |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    shard["index_sha256"] = sha256_file(tmp_path / "evil.index.npy")
    write_manifest(tmp_path, {"settings": {}, "fingerprint": {}, "samples": 5, "bytes": 1, "shards": [shard]})
    samples = ShardDataset(tmp_path)
    wanted = ["'.pyd' is not read", "symbolic link", "claims 53,687,091,200", "is not of sample 'd'", "not a medium"]
    for number, message in enumerate(wanted):
        with pytest.raises(ValueError, match=message):
            samples[number]
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "a/b.tar", "", 3, None])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    shard = {"file": name, "index": "x", "samples": 1, "bytes": 1, "sha256": "0", "index_sha256": "0"}
    write_manifest(tmp_path, {"shards": [shard]})
    with pytest.raises(ValueError, match=r"manifest\.json: shard 0: key 'file': not a plain name"):
        read_manifest(tmp_path)


def test_keys_repeat_nowhere(tmp_path):
    tar(tmp_path / "a.tar", member("k.txt", b"one"))
    tar(tmp_path / "b.tar", member("k.txt", b"two"))
    with pytest.raises(ValueError, match="two samples have the key 'k'"):
        index_shards(tmp_path)
    with pytest.raises(ValueError, match="no \\*.tar in it"):
        index_shards(tmp_path / "..")
    with pytest.raises(ValueError, match="not a directory"):
        index_shards(tmp_path / "nowhere")


def test_text_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"member 'a\.txt': not UTF-8"):
        decode_sample("a", member("a.txt", b"\xff\xfe\xfa"))
