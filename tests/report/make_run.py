"""A run directory as `make demo` leaves it, with made-up numbers: for the report's tests, and to look at."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

from mm.types import MODALITIES

STAGES = {"align": 300, "instruct": 1200}
COLOURS = {"red": "#d33", "blue": "#36c", "green": "#2a4", "yellow": "#ec3", "gray": "#888"}
NASTY = '<script>alert("x")</script> & <|user|>'


def make_run(run: Path, samples: int = 40) -> Path:
    """Writes the run directory `run` and returns it. One answer and one question hold markup (`NASTY`)."""
    rng = random.Random(0)
    for name, steps in STAGES.items():
        _metrics(run / name, steps, rng)
    _routing(run / "instruct", rng)
    _easy_vqa(run / "results", samples, rng)
    _audio(run / "results", samples, rng)
    _video(run / "results", samples, rng)
    _summary(run)
    return run


def _metrics(stage: Path, steps: int, rng: random.Random) -> None:
    stage.mkdir(parents=True)
    columns = ["epoch", "lr-AdamW", "routing/max_over_mean", "step", "throughput/non_padding",
               "throughput/samples_per_second", "throughput/tokens_per_second", "train/balance", "train/loss",
               "val/loss", "val/recall_at_1", "val/recall_at_10"]  # fmt: skip
    with (stage / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for step in range(9, steps, 10):
            done = step / steps
            loss = 3.2 * math.exp(-4 * done) + 0.08 + rng.gauss(0, 0.03)
            row = {"epoch": 0, "step": step, "train/loss": loss, "lr-AdamW": 3e-3 * math.sin(math.pi * done)}
            row |= {"throughput/tokens_per_second": rng.gauss(11800, 300), "throughput/non_padding": 0.97}
            row |= {"throughput/samples_per_second": rng.gauss(212, 8), "train/balance": 1 + 0.3 * math.exp(-5 * done)}
            writer.writerow(row)
            if step % 100 == 99:
                recalls = {"val/recall_at_1": 0.3 * done, "val/recall_at_10": 0.8 * done}
                more = recalls if stage.name == "align" else {}
                writer.writerow({"step": step, "epoch": 0, "val/loss": loss * 1.1, **more})


def _routing(stage: Path, rng: random.Random) -> None:
    tastes = {(layer, m): [rng.gauss(0, 1) for _ in range(8)] for layer in (1, 2, 3) for m in MODALITIES}
    with (stage / "routing.jsonl").open("w") as file:
        for step in range(50, STAGES["instruct"] + 1, 50):
            sharp = 0.2 + 0.6 * step / STAGES["instruct"]
            layers = []
            for layer in (1, 2, 3):
                counts = {m: [int(4000 * math.exp(sharp * t)) for t in tastes[layer, m]] for m in MODALITIES}
                layers.append({"layer": layer, "max_over_mean": 1.5, "counts": counts})
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")


def _write_results(results: Path, name: str, scores: dict[str, object], lines: list[dict[str, object]]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps({"benchmark": name, "n": len(lines), **scores}))
    (results / f"{name}.predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _easy_vqa(results: Path, samples: int, rng: random.Random) -> None:
    media = results / "easy_vqa.media"
    media.mkdir(parents=True)
    lines: list[dict[str, object]] = []
    for i in range(samples):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(["circle", "rectangle"])
        image = Image.new("RGB", (64, 64), "#f4f1ea")
        draw = ImageDraw.Draw(image)
        box = (12 + i % 8, 14, 44 + i % 8, 40)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
        image.save(media / f"{i}.png")
        asked = [("what color is the shape?", colour), ("what shape does the image contain?", shape)]
        question, answer = rng.choice(asked)
        wrong = i % 13 == 5
        lines.append({
            "id": str(i), "question": question, "answers": [answer], "prediction": "triangle" if wrong else answer,
            "score": 0.0 if wrong else 1.0, "category": "color" if "color" in question else "shape",
            "media": f"easy_vqa.media/{i}.png",
        })  # fmt: skip
    lines[min(5, samples - 1)] |= {"question": f"is this {NASTY}?", "prediction": NASTY}
    scores = {
        "scores": {"accuracy": 0.987, "color_shape_accuracy": 0.968},
        "chance": {"accuracy": 0.5, "color_shape_accuracy": 0.111},
        "controls": {"question_only": {"accuracy": 0.671, "color_shape_accuracy": 0.231},
                     "shuffled_media": {"accuracy": 0.655, "color_shape_accuracy": 0.214}},
        "intervals": {"accuracy": [0.981, 0.991], "color_shape_accuracy": [0.957, 0.977]},
        "calibration": {"n": samples, "ece": 0.031, "bins": [
            {"low": 0.5, "high": 0.6, "n": 3, "confidence": 0.55, "accuracy": 0.4},
            {"low": 0.9, "high": 1.0, "n": 21, "confidence": 0.97, "accuracy": 0.99}]},
        "provenance": {"model": "runs/demo/model", "decoding": {"temperature": 0.0, "max_new_tokens": 4}, "seed": 0},
    }  # fmt: skip
    _write_results(results, "easy_vqa", scores, lines)


def _generated_scores(score: float) -> dict[str, object]:
    controls = {"question_only": {"accuracy": 0.34}, "shuffled_media": {"accuracy": 0.36}}
    return {"scores": {"accuracy": score}, "chance": {"accuracy": 0.33}, "controls": controls,
            "provenance": {"generated": True, "seed": 7}}  # fmt: skip


def _audio(results: Path, samples: int, rng: random.Random) -> None:
    media = results / "audio.media"
    media.mkdir(parents=True)
    lines: list[dict[str, object]] = []
    for i in range(samples):
        beeps = rng.randint(1, 4)
        time = np.arange(int(1.6 * 16000)) / 16000
        sound = 0.5 * np.sin(2 * np.pi * 440 * time) * (time * beeps / 1.6 % 1 < 0.5)
        soundfile.write(media / f"{i}.wav", sound, 16000)
        wrong = i % 9 == 2
        lines.append({"id": str(i), "question": "how many beeps?", "answers": [str(beeps)], "category": "count",
                      "prediction": str(beeps % 4 + 1) if wrong else str(beeps), "score": float(not wrong),
                      "media": [f"audio.media/{i}.wav"]})  # fmt: skip
    _write_results(results, "audio", _generated_scores(0.934), lines)


def _video(results: Path, samples: int, rng: random.Random) -> None:
    media = results / "video.media"
    media.mkdir(parents=True)
    lines: list[dict[str, object]] = []
    for i in range(min(samples, 14)):
        way = rng.choice(["left", "right"])
        with av.open(str(media / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=4)
            stream.width = stream.height = 48
            stream.pix_fmt = "yuv420p"
            for frame in range(16):
                image = Image.new("RGB", (48, 48), "#222")
                x = 2 * frame if way == "right" else 30 - 2 * frame
                ImageDraw.Draw(image).rectangle((x, 16, x + 14, 30), fill="#3ad")
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
        lines.append({"id": str(i), "question": "which way does it move?", "answers": [way], "category": "motion",
                      "prediction": "right", "score": float(way == "right"),
                      "media": f"video.media/{i}.mp4"})  # fmt: skip
    _write_results(results, "video", _generated_scores(0.887), lines)


def _summary(run: Path) -> None:
    commands = {
        "shard": ("mm shard easy_vqa --out runs/demo/data/easy_vqa", 21.4),
        "align": ("mm fit --config configs/demo/align.yaml", 96.0),
        "instruct": ("mm fit --config configs/demo/instruct.yaml", 402.7),
        "evaluate": ("mm test --config configs/demo/evaluate.yaml", 75.2),
    }
    summary = {
        "easy_vqa": {"accuracy": 0.987}, "routing": {"max_over_mean_load": 1.42},
        "seconds": {"total": 744.0, "install": 140.0},
        "stages": [{"name": n, "command": c, "seconds": s} for n, (c, s) in commands.items()],
        "versions": {"mm": "0.1.0", "torch": "2.11.0"},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
