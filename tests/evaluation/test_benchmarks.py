import io
import json
from collections import Counter

import pytest
from PIL import Image

from mm.evaluation.benchmarks.base import check_samples, records_of
from mm.evaluation.benchmarks.easy_vqa import EasyVQABenchmark
from mm.evaluation.benchmarks.mmmu import MMMUBenchmark
from mm.evaluation.benchmarks.vqav2 import VQAv2Benchmark
from mm.evaluation.benchmarks.worlds import AudioWorldBenchmark, VideoWorldBenchmark
from mm.evaluation.scorers import mmmu, vqa
from mm.types import Sample


def text_of(sample: Sample) -> str:
    return "".join(part.get("text", "[media]") for part in sample.messages[-1]["content"])


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def easy_vqa() -> tuple[EasyVQABenchmark, list[Sample]]:
    pytest.importorskip("easy_vqa")
    benchmark = EasyVQABenchmark()
    return benchmark, benchmark.samples()


def test_easy_vqa_counts_are_the_authors(easy_vqa):
    benchmark, samples = easy_vqa
    assert len(samples) == 9673
    assert sum(benchmark.controlled(s) for s in samples) == 2537
    assert len({id(s.media[0]) for s in samples}) <= 1000, "questions about one image share its Media"
    check_samples(samples, benchmark.origin())
    assert all(s.messages[-1]["role"] == "user" for s in samples), "a question must not carry its answer"


def test_easy_vqa_chance_is_computed_from_the_answers(easy_vqa):
    benchmark, samples = easy_vqa
    chance = benchmark.chance(samples)
    assert chance["yes_no_accuracy"] == pytest.approx(1 / 2)
    assert chance["color_accuracy"] == pytest.approx(1 / 8)
    assert chance["shape_accuracy"] == pytest.approx(1 / 3)
    shares = Counter(s.meta["category"] for s in samples)
    pictured = (shares["color"] / 8 + shares["shape"] / 3) / (shares["color"] + shares["shape"])
    assert chance["color_shape_accuracy"] == pytest.approx(pictured)


def test_easy_vqa_scores(easy_vqa):
    benchmark, samples = easy_vqa
    texts = [" Yes \n" if s.meta["answers"] == ["yes"] else "no" for s in samples]
    scores = benchmark.aggregate(records_of(samples, texts, benchmark.score_all(samples, texts)))
    assert scores["yes_no_accuracy"] == 1.0
    assert scores["color_shape_accuracy"] == 0.0
    assert scores["accuracy"] == pytest.approx(7136 / 9673)


@pytest.mark.parametrize("benchmark", [AudioWorldBenchmark(n=8), VideoWorldBenchmark(n=8)], ids=lambda b: b.name)
def test_worlds(benchmark):
    samples = benchmark.samples()
    assert len(samples) == 40
    check_samples(samples, benchmark.origin())
    assert all(text_of(s) == "[media]" + s.meta["question"] for s in samples)
    assert not any(s.branches for s in samples)
    texts = [s.meta["answers"][0] for s in samples]
    scores = benchmark.aggregate(records_of(samples, texts, benchmark.score_all(samples, texts)))
    assert set(scores.values()) == {1.0}
    assert set(benchmark.chance(samples)) == set(scores)
    assert all(0 < value < 1 for value in benchmark.chance(samples).values())
    assert benchmark.config()["init_args"] == {"n": 8, "split": "test", "seed": 0}


