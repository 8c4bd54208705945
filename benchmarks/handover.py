"""What it costs to take a batch from a worker process: as a parcel (mm.datasets.parcel), and tensor by tensor.

    python benchmarks/handover.py

A batch of 28 tensors, about 1 MB, as the demo's; 200 from each worker, one worker after the other. Medians of the
trainer's wall clock and CPU time for one; the mean of the worker's CPU time, making it left out. "idle" workers run at
SCHED_IDLE, as mm's do on a machine without an accelerator.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.queue import Queue

from mm.datasets.parcel import Parcel

COUNT = 200


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(9, 36, 28, generator=generator) for i in range(28)}


def work(queue: Queue, asked: Any, parcels: bool, idle: bool) -> None:
    torch.set_num_threads(1)
    if idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    begun, making = time.process_time(), 0.0
    while asked.recv():
        start = time.thread_time()
        made = batch()
        making += time.thread_time() - start
        queue.put(Parcel.pack(made) if parcels else made)
    asked.send(time.process_time() - begun - making)


def measure(parcels: bool, idle: bool) -> tuple[float, float, float]:
    """Milliseconds of a batch: the trainer's wall clock and CPU time, the worker's CPU time, making it left out."""
    context = get_context("fork")
    queue, (mine, its) = context.Queue(), context.Pipe()
    worker = context.Process(target=work, args=(queue, its, parcels, idle))
    worker.start()
    expected, wall, cpu = batch(), [], []
    for _ in range(COUNT):
        mine.send(True)
        time.sleep(0.01)  # it is made, and the queue's thread writes
        start, begun = time.perf_counter(), time.process_time()
        found = queue.get()
        found = found.open() if parcels else found
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - begun)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        del found
    mine.send(False)
    its_cpu = mine.recv()
    worker.join()
    return 1e3 * statistics.median(wall), 1e3 * statistics.median(cpu), 1e3 * its_cpu / COUNT


def main() -> int:
    print(f"torch {torch.__version__}; ms a batch")
    print(
        "| worker | batch goes | trainer waits | trainer's CPU time | worker's CPU time |"
        "\n| --- | --- | --- | --- | --- |"
    )
    for idle in (False, True) if hasattr(os, "SCHED_IDLE") else (False,):
        for parcels in (False, True):
            wall, cpu, its = measure(parcels, idle)
            way = "as a parcel" if parcels else "tensor by tensor"
            print(f"| {'idle' if idle else 'normal'} | {way} | {wall:.2f} | {cpu:.2f} | {its:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
