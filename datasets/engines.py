"""Where the work of `mm shard` is done: in this process, in processes of this machine, or on a Ray cluster.

All three give the results in the order of the tasks and take a bounded number of tasks at a time, so that neither the
result nor the memory depends on which it is.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Engine = Literal["local", "ray"]
AHEAD = 2  # tasks that wait for each worker


def run_ordered(
    function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], workers: int = 1, engine: Engine = "local"
) -> Iterator[T]:
    """`function(*task)` for each task, in order. `function` is one of a module, and pickles as its arguments do.

    Raises what the function raises; ValueError for `engine="ray"` without Ray; ChildProcessError saying what to do when
    a worker process dies.
    """
    if engine == "ray":
        yield from _on_ray(function, tasks, workers)
    elif workers == 1:
        yield from (function(*task) for task in tasks)
    else:
        yield from _in_processes(function, tasks, workers)


def _in_processes(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], workers: int) -> Iterator[T]:
    # Forking a process that has threads (progress bars, BLAS) may hang; a fork server has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    pool: Any = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        yield from _bounded(lambda task: pool.submit(function, *task).result, tasks, workers)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died (out of memory, or killed); run the same command again: it goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _on_ray(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], workers: int) -> Iterator[T]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--engine ray needs the package ray: pip install 'mm[ray]'") from None
    mine = not ray.is_initialized()
    if mine:  # RAY_ADDRESS names a cluster; without it one is started on this machine
        address: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **address)
    remote = ray.remote(max_retries=2)(function)
    try:
        yield from _bounded(lambda task: _Fetched(ray, remote.remote(*task)), tasks, workers)
    finally:
        if mine:
            ray.shutdown()


class _Fetched:
    """The result of a Ray task, with the exception of the function itself rather than Ray's wrapper of it."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def __call__(self) -> Any:
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from None


def _bounded(
    submit: Callable[[tuple[Any, ...]], Callable[[], T]], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[T]:
    pending: deque[Callable[[], T]] = deque()
    for task in tasks:
        pending.append(submit(task))
        if len(pending) > AHEAD * workers:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def _begin_worker() -> None:
    """One thread of arithmetic, as the processes are the parallelism; and an end when the main process is killed: the
    pool alone would leave its workers waiting for ever."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
