"""The catalog of sources, and what all of them have in common. Each has its own tests in sources/."""

import ast
import json
import pickle
import re
from itertools import islice
from pathlib import Path

import pytest

from mm.datasets.catalog import FOLDER, defaults, helps, names, open_source, source_class
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.datasets.source import Source
from mm.datasets.sources.coco_captions import COCOCaptions
from mm.datasets.sources.folder import Folder
from mm.datasets.sources.llava import LLaVA
from mm.datasets.sources.openmoji import OpenMoji
from mm.datasets.sources.vqav2 import VQAv2
from mm.datasets.sources.world_audio import AudioWorld


@pytest.fixture
def root(tmp_path):
    """A folder with an image in it."""
    (tmp_path / "a.png").write_bytes(b"pixels")
    return tmp_path


def dump(path: Path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("name", names())
def test_every_source_keeps_the_contract(name):
    cls = source_class(name)
    assert issubclass(cls, Source)
    assert re.fullmatch(r"\w.{20,110}\.", helps()[name])  # a line of help
    assert cls.__doc__
    assert "**" not in str(defaults(name))
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not any(module.startswith("mm.datasets.sources") for module in imported)  # one file a source


@pytest.mark.parametrize("name", ["easy_vqa", "openmoji", "world_audio", "world_video"])
def test_embedded_sources_repeat_and_survive_shards(name, tmp_path):
    source = open_source(name)
    samples = list(islice(source, 3))
    assert samples == list(islice(pickle.loads(pickle.dumps(source)), 3))
    write_shards(source, tmp_path, limit=3)
    assert list(ShardDataset(tmp_path)) == samples
    assert source.fingerprint()


def test_strings_become_the_types_of_the_constructor(root):
    source = open_source("world_audio", n="7", branches="no", split="test")
    assert isinstance(source, AudioWorld)
    assert (source.n, source.branches, source.split) == (7, False, "test")
    source = open_source("openmoji", held_out="0.5")
    assert isinstance(source, OpenMoji)
    assert source.held_out == 0.5
    dump(root / "metadata.jsonl", {"text": "x", "u": 1, "v": 2})
    source = open_source(f"folder:{root}", keep="u, v", split="none")
    assert isinstance(source, Folder)
    assert (source.root, source.keep, source.split) == (root, ("u", "v"), None)


def test_bare_paths_are_recognised(root):
    captions = dump(root / "captions_val.json", {"images": [], "annotations": []})
    llava = dump(root / "chat.json", [{"conversations": []}])
    questions = dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": []})
    assert isinstance(open_source(str(captions)), COCOCaptions)
    assert isinstance(open_source(str(llava)), LLaVA)
    assert isinstance(open_source(str(questions)), VQAv2)
    dump(root / "metadata.jsonl", {"text": "x"})
    with pytest.raises(ValueError, match=r"several formats \(folder, vqav2\); say which"):
        open_source(str(root))
    with pytest.raises(ValueError, match="no known format"):
        open_source(str(root / "a.png"))
