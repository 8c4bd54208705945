"""Published directories: what is missing, extra, misshapen, cut off, unknown or dangerous, each named."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mm
from mm import checkpoint
from mm.datasets.chat_template import ChatTemplate
from mm.decoder.decoder import Decoder
from mm.encoders.transformer import TransformerEncoder
from mm.export import export, main
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector
from mm.model import MultimodalModel, TowerConfig
from mm.parts import build
from mm.testing import tiny_tokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.missing import MissingTokenizer
from mm.types import Sample

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 7,
    "torch_dtype": "float32",
}


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under Llama's names, written down here once more and by hand."""
    width, hidden, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, hidden), f"{layer}self_attn.q_proj.weight": (3 * dim, width)}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (dim, width) for name in "kv"}
        shapes |= {f"{layer}self_attn.o_proj.weight": (width, 3 * dim)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write(path: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A directory; a change to None removes the setting."""
    path.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors(CONFIG) if weights is None else weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "llama")


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        mm.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


IDS = torch.tensor([[3, 50, 96, 11, 4]])


def logits(model: MultimodalModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_directory_becomes_a_model_in_eval_mode(path: Path) -> None:
    model = mm.load(path)
    assert not model.training and logits(model).shape == (1, 5, 97)
    assert model.decoder.get_parameter("layers.1.mixer.qkv.weight").shape == (30, 12)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clever_trick": 2}, "clever_trick = 2: this setting is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: this setting is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type = 'dynamic': must be default"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size = 'many': must be a whole number"),
        ({"model_type": "falcon"}, "model_type 'falcon' is not supported"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "llama", **changes)
    assert refused(path).startswith(f"{path / 'config.json'}: {message}")


def test_tensors_that_do_not_fit_are_named_with_their_shapes(path: Path) -> None:
    weights = tensors(CONFIG)
    name = "model.layers.1.self_attn.k_proj.weight"
    write(path, {key: x for key, x in weights.items() if key != name})
    assert refused(path) == f"{path}: missing tensor {name}, of shape (6, 12)"
    write(path, weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(20, 12)})
    assert refused(path) == f"{path}: unexpected tensor model.layers.2.mlp.up_proj.weight, of shape (20, 12)"
    write(path, weights | {name: torch.zeros(12, 6)})
    file = path / "model.safetensors"
    assert refused(path) == f"{file}: tensor {name} has shape (12, 6), the config's model needs (6, 12)"
    write(path, weights, num_key_value_heads=3)  # the config is wrong, not the file
    assert "has shape (6, 12), the config's model needs (18, 12)" in refused(path)


def test_buffers_of_old_files_are_passed_over(path: Path) -> None:
    write(path, tensors(CONFIG) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    mm.load(path)


def test_truncated_and_damaged_files(path: Path) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    for cut in (data[:-50], data[:40], b""):
        file.write_bytes(cut)
        assert refused(path).startswith(f"{file}: not a whole safetensors file")
    file.unlink()
    assert refused(path).startswith(f"{path}: no weights: neither model.safetensors nor pytorch_model.bin")
    (path / "config.json").write_text("{")
    assert refused(path).startswith(f"{path / 'config.json'}: not JSON")
    (path / "config.json").write_text("[]")
    assert refused(path) == f"{path / 'config.json'}: must be a JSON object"


def shard(path: Path) -> None:
    """Splits the directory's one file into two, with an index."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_sharded_files(path: Path) -> None:
    before = logits(mm.load(path))
    shard(path)
    assert torch.equal(logits(mm.load(path)), before)
    index = path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"ghost": "model-00001-of-00002.safetensors"}}))
    assert "tensor ghost is missing, which model.safetensors.index.json places there" in refused(path)
    for bad in ("../elsewhere.safetensors", "model-3.safetensors"):
        index.write_text(json.dumps({"weight_map": where | {"ghost": bad}}))
        assert refused(path) == f"{index}: it names the file {bad}, which is not there"
    index.write_text("{}")
    assert refused(path).startswith(f"{index}: not an index of weight files")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_exactly(path: Path, dtype: torch.dtype) -> None:
    weights = {name: x.to(dtype) for name, x in tensors(CONFIG).items()}
    model = mm.load(write(path, weights))
    embedding = model.decoder.embed.weight
    assert embedding.dtype == torch.float32 and torch.equal(embedding, weights["model.embed_tokens.weight"].float())


