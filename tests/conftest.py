"""What holds for every test: no network, one thread, a fixed seed.

torch and Hypothesis are imported where tests are collected: not in the process that only hands them out to others.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests are small, and runners share their cores
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import socket
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest


@cache
def _patient_hypothesis() -> None:
    import hypothesis

    # Shared cores make single examples slow now and then, which says nothing about the code.
    hypothesis.settings.register_profile("mm", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("mm")


def pytest_collectstart() -> None:
    _patient_hypothesis()


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not look through it (0.3 s each, of some 100)."""
    gc.collect()
    gc.freeze()


_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: Any) -> None:
    """Lets tests talk to themselves (gloo ranks, a server under test) and to nobody else."""
    if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
        raise OSError(f"a test tried to reach {address}: tests run without a network")
    _connect(self, address)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    monkeypatch.setattr(socket.socket, "connect", _connect_locally)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
