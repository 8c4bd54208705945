"""Every combination that makes no sense is refused, by the names of its options."""

from __future__ import annotations

from typing import Any

import pytest

from mm.generation.options import REFUSED, SWITCHES, Decoding
from mm.generation.steering import BagOfWords, Steering

ON: dict[str, Any] = {
    "num_beams": {"num_beams": 2},
    "penalty_alpha": {"penalty_alpha": 0.5, "top_k": 4},
    "draft": {"draft": "lookup"},
    "amateur": {"amateur": object()},
    "steer": {"steer": Steering([BagOfWords((1,))])},
    "logprobs": {"logprobs": 0},
    "thinking=False": {"thinking": False},
    "thinking_budget": {"thinking_budget": 3},
    "regex, json_schema or grammar": {"regex": "a"},
    "temperature": {"temperature": 1.0},
    "top_p, min_p or typical_p": {"top_p": 0.9},
    "top_k": {"top_k": 4},
    "a cache that loses tokens": {"cache": "window"},
    "the static cache": {"cache": "static"},
    "a cache other than dynamic": {"cache": "int8"},
}


@pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
def test_it_is_named(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r".* and .* do not go together"):
        Decoding(**ON[pair[0]] | ON[pair[1]])


@pytest.mark.parametrize("name", SWITCHES)
def test_each_alone_is_fine_and_noticed(name: str) -> None:
    assert SWITCHES[name](Decoding(**ON[name]))
    assert not SWITCHES[name](Decoding())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0}, {"num_beams": True}, {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0},
        {"num_beams": 4, "num_beam_groups": 2}, {"diversity_penalty": 1.0}, {"diversity_penalty": -1.0},
        {"early_stopping": "soon"}, {"penalty_alpha": 1.5, "top_k": 4}, {"penalty_alpha": 0.5},
        {"amateur_alpha": 0.0}, {"draft_length": 0}, {"repetition_penalty": 0.0}, {"typical_p": 1.0},
        {"frequency_penalty": float("nan")}, {"thinking_budget": -1}, {"reward": len}, {"reward_every": 0},
        {"thinking_tags": ("<think>", "")}, {"thinking": "on"},
    ],
)  # fmt: skip
def test_nonsense_values_are_named(options: Any) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        Decoding(**options)
