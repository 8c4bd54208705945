"""lmms-eval runs our models: `python -m lmms_eval --model mm --model_args model=DIR --tasks ...`.

The entry point `lmms_eval.models` names `MANIFEST`, so nothing in lmms-eval is changed. Two interfaces: "chat" (text,
image, video and audio in messages) generates; "simple" (`--force_simple`) also gives likelihoods.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

import mm
from mm.datasets.source import SUFFIXES
from mm.evaluation.likelihood import score_choices
from mm.harness.requests import answer
from mm.types import Media, Sample

MANIFEST = ModelManifest(
    model_id="mm",
    simple_class_path="mm.harness.lmms_eval_model.SimpleModel",
    chat_class_path="mm.harness.lmms_eval_model.ChatModel",
)


class SimpleModel(lmms):
    """Requests carry a text and a function that gives a document's media, which stand before the text.

    `model` is a directory that `mm.load` opens; `device` and `batch_size` are lmms-eval's own options.
    """

    is_simple = True

    def __init__(
        self, model: str, device: str | None = None, batch_size: int | str = 1, max_batch_size: int | str | None = None
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("mm inside lmms-eval runs in one process; for several ranks use `mm validate`")
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._mm: Any = mm.load(model).to(where).eval()
        self._batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        samples, options = [], []
        for number, request in enumerate(requests):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            samples.append(self._sample(str(number), context, doc_to_visual(self.task_dict[task][split][doc_id])))
            options.append(settings)
        return self._answer(samples, options)

    def _answer(self, samples: Sequence[Sample], options: Sequence[dict[str, Any]]) -> list[GenerationResult]:
        texts = answer(self._mm, samples, options, length_key="max_new_tokens", batch_size=self._batch_size)
        return [GenerationResult(text=text) for text in texts]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """A loss (negative log-likelihood) and whether decoding would give it: lmms-eval chooses the least."""
        samples, choices = [], []
        for number, request in enumerate(requests):
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            text = continuation if isinstance(continuation, str) else continuation(document)
            samples.append(self._sample(str(number), context, doc_to_visual(document) if doc_to_visual else []))
            # The chat template ends with what opens the answer: no space is due there.
            choices.append([text.removeprefix(" ")])
        scored = score_choices(self._mm, samples, choices, plain=False, batch_size=self._batch_size)
        return [GenerationResult(text=(-found.loglikelihood, found.greedy)) for (found,) in scored]  # type: ignore[arg-type]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        raise NotImplementedError("mm answers one round; the task asks for several")

    @staticmethod
    def _sample(key: str, context: str, visuals: Iterable[Any] | None) -> Sample:
        media = [as_media(item) for item in visuals or []]
        parts: list[dict[str, Any]] = [{"type": item.kind, "media": index} for index, item in enumerate(media)]
        return Sample(key, [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}], media)


class ChatModel(SimpleModel):
    """Requests carry a function that gives a document's messages, media where they stand in the text."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        samples, options = [], []
        for number, request in enumerate(requests):
            _, doc_to_messages, settings, doc_id, task, split = request.args
            samples.append(sample_of(str(number), doc_to_messages(self.task_dict[task][split][doc_id])))
            options.append(settings)
        return self._answer(samples, options)


def sample_of(key: str, messages: Sequence[dict[str, Any]]) -> Sample:
    """lmms-eval's messages, contents typed text, image, video, audio (media under "url"), as a sample."""
    media: list[Media] = []
    turns = []
    for message in messages:
        content = message["content"]
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                if part.get("start_time") is not None or part.get("end_time") is not None:
                    raise ValueError(
                        f"request {key}: a part of a {part['type']} is asked for; only whole ones are read"
                    )
                media.append(as_media(part["url"], part["type"]))
                parts.append({"type": media[-1].kind, "media": len(media) - 1})
        turns.append({"role": message["role"], "content": parts})
    return Sample(key, turns, media)


def as_media(item: Any, kind: str | None = None) -> Media:
    """A picture (PIL), a file's path, or a sound ({"array", "sampling_rate"}, or a decoder) as a file's bytes or path.

    Raises ValueError for anything else.
    """
    if hasattr(item, "convert") and hasattr(item, "save"):
        buffer = io.BytesIO()
        item.convert("RGB").save(buffer, "PNG")
        return Media("image", buffer.getvalue(), "image.png")
    if isinstance(item, (str, Path)):
        path = Path(item)
        found = kind or SUFFIXES.get(path.suffix.lower())
        if found not in ("image", "audio", "video"):
            raise ValueError(f"{path}: ends in no known image, audio or video suffix")
        return Media(found, path, path.name)
    if isinstance(item, dict) and "array" in item:
        return _sound(torch.as_tensor(item["array"]), int(item["sampling_rate"]))
    if hasattr(item, "get_all_samples"):  # torchcodec's decoder, as the datasets library gives it
        decoder: Any = item
        samples = decoder.get_all_samples()
        return _sound(samples.data.T.squeeze(-1), int(samples.sample_rate))
    raise ValueError(f"media of type {type(item).__name__} cannot be read; give a picture, a path or a sound")


def _sound(samples: torch.Tensor, rate: int) -> Media:
    """(S,) or (S, C) in [-1, 1] at `rate` hertz."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples.float().numpy(), rate, format="WAV", subtype="FLOAT")
    return Media("audio", buffer.getvalue(), "audio.wav")
