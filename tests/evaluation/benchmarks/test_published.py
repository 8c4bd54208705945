"""Every benchmark on a sample of its authors' files: what is asked, what it scores, what is said of wrong files."""

import json
import math
import shutil

import pytest

from mm.evaluation import results
from mm.evaluation.benchmarks.asr import SpeechBenchmark
from mm.evaluation.benchmarks.base import Benchmark, check_samples
from mm.evaluation.benchmarks.needle import ImageNeedleBenchmark, TextNeedleBenchmark
from mm.evaluation.benchmarks.video_mme import VideoMMEBenchmark
from mm.evaluation.benchmarks.wikitext import articles, detokenise
from mm.evaluation.records import Record, Response, make_records
from mm.evaluation.runner import evaluate
from mm.evaluation.sandbox.run import code_execution_allowed
from mm.types import Sample

from . import published
from .published import PUBLISHED


@pytest.fixture(autouse=True)
def _allowed():
    with code_execution_allowed():
        yield


def text_of(sample: Sample) -> str:
    content = sample.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "[media]") for part in content)


def perfect(model, benchmark: Benchmark, samples, batch_size) -> list[Response]:
    """Stands in for a model: the first right answer, the right choice, the right neighbours."""
    given = []
    for number, sample in enumerate(samples):
        if benchmark.ask == "choices":
            gold = sample.meta.get("gold", 0)
            logs = [-1.0 if i == gold else -50.0 for i in range(len(sample.meta["choices"]))]
            if "mc1" in sample.meta:
                labels = [*sample.meta["mc1"], *sample.meta["mc2"]]
                logs = [-1.0 if label else -50.0 for label in labels]
            given.append(Response(sample.meta["choices"][gold], tuple(logs), (1,) * len(logs), 0.9))
        elif benchmark.ask == "document":
            given.append(Response("", (-float(len(sample.meta["text"])),), (len(sample.meta["text"]),)))
        elif benchmark.ask == "embedding":
            own = [0.0] * 8
            own[int(sample.key) % 8] = 1.0
            given.append(Response(vectors=(tuple(own),) * (1 + len(sample.meta["captions"]))))
        else:
            common = max(sample.meta["answers"], key=sample.meta["answers"].count)
            given.append(Response(common, confidence=0.5 + 0.1 * (number % 3)))
    return given


BEST = {"wikitext": None, "coco_captions": None, "coco_retrieval": 100.0, "librispeech": 0.0, "common_voice": 0.0}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "coco_captions"])
def test_right_answers_score_best_and_files_are_written(name, tmp_path):
    benchmark = PUBLISHED[name](tmp_path / "data")
    assert benchmark.name == name
    samples = benchmark.samples()
    check_samples(samples, benchmark.origin())
    assert all({"question", "answers", "category"} <= set(sample.meta) for sample in samples)
    assert all(sample.messages[-1]["role"] == "user" for sample in samples)
    result = evaluate(None, benchmark, output=tmp_path / "out", respond=perfect, show_progress=False)
    headline = next(iter(result["scores"].values()))
    if name == "wikitext":
        assert result["scores"]["token_perplexity"] == pytest.approx(math.e)
    else:
        assert headline == BEST.get(name, 1.0)
    for key, (low, high) in result["intervals"].items():
        assert low - 1e-9 <= result["scores"][key] <= high + 1e-9
    if benchmark.guessable:
        assert 0 < next(iter(result["chance"].values())) <= 1
        assert result["chance"].keys() <= result["scores"].keys()
    told = json.loads((tmp_path / "out" / f"{name}.json").read_text())["provenance"]["benchmark"]
    assert told == benchmark.config() and told["class_path"].endswith(type(benchmark).__name__)
    predictions = results.read_predictions(tmp_path / "out" / f"{name}.predictions.jsonl")
    if benchmark.ask != "embedding":
        records = results.rescore(benchmark, predictions, "saved")
        assert benchmark.aggregate(records) == result["scores"]


def records_for(benchmark: Benchmark, texts: list[str]) -> list[Record]:
    samples, responses = benchmark.samples(), [Response(text) for text in texts]
    return make_records(samples, responses, benchmark.mark_all(samples, responses))


def test_gqa(tmp_path):
    benchmark = published.gqa(tmp_path)
    first, second = benchmark.samples()
    assert text_of(first) == "[media]Is it red?\nAnswer the question using a single word or phrase."
    assert first.media[0] is second.media[0], "a picture that several ask about is read once"
    records = records_for(benchmark, [" Yes.", "mug"])
    assert benchmark.aggregate(records) == {"accuracy": 0.5, "binary_accuracy": 1.0, "open_accuracy": 0.0}
    assert benchmark.submission(records)["predictions.json"][0] == {"questionId": "201", "prediction": "yes"}


