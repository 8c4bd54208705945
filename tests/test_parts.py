"""Parts from configs: one line swaps a part, a mistake is named, and nobody's config runs code of its choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from mm import allowlist, parts
from mm.decoder.attention.latent import LatentAttention
from mm.decoder.decoder import Decoder
from mm.decoder.norms import HeadNorm
from mm.decoder.positions import Alibi, Rotary
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import MLPProjector
from mm.fusion.resampler import PerceiverResampler
from mm.model import MultimodalModel
from mm.parts import build
from mm.testing import model_batch, spread, tiny_media, tiny_tokenizer
from mm.types import Bridge, Encoder, MediaTokenizer

MODEL = """
class_path: mm.model.MultimodalModel
init_args:
  tokenizer: TOKENIZER
  towers:
    image:
      tokenizer: {class_path: mm.tokenizers.image.ImageTokenizer, init_args: {patch: 2, max_tokens: 16}}
      encoder: {class_path: mm.encoders.transformer.TransformerEncoder, init_args: {width: 16, layers: 1, heads: 2}}
      bridge: BRIDGE
  decoder:
    class_path: mm.decoder.decoder.Decoder
    init_args:
      width: 24
      cross_heads: 2
      mixers: {full: {class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {heads: 2}}}
      ffns: {dense: {class_path: mm.decoder.ffn.dense.GatedFFN, init_args: {hidden: 24}}}
      layers: [{pattern: [full/dense], repeat: 2}]
