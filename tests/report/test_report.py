"""The report page: made from a run that looks like the demo's, from broken ones, and from no run at all."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mm.report import plots
from mm.report.media import embed
from mm.report.page import GALLERY, duration, gallery, main, render, what_ran
from mm.report.run import read_run

sys.path.insert(0, str(Path(__file__).parent))
from make_run import NASTY, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo", samples=24)


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return render(read_run(run))


class Tree(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    VOID = frozenset({"meta", "img", "input", "link", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset", "data")]
        if tag not in self.VOID and tag not in ("path", "rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "rect", "circle"):
            return
        # optional end tags (tbody, tr, ...) are all written out on this page
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data


def test_page_stands_alone(html: str) -> None:
    tree = Tree(html)
    assert tree.links and all(link.startswith("data:") for link in tree.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(tree.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html


def test_page_shows_every_part(html: str) -> None:
    tree = Tree(html)
    text = " ".join(tree.text.split())
    for words in (
        "easy_vqa", "98.7%", "chance 50.0%", "question only", "shuffled media", "67.1%", "65.5%",  # scores
        "mm fit --config configs/demo/instruct.yaml", "6 min 43 s", "12 min 24 s",  # what ran
        "train/loss", "val/loss", "Learning rate", "11.8k tokens/s", "97.0% of positions not padding",  # curves
        "Text tokens", "Image tokens", "Audio tokens", "Video tokens", "Load imbalance", "L3",  # routing
        "how many beeps?", "what color is the shape?", "which way does it move?", "answer: left",  # samples
    ):  # fmt: skip
        assert words in text, words
    assert {"img", "audio", "video", "svg"} <= set(tree.tags)
    assert "width=device-width" in html and "prefers-color-scheme: dark" in html


def test_what_the_model_says_is_text(html: str) -> None:
    assert "<script" not in html
    assert NASTY in Tree(html).text  # all of it, as characters


def test_generated_data_says_so(run: Path) -> None:
    by_name = {bench.name: bench for bench in read_run(run).benchmarks}
    assert all(card.prediction.generated for card in gallery(by_name["audio"]))
    assert not any(card.prediction.generated for card in gallery(by_name["easy_vqa"]))
    page = Tree(render(read_run(run))).text
    assert page.count("generated") >= 2 * (GALLERY + 2)  # each card, the headings and the table rows


def test_gallery_has_right_and_wrong_of_every_category(run: Path) -> None:
    for bench in read_run(run).benchmarks:
        cards = gallery(bench)
        assert {card.prediction.right for card in cards} == {True, False}
        assert {card.prediction.category for card in cards} == {p.category for p in bench.predictions}
        assert len({id(card.prediction) for card in cards}) == len(cards) <= GALLERY


def test_gallery_shows_the_samples_whose_media_were_kept(run: Path) -> None:
    [bench] = [bench for bench in read_run(run).benchmarks if bench.name == "easy_vqa"]
    for prediction in bench.predictions[3:]:
        prediction.media = []
    assert len(gallery(bench)) == 3


def test_command_writes_beside_the_run_or_where_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert main([str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    assert "page.html (" in capsys.readouterr().out


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        main([str(tmp_path)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no such directory"):
        main([str(tmp_path / "nowhere")])


def test_missing_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs" / "version_0").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,nan\n")
    text = Tree(render(read_run(tmp_path))).text
    for words in ("no summary.json", "no model/manifest.json", "no routing recorded", "results/ holds no scores",
                  "no samples", "lightning_logs/version_0: train/loss was not finite 1 times"):  # fmt: skip
        assert words in text, words


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=6)
    with (run / "instruct" / "routing.jsonl").open("a") as file:
        file.write('{"step": 1250, "lay')
    (run / "results" / "bad.json").write_text("{")
    (run / "results" / "list.json").write_text("[]")
    (run / "results" / "audio.media" / "0.wav").write_bytes(b"")
    (run / "model").mkdir()
    text = Tree(render(read_run(run))).text
    for words in ("instruct/routing.jsonl: 1 unreadable line(s)", "results/bad.json is not valid JSON",
                  "results/list.json holds a list", "bad.predictions.jsonl", "0.wav", "could not be counted",
                  "98.7%"):  # fmt: skip
        assert words in text, words


def test_files_outside_the_run_stay_outside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=2)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    outside = ["../../secret.png", "/etc/hosts"]
    line = {"question": "?", "answers": ["a"], "prediction": "a", "score": 1, "media": outside}
    (run / "results" / "easy_vqa.predictions.jsonl").write_text(json.dumps(line) + "\n")
    [bench] = [bench for bench in read_run(run).benchmarks if bench.name == "easy_vqa"]
    assert bench.predictions[0].media == []


def test_media(tmp_path: Path) -> None:
    Image.effect_noise((2000, 1000), 80).convert("RGB").save(tmp_path / "large.png")
    photo = embed(tmp_path / "large.png")
    assert photo.uri is not None and photo.uri.startswith("data:image/jpeg") and len(photo.uri) < 100_000
    assert not photo.tiny
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png" in (embed(tmp_path / "text.png").note or "")
    (tmp_path / "notes.txt").write_text("words")
    assert ".txt" in (embed(tmp_path / "notes.txt").note or "")


def test_long_sound_is_drawn_but_not_carried(tmp_path: Path) -> None:
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "long.wav", np.zeros(400_000), 16000)
    sound = embed(tmp_path / "long.wav")
    assert sound.uri is None and sound.picture and "too large" in (sound.note or "")


def test_chart_of_one_point_of_equal_values_and_of_a_wide_range() -> None:
    for curve in ([(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -3.0), (2.0, -3.0)], [(0.0, 1e4), (9.0, 1e-4)]):
        svg = plots.line_chart({"<b>": curve}, label='"x"')
        assert "nan" not in svg and "inf" not in svg and "<b>" not in svg and 'label="&#34;x' in svg


def test_logarithmic_axis_only_for_wide_positive_ranges() -> None:
    wide = plots.Axis(1e-3, 10, 0, 100, log=True)
    assert wide(0.1) == pytest.approx(50)
    assert wide.ticks() == [0.001, 0.01, 0.1, 1, 10]
    assert plots.Axis(0, 1, 0, 100).ticks() == [0, 0.25, 0.5, 0.75, 1.0]


def test_smoothing_keeps_the_mean_and_bounds_the_points() -> None:
    curve = [(float(i), float(i % 2)) for i in range(10_000)]
    smoothed = plots.smooth(curve)
    assert len(smoothed) <= 240
    assert all(abs(y - 0.5) < 0.05 for _, y in smoothed)
    assert plots.smooth([(0.0, 1.0), (1.0, 5.0)]) == [(0.0, 1.0), (1.0, 5.0)]


def test_heat_map_is_relative_to_an_even_share() -> None:
    svg = plots.heat_map({1: [30, 10, 0, 0], 2: [5, 5, 5, 5]}, top=3.0, label="x")
    assert "layer 1, expert 0: 30 tokens, 3.00 x an even share" in svg
    assert svg.count("1.00 x an even share") == 5
    assert 'fill-opacity="1.00"' in svg and 'fill-opacity="0.00"' in svg
    assert plots.heat_map({0: [1] * 128}, top=2.0, label="x").count("<rect") == 128


def test_what_ran_from_stages_and_from_seconds_alone() -> None:
    stages = [{"name": "align", "command": "mm fit", "seconds": 50.0}]
    rows = what_ran({"stages": stages, "seconds": {"total": 99.0, "align": 50.0, "install": 100.0}})
    assert [(row.name, row.command, row.share) for row in rows] == [("align", "mm fit", 0.5), ("install", "", 1.0)]
    assert [row.name for row in what_ran({"seconds.install": 3, "seconds.total": 4})] == ["install"]


@pytest.mark.parametrize(("seconds", "spelled"), [(7.31, "7.3 s"), (125, "2 min 05 s"), (3840, "1 h 04 min")])
def test_duration(seconds: float, spelled: str) -> None:
    assert duration(seconds) == spelled


@pytest.mark.parametrize(
    ("value", "spelled"), [(0, "0"), (1.3e-4, "1.3e-4"), (2e-5, "2e-5"), (0.25, "0.25"), (1234, "1.23k")]
)
def test_spell(value: float, spelled: str) -> None:
    assert plots.spell(value) == spelled


def test_scores_have_intervals_bars_and_a_calibration_plot(html: str) -> None:
    assert "98.1% to 99.1%" in html
    assert 'aria-label="scores of easy_vqa"' in html and 'aria-label="calibration of easy_vqa"' in html
    assert "color shape: 96.8%, 95 % interval 95.7% to 97.7%" in html
    assert "21 answers: confidence 97%, right 99%" in html
    assert 'aria-label="calibration of audio"' not in html, "no confidences are known there"
