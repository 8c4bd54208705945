"""Weights, temperatures and epochs of a mixture hold exactly, wherever the stream is entered."""

from __future__ import annotations

import collections
from typing import Any

import pytest

from mm.datasets.mixture import Mixture


def counts(mixture: Mixture, places: int) -> dict[str, int]:
    return dict(collections.Counter(mixture[place].name for place in range(places)))


def test_epochs_say_how_often_each_set_is_read() -> None:
    mixture = Mixture({"a": 40, "b": 100, "c": 8}, epochs={"a": 3, "b": 0.25})
    assert len(mixture) == 3 * 40 + 25 + 8
    assert counts(mixture, len(mixture)) == {"a": 120, "b": 25, "c": 8}
    seen = [mixture[place] for place in range(4 * len(mixture))]
    each = collections.Counter(draw.index for draw in seen if draw.name == "b")
    assert set(each.values()) == {1} and len(each) == 100  # four quarters, each another one
    assert {draw.epoch for draw in seen if draw.name == "a"} == set(range(12))


def test_temperature_evens_out_the_sets() -> None:
    sizes = {"large": 10_000, "small": 100}
    shares = {t: counts(Mixture(sizes, temperature=t), 1100).get("small", 0) / 1100 for t in (0.5, 1.0, 2.0, 1e9)}
    assert shares[2.0] == pytest.approx(1 / 11, abs=0.001)  # sqrt(100) to sqrt(10,000)
    assert shares[1e9] == pytest.approx(1 / 2, abs=0.001)
    assert shares[0.5] < shares[1.0] == pytest.approx(1 / 101, abs=0.001)
    weighted = Mixture(sizes, {"large": 1, "small": 16}, temperature=2.0)
    assert counts(weighted, 500) == {"large": 100, "small": 400}


def test_samples_are_read_in_the_blocks_that_lie_together() -> None:
    mixture = Mixture({"a": 1600}, read_blocks={"a": 10})  # windows of 16 blocks of 10
    blocks = [{mixture[place].index // 10 for place in range(start, start + 160)} for start in (0, 160, 1440)]
    assert all(len(found) == 16 for found in blocks) and not set.intersection(*blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": {"a": 0}}, "data set a: epochs 0 must be a number above 0"),
        ({"epochs": {"a": float("nan")}}, "data set a: epochs nan"),
        ({"weights": {"a": 2.0}, "epochs": {"b": 2}}, "data set a: weight: another set has epochs"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 2, "epochs": {"a": 2}}, "epochs fix the shares already"),
        ({"weights": {"a": float("inf")}}, "data set a: weight inf"),
    ],
)
def test_refuses_what_means_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture({"a": 5, "b": 5}, **options)
