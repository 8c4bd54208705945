"""The probe: it learns what can be learned, is saved and opened whole, and knows its model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import mm
from mm.cli import main
from mm.model import MultimodalModel
from mm.testing import picture, spread, tiny_decoder, tiny_model, tiny_tokenizer
from mm.tools.probe import CHECK, ToolProbe, last_states
from mm.tools.router import NONE, Router
from mm.types import Sample


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return tiny_model().eval()


def ask(text: str) -> Sample:
    return Sample(text, [{"role": "user", "content": text}])


def problem(n: int = 200, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """States far from zero and of uneven scale, of which two directions say which tools are needed."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, width, generator=generator)
    labels = torch.stack([states[:, 0] + states[:, 1] > 0, states[:, 2] > 1], 1)
    return states * torch.logspace(-2, 2, width) + 30, labels


def test_it_learns_each_tool_by_itself() -> None:
    states, labels = problem()
    probe = ToolProbe(8, ["calculator", "code"])
    trained = probe.fit(states[:150], labels[:150], decay=1e-4)
    right = (probe(states[150:]).sigmoid() >= 0.5) == labels[150:]
    assert right.float().mean() > 0.95
    assert trained.loss < 0.1 and trained.steps > 3
    assert not (labels[:, 0] == labels[:, 1]).all()


def test_training_is_deterministic_and_labels_without_a_pattern_teach_nothing() -> None:
    states, labels = problem()
    one, two, noise = (ToolProbe(8, ["a", "b"]) for _ in range(3))
    one.fit(states, labels)
    two.fit(states, labels)
    assert torch.equal(one.linear.weight, two.linear.weight)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    noise.fit(states[:150], shuffled[:150])
    accuracy = ((noise(states[150:]).sigmoid() >= 0.5) == shuffled[150:]).float().mean(0)
    chance = torch.maximum(shuffled[150:].float().mean(0), 1 - shuffled[150:].float().mean(0))
    assert (accuracy < chance + 0.1).all()


def test_states_are_those_of_the_last_position_of_the_prompt(model: MultimodalModel) -> None:
    states = last_states(model, [ask("what color?"), ask("red"), ask("what color is the shape?")])
    ids = model.template.render(ask("red"), model.tokenizer, generation_prompt=True).ids
    with torch.inference_mode():
        expected = model(input_ids=ids[None]).hidden[0, -1]
    torch.testing.assert_close(states[1], expected)
    assert not torch.allclose(states[0], states[1])
    with pytest.raises(ValueError, match="no prompt"):
        last_states(model, [])


def test_what_is_shown_is_in_the_state(model: MultimodalModel) -> None:
    content = [{"type": "image", "media": 0}, {"type": "text", "text": "what?"}]
    one, two = (Sample(str(seed), [{"role": "user", "content": content}], [picture(seed)]) for seed in (1, 2))
    states = last_states(model, [one, two])
    assert not torch.allclose(states[0], states[1])


@pytest.fixture
def saved(model: MultimodalModel, tmp_path: Path) -> Path:
    probe = ToolProbe(32, ["calculator", "retrieval"], threshold=0.6)
    (probe.check,) = last_states(model, [CHECK])
    probe.save(tmp_path / "probe.safetensors", {"prompts": 3})
    return tmp_path / "probe.safetensors"


def test_saved_and_opened(saved: Path, model: MultimodalModel) -> None:
    probe = ToolProbe.load(saved, model)
    assert (probe.tools, probe.threshold) == (("calculator", "retrieval"), 0.6)
    state = last_states(model, [ask("red")])[0]
    scores = probe.probabilities(state)
    assert set(scores) == {"calculator", "retrieval"} and all(0 < score < 1 for score in scores.values())
    again = saved.with_name("again.safetensors")
    probe.save(again)
    assert again.read_bytes() == saved.read_bytes()
    assert json.loads(saved.with_suffix(".json").read_text())["prompts"] == 3
    with pytest.raises(ValueError, match="a state of shape"):
        probe.probabilities(state[:-1])


def test_a_damaged_probe_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged, or not the probe"):
        ToolProbe.load(saved)
    saved.write_bytes(data)
    saved.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="not what mm probe writes"):
        ToolProbe.load(saved)
    saved.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="no such file"):
        ToolProbe.load(saved)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        ToolProbe.load(saved.with_suffix(".pt"))