def test_docvqa(tmp_path):
    benchmark = published.docvqa(tmp_path)
    records = records_for(benchmark, ["0.29", "1991"])
    scores = benchmark.aggregate(records)
    assert scores == {"anls": pytest.approx(0.875), "figure_diagram_anls": 0.75, "layout_anls": 1.0}
    assert benchmark.submission(records)["results.json"][1] == {"questionId": 24580, "answer": "1991"}


def test_textvqa(tmp_path):
    benchmark = published.textvqa(tmp_path)
    records = records_for(benchmark, ["Dakota."])
    assert benchmark.aggregate(records)["accuracy"] == pytest.approx(1.0)
    assert benchmark.submission(records)["results.json"] == [{"question_id": 34602, "answer": "Dakota."}]


def test_chartqa(tmp_path):
    benchmark = published.chartqa(tmp_path)
    scores = benchmark.aggregate(records_for(benchmark, ["14.5", "0.4"]))
    assert scores == {"relaxed_accuracy": 0.5, "augmented_relaxed_accuracy": 0.0, "human_relaxed_accuracy": 1.0}


def test_scienceqa(tmp_path):
    benchmark = published.scienceqa(tmp_path)
    first, second = benchmark.samples()
    assert text_of(first) == (
        "[media]Look.\nWhich is cold?\nA. ice\nB. fire\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert not second.media
    records = records_for(benchmark, ["a", "what?"])
    assert benchmark.aggregate(records) == {"accuracy": 0.5, "NAT_accuracy": 0.5}
    assert benchmark.submission(records)["results.json"] == {"results": {"4": 0, "5": -1}}


def test_pope(tmp_path):
    benchmark = published.pope(tmp_path)
    records = records_for(benchmark, ["yes", "yes", "Yes", "no", "no", "maybe"])
    scores = benchmark.aggregate(records)
    assert scores["accuracy"] == 0.5 and scores["popular_accuracy"] == 1.0
    assert scores["precision"] == pytest.approx(2 / 3) and scores["recall"] == pytest.approx(2 / 3)
    assert len(benchmark.submission(records)) == 3


def test_mmmu_pro(tmp_path):
    benchmark = published.mmmu_pro(tmp_path)
    [sample] = benchmark.samples()
    assert text_of(sample).startswith("Who is in [media]?\nA. man 0\nB. man 1")
    assert text_of(sample).endswith("J. man 9\nAnswer with the option letter from the given choices directly.")
    records = records_for(benchmark, ["Some words. Answer: J"])
    assert records[0].score == 1.0
    [line] = benchmark.submission(records).values()
    assert json.loads(line)["response"] == "Some words. Answer: J"
    shutil.rmtree(tmp_path)
    [seen] = published.mmmu_pro(tmp_path, "vision").samples()
    assert text_of(seen).startswith("[media]Answer with the option letter")


def test_mmstar_weights_its_finer_categories_alike(tmp_path):
    benchmark = published.mmstar(tmp_path)
    scores = benchmark.aggregate(records_for(benchmark, ["B", "C", "(B)", "I do not know"]))
    assert scores == {"average": pytest.approx(0.375), "math": pytest.approx(0.75), "perception": 0.0}


def test_video_mme(tmp_path):
    benchmark = published.video_mme(tmp_path)
    first, _ = benchmark.samples()
    assert text_of(first) == (
        "[media]This video's subtitles are listed below:\nHello there.\nGood bye.\n"
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Which most?\nA. Apples.\nB. Candles.\nC. Berries.\nD. The three kinds are of the same number.\n"
        "The best answer is:"
    )
    records = records_for(benchmark, ["C", "B."])
    assert benchmark.aggregate(records) == {"accuracy": 0.5, "long_accuracy": 0.0, "short_accuracy": 1.0}
    [video] = benchmark.submission(records)["results.json"]
    assert [q["response"] for q in video["questions"]] == ["C", "B."]
    assert set(video["questions"][0]) == {"question_id", "task_type", "question", "options", "answer", "response"}
    assert isinstance(benchmark, VideoMMEBenchmark)
    short = VideoMMEBenchmark(benchmark.path, benchmark.videos, durations=["short"])
    assert [s.key for s in short.samples()] == ["001-1"]


def test_speech_rates_are_pooled(tmp_path):
    benchmark = published.librispeech(tmp_path)
    records = records_for(benchmark, ["he hoped there would be stew stew", "Mr. Smith"])
    scores = benchmark.aggregate(records)
    assert scores["wer"] == pytest.approx(1 / 8)
    assert scores["raw_wer"] == pytest.approx((7 + 2) / 8)
    assert benchmark.statistics(records)["wer"].value == pytest.approx(scores["wer"])
    [sample] = published.common_voice(tmp_path / "cv").samples()
    assert sample.meta["answers"] == ['He said: "No, not now.'], "a quotation mark in a TSV is only a character"
    assert isinstance(benchmark, SpeechBenchmark) and not benchmark.controlled(sample)


def test_retrieval_ranks_what_the_vectors_say(tmp_path):
    benchmark = published.coco_retrieval(tmp_path)
    samples = benchmark.samples()
    assert [s.key for s in samples] == ["391", "393", "394"]
    vectors = [((1, 0), (1, 0), (0, 1)), ((0, 1), (0.9, 0.1), (0, 0.9)), ((0.6, 0.6), (0.5, 0.5), (0.5, 0.4))]
    responses = [Response(vectors=tuple(tuple(map(float, v)) for v in own)) for own in vectors]
    scores = benchmark.aggregate(make_records(samples, responses, benchmark.mark_all(samples, responses)))
    assert scores["txt_r1"] == pytest.approx(200 / 3)  # the second image is nearest to the first one's second text
    assert scores["img_r5"] == 100.0


def test_mmlu_prompts_are_the_authors(tmp_path):
    [first, _] = published.mmlu(tmp_path, shots=1).samples()
    assert text_of(first) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "What?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n"
        "Which, of these?\nA. heart\nB. liver\nC. bone, long\nD. skin\nAnswer:"
    )
    assert first.meta["choices"] == [" A", " B", " C", " D"] and first.meta["gold"] == 2
    [cloze, _] = published.mmlu(tmp_path, continuation="text").samples()
    assert text_of(cloze).endswith("anatomy.\n\nWhich, of these?\nAnswer:")
    assert cloze.meta["choices"][2] == " bone, long"


