"""A probe on the last hidden state: which tool a prompt needs, before a word of the answer is written.

    p(tool) = sigmoid(W h + b),  h (D,) the state after the final norm at the prompt's last position

As in the published hierarchical models' retrieval routers, it is one linear layer over tools; each tool is asked for
alone, and where none reaches the threshold the answer needs none. Shape legend: `N` prompts, `D` width, `K` tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from mm.checkpoint import write_atomically
from mm.generation.requests import GenerativeModel, Prompts, check_model, encode_requests
from mm.types import Sample

FORMAT = "mm-probe-1"
CHECK = Sample("check", [{"role": "user", "content": "How much is 12 times 34?"}])
SAME = 0.99  # cosine of the check's state now and when the probe was trained


@dataclass(frozen=True)
class Trained:
    """What `fit` says: loss (mean over prompts and tools), steps taken."""

    loss: float
    steps: int


class ToolProbe(nn.Module):
    """(..., D) states -> (..., K) float32 logits. `threshold` is the probability from which a tool is called for."""

    def __init__(self, width: int, tools: Sequence[str], threshold: float = 0.5) -> None:
        super().__init__()
        if not tools or len(set(tools)) != len(tools) or "none" in tools:
            raise ValueError(f"tools {list(tools)}: give different names, none of them 'none'")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold}: give a probability between 0 and 1")
        self.tools, self.threshold = tuple(tools), threshold
        self.linear = nn.Linear(width, len(self.tools))
        self.check: Tensor | None = None  # (D,) the state of CHECK, which says for which model this is

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states.float())

    @torch.inference_mode()
    def probabilities(self, state: Tensor) -> dict[str, float]:
        """state (D,) -> tool -> probability. Raises ValueError for another width."""
        if state.shape != (self.linear.in_features,):
            raise ValueError(f"a state of shape {tuple(state.shape)}; this probe reads ({self.linear.in_features},)")
        logits = self(state.to(self.linear.weight.device))
        return dict(zip(self.tools, torch.sigmoid(logits).tolist(), strict=True))

    def fit(self, states: Tensor, labels: Tensor, decay: float = 1e-2, steps: int = 200) -> Trained:
        """Logistic regression of labels (N, K) bool on states (N, D), by L-BFGS in float64 from zero: deterministic.

        `decay` is the weight of the squared weights, over states scaled to mean 0 and spread 1; the scaling is then
        folded into the weights.
        """
        mean, spread = states.double().mean(0), states.double().std(0, correction=0).clamp(min=1e-6)
        x, y = (states.double() - mean) / spread, labels.double()
        weight = torch.zeros(len(self.tools), x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(self.tools), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(x @ weight.T + bias, y) + decay * weight.square().sum(1).mean()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            loss = F.binary_cross_entropy_with_logits(x @ weight.T + bias, y)
            self.linear.weight.copy_(weight / spread)
            self.linear.bias.copy_(bias - (weight / spread) @ mean)
        return Trained(float(loss), int(optimizer.state[weight]["n_iter"]))

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> Path:
        """Writes the weights to `path` (.safetensors) and beside it a .json that says what they are; returns that."""
        path = _weights_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.linear.state_dict().items()}
        if self.check is not None:
            tensors["check"] = self.check.float().cpu().contiguous()
        digest = write_atomically(path, safetensors_bytes(tensors))
        known = {"format": FORMAT, "tools": list(self.tools), "threshold": self.threshold}
        known |= {"width": self.linear.in_features, "sha256": digest, **(about or {})}
        write_atomically(path.with_suffix(".json"), (json.dumps(known, indent=2) + "\n").encode())
        return path.with_suffix(".json")

    @staticmethod
    def load(path: str | Path, model: GenerativeModel | None = None) -> ToolProbe:
        """Opens a probe and, with `model`, checks that it was trained on that one.

        Raises ValueError naming the file: missing, damaged, not a probe, or another model's.
        """
        path = _weights_path(path)
        beside = path.with_suffix(".json")
        for file in (path, beside):
            if not file.is_file():
                raise ValueError(f"{file}: there is no such file; a probe is a .safetensors file and a .json beside it")
        try:
            about = json.loads(beside.read_bytes())
            format_, tools, threshold, width = (about[key] for key in ("format", "tools", "threshold", "width"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{beside}: not what mm probe writes ({error})") from None
        data = path.read_bytes()
        if format_ != FORMAT or hashlib.sha256(data).hexdigest() != about.get("sha256"):
            raise ValueError(f"{path}: damaged, or not the probe that {beside.name} describes (SHA-256 differs)")
        probe = ToolProbe(width, tools, threshold)
        try:
            tensors = load_safetensors(data)
            probe.check = tensors.pop("check", None)
            probe.linear.load_state_dict(tensors)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: not the weights of a probe ({error})") from None
        if model is not None:
            probe._check_model(model, path)
        return probe.eval()

    def _check_model(self, model: GenerativeModel, path: Path) -> None:
        (state,) = last_states(model, [CHECK])
        known = self.check
        if known is None or known.shape != state.shape or float(F.cosine_similarity(known, state, dim=0)) < SAME:
            raise ValueError(f"{path}: this probe was trained on another model; train one: mm probe MODEL --data FILE")


@torch.inference_mode()
def last_states(model: GenerativeModel, samples: Iterable[Sample]) -> Tensor:
    """(N, D) float32 on the CPU: the state at the last position of each prompt, where the answer would begin.

    Prompts are read one by one: a state does not depend on what else is read. Errors as `mm.generation.generate`.
    """
    check_model(model)
    states = []
    for request in encode_requests(model, samples, seed=0, max_new_tokens=1, max_length=None):
        output = model(**Prompts.of(model, [request]).inputs)
        last = int(output.sequence.mask[0].sum()) - 1
        states.append(output.hidden[0, last].float().cpu())
    if not states:
        raise ValueError("there is no prompt to read")
    return torch.stack(states)


def _weights_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a probe ends in .safetensors")
    return path
