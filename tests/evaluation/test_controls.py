from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.controls import question_only, shuffled_media
from mm.types import Media, Sample


def sample(key: str, *media: Media) -> Sample:
    parts = [{"type": m.kind, "media": i} for i, m in enumerate(media)]
    return Sample(key, [{"role": "user", "content": [*parts, {"type": "text", "text": key}]}], list(media))


def image(name: int) -> Media:
    return Media("image", str(name).encode(), f"{name}.png")


def test_question_only_keeps_the_text_alone():
    first = sample("what?", image(1), image(2))
    first.messages.insert(0, {"role": "user", "content": [{"type": "image", "media": 0}]})
    [bare] = question_only([first])
    assert bare.messages == [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
    assert bare.media == []
    assert len(first.media) == 2 and len(first.messages) == 2, "the sample itself must stay whole"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 3))
def test_shuffled_media_is_never_ones_own(owners, seed):
    samples = [sample(str(i), image(owner)) for i, owner in enumerate(owners)]
    shuffled = shuffled_media(samples, seed)
    own = {s.key: s.media for s in samples}
    assert all(s.media != own[s.key] for s in shuffled)
    most = max(owners.count(owner) for owner in owners)
    assert len(shuffled) == min(len(owners), 2 * (len(owners) - most)), "as many as can swap take part"


def test_shuffled_media_keeps_every_picture_as_often_and_obeys_the_seed():
    samples = [sample(str(i), image(i % 50)) for i in range(200)]
    first, again, other = (shuffled_media(samples, seed) for seed in (0, 0, 1))
    assert sorted(s.media[0].name for s in first) == sorted(s.media[0].name for s in samples)
    assert first == again != other
    assert [s.key for s in first] == [s.key for s in samples]


def test_shuffled_media_swaps_like_for_like():
    sound = [Media("audio", bytes([i]), f"{i}.wav") for i in range(2)]
    samples = [sample("a", image(1)), sample("b", sound[0]), sample("c", image(2)), sample("d", sound[1])]
    assert [s.media[0].name for s in shuffled_media(samples)] == ["2.png", "1.wav", "1.png", "0.wav"]
    pairs = [sample("one", image(1)), sample("two", image(2), image(3))]
    assert shuffled_media(pairs) == [], "nobody else has two pictures"


def test_text_has_nothing_to_shuffle():
    assert shuffled_media([sample("a"), sample("b")]) == []
