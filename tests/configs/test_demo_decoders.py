"""The decoders that can stand in the demo's model: with media, packed rows and branches they train, and then answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from mm.decoder.decoder import Decoder
from mm.encoders.transformer import TransformerEncoder
from mm.fusion.projector import LinearProjector
from mm.generation.engine import generate
from mm.model import MultimodalModel, TowerConfig
from mm.objectives.instruct import NextToken
from mm.parts import build
from mm.testing import picture, sample_batch, tiny_tokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.types import Sample

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "decoder"


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SHOWN = {"role": "user", "content": [{"type": "image", "media": 0}]}
BRANCHES = [[ask("what color?"), answer("red")], [ask("what shape? "), answer("a blue shape")]]
PICTURE = Sample("picture", [SHOWN], [picture(1)], BRANCHES)
TALK = Sample("talk", [ask("how many?"), answer("two. ")])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("demo_*.yaml")), ids=lambda path: path.stem)
def test_trains_and_answers(path: Path) -> None:
    torch.manual_seed(0)
    decoder = build(yaml.safe_load(path.read_text()), Decoder)
    encoder = partial(TransformerEncoder, width=16, layers=1, heads=2)
    tower = TowerConfig(ImageTokenizer(patch=2, max_tokens=16), LinearProjector, encoder)
    model = MultimodalModel(tiny_tokenizer(), decoder, {"image": tower}).train()
    objective, batch = NextToken(), sample_batch(model, [[TALK, PICTURE], [PICTURE]])

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        loss = objective(model, batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        if step == 0:
            first = float(loss.parts["lm"])
            gradients = {name: p.grad for name, p in decoder.named_parameters()}
            assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
            assert all(g.abs().max() > 0 for name, g in gradients.items() if g is not None and ".mixer." in name)
        optimizer.step()
    assert float(loss.parts["lm"]) < 0.1 * first, path.stem

    asked = [replace(PICTURE, messages=[SHOWN, branch[0]], branches=[]) for branch in BRANCHES]
    asked.append(replace(TALK, messages=[TALK.messages[0]]))
    said = [given.text for given in generate(model.eval(), asked, max_new_tokens=12)]
    assert said == ["red", "a blue shape", "two. "]