def test_a_probe_of_another_model_is_refused(saved: Path) -> None:
    torch.manual_seed(7)
    with pytest.raises(ValueError, match="trained on another model"):
        ToolProbe.load(saved, tiny_model().eval())


def test_tools_and_thresholds_that_cannot_be() -> None:
    for tools in ([], ["a", "a"], ["none"]):
        with pytest.raises(ValueError, match="give different names"):
            ToolProbe(8, tools)
    with pytest.raises(ValueError, match="threshold=1"):
        ToolProbe(8, ["a"], threshold=1)


def test_the_router_takes_the_likeliest_tool_that_is_there() -> None:
    probe = ToolProbe(2, ["calculator", "code"])
    with torch.no_grad():
        probe.linear.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
        probe.linear.bias.zero_()
    everything, no_code = Router(["calculator", "code"], probe), Router(["calculator"], probe)
    assert everything.by_state(torch.tensor([1.0, 0.0])).tool == "code"
    assert no_code.by_state(torch.tensor([1.0, 0.0])).tool == "calculator"
    assert no_code.by_state(torch.tensor([-1.0, 9.0])).tool == NONE  # code alone would be called for, and is off
    assert everything.by_state(torch.tensor([-1.0, 0.0])).tool == NONE
    assert set(no_code.by_state(torch.tensor([1.0, 0.0])).scores) == {"calculator", "code"}
    with pytest.raises(ValueError, match="needs a probe"):
        Router(["calculator"]).by_state(torch.zeros(2))


def test_the_router_reads_calls() -> None:
    router = Router(["calculator"])
    decision = router.by_text('<tool_call>{"name": "calculator", "arguments": {"expression": "1"}}</tool_call>')
    assert (decision.tool, len(decision.calls)) == ("calculator", 1)
    decision = router.by_text('<tool_call>{"name": "code", "arguments": {"program": "1"}}</tool_call>')
    assert (decision.tool, len(decision.calls), decision.problems) == (NONE, 1, ["no tool 'code' here"])
    assert router.by_text("just text").text == "just text"


# ---- mm probe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prompts that a random model's states tell apart: of sums, and of other things."""
    lines = [{"prompt": f"{a} * {b}", "tool": "calculator"} for a in range(8) for b in range(3)]
    lines += [{"prompt": f"red or blue? {'green ' * a}", "tool": "none"} for a in range(12)]
    lines += [{"messages": [{"role": "user", "content": f"how many beeps{'?' * a}"}], "tools": []} for a in range(12)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"id": str(i), **line}) + "\n" for i, line in enumerate(lines)))
    return file


@pytest.fixture
def text_model(monkeypatch: pytest.MonkeyPatch) -> MultimodalModel:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = spread(MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size))).eval()
    monkeypatch.setattr(mm, "load", lambda path: model, raising=False)
    return model


def test_the_command_trains_a_probe_that_works(text_model, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "probe.safetensors"
    assert main(["probe", "MODEL", "--data", str(data), "--out", str(out), "--device", "cpu"]) == 0
    assert "calculator" in capsys.readouterr().out
    about = json.loads(out.with_suffix(".json").read_text())
    assert (about["prompts"], about["held_out"]) == (38, 10)
    assert about["scores"]["calculator"] >= 0.9
    router = Router(["calculator"], ToolProbe.load(out, text_model))
    assert router.by_prompt(text_model, ask("7 * 9")).tool == "calculator"
    assert router.by_prompt(text_model, ask("red or blue? green")).tool == NONE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x"}, 'line 1: give either "tool"'),
        ({"prompt": "x", "tool": 3}, "line 1: .3. is not the name of a tool"),
        ({"prompt": "x", "tool": "none"}, "no line names a tool"),
        ({"prompt": "x", "tool": "code"}, "must be in some lines and not in others"),
    ],
)
def test_labels_that_teach_nothing_are_named(text_model, tmp_path: Path, capsys, line: dict, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert main(["probe", "MODEL", "--data", str(file), "--out", str(tmp_path / "p.safetensors")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_mistakes_on_the_command_line(tmp_path: Path, capsys) -> None:
    assert main(["probe", "MODEL", "--data", "none.jsonl", "--out", "p.safetensors"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["probe", "MODEL", "--data", "none.jsonl", "--out", "p.pt"]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert main(["probe"]) == 2
    assert "see mm probe --help" in capsys.readouterr().err
