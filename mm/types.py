"""The words that every stage shares: a sample, its media, their tokens, a batch, and the decoder's sequence.

    Sample -> Tokens (per media item) -> Batch -> features -> Sequence -> logits

Shape legend: `B` rows, `L` elements of a row before the splice (a text token or one slot per media item), `T` positions
of a row after it, `M` media items of one kind in the batch, `N` tokens of a media item, `F` their width, `D` the
decoder's width.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
MODALITIES: tuple[str, ...] = ("text", *KINDS)  # index = Sequence.modality_ids
Grid = tuple[int, int, int]  # (t, h, w) cells of a media item; audio is (t, 1, 1), an image (1, h, w)

IGNORE = -100  # a label that the loss leaves out
SLOT_IDS: dict[str, int] = {"image": -1, "audio": -2, "video": -3}  # input_ids of a slot: no text can spell them

_T = TypeVar("_T")


class MediaError(ValueError):
    """A media file that cannot be used: the message names the file and says why (empty, truncated, wrong type, ...)."""


class MediaTooLarge(MediaError):
    """Whole, as far as is known, but beyond a limit on its pixels, frames, samples or seconds."""


@dataclass(frozen=True)
class Media:
    """One media item as it came: `data` holds the file's bytes or its path; `name` is what messages call it.

    Where another process has decoded the file already, `tokens` holds what the model's tokenizer made of it, and `data`
    nothing: the bytes of a stranger then have no way into this one. `features` is what a frozen encoder made of it, as
    shards store it (mm.datasets.features).
    """

    kind: Kind
    data: bytes | Path
    name: str
    tokens: Tokens | None = field(default=None, repr=False, compare=False)
    features: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Waveform:
    """Decoded sound: `samples` (C, S) float32 in [-1, 1] at `rate` hertz."""

    samples: Tensor
    rate: int


class Clip(Protocol):
    """An opened video: `duration` in seconds, `size` (H, W) in pixels; frames are read by time, on demand."""

    duration: float
    size: tuple[int, int]

    def frames_at(self, seconds: Seq[float]) -> Tensor:
        """(len(seconds), 3, H, W) uint8: the frame shown at each time (the last frame at or before it)."""
        ...


@dataclass
class Sample:
    """A chat with its media.

    `messages` is `[{"role": "system" | "user" | "assistant", "content": str | [part, ...]}]`, and a part is
    `{"type": "text", "text": str}` or `{"type": "image" | "audio" | "video", "media": i}`, `i` an index into `media`.
    An assistant's message may have `reasoning_content`, text: what was thought before it.
    `branches`, if any, are alternative continuations of `messages`: each sees the common `messages` and not the
    other branches (ten questions about one image cost one image).
    """

    key: str
    messages: list[dict[str, Any]]
    media: list[Media] = field(default_factory=list)
    branches: list[list[dict[str, Any]]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reduction:
    """What a stage does to the grid of a media item: a pure function, so that token counts are known before the model
    runs.

    `stride` divides each axis, rounding up; `fixed`, if set, replaces the grid by that many tokens (a resampler).
    """

    stride: Grid = (1, 1, 1)
    fixed: int | None = None

    def __call__(self, grid: Grid) -> Grid:
        if self.fixed is not None:
            return (self.fixed, 1, 1)
        t, h, w = (-(-size // stride) for size, stride in zip(grid, self.stride, strict=True))
        return (t, h, w)


@dataclass
class Tokens:
    """Tokens of one media item, or of `M` of them padded to the longest (then every field has a leading `M`).

    values     (N, F)  uint8 pixels of a patch, float32 log-mel bins of a frame, or float features
    positions  (N, 3)  int64 cell (t, h, w) of each token in its grid
    mask       (N,)    bool, False at padding
    grid       (3,)    int64 cells (t, h, w); t*h*w is the number of unpadded tokens
    """

    values: Tensor
    positions: Tensor
    mask: Tensor
    grid: Tensor

    @staticmethod
    def of_grid(values: Tensor, grid: Grid) -> Tokens:
        """Unpadded tokens in raster order (t, then h, then w)."""
        t, h, w = grid
        if values.shape[0] != t * h * w:
            raise ValueError(f"{values.shape[0]} tokens do not fill the grid {grid}")
        return Tokens(values, grid_positions(grid), torch.ones(values.shape[0], dtype=torch.bool), torch.tensor(grid))

    @staticmethod
    def stack(items: Seq[Tokens]) -> Tokens:
        """Pads items to the longest and stacks them: (M, N, F), (M, N, 3), (M, N), (M, 3)."""
        pad = nn.utils.rnn.pad_sequence
        return Tokens(
            pad([item.values for item in items], batch_first=True),
            pad([item.positions for item in items], batch_first=True),
            pad([item.mask for item in items], batch_first=True),
            torch.stack([item.grid for item in items]),
        )

    def with_values(self, values: Tensor) -> Tokens:
        return replace(self, values=values)

    def to(self, device: torch.device | str) -> Tokens:
        return _move(self, torch.device(device), non_blocking=False)

    def __len__(self) -> int:
        return self.values.shape[0]


def grid_positions(grid: Grid) -> Tensor:
    """(t*h*w, 3) int64: the cell (t, h, w) of every token in raster order."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], dim=-1)