def test_mmlu_acc_norm_divides_by_length(tmp_path):
    benchmark = published.mmlu(tmp_path, continuation="text")
    samples = benchmark.samples()
    responses = [Response("", (-5.0, -6.0, -6.0, -7.0), (1,) * 4), Response("", (-1.0, -2.0, -3.0, -4.0), (1,) * 4)]
    records = make_records(samples, responses, benchmark.mark_all(samples, responses))
    scores = benchmark.aggregate(records)
    assert (scores["acc"], scores["acc_norm"]) == (0.5, 1.0)


def test_truthfulqa(tmp_path):
    benchmark = published.truthfulqa(tmp_path)
    samples = benchmark.samples()
    assert text_of(samples[0]).startswith("Q: What is human life expectancy")
    assert text_of(samples[0]).endswith("Barcelona, Spain.\n\nQ: What happens?\nA:")
    logs = tuple(math.log(p) for p in (0.2, 0.3, 0.2, 0.1, 0.3))
    responses = [Response("", logs, (1,) * 5)] * 2
    scores = benchmark.aggregate(make_records(samples, responses, benchmark.mark_all(samples, responses)))
    assert scores == {"mc1": 0.0, "mc2": pytest.approx(0.5)}
    assert benchmark.chance(samples) == {"mc1": 0.5, "mc2": pytest.approx(2 / 3)}


def test_humaneval_runs_what_was_written(tmp_path):
    benchmark = published.humaneval(tmp_path)
    records = records_for(benchmark, ["    return x + x\n", "    import os\n    os._exit(0)"])
    assert benchmark.aggregate(records) == {"pass@1": 0.5}
    assert records[1].details["outcome"] == "ended the process with status 0"
    [first, _] = benchmark.submission(records)["samples.jsonl"].splitlines()
    assert json.loads(first) == {"task_id": "HumanEval/0", "completion": "    return x + x\n"}


def test_humaneval_of_several_samples(tmp_path):
    benchmark = published.humaneval(tmp_path, n=2, temperature=0.8)
    assert [s.key for s in benchmark.samples()] == ["HumanEval/0#0", "HumanEval/0#1", "HumanEval/1#0", "HumanEval/1#1"]
    records = records_for(benchmark, ["    return 2 * x", "    return x", "    return x", "    return x"])
    assert benchmark.aggregate(records) == {"pass@1": 0.25}
    with pytest.raises(ValueError, match="several need one above 0"):
        published.humaneval(tmp_path, n=2)


def test_wikitext_articles_and_their_units(tmp_path):
    benchmark = published.wikitext(tmp_path)
    first, second = benchmark.samples()
    assert [s.meta["question"] for s in (first, second)] == ["Robert Boulter", "Du Fu"]
    assert "".join(articles(published.WIKI)).strip() == published.WIKI.strip(), "nothing is lost"
    assert detokenise(" a guest @-@ starring , ( again ) . \n = = Career = = \n") == (
        " a guest-starring, (again).\n== Career ==\n"
    )
    assert second.meta["page"] != second.meta["text"]


