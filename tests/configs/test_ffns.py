"""What every feed-forward part owes the decoder, for every file of configs/ffns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mm.decoder.decoder import Decoder
from mm.decoder.ffn.moe import SparseMoE
from mm.parts import build

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ffns"
WIDTH = 16


@pytest.fixture(params=sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def ffn(request: pytest.FixtureRequest) -> Any:
    """Built as a decoder builds it, by a factory that takes the width, and started by the decoder."""
    torch.manual_seed(0)
    arguments = {
        "width": WIDTH,
        "mixers": {"m": {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 2}}},
        "ffns": {"f": yaml.safe_load(request.param.read_text())},
        "layers": [{"pattern": ["m/f"]}],
        "vocab_size": 9,
        "init_std": 0.3,
    }
    decoder = build({"class_path": "mm.decoder.decoder.Decoder", "init_args": arguments}, Decoder)
    return decoder.layers[0].get_submodule("ffn")


def run(ffn: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return ffn(x, mask)[0] if isinstance(ffn, SparseMoE) else ffn(x)


def test_every_weight_starts_finite(ffn: Any) -> None:
    """A part with weights of its own must say how they start: memory that nobody filled is not zero."""
    for name, parameter in ffn.named_parameters():
        assert torch.isfinite(parameter).all() and parameter.abs().max() < 10, name
        assert parameter.ndim < 2 or name.endswith("bias") or parameter.std() > 0.005, name


@torch.no_grad()
def test_positions_are_read_one_by_one(ffn: Any) -> None:
    x = torch.randn(2, 5, WIDTH)
    y = run(ffn, x)
    assert y.shape == x.shape and y.abs().max() > 1e-3
    moved = x.clone()
    moved[0, 2] += 1
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order
    torch.testing.assert_close(run(ffn, moved)[1], y[1], **close)
    torch.testing.assert_close(run(ffn, x.flip(0)).flip(0), y, **close)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    padded = x.clone()
    padded[0, 3:] = 9.0
    torch.testing.assert_close(run(ffn, padded, mask)[mask], y[mask], **close)


def test_gradients_reach_every_weight(ffn: Any) -> None:
    x = torch.randn(4, 64, WIDTH, requires_grad=True)
    run(ffn, x).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
