"""Generated sounds: beeps that glide in pitch and volume, with questions whose answers are exact."""

from __future__ import annotations

import numpy as np

from mm.datasets.worlds import Attribute, Split, World, encode_wav

RATE = 16_000  # hertz
SECONDS = 1.6
COUNTS = ("one", "two", "three", "four")
RAMP = 0.008  # seconds that a beep takes to start and to end, so that it does not click


class AudioWorld(World):
    """Clips of 1.6 s at 16 kHz: one to four beeps of one timbre along one glide of pitch and one of volume."""

    kind = "audio"
    suffix = ".wav"
    attributes = (
        Attribute(
            "count",
            COUNTS,
            ("how many beeps are there?", "how many beeps do you hear?", "what is the number of beeps?"),
            ("is the number of beeps {}?",),
        ),
        Attribute(
            "pitch",
            ("rising", "falling", "steady"),
            ("is the pitch rising, falling or steady?", "how does the pitch change?", "what does the pitch do?"),
            ("is the pitch {}?",),
        ),
        Attribute(
            "timbre",
            ("pure", "buzzy", "noisy"),
            ("is the sound pure, buzzy or noisy?", "what is the timbre?", "how does the tone sound?"),
            ("is the sound {}?",),
        ),
        Attribute(
            "volume",
            ("louder", "softer", "even"),
            ("does the sound get louder, softer or stay even?", "how does the volume change?"),
            ("does the volume get or stay {}?",),
        ),
        Attribute(
            "register",
            ("high", "low"),
            ("is the sound high or low?", "is the tone high or low?"),
            ("is the tone {}?",),
        ),
    )

    def __init__(
        self, n: int = 3000, split: Split = "train", seed: int = 0, branches: bool = True, captions: bool = False
    ) -> None:
        super().__init__(n, split, seed, branches, captions)

    def render(self, values: dict[str, str], rng: np.random.Generator) -> bytes:
        time = np.arange(round(RATE * SECONDS)) / RATE
        along = time / SECONDS - 0.5  # -0.5 to 0.5 over the clip
        centre = rng.uniform(1300, 1800) if values["register"] == "high" else rng.uniform(350, 500)
        octaves = {"rising": 1, "falling": -1, "steady": 0}[values["pitch"]] * rng.uniform(2.0, 2.4)
        hertz = centre * 2 ** (octaves * along)
        decibels = {"louder": 1, "softer": -1, "even": 0}[values["volume"]] * rng.uniform(24, 30) * along
        tone = _tone(values["timbre"], hertz, rng)
        sound = 0.15 * 10 ** (decibels / 20) * tone * _beeps(values["count"], time, rng)
        floor = 1e-4 * rng.standard_normal(time.shape, np.float32)  # -80 dB: no recording is digitally silent
        return encode_wav(sound + floor, RATE)


def _tone(timbre: str, hertz: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(S,) a sine, a sawtooth (harmonics below the Nyquist frequency), or a sine under white noise."""
    phase = 2 * np.pi * (np.cumsum(hertz) / RATE + rng.random())
    if timbre == "buzzy":
        turn = np.exp(1j * phase)
        wave, power = np.zeros_like(hertz), np.ones_like(turn)
        for harmonic in range(1, 7):
            power = power * turn  # e^(i * harmonic * phase): six sines for the price of one
            wave += np.imag(power) / harmonic * (harmonic * hertz < RATE / 2)
        return 0.8 * wave
    tone = np.sin(phase)
    return 0.7 * tone + 0.2 * rng.standard_normal(tone.shape, np.float32) if timbre == "noisy" else tone


def _beeps(count: str, time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(S,) the envelope, 0 to 1: `count` beeps with even onsets, each filling most of its share of the clip."""
    slot = SECONDS / (COUNTS.index(count) + 1)
    length = slot * rng.uniform(0.55, 0.7)
    start = (slot - length) * rng.uniform(0.2, 0.8)
    inside = time % slot - start
    return np.clip(np.minimum(inside, length - inside) / RAMP, 0, 1)
