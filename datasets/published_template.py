"""The chat template of a published model: what its files say ends an answer, and how they write a chat (Jinja).

The template writes a chat around marks that stand for the contents, and the contents take the marks' places as ids. So
here too only structure makes specials: a content that spells one is ordinary text, encoded apart from what surrounds
it. A template that looks into a content (to trim it, or to cut thoughts out of it) sees only its mark: contents are
written as they are. An answer's reasoning is a content of its own, `reasoning_content`, which templates of models that
reason (Qwen3) write or leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mm.datasets.chat_checks import check_prompt, checked_parts, checked_reasoning, checked_role
from mm.datasets.chat_template import ChatTemplate, Elements, Slot, Turn, Vocabulary, text_ids
from mm.types import IGNORE, SLOT_IDS, Sample

# Private-use characters around a number: no template and no filter changes them, and no role or special holds them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
SWITCHES = frozenset({"enable_thinking", "thinking"})  # what templates call the variable that turns reasoning on
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class PublishedTemplate(ChatTemplate):
    """`stop` are the ids that end an answer (eos_token_id). `source` is the Jinja template, if there is one.

    `specials` are the spellings that are specials where the template itself writes them; `variables` is what it may use
    beside the messages (bos_token, ...).
    """

    def __init__(
        self,
        stop: Sequence[int] = (),
        source: str | None = None,
        specials: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.stop, self.source = tuple(stop), source
        self.specials, self.variables = tuple(specials), dict(variables or {})

    @property
    def end(self) -> str:
        raise ValueError(
            "a published template closes turns by ids (stop_ids), not by one special; where that is needed (questions "
            "that share media), set the model's template to mm.datasets.chat_template.ChatTemplate"
        )

    def stop_ids(self, tokenizer: Vocabulary) -> frozenset[int]:
        return frozenset(self.stop)

    def render(
        self, sample: Sample, tokenizer: Vocabulary, generation_prompt: bool = False, thinking: bool | None = None
    ) -> Elements:
        """The elements of `sample`; `generation_prompt` opens the assistant's turn after the last message. `thinking`
        is the template's variable enable_thinking (or thinking); None leaves it at what the template takes it to be.

        Raises ValueError naming the sample: no template, `thinking` where it has no such variable, branches, what the
        template itself refuses, and what ChatTemplate refuses.
        """
        if self.source is None:
            raise ValueError(
                f"sample {sample.key}: this model came without a chat template; set its template "
                "(mm.datasets.chat_template.ChatTemplate), or continue text with generate(input_ids)"
            )
        if sample.branches:
            raise ValueError(f"sample {sample.key}: a published template writes one chat, not branches")
        if generation_prompt:
            check_prompt(sample)
        writer = _Writer(tokenizer, self._special_pattern, frozenset(self.stop), SLOT_IDS)
        messages = [
            writer.mark(checked_role(sample, m), checked_parts(sample, m), checked_reasoning(sample, m))
            for m in sample.messages
        ]
        variables = self.variables | self._thinking(sample, thinking)
        text = self._write(sample, messages, generation_prompt, variables)
        writer.put(text, self._boundaries(messages, text, variables), [m["role"] for m in messages])
        return writer.elements()

    def _thinking(self, sample: Sample, thinking: bool | None) -> dict[str, Any]:
        if thinking is None:
            return {}
        names = SWITCHES & self._undeclared
        if not names:
            raise ValueError(
                f"sample {sample.key}: thinking={thinking}, but the model's chat template has no variable that turns "
                f"it on or off ({' or '.join(sorted(SWITCHES))}); leave it out"
            )
        return dict.fromkeys(names, thinking)

    def _write(
        self, sample: Sample, messages: list[dict[str, str]], generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=generation_prompt, **variables, tools=None
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"sample {sample.key}: the model's chat template refuses this chat: {error}") from error

    def _boundaries(self, messages: list[dict[str, str]], text: str, variables: dict[str, Any]) -> list[int]:
        """Where each message's turn ends in `text`: where the chat up to it would. 0 where that cannot be told."""
        from jinja2 import TemplateError

        ends = []
        for count in range(1, len(messages) + 1):
            try:
                start = self._template.render(messages=messages[:count], add_generation_prompt=False, **variables)
            except (TemplateError, TypeError, KeyError):  # a system message alone, for some
                start = ""
            ends.append(len(start) if text.startswith(start) else 0)
        return ends

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _undeclared(self) -> set[str]:
        """The variables that the template reads."""
        from jinja2 import meta

        return meta.find_undeclared_variables(self._template.environment.parse(str(self.source)))

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(str(self.source))
        except TemplateError as error:
            raise ValueError(f"the model's chat template is not one that Jinja reads: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        made = ("_template", "_special_pattern", "_undeclared")  # made again where they are needed
        return {name: value for name, value in self.__dict__.items() if name not in made}


@dataclass
class _Writer:
    """Elements under construction. `contents` are what the marks stand for: (role, part)."""

    vocabulary: Vocabulary
    specials: re.Pattern[str]
    stop: frozenset[int]
    slot_ids: Mapping[str, int]
    contents: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    answered: bool = False  # an assistant's content stands, and its closing special does not

    def mark(self, role: str, parts: Iterator[dict[str, Any]], reasoning: str | None) -> dict[str, str]:
        """The message for the template: marks in place of its parts and of its reasoning."""
        marks = []
        for part in parts:
            marks.append(f"{_OPEN}{len(self.contents)}{_CLOSE}")
            self.contents.append((role, part))
        message = {"role": role, "content": "".join(marks)}
        if reasoning is None:
            return message
        self.contents.append((role, {"type": "text", "text": reasoning}))
        # An empty one is no content: templates ask whether there is any.
        return message | {"reasoning_content": f"{_OPEN}{len(self.contents) - 1}{_CLOSE}" if reasoning else ""}

    def put(self, text: str, ends: list[int], roles: list[str]) -> None:
        """The whole chat, cut where turns end; what follows the last end is the opened turn of an answer."""
        start = begun = 0
        for role, end in zip(roles, ends, strict=True):
            if end > start:
                self._text(text[start:end])
                self.turns.append(Turn(role, 0, begun, len(self.ids), closed=True))
                start, begun = end, len(self.ids)
        if start < len(text):
            self._text(text[start:])
            self.turns.append(Turn("assistant", 0, begun, len(self.ids), closed=False))

    def _text(self, text: str) -> None:
        """Text of the template with marks in it."""
        at = 0
        for mark in _MARK.finditer(text):
            self._literal(text[at : mark.start()])
            self._content(*self.contents[int(mark[1])])
            at = mark.end()
        self._literal(text[at:])

    def _literal(self, text: str) -> None:
        at = 0
        for special in self.specials.finditer(text):
            self._add(self.vocabulary.encode(text[at : special.start()]) if special.start() > at else [])
            token = self.vocabulary.special(special[0])
            self._add([token], supervised=self.answered and token in self.stop)
            self.answered, at = False, special.end()
        if at < len(text):
            self._add(self.vocabulary.encode(text[at:]))

    def _content(self, role: str, part: dict[str, Any]) -> None:
        self.answered = role == "assistant"
        if part["type"] == "text":
            self._add(text_ids(self.vocabulary, part["text"]), supervised=self.answered)
        else:
            self.slots.append(Slot(len(self.ids), part["type"], part["media"]))
            self._add([self.slot_ids[part["type"]]])

    def _add(self, ids: list[int], supervised: bool = False) -> None:
        self.ids += ids
        self.labels += ids if supervised else [IGNORE] * len(ids)

    def elements(self) -> Elements:
        ids = torch.tensor(self.ids, dtype=torch.int64)
        labels = torch.tensor(self.labels, dtype=torch.int64)
        return Elements(ids, labels, torch.zeros_like(ids), self.slots, self.turns)
