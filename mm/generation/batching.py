"""Continuous batching: requests come and go at any step, share what begins alike, and each gets what it gets alone.

    engine = Engine(model)
    tickets = [engine.submit(sample) for sample in samples]
    for piece in tickets[0]: ...        # drives all of them on; or engine.run()

A step reads some positions of the prompts that there is room for, one after the other, and decodes one token of every
request whose prompt was read. Not thread-safe: one thread drives an engine.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from mm.datasets.packing import collate
from mm.fusion.splice import Features, splice
from mm.generation.caches.paged import OutOfPages, PagedView, Pages, Table
from mm.generation.content import Counts, Remembered, beside
from mm.generation.logprobs import TokenLogprob, likelihoods
from mm.generation.options import Decoding, Options, unsupported
from mm.generation.requests import (
    ContextTooLong,
    Prompts,
    Request,
    check_at_least_one,
    check_model,
    encode_requests,
    ids_request,
    stop_ids,
)
from mm.generation.rows import Shaper
from mm.generation.sampling import INVALID
from mm.generation.tickets import Ticket
from mm.types import Sample, Tokens

FIRST_ROOM = 1024  # positions that pages which grow begin with


class Engine:
    """Decodes many requests of a `mm.model.MultimodalModel` together.

    pages, page_size  room for positions: pages x page_size of them, prompts and answers of all requests that run. With
                      pages=None there are as many as are needed, and no room is kept free for what is yet to be written
    max_rows          requests that decode together
    chunk             positions of prompts that are read in one step, so that a long one does not hold up the others
    media_bytes       of media features that are kept for the next request that shows the same

    Raises ValueError for a model whose cache cannot be paged (`not_paged` says why).
    """

    def __init__(
        self,
        model: Any,
        pages: int | None = 1024,
        page_size: int = 16,
        max_rows: int = 32,
        chunk: int = 512,
        media_bytes: int = 1 << 28,
    ) -> None:
        check_model(model)
        check_at_least_one(pages=pages, page_size=page_size, max_rows=max_rows, chunk=chunk)
        if reason := not_paged(model):
            raise ValueError(f"an Engine cannot take this model: {reason}")
        self.model, self.max_rows, self.chunk = model, max_rows, chunk
        count = -(-FIRST_ROOM // page_size) if pages is None else pages
        self.pages = Pages(len(model.decoder.layers), count, page_size, grows=pages is None)
        self.recurrent = any(hasattr(module, "cache_numbers_fixed") for module in model.decoder.modules())
        self.features = Remembered(media_bytes, model.device)
        self.counts = Counts()
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []

    def submit(
        self,
        sample: Sample,
        max_new_tokens: int = 512,
        seed: int = 0,
        max_length: int | None = None,
        **options: Unpack[Options],
    ) -> Ticket:
        """Queues a chat; see `mm.generation.engine.generate` for the arguments and what they raise.

        Raises ValueError too for a method that looks further than the next token, and for a request that the pages
        could never hold.
        """
        return self.add(self.prepare(sample, max_new_tokens, seed, max_length, **options))

    def prepare(
        self,
        sample: Sample,
        max_new_tokens: int = 512,
        seed: int = 0,
        max_length: int | None = None,
        **options: Unpack[Options],
    ) -> Ticket:
        """The ticket of a chat, for `add`. Unlike everything else here, this may run in any thread, beside the engine's
        own. Arguments and errors as in `submit`."""
        decoding = self._decoding(max_new_tokens, max_length, options)
        (request,) = encode_requests(self.model, [sample], seed, max_new_tokens, max_length, decoding.thinking)
        return self._ticket(request, decoding, max_new_tokens, request.opening)

    def prepare_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 512,
        seed: int = 0,
        max_length: int | None = None,
        **options: Unpack[Options],
    ) -> Ticket:
        """As `prepare`, for text that is continued as it is: token ids, at least one. No reasoning is taken out of it.
        Raises ValueError also for an id that is none of the model's."""
        decoding = self._decoding(max_new_tokens, max_length, options)
        request = ids_request(self.model, ids, seed, max_new_tokens, max_length)
        if decoding.thinking is not None:
            raise ValueError(f"thinking={decoding.thinking} is for chats; ids are continued as they are")
        return self._ticket(request, decoding, max_new_tokens, opening=None)

    def add(self, ticket: Ticket) -> Ticket:
        """Queues a ticket that `prepare` made, here or in another engine of the same model and as many pages."""
        ticket.engine = self
        self.waiting.append(ticket)
        return ticket

    def _decoding(self, max_new_tokens: int, max_length: int | None, options: Options) -> Decoding:
        check_at_least_one(max_new_tokens=max_new_tokens, max_length=max_length)
        decoding = Decoding(**options)
        if name := unsupported(decoding):
            raise ValueError(f"{name}: the engine decodes token by token; use generate")
        return decoding

    def _ticket(self, request: Request, decoding: Decoding, max_new_tokens: int, opening: Tensor | None) -> Ticket:
        room = self.pages.count * self.pages.size
        if not self.pages.grows and request.encoded.length + max_new_tokens > room:
            raise ContextTooLong(
                f"{request.name}: a prompt of {request.encoded.length} positions and max_new_tokens={max_new_tokens} "
                f"exceed the {room} positions of all pages; give the engine more pages"
            )
        prompts = Prompts({}, [request.encoded.ids], [request.name], [request.generator], [request.opening])
        shaper = Shaper(self.model, prompts, decoding, stop_ids(self.model))
        return Ticket(self, request.encoded, request.name, shaper, max_new_tokens, opening)

    def run(self) -> None:
        """Until every request has ended."""
        while self.waiting or self.running:
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Reads up to `chunk` positions of prompts; decodes a token of each request whose prompt was read before."""
        ready = [ticket for ticket in self.running if ticket.sequence is None]
        end = self.counts.prefilled + self.chunk
        while self.counts.prefilled < end and (ticket := self._reading()) is not None:
            self._attempt(ticket, lambda ticket: self._read(ticket, end - self.counts.prefilled))
        if ready:
            self._decode(ready)

    def _reading(self) -> Ticket | None:
        """The request whose prompt is being read, or else the next that there is room for, first come, first served.

        One begins when the one before is read, and shares what it left. Pages for all of a request are reserved, so
        that none has to be thrown out; pages that grow are reserved as answers do.
        """
        for ticket in self.running:
            if ticket.sequence is not None:
                return ticket
        while self.waiting and len(self.running) < self.max_rows:
            ticket = self.waiting[0]
            if not self.recurrent:
                self.pages.share(ticket.table, ticket.identities)
            try:
                later = 0 if self.pages.grows else ticket.max_new_tokens
                self.pages.reserve(ticket.table, len(ticket.identities) + later)
            except OutOfPages:
                self.pages.release(ticket.table)
                ticket.table = Table()
                return None
            self.waiting.popleft()
            self.running.append(ticket)
            ticket.shared = ticket.table.length
            self.counts.shared += ticket.shared
            self._attempt(ticket, self._splice)
            if ticket.sequence is not None:
                return ticket
        return None

    def _attempt(self, ticket: Ticket, work: Any) -> None:
        """What goes wrong with one request ends that one."""
        try:
            work(ticket)
        except (ValueError, RuntimeError) as error:
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.error = error
        self.leave(ticket, "error")

    def _splice(self, ticket: Ticket) -> None:
        batch = collate([[ticket.encoded]]).to(self.model.device)
        features: dict[str, Features] = {}
        for kind in batch.media:
            tower = self.model.tower(kind)
            items = [self.features.of(tower, item, self.counts) for item in ticket.encoded.media if item.kind == kind]
            features[kind] = Features(Tokens.stack(items), tower.bridge.inline)
        ticket.sequence = splice(batch, self.model.decoder.embed, features, self.model.slots)
        ticket.cross = ticket.sequence.cross
        ticket.next_position = int(ticket.sequence.positions.max()) + 1

    def _read(self, ticket: Ticket, most: int) -> None:
        """Up to `most` positions of its prompt; after the last of them comes its first token."""
        assert ticket.sequence is not None
        start, length = ticket.table.length, ticket.sequence.index.shape[1]
        end = min(length, start + most)
        view = PagedView(self.pages, [ticket.table], end - start, self.model.device)
        hidden, _ = self.model.decoder(ticket.sequence.columns(start, end), view)
        view.commit()
        self.counts.prefilled += end - start
        if not self.recurrent:
            self.pages.register(ticket.table, ticket.identities)
        if end == length:
            ticket.sequence = None
            logits = self.model.logits(hidden[:, -1]).float()
            ticket.shaper.begin(logits)
            self._choose([ticket], logits)

    def _decode(self, tickets: list[Ticket]) -> None:
        device = self.model.device
        for ticket in tickets:
            self.pages.reserve(ticket.table, ticket.table.length + 1)
        # What has just been chosen is read now; its request holds a page for it.
        ids = torch.tensor([ticket.ids[-1] for ticket in tickets], device=device)
        index = torch.tensor([ticket.table.length for ticket in tickets], device=device)
        position = torch.tensor([ticket.next_position for ticket in tickets], device=device)
        sequence = self.model.text_after(ids[:, None], index, position)
        sequence.cross = beside([ticket.cross for ticket in tickets])
        view = PagedView(self.pages, [ticket.table for ticket in tickets], 1, device)
        hidden, _ = self.model.decoder(sequence, view)
        view.commit()
        self.counts.steps += 1
        for ticket in tickets:
            ticket.next_position += 1
            if not self.recurrent:
                self.pages.register(ticket.table, ticket.identities)
        self._choose(tickets, self.model.logits(hidden[:, 0]).float())

    def _choose(self, tickets: list[Ticket], logits: Tensor) -> None:
        """The next token of each, by its own options; those that have the same and nothing of their own go together."""
        together: OrderedDict[Any, list[int]] = OrderedDict()
        for place, ticket in enumerate(tickets):
            shaper = ticket.shaper
            plain = shaper.history is None and shaper.constraint is None and shaper.thinking is None
            together.setdefault(_hashable(shaper.decoding) if plain else place, []).append(place)
        for places in together.values():
            alike = [tickets[place] for place in places]
            try:
                chosen = self._chosen(alike, logits[places])
            except (ValueError, RuntimeError) as error:  # a form that cannot be followed any further
                for ticket in alike:
                    self._fail(ticket, error)
                continue
            for ticket, (token, its) in zip(alike, chosen, strict=True):
                self._attempt(ticket, lambda ticket, token=token, its=its: self._give(ticket, token, its))

    def _chosen(self, tickets: list[Ticket], logits: Tensor) -> list[tuple[int, TokenLogprob | None]]:
        """The next tokens of requests with the same options, and how likely each is if that was asked for."""
        shaper = tickets[0].shaper
        generators = [ticket.shaper.prompts.generators[0] for ticket in tickets]
        ids = shaper.decoding.choose(shaper.mask(logits), generators, shaper.history).tolist()
        if (top := shaper.decoding.logprobs) is None:
            return [(token, None) for token in ids]
        # One that has no distribution (INVALID) is refused before its likelihood is looked at.
        return list(zip(ids, likelihoods(logits, [max(token, 0) for token in ids], top), strict=True))

    def _give(self, ticket: Ticket, token: int, likely: TokenLogprob | None) -> None:
        if token == INVALID:
            ticket.shaper.prompts.refuse(0, len(ticket.ids) + 1)
        self.counts.decoded += 1
        ticket.take(token, likely)

    def leave(self, ticket: Ticket, reason: str) -> None:
        """Ends a request and frees what it holds."""
        ticket.finish_reason = reason
        if ticket in self.running:
            self.running.remove(ticket)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)
        self.pages.release(ticket.table)
        ticket.sequence = ticket.cross = None


def not_paged(model: Any) -> str | None:
    """Why a model's cache cannot be paged, or None."""
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        return f"{type(model).__name__} has no decoder whose layers' caches could be paged"
    if decoder.rereader.lengths:
        return "at its original length LongRoPE reads the whole cache anew, and pages cannot be read anew"
    return None


def _hashable(decoding: Decoding) -> Any:
    return decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p, decoding.typical_p, decoding.logprobs
