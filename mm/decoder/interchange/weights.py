"""One weight map, read in both directions: rules that say which of their tensors make which of ours, and back.

The shapes that a file should have follow from the same rules: the way back is run on meta tensors, without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Tensors = list[Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """`load` makes our tensors from theirs, `export` theirs from ours, each in the order of the names.

    A rule without `export` reads a form that is not written (packed numbers); `shapes` then gives the shapes of theirs
    from ours. A rule without `theirs` is a tensor that their files do not have: always `value`.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable[[Tensors], Tensors]
    export: Callable[[Tensors], Tensors] | None = None
    shapes: Callable[[list[Shape]], list[Shape]] | None = None
    value: float | None = None

    def their_shapes(self, ours: list[Shape]) -> list[Shape]:
        """The shapes that their tensors have where ours have these. Raises ValueError if ours do not fit the rule."""
        if self.shapes is not None:
            return self.shapes(ours)
        assert self.export is not None, f"the rule of {self.ours} needs export or shapes"
        try:
            theirs = self.export([torch.empty(shape, device="meta") for shape in ours])
        except RuntimeError as error:
            raise ValueError(
                f"tensor {self.ours[0]} of shape {ours[0]} does not fit its weight map: {error}"
            ) from error
        return [tuple(x.shape) for x in theirs]


def same(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), list, list)


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix that is stored input by output (GPT-2's Conv1D)."""
    return mapped(ours, theirs, torch.t, torch.t)


def mapped(
    ours: str,
    theirs: str,
    load: Callable[[Tensor], Tensor],
    export: Callable[[Tensor], Tensor] | None,
    shape: Callable[[Shape], Shape] | None = None,
) -> Rule:
    """One tensor from one, by a pair of functions that undo each other; `export` must not depend on the numbers."""
    return Rule(
        (ours,),
        (theirs,),
        lambda theirs: [load(theirs[0])],
        None if export is None else lambda ours: [export(ours[0])],
        None if shape is None else lambda ours: [shape(ours[0])],
    )


def fused(ours: str, theirs: Seq[str], rows: Seq[int]) -> Rule:
    """Ours is theirs, one below the other (query, key and value; gate and up); `rows` are their sizes along dim 0."""
    return Rule(
        (ours,), tuple(theirs), lambda parts: [torch.cat(parts)], lambda whole: list(whole[0].split(list(rows)))
    )


def stacked(ours: str, theirs: Seq[str], count: int, rows: Seq[int] | None = None) -> Rule:
    """Ours (count, ...) is the tensors of `{e}` = 0 .. count - 1; several of one expert stand one below the other."""
    names = tuple(name.replace("{e}", str(e)) for e in range(count) for name in theirs)
    each = len(theirs)
    assert each == 1 or rows is not None, f"the rule of {ours} needs the rows of {theirs}"

    def load(parts: Tensors) -> Tensors:
        return [torch.stack([torch.cat(parts[i : i + each]) for i in range(0, len(parts), each)])]

    def export(whole: Tensors) -> Tensors:
        return [part for expert in whole[0].unbind(0) for part in (expert.split(list(rows)) if rows else [expert])]

    return Rule((ours,), names, load, export)


def constant(ours: str, value: float) -> Rule:
    """What their models do not have: `value` on load; a model where it is another cannot be exported."""
    return Rule((ours,), (), list, list, value=value)


def layers(numbers: Iterable[int], rules: Seq[Rule]) -> list[Rule]:
    """The rules once for every layer number, in place of `{i}` in their names."""

    def numbered(names: tuple[str, ...], i: int) -> tuple[str, ...]:
        return tuple(name.replace("{i}", str(i)) for name in names)

    return [
        replace(rule, ours=numbered(rule.ours, i), theirs=numbered(rule.theirs, i)) for i in numbers for rule in rules
    ]
