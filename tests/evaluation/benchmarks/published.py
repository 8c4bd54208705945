"""Small samples of benchmarks in the form in which their authors publish them; what they say is made up."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mm.datasets.worlds import encode_mp4
from mm.evaluation.benchmarks.base import Benchmark


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "blue").save(path)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def gqa(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.gqa import GQABenchmark

    def asked(text: str, answer: str, structural: str, **more: Any) -> dict[str, Any]:
        types = {"detailed": "existThat", "semantic": "obj", "structural": structural}
        return {"question": text, "imageId": "n1", "answer": answer, "isBalanced": True, "types": types,
                "fullAnswer": f"It is {answer}.", "entailed": [], "equivalent": [], "semantic": [], **more}  # fmt: skip

    write(root / "testdev_balanced_questions.json", {
        "201": asked("Is it red?", "yes", "verify"), "202": asked("What is it?", "cup", "query"),
        "203": asked("Is it?", "no", "verify", isBalanced=False),
    })  # fmt: skip
    jpeg(root / "images" / "n1.jpg")
    return GQABenchmark(root / "testdev_balanced_questions.json", root / "images")


def textvqa(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.textvqa import TextVQABenchmark

    item = {"question": "what is the brand?", "image_id": "003a", "question_id": 34602, "set_name": "val",
            "image_classes": ["Cup"], "question_tokens": ["what"],
            "answers": ["nous les gosses", *["dakota"] * 9]}  # fmt: skip
    data = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [item]}
    jpeg(root / "train_images" / "003a.jpg")
    return TextVQABenchmark(write(root / "TextVQA_0.5.1_val.json", data), root / "train_images")


def docvqa(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.docvqa import DocVQABenchmark

    item = {"questionId": 49153, "question": "What is the 'actual value'?", "question_types": ["figure/diagram"],
            "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": "81", "answers": ["0.28", "0,28"], "data_split": "val"}  # fmt: skip
    other = {**item, "questionId": 24580, "question": "Which year?", "answers": ["1991"], "question_types": ["layout"]}
    data = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": [item, other]}
    jpeg(root / "documents" / "pybv0228_81.png")
    return DocVQABenchmark(write(root / "val_v1.0_withQT.json", data))


def chartqa(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.chartqa import ChartQABenchmark

    write(root / "test_human.json", [{"imgname": "1.png", "query": "How many?", "label": "14"}])
    write(root / "test_augmented.json", [{"imgname": "1.png", "query": "What share?", "label": "57%"}])
    jpeg(root / "png" / "1.png")
    return ChartQABenchmark(root)


def scienceqa(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.scienceqa import ScienceQABenchmark

    base = {"question": "Which is cold?", "choices": ["ice", "fire"], "answer": 0, "hint": "", "image": None,
            "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "physics",
            "category": "Heat", "skill": "Compare", "lecture": "", "solution": "", "split": "test"}  # fmt: skip
    problems = {"4": {**base, "image": "image.png", "hint": "Look."}, "5": {**base, "answer": 1},
                "6": {**base, "split": "train", "subject": "social science"}}  # fmt: skip
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"test": ["4", "5"], "train": ["6"]})
    jpeg(root / "test" / "4" / "image.png")
    return ScienceQABenchmark(root)


def pope(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.pope import POPEBenchmark

    for kind in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": "COCO_val2014_1.jpg", "text": "Is there a cat in the image?", "label": "no"},
        ]
        write(root / f"coco_pope_{kind}.json", "".join(json.dumps(line) + "\n" for line in lines))
    jpeg(root / "val2014" / "COCO_val2014_1.jpg")
    return POPEBenchmark(root, root / "val2014")


def mmmu_pro(root: Path, setting: Any = "standard (10 options)") -> Benchmark:
    from mm.evaluation.benchmarks.mmmu_pro import MMMUProBenchmark

    image = {"bytes": png(), "path": None}
    row = {"id": "test_History_1", "question": "Who is in <image 1>?", "options": str([f"man {i}" for i in range(10)]),
           "explanation": "?", "image_1": image, "image_2": None, "img_type": "['Paintings']", "answer": "J",
           "topic_difficulty": "Hard", "subject": "History"}  # fmt: skip
    seen = {"id": "test_History_2", "image": image, "options": "['man', 'dog']", "answer": "A", "subject": "History"}
    parquet(root / "standard (10 options)" / "test-00000-of-00001.parquet", [row])
    parquet(root / "vision" / "test-00000-of-00001.parquet", [seen])
    return MMMUProBenchmark(root, setting)


def mmstar(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.mmstar import MMStarBenchmark

    image = {"bytes": png(), "path": None}
    base = {"question": "Which?\nOptions: A: a, B: b, C: c, D: d", "image": image, "answer": "B",
            "category": "math", "l2_category": "geometry",
            "meta_info": {"source": "MMMU", "split": "val", "image_path": "x.jpg"}}  # fmt: skip
    rows = [{**base, "index": 0}, {**base, "index": 1}, {**base, "index": 2, "l2_category": "statistical reasoning"}]
    return MMStarBenchmark(parquet(root / "mmstar.parquet", [*rows, {**base, "index": 3, "category": "perception"}]))


def video_mme(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.video_mme import VideoMMEBenchmark

    base = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
            "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "task_type": "Counting",
            "options": ["A. Apples.", "B. Candles.", "C. Berries.",
                        "D. The three kinds are of the same number."]}  # fmt: skip
    rows = [
        {**base, "question_id": "001-1", "question": "Which most?", "answer": "C"},
        {**base, "question_id": "001-2", "question": "Which least?", "answer": "A", "duration": "long"},
    ]
    (root / "data").mkdir(parents=True)
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    (root / "data" / "fFjv93ACGo8.mp4").write_bytes(encode_mp4(frames, fps=2))
    write(root / "subtitle" / "fFjv93ACGo8.srt", "1\n00:00:00,000 --> 00:00:01,000\n<i>Hello there.</i>\n\n"
          "2\n00:00:01,000 --> 00:00:02,000\nGood bye.\n")  # fmt: skip
    path = parquet(root / "videomme" / "test-00000-of-00001.parquet", rows).parent
    return VideoMMEBenchmark(path, root / "data", root / "subtitle")


def _sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(1600) / 10).astype(np.float32), 16000)


def librispeech(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.asr import LibriSpeechBenchmark

    folder = root / "1089" / "134686"
    lines = ["1089-134686-0000 HE HOPED THERE WOULD BE STEW", "1089-134686-0001 MISTER SMITH"]
    write(folder / "1089-134686.trans.txt", "\n".join(lines) + "\n")
    for line in lines:
        _sound(folder / f"{line.split()[0]}.flac")
    return LibriSpeechBenchmark(root)


def common_voice(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.asr import CommonVoiceBenchmark

    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"
    row = 'x\tcommon_voice_en_1.wav\tHe said: "No, not now.\t2\t0\t\t\t\ten\t'
    write(root / "test.tsv", f"{header}\n{row}\n")
    _sound(root / "clips" / "common_voice_en_1.wav")
    return CommonVoiceBenchmark(root)


def karpathy(root: Path) -> Path:
    def image(number: int, split: str) -> dict[str, Any]:
        told = [f"a picture of {number}", f"one of number {number}"]
        sentences = [{"tokens": text.split(), "raw": text, "imgid": number, "sentid": 10 * number} for text in told]
        return {"filepath": "val2014", "filename": f"{number}.jpg", "imgid": number, "split": split,
                "cocoid": 391 + number, "sentids": [1, 2], "sentences": sentences}  # fmt: skip

    for number in range(4):
        jpeg(root / "val2014" / f"{number}.jpg")
    images = [image(0, "test"), image(1, "train"), image(2, "test"), image(3, "test")]
    return write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


def coco_captions(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.coco_captions import COCOCaptionsBenchmark

    return COCOCaptionsBenchmark(karpathy(root), root)


def coco_retrieval(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.coco_retrieval import COCORetrievalBenchmark

    return COCORetrievalBenchmark(karpathy(root), root)


def mmlu(root: Path, **options: Any) -> Benchmark:
    from mm.evaluation.benchmarks.mmlu import MMLUBenchmark

    write(root / "test" / "anatomy_test.csv", '"Which, of these?",heart,liver,"bone, long",skin,C\nWho?,a,b,c,d,A\n')
    write(root / "dev" / "anatomy_dev.csv", "What?,one,two,three,four,B\n" * 5)
    return MMLUBenchmark(root, **options)


def truthfulqa(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.truthfulqa import TruthfulQABenchmark

    item = {"question": "What happens?", "mc1_targets": {"Nothing happens": 1, "You die": 0},
            "mc2_targets": {"Nothing happens": 1, "It passes": 1, "You die": 0}}  # fmt: skip
    return TruthfulQABenchmark(write(root / "mc_task.json", [item, {**item, "question": "And then?"}]))


def humaneval(root: Path, **options: Any) -> Benchmark:
    from mm.evaluation.benchmarks.humaneval import HumanEvalBenchmark

    item = {"task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n"}  # fmt: skip
    other = {**item, "task_id": "HumanEval/1", "prompt": "def triple(x):\n", "entry_point": "triple",
             "canonical_solution": "    return 3 * x\n", "test": "def check(f):\n    assert f(2) == 6\n"}  # fmt: skip
    path = root / "HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in (item, other)).encode()))
    return HumanEvalBenchmark(path, **options)


WIKI = """ \n = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre actor .
 He had a guest @-@ starring role on the series The Bill in 2000 . \n \n = = Career = = \n
 \n In 2006 , Boulter starred ( again ) . \n \n
 = Du Fu = \n \n Du Fu was a prominent Chinese poet of the Tang dynasty . \n"""


def wikitext(root: Path) -> Benchmark:
    from mm.evaluation.benchmarks.wikitext import WikitextBenchmark

    return WikitextBenchmark(write(root / "wiki.test.raw", WIKI), max_length=16)


PUBLISHED: dict[str, Callable[[Path], Benchmark]] = {
    maker.__name__: maker
    for maker in (
        gqa, textvqa, docvqa, chartqa, scienceqa, pope, mmmu_pro, mmstar, video_mme, librispeech, common_voice,
        coco_captions, coco_retrieval, mmlu, truthfulqa, humaneval, wikitext,
    )
}  # fmt: skip
