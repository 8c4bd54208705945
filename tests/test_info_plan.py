"""`mm info --plan`: the arithmetic of a run, against published runs and by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mm.cli import main
from mm.info import Info, build_meta, describe
from mm.info.plan import GPUS, expected_loss, optimal, plan

V3 = "configs/decoder/deepseek_v3.yaml"


@cache
def built(config: str) -> tuple[Any, Info]:
    model = build_meta(Path(config), None)
    return model, describe(model)


def made(config: str = V3, gpus: int = 2048, **options):
    return plan(*built(config), gpus, **options)


def test_deepseek_v3s_hours_are_those_of_its_report() -> None:
    """2,664K hours of H800 for 14.8T tokens (arXiv 2412.19437, table 1): 40 % of bfloat16's FLOP/s comes to that."""
    assert made(gpu="h100", tokens=14.8e12).gpu_hours == pytest.approx(2_664_000, rel=0.05)


def test_chinchillas_best_model_is_about_chinchilla() -> None:
    """70B on 1.4T tokens; the refit that is used here gives that compute 64B to 74B on 1.3T to 1.5T."""
    weights, tokens = optimal(6 * 70e9 * 1.4e12)
    assert 60e9 < weights < 80e9 and weights * tokens * 6 == pytest.approx(6 * 70e9 * 1.4e12)
    best = expected_loss(weights, tokens)
    for other in (0.7, 0.9, 1.1, 1.4):
        assert expected_loss(weights * other, tokens / other) > best


def test_states_are_shared_and_rows_are_not() -> None:
    few, many = made(gpus=64), made(gpus=128)
    assert few.memory_states == 2 * many.memory_states and few.memory_row == many.memory_row
    assert few.seconds == 2 * many.seconds and few.gpu_hours == many.gpu_hours
    assert made(gpus=1).moved_weights == 0
    assert not few.fits


def test_a_model_that_fits_says_on_how_many() -> None:
    found = made("configs/decoder/llama_3_1_8b.yaml", 8)
    assert found.fewest is not None
    at, below = (made("configs/decoder/llama_3_1_8b.yaml", count) for count in (found.fewest, found.fewest - 1))
    assert at.fits and not below.fits
    assert found.moved_tokens == 0  # no experts


def test_moving_hides_behind_enough_tokens() -> None:
    """At `hidden` tokens, products take as long as the weights' gathers and scatter: between machines a number comes
    once into each, over eight cards, which an H200's links then outrun."""
    found = made(gpus=1024)
    per_token = found.flops / found.tokens
    device = GPUS["h200"]
    assert found.hidden * per_token / (device.flops * 0.4) == pytest.approx(found.moved_weights / (8 * device.network))


def test_experts_stay_and_tokens_travel() -> None:
    """By hand, of Qwen3-30B-A3B: 48 layers of 128 experts of 3 x 2048 x 768, of which a token takes 8."""
    model = build_meta(Path("configs/decoder/qwen3_30b_a3b.yaml"), None)
    info = describe(model, 4096)
    found, share = plan(model, info, 1024), 1023 / 1024
    assert found.moved_weights == pytest.approx(6 * (info.parameters - 48 * 128 * 3 * 2048 * 768) * share)
    # To and fro, in both passes, in bfloat16.
    assert found.moved_tokens == pytest.approx(4 * 2 * 48 * 8 * 2048 * 4096 * share)
    device = GPUS["h200"]
    seconds = found.moved_weights / (8 * device.network) + found.moved_tokens / device.network
    assert found.step_moving == pytest.approx(seconds)


def test_gpt_3s_flops_are_those_of_its_paper() -> None:
    """3.14e23 for 300B tokens (arXiv 2005.14165, table D.1), without attention's scores and sums: 6 % at most."""
    model = build_meta(Path("configs/decoder/gpt3_175b.yaml"), None)
    assert 1 <= plan(model, describe(model, 2048), 1024, tokens=300e9).flops / 3.14e23 < 1.06


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--plan", "0"], "gpus=0"),
        (["--plan", "8", "--mfu", "1.5"], "mfu=1.5"),
        (["--plan", "8", "--tokens", "-1"], "tokens"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], said: str, capsys) -> None:
    assert main(["info", V3, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_it(capsys) -> None:
    assert main(["info", V3, "--plan", "1024"]) == 0
    assert "on 1,024 x H200, on paper" in capsys.readouterr().out
    assert main(["info", V3, "--plan", "1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["gpus"] == 1024