@pytest.fixture
def vqa_files(tmp_path):
    people = [{"answer": "red" if i < 6 else "blue", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    agreed = [{"answer": "yes", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    questions = [
        {"image_id": 42, "question": "What color?", "question_id": 42000},
        {"image_id": 42, "question": "Is it?", "question_id": 42001},
    ]
    notes = [
        {"question_id": 42001, "image_id": 42, "question_type": "is it", "answer_type": "yes/no",
         "multiple_choice_answer": "yes", "answers": agreed},
        {"question_id": 42000, "image_id": 42, "question_type": "what color", "answer_type": "other",
         "multiple_choice_answer": "red", "answers": people},
    ]  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": notes}))
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").write_bytes(png())
    return tmp_path


def vqav2(folder) -> VQAv2Benchmark:
    return VQAv2Benchmark(folder / "q.json", folder / "a.json", folder / "val2014", prompt="\nShort.")


def test_vqav2_reads_the_official_files_and_scores_as_they_do(vqa_files):
    benchmark = vqav2(vqa_files)
    samples = benchmark.samples()
    assert [s.key for s in samples] == ["42000", "42001"]
    assert text_of(samples[0]) == "[media]What color?\nShort."
    assert samples[0].media[0].data == vqa_files / "val2014" / "COCO_val2014_000000000042.jpg"
    texts = ["Blue.", "Yes"]  # annotators disagree: normalised; agree: not, so the capital costs the score
    records = records_of(samples, texts, benchmark.score_all(samples, texts))
    official = vqa.evaluate(
        json.loads((vqa_files / "q.json").read_text()),
        json.loads((vqa_files / "a.json").read_text()),
        [{"question_id": int(s.key), "answer": t} for s, t in zip(samples, texts, strict=True)],
    )
    scores = benchmark.aggregate(records)
    assert scores["accuracy"] == pytest.approx(official["overall"] / 100)
    assert scores["yes_no_accuracy"] == pytest.approx(official["perAnswerType"]["yes/no"] / 100)
    assert scores["accuracy"] > 0


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("q.json", lambda d: d["questions"].append(d["questions"][0]), r"q\.json: the id '42000' appears twice"),
        ("a.json", lambda d: d["annotations"].pop(), r"a\.json: no annotation with question_id 42000"),
        ("a.json", lambda d: d["annotations"][0]["answers"].clear(), r"q\.json: question '42001' has an empty answer"),
        ("q.json", lambda d: d.pop("questions"), r"q\.json: key 'questions' is missing"),
    ],
)
def test_wrong_vqav2_files_are_named(vqa_files, file, change, message):
    data = json.loads((vqa_files / file).read_text())
    change(data)
    (vqa_files / file).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        check_samples(vqav2(vqa_files).samples(), vqav2(vqa_files).origin())


@pytest.fixture
def mmmu_folder(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(subject, rows):
        (tmp_path / subject).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / subject / "validation-00000-of-00001.parquet")

    image = {"bytes": png(), "path": None}
    base = {"image_1": image, "image_2": None, "explanation": ""}
    write("Math", [
        {"id": "validation_Math_1", "question": "How much is <image 1>?", "options": "[]", "answer": "['5', 'five']",
         "question_type": "open", **base},
    ])  # fmt: skip
    write("Art", [
        {"id": "validation_Art_1", "question": "Which? <image 1>", "options": "['a cat', '<image 2>']", "answer": "B",
         "question_type": "multiple-choice", **base, "image_2": image},
        {"id": "validation_Art_2", "question": "Which?", "options": "['a cat', 'a dog', 'a fox']", "answer": "C",
         "question_type": "multiple-choice", **base},
    ])  # fmt: skip
    return tmp_path


def test_mmmu_prompts_images_and_order(mmmu_folder):
    samples = MMMUBenchmark(mmmu_folder).samples()
    assert [s.key for s in samples] == ["validation_Art_1", "validation_Art_2", "validation_Math_1"]
    assert text_of(samples[0]) == (
        "Which? [media]\n(A) a cat\n(B) [media]\n\nAnswer with the option's letter from the given choices directly."
    )
    assert text_of(samples[2]) == "How much is [media]?\nAnswer the question using a single word or phrase."
    assert [len(s.media) for s in samples] == [2, 0, 1]
    assert samples[2].meta["answers"] == ["5", "five"]


def test_mmmu_scores_equal_the_official_aggregation(mmmu_folder):
    benchmark = MMMUBenchmark(mmmu_folder)
    samples = benchmark.samples()
    texts = ["(B)", "zzz", "it is five"]
    scores = benchmark.score_all(samples, texts)
    drawn = mmmu.official_rng().choice(["A", "B", "C"])  # the one response without a letter draws once
    assert scores == [1.0, float(drawn == "C"), 1.0]
    official = mmmu.evaluate(
        {"validation_Art_1": "B", "validation_Art_2": drawn, "validation_Math_1": "it is five"},
        {s.key: {"question_type": s.meta["question_type"], "ground_truth": s.meta["answers"]} for s in samples},
    )
    aggregate = benchmark.aggregate(records_of(samples, texts, scores))
    assert aggregate["accuracy"] == official["Overall"]["acc"]
    assert aggregate["Art"] == official["Art"]["acc"]
    assert benchmark.chance_score(samples) == [1 / 2, 1 / 3, 0.0]


def test_mmmu_without_files_and_without_a_named_image(mmmu_folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no parquet file"):
        MMMUBenchmark(tmp_path / "nowhere").samples()
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = mmmu_folder / "Art" / "validation-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[0]["image_2"] = None
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(ValueError, match="validation_Art_1.*image_2"):
        MMMUBenchmark(mmmu_folder).samples()


@pytest.mark.parametrize(
    ("keys", "answers", "message"),
    [
        (["a", "a"], [["x"], ["y"]], "file.json: the id 'a' appears twice"),
        (["a", "b"], [["x"], [" "]], "file.json: question 'b' has an empty answer"),
        (["a"], [[]], "file.json: question 'a' has an empty answer"),
        ([], [], "file.json: no questions"),
    ],
)
def test_bad_samples_are_named(keys, answers, message):
    samples = [Sample(key, [], meta={"answers": a}) for key, a in zip(keys, answers, strict=True)]
    with pytest.raises(ValueError, match=message):
        check_samples(samples, "file.json")


def test_mmmu_submission_has_both_official_forms(mmmu_folder):
    benchmark = MMMUBenchmark(mmmu_folder)
    samples = benchmark.samples()
    texts = ["(B)", "zzz", "it is five"]
    files = benchmark.submission(records_of(samples, texts, benchmark.score_all(samples, texts)))
    drawn = mmmu.official_rng().choice(["A", "B", "C"])
    assert files["answers.json"] == {
        "validation_Art_1": "B", "validation_Art_2": drawn, "validation_Math_1": "it is five",
    }  # fmt: skip
    assert files["Math/output.json"] == [
        {"id": "validation_Math_1", "question_type": "open", "answer": ["5", "five"], "all_choices": [],
         "index2ans": {}, "response": "it is five"}
    ]  # fmt: skip
    parsed, right = mmmu.evaluate_responses(files["Art/output.json"])
    assert parsed == {"validation_Art_1": "B", "validation_Art_2": drawn}
    assert right == {"validation_Art_1": True, "validation_Art_2": drawn == "C"}


def test_vqav2_submission_is_scored_officially_as_here(vqa_files):
    benchmark = vqav2(vqa_files)
    samples = benchmark.samples()
    records = records_of(samples, ["Blue.", "yes"], benchmark.score_all(samples, ["Blue.", "yes"]))
    [(name, rows)] = benchmark.submission(records).items()
    assert name == "q_results.json"
    assert rows == [{"question_id": 42000, "answer": "Blue."}, {"question_id": 42001, "answer": "yes"}]
    questions, annotations = (json.loads((vqa_files / f).read_text()) for f in ("q.json", "a.json"))
    official = vqa.evaluate(questions, annotations, rows)
    assert benchmark.aggregate(records)["accuracy"] == pytest.approx(official["overall"] / 100)


def test_vqav2_test_set(vqa_files):
    benchmark = VQAv2Benchmark(vqa_files / "q.json", images=vqa_files / "val2014", hidden=True)
    samples = benchmark.samples()
    assert not any("answers" in sample.meta for sample in samples)
    check_samples(samples, benchmark.origin())
    with pytest.raises(ValueError, match="hidden=true, but there are annotations"):
        VQAv2Benchmark(vqa_files / "q.json", vqa_files / "a.json", vqa_files / "val2014", hidden=True).samples()


def test_vqav2_of_another_version(vqa_files):
    data = json.loads((vqa_files / "q.json").read_text()) | {"info": {"version": "1.0"}}
    (vqa_files / "q.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"q\.json: version is '1.0'; this benchmark reads version 2.0"):
        vqav2(vqa_files).samples()
