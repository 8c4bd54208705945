"""MMMU: answer parsing and aggregation, equal to the official scripts (MMMU-Benchmark/MMMU, `eval_utils.py` and
`main_eval_only.py`), their quirks included: the article "A" counts as an option, indicators match inside words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

DOMAINS: dict[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS: tuple[str, ...] = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.2, .2
)


class Chooser(Protocol):
    """What draws a letter for an answer that cannot be parsed; `random.Random(42)` for the official stream."""

    def choice(self, seq: Sequence[str], /) -> str: ...


def official_rng() -> random.Random:
    """The official stream: seeded once with 42 before the first response, so the order of samples matters."""
    return random.Random(42)


def parse_multi_choice(response: str, choices: Sequence[str], index2ans: Mapping[str, str], rng: Chooser) -> str:
    """The option letter that a response means.

    `choices` are the letters, `index2ans` maps a letter to its option's text. Looks for "(X)", else " X ", else (only
    in responses of more than five words) an option's text; the last occurrence wins and ties go to the first option.
    A response without any draws `rng.choice(choices)`.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "

    searches = [(response, {c: f"({c})" for c in choices}), (response, {c: f" {c} " for c in choices})]
    if len(response.split()) > 5:
        searches.append((response.lower(), {index: answer.lower() for index, answer in index2ans.items()}))
    for text, spellings in searches:
        last = {index: text.rfind(spelling) for index, spelling in spellings.items() if spelling in text}
        if last:
            return max(last, key=last.__getitem__)
    return rng.choice(choices)


def evaluate_responses(
    outputs: Sequence[Mapping[str, Any]], rng: Chooser | None = None
) -> tuple[dict[str, str], dict[str, bool]]:
    """One subject's output file: {id: letter or response} as parsed, and {id: correct}.

    `outputs` [{"id", "question_type", "answer", "all_choices", "index2ans", "response"}]. `rng` is `official_rng()` by
    default; over all subjects, in the official order, one stream serves every file.
    """
    rng = rng or official_rng()
    parsed: dict[str, str] = {}
    right: dict[str, bool] = {}
    for entry in outputs:
        key, response = entry["id"], entry["response"]
        if key in parsed:
            raise ValueError(f"outputs: the id {key!r} appears twice")
        if entry["question_type"] == "multiple-choice":
            parsed[key] = parse_multi_choice(response, entry["all_choices"], entry["index2ans"], rng)
            right[key] = multi_choice_correct(entry["answer"], parsed[key])
        else:
            parsed[key] = response
            right[key] = open_correct(entry["answer"], parse_open(response))
    return parsed, right


def parse_multi_choice_pro(response: str, choices: Sequence[str], index2ans: Mapping[str, str], rng: Chooser) -> str:
    """MMMU-Pro's parser: `parse_multi_choice` with three differences.

    What follows the last "Answer:" decides if it holds exactly one of the letters. A bare letter need not stand apart
    ("NASA " holds an A), but among several only those that do have a place. "A." counts where no "A " is found.
    """
    _, mark, rest = response.rpartition("Answer:")
    if mark:
        named = [choice for choice in choices if choice in rest]
        if len(named) == 1:
            return named[0]
    for stripped in ",.!?;:'":
        response = response.strip(stripped)
    response = f" {response} "
    in_brackets = [choice for choice in choices if f"({choice})" in response]
    if in_brackets:
        return max(in_brackets, key=lambda choice: response.rfind(f"({choice})"))
    for form in ("{} ", "{}."):
        bare = [choice for choice in choices if form.format(choice) in response]
        if bare:
            return max(bare, key=lambda choice: response.rfind(f" {choice} "))
    if len(response.split()) > 5:
        lower = response.lower()
        told = [index for index, answer in index2ans.items() if answer.lower() in lower]
        if told:
            return max(told, key=lambda index: lower.rfind(index2ans[index].lower()))
    return rng.choice(choices)


