"""VQA soft accuracy, equal to the official script (GT-Vision-Lab/VQA, PythonEvaluationTools, run under Python 2.7).

The script's slips are part of the score and kept: a regex flag passed as a count, `somebody'd` losing its apostrophe,
and no normalisation at all (not even case) where the annotators agree. Only Unicode rules of Python 2 (digits and
lower-casing outside ASCII) are not imitated beyond ASCII `\\d`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
# A contraction is recognised with any ONE of its apostrophes missing ("couldnt've", "couldn'tve"). Forms that begin
# with a capital never match lower-cased words, and are left out.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    form[: mark.start()] + form[mark.end() :]: form for form in _CONTRACTED for mark in re.finditer("'", form)
} | {"somebody'd": "somebodyd"}

# Python 2's `\d` is ASCII.
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d", re.ASCII)
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)
_MAX_PERIODS = 32  # upstream passes re.UNICODE (32) where re.sub takes a count


def clean(text: str) -> str:
    """Newlines and tabs become spaces, the ends are stripped: done to every answer and prediction."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Each mark is deleted if it touches a space somewhere (or a digit,digit pair exists), else becomes a space."""
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        if mark in text:
            touches_space = mark + " " in text or " " + mark in text
            result = result.replace(mark, "" if delete_all or touches_space else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def normalise(text: str) -> str:
    """Punctuation, number words, articles and contractions, in the official order."""
    words = (NUMBER_WORDS.get(word, word) for word in strip_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(prediction: str, answers: Sequence[Mapping[str, Any] | str]) -> float:
    """Soft accuracy in [0, 1] of one prediction against its (usually ten) human answers.

    `answers` are the annotation's dicts (`answer`, `answer_confidence`, `answer_id`), or plain strings, which count as
    answers of different people. For each answer, the OTHERS that match the prediction are counted, and
    min(1, count / 3) averaged; "other" is by inequality of the whole dict, so dicts without `answer_id` that are equal
    do not support one another (upstream).

    Raises ValueError if there are no answers.
    """
    if not answers:
        raise ValueError(f"no answers to score the prediction {prediction!r} against")
    people = [dict(a) if isinstance(a, Mapping) else {"answer": a, "answer_id": i} for i, a in enumerate(answers)]
    for person in people:
        person["answer"] = clean(person["answer"])
    prediction = clean(prediction)
    if len({person["answer"] for person in people}) > 1:
        for person in people:
            person["answer"] = normalise(person["answer"])
        prediction = normalise(prediction)
    matching = [person for person in people if person["answer"] == prediction]
    return _mean([min(1.0, sum(other != person for other in matching) / 3) for person in people])


def evaluate(
    questions: Mapping[str, Any], annotations: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The official accuracy of whole files, in percent rounded to 2 places.

    `questions` {"questions": [{image_id, question, question_id}]}, `annotations` {"annotations": [{question_id,
    question_type, answer_type, answers, ...}]}, `results` [{question_id, answer}]. Returns {"overall",
    "perAnswerType": {type: accuracy}, "perQuestionType": {type: accuracy}}.

    Raises ValueError, naming the id, for duplicate, missing or unknown ids and for answers that are not text.
    """
    asked = _index(questions["questions"], "questions")
    notes = _index(annotations["annotations"], "annotations")
    given = _index(results, "results")
    check_ids(asked, notes, "annotations", of="questions")
    check_ids(notes, given, "results", of="annotations")

    overall: list[float] = []
    by_answer: dict[str, list[float]] = {}
    by_question: dict[str, list[float]] = {}
    for key, result in given.items():  # the official script sums in the order of the results
        if not isinstance(result.get("answer"), str):
            raise ValueError(f"results: question_id {key}: answer is {result.get('answer')!r}, not a string")
        score = vqa_score(result["answer"], notes[key]["answers"])
        overall.append(score)
        by_answer.setdefault(notes[key]["answer_type"], []).append(score)
        by_question.setdefault(notes[key]["question_type"], []).append(score)
    return {
        "overall": percent(overall),
        "perAnswerType": {kind: percent(scores) for kind, scores in by_answer.items()},
        "perQuestionType": {kind: percent(scores) for kind, scores in by_question.items()},
    }


def percent(scores: Sequence[float]) -> float:
    """Mean of fractions as percent with 2 places, ties away from zero (Python 2's `round`)."""
    if not scores:
        raise ValueError("no scores to average")
    mean = 100 * _sum(scores) / len(scores)
    return float(Decimal(mean).quantize(Decimal("0.01"), ROUND_HALF_UP))


def check_ids(expected: Iterable[Hashable], found: Iterable[Hashable], file: str, of: str) -> None:
    """Raises ValueError, naming the first ids, unless `file` has exactly the ids `of` the other file."""
    expected_ids, found_ids = set(expected), set(found)
    for problem, ids in (("is missing", expected_ids - found_ids), ("has an unknown", found_ids - expected_ids)):
        if ids:
            first = ", ".join(map(str, sorted(ids, key=str)[:3]))
            raise ValueError(f"{file} {problem} question_id {first} ({len(ids)} in all; {of} has {len(expected_ids)})")


def _index(rows: Sequence[Mapping[str, Any]], file: str) -> dict[Any, Mapping[str, Any]]:
    """Rows by question_id, in file order."""
    index: dict[Any, Mapping[str, Any]] = {}
    for place, row in enumerate(rows):
        if "question_id" not in row:
            raise ValueError(f"{file}: entry {place} has no question_id")
        if row["question_id"] in index:
            raise ValueError(f"{file}: question_id {row['question_id']} appears twice")
        index[row["question_id"]] = row
    if not index:
        raise ValueError(f"{file}: no entries")
    return index


def _sum(values: Iterable[float]) -> float:
    """Plain left-to-right sum: the built-in compensates since Python 3.12, and the official numbers do not."""
    total = 0.0
    for value in values:
        total += value
    return total


def _mean(values: Sequence[float]) -> float:
    return _sum(values) / len(values)
