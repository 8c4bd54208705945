"""The short scorers against their golden cases."""

import math

import pytest
import torch

from mm.evaluation.scorers import anls, calibration, choice, code, needle, pope, relaxed, retrieval, scienceqa, text

from ..golden import cases


@pytest.mark.parametrize("case", cases("anls"))
def test_anls(case):
    assert anls.anls(case["prediction"], case["answers"]) == case["expected"]


def test_anls_without_answers():
    with pytest.raises(ValueError, match="no answers"):
        anls.anls("x", [])


@pytest.mark.parametrize("case", cases("relaxed_accuracy"))
def test_relaxed(case):
    matches = [relaxed.relaxed_match(case["prediction"], target) for target in case["targets"]]
    assert matches == case["expected"]["per_target"]
    assert relaxed.relaxed_accuracy(case["prediction"], case["targets"]) == case["expected"]["score"]


@pytest.mark.parametrize("case", cases("pass_at_k", leave_out={"gating"}))
def test_pass_at_k(case):
    n = case["num_samples"]
    ns = n if isinstance(n, list) else [n] * len(case["num_correct"])
    estimates = [code.pass_at_k(n, c, case["k"]) for n, c in zip(ns, case["num_correct"], strict=True)]
    assert estimates == pytest.approx(case["expected"], abs=1e-12)  # the file's own tolerance


@pytest.mark.parametrize("case", cases("mc_loglikelihood"))
def test_choice(case):
    scores = choice.accuracy(case["choices"], case["loglikelihoods"], case["gold"])
    assert scores == {key: case["expected"][key] for key in ("acc", "acc_norm", "acc_bytes")}


@pytest.mark.parametrize("case", cases("truthfulqa_mc2"))
def test_truthfulqa(case):
    score = choice.truthfulqa_mc2(case["loglikelihoods"], case["labels"])
    assert score == pytest.approx(case["expected"], rel=1e-12, abs=0, nan_ok=True)  # the file's own tolerance


@pytest.mark.parametrize("case", cases("wer"))
def test_wer(case):
    assert text.wer(case["reference"], case["hypothesis"]) == case["expected"]


def test_wer_with_whispers_normaliser():
    assert text.wer("Mr. Smith", "mister smith")["wer"] == 1.0
    assert text.wer("Mr. Smith", "mister smith", normalise=True)["wer"] == 0.0


@pytest.mark.parametrize("case", cases("perplexity_and_groups", leave_out={"group_aggregate"}))
def test_perplexity(case):
    loglikelihoods, weights = zip(*case["items"], strict=True)
    expected = case["expected"]
    # The file's own tolerance.
    assert text.weighted_perplexity(loglikelihoods, weights) == pytest.approx(
        expected["weighted_perplexity"], rel=1e-12
    )
    assert text.bits_per_byte(loglikelihoods, weights) == pytest.approx(expected["bits_per_byte"], rel=1e-12)


def test_perplexity_counts_units_of_the_original_text():
    scores = text.perplexity([-math.log(16)], ["é fg"], [4])
    assert scores["token_perplexity"] == pytest.approx(2)
    assert scores["word_perplexity"] == pytest.approx(4)
    assert scores["bits_per_byte"] == pytest.approx(4 / 5)
    assert scores["byte_perplexity"] == pytest.approx(2 ** (4 / 5))


@pytest.mark.parametrize("case", cases("ece"))
def test_ece(case):
    correct = [p == label for p, label in zip(case["predictions"], case["labels"], strict=True)]
    measured = calibration.ece(case["confidences_float32"], correct, case["n_bins"])
    assert measured == pytest.approx(case["expected"]["ece_guo"], abs=1e-6)  # float32 sums: the file's own tolerance


def test_ece_wants_two_equal_vectors():
    with pytest.raises(ValueError, match=r"\(2,\)"):
        calibration.ece(torch.rand(2), [True])


@pytest.mark.parametrize("case", cases("retrieval_recall", leave_out={"ties", "integers"}))  # advisory in the file
def test_retrieval(case):
    scores = retrieval.recall_at_k(
        case["sim_image_by_text"],
        {int(image): texts for image, texts in case["img2txt"].items()},
        {int(caption): image for caption, image in case["txt2img"].items()},
    )
    assert scores == {key: value for key, value in case["expected"].items() if key != "agg_metrics"}


def test_retrieval_shape_is_checked():
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        retrieval.recall_at_k([[1.0, 2.0]], {0: [0]}, {0: 0})


@pytest.mark.parametrize("case", cases("niah_ruler", leave_out={"aggregate"}))
def test_needle(case):
    assert needle.score(case["prediction"], case["outputs"]) == case["expected"][str(case["max_length"])]


@pytest.mark.parametrize("case", [c for c in cases("mcq_pope_scienceqa") if c.values[0]["kind"] == "pope"])
def test_pope(case):
    assert pope.evaluate(case["pairs"]) == case["expected"]


@pytest.mark.parametrize("case", [c for c in cases("mcq_pope_scienceqa") if c.values[0]["kind"] == "scienceqa"])
def test_scienceqa(case):
    assert scienceqa.score(case["response"], case["answer"]) == case["expected"]
