"""What the first answer waits for: nothing is loaded that a chat does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mm.checkpoint import save
from mm.model import MultimodalModel
from mm.parts import build
from mm.testing import tiny_tokenizer

MODEL = """
class_path: mm.model.MultimodalModel
init_args:
  tokenizer: TOKENIZER
  towers:
    image:
      tokenizer: {class_path: mm.tokenizers.image.ImageTokenizer, init_args: {patch: 16, max_tokens: 16}}
      encoder: {class_path: mm.encoders.timm_vision.TimmEncoder, init_args: {name: test_resnet}}
      bridge: {class_path: mm.fusion.projector.MLPProjector}
  decoder:
    class_path: mm.decoder.decoder.Decoder
    init_args:
      width: 24
      mixers: {full: {class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {heads: 2}}}
      ffns: {dense: {class_path: mm.decoder.ffn.dense.GatedFFN, init_args: {hidden: 24}}}
      layers: [{pattern: [full/dense], repeat: 1}]
"""
# Of these, torch's compiler, Lightning and transformers alone take a second and more each.
UNUSED = ("torch._dynamo", "sympy", "lightning", "transformers", "torchmetrics", "rich", "prompt_toolkit", "sklearn")
CHAT = """
import json, sys
import mm.cli
status = mm.cli.main(["chat", *sys.argv[1:]])
print(json.dumps({"status": status, "modules": sorted(sys.modules)}))
"""


@pytest.fixture
def start(tmp_path: Path) -> list[str]:
    """The arguments of a chat with a model that has a timm encoder."""
    config = yaml.safe_load(MODEL.replace("TOKENIZER", str(tiny_tokenizer().save(tmp_path / "tokenizer"))))
    model = build(config, MultimodalModel)
    model.config = config
    save(model, tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return [str(tmp_path / "model"), "--image", str(tmp_path / "red.png"), "--max-new-tokens", "2", "what color is it?"]


def test_nothing_is_loaded_that_an_answer_does_not_need(start: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", CHAT, *start], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == 0 and {"timm", "torchvision"} <= set(found["modules"])
    assert [name for name in UNUSED if name in found["modules"]] == []
