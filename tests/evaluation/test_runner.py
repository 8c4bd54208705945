import json

import pytest
from PIL import Image

from mm.evaluation import results
from mm.evaluation.provenance import fingerprint
from mm.evaluation.runner import evaluate

from .toys import ColorBenchmark, Seer


def run(tmp_path=None, **options):
    seer = options.pop("respond", Seer())
    return evaluate(None, ColorBenchmark(), output=tmp_path, show_progress=False, respond=seer, **options), seer


def test_scores_chance_and_controls(tmp_path):
    result, _ = run(tmp_path)
    assert result["n"] == 13
    assert result["scores"] == {"accuracy": 1.0, "color_accuracy": 1.0, "yes_no_accuracy": 1.0}
    assert result["chance"]["accuracy"] == pytest.approx((12 / 4 + 1) / 13)
    assert result["chance"]["color_accuracy"] == 0.25
    assert result["controls"]["question_only"] == {"accuracy": 0.25, "color_accuracy": 0.25}
    assert result["controls"]["shuffled_media"] == {"accuracy": 0.0, "color_accuracy": 0.0}
    assert result["controls_n"] == {"question_only": 12, "shuffled_media": 12}


def test_files_say_the_same_as_the_result(tmp_path):
    result, _ = run(tmp_path, seed=3)
    saved = json.loads((tmp_path / "colors.json").read_text())
    assert saved["scores"] == result["scores"]
    assert saved["provenance"]["benchmark"]["init_args"] == {"n": 12, "distinct": False}
    assert saved["provenance"]["seed"] == 3
    assert saved["provenance"]["decoding"]["max_new_tokens"] == 3
    assert saved["provenance"]["controls"] is True and saved["provenance"]["ranks"] == 1
    assert saved["provenance"]["dataset"]["fingerprint"] == fingerprint(ColorBenchmark().samples())
    lines = [json.loads(line) for line in (tmp_path / "colors.predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(12)] + ["plain"]
    assert lines[1] == {
        "id": "q1", "question": "what color?", "answers": ["green"], "prediction": "green", "score": 1.0,
        "category": "color", "media": "colors.media/000001.png", "confidence": 0.75,
    }  # fmt: skip
    with Image.open(tmp_path / lines[1]["media"]) as picture:
        assert picture.size == (4, 4) and picture.getpixel((0, 0)) == (0, 128, 0)
    assert lines[-1]["media"] is None
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")], "no temporary file is left"


def test_equal_requests_are_answered_once():
    _, seer = run(controls=False)
    assert len(seer.asked) == 5  # four pictures and the plain question
    _, seer = run()
    assert len([s for s in seer.asked if not s.media and s.messages[-1]["content"] != "yes?"]) == 1


def test_responses_are_asked_for_a_few_batches_at_a_time():
    _, seer = run(batch_size=1, controls=False)
    assert seer.batch_sizes == [(4, 1), (1, 1)]


def test_intervals_and_calibration():
    result, _ = run()
    assert result["intervals"]["accuracy"] == [1.0, 1.0]
    assert result["calibration"]["n"] == 13
    assert result["calibration"]["ece"] == pytest.approx(0.25)
    assert result["calibration"]["bins"] == [
        {"low": 0.7, "high": 0.8, "n": 13, "confidence": pytest.approx(0.75), "accuracy": 1.0}
    ]


def test_small_batches_give_the_same(tmp_path):
    first, _ = run(batch_size=1)
    second, _ = run(batch_size=64)
    assert first["scores"] == second["scores"] and first["controls"] == second["controls"]


def test_limit_takes_the_first_questions():
    result, _ = run(limit=4)
    assert result["n"] == 4 and result["scores"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="limit=0"):
        run(limit=0)


def test_chance_knows_the_answers_of_the_whole_benchmark():
    assert run(limit=1)[0]["chance"]["color_accuracy"] == 0.25


def test_without_controls():
    assert run(controls=False)[0]["controls"] == {}


def test_too_few_answers_are_noticed():
    def silent(model, benchmark, samples, batch_size):
        return []

    with pytest.raises(ValueError, match="shorter"):
        run(respond=silent)


def test_fingerprint_notices_every_part():
    samples = ColorBenchmark().samples()
    prints = {fingerprint(samples), fingerprint(samples[::-1]), fingerprint(samples[:-1])}
    samples[0].media = samples[1].media
    prints.add(fingerprint(samples))
    samples[0].meta["answers"] = ["pink"]
    prints.add(fingerprint(samples))
    assert len(prints) == 5


def test_saved_predictions_score_the_same(tmp_path):
    result, _ = run(tmp_path)
    file = tmp_path / "colors.predictions.jsonl"
    records = results.rescore(ColorBenchmark(), results.read_predictions(file), file)
    assert ColorBenchmark().aggregate(records) == result["scores"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "no prediction for 'q0'"),
        (lambda lines: [*lines, lines[0]], "line 14: the id 'q0' appears twice"),
        (lambda lines: [*lines, '{"id": "q99", "prediction": "red"}'], "an unknown id 'q99'"),
        (lambda lines: [*lines, '{"id": "q99", "prediction": null}'], "line 14: the prediction for 'q99' is None"),
        (lambda lines: ["{", *lines], "line 1: not an object"),
    ],
)
def test_wrong_prediction_files_are_named(tmp_path, change, message):
    run(tmp_path)
    file = tmp_path / "colors.predictions.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())))
    with pytest.raises(ValueError, match=message) as error:
        results.rescore(ColorBenchmark(), results.read_predictions(file), file)
    assert file.name in str(error.value)
