"""Result files: NAME.json, NAME.predictions.jsonl and NAME.media/ in one directory.

Predictions are read back by `read_predictions`, and scored again, without the model, by `rescore`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from mm.checkpoint import write_atomically
from mm.datasets.decode import decode_image
from mm.evaluation.benchmarks.base import Benchmark, Record, check_samples, records_of
from mm.evaluation.provenance import media_bytes
from mm.types import Media, Sample

MAX_SIDE = 320  # pixels of a kept picture
MAX_BYTES = 400_000  # of a kept sound or video
SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4"}  # of media whose name has none


def write(directory: Path, result: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Writes both files, the result last: where it stands, its predictions do too."""
    directory.mkdir(parents=True, exist_ok=True)
    name = result["benchmark"]
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    write_atomically(directory / f"{name}.predictions.jsonl", lines.encode())
    text = json.dumps(result, ensure_ascii=False, indent=2, default=str) + "\n"
    write_atomically(directory / f"{name}.json", text.encode())


def read_predictions(path: Path) -> dict[str, str]:
    """{id: prediction} of a predictions file. Raises ValueError naming file, line and id."""
    predictions: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            key, text = entry["id"], entry["prediction"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: not an object with "id" and "prediction"') from None
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: the prediction for {key!r} is {text!r}, not a string")
        if key in predictions:
            raise ValueError(f"{path}, line {number}: the id {key!r} appears twice")
        predictions[key] = text
    return predictions


def rescore(benchmark: Benchmark, predictions: Mapping[str, str], file: str | Path) -> list[Record]:
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
    texts = [predictions[sample.key] for sample in samples]
    return records_of(samples, texts, benchmark.score_all(samples, texts))


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
