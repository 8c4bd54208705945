"""A model directory: what is written comes back, and what is damaged is named, in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import mm
from mm import checkpoint
from mm.model import MultimodalModel
from mm.parts import build
from mm.testing import model_batch, spread, tiny_media, tiny_tokenizer

# A model as configs spell it: two towers that share an encoder, a bridge beside the sequence, a dense and an MoE layer.
CONFIG = """
class_path: mm.model.MultimodalModel
init_args:
  embedding_dim: 8
  towers:
    image:
      tokenizer: {class_path: mm.tokenizers.image.ImageTokenizer, init_args: {patch: 2, max_tokens: 16}}
      encoder: {class_path: mm.encoders.transformer.TransformerEncoder, init_args: {width: 16, layers: 1, heads: 2}}
      bridge: {class_path: mm.fusion.projector.MLPProjector, init_args: {shuffle: [1, 2, 2]}}
    video:
      tokenizer:
        class_path: mm.tokenizers.video.VideoTokenizer
        init_args: {image: {class_path: mm.tokenizers.image.ImageTokenizer, init_args: {patch: 2}}}
      encoder_of: image
      bridge: {class_path: mm.fusion.cross_attention.GatedCrossAttentionBridge}
  decoder:
    class_path: mm.decoder.decoder.Decoder
    init_args:
      width: 16
      cross_heads: 2
      mixers: {full: {class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {heads: 2}}}
      ffns:
        dense: {class_path: mm.decoder.ffn.dense.GatedFFN, init_args: {hidden: 24}}
        moe: {class_path: mm.decoder.ffn.moe.SparseMoE, init_args: {hidden: 8, num_experts: 4}}
      layers: [{pattern: [full/dense, full/moe]}]
"""


def make(tokenizer: Path, **changes: Any) -> MultimodalModel:
    config = yaml.safe_load(CONFIG)
    config["init_args"]["tokenizer"] = str(tokenizer)
    config["init_args"]["decoder"]["init_args"] |= changes
    model = spread(build(config, MultimodalModel)).eval()
    model.config = config
    model.decoder.get_submodule("layers.1.ffn.router").get_buffer("bias")[2] = 0.5  # a buffer that training moves
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer().save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer: Path) -> MultimodalModel:
    return make(tokenizer)


@pytest.fixture
def saved(model: MultimodalModel, tmp_path: Path) -> Path:
    checkpoint.save(model, tmp_path / "model")
    return tmp_path / "model"


def logits(model: MultimodalModel) -> torch.Tensor:
    media = {"image": [tiny_media(model, "image", (1, 4, 4))], "video": [tiny_media(model, "video", (2, 2, 2))]}
    rows = [[(1, 0, "20"), (1, 0, "image"), (1, 0, "video"), (1, 0, "21")]]
    return model(model_batch(model, rows, media)).logits


def stored(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the directory's files."""
    shapes = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                assert name not in shapes
                shapes[name] = tuple(tensors.get_tensor(name).shape)
    return shapes


