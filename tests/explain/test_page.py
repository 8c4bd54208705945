"""The page of an explanation, and `mm explain`."""

import base64
import io
import re
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import mm
from mm.cli import main
from mm.explain import pictures
from mm.explain.collect import explain
from mm.explain.explanation import SeenMedia
from mm.explain.maps import visible
from mm.explain.page import STEPS, render, words
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector
from mm.testing import picture, tiny_model
from mm.types import Sample


def asking(question="what color is the shape?", size=(8, 6)):
    content = [{"type": "image", "media": 0}, {"type": "text", "text": question}]
    return Sample("a", [{"role": "user", "content": content}], [picture(0, size)])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(LinearProjector).eval()


@pytest.fixture(scope="module")
def found(model):
    return explain(model, asking(), answer="red or blue")


@pytest.fixture(scope="module")
def html(found):
    return render(found, "the model")


class Tags(HTMLParser):
    """Opened and closed tags match, and every attribute is seen."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "path", "circle"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_every_row_and_column_of_patches_is_named(html):
    assert re.findall(r'<th scope="row">row (\d+)</th>', html) == ["1", "2", "3", "4"]
    assert re.findall(r'<th scope="col">column (\d+)</th>', html) == ["1", "2", "3"]
    experts = set(re.findall(r"<title>row (\d), column (\d): expert \d", html))
    assert experts == {(str(r), str(c)) for r in range(1, 5) for c in range(1, 4)}


def test_numbers_of_the_table_are_the_attention(found, html):
    mean = torch.stack([found.cells(a.weights, a.of, 0) for a in found.attention]).mean((0, 1))[0]
    shown = [float(value) for value in re.findall(r"<td>([\d.]+)%</td>", html)]
    assert torch.allclose(torch.tensor(shown), 100 * mean.flatten(), atol=0.051)


def test_the_page_holds_together_and_fetches_nothing(found, html):
    tags = Tags(html)
    assert tags.open == []
    assert not any(tag in ("script", "link", "iframe") for tag, _ in tags.seen)
    for _, attributes in tags.seen:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\((?!\"data:)", html) and "http://" not in html and "https://" not in html
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert ids == [f"step-{n}" for n in range(len(found.steps) + 1)]
    assert all("alt" in attributes for tag, attributes in tags.seen if tag == "img")


def test_each_step_has_its_overlays_experts_and_likely_tokens(found, html):
    panels = html.split('<div class="panel panel-')[1:]
    assert len(panels) == len(found.steps) + 1
    for step, panel in zip(found.steps, panels[1:], strict=True):
        assert panel.count('class="card look"') == 3  # the rollout and two layers
        assert all(f"<code>{visible(text)}</code>" in panel for text, _ in step.top if text.isalnum())
        assert "layer 1 " in panel and 'class="expert"' in panel
    assert "Step 1: what was likely" in panels[1] and "<code>red</code>" in panels[1]


def test_words_show_what_the_step_saw(found, html):
    seen = words(found, torch.tensor([1]))
    assert [text for text, _, _ in seen][-1] == found.steps[0].text  # the token before, and none after it
    text = [c for c, p in enumerate(found.positions) if p.media is None and c <= found.steps[1].column]
    mean = torch.stack([a.weights[1] for a in found.attention]).mean(0)
    assert torch.allclose(torch.tensor([share for _, share, _ in seen]), mean[text])
    assert max(level for _, _, level in seen) == 1.0
    assert html.count('class="words"') == len(found.steps) + 1


def test_what_is_missing_is_said():
    cross = tiny_model(GatedCrossAttentionBridge).eval()
    page = render(explain(cross, asking(), answer="red"), "m")
    assert "no rollout: the media stand beside the sequence" in page and "layer 0, cross-attention" in page
    resampled = tiny_model(partial(GatedCrossAttentionBridge, queries=3, heads=2)).eval()
    assert '<th scope="row">row 4</th>' in render(explain(resampled, asking(), answer="red"), "m")


def test_long_answers_are_cut_and_say_so(model):
    page = render(explain(model, asking(), answer="red or blue " * 40), "m")
    assert page.count('class="panel panel-') == STEPS + 1
    assert "tokens are not shown one by one" in page


def test_text_of_strangers_stays_text(model):
    nasty = "<script>alert(1)</script> \x1b[2J {{ 7 * 7 }}"
    page = render(explain(model, asking(nasty), answer="<b>\x07\n"), "<img src=x>")
    assert "<script" not in page and "<img src=x" not in page and "\x1b" not in page and "\x07" not in page
    assert "{{ 7 * 7 }}" in page and "&lt;script&gt;" in page
    Tags(page)


def test_tokens_can_be_seen():
    assert visible(" a\n\tb\x00\x1b\x7f\x9b") == "·a⏎⇥b␀␛␡�"
    assert visible("") == "∅"


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_heat_covers_partly_filled_cells():
    item = SeenMedia("image", "", None, (1, 3, 5), (1, 2, 3), (1, 2, 2), torch.zeros(6, 3), True, 0, 6)
    cells = torch.zeros(1, 2, 3)
    cells[0, 1, 2] = 1.0
    image = pixels(pictures.heat(cells, item))
    assert image.size == (5, 3) and image.mode == "RGBA"
    hot = tuple(pictures.HEAT[-1].tolist())
    assert [(x, y) for y in range(3) for x in range(5) if image.getpixel((x, y)) == hot] == [(4, 2)]


def test_a_long_video_is_a_strip_of_some_frames():
    frames = torch.zeros(20, 3, 4, 6, dtype=torch.uint8)
    item = SeenMedia("video", "", frames, (20, 2, 3), (20, 2, 3), (1, 1, 1), torch.zeros(120, 3), True, 0, 120)
    assert pictures.shown_frames(20) == [1, 3, 6, 8, 11, 13, 16, 18] and pictures.shown_frames(3) == [0, 1, 2]
    assert pixels(pictures.picture(item)).size == (48, 4)
    assert pixels(pictures.heat(torch.rand(20, 2, 3), item)).size == (24, 2)


def test_sound_and_video_have_a_page(model, tmp_path):
    import wave

    with wave.open(str(tmp_path / "beep.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\1\2" * 1600)
    from mm.types import Media

    content = [{"type": "audio", "media": 0}, {"type": "text", "text": "how many beeps?"}]
    sample = Sample("s", [{"role": "user", "content": content}], [Media("audio", tmp_path / "beep.wav", "beep.wav")])
    found = explain(model, sample, answer="two")
    assert found.media[0].cells is not None and found.media[0].cells[1:] == (1, 1)
    page = render(found, "m")
    assert "audio 1: beep.wav" in page and "most at part" in page
    Tags(page)


def test_the_command(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(mm, "load", lambda path: model, raising=False)
    (tmp_path / "a.png").write_bytes(picture(0, (8, 6)).data)
    out = tmp_path / "page.html"
    line = ["explain", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "what?", "--out", str(out)]
    assert main(line) == 0
    assert capsys.readouterr().out.startswith(f"{out} (")
    assert "image 1: a.png" in out.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "model", "page.html"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone", "hi"], "no model at gone"),
        (["{model}", "hi", "--out", "/gone/page.html"], "--out /gone/page.html"),
        (["{model}"], "TEXT"),
        (["{model}", "hi", "--image", "gone.png"], "gone.png"),
        (["{model}", "hi", "--top", "0"], "top=0"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.setattr(mm, "load", lambda path: model, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *(arg.format(model=tmp_path) for arg in args)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mm explain: error: ") and message in err and err.count("\n") == 1
