"""A small real tokenizer, and a recurrent model: cheap, and every token of its prompt matters."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mm.datasets.chat_template import ChatTemplate
from mm.model import MultimodalModel
from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.text import TextTokenizer
from mm.types import Media, MediaSpec, Sample


class RecurrentModel(nn.Module):
    """h <- tanh(h W + element); logits = h U. An image is one element: the mean of its patches."""

    def __init__(self, tokenizer: TextTokenizer, width: int = 24) -> None:
        super().__init__()
        self.tokenizer, self.template = tokenizer, ChatTemplate("compact")
        self.image = ImageTokenizer(patch=2, max_tokens=16)
        generator = torch.Generator().manual_seed(1)
        vocab = tokenizer.vocab_size
        self.recur = nn.Parameter(torch.randn(width, width, generator=generator) / width**0.5 * 1.5)
        self.embed = nn.Parameter(torch.randn(vocab, width, generator=generator))
        self.pixel = nn.Parameter(torch.randn(self.image.dim, width, generator=generator))
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.7, generator=generator)
        self.eval()

    device = torch.device("cpu")

    def media_specs(self):
        return {"image": MediaSpec(self.image)}

    def new_cache(self):
        return RowState()

    def forward(self, batch=None, *, input_ids=None, attention_mask=None, cache):
        if batch is not None:
            input_ids, attention_mask = batch.input_ids, batch.document_ids > 0
        assert input_ids is not None and attention_mask is not None
        elements = self.embed[input_ids.clamp(min=0)]
        if batch is not None and "image" in batch.media:
            media = batch.media["image"]
            values = media.tokens.values.float() / 255 * media.tokens.mask[..., None]
            means = values.sum(1) / media.tokens.mask.sum(1, keepdim=True)
            elements = elements.index_put((media.rows, media.columns), means @ self.pixel)
        h, states = torch.zeros(len(elements), elements.shape[-1]), []
        for t in range(elements.shape[1]):
            h = torch.where(attention_mask[:, t, None].bool(), torch.tanh(h @ self.recur + elements[:, t]), h)
            states.append(h)
        cache.h = h
        mask = attention_mask.bool()
        return SimpleNamespace(hidden=torch.stack(states, 1), head=self.head, sequence=SimpleNamespace(mask=mask))

    def step(self, ids, cache):
        return self.logits(self.advance(ids[:, None], cache)[:, 0])

    def advance(self, ids, cache):
        states = []
        for column in range(ids.shape[1]):
            cache.h = torch.tanh(cache.h @ self.recur + self.embed[ids[:, column]])
            states.append(cache.h)
        return torch.stack(states, 1)

    def logits(self, hidden):
        return self.head(hidden)


class RowState:
    """The cache of a RecurrentModel: h (B, D)."""

    h = torch.zeros(0)

    def keep(self, rows):
        self.h = self.h[rows]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["what colour is the shape? red, green or blue. " * 4], vocab_size=300)


@pytest.fixture
def model(tokenizer):
    return RecurrentModel(tokenizer)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], MultimodalModel]:
    """published(family) -> a random model of it, made once: nobody may change it."""
    from tests.decoder.families.parity import Case, make_pair  # these load transformers
    from tests.generation.test_transformers import CONFIGS

    @cache
    def make(family: str) -> MultimodalModel:
        return make_pair(Case(CONFIGS[family]), tmp_path_factory.mktemp(family)).model

    return make


@pytest.fixture
def ask():
    """ask(text, key) -> a Sample with one question; `image` puts a random picture before it."""

    def make(text: str, key: str = "q", image: int | None = None) -> Sample:
        if image is None:
            return Sample(key, [{"role": "user", "content": text}])
        media = Media("image", png(image), "random.png")
        parts = [{"type": "image", "media": 0}, {"type": "text", "text": text}]
        return Sample(key, [{"role": "user", "content": parts}], [media])

    return make


def png(seed: int) -> bytes:
    import io

    from PIL import Image

    pixels = torch.randint(
        0, 256, (4 + seed % 3, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
