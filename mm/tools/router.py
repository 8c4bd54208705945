"""Which tool an answer needs: none, retrieval, calculator or code.

Two ways, of which either will do: a call in the text that the model writes, and a probe on the hidden state before it
writes any (`mm.tools.probe`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from mm.generation.requests import GenerativeModel
from mm.tools.calls import ToolCall, parse
from mm.tools.probe import ToolProbe, last_states
from mm.types import Sample

NONE = "none"


@dataclass(frozen=True)
class Decision:
    """`tool` is "none" or the name of one that is there. Decided by text, it has the `calls` and the rest of the `text`
    around them; by the probe, the `scores`: the probability of each of its tools. `problems` say what was asked for
    and cannot be."""

    tool: str
    calls: list[ToolCall] = field(default_factory=list)
    text: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Router:
    """Decides among `tools`, those that are there (`Toolbox.names`): what is switched off is never chosen."""

    def __init__(self, tools: Collection[str], probe: ToolProbe | None = None) -> None:
        self.tools, self.probe = tuple(tools), probe

    def by_text(self, text: str) -> Decision:
        """From what the model wrote. Calls of tools that are not there stay in `calls`: running them says so."""
        parsed = parse(text, self.tools)
        known = [call for call in parsed.calls if call.name in self.tools]
        missing = [f"no tool {call.name!r} here" for call in parsed.calls if call.name not in self.tools]
        tool = known[0].name if known else NONE
        return Decision(tool, parsed.calls, parsed.text, problems=[*parsed.problems, *missing])

    def by_state(self, state: Tensor) -> Decision:
        """From the state (D,) at the prompt's last position. Raises ValueError without a probe."""
        if self.probe is None:
            raise ValueError("Router.by_state needs a probe; train one: mm probe MODEL --data FILE --out FILE")
        scores = self.probe.probabilities(state)
        there = {tool: score for tool, score in scores.items() if tool in self.tools}
        best = max(there, key=there.__getitem__, default=NONE)
        return Decision(best if there.get(best, 0.0) >= self.probe.threshold else NONE, scores=scores)

    def by_prompt(self, model: GenerativeModel, sample: Sample) -> Decision:
        """As `by_state`, reading the prompt first."""
        return self.by_state(last_states(model, [sample])[0])
