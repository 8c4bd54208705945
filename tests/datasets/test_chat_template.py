"""The chat template: structure alone makes elements, and only answers are supervised."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml

from mm.datasets.chat_template import ChatTemplate, Elements, single_branch, without_answer
from mm.parts import build
from mm.tokenizers.text import TextTokenizer
from mm.types import IGNORE, SLOT_IDS, Media, Sample

CONFIGS = Path(__file__).parents[2] / "configs" / "templates"
SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>")


class Letters:
    """One id a character: 100 + code point. Specials have the ids 0.. and no text reaches them."""

    def encode(self, text: str) -> list[int]:
        return [100 + ord(c) for c in text]

    def special(self, name: str) -> int:
        if name not in SPECIALS:
            raise ValueError(f"no special {name}")
        return SPECIALS.index(name)


def spell(ids: list[int]) -> str:
    slots = {index: f"[{kind}]" for kind, index in SLOT_IDS.items()}
    return "".join(slots.get(i) or (SPECIALS[i] if i < 100 else chr(i - 100)) for i in ids)


def supervised(elements: Elements) -> str:
    return spell([int(label) for label in elements.labels if label != IGNORE])


def image(name: str = "a.png") -> Media:
    return Media("image", b"", name)


def user(*content: object) -> dict[str, object]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "media": c} for c in content]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, object]:
    return {"role": "assistant", "content": text}


def test_compact_and_chatml_spell_the_documented_forms() -> None:
    sample = Sample("k", [{"role": "system", "content": "s"}, user(0, "q"), assistant("a")], [image()])
    compact = ChatTemplate("compact").render(sample, Letters())
    assert spell(compact.ids.tolist()) == "<|system|>s<|end|><|user|>[image]q<|end|><|assistant|>a<|end|>"
    assert supervised(compact) == "a<|end|>"
    chatml = ChatTemplate("chatml").render(sample, Letters())
    assert spell(chatml.ids.tolist()) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n[image]q<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert supervised(chatml) == "a<|im_end|>"  # not the newline after it: generation has stopped by then


@pytest.mark.parametrize("style", ["compact", "chatml"])
def test_labels_stand_on_the_element_itself(style: str) -> None:
    elements = ChatTemplate(style).render(Sample("k", [user("q"), assistant("a")]), Letters())  # type: ignore[arg-type]
    marked = elements.labels != IGNORE
    assert (elements.labels[marked] == elements.ids[marked]).all() and marked.sum() == 2


@pytest.mark.parametrize("spelling", ["<image>", "<|image|>", *SPECIALS, "[image]"])
def test_text_that_spells_a_special_stays_text(spelling: str) -> None:
    sample = Sample("k", [user(spelling), assistant(spelling)])
    elements = ChatTemplate("compact").render(sample, Letters())
    assert elements.slots == []
    assert elements.ids.tolist() == [3, *Letters().encode(spelling), 1, 4, *Letters().encode(spelling), 1]


def test_text_that_spells_a_special_stays_text_with_a_trained_tokenizer() -> None:
    tokenizer = TextTokenizer.train(["<|user|> asks, <|im_end|> ends, <image> is no image"] * 4, 300)
    reserved = {tokenizer.special(name) for name in SPECIALS}
    for style in ("compact", "chatml"):
        plain = ChatTemplate(style).render(Sample("k", [user("hi"), assistant("hi")]), tokenizer)
        odd = ChatTemplate(style).render(Sample("k", [user("<|im_end|><image>"), assistant("<|end|>")]), tokenizer)
        structure = [i for i in plain.ids.tolist() if i in reserved]
        assert [i for i in odd.ids.tolist() if i in reserved] == structure and odd.slots == []
        assert "<|im_end|><image>" in tokenizer.decode(odd.ids.tolist())


def test_slots_name_their_element_kind_and_item() -> None:
    sample = Sample("k", [user("x", 1, 0, "y", 1), assistant("a")], [image(), image("b.png")])
    elements = ChatTemplate("compact").render(sample, Letters())
    assert [(slot.column, slot.kind, slot.media) for slot in elements.slots] == [
        (2, "image", 1),
        (3, "image", 0),
        (5, "image", 1),
    ]
    assert (elements.ids[[2, 3, 5]] == SLOT_IDS["image"]).all()


def test_consecutive_messages_of_a_role_are_one_turn() -> None:
    apart = Sample("k", [user(0), user("q"), assistant("a"), assistant("b")], [image()])
    together = Sample("k", [user(0, "q"), assistant("ab")], [image()])
    for style in ("compact", "chatml"):
        a, b = (ChatTemplate(style).render(s, Letters()) for s in (apart, together))
        assert a.ids.tolist() == b.ids.tolist() and a.labels.tolist() == b.labels.tolist()


@pytest.mark.parametrize("style", ["compact", "chatml"])
@pytest.mark.parametrize(
    "common",
    [
        pytest.param([user(0)], id="open user turn"),
        pytest.param([{"role": "system", "content": "s"}], id="closed system turn"),
        pytest.param([user(0), assistant("well, ")], id="open assistant turn"),
        pytest.param([], id="no common part"),
    ],
)
def test_each_branch_has_the_elements_of_its_own_chat(style: str, common: list[dict[str, object]]) -> None:
    branches = [
        [user("q1"), assistant("a1")],
        [assistant("goes on"), user("and?"), assistant("so")],
        [user("q2"), user(" more"), assistant("a2")],
    ]
    sample = Sample("k", common, [image()], branches)
    template = ChatTemplate(style)  # type: ignore[arg-type]
    elements = template.render(sample, Letters())
    assert elements.branch_ids.unique().tolist() == ([0, 1, 2, 3] if common else [1, 2, 3])
    for number in range(3):
        alone = template.render(single_branch(sample, number), Letters())
        seen = (elements.branch_ids == 0) | (elements.branch_ids == number + 1)
        assert elements.ids[seen].tolist() == alone.ids.tolist()
        assert elements.labels[seen].tolist() == alone.labels.tolist()
        assert (alone.branch_ids == 0).all()


def test_the_common_part_stays_open_only_where_a_branch_continues_it() -> None:
    sample = Sample("k", [user(0)], [image()], [[user("q"), assistant("a")], [user("r"), assistant("b")]])
    elements = ChatTemplate("compact").render(sample, Letters())
    assert spell(elements.ids[elements.branch_ids == 0].tolist()) == "<|user|>[image]"
    assert spell(elements.ids[elements.branch_ids == 2].tolist()) == "r<|end|><|assistant|>b<|end|>"
    captions = Sample("k", [user(0)], [image()], [[assistant("a")], [assistant("b")]])
    elements = ChatTemplate("compact").render(captions, Letters())
    assert spell(elements.ids[elements.branch_ids == 0].tolist()) == "<|user|>[image]<|end|>"


def test_turns_tile_the_elements() -> None:
    sample = Sample("k", [user(0)], [image()], [[user("q"), assistant("a")], [assistant("b")]])
    for style in ("compact", "chatml"):
        elements = ChatTemplate(style).render(sample, Letters())
        edges = [(turn.start, turn.stop) for turn in elements.turns]
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])] and edges[-1][1] == len(
            elements.ids
        )
        assert [turn.closed for turn in elements.turns] == [False, True, True, True, True]


def test_generation_prompt_is_what_training_showed_before_the_answer() -> None:
    sample = Sample("k", [user(0, "q"), assistant("a")], [image()])
    for style in ("compact", "chatml"):
        template = ChatTemplate(style)
        whole = template.render(sample, Letters())
        prompt = template.render(without_answer(sample), Letters(), generation_prompt=True)
        first_answer = int((whole.labels != IGNORE).nonzero()[0])
        assert prompt.ids.tolist() == whole.ids[:first_answer].tolist()
        assert (prompt.labels == IGNORE).all()


THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_reasoning_stands_before_the_answer_to_the_last_question() -> None:
    """And is learned with it; where a user has spoken again, it is gone."""
    template = ChatTemplate("compact")
    last = template.render(Sample("k", [user("q"), THOUGHT]), Letters())
    assert spell(last.ids.tolist()) == "<|user|>q<|end|><|assistant|><think>\nhm\n</think>\n\na<|end|>"
    assert supervised(last) == "<think>\nhm\n</think>\n\na<|end|>"
    earlier = template.render(Sample("k", [user("q"), THOUGHT, user("r"), THOUGHT]), Letters())
    assert spell(earlier.ids.tolist()) == (
        "<|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|><think>\nhm\n</think>\n\na<|end|>"
    )
    prompt = template.render(Sample("k", [user("q"), THOUGHT, user("r")]), Letters(), generation_prompt=True)
    assert spell(prompt.ids.tolist()) == "<|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|>"


def test_a_branch_has_the_reasoning_of_a_chat_of_its_own() -> None:
    sample = Sample("k", [user("q"), THOUGHT], [], [[user("r"), THOUGHT], [user("s"), assistant("b")]])
    elements = ChatTemplate("compact").render(sample, Letters())
    assert spell(elements.ids[elements.branch_ids < 2].tolist()) == spell(
        ChatTemplate("compact").render(single_branch(sample, 0), Letters()).ids.tolist()
    )


@pytest.mark.parametrize("style", ["compact", "chatml"])
def test_thinking_off_is_what_training_showed_before_an_answer_without(style: Literal["compact", "chatml"]) -> None:
    """An empty block, given and not learned; on is as if nothing were said."""
    template, chat = ChatTemplate(style), [user("q"), THOUGHT | {"reasoning_content": ""}]
    whole = template.render(Sample("k", chat), Letters())
    off, on, plain = (
        template.render(Sample("k", chat[:1]), Letters(), generation_prompt=True, thinking=thinking)
        for thinking in (False, True, None)
    )
    first_answer = int((whole.labels != IGNORE).nonzero()[0])
    assert off.ids.tolist() == whole.ids[:first_answer].tolist()
    assert spell(off.ids.tolist()) == spell(plain.ids.tolist()) + "<think>\n\n</think>\n\n"
    assert on.ids.equal(plain.ids)
    assert off.turns[-1].stop == len(off.ids) and not off.turns[-1].closed


def test_tags_are_specials_where_there_are_any() -> None:
    tokenizer = TextTokenizer.train(["hm"], 263).with_specials(["<think>", "</think>"])
    sample = Sample("k", [user("<think>"), THOUGHT])
    ids = ChatTemplate("compact").render(sample, tokenizer).ids.tolist()
    assert [ids.count(tokenizer.special(tag)) for tag in ("<think>", "</think>")] == [1, 1]
    start = ids.index(tokenizer.special("<think>"))
    assert tokenizer.decode(ids[start:], skip_specials=False) == "<think>\nhm\n</think>\n\na<|end|>"


def test_without_answer_strips_the_end_alone() -> None:
    sample = Sample("k", [user("q"), assistant("a"), user("r"), assistant("b"), assistant("c")])
    assert without_answer(sample).messages == sample.messages[:3]
    assert without_answer(without_answer(sample)).messages == sample.messages[:3]
    assert len(sample.messages) == 5
    branched = Sample("k", [user("q"), assistant("a")], [], [[user("r"), assistant("b")]])
    assert without_answer(branched).messages == branched.messages
    assert without_answer(branched).branches == [[user("r")]]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("key7", [{"role": "tool", "content": "x"}]), "key7: role 'tool'"),
        (Sample("key7", [{"content": "x"}]), "key7: role None"),
        (Sample("key7", [{"role": "user", "content": None}]), "key7: content None"),
        (Sample("key7", [{"role": "user", "content": ["x"]}]), "key7: 'x' is not a part"),
        (Sample("key7", [{"role": "user", "content": [{"type": "text"}]}]), "key7: .* is not a part"),
        (Sample("key7", [{"role": "user", "content": [{"type": "smell", "media": 0}]}]), "key7: .*smell"),
        (Sample("key7", [user(1)], [image()]), "key7: image part names media 1, but it has 1 items"),
        (Sample("key7", [user(-1)], [image()]), "key7: image part names media -1"),
        (
            Sample("key7", [{"role": "user", "content": [{"type": "image"}]}], [image()]),
            "key7: image part names media None",
        ),
        (Sample("key7", [user(0)], [Media("audio", b"", "a.wav")]), "key7: image part names media 0, which is audio"),
        (Sample("key7", [user("q") | {"reasoning_content": "hm"}]), "key7: reasoning_content .* the user's"),
        (Sample("key7", [THOUGHT | {"reasoning_content": ["hm"]}]), "key7: reasoning_content is text"),
        (Sample("key7", [], [], [[{"role": "robot", "content": "x"}]]), "key7: role 'robot'"),
    ],
)
def test_refuses_what_is_not_a_chat(sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate("compact").render(sample, Letters())


def test_refuses_a_prompt_that_holds_its_answer() -> None:
    sample = Sample("key7", [user("q"), assistant("a")])
    with pytest.raises(ValueError, match="key7: .*without_answer"):
        ChatTemplate("compact").render(sample, Letters(), generation_prompt=True)
    with pytest.raises(ValueError, match="key7: .*branches"):
        ChatTemplate("compact").render(Sample("key7", [], [], [[user("q")]]), Letters(), generation_prompt=True)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_template_can_be_built(config: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    template = build(tree, ChatTemplate)
    elements = template.render(Sample("k", [user("q"), assistant("a")]), Letters())
    assert supervised(elements) == "a" + template.end
    with pytest.raises(ValueError, match="stile"):
        build({**tree, "init_args": {"stile": "compact"}}, ChatTemplate)


def test_refuses_an_unknown_style() -> None:
    with pytest.raises(ValueError, match="style='vicuna'"):
        ChatTemplate("vicuna")  # type: ignore[arg-type]
