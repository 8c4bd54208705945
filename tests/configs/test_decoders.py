"""Every file of configs/decoder, on the meta device: it builds, and the published sizes are the published ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mm import info
from mm.decoder.decoder import Decoder

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "decoder"
FILES = sorted(FOLDER.glob("*.yaml"))

# Published figures in billions: all parameters, those active for one token, and whether these include the embedding.
PUBLISHED: dict[str, tuple[float, float | None, bool]] = {
    "deepseek_v3": (671.0, 36.7, False),  # README_WEIGHTS.md of the release; the paper rounds to 37
    "gpt_oss_20b": (20.9, 3.6, False),
    "gpt_oss_120b": (116.8, 5.1, False),
    "mixtral_8x7b": (46.7, 12.9, True),
    "qwen3_30b_a3b": (30.5, 3.35, True),  # the card's 3.3 is 3.353 cut short: its own sizes give no number nearer
    "llama_3_1_8b": (8.03, None, True),
    "gpt2_xl": (1.56, None, True),
    "gpt3_175b": (175.0, None, True),
    "mamba2_2_7b": (2.7, None, True),
    "bamba_9b": (9.78, None, True),
}


@cache
def build(path: Path) -> Any:
    """On the meta device a model is small: each is built once."""
    return info.build_meta(path, 1000 if _is_demo(path) else None)


def _is_demo(path: Path) -> bool:
    """For a model whose tokenizer says how many words there are."""
    return path.stem.startswith("demo_")


def describe(name: str, context: int = 4096) -> info.Info:
    return info.describe(build(FOLDER / f"{name}.yaml"), context)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_builds_and_is_counted(path: Path) -> None:
    model = build(path)
    assert isinstance(model, Decoder) and all(p.is_meta for p in model.parameters())
    found = info.describe(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < found.active_without_embedding <= found.active <= found.parameters
    assert _is_demo(path) or path.stem in PUBLISHED, f"{path}: state its published size here"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    total, active, with_embedding = PUBLISHED[name]
    found = describe(name)
    assert found.parameters / 1e9 == pytest.approx(total, rel=0.01)
    if active is None:
        assert found.active == found.parameters
    else:
        counted = found.active if with_embedding else found.active_without_embedding
        assert counted / 1e9 == pytest.approx(active, rel=0.01)


def test_exact_sizes() -> None:
    """To the weight, where the release's own weight files say it."""
    assert describe("gpt2_xl").parameters == 1_557_611_200
    assert describe("llama_3_1_8b").parameters == 8_030_261_248
    assert describe("mixtral_8x7b").parameters == 46_702_792_704
    assert describe("qwen3_30b_a3b").parameters == 30_532_122_624


def test_deepseek_caches_576_numbers_a_token_and_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(FOLDER / "deepseek_v3.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache_numbers_per_layer"] == [576] * 61
    assert found["cache_bytes_per_token"] == 2 * 576 * 61


def test_state_space_models_cache_nothing_a_token() -> None:
    pure, hybrid = describe("mamba2_2_7b"), describe("bamba_9b")
    assert pure.cache_bytes_per_token == 0 and pure.cache_bytes_at_context == pure.cache_bytes_fixed
    assert pure.cache_bytes_fixed == 4 * 64 * (5120 * 128 + 3 * (5120 + 2 * 128))
    assert hybrid.cache_bytes_per_token == 2 * 3 * 2 * 8 * 128  # bytes, layers of attention, k and v, heads, width
    assert describe("mamba2_2_7b", 10**6).flops_forward == pure.flops_forward


def test_banded_layers_bound_what_a_query_costs() -> None:
    near, far = describe("gpt3_175b", 256), describe("gpt3_175b", 2048)
    assert far.flops_attention - near.flops_attention == 48 * 4 * 12288 * (2048 - 256)  # the dense half of the layers
