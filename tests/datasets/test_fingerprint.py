"""What differs between two settings is named by its key, unless it is allowed to."""

from __future__ import annotations

from mm.datasets.fingerprint import describe, differing, flatten


def test_keys_are_as_the_command_line_spells_them() -> None:
    tree = {"model": {"class_path": "A", "init_args": {"optim": {"lr": 1}, "train": ["x", "y"]}}, "seed": None, "d": {}}
    assert flatten(tree) == {
        "model.class_path": "A", "model.optim.lr": 1, "model.train.0": "x", "model.train.1": "y", "seed": None,
    }  # fmt: skip


def test_differences_are_named_both_ways_and_allowed_by_prefix() -> None:
    then, now = {"a.b": 1, "a.c": 2, "gone": 3, "same": 4}, {"a.b": 1.5, "a.c": 7, "same": 4, "ab": 5}
    changed = differing(then, now, [])
    assert changed == {"a.b": (1, 1.5), "a.c": (2, 7), "gone": (3, None), "ab": (None, 5)}
    assert differing(then, now, ["a", "gone"]) == {"ab": (None, 5)}  # "a" is not the beginning of "ab"
    assert "a.b: 1 -> 1.5; " in describe(changed) and "--allow-change a.b --allow-change a.c" in describe(changed)