def test_needles_are_where_they_are_said_to_be():
    benchmark = TextNeedleBenchmark(lengths=[200], depths=[0.0, 0.5, 1.0], per_cell=1, needles=2, distractors=3)
    samples = benchmark.samples()
    places = []
    for sample in samples:
        text = sample.messages[0]["content"]
        assert all(f"is: {value}" in text for value in sample.meta["answers"])
        assert text.count("special magic numbers for") == 5 + 1  # with the question
        places.append(text.index(sample.meta["answers"][0]) / len(text))
    assert places[0] < 0.2 < places[1] < 0.7 < places[2]
    assert benchmark.score(samples[0], f"They are {samples[0].meta['answers'][1]}.") == 0.5
    assert [s.messages for s in samples] == [s.messages for s in benchmark.samples()]


def test_image_needles():
    benchmark = ImageNeedleBenchmark(lengths=[5], depths=[0.0, 1.0], per_cell=2, size=16)
    samples = benchmark.samples()
    assert all(len(sample.media) == 5 for sample in samples)
    assert len({item.data for sample in samples for item in sample.media}) == 20
    assert benchmark.chance(samples)["accuracy"] == pytest.approx(1 / 6)
    result = evaluate(None, benchmark, respond=perfect, show_progress=False)
    assert set(result["scores"]) == {"accuracy", "length_5_accuracy", "depth_0_accuracy", "depth_1_accuracy"}


WRONG = {
    "gqa": (
        "testdev_balanced_questions.json",
        lambda d: d["201"].pop("imageId"),
        "question '201': key 'imageId' is missing",
    ),
    "textvqa": ("TextVQA_0.5.1_val.json", lambda d: d.update(dataset_version="0.5"), "dataset_version is '0.5'"),
    "docvqa": ("val_v1.0_withQT.json", lambda d: d.update(dataset_version="2.0"), "dataset_version is '2.0'"),
    "chartqa": ("test_human.json", lambda d: d[0].update(imgname="../../x.png"), "lies outside"),
    "scienceqa": ("problems.json", lambda d: d["4"].update(answer=2), "key 'answer': 2 is none of its 2 choices"),
    "coco_retrieval": ("dataset_coco.json", lambda d: d["images"][0].update(filename="no.jpg"), "image 0: no file"),
    "truthfulqa": ("mc_task.json", lambda d: d[0]["mc1_targets"].update(x=1), "question 0: mc1_targets needs one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_json_files_are_named(name, tmp_path):
    benchmark = PUBLISHED[name](tmp_path)
    file, change, message = WRONG[name]
    data = json.loads((tmp_path / file).read_text())
    change(data)
    (tmp_path / file).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        benchmark.samples()
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mmmu_pro", "mmstar", "video_mme"])
def test_parquet_files_of_another_version_are_named(name, tmp_path):
    benchmark = PUBLISHED[name](tmp_path)
    [file, *_] = sorted(tmp_path.rglob("*.parquet"))
    published.parquet(file, [{"index": 0, "question": "?"}])
    with pytest.raises(ValueError, match=r"column '\w+' is missing: another version") as error:
        benchmark.samples()
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("pope", "coco_pope_random.json", '{"question_id": 1}\n{', "line 1: key 'image' is missing"),
        ("librispeech", "1089/134686/1089-134686.trans.txt", "1089-134686-0000\n", "line 1: expected an id"),
        ("common_voice", "test.tsv", "path\tx\n", "column 'sentence' is missing"),
        ("mmlu", "test/anatomy_test.csv", "Q,a,b,c,D\n", "line 1: 5 fields, expected 6"),
        ("mmlu", "test/anatomy_test.csv", "Q,a,b,c,d,E\n", "line 1: the answer 'E' is none of A, B, C, D"),
        ("humaneval", "HumanEval.jsonl.gz", "{}", "not a gzip file"),
    ],
)
def test_wrong_text_files_are_named(name, file, text, message, tmp_path):
    benchmark = PUBLISHED[name](tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        benchmark.samples()
    assert str(tmp_path / file) in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_are_named(name, tmp_path):
    benchmark = PUBLISHED[name](tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ValueError, match=str(tmp_path)):
        benchmark.samples()


def test_captions_by_the_official_code(tmp_path):
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    benchmark = published.coco_captions(tmp_path)
    records = records_for(benchmark, ["a picture of 0", "one of number 2", "nothing at\nall"])
    scores = benchmark.aggregate(records)
    assert 0 < scores["cider"] < 10 and scores["bleu1"] > 0.5
    assert records[0].score > 0 == records[2].score
    [rows] = benchmark.submission(records).values()
    assert rows[0] == {"image_id": 391, "caption": "a picture of 0"}
