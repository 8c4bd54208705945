"""Generated worlds: clips drawn from independent attributes, with questions whose answers are exact.

    attributes (uniform, independent) -> clip (WAV or MP4 bytes) and question branches about the attributes

What a clip shows is drawn before what is asked, each answer is uniform over its values whatever the question, and a
yes/no question is true half of the time for every value that it names. So a reader of the questions alone sits at
chance; whatever is above it was seen or heard. The data is generated and says so in `meta["generated"]`.
"""

from __future__ import annotations

import io
import wave
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, TypeVar

import av
import numpy as np
from numpy.typing import NDArray

from mm.datasets.source import Question, Source, branched, single
from mm.types import Kind, Media, Sample

Choice = TypeVar("Choice")
Split = Literal["train", "validation", "test"]
SPLITS: dict[str, int] = {"train": 0, "validation": 1, "test": 2}  # part of every clip's seed: streams never meet
VERSION = "2"  # of the generated data; raise it when any byte of a clip or a question changes


@dataclass(frozen=True)
class Attribute:
    """What a clip varies in: `values` are single-word answers, `asks` paraphrases of the open question, `checks` of
    the yes/no question, with "{}" for a value."""

    name: str
    values: tuple[str, ...]
    asks: tuple[str, ...]
    checks: tuple[str, ...]


class World(Source[tuple[int, int | None]]):
    """A world of `n` clips with random access: `world[i]` depends on (seed, split, i) alone, not on `n`.

    Every clip carries `asked` open questions about different attributes and one yes/no question.

    Args:
        n: number of clips.
        split: "train", "validation" or "test"; splits draw from separate streams of the same seed.
        seed: of all randomness, 0 or more.
        branches: one sample a clip with a branch a question; False gives one sample a question (`n * (asked + 1)`).
        captions: instead of questions, one sample a clip with all attributes as its caption ("pitch rising, ...").
    """

    kind: ClassVar[Kind]
    suffix: ClassVar[str]
    attributes: ClassVar[tuple[Attribute, ...]]
    asked: ClassVar[int] = 4

    def __init__(
        self, n: int, split: Split = "train", seed: int = 0, branches: bool = True, captions: bool = False
    ) -> None:
        if n < 0:
            raise ValueError(f"{type(self).__name__}: n must be 0 or more, got {n}")
        if split not in SPLITS:
            raise ValueError(f"{type(self).__name__}: split must be one of {', '.join(SPLITS)}, got {split!r}")
        if seed < 0:
            raise ValueError(f"{type(self).__name__}: seed must be 0 or more, got {seed}")
        self.n = n
        self.split = split
        self.seed = seed
        self.branches = branches or captions
        self.captions = captions

    @abstractmethod
    def render(self, values: dict[str, str], rng: np.random.Generator) -> bytes:
        """The encoded clip that shows `values` (attribute name -> value); `rng` gives what no question asks about."""

    def __len__(self) -> int:
        return self.n if self.branches else self.n * (self.asked + 1)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        return self.sample((index, None) if self.branches else divmod(index, self.asked + 1))

    def records(self) -> Iterable[tuple[int, int | None]]:
        if self.branches:
            return ((clip, None) for clip in range(self.n))
        return (divmod(index, self.asked + 1) for index in range(len(self)))

    def sample(self, record: tuple[int, int | None]) -> Sample:
        clip, number = record
        draw = np.random.default_rng([self.seed, SPLITS[self.split], clip])
        values = {attribute.name: _pick(draw, attribute.values) for attribute in self.attributes}
        questions = list(self.questions(values, draw))
        media = [Media(self.kind, self.render(values, draw), f"{clip:06d}{self.suffix}")]
        meta = {"generated": True, "clip": clip, "attributes": values}
        key = f"{self.kind}_world_{self.split}_{self.seed}_{clip:06d}"
        if self.captions:
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            content = [{"type": self.kind, "media": 0}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": told}]
            return Sample(f"{key}_caption", messages, media, meta=meta)
        if number is None:
            named = [Question(q.text, q.answer, {"question_types": q.meta["category"]}) for q in questions]
            return branched(key, media, named, meta)
        return single(f"{key}_{number}", media, questions[number], meta)

    def questions(self, values: dict[str, str], rng: np.random.Generator) -> Iterator[Question]:
        """Open questions about `asked` different attributes, then one yes/no question."""
        for index in rng.permutation(len(self.attributes))[: self.asked]:
            attribute = self.attributes[index]
            answer = values[attribute.name]
            yield Question(_pick(rng, attribute.asks), answer, {"category": attribute.name, "answers": [answer]})
        attribute = _pick(rng, self.attributes)
        truth = values[attribute.name]
        claimed = truth
        if rng.random() < 0.5:
            claimed = _pick(rng, tuple(value for value in attribute.values if value != truth))
        answer = "yes" if claimed == truth else "no"
        text = _pick(rng, attribute.checks).format(claimed)
        yield Question(text, answer, {"category": "yes/no", "answers": [answer]})

    def fingerprint(self) -> dict[str, str]:
        return {"world": VERSION, "numpy": np.__version__, "av": av.__version__}


def encode_wav(samples: NDArray[np.floating], rate: int) -> bytes:
    """(S,) samples in [-1, 1] at `rate` hertz -> a mono 16-bit PCM WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def encode_mp4(frames: NDArray[np.uint8], fps: int) -> bytes:
    """(T, H, W, 3) RGB frames, H and W even -> an H.264 MP4 file whose frame i is shown at exactly i / fps seconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        # One thread, and only code of x264's that is the same on every processor (by its AVX-512 one clip in 200 came
        # out otherwise when made again): bytes then do not depend on the machine. No B-frames: no edit list shifts the
        # first timestamp.
        options = {"preset": "veryfast", "crf": "10", "bf": "0", "threads": "1", "x264-params": "cpu-independent=1"}
        stream = file.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def _pick(rng: np.random.Generator, options: tuple[Choice, ...]) -> Choice:
    return options[rng.integers(len(options))]
