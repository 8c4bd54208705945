import copy

import pytest

from mm.evaluation.scorers import vqa

from ..golden import cases


@pytest.mark.parametrize("case", cases("vqa", leave_out={"py2_py3_differ"}))
def test_golden(case):
    # 1e-12: the official sum's last bit depends on the Python version.
    assert vqa.vqa_score(case["prediction"], case["answers"]) == pytest.approx(case["expected"]["score"], abs=1e-12)
    assert vqa.normalise(vqa.clean(case["prediction"])) == case["expected"]["norm_prediction"]


@pytest.mark.parametrize("case", cases("vqa_aggregate"))
def test_golden_files(case):
    before = copy.deepcopy(case["annotations"])
    scores = vqa.evaluate(case["questions"], case["annotations"], case["results"])
    assert scores == case["expected_accuracy"]
    assert case["annotations"] == before, "the caller's annotations were normalised in place"


def test_unanimous_answers_are_not_normalised():
    assert vqa.vqa_score("Yes", ["yes"] * 10) == 0.0
    assert vqa.vqa_score("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_strings_are_answers_of_different_people_but_equal_dicts_are_not():
    assert vqa.vqa_score("yes", ["yes"] * 10) == 1.0
    assert vqa.vqa_score("yes", [{"answer": "yes"}] * 10) == 0.0


def test_ties_round_away_from_zero_as_in_python_2():
    # The mean is 0.125 % exactly; Python 3's round gives 0.12.
    assert vqa.percent([0.0] * 31 + [0.04]) == 0.13


def _files(ids=(1, 2), answered=(1, 2), annotated=(1, 2)):
    note = {
        "question_type": "what is",
        "answer_type": "other",
        "answers": [{"answer": "a", "answer_id": i} for i in range(10)],
    }
    return (
        {"questions": [{"question_id": i, "image_id": 0, "question": "q"} for i in ids]},
        {"annotations": [{"question_id": i, **note} for i in annotated]},
        [{"question_id": i, "answer": "a"} for i in answered],
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (_files(answered=(1,)), "results is missing question_id 2"),
        (_files(answered=(1, 2, 7)), "results has an unknown question_id 7"),
        (_files(answered=(1, 2, 2)), "results: question_id 2 appears twice"),
        (_files(annotated=(1,)), "annotations is missing question_id 2"),
        (_files(ids=(), answered=(), annotated=()), "questions: no entries"),
    ],
)
def test_wrong_files_name_the_id(files, message):
    with pytest.raises(ValueError, match=message):
        vqa.evaluate(*files)


def test_no_answers_and_no_text_are_errors():
    with pytest.raises(ValueError, match="no answers"):
        vqa.vqa_score("yes", [])
    questions, annotations, results = _files()
    results[1]["answer"] = None
    with pytest.raises(ValueError, match="question_id 2: answer is None"):
        vqa.evaluate(questions, annotations, results)
