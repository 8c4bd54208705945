"""Nothing in a config is passed over: what is read, what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from mm.decoder.families import families, family_of
from mm.decoder.interchange.family import fold
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings


def settings(**values: Any) -> Settings:
    return Settings(values, "config.json")


def test_what_is_read_and_what_is_harmless_passes() -> None:
    s = settings(hidden_size=8, scale=2, on=True, act="silu", sizes=[1, 2], torch_dtype="bfloat16", window=None)
    assert (s.integer("hidden_size"), s.number("scale"), s.flag("on"), s.items("sizes")) == (8, 2.0, True, [1, 2])
    assert isinstance(s.number("scale"), float)
    assert s.choice("act", {"silu": "swish"}) == "swish"
    assert s.integer("window", 5) == 5 and s.given("window") and not s.has("window")
    s.finish()


def test_a_setting_that_nobody_read_is_refused_by_name() -> None:
    s = settings(hidden_size=8, clever_trick=0.5)
    s.integer("hidden_size")
    with pytest.raises(ValueError, match=r"^config.json: clever_trick = 0.5: this setting is not supported$"):
        s.finish()


def test_nested_settings_are_under_the_same_rule() -> None:
    s = settings(rope={"theta": 1e4, "twist": True})
    rope = s.section("rope")
    assert rope is not None and rope.number("theta") == 1e4
    with pytest.raises(ValueError, match=r"^config.json: rope: twist = true: this setting"):
        s.finish()
    assert settings().section("rope") is None
    with pytest.raises(ValueError, match=r"rope = 3: must be an object"):
        settings(rope=3).section("rope")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.integer("absent"), "absent is missing"),
        (lambda s: s.integer("word"), "word = 'x': must be a whole number"),
        (lambda s: s.integer("half"), "half = 0.5: must be a whole number"),
        (lambda s: s.integer("yes"), "yes = true: must be a whole number"),
        (lambda s: s.flag("one"), "one = 1: must be true or false"),
        (lambda s: s.text("one"), "one = 1: must be a word"),
        (lambda s: s.choice("word", {"a": 1, "b": 2}), "word = 'x': must be one of a, b"),
        (lambda s: s.only("yes", False), "yes = true: only false is supported"),
        (lambda s: s.only("none", 1, default=2), "none = 2: only 1 is supported"),
        (lambda s: s.one_of("one", "word"), "word = 'x': contradicts one = 1"),
    ],
)
def test_messages_name_file_key_and_value(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call(settings(word="x", half=0.5, yes=True, one=1, none=None))
    assert str(error.value) == f"config.json: {message}"


def test_one_of_several_names() -> None:
    s = settings(num_local_experts=4)
    assert s.integer(s.one_of("num_experts", "num_local_experts")) == 4
    s = settings(a=4, b=4)
    assert s.one_of("a", "b") == "a"
    s.finish()


def init_args(**values: Any) -> dict[str, Any]:
    s = settings(**values)
    arguments = rotary(s)["init_args"]
    s.finish()
    return arguments


def test_rope_old_and_new_spellings_mean_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    new = init_args(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    old = init_args(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    older = init_args(rope_theta=5e5, rope_scaling={"type": "llama3", **llama3})
    assert new == old == older
    assert new["theta"] == 5e5 and new["scaling"]["kind"] == "llama3" and new["scaling"]["original_length"] == 64


def test_rope_without_scaling_and_in_part() -> None:
    assert init_args() == {"theta": 10_000.0}
    assert init_args(rope_theta=7.0, rope_scaling=None, partial_rotary_factor=0.5) == {"theta": 7.0, "fraction": 0.5}
    assert init_args(rope_parameters={"rope_type": "default", "rope_theta": 3}) == {"theta": 3.0}


def test_rope_of_one_kind_of_layer() -> None:
    s = settings(rope_parameters={"full": {"rope_type": "default", "rope_theta": 1e6}, "near": {"rope_theta": 1e4}})
    assert rotary(s, section="full")["init_args"]["theta"] == 1e6
    assert rotary(s, section="near")["init_args"]["theta"] == 1e4
    s.finish()


def test_rope_lengths() -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert init_args(rope_parameters=yarn, max_position_embeddings=64)["scaling"]["factor"] == 4.0
    outside = init_args(rope_scaling={"type": "yarn", "factor": 2}, original_max_position_embeddings=8)
    assert outside["scaling"]["original_length"] == 8  # Phi-3 writes it beside the scaling
    inside = init_args(rope_scaling={"type": "yarn", "factor": 2}, max_position_embeddings=32)
    assert inside["scaling"]["original_length"] == 32


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic': must be default, linear"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings = null: yarn needs it"),
        ({"rope_type": "linear", "factor": 2.0, "twist": 1}, "twist = 1: this setting is not supported"),
        (
            {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8},
            "low_freq_factor = null: llama3 needs it",
        ),
    ],
)
def test_rope_that_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^config.json: rope_parameters: {message}"):
        init_args(rope_parameters=rope)


def test_two_ropes_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="stands beside rope_parameters and says something else"):
        init_args(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0})


def test_layers_fold_into_patterns() -> None:
    assert fold(["a"] * 3) == [{"pattern": ["a"], "repeat": 3}]
    assert fold(["a", "b"] * 2) == [{"pattern": ["a", "b"], "repeat": 2}]
    assert fold(["a", "b", "b"]) == [{"pattern": ["a", "b", "b"], "repeat": 1}]
    long = ["d"] + ["m"] * 26
    assert fold(long) == [{"pattern": ["d"], "repeat": 1}, {"pattern": ["m"], "repeat": 26}]


def test_families_are_found_by_their_files() -> None:
    assert {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmoe"} <= families().keys()
    with pytest.raises(ValueError, match=r"^x/config.json: model_type 'falcon' is not supported; there are .*llama"):
        family_of("falcon", "x/config.json")
