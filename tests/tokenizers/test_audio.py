"""Log-mel frames: how many is known from the samples and the rate; what they hold does not depend on the recording."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.tokenizers.audio import AudioTokenizer
from mm.types import Waveform

RATES = [1_000, 8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000]


def tone(hertz: float, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> Waveform:
    time = torch.arange(int(seconds * rate)) / rate
    return Waveform((0.5 * torch.sin(2 * math.pi * hertz * time)).expand(channels, -1), rate)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.sampled_from(RATES), st.integers(1, 3), st.sampled_from([8_000, 16_000]))
def test_count_equals_tokens(samples: int, rate: int, channels: int, target: int) -> None:
    tokenizer = AudioTokenizer(rate=target, mels=40)
    waveform = Waveform(torch.rand(channels, samples) - 0.5, rate)
    tokens = tokenizer(waveform)
    assert tokenizer.count(waveform) == len(tokens)
    assert tuple(tokens.grid.tolist()) == tokenizer.measure(waveform) == (len(tokens), 1, 1)
    assert tokens.values.shape == (len(tokens), 40) and tokens.values.dtype == torch.float32
    assert bool(tokens.values.isfinite().all())
    # A hundred a second, rounded up; resampling itself rounds up to a whole sample.
    assert len(tokens) in {math.ceil(100 * samples / rate), math.ceil(100 * samples / rate) + 1}


@pytest.mark.parametrize("rate", RATES)
def test_a_second_is_a_hundred_frames(rate: int) -> None:
    assert AudioTokenizer().count(Waveform(torch.zeros(1, rate), rate)) == 100


def test_one_sample_and_silence() -> None:
    assert len(AudioTokenizer()(Waveform(torch.ones(1, 1), 16_000))) == 1
    assert AudioTokenizer()(Waveform(torch.zeros(2, 1600), 16_000)).values.unique().tolist() == [-1.5]


def test_a_tone_stands_in_its_band_at_every_rate_and_in_every_channel_count() -> None:
    tokenizer = AudioTokenizer()
    reference = tokenizer(tone(1000)).values
    # Slaney's scale is 3 mel per 200 Hz up to 1 kHz and logarithmic above: 1 kHz is 15 of the 45.2 mel at 8 kHz.
    assert abs(int(reference[25].argmax()) - round(15 / 45.25 * 81 - 1)) <= 1
    for rate in RATES[1:]:
        values = tokenizer(tone(1000, rate=rate, channels=2)).values
        assert values.shape == reference.shape
        # Away from the ends; 0.02 of a scale of 2: resampling filters differ by some tenths of a decibel.
        loud = reference[10:40] > reference.max() - 0.5
        assert torch.allclose(values[10:40][loud], reference[10:40][loud], atol=0.02)


def test_equal_to_whisper() -> None:
    """Whisper's own features, away from the ends, which it mirrors and we continue with silence."""
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor()
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    theirs = torch.from_numpy(extractor(sound, sampling_rate=16_000, padding=False).input_features[0]).T
    ours = AudioTokenizer()(Waveform(torch.from_numpy(sound)[None], 16_000)).values
    assert ours.shape == theirs.shape == (100, 80)
    # 1e-3: their Fourier transform is of float64, ours of float32.
    assert torch.allclose(ours[2:-2], theirs[2:-2], atol=1e-3)


def test_channels_are_averaged() -> None:
    left, right = torch.rand(2, 1, 1600) - 0.5
    tokenizer = AudioTokenizer()
    both = tokenizer(Waveform(torch.cat([left, right]), 16_000)).values
    assert torch.allclose(both, tokenizer(Waveform((left + right) / 2, 16_000)).values, atol=1e-6)


def test_no_samples_and_too_many() -> None:
    tokenizer = AudioTokenizer(max_seconds=0.5)
    assert tokenizer.count(Waveform(torch.zeros(1, 4000), 8000)) == 50
    with pytest.raises(ValueError, match=r"0\.50 s, longer than max_seconds=0\.5"):
        tokenizer(Waveform(torch.zeros(1, 4001), 8000))
    for shape in ((1, 0), (0, 100)):
        with pytest.raises(ValueError, match="no samples"):
            tokenizer(Waveform(torch.zeros(shape), 8000))
    with pytest.raises(ValueError, match="999 Hz"):
        tokenizer.count(Waveform(torch.zeros(1, 10), 999))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rate": 0}, "rate=0"),
        ({"hop_ms": 0.0}, "hop_ms=0"),
        ({"hop_ms": 30.0}, "hop_ms=30"),
        ({"max_seconds": 0.0}, "max_seconds=0"),
        ({"mels": 0}, "mels=0"),
    ],
)
def test_wrong_options(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AudioTokenizer(**options)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
def test_more_bands_than_the_window_resolves() -> None:
    with pytest.raises(ValueError, match="mels=400"):
        AudioTokenizer(mels=400)


def test_built_on_another_device_and_pickled() -> None:
    with torch.device("meta"):  # a model's skeleton
        tokenizer = AudioTokenizer()
    waveform = tone(440, rate=8000)
    expected = AudioTokenizer()(waveform).values
    assert torch.equal(tokenizer(waveform).values, expected)
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(waveform).values, expected)
