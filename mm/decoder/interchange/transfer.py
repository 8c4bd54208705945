"""Moving weights by a family's rules: their files into our decoder, and our decoder into their names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mm.decoder.interchange.family import Family
from mm.decoder.interchange.sources import Source
from mm.decoder.interchange.weights import Rule

Shape = tuple[int, ...]


def fill(decoder: nn.Module, family: Family, rules: list[Rule], source: Source, where: str) -> None:
    """Copies every tensor of `source` into `decoder`, cast to the decoder's dtypes; nothing unless all fit.

    Raises ValueError naming a tensor that is missing, left over or of another shape (with both shapes).
    """
    own = state(decoder)
    read, tied = _split_tied(decoder, rules, own)
    names = _stored_names(family, [*read, *tied], source)
    _check(family, read, tied, own, names, source, where)
    with torch.no_grad():
        for rule in read:
            if rule.value is not None:
                own[rule.ours[0]].fill_(rule.value)
                continue
            for name, tensor in zip(rule.ours, rule.load([source.get(names[n]) for n in rule.theirs]), strict=True):
                own[name].copy_(tensor)
        for rule in tied:
            _check_tied(decoder, rule, names, source)


def extract(decoder: nn.Module, rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors under their names, in the rules' order; a tied one once.

    Raises ValueError for a tensor that their files cannot hold (a selection bias that training moved).
    """
    own = state(decoder)
    for rule in _split_tied(decoder, rules, own)[0]:
        tensors = [own[name].detach() for name in rule.ours]
        if rule.value is not None:
            if bool((tensors[0] != rule.value).any()):
                raise ValueError(
                    f"tensor {rule.ours[0]} is not {rule.value:g} everywhere; this family's files have no place for it"
                )
            continue
        assert rule.export is not None, f"the rule of {rule.ours} cannot be written"
        yield from zip(rule.theirs, rule.export(tensors), strict=True)


def state(decoder: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each shared one once, under its first name; not what a bridge put between."""
    named = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    return {name: x for name, x in named.items() if not re.match(r"layers\.\d+\.cross\.", name)}


def _split_tied(decoder: nn.Module, rules: list[Rule], own: dict[str, Tensor]) -> tuple[list[Rule], list[Rule]]:
    """The rules to follow, and those of tensors that the decoder shares with another (a tied head)."""
    first = {name for name, _ in decoder.named_parameters()}
    shared = {name for name, _ in decoder.named_parameters(remove_duplicate=False)} - first
    tied = [rule for rule in rules if shared.issuperset(rule.ours)]
    read = [rule for rule in rules if not shared.issuperset(rule.ours)]
    covered = [name for rule in read for name in rule.ours]
    for what, names in (
        ("has tensor {}, which the family lacks", sorted(own.keys() - set(covered))),
        ("lacks tensor {}, which the family has", sorted(set(covered) - own.keys())),
    ):
        if names:
            raise ValueError(f"the decoder is not built as its family is: it {what.format(names[0])}{_more(names)}")
    assert len(covered) == len(set(covered)), "the family's weight map has two rules for one tensor"
    return read, tied


def _stored_names(family: Family, rules: list[Rule], source: Source) -> dict[str, str]:
    """The name in the weight map -> the name in the file, which lacks the prefix if the base model was saved alone."""
    names = {name for rule in rules for name in rule.theirs}
    if family.prefix and not any(name.startswith(family.prefix) for name in source.shapes):
        return {name: name.removeprefix(family.prefix) for name in names}
    return {name: name for name in names}


def _check(
    family: Family,
    read: list[Rule],
    tied: list[Rule],
    own: dict[str, Tensor],
    names: dict[str, str],
    source: Source,
    where: str,
) -> None:
    wanted: dict[str, Shape] = {}
    for rule in read:
        if rule.theirs:
            shapes = rule.their_shapes([tuple(own[name].shape) for name in rule.ours])
            wanted |= dict(zip((names[name] for name in rule.theirs), shapes, strict=True))
    spare = {names[name] for rule in tied for name in rule.theirs}
    known = wanted.keys() | spare
    missing = sorted(wanted.keys() - source.shapes.keys())
    extra = sorted(
        name
        for name in source.shapes.keys() - known
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
    )
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"missing tensor {missing[0]}, of shape {wanted[missing[0]]}{_more(missing)}")
        if extra:
            parts.append(f"unexpected tensor {extra[0]}, of shape {source.shapes[extra[0]]}{_more(extra)}")
        raise ValueError(f"{where}: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise ValueError(
                f"{source.file(name)}: tensor {name} has shape {source.shapes[name]}, the config's model needs {shape}"
            )


def _check_tied(decoder: nn.Module, rule: Rule, names: dict[str, str], source: Source) -> None:
    """A head that is stored although it is tied must be the embedding."""
    stored = [names[name] for name in rule.theirs]
    if not all(name in source.shapes for name in stored):
        return
    every = dict(decoder.named_parameters(remove_duplicate=False))
    for name, tensor in zip(rule.ours, rule.load([source.get(name) for name in stored]), strict=True):
        if tensor.shape != every[name].shape or not torch.equal(tensor.to(every[name].dtype), every[name].cpu()):
            raise ValueError(
                f"{source.file(stored[0])}: tensor {stored[0]} differs from the tensor that the config ties it to; "
                "set tie_word_embeddings to false in config.json if the file is right"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def materialise(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Gives a module that was built on the meta device memory, uninitialised; what was shared stays shared."""
    made: dict[int, Tensor] = {}

    def make(x: Tensor) -> Tensor:
        if id(x) not in made:
            kind = dtype if dtype is not None and x.dtype.is_floating_point else x.dtype
            empty = torch.empty(x.shape, dtype=kind, device=device)
            made[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
        return made[id(x)]

    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = make(x)  # type: ignore[assignment]
