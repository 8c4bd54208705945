"""What the harnesses' generation requests have in common: options a request, texts in the order asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm.evaluation.respond import continue_texts, seed_of
from mm.evaluation.shared_media import generate_shared
from mm.generation.engine import generate
from mm.generation.options import Options
from mm.generation.stopping import cut_before
from mm.types import Sample

DEFAULT_LENGTH = 256  # tokens, where a task states none
KNOWN = ("until", "do_sample", "temperature", "top_p", "top_k", "num_beams")


def answer(
    model: Any,
    samples: Sequence[Sample],
    options: Sequence[Mapping[str, Any]],
    *,
    length_key: str,
    batch_size: int,
    plain: bool = False,
) -> list[str]:
    """Texts for requests with their own options, decoded together where those agree. `plain` uses no chat template.

    Options are the harness's: "until" (texts that end an answer), the answer's length under `length_key`, and sampling
    if "do_sample" is true or "temperature" above 0. Raises ValueError naming an option that is not known here.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, given in enumerate(options):
        unknown = [key for key in given if key not in (*KNOWN, length_key)]
        if unknown or given.get("num_beams", 1) not in (1, None):
            what = f"option {unknown[0]!r}" if unknown else f"num_beams={given['num_beams']}"
            raise ValueError(f"request {index}: {what} is not supported by mm")
        groups.setdefault(_settings(given, length_key), []).append(index)
    texts: dict[int, str] = {}
    for (length, temperature, top_p, top_k, until), indices in groups.items():
        stop = [text for text in until if text]  # an empty one ends every answer before it begins: below
        asked = [samples[index] for index in indices]
        if plain:
            found = continue_texts(model, asked, length, temperature=temperature, stop=stop, batch_size=batch_size)
        elif temperature:
            seeds = [seed_of(sample) for sample in asked]
            sampling: Options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_strings": stop}
            given = generate(model, asked, length, seed=seeds, batch_size=batch_size, **sampling)
            found = [one.text for one in given]
        else:
            greedy = generate_shared(model, asked, max_new_tokens=length, batch_size=batch_size)
            found = [one.text for one in greedy]
        texts |= {index: cut_before(text, until) for index, text in zip(indices, found, strict=True)}
    return [texts[index] for index in range(len(samples))]


def _settings(
    given: Mapping[str, Any], length_key: str
) -> tuple[int, float, float | None, int | None, tuple[str, ...]]:
    until = given.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") is False:
        temperature = 0.0
    elif given.get("do_sample") and not temperature:
        temperature = 1.0
    sampled = temperature > 0
    top_p, top_k = (given.get(name) if sampled else None for name in ("top_p", "top_k"))
    return int(given.get(length_key) or DEFAULT_LENGTH), temperature, top_p, top_k or None, stops
