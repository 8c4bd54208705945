"""The thread that the model belongs to: it drives an Engine, and does between its steps what else needs the model.

event loop:  begin(tickets) -> async for index, piece in answers;  await call(work)
thread:      inbox -> engine.step() -> pieces, back into the loop
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from mm.generation.batching import Engine
from mm.generation.constraints import FormNotFollowed
from mm.generation.logprobs import TokenLogprob
from mm.generation.tickets import Ticket
from mm.serve.limits import Refused

LOG = logging.getLogger("mm.serve")
T = TypeVar("T")


class Piece(NamedTuple):
    """What an answer got in one step of the engine."""

    text: str
    reasoning: str
    logprobs: list[TokenLogprob]


class Answers:
    """Tickets at work, on the event loop's side: `async for index, piece in answers`, until all have ended; a ticket's
    last piece is None. Raises Refused: model_failed, shutting_down, and deadline_exceeded at `deadline`, in the loop's
    time. `close` ends what is still at work, and may be called twice.
    """

    def __init__(self, worker: Worker, tickets: Sequence[Ticket], deadline: float) -> None:
        self.tickets = list(tickets)
        self._worker, self._deadline, self._loop = worker, deadline, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        going = len(self.tickets)
        while going:
            try:
                left = self._deadline - self._loop.time()
                index, event = await asyncio.wait_for(self._queue.get(), max(left, 0))
            except TimeoutError:
                raise Refused("deadline_exceeded", f"{going} answers were not finished") from None
            if isinstance(event, Refused):
                raise event
            if isinstance(event, FormNotFollowed):
                raise Refused("invalid_schema", str(event), "response_format")
            if isinstance(event, Exception):
                raise Refused("model_failed", f"{type(event).__name__}: {event}") from event
            going -= event is None
            yield index, event

    def close(self) -> None:
        with contextlib.suppress(Refused):  # a worker that has ended has ended them too
            self._worker._act(lambda: self._worker._drop(self))

    def tell(self, index: int, event: Piece | Exception | None) -> None:
        """From the worker's thread. Once the event loop has closed there is nobody to be told."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))


class _Follower:
    """How much of a ticket's answer its client has been told."""

    def __init__(self, answers: Answers, index: int) -> None:
        self.answers, self.index, self.ticket = answers, index, answers.tickets[index]
        self._reasoning = self._logprobs = 0

    def tell(self) -> bool:
        """Tells what is new; returns whether there is more to come."""
        ticket = self.ticket
        text, reasoning = ticket.taken(), (ticket.reasoning or "")[self._reasoning :]
        logprobs = (ticket.logprobs or [])[self._logprobs :]
        self._reasoning += len(reasoning)
        self._logprobs += len(logprobs)
        if text or reasoning or logprobs:
            self.answers.tell(self.index, Piece(text, reasoning, logprobs))
        if ticket.error is not None:
            self.answers.tell(self.index, ticket.error)
        elif ticket.finish_reason is not None:
            self.answers.tell(self.index, None)
        return ticket.finish_reason is None


class Worker:
    """Starts its thread at once; `close` ends it, and every answer with it. `make` builds the engine, and another one
    should a step of it fail: what was at work then fails, what comes later does not."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make, self.engine = make, make()
        self._inbox: list[Callable[[], Any]] = []
        self._news = threading.Condition()
        self._following: list[_Follower] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mm-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def idle(self) -> bool:
        """Whether nothing is at work, nor waits."""
        return not (self._following or self._inbox or self.engine.running or self.engine.waiting)

    def begin(self, tickets: Sequence[Ticket], deadline: float) -> Answers:
        """Queues tickets that `engine.prepare` made. Raises Refused while the server goes down."""
        answers = Answers(self, tickets, deadline)
        self._act(lambda: self._begin(answers))
        return answers

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done in the model's thread between two steps. What is cancelled while it waits
        is not done."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def act() -> None:
            if future.cancelled():
                return
            result, error = None, None
            try:
                result = work()
            except Exception as raised:  # it belongs to who called
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(deliver, result, error)

        self._act(act)
        return await future

    def end(self) -> None:
        """What is at work fails, shutting_down, and so does what comes; returns at once."""
        with self._news:
            self._closing = True
            self._news.notify()

    def close(self) -> None:
        self.end()
        self._thread.join()

    def _act(self, act: Callable[[], Any]) -> None:
        with self._news:
            if not self.alive:
                raise Refused("shutting_down", "the worker has ended")
            self._inbox.append(act)
            self._news.notify()

    def _begin(self, answers: Answers) -> None:
        for index, ticket in enumerate(answers.tickets):
            self.engine.add(ticket)
            self._following.append(_Follower(answers, index))

    def _drop(self, answers: Answers) -> None:
        self._following = [each for each in self._following if each.answers is not answers]
        for ticket in answers.tickets:
            ticket.cancel()

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._inbox or self._closing or self.engine.running or self.engine.waiting):
                    self._news.wait()
                inbox, self._inbox = self._inbox, []
                if self._closing:
                    break
            for act in inbox:
                act()
            if self.engine.running or self.engine.waiting:
                self._step()
        for act in inbox:  # what waits is not left waiting
            act()
        self._fail(Refused("shutting_down", "the server was told to end"))

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception as error:
            LOG.exception("a step of the engine failed; it starts anew")
            try:
                self.engine = self._make()  # before they are told: who asks again finds the new one
            finally:
                self._fail(error)
        self._following = [each for each in self._following if each.tell()]

    def _fail(self, error: Exception) -> None:
        for follower in self._following:
            follower.answers.tell(follower.index, error)
        self._following = []
