from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mm.encoders.timm_vision import TimmEncoder
from mm.types import Tokens

VIT = "test_vit"  # 6 blocks 64 wide, patches of 16 px, mean and std 0.5
DIM = 3 * 16 * 16


def image(height: int, width: int) -> tuple[torch.Tensor, Tokens]:
    """uint8 pixels (3, H, W), and their tokens for patches of 16 px."""
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    rows, columns = height // 16, width // 16
    values = pixels.view(3, rows, 16, columns, 16).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    return pixels, Tokens.stack([Tokens.of_grid(values, (1, rows, columns))])


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(VIT, pretrained=False, num_classes=10, dynamic_img_size=True).eval()


@pytest.fixture(scope="module")
def weights(reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"  # with its classifier, as on the Hub
    save_file(reference.state_dict(), path)
    return str(path)


@pytest.mark.parametrize(("height", "width"), [(160, 160), (48, 80)])
def test_patch_features_are_timms_own(reference: torch.nn.Module, weights: str, height: int, width: int) -> None:
    pixels, tokens = image(height, width)
    x = ((pixels / 255 - 0.5) / 0.5)[None]
    with torch.no_grad():
        expected = reference.forward_features(x)[:, 1:]  # type: ignore[operator]
        torch.testing.assert_close(TimmEncoder(DIM, VIT, weights).eval()(tokens).values, expected)
        blocks = list(reference.blocks)  # type: ignore[arg-type]
        hidden = reference.patch_embed(x)  # type: ignore[operator]
        hidden = reference.norm_pre(reference._pos_embed(hidden))  # type: ignore[operator]
        for block in blocks[:-1]:
            hidden = block(hidden)
        earlier = TimmEncoder(DIM, VIT, weights, layer=-2).eval()  # as LLaVA-1.5: no norm, no class token
        torch.testing.assert_close(earlier(tokens).values, hidden[:, 1:])
    assert len(earlier.model.blocks) == len(blocks) - 1  # type: ignore[arg-type]


def test_a_cnn_gives_its_feature_map_row_by_row() -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(DIM, "test_convnext").eval()
    pixels, tokens = image(64, 96)
    assert encoder.reduction((1, 4, 6)) == (1, 2, 3)
    with torch.no_grad():
        feature_map = encoder.model.forward_features(((pixels / 255 - encoder.mean) / encoder.std)[None])  # type: ignore[operator]
        torch.testing.assert_close(encoder(tokens).values, feature_map.flatten(2).transpose(1, 2))


def test_mean_and_std_are_those_of_the_tag() -> None:
    for name in ("vit_tiny_patch16_224", "resnet10t"):
        config = timm.get_pretrained_cfg(name)
        assert config is not None
        encoder = TimmEncoder(DIM, name)
        torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(config.mean))
        torch.testing.assert_close(encoder.std.flatten(), torch.tensor(config.std))
    assert not torch.equal(encoder.mean.flatten(), torch.full((3,), 0.5))


def test_weights_are_read_strictly(reference: torch.nn.Module, weights: str, tmp_path: Path) -> None:
    state = reference.state_dict()
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    assert torch.equal(TimmEncoder(DIM, VIT, str(tmp_path / "model.pt")).model.pos_embed, state["pos_embed"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights: there is no file .*absent.safetensors"):
        TimmEncoder(DIM, VIT, str(tmp_path / "absent.safetensors"))
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "extra.pt")
    with pytest.raises(ValueError, match="extra.pt does not fit the model; unexpected: extra"):
        TimmEncoder(DIM, VIT, str(tmp_path / "extra.pt"))
    torch.save({k: v for k, v in state.items() if k != "pos_embed"}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match="missing: pos_embed"):
        TimmEncoder(DIM, VIT, str(tmp_path / "less.pt"))
    torch.save({**state, "pos_embed": torch.ones(1, 2, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="of another shape: pos_embed"):
        TimmEncoder(DIM, VIT, str(tmp_path / "other.pt"))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="must end in .safetensors, .pt, .pth or .bin"):
        TimmEncoder(DIM, VIT, str(tmp_path / "model.onnx"))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="timm has no model 'resnet10x'; the nearest are resnet1"):
        TimmEncoder(DIM, "resnet10x")
    with pytest.raises(ValueError, match=r"layer must lie in -6 .. -1 for test_vit, got -7"):
        TimmEncoder(DIM, VIT, layer=-7)
    with pytest.raises(ValueError, match=r"layer must lie in -6 .. -1 for test_vit, got 0"):
        TimmEncoder(DIM, VIT, layer=0)
    with pytest.raises(ValueError, match="patches of 14 px do not divide the stride of timm test_vit, 16 px"):
        TimmEncoder(3 * 14 * 14, VIT)
    with pytest.raises(ValueError, match="options: timm test_vit does not take .*img_sice"):
        TimmEncoder(DIM, VIT, options={"img_sice": 32})


def test_a_model_of_one_size_names_both_sizes() -> None:
    encoder = TimmEncoder(DIM, VIT, options={"dynamic_img_size": False, "img_size": [32, 48]}).eval()
    assert encoder(image(32, 48)[1]).grid.tolist() == [[1, 2, 3]]
    with pytest.raises(
        ValueError, match=r"timm test_vit takes images of \(32, 48\) px .*, got \(48, 48\): set the image"
    ):
        encoder(image(48, 48)[1])
