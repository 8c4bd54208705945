"""The other scorers: golden cases, and rules that have none."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mm.evaluation.scorers import (
    choice,
    code,
    divergence,
    gqa,
    letters,
    memorisation,
    mmmu,
    needle,
    retrieval,
    toxicity,
)
from mm.evaluation.scorers.caption import cider_bleu

from ..golden import cases, header, unwrap


@pytest.mark.parametrize("case", [c for c in cases("mcq_pope_scienceqa") if c.values[0]["kind"] == "mcq_extract"])
def test_extract_letter(case):
    assert letters.extract_letter(case["response"], case["choices"]) == case["expected"]


@pytest.mark.parametrize("case", [c for c in cases("pass_at_k") if c.values[0]["kind"] == "gating"])
def test_pass_at_k_is_left_out_where_a_problem_has_too_few_samples(case):
    found = code.evaluate(case["num_samples"], case["num_correct"], case["k"])
    assert found == pytest.approx(case["expected"], abs=1e-12) and found.keys() == case["expected"].keys()


@pytest.mark.parametrize(
    "case", [c for c in cases("perplexity_and_groups") if c.values[0]["kind"] == "group_aggregate"]
)
def test_groups(case):
    expected = case["expected"]
    assert choice.group_mean(case["scores"], case["sizes"]) == pytest.approx(expected["weight_by_size"], rel=1e-12)
    unweighted = choice.group_mean(case["scores"], case["sizes"], weighted=False)
    assert unweighted == pytest.approx(expected["unweighted"], rel=1e-12)


@pytest.mark.parametrize("case", [c for c in cases("niah_ruler") if c.values[0]["kind"] == "aggregate"])
def test_needle_mean(case):
    assert needle.mean(case["values"]) == case["expected"]


@pytest.mark.parametrize("case", cases("mmmu_mc"))
def test_mmmu_pro(case):
    class Sentinel:
        def choice(self, seq):
            return "random"

    letter = mmmu.parse_multi_choice_pro(case["response"], case["all_choices"], case["index2ans"], Sentinel())
    assert letter == case["mmmu_pro"]


def test_mmmu_pro_reads_what_follows_answer():
    assert mmmu.parse_multi_choice_pro("It is A or B. Answer: C", "ABCD", {}, mmmu.official_rng()) == "C"
    assert mmmu.parse_multi_choice_pro("(B) Answer: A or C", "ABCD", {}, mmmu.official_rng()) == "B"


@pytest.mark.parametrize("case", cases("retrieval_recall", leave_out={"ties", "integers"}))
def test_recalls_from_ranks(case):
    texts = {int(image): own for image, own in case["img2txt"].items()}
    images = {int(text): image for text, image in case["txt2img"].items()}
    ranks = retrieval.ranks(case["sim_image_by_text"], texts, images)
    assert retrieval.recalls(*ranks) == retrieval.recall_at_k(case["sim_image_by_text"], texts, images)


@pytest.fixture
def java():
    """pycocoevalcap calls `java` as it is: one without locale settings warns on standard output."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c.values[0], id=c.id, marks=[pytest.mark.slow] if number else [])  # each starts Java
        for number, c in enumerate(cases("cider_bleu"))
    ],
)
def test_cider_bleu(case, java):
    found = cider_bleu(case["references"], case["hypotheses"])
    expected = case["expected"]
    rel, least = 1e-12, 1e-300  # the file's own
    assert found["cider"] == pytest.approx(expected["cider"], rel=rel, abs=least)
    assert found["cider_per_image"] == pytest.approx(expected["cider_per_image"], rel=rel, abs=least)
    assert [found[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(expected["bleu1_4"], rel=rel, abs=least)
    for ours, theirs in zip(found["bleu_per_image"], expected["bleu_per_image"], strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=least)


def test_captions_without_their_tools(monkeypatch):
    with pytest.raises(ValueError, match="1 hypotheses have 2 lists"):
        cider_bleu([["a"], ["b"]], ["a"])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        cider_bleu([["a"], []], ["a", "b"])
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mm\[captions\]'"):
        cider_bleu([["a"]], ["a"])


EXAMPLES = os.environ.get("MM_MMMU_REPOSITORY")  # a clone of MMMU-Benchmark/MMMU


@pytest.mark.skipif(not EXAMPLES, reason="set MM_MMMU_REPOSITORY to a clone of github.com/MMMU-Benchmark/MMMU")
def test_mmmu_official_examples():
    root = Path(str(EXAMPLES)) / "mmmu"
    data = json.loads((Path(__file__).parents[1] / "gold" / "mmmu_official_examples.public.json").read_text())
    whole, parsed = (unwrap(case) for case in data["cases"])
    outputs = json.loads((root / "example_outputs/llava1.5_13b_val.json").read_text())
    answers = json.loads((root / "answer_dict_val.json").read_text())
    printed = mmmu.evaluate(outputs, answers)
    assert printed == whole["expected"] and list(printed) == list(whole["expected"])
    rng = mmmu.official_rng()
    found = {}
    for subject in official_order():
        file = json.loads((root / f"example_outputs/qwen_vl/{subject}/output.json").read_text())
        _, right = mmmu.evaluate_responses(file, rng)
        found[subject] = {"acc": sum(right.values()) / len(right), "num_example": len(right)}
    assert found == parsed["expected_result_json_per_subject"]


def official_order() -> list[str]:
    """Subjects as the official script goes through them: in the order of its table, which is the alphabet's."""
    return header("mmmu_aggregate")["category_order"]


def test_gqa():
    types = {"structural": "query", "semantic": "attr"}
    questions = {
        "1": {"answer": "red", "isBalanced": True, "types": types},
        "2": {"answer": "yes", "isBalanced": True, "types": {"structural": "verify", "semantic": "attr"}},
        "3": {"answer": "no", "isBalanced": False, "types": types},
    }
    found = gqa.evaluate(questions, {"1": "red", "2": "Yes"})
    assert found == {"accuracy": 0.5, "open": 1.0, "query": 1.0, "attr": 0.5, "binary": 0.0, "verify": 0.0}
    with pytest.raises(ValueError, match="no prediction for question id '2'"):
        gqa.evaluate(questions, {"1": "red"})
    with pytest.raises(ValueError, match="unknown question id '9'"):
        gqa.evaluate(questions, {"9": "red"})


def test_kl_is_that_of_torch_and_zero_for_the_same():
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    mask = torch.rand(3, 5) > 0.3
    found = divergence.kl(ours, theirs, mask, block=2)
    log_q, log_p = (x.double().log_softmax(-1) for x in (ours, theirs))
    each = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[mask]
    assert found["kl"] == pytest.approx(each.mean().item()) and found["kl_max"] == pytest.approx(each.max().item())
    assert found["tokens"] == int(mask.sum())
    assert divergence.kl(ours, ours)["kl"] == pytest.approx(0, abs=1e-12)
    assert divergence.kl(ours, ours)["top1_agreement"] == 1.0
    ruled_out = theirs.clone()
    ruled_out[..., 0] = -math.inf
    assert math.isfinite(divergence.kl(ours, ruled_out)["kl"])
    with pytest.raises(ValueError, match="differ in shape"):
        divergence.kl(ours, theirs[:1])
    with pytest.raises(ValueError, match="mask is empty"):
        divergence.kl(ours, theirs, torch.zeros(3, 5))


def test_memorisation():
    assert memorisation.likelihood_ratio(-10.0, -30.0, 5) == 4.0
    assert memorisation.extracted([1, 2, 3, 4], [1, 2, 9]) == pytest.approx(2 / 3)
    assert memorisation.extracted([1, 2], [1, 2]) == 1.0 and memorisation.extracted([], [1]) == 0.0
    assert memorisation.zlib_ratio(-8.0, "a" * 1000) > memorisation.zlib_ratio(-8.0, "a quick brown fox, and so on 9x")
    found = memorisation.evaluate([-10.0, -10.0], [-30.0, -10.0], [5, 5], [1.0, 0.5])
    assert found == {"likelihood_ratio": 2.0, "likelihood_ratio_max": 4.0, "verbatim": 0.5, "extracted": 0.75}
    for wrong in (lambda: memorisation.likelihood_ratio(0, 0, 0), lambda: memorisation.extracted([1], [])):
        with pytest.raises(ValueError):
            wrong()


class Counter:
    name = "words that shout"

    def __call__(self, texts):
        return [sum(word.isupper() for word in text.split()) / max(1, len(text.split())) for text in texts]


def test_toxicity_says_whose_it_is():
    found = toxicity.evaluate([["so what", "GO AWAY"], ["hello", "hi YOU there"]], Counter())
    assert found["classifier"] == "words that shout"
    assert found["expected_maximum_toxicity"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["toxicity_probability"] == 0.5 and found["toxic_fraction"] == 0.25
    with pytest.raises(ValueError, match="at least one continuation"):
        toxicity.evaluate([["a"], []], Counter())


def test_toxicity_by_a_local_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "bad": 2, "good": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path / "judge")
    config = transformers.BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    judge = toxicity.LocalClassifier(tmp_path / "judge", batch_size=2)
    scores = judge(["bad", "good good", "bad good"])
    assert len(scores) == 3 and all(0 < score < 1 for score in scores)
    assert judge(["good good"])[0] == pytest.approx(scores[1], abs=1e-5), "padding changes nothing"
    assert toxicity.evaluate([["bad"]], judge)["classifier"] == "judge, class 'toxic'"
    with pytest.raises(ValueError, match="no class 'rude'; it has fine, toxic"):
        toxicity.LocalClassifier(tmp_path / "judge", label="rude")
    with pytest.raises(ValueError, match="no such directory"):
        toxicity.LocalClassifier(tmp_path / "nowhere")