def parse_open(response: str) -> list[str | float]:
    """The answers that a free response may mean: key phrases as text, and every number in them (rounded to 2).

    In each line the shortest tail after an indicator ("is ", "answer ", ..., "=" in the last line) is a key phrase; the
    whole response if no line has one. Duplicates are dropped; order carries no meaning.
    """
    phrases = _key_phrases(response.strip().strip(".").lower())
    numbers = [match for phrase in phrases for pattern in _NUMBERS for match in pattern.findall(phrase)]
    return list(dict.fromkeys(form for text in (*phrases, *numbers) for form in normalise(text)))


def _key_phrases(response: str) -> list[str]:
    lines = response.split("\n")
    phrases = []
    for place, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if place == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                tail = line.split(indicator)[-1].strip()
                # An empty tail so far is replaced by whatever comes next, though longer (upstream).
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in {":", ",", ".", "!", "?", ";", "'"}:
            phrases.append(shortest)
    return phrases or [response]


def normalise(text: str) -> list[str | float]:
    """A number (commas dropped, rounded to 2), or lower-cased text; a single character gets a space on either side,
    lest it be found inside every word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_correct(gold: str | Sequence[str], parsed: Sequence[str | float]) -> bool:
    """Whether a parsed open answer (from `parse_open`) contains a gold text, or equals a gold number."""
    golds = [form for text in ([gold] if isinstance(gold, str) else gold) for form in normalise(text)]
    for answer in parsed:
        if isinstance(answer, str):
            if any(isinstance(form, str) and form in answer for form in golds):
                return True
        elif answer in golds:
            return True
    return False


def multi_choice_correct(gold: str | Sequence[str], letter: str) -> bool:
    return letter == gold if isinstance(gold, str) else letter in gold


def subject_of(sample_id: str) -> str:
    """`validation_Art_Theory_12` -> `Art_Theory`."""
    return "_".join(sample_id.split("_")[1:-1])


def evaluate(outputs: Mapping[str, str], answers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The official printed dictionary: {"Overall-<domain>" | subject | "Overall": {"num", "acc"}}, acc rounded to 3.

    `outputs` {id: letter or open response}, `answers` {id: {"question_type", "ground_truth"}}. Missing predictions do
    not count against the score (official); subjects outside the list are left out of it.

    Raises ValueError for a prediction whose id has no answer.
    """
    correct: dict[str, list[float]] = {}
    for sample_id, response in outputs.items():
        if sample_id not in answers:
            raise ValueError(f"outputs: unknown id {sample_id!r}: it is not among the {len(answers)} answers")
        gold = answers[sample_id]["ground_truth"]
        if answers[sample_id]["question_type"] == "multiple-choice":
            right = multi_choice_correct(gold, response)
        else:
            right = open_correct(gold, parse_open(response))
        correct.setdefault(subject_of(sample_id), []).append(float(right))
    return tabulate(correct)


def tabulate(correct: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """The printed dictionary from each subject's scores: domains and "Overall" are weighted by instances."""
    table: dict[str, dict[str, float]] = {}
    for domain, subjects in DOMAINS.items():
        present = [subject for subject in subjects if correct.get(subject)]
        table[f"Overall-{domain}"] = _pooled([correct[subject] for subject in present])
        for subject in present:
            scores = correct[subject]
            table[subject] = {"num": len(scores), "acc": round(sum(scores) / len(scores), 3)}
    table["Overall"] = _pooled([correct[subject] for subject in SUBJECTS if correct.get(subject)])
    return table


def _pooled(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """Accuracy over groups weighted by their size, by way of each group's accuracy (as upstream rounds)."""
    num = sum(len(group) for group in groups)
    if num == 0:
        return {"num": 0, "acc": 0}
    total = 0.0
    for group in groups:
        total += sum(group) / len(group) * len(group)
    return {"num": num, "acc": round(total / num, 3)}
