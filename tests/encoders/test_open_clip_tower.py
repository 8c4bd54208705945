from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.constants import IMAGENET_MEAN, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP

from mm.encoders.open_clip_tower import OpenClipEncoder, preprocessing
from mm.types import Tokens

VISION = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
DIM = 3 * 8 * 8


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(32, VISION, TEXT, output_dict=True).eval()  # type: ignore[arg-type]


@pytest.fixture
def name(tmp_path: Path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}))
    return str(tmp_path / "tiny.json")


@pytest.fixture
def weights(clip: CLIP, tmp_path: Path) -> str:
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    return str(tmp_path / "clip.pt")


def image(height: int = 32, width: int = 32) -> tuple[torch.Tensor, Tokens]:
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    rows, columns = height // 8, width // 8
    values = pixels.view(3, rows, 8, columns, 8).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    return pixels, Tokens.stack([Tokens.of_grid(values, (1, rows, columns))])


def test_patch_features_are_open_clips_own(clip: CLIP, name: str, weights: str) -> None:
    pixels, tokens = image()
    x = ((pixels / 255 - 0.5) / 0.5)[None]
    tower: Any = clip.visual
    with torch.no_grad():
        hidden = tower._embeds(x)
        for block in tower.transformer.resblocks[:-1]:
            hidden = block(hidden)
        earlier = OpenClipEncoder(DIM, name, weights, **HALVES, layer=-2).eval()  # type: ignore[arg-type]
        torch.testing.assert_close(earlier(tokens).values, hidden[:, 1:])
        last = tower.ln_post(tower.transformer.resblocks[-1](hidden))
        encoder = OpenClipEncoder(DIM, name, weights, **HALVES).eval()  # type: ignore[arg-type]
        torch.testing.assert_close(encoder(tokens).values, last[:, 1:])


def test_unknown_preprocessing_is_refused_and_not_guessed(name: str, weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip.pt does not say how its images were normalised: give tag"):
        OpenClipEncoder(DIM, name, weights)
    with pytest.raises(ValueError, match="clip.pt does not say"):  # half an answer
        OpenClipEncoder(DIM, name, weights, mean=(0.5, 0.5, 0.5))
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}})
    )
    encoder = OpenClipEncoder(DIM, name, weights)
    torch.testing.assert_close(encoder.mean.flatten(), torch.full((3,), 0.1))
    torch.testing.assert_close(encoder.std.flatten(), torch.full((3,), 0.2))
    again = OpenClipEncoder(DIM, **encoder.saved({"name": name, "weights": weights}))  # without either file
    assert torch.equal(again.mean, encoder.mean) and torch.equal(again.std, encoder.std)
    assert encoder.saved({"name": name, "weights": weights, "tag": "openai"})["tag"] == "openai"


def test_a_tag_says_mean_std_and_activation() -> None:
    assert preprocessing("ViT-B-32", "x.pt", "openai", None, None) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, True)
    assert preprocessing("ViT-B-32", "x.pt", "laion2b_s34b_b79k", None, None)[2] is False
    assert preprocessing("ViT-L-14-CLIPA", "x.pt", "datacomp1b", None, None)[0] == IMAGENET_MEAN
    with pytest.raises(ValueError, match="tag: open_clip has no weights 'opnai' of ViT-B-32; it has openai, "):
        preprocessing("ViT-B-32", "x.pt", "opnai", None, None)


def test_the_size_is_fixed_and_can_be_chosen(name: str, weights: str) -> None:
    encoder = OpenClipEncoder(DIM, name, weights, **HALVES).eval()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes images of \(32, 32\) px .*, got \(32, 48\)"):
        encoder(image(32, 48)[1])
    wide = OpenClipEncoder(DIM, name, weights, **HALVES, image_size=(32, 48)).eval()  # type: ignore[arg-type]
    assert wide(image(32, 48)[1]).grid.tolist() == [[1, 4, 6]]
    assert torch.equal(wide.model.positional_embedding[0], encoder.model.positional_embedding[0])  # type: ignore[index]


def test_weights_and_arguments_are_checked(clip: CLIP, name: str, tmp_path: Path) -> None:
    torch.save({f"module.{k}": v for k, v in clip.state_dict().items() if "ln_post" not in k}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match="less.pt does not fit the model; missing: ln_post.bias, ln_post.weight$"):
        OpenClipEncoder(DIM, name, str(tmp_path / "less.pt"), **HALVES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights: there is no file .*absent.pt"):
        OpenClipEncoder(DIM, name, str(tmp_path / "absent.pt"), **HALVES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name: 'ViT-B-33' is neither"):
        OpenClipEncoder(DIM, "ViT-B-33")
    with pytest.raises(ValueError, match="ViT-B-16-SigLIP is timm's vit_base_patch16_siglip_224: use mm.encoders.timm"):
        OpenClipEncoder(DIM, "ViT-B-16-SigLIP")
    with pytest.raises(ValueError, match="layer must lie in -3 .. -1"):
        OpenClipEncoder(DIM, name, layer=-4)
    with pytest.raises(ValueError, match="patches of 16 px do not divide the stride of open_clip .*, 8 px"):
        OpenClipEncoder(3 * 16 * 16, name)