@runtime_checkable
class MediaTokenizer(Protocol):
    """Decoded media -> Tokens. Holds no learned part; runs in loader workers.

    `dim` is F. `measure(media)` gives the grid without doing the work; `count(media)` is its product and equals
    `len(self(media))` always.
    """

    dim: int

    def measure(self, media: Any) -> Grid: ...
    def count(self, media: Any) -> int: ...
    def __call__(self, media: Any) -> Tokens: ...


@dataclass(frozen=True)
class MediaSpec:
    """How the data side makes one kind of media: its tokenizer, and the number of decoder positions it will take.

    `reductions` are the encoder's and then the bridge's. `inline` is False for cross-attention bridges: a slot then
    takes one position, whatever the media's size.
    """

    tokenizer: MediaTokenizer
    reductions: tuple[Reduction, ...] = ()
    inline: bool = True

    def encoded(self, grid: Grid) -> Grid:
        """What the encoder makes of the tokenizer's grid."""
        return self.reductions[0](grid) if self.reductions else grid

    def slot_length(self, grid: Grid) -> int:
        if not self.inline:
            return 1
        for reduction in self.reductions:
            grid = reduction(grid)
        return grid[0] * grid[1] * grid[2]


class Encoder(nn.Module):
    """Tokens (M, N, F) -> Tokens (M, N', out_dim). Built by its parent with `in_dim` = F first."""

    out_dim: int
    reduction: Reduction = Reduction()

    def forward(self, tokens: Tokens) -> Tokens:  # pragma: no cover - interface
        raise NotImplementedError

    def saved(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that rebuild it, to be filled from a saved model: no weights file is read again."""
        return arguments | {"weights": None} if "weights" in arguments else arguments


class Bridge(nn.Module):
    """Tokens (M, N, in_dim) -> Tokens (M, N', out_dim). Built by its parent with the two widths first.

    `inline` says whether the result stands in the sequence, or is read by cross-attention layers.
    """

    reduction: Reduction = Reduction()
    inline: bool = True

    def forward(self, tokens: Tokens) -> Tokens:  # pragma: no cover - interface
        raise NotImplementedError


EncoderFactory = Callable[[int], Encoder]
BridgeFactory = Callable[[int, int], Bridge]


@dataclass
class MediaBatch:
    """The `M` items of one kind in a batch and the slots that they fill.

    tokens    Tokens, padded and stacked
    rows      (M,) int64 row of the batch           columns (M,) int64 element of that row (a SLOT_IDS id stands there)
    lengths   (M,) int64 decoder positions that the data side counted for the slot; the splice checks them
    names     the items as error messages call them ("sample key: file")
    encoded   the tokens are an encoder's features already, read from shards
    """

    tokens: Tokens
    rows: Tensor
    columns: Tensor
    lengths: Tensor
    names: list[str]
    encoded: bool = False


@dataclass
class Batch:
    """Rows of packed samples, one element per text token and one per media slot.

    input_ids     (B, L) int64  text ids; SLOT_IDS[kind] at slots; 0 at padding
    labels        (B, L) int64  the id to be predicted AT this element (not shifted); IGNORE elsewhere
    document_ids  (B, L) int64  1, 2, ... per sample in the row; 0 = padding
    branch_ids    (B, L) int64  0 = common part; 1, 2, ... = branch of the document
    media         kind -> MediaBatch; a kind without items is absent
    samples       rows -> the samples in them (key, meta and, for evaluation, answers)
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    branch_ids: Tensor
    media: dict[str, MediaBatch] = field(default_factory=dict)
    samples: list[list[Sample]] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return _move(self, torch.device(device), non_blocking)


@dataclass
class CrossMedia:
    """Media that the text attends to from beside the sequence (gated cross-attention).

    values (B, N, D); document_ids, branch_ids and index (B, N) as in Sequence: text sees media of its own
    document and branch whose `index` is not after its own. document_ids is 0 at padding.
    """

    values: Tensor
    document_ids: Tensor
    branch_ids: Tensor
    index: Tensor


@dataclass
class Sequence:
    """What the decoder reads.

    embeddings    (B, T, D)
    index         (B, T) int64     place in the document (along its own branch): 1-D positions
    positions     (B, T, 3) int64  (t, h, w): equal on all axes for text; a media item spans its grid and advances the
                                   text that follows by its largest extent (M-RoPE)
    document_ids  (B, T) int64     0 = padding
    branch_ids    (B, T) int64     0 = common part
    modality_ids  (B, T) int64     index into MODALITIES
    labels        (B, T) int64     as in Batch
    predecessor   (B, T) int64     column of the position that predicts this one (the first position of a branch is
                                   predicted by the last common one); -1 where a document starts
    cross         media beside the sequence, or None
    """

    embeddings: Tensor
    index: Tensor
    positions: Tensor
    document_ids: Tensor
    branch_ids: Tensor
    modality_ids: Tensor
    labels: Tensor
    predecessor: Tensor
    cross: CrossMedia | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: True where a real token stands."""
        return self.document_ids > 0

    def columns(self, start: int, end: int) -> Sequence:
        """That part of every row; the media beside it stay whole, and `predecessor` counts from the old start."""
        parts = {f.name: getattr(self, f.name)[:, start:end] for f in fields(self) if f.name != "cross"}
        return Sequence(**parts, cross=self.cross)


@dataclass
class Routing:
    """What a router decided for `S` tokens over `E` experts, `K` chosen each.

    indices (S, K) int64    weights (S, K) in the activations' dtype    logits (S, E) float32
    scores  (S, E) float32  the probabilities that balance losses use (softmax, or normalised sigmoid)
    mask    (S,) bool       False at padding: left out of every statistic, and sent to no expert
    kept    (S, K) bool     False where a choice is not carried out: its expert is full, or, where the experts choose,
                            fewer than K of them chose the token. None: all are carried out
    dropped (E,) float32    how many choices of unpadded tokens each expert had no room for; None: dropless
    """

    indices: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor
    mask: Tensor
    kept: Tensor | None = None
    dropped: Tensor | None = None

    def taken(self) -> Tensor:
        """(S, K) bool: the choices of unpadded tokens that are carried out."""
        taken = self.mask[:, None].expand_as(self.indices)
        return taken if self.kept is None else taken & self.kept

    def chosen(self) -> Tensor:
        """(S, K) bool: the choices of unpadded tokens, those included that an expert had no room for."""
        return self.taken() if self.dropped is None else self.mask[:, None].expand_as(self.indices)

    def load(self) -> Tensor:
        """(E,) float32: how many unpadded tokens each expert works on."""
        return self._count(self.taken())

    def demand(self) -> Tensor:
        """(E,) float32: how many unpadded tokens each expert was chosen for. What balance is about."""
        return self._count(self.chosen())

    def _count(self, which: Tensor) -> Tensor:
        """Adds, and selects nothing: a mask's size would have to travel from the GPU first."""
        counts = torch.zeros(self.logits.shape[-1], device=self.indices.device)
        return counts.index_add_(0, self.indices.reshape(-1), which.reshape(-1).float())


def _move(value: _T, device: torch.device, non_blocking: bool) -> _T:
    """A copy of a tree of dataclasses, dicts and lists with every tensor on `device`."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=non_blocking)
    elif isinstance(value, (Batch, MediaBatch, Tokens)):
        moved = replace(value, **{f.name: _move(getattr(value, f.name), device, non_blocking) for f in fields(value)})
    elif isinstance(value, dict):
        moved = {key: _move(item, device, non_blocking) for key, item in value.items()}
    return moved
