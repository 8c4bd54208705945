"""The processor: lengths known before the model runs, and cuts by whole turns, branches and media only."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.datasets.chat_template import ChatTemplate
from mm.datasets.processor import Encoded, Processor
from mm.tokenizers.image import ImageTokenizer
from mm.types import IGNORE, SLOT_IDS, Media, MediaError, MediaSpec, Reduction, Sample, Tokens

SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


class Letters:
    """One id a character: 100 + code point. Specials have the ids 0.. and no text reaches them."""

    def encode(self, text: str) -> list[int]:
        return [100 + ord(c) for c in text]

    def special(self, name: str) -> int:
        return SPECIALS.index(name)


def spell(encoded: Encoded) -> str:
    slots = {index: f"[{kind}]" for kind, index in SLOT_IDS.items()}
    return "".join(slots.get(i) or (SPECIALS[i][1:-1] if i < 100 else chr(i - 100)) for i in encoded.ids.tolist())


def picture(width: int, height: int, name: str = "a.png") -> Media:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(file, "PNG")
    return Media("image", file.getvalue(), name)


def user(*content: object) -> dict[str, object]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "media": c} for c in content]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, object]:
    return {"role": "assistant", "content": text}


def processor(max_length: int | None = None, **spec: object) -> Processor:
    specs = {"image": MediaSpec(ImageTokenizer(patch=4), **spec)}  # type: ignore[arg-type]
    return Processor(Letters(), ChatTemplate("compact"), specs, max_length)


TALK = Sample("talk", [{"role": "system", "content": "s"}, *(m for i in "123" for m in (user(i * 4), assistant(i)))])
# system 3 positions; each exchange 6 + 3: 30 in all


def test_lengths_count_what_the_splice_will_make() -> None:
    sample = Sample("k", [user("q", 0, "r", 1), assistant("a")], [picture(16, 8), picture(8, 8, "b.png")])
    encoded = processor().encode(sample)
    assert spell(encoded) == "|user|q[image]r[image]|end||assistant|a|end|"
    assert [(m.column, m.length, len(m.tokens), m.name) for m in encoded.media] == [
        (2, 8, 8, "k: a.png"),
        (4, 4, 4, "k: b.png"),
    ]
    assert encoded.length == len(encoded.ids) - 2 + 8 + 4
    halved = processor(reductions=(Reduction((1, 1, 1)), Reduction((1, 2, 2)))).encode(sample)
    assert [m.length for m in halved.media] == [2, 1] and len(halved.media[0].tokens) == 8
    beside = processor(inline=False).encode(sample)
    assert [m.length for m in beside.media] == [1, 1] and beside.length == len(beside.ids)


def test_text_alone_needs_no_media_and_one_item_may_show_twice() -> None:
    encoded = processor().encode(Sample("k", [user("q"), assistant("a")]))
    assert encoded.media == [] and encoded.length == len(encoded.ids) == 6
    twice = processor().encode(Sample("k", [user(0, 0)], [picture(8, 8)]))
    assert [m.column for m in twice.media] == [1, 2]


def test_what_fits_exactly_is_left_alone() -> None:
    encoded = processor(max_length=30).encode(TALK)
    assert encoded.length == 30 and not encoded.dropped and encoded.fits


@pytest.mark.parametrize(("limit", "kept", "turns"), [(29, 2, 2), (21, 2, 2), (20, 1, 4), (12, 1, 4)])
def test_training_drops_the_latest_exchanges(limit: int, kept: int, turns: int) -> None:
    encoded = processor(limit).encode(TALK)
    assert encoded.fits and encoded.dropped == {"turns": turns}
    whole = processor().encode(TALK)
    assert encoded.ids.tolist() == whole.ids[: 3 + 9 * kept].tolist()
    assert encoded.labels.tolist() == whole.labels[: 3 + 9 * kept].tolist()


def test_what_cannot_be_cut_is_said_not_to_fit() -> None:
    encoded = processor(11).encode(TALK)
    assert not encoded.fits and encoded.length == 12
    assert not processor(10).encode(Sample("k", [user("a" * 20)])).fits
    whole = processor(None).encode(Sample("k", [user("a" * 2000)]))
    assert whole.fits and whole.length == 2002


def test_a_question_without_its_answer_goes_too() -> None:
    sample = Sample("k", [user("q"), assistant("a"), user("r"), assistant("b" * 50), user("unanswered")])
    encoded = processor(30).encode(sample)
    assert spell(encoded) == "|user|q|end||assistant|a|end|" and encoded.dropped == {"turns": 3}


def test_generation_drops_the_oldest_exchanges_but_not_the_system_or_the_question() -> None:
    sample = Sample("k", [*TALK.messages, user("now")])  # 3 + 27 + 5 + the opened turn
    prompt = processor(30).encode(sample, generation_prompt=True)
    assert prompt.length <= 30 and prompt.dropped == {"turns": 2}
    assert (
        spell(prompt)
        == "|system|s|end||user|2222|end||assistant|2|end||user|3333|end||assistant|3|end||user|now|end||assistant|"
    )
    shortest = processor(9).encode(sample, generation_prompt=True)
    assert spell(shortest) == "|system|s|end||user|now|end||assistant|"
    with pytest.raises(ValueError, match="sample k: the last question alone takes 9 positions, more than the 8"):
        processor(8).encode(sample, generation_prompt=True)


def branched(number: int = 3) -> Sample:
    branches = [[user(f"q{i}"), assistant(f"a{i}")] for i in range(number)]
    return Sample("k", [user(0)], [picture(8, 8)], branches)  # 5 + 7 a branch


def test_branches_go_before_turns_and_media() -> None:
    encoded = processor(25).encode(branched())
    assert encoded.dropped == {"branches": 1} and encoded.length == 19
    assert encoded.branch_ids.unique().tolist() == [0, 1, 2] and len(encoded.media) == 1
    one = processor(12).encode(branched())
    assert one.dropped == {"branches": 2} and one.length == 12 and one.fits
    assert not processor(11).encode(branched()).fits


def test_media_of_a_dropped_branch_go_with_it_and_are_not_tokenised() -> None:
    sample = branched()
    sample.media.append(picture(40, 40, "big.png"))
    sample.branches.append([user(1, "?"), assistant("no")])
    encoded = processor(40).encode(sample)
    assert encoded.dropped == {"branches": 1} and [m.name for m in encoded.media] == ["k: a.png"]


def test_whole_media_go_last_and_the_first_stays() -> None:
    media = [picture(16, 16, f"{i}.png") for i in range(4)]  # 16 positions each
    sample = Sample("k", [user(0, 1, "x", 2, 3), assistant("a"), user("r"), assistant("b")], media)
    encoded = processor(40).encode(sample)
    assert encoded.dropped == {"turns": 2, "media": 2} and [m.name for m in encoded.media] == ["k: 0.png", "k: 1.png"]
    assert spell(encoded) == "|user|[image][image]x|end||assistant|a|end|"
    assert encoded.length == 6 + 32 and encoded.fits
    assert (encoded.ids[[m.column for m in encoded.media]] == SLOT_IDS["image"]).all()
    assert not processor(20).encode(sample).fits


def test_columns_follow_the_cut() -> None:
    media = [picture(16, 16, "old.png"), picture(8, 8, "new.png")]
    sample = Sample("k", [user("look", 0), assistant("a"), user("and", 1)], media)
    prompt = processor(20).encode(sample, generation_prompt=True)
    (kept,) = prompt.media
    assert kept.name == "k: new.png" and prompt.ids[kept.column] == SLOT_IDS["image"] and prompt.length == 4 + 4 + 2


def test_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="sample k: a.wav is audio, but the model takes image"):
        processor().encode(
            Sample("k", [{"role": "user", "content": [{"type": "audio", "media": 0}]}], [Media("audio", b"", "a.wav")])
        )
    with pytest.raises(MediaError, match="broken.png"):
        processor().encode(Sample("k", [user(0)], [Media("image", b"not an image", "broken.png")]))


def test_encoding_is_pure() -> None:
    first, second = (processor(25).encode(branched()) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and torch.equal(
        first.media[0].tokens.values, second.media[0].tokens.values
    )
    assert first.labels[first.labels != IGNORE].tolist() == [197, 148, 1, 197, 149, 1]


class Counting(ImageTokenizer):
    """Counts what it tokenises."""

    calls = 0

    def __call__(self, media: Tensor) -> Tokens:
        self.calls += 1
        return super().__call__(media)


def test_kept_tokens_are_those_of_the_file_whatever_its_name_and_within_the_limit() -> None:
    first, second = picture(8, 8), picture(8, 12)
    size = sum(part.nbytes for part in vars(processor().encode(about(first)).media[0].tokens).values())
    counting = Counting(patch=4)
    specs: dict[str, MediaSpec] = {"image": MediaSpec(counting)}
    plain, keeping = (Processor(Letters(), ChatTemplate("compact"), specs, keep_bytes=limit) for limit in (0, size))
    renamed = Media("image", first.data, "b.png")
    expected = [plain.encode(about(media)).media[0] for media in (first, renamed, second, second)]
    assert counting.calls == 4
    for media, want in zip((first, renamed, second, second), expected, strict=True):
        got = keeping.encode(about(media)).media[0]
        assert (got.name, got.length) == (want.name, want.length)
        for name, tensor in vars(want.tokens).items():
            torch.testing.assert_close(getattr(got.tokens, name), tensor, rtol=0, atol=0)
    assert counting.calls == 4 + 1 + 2  # the second picture finds no room and is made anew each time


def about(media: Media) -> Sample:
    return Sample("k", [user("q", 0), assistant("a")], [media])