"""
BRIDGES: dict[
    str, tuple[type[Bridge], int]
] = {  # the one line -> what it makes, positions of an image of 4 x 4 patches
    "{class_path: mm.fusion.projector.MLPProjector, init_args: {shuffle: [1, 2, 2]}}": (MLPProjector, 4),
    "{class_path: mm.fusion.resampler.PerceiverResampler, init_args: {queries: 3}}": (PerceiverResampler, 3),
    "{class_path: mm.fusion.cross_attention.GatedCrossAttentionBridge}": (GatedCrossAttentionBridge, 1),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer().save(tmp_path_factory.mktemp("tokenizer"))


def config(tokenizer: Path, bridge: str) -> dict[str, Any]:
    return yaml.safe_load(MODEL.replace("TOKENIZER", str(tokenizer)).replace("BRIDGE", bridge))


@pytest.mark.parametrize("bridge", BRIDGES)
def test_one_line_swaps_the_bridge(bridge: str, tokenizer: Path) -> None:
    model = spread(build(config(tokenizer, bridge), MultimodalModel)).eval()
    kind, positions = BRIDGES[bridge]
    assert type(model.tower("image").bridge) is kind
    assert model.media_specs()["image"].slot_length((1, 4, 4)) == positions
    has_cross = any(name.endswith("cross.gate") for name, _ in model.named_parameters())
    assert has_cross == (kind is GatedCrossAttentionBridge)
    outputs = []
    for seed in (0, 1):
        media = {"image": [tiny_media(model, "image", (1, 4, 4), seed)]}
        output = model(model_batch(model, [[(1, 0, "20"), (1, 0, "image"), (1, 0, "21")]], media))
        assert output.logits.shape[1] == 2 + positions
        outputs.append(output.logits[0, -1])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3  # the text sees the image, whichever way it comes


def test_other_kinds_of_parts_are_built_too() -> None:
    image = {"class_path": "mm.tokenizers.image.ImageTokenizer", "init_args": {"patch": 4}}
    tokenizer: MediaTokenizer = build(image, MediaTokenizer)
    assert tokenizer.dim == 48
    decoder = build(yaml.safe_load(MODEL)["init_args"]["decoder"], Decoder)
    assert len(decoder.layers) == 2 and decoder.width == 24


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "builtins.eval", "torch.hub.load", "torch.load"])
def test_class_paths_outside_the_allowlist_are_refused_and_nothing_runs(path: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for init_args in ({}, {"command": f"touch {proof}"}, {"args": ["touch", str(proof)]}):
        with pytest.raises(ValueError, match=path):
            build({"class_path": path, "init_args": init_args}, nn.Module)
    assert not proof.exists()


def test_a_package_that_is_not_allowed_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("import pathlib\npathlib.Path(__file__ + '.ran').touch()\nclass Part: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"stranger\.Part"):
        build({"class_path": "stranger.Part"}, nn.Module)
    assert not (tmp_path / "stranger.py.ran").exists()


def test_a_nested_class_path_is_checked_like_the_first(tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"os\.system"):
        build(config(tokenizer, "{class_path: os.system, init_args: {command: 'true'}}"), MultimodalModel)


@pytest.mark.parametrize(
    ("bridge", "match"),
    [
        ("{class_path: mm.fusion.projector.MLPProjector, init_args: {shufle: [1, 2, 2]}}", "shufle"),
        ("{class_path: mm.fusion.projector.MLPProjector, init_args: {shuffle: two}}", "two"),
        ("{class_path: mm.fusion.projector.NoSuchThing}", "NoSuchThing"),
        ("{class_path: mm.no_such_module.Thing}", "no_such_module"),
    ],
)
def test_what_is_wrong_is_named(bridge: str, match: str, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=match):
        build(config(tokenizer, bridge), MultimodalModel)


def test_a_part_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="MLPProjector"):
        build({"class_path": "mm.fusion.projector.MLPProjector", "init_args": {"in_dim": 2, "out_dim": 2}}, Encoder)


def test_built_parts_do_not_share_weights() -> None:
    tree = yaml.safe_load(MODEL)["init_args"]["decoder"]
    tree["init_args"]["vocab_size"] = 20
    a, b = build(tree, Decoder), build(tree, Decoder)
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}


class Choice:
    """Its default differs from what `Rotary` has by itself."""

    def __init__(self, positions: Rotary | Alibi = Rotary(3.0, pairs="adjacent"), norm: HeadNorm | None = None) -> None:
        self.positions, self.norm = positions, norm


class Inherited(Choice):
    def __init__(self, extra: int = 1, **more: Any) -> None:
        super().__init__(**more)


class Outer:
    @dataclass(frozen=True)
    class Inner:
        size: int = 2

    def __init__(self, inner: Outer.Inner = Inner(), name: str = "x") -> None:
        self.inner = inner


@pytest.mark.parametrize("kind", ["Choice", "Inherited"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Rotary(3.0, pairs="adjacent")),
        ({"positions": {"fraction": 0.5}}, Rotary(3.0, fraction=0.5, pairs="adjacent")),
        ({"positions": {"class_path": "mm.decoder.positions.Rotary"}}, Rotary(3.0, pairs="adjacent")),
        ({"positions": {"class_path": "mm.decoder.positions.Alibi"}}, Alibi()),
        ({"positions": {"class_path": "mm.decoder.positions.Alibi", "init_args": {}}}, Alibi()),
        ({"positions": "mm.decoder.positions.Alibi"}, Alibi()),
        ({"positions": {"max_bias": 4.0}}, Alibi(4.0)),
    ],
)
def test_what_is_left_out_is_as_in_the_arguments_default(
    kind: str, given: dict[str, Any], expected: Rotary | Alibi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowlist, "ALLOWED", (*allowlist.ALLOWED, __name__))
    part = build({"class_path": f"{__name__}.{kind}", "init_args": given}, Choice)
    assert part.positions == expected


@pytest.mark.parametrize("positions", [None, {"theta": 100.0}])
def test_latent_attention_stays_with_adjacent_pairs(positions: dict[str, Any] | None) -> None:
    given = {"width": 32, "heads": 2} | ({"positions": positions} if positions else {})
    part = build({"class_path": "mm.decoder.attention.latent.LatentAttention", "init_args": given}, LatentAttention)
    assert part.positions == Rotary(100.0 if positions else 1e4, pairs="adjacent")


def test_a_class_within_a_class_is_built_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowlist, "ALLOWED", (*allowlist.ALLOWED, __name__))
    inner = {"class_path": f"{__name__}.Outer.Inner", "init_args": {"size": 3}}
    assert build({"class_path": f"{__name__}.Outer", "init_args": {"inner": inner}}, Outer).inner == Outer.Inner(3)


@pytest.mark.parametrize("wrong", [{"shufle": [1, 2, 2]}, {"shuffle": "two"}, {}])
def test_only_a_tree_with_a_mistake_is_parsed_in_full(
    wrong: dict[str, Any], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    full = parts._parse
    monkeypatch.setattr(parts, "_parse", lambda *given: parsed.append(given) or full(*given))
    tree = config(tokenizer, "{class_path: mm.fusion.projector.MLPProjector}")
    tree["init_args"]["towers"]["image"]["bridge"]["init_args"] = wrong
    if wrong:
        with pytest.raises(ValueError, match=r"^mm\.model\.MultimodalModel: towers\.bridge"):
            build(tree, MultimodalModel)
    else:
        build(tree, MultimodalModel)
    assert len(parsed) == bool(wrong)


def test_a_missing_argument_is_named(tokenizer: Path) -> None:
    tree = config(tokenizer, "{class_path: mm.fusion.projector.MLPProjector}")
    del tree["init_args"]["decoder"]["init_args"]["ffns"]["dense"]["init_args"]["hidden"]
    with pytest.raises(ValueError, match=r"^mm\.model\.MultimodalModel: decoder\.ffns: .* are required: hidden$"):
        build(tree, MultimodalModel)


def test_what_a_part_refuses_is_all_that_is_said(tokenizer: Path) -> None:
    """The constructor's own words, not the types that might have stood there nor what was given."""
    tree = config(tokenizer, "{class_path: mm.fusion.projector.MLPProjector}")
    mixers = tree["init_args"]["decoder"]["init_args"]["mixers"]
    mixers["full"] = {
        "class_path": "mm.decoder.attention.grouped.GroupedAttention",
        "init_args": {"heads": 3, "kv_heads": 2},
    }
    said = r"^mm\.model\.MultimodalModel: GroupedAttention: heads 3 must be a multiple of kv_heads 2$"
    with pytest.raises(ValueError, match=said):
        build(tree, MultimodalModel)
