"""What timm and torchvision want of torch's compiler comes when it is called for, and works then."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from mm.encoders import light_imports
from mm.encoders.light_imports import compiler_put_off

# In an interpreter of its own, since this one has the compiler loaded.
LATER = """
import json, sys
import torch
import mm.encoders.timm_vision, mm.encoders.open_clip_tower
before = [name for name in sys.modules if name.startswith("torch._dynamo")]

import timm, torchvision
boxes = torchvision.ops.roi_align(torch.arange(64.0).view(1, 1, 8, 8), torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]]), 2)
classifier = torchvision.models.get_model("squeezenet1_1", num_classes=3).eval()
supported = torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu")
options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "img_size": 64}
model = timm.create_model("naflexvit_base_patch16_gap", **options).eval()
places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
patches = {"patches": torch.randn(1, 16, 768), "patch_coord": places, "patch_valid": torch.ones(1, 16).bool()}
with torch.no_grad():
    classes = classifier(torch.randn(1, 3, 64, 64)).shape
    plain, compiled = model(patches), torch.compile(model, backend="eager")(patches)

from torch._dynamo.utils import counters
print(json.dumps({
    "before": before, "boxes": boxes.flatten().tolist(), "classes": list(classes), "supported": supported,
    "same": torch.equal(plain, compiled), "graphs": counters["stats"]["unique_graphs"],
    "breaks": sum(counters["graph_break"].values()),
}))
"""


def test_the_compiler_comes_when_it_is_called_for() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("before") == []
    breaks = found.pop("breaks")
    assert breaks > 0  # NaFlexViT's methods stay outside the graphs, as it asks
    assert found.pop("graphs") > 1
    assert found == {"boxes": [9, 11, 25, 27], "classes": [1, 3], "supported": True, "same": True}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not loaded it."""
    for name in [name for name in sys.modules if name.startswith("torch._dynamo")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_stand_ins_are_gone_after_the_import(no_compiler: None) -> None:
    disable = torch.compiler.disable
    with pytest.raises(ImportError), compiler_put_off():
        assert torch.compiler.disable is not disable
        utils = sys.modules[light_imports.UTILS]
        assert not hasattr(utils, "__file__") and sys.modules[light_imports.UTILS] is utils  # `inspect` may ask
        raise ImportError
    assert torch.compiler.disable is disable and light_imports.UTILS not in sys.modules


def test_where_the_compiler_is_loaded_nothing_is_replaced() -> None:
    import torch._dynamo.utils as utils

    disable = torch.compiler.disable
    with compiler_put_off():
        assert torch.compiler.disable is disable and sys.modules[light_imports.UTILS] is utils


def test_another_name_is_taken_from_the_real_module(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(sys)(light_imports.UTILS)
    real.other = 3  # type: ignore[attr-defined]
    with compiler_put_off():
        stand_in = sys.modules[light_imports.UTILS]
        monkeypatch.setattr(light_imports.importlib, "import_module", {light_imports.UTILS: real}.__getitem__)
        assert stand_in.other == 3 and light_imports.UTILS not in sys.modules


@pytest.mark.parametrize("decorate", [light_imports._disable, light_imports._disable(reason="it loops")])
def test_a_decorated_function_computes_the_same(decorate: Any) -> None:
    @decorate
    def double(x: int) -> int:
        """Twice x."""
        return 2 * x

    assert double(3) == 6 and double.__doc__ == "Twice x."