def sign(path: Path) -> None:
    """Writes the present files' hashes into the manifest, as whoever damaged them on purpose would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["sha256"]}
    checkpoint.write_manifest(path, manifest)


def refused(path: Path) -> str:
    """The message of the ValueError that loading gives: one line."""
    with pytest.raises(ValueError) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_saved_comes_back(model: MultimodalModel, saved: Path, tmp_path: Path) -> None:
    loaded = mm.load(saved)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    bias = loaded.decoder.get_submodule("layers.1.ffn.router").get_buffer("bias")
    assert bias.tolist() == [0, 0, 0.5, 0]
    assert loaded.tokenizer.encode("red shape") == model.tokenizer.encode("red shape")
    checkpoint.save(loaded, tmp_path / "again")  # and a loaded model knows enough to be saved, anywhere
    os.rename(saved, tmp_path / "moved")
    assert torch.equal(logits(mm.load(tmp_path / "again")), logits(model))
    assert torch.equal(logits(mm.load(str(tmp_path / "moved"))), logits(model))


def test_the_directory_is_readable_by_anyone(model: MultimodalModel, saved: Path) -> None:
    names = {"model.safetensors", "config.yaml", "tokenizer.json", "manifest.json"}
    assert {path.name for path in saved.iterdir()} == names
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["sha256"]) == names - {"manifest.json"}
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    assert yaml.safe_load((saved / "config.yaml").read_text())["init_args"]["tokenizer"] == "tokenizer.json"


def test_what_is_shared_is_stored_once_and_comes_back_shared(model: MultimodalModel, saved: Path) -> None:
    shapes = stored(saved)
    assert set(shapes) == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert "decoder.embed.weight" in shapes and "decoder.head.weight" not in shapes
    assert any(name.startswith("towers.image.encoder.") for name in shapes)
    assert not any(name.startswith("towers.video.encoder.") for name in shapes)
    loaded = mm.load(saved)
    assert loaded.decoder.head.weight is loaded.decoder.embed.weight
    assert loaded.tower("video").encoder is loaded.tower("image").encoder


def test_the_file_that_an_encoder_started_from_is_not_needed_again(tokenizer: Path, tmp_path: Path) -> None:
    weights = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    config = yaml.safe_load(CONFIG)
    config["init_args"]["tokenizer"] = str(tokenizer)
    config["init_args"]["towers"]["image"] |= {
        "tokenizer": {"class_path": "mm.tokenizers.image.ImageTokenizer", "init_args": {"patch": 16}},
        "encoder": {
            "class_path": "mm.encoders.timm_vision.TimmEncoder",
            "init_args": {"name": "test_resnet", "weights": str(weights), "layer": -2},
        },
    }
    del config["init_args"]["towers"]["video"]
    model = build(config, MultimodalModel)
    model.config = config
    checkpoint.save(model, tmp_path / "model")
    weights.unlink()
    found = checkpoint.load(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert config["init_args"]["towers"]["image"]["encoder"]["init_args"]["weights"] == str(weights)


def test_large_weights_are_sharded(model: MultimodalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    checkpoint.save(model, path)
    whole = stored(path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    checkpoint.save(model, path)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert stored(path) == whole
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(whole) and set(index.values()) == set(files)
    assert torch.equal(logits(mm.load(path)), logits(model))


def test_saving_over_another_number_of_files_leaves_none_of_the_old(
    model: MultimodalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index left behind would send the reader to the old weights, whose hashes nobody checks."""
    other = spread(copy.deepcopy(model))
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "SHARD_BYTES", 20_000)
        checkpoint.save(other, tmp_path)
    checkpoint.save(model, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(mm.load(tmp_path)), logits(model))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_cut_off_write_leaves_no_half_file(
    call: str, model: MultimodalModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = saved / "notes.txt"
    checkpoint.write_atomically(target, b"old")
    before = sorted(path.name for path in saved.iterdir())

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and sorted(path.name for path in saved.iterdir()) == before
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(model, saved)
    monkeypatch.undo()
    assert not list(saved.glob(".*"))
    assert "no manifest.json" in refused(saved)  # so nobody takes the mixture of old and new for a model


def test_other_models_weights_are_refused_by_name(model: MultimodalModel, saved: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"model: missing tensor decoder.layers.0.mixer.out.bias and 3 more$"):
        checkpoint.load_weights(make(tokenizer, mixers=attention(heads=2, bias=True)), saved)
    untied = make(tokenizer, tie_embeddings=False)
    with pytest.raises(ValueError, match=r"model: missing tensor decoder.head.weight$"):
        checkpoint.load_weights(untied, saved)
    checkpoint.save(untied, saved)
    with pytest.raises(ValueError, match=r"model: unexpected tensor decoder.head.weight$"):
        checkpoint.load_weights(model, saved)


def test_another_shape_is_refused_with_both_and_nothing_is_copied(saved: Path, tokenizer: Path) -> None:
    other = make(tokenizer, mixers=attention(heads=2, kv_heads=1))
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"tensor decoder.layers.0.mixer.qkv.weight has shape \(48, 16\), .* \(32, 16"):
        checkpoint.load_weights(other, saved)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def attention(**options: Any) -> dict[str, Any]:
    return {"full": {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": options}}


def test_truncated_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(saved).startswith(f"{file}: its SHA-256 is not the manifest's")
    sign(saved)
    assert refused(saved).startswith(f"{file}: not a whole safetensors file")
    file.write_bytes(b"")
    sign(saved)
    assert refused(saved).startswith(f"{file}: not a whole safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "tokenizer.json"])
def test_one_changed_byte_or_a_missing_file(name: str, saved: Path, model: MultimodalModel) -> None:
    file = saved / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # in the weights themselves: safetensors alone would not notice
    file.write_bytes(data)
    assert refused(saved) == f"{file}: its SHA-256 is not the manifest's; the file was changed or damaged"
    with pytest.raises(ValueError, match="SHA-256"):
        checkpoint.load_weights(model, saved)
    file.unlink()
    assert refused(saved) == f"{file}: the manifest names this file, and it is missing"


def test_a_damaged_manifest(saved: Path, tmp_path: Path) -> None:
    file = saved / "manifest.json"
    whole = file.read_bytes()
    for data in (b"{", b"", b"\xff\xfe"):
        file.write_bytes(data)
        assert refused(saved).startswith(f"{file}: not JSON")
    for data in (b"[]", b"{}", b'{"sha256": 3}', b'"text"'):
        file.write_bytes(data)
        assert refused(saved).startswith(f"{file}: not the manifest of a model directory")
    file.write_bytes(whole.replace(b'"parameters": ', b'"parameters": 1', 1))
    assert refused(saved).startswith(f"{file}: damaged")
    file.unlink()
    assert refused(saved).startswith(f"{saved}: not a model directory")
    assert refused(tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such model directory"


def test_without_weights(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["sha256"]["model.safetensors"]
    checkpoint.write_manifest(saved, manifest)
    (saved / "model.safetensors").unlink()
    assert refused(saved) == f"{saved}: no model.safetensors and no model.safetensors.index.json"


def test_a_config_that_does_not_fit_is_named_with_the_key(saved: Path) -> None:
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["init_args"]["decoder"]["init_args"]["norm_epz"] = 1.0
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    sign(saved)
    reason = "mm.model.MultimodalModel: decoder: Option 'norm_epz' is not accepted"
    assert refused(saved) == f"{saved / 'config.yaml'}: {reason}"


def test_a_strangers_config_runs_no_code(saved: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((saved / "config.yaml").read_text())
    proof = tmp_path / "proof"
    config["init_args"]["decoder"] = {"class_path": "os.system", "init_args": {"command": f"touch {proof}"}}
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    sign(saved)
    with pytest.raises(ValueError, match=r"os\.system"):
        checkpoint.load(saved)
    assert not proof.exists()


def test_a_model_without_a_config_cannot_be_saved(model: MultimodalModel, tmp_path: Path) -> None:
    model = copy.deepcopy(model)
    model.config = None
    with pytest.raises(ValueError, match="does not know its config"):
        checkpoint.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
