import pytest

from mm.evaluation.scorers import mmmu

from ..golden import cases, header


class Sentinel:
    def choice(self, seq):
        return "random"


@pytest.mark.parametrize("case", cases("mmmu_mc"))
def test_multiple_choice(case):
    letter = mmmu.parse_multi_choice(case["response"], case["all_choices"], case["index2ans"], Sentinel())
    assert letter == case["expected"]


@pytest.mark.parametrize("case", cases("mmmu_random_stream"))
def test_random_stream(case):
    rng = mmmu.official_rng()
    letters = [mmmu.parse_multi_choice("zzz", "ABCDEFGHI"[:size], {}, rng) for size in case["sizes"]]
    assert "".join(letters) == case["expected_letters"]


def test_a_parsed_response_draws_nothing():
    rng, other = mmmu.official_rng(), mmmu.official_rng()
    assert mmmu.parse_multi_choice("(B)", "ABCD", {}, rng) == "B"
    assert rng.random() == other.random()


@pytest.mark.parametrize("case", cases("mmmu_open"))
def test_open(case):
    parsed = mmmu.parse_open(case["response"])
    # As text: a set with nan in it is not equal to itself.
    assert sorted(map(repr, parsed)) == sorted(map(repr, case["expected"]["parsed_set"]))
    assert mmmu.open_correct(case["gold"], parsed) is case["expected"]["correct"]


@pytest.mark.parametrize("case", cases("mmmu_aggregate"))
def test_aggregate(case):
    printed = mmmu.evaluate(case["outputs"], case["answers"])
    assert printed == case["expected"]["printed"]
    assert list(printed) == list(case["expected"]["printed"])


def test_subjects_are_the_official_ones_in_order():
    assert list(mmmu.SUBJECTS) == header("mmmu_aggregate")["category_order"]
    assert {domain: list(subjects) for domain, subjects in mmmu.DOMAINS.items()} == header("mmmu_aggregate")["domains"]


def test_unknown_id_is_named():
    answers = {"validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "A"}}
    with pytest.raises(ValueError, match="validation_Art_2"):
        mmmu.evaluate({"validation_Art_1": "A", "validation_Art_2": "A"}, answers)
