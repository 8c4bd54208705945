"""Workers give way to training, until training waits for them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from mm.datasets import loading

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no idle scheduling")


class Numbers:
    """Batches that say which they are and how their worker is scheduled; those in `slow` take 0.4 s."""

    def __init__(self, slow: tuple[int, ...] = ()) -> None:
        self.slow = slow

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        time.sleep(0.4 if number in self.slow else 0.0)
        return number, os.sched_getscheduler(0), os.getpid()


def read(batches: Any, workers: int, stop: int = 12) -> list[Any]:
    return list(loading._read(batches, range(5, 5 + stop), workers, 1))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(loading, "AT_ONCE", 0)


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
    monkeypatch.setattr(loading, "PATIENCE", 0.2)
    found = read(Numbers(slow=(9,)), workers)
    assert [number for number, *_ in found] == list(range(5, 17))
    assert [policy for _, policy, _ in found] == [os.SCHED_IDLE] * 5 + [os.SCHED_OTHER] * 7
    assert not {pid for *_, pid in found[:5]} & {pid for *_, pid in found[5:]}


@pytest.mark.usefixtures("on_cpu")
def test_the_first_batch_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE", 0.2)
    assert {policy for _, policy, _ in read(Numbers(slow=(5,)), 1, stop=4)} == {os.SCHED_IDLE}


def test_nothing_gives_way_beside_an_accelerator_or_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(loading, "AT_ONCE", 0)
    assert {policy for _, policy, _ in read(Numbers(), 0)} == {os.SCHED_OTHER}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert {policy for _, policy, _ in read(Numbers(), 1)} == {os.SCHED_OTHER}
