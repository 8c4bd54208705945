"""lm-eval runs our models on text tasks:

    python -m mm.harness.lm_eval_model --model mm --model_args model=DIR --tasks ...

lm-eval finds models by import alone, so this module is run in its place: it registers `mm` and hands over the whole
command line. Contexts and continuations are split into tokens as lm-eval's own Hugging Face model splits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

import mm
from mm.evaluation.likelihood import Scored, score_choices, score_documents
from mm.harness.requests import answer
from mm.types import Sample


@register_model("mm")
class Model(LM):
    """`model` is a directory (or GGUF file) that `mm.load` opens; `max_length` is the window of rolling likelihoods."""

    def __init__(
        self,
        model: str,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._mm: Any = mm.load(model).to(where).eval()
        self._batch_size = 16 if batch_size == "auto" else int(batch_size)
        self._max_length = int(max_length)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        by_context: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(index)
        found: dict[int, Scored] = {}
        choices = [[requests[index].args[1] for index in indices] for indices in by_context.values()]
        scored = score_choices(self._mm, _texts(list(by_context)), choices, plain=True, batch_size=self._batch_size)
        for indices, row in zip(by_context.values(), scored, strict=True):
            found |= dict(zip(indices, row, strict=True))
        return [(found[index].loglikelihood, found[index].greedy) for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        options: dict[str, Any] = {"max_length": self._max_length, "batch_size": self._batch_size}
        return [document.loglikelihood for document in score_documents(self._mm, texts, **options)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        contexts = [request.args[0] for request in requests]
        options = [request.args[1] for request in requests]
        return answer(
            self._mm, _texts(contexts), options, length_key="max_gen_toks", batch_size=self._batch_size, plain=True
        )


def _texts(contexts: Sequence[str]) -> list[Sample]:
    return [Sample(str(index), [{"role": "user", "content": text}]) for index, text in enumerate(contexts)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
