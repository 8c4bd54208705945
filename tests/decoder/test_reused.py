"""Memory that is used again: only when nobody holds it, and not without bound."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from mm.decoder import reused
from mm.decoder.reused import LEAST, Pool, empty

SIZE = 2 * LEAST


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool(4 * SIZE)
    monkeypatch.setattr(reused, "POOL", made)
    return made


def test_a_block_is_used_again_when_its_last_tensor_is_gone(pool: Pool) -> None:
    x = empty(torch.zeros(1), SIZE // 4)
    place, part = x.data_ptr(), x.view(-1, 2)[3:]
    del x
    assert empty(torch.zeros(1), SIZE // 4).data_ptr() != place  # `part` still holds it
    part.fill_(7.0)
    del part
    again = empty(torch.zeros(1, dtype=torch.bfloat16), 2, SIZE // 4)
    assert again.shape == (2, SIZE // 4) and again.dtype == torch.bfloat16 and again.is_contiguous()
    assert pool.idle == SIZE  # of the two blocks that came back, one is in use


def test_a_gradient_that_is_kept_is_not_written_over() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, *grads):
            return empty(grads[0], *grads[0].shape).copy_(2 * grads[0])

    weight = torch.ones(SIZE // 4, requires_grad=True)
    kept = []
    for step in (1.0, 2.0, 3.0):
        weight.grad = None
        (Twice.apply(weight) * step).sum().backward()
        kept.append(weight.grad)
    assert [float(grad[0]) for grad in kept] == [2.0, 4.0, 6.0]


def test_idle_memory_has_a_bound(pool: Pool) -> None:
    held = [empty(torch.zeros(1), SIZE // 4 + 256 * number) for number in range(9)]
    assert pool.idle == 0
    largest = held[-1].nbytes
    del held
    assert pool.most - largest < pool.idle <= pool.most
    assert empty(torch.zeros(1), SIZE).nbytes == 4 * SIZE  # a block as large as all that may be idle, and then alone
    assert pool.idle <= pool.most


def test_inference_keeps_nothing(pool: Pool) -> None:
    with torch.inference_mode():
        x = empty(torch.zeros(1), SIZE)
    del x
    gc.collect()
    assert pool.idle == 0


def test_small_tensors_and_other_devices_are_torchs(pool: Pool) -> None:
    for like, size in ((torch.zeros(1), 10), (torch.zeros(1, device="meta"), SIZE)):
        assert empty(like, size).device == like.device
    gc.collect()
    assert pool.idle == 0


def test_many_threads(pool: Pool) -> None:
    """Each writes its own number into what it took and finds it there."""
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            x = empty(torch.zeros(1), SIZE // 4)
            x[::4096] = number
            if not (x[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.idle <= pool.most


def test_a_block_serves_sizes_that_differ_little(pool: Pool) -> None:
    places = set()
    for rows in range(SIZE // 4 - 300, SIZE // 4 + 1, 100):
        x = empty(torch.zeros(1), rows)
        assert x.numel() == rows
        places.add(x.data_ptr())
        del x
    assert len(places) == 1 and pool.idle == SIZE


@pytest.mark.parametrize("size", [LEAST, LEAST + 1, 5 * LEAST - 1, 9 * LEAST // 8, (1 << 40) + 1])
def test_rooms_are_an_eighth_larger_at_most(size: int) -> None:
    assert size <= reused._room(size) <= size * 9 / 8