def test_tied_heads(path: Path) -> None:
    weights = tensors(CONFIG)
    head = weights.pop("lm_head.weight")
    model = mm.load(write(path, weights, tie_word_embeddings=True))
    assert model.decoder.head.weight is model.decoder.embed.weight
    assert torch.equal(model.decoder.embed.weight, weights["model.embed_tokens.weight"])
    mm.load(
        write(
            path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True
        )
    )
    write(path, weights | {"lm_head.weight": head}, tie_word_embeddings=True)
    assert "tensor lm_head.weight differs from the tensor that the config ties it to" in refused(path)
    assert "missing tensor lm_head.weight" in refused(write(path, weights))


def test_a_base_model_saved_without_its_head(path: Path) -> None:
    weights = {name.removeprefix("model."): x for name, x in tensors(CONFIG).items() if name != "lm_head.weight"}
    model = mm.load(write(path, weights, tie_word_embeddings=True))
    assert torch.equal(model.decoder.embed.weight, weights["embed_tokens.weight"])


class Runs:
    """What a pickle of a stranger may hold."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def test_a_state_dict_is_read_and_no_pickle_runs(path: Path) -> None:
    before, file = logits(mm.load(path)), path / "pytorch_model.bin"
    (path / "model.safetensors").unlink()
    torch.save(tensors(CONFIG), file)
    assert torch.equal(logits(mm.load(path)), before)
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(path).startswith(f"{file}: not a whole state dict")
    proof = path / "proof"
    for save in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        save({"model.norm.weight": Runs(proof)}, file)
        assert refused(path).startswith(f"{file}: not a whole state dict")
        assert not proof.exists()
    torch.save({"epoch": 3, **tensors(CONFIG)}, file)
    assert refused(path) == f"{file}: not a state dict: it holds more than named tensors"


def test_without_a_tokenizer_ids_work_and_text_says_why_not(path: Path) -> None:
    model = mm.load(path)
    assert model.generate(IDS, max_new_tokens=3).shape[1] <= 3
    for use in (lambda: model.tokenizer.encode("hi"), lambda: model.tokenizer.decode([3])):
        with pytest.raises(ValueError, match=f"no tokenizer: {path} has no tokenizer.json"):
            use()


def test_with_a_tokenizer(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = tokenizer.vocab_size + 3  # padded, as published models are
    weights = tensors(CONFIG | {"vocab_size": size})
    tokenizer.save(write(path, weights, vocab_size=size))
    model = mm.load(path)
    assert model.tokenizer.encode("red shape") == tokenizer.encode("red shape")
    refusal = refused(write(path, vocab_size=97))
    assert refusal == f"{path / 'config.json'}: vocab_size 97 is below the {tokenizer.vocab_size} ids of its tokenizer"


def test_a_chat_template_comes_along_and_stays(path: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(write(path, tensors(CONFIG | {"vocab_size": 303}), vocab_size=303))
    source = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    settings = {"chat_template": source, "bos_token": {"content": "<|system|>"}, "eos_token": "<|end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = mm.load(path)
    chat = Sample("1", [{"role": "user", "content": "red <|end|>"}])
    ids = model.template.render(chat, model.tokenizer).ids.tolist()
    spelled = [tokenizer.special(name) for name in ("<|system|>", "<|user|>")]
    assert ids == [*spelled, *tokenizer.encode("red <|end|>"), tokenizer.special("<|end|>")]
    checkpoint.save(model, tmp_path / "own")
    own = mm.load(tmp_path / "own")
    assert own.template.render(chat, own.tokenizer).ids.tolist() == ids
    assert own.template.stop_ids(own.tokenizer) == {7}
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")  # the newer place wins
    assert mm.load(path).template.render(chat, tokenizer).ids.tolist() == tokenizer.encode("red <|end|>")
    (path / "tokenizer_config.json").write_text("{")
    assert refused(path).startswith(f"{path / 'tokenizer_config.json'}: not JSON")


def test_generation_ends_where_the_files_say(path: Path) -> None:
    model = mm.load(path)
    endless = model.generate(IDS, max_new_tokens=8, stop=())[0].tolist()
    assert model.template.stop_ids(model.tokenizer) == {7}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [endless[2], 1]}))
    model = mm.load(path)
    assert model.generate(IDS, max_new_tokens=8)[0].tolist() == endless[: endless.index(endless[2]) + 1]


def test_an_unwritten_pad_or_random_global_state_changes_nothing(path: Path) -> None:
    torch.manual_seed(0)
    one = logits(mm.load(path))
    torch.manual_seed(1)
    assert torch.equal(logits(mm.load(path)), one)


def test_export_writes_the_files_that_came(path: Path, tmp_path: Path) -> None:
    (path / "generation_config.json").write_text('{"eos_token_id": 9}')
    export(mm.load(path), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 9}'
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {key: value for key, value in CONFIG.items() if key != "torch_dtype"} | {"dtype": "float32"}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors(CONFIG).keys()
    assert all(torch.equal(x, written[name]) for name, x in tensors(CONFIG).items())


def test_export_after_training_and_through_our_own_directory(path: Path, tmp_path: Path) -> None:
    model = mm.load(path)
    with torch.no_grad():
        model.decoder.norm.get_parameter("weight").add_(1)
    checkpoint.save(model, tmp_path / "own")
    assert main(["--to", "hf", "--dtype", "bfloat16", str(tmp_path / "own"), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], (tensors(CONFIG)["model.norm.weight"] + 1).bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_shards(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mm.load(path)
    monkeypatch.setattr("mm.export.SHARD_BYTES", 5000)
    export(model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(mm.load(tmp_path / "out")), logits(model))
    monkeypatch.undo()
    export(model, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_export_names_what_was_swapped(path: Path, tmp_path: Path) -> None:
    model = mm.load(path)
    assert model.config is not None
    mixer = model.config["init_args"]["decoder"]["init_args"]["mixers"]["full"]["init_args"]
    mixer["backend"] = "flash"  # computed otherwise, and the same
    export(model, tmp_path / "out")
    mixer["window"] = 4
    with pytest.raises(ValueError, match=r"no longer what LlamaForCausalLM .*: decoder.mixers.full.window: None -> 4$"):
        export(model, tmp_path / "out")
    model.origin = None
    with pytest.raises(ValueError, match="did not come from a published checkpoint"):
        export(model, tmp_path / "out")


def test_import_makes_a_directory_of_ours(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.cli import main as cli

    assert cli(["import", str(path), str(tmp_path / "own")]) == 0
    assert torch.equal(logits(mm.load(tmp_path / "own")), logits(mm.load(path)))
    for argv, message in (
        (["import", str(path), str(path)], "is the source itself"),
        (["export", "--to", "hf", str(tmp_path / "own"), str(tmp_path / "own")], "is the source itself"),
        (["export", "--to", "hf", str(path), str(tmp_path / "own")], "holds a model of the other format"),
        (["import", str(tmp_path / "own"), str(path)], "holds a model of the other format"),
        (["export", "--to", "hf", str(tmp_path / "none"), str(tmp_path / "out")], "no such model directory"),
    ):
        capsys.readouterr()
        assert cli(argv) == 2
        assert message in capsys.readouterr().err


def test_a_chat_needs_a_template(path: Path) -> None:
    from mm.generation.engine import generate

    model = mm.load(path)
    with pytest.raises(ValueError, match="sample 1: .*template"):
        generate(model, [Sample("1", [{"role": "user", "content": "hi"}])])
    model.template = ChatTemplate()
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(model, [Sample("1", [{"role": "user", "content": "hi"}])])


def test_a_multimodal_model_starts_from_a_published_decoder(path: Path) -> None:
    decoder = mm.load(path).config["init_args"]["decoder"]["init_args"]  # type: ignore[index]

    def model(bridge: Any = LinearProjector, **changes: Any) -> MultimodalModel:
        image = TowerConfig(ImageTokenizer(patch=2), bridge, partial(TransformerEncoder, width=8, layers=1, heads=2))
        tree = {"class_path": "mm.decoder.decoder.Decoder", "init_args": decoder | {"cross_heads": 3} | changes}
        return MultimodalModel(MissingTokenizer(97), build(tree, Decoder), {"image": image}).eval()

    for bridge in (LinearProjector, GatedCrossAttentionBridge):  # in the sequence, and beside it with layers of its own
        multimodal = model(bridge)
        checkpoint.load_weights(multimodal, path)
        assert torch.equal(logits(multimodal), logits(mm.load(path)))
    other = decoder["mixers"]["full"]["init_args"] | {"qk_norm": True}
    mixers = {"full": {"class_path": decoder["mixers"]["full"]["class_path"], "init_args": other}}
    with pytest.raises(ValueError, match=r"it has tensor layers.0.mixer.k_norm.weight, which the family lacks \(and 3"):
        checkpoint.load_weights(model(mixers=mixers), path)
    with pytest.raises(
        ValueError, match=r"tensor model.embed_tokens.weight has shape \(97, 12\), the config's model needs \(99, 12"
    ):
        checkpoint.load_weights(model(vocab_size=99), path)
