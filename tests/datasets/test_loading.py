"""Workers give way to training, until training waits for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mm.datasets import loading

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no idle scheduling")


class Numbers:
    """Batches that say which they are and how their worker is scheduled."""

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        return number, os.sched_getscheduler(0), os.getpid()


def read(batches: Any, workers: int, stop: int = 12) -> list[Any]:
    return list(loading._read(batches, range(5, 5 + stop), workers, 1))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is waited for, however busy the machine is."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(loading, "AT_ONCE", 0)
    monkeypatch.setattr(loading, "_timed", lambda batches: ((batch, 0.0) for batch in batches))


@pytest.mark.usefixtures("on_cpu")
def test_workers_run_where_a_core_is_idle() -> None:
    found = read(Numbers(), 2)
    assert [number for number, *_ in found] == list(range(5, 17))
    assert {policy for _, policy, _ in found} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.usefixtures("on_cpu")
def test_a_run_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "AT_ONCE", 3)
    assert [policy for _, policy, _ in read(Numbers(), 1)] == [os.SCHED_OTHER] * 3 + [os.SCHED_IDLE] * 9


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_training_waits_for_give_way_no_more(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    waited = iter([*[0.1] * 4, loading.PATIENCE + 0.1, *[100.0] * 20])
    monkeypatch.setattr(loading, "_timed", lambda batches: ((batch, next(waited)) for batch in batches))
    found = read(Numbers(), workers)
    assert [number for number, *_ in found] == list(range(5, 17))
    assert [policy for _, policy, _ in found] == [os.SCHED_IDLE] * 5 + [os.SCHED_OTHER] * 7
    assert not {pid for *_, pid in found[:5]} & {pid for *_, pid in found[5:]}


def test_how_long_a_batch_was_waited_for() -> None:
    """Not the first, for which workers have to start, nor while the trainer was at work."""

    def slowly() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.1)
            yield number

    times = []
    for _, waited in loading._timed(slowly()):
        times.append(waited)
        time.sleep(2.0 if len(times) == 1 else 0.0)
    first, *others = times
    assert first < 0 and all(0.1 <= waited < 2.0 for waited in others)


def test_nothing_gives_way_beside_an_accelerator_or_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(loading, "AT_ONCE", 0)
    assert {policy for _, policy, _ in read(Numbers(), 0)} == {os.SCHED_OTHER}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert {policy for _, policy, _ in read(Numbers(), 1)} == {os.SCHED_OTHER}
