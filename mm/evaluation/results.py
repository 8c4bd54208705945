"""Result files, all in one directory:

    NAME.json  NAME.predictions.jsonl  NAME.media/     the result, a line a sample, media for the gallery
    NAME.submission/                                   what the benchmark's own server or script takes

Predictions are read back by `read_predictions`, and scored again, without the model, by `rescore`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mm.checkpoint import write_atomically
from mm.datasets.decode import decode_image
from mm.datasets.source import read_json
from mm.evaluation.benchmarks.base import Benchmark, check_samples
from mm.evaluation.provenance import media_bytes
from mm.evaluation.records import Record, Response, make_records
from mm.types import Media, Sample

MAX_SIDE = 320  # pixels of a kept picture
MAX_BYTES = 400_000  # of a kept sound or video
SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4"}  # of media whose name has none


def write(
    directory: Path, result: Mapping[str, Any], records: Sequence[Record], submission: Mapping[str, Any] | None = None
) -> None:
    """Writes the files, the result last: where it stands, its predictions do too."""
    directory.mkdir(parents=True, exist_ok=True)
    name = result["benchmark"]
    lines = "".join(json.dumps(record.to_json(), ensure_ascii=False, default=str) + "\n" for record in records)
    write_atomically(directory / f"{name}.predictions.jsonl", lines.encode("utf-8", "replace"))
    for file, content in (submission or {}).items():
        path = directory / f"{name}.submission" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)
        write_atomically(path, text.encode("utf-8", "replace"))
    text = json.dumps(result, ensure_ascii=False, indent=2, default=str) + "\n"
    write_atomically(directory / f"{name}.json", text.encode("utf-8", "replace"))


def read_result(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError naming a file that is none."""
    result = read_json(path)
    if not isinstance(result, dict) or not {"benchmark", "scores", "provenance"} <= set(result):
        raise ValueError(f"{path}: not a result of an evaluation: it has no benchmark, scores and provenance")
    return result


def read_records(path: Path) -> list[Record]:
    """The lines of a predictions file, whole. Raises ValueError naming file, line and id."""
    records: list[Record] = []
    seen: set[str] = set()
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            record = Record.from_json(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of predictions ({error})") from None
        if record.id in seen:
            raise ValueError(f"{path}, line {number}: the id {record.id!r} appears twice")
        seen.add(record.id)
        records.append(record)
    return records


def read_predictions(path: Path) -> dict[str, Response]:
    """{id: response} of a predictions file. Raises ValueError naming file, line and id.

    A line needs "id" and "prediction" alone; "details" may bring what a likelihood benchmark needs.
    """
    predictions: dict[str, Response] = {}
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            key, text, details = entry["id"], entry["prediction"], entry.get("details", {})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{path}, line {number}: not an object with "id" and "prediction"') from None
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: the prediction for {key!r} is {text!r}, not a string")
        if key in predictions:
            raise ValueError(f"{path}, line {number}: the id {key!r} appears twice")
        logs, tokens = tuple(details.get("loglikelihoods", ())), tuple(details.get("tokens", ()))
        predictions[key] = Response(text, logs, tokens, entry.get("confidence"))
    return predictions


def rescore(benchmark: Benchmark, predictions: Mapping[str, Response], file: str | Path) -> list[Record]:
    """Records of saved predictions for the whole benchmark, in its order.

    Raises ValueError, naming the first id and `file`, if a prediction is missing or its id unknown.
    """
    samples = benchmark.samples()
    check_samples(samples, benchmark.origin())
    known = {sample.key for sample in samples}
    unknown = [key for key in predictions if key not in known]
    missing = [sample.key for sample in samples if sample.key not in predictions]
    for problem, keys in (("an unknown id", unknown), ("no prediction for", missing)):
        if keys:
            raise ValueError(f"{file}: {problem} {keys[0]!r} ({len(keys)} such ids; {benchmark.origin()})")
    responses = [predictions[sample.key] for sample in samples]
    return make_records(samples, responses, benchmark.mark_all(samples, responses))


def keep_gallery(directory: Path, name: str, samples: Sequence[Sample], records: Sequence[Record], limit: int) -> None:
    """Keeps the first media of about `limit` records under NAME.media/, and names the file in the record.

    Half of the places go to wrong answers where there are enough, spread over the benchmark.
    """
    with_media = [i for i, sample in enumerate(samples) if sample.media]
    wrong = _spread([i for i in with_media if records[i].score < 0.5], limit // 2)
    right = _spread([i for i in with_media if records[i].score >= 0.5], limit - len(wrong))
    if not wrong and not right:
        return
    folder = directory / f"{name}.media"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():  # an earlier evaluation's
        old.unlink()
    for index in (*wrong, *right):
        item = samples[index].media[0]
        suffix, data = _thumbnail(item)
        if data is not None:
            file = folder / f"{index:06d}{suffix}"
            file.write_bytes(data)
            records[index].media = f"{folder.name}/{file.name}"


def _spread(items: list[int], count: int) -> list[int]:
    """At most `count` items at even distances."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def _thumbnail(item: Media) -> tuple[str, bytes | None]:
    """A suffix and the bytes to keep: a small PNG of a picture; a sound or video as it is, unless large."""
    if item.kind == "image":
        picture = Image.fromarray(decode_image(item).permute(1, 2, 0).numpy())
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return ".png", buffer.getvalue()
    data = media_bytes(item)
    return Path(item.name).suffix.lower() or SUFFIX[item.kind], data if len(data) <= MAX_BYTES else None
