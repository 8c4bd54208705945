"""Sound -> log-mel frames: every 10 ms, the energy of a 25 ms window in 80 bands, on a fixed logarithmic scale.

Shape legend: `C` channels; `S` samples; `N` frames; `F` mel bands.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torchaudio.transforms import MelSpectrogram, Resample

from mm.types import Grid, Tokens, Waveform

_RATES = (1_000, 768_000)  # hertz


class AudioTokenizer:
    """Waveform of any rate and number of channels -> Tokens: values (N, F) float32, grid (N, 1, 1).

    Channels are averaged, then resampled to `rate`. Frame k is centred on sample k * hop, with silence beyond both
    ends, and N = ceil(S / hop) for S resampled samples: one second is exactly 100 frames at the default hop of 10 ms.

    Normalisation is Whisper's (arXiv 2212.04356): log10 of the power in each Slaney mel band, not below 1e-10 nor
    below the clip's maximum - 8 (80 dB), then (x + 4) / 4. Digital silence is -1.5 in every band.

    Sound longer than `max_seconds` raises ValueError: cut it where it is prepared, where the text can be cut too.
    """

    def __init__(
        self,
        rate: int = 16_000,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        mels: int = 80,
        max_seconds: float = 30.0,
    ) -> None:
        if not _RATES[0] <= rate <= _RATES[1]:
            raise ValueError(f"rate={rate}: a sampling rate is {_RATES[0]} to {_RATES[1]} hertz")
        if mels < 1:
            raise ValueError(f"mels={mels}: a frame has at least one band")
        window, hop = round(rate * window_ms / 1000), round(rate * hop_ms / 1000)
        if not 1 <= hop <= window:
            raise ValueError(f"hop_ms={hop_ms}: a hop is at least one sample and at most window_ms={window_ms}")
        if max_seconds <= 0:
            raise ValueError(f"max_seconds={max_seconds}: it must be positive")
        self.rate = rate
        self.window, self.hop = window, hop
        self.max_seconds = max_seconds
        self.dim = mels
        self._mel = _mel_filters(rate, window, hop, mels)
        self._resamplers: dict[int, Resample] = {}

    def measure(self, media: Waveform) -> Grid:
        channels, samples = media.samples.shape
        if channels == 0 or samples == 0:
            raise ValueError("the sound has no samples")
        if not _RATES[0] <= media.rate <= _RATES[1]:
            raise ValueError(f"the sound's rate is {media.rate} Hz: {_RATES[0]} to {_RATES[1]} can be resampled")
        seconds = samples / media.rate
        if seconds > self.max_seconds:
            raise ValueError(f"the sound lasts {seconds:.2f} s, longer than max_seconds={self.max_seconds}: cut it")
        ratio = _ratio(media.rate, self.rate)
        resampled = -(-samples * ratio.denominator // ratio.numerator)
        return (-(-resampled // self.hop), 1, 1)

    def count(self, media: Waveform) -> int:
        return math.prod(self.measure(media))

    def __call__(self, media: Waveform) -> Tokens:
        grid = self.measure(media)
        mono = media.samples.float().mean(dim=0)
        if media.rate != self.rate:
            mono = self._resampler(media.rate)(mono)
        power: Tensor = self._mel(mono)[:, : grid[0]]  # (F, N); the STFT adds a frame when S is a multiple of the hop
        log = power.clamp(min=1e-10).log10()
        log = torch.maximum(log, log.max() - 8.0)
        return Tokens.of_grid(((log + 4.0) / 4.0).T.contiguous(), grid)

    def _resampler(self, rate: int) -> Resample:
        if rate not in self._resamplers:
            ratio = _ratio(rate, self.rate)
            self._resamplers[rate] = Resample(ratio.numerator, ratio.denominator)
        return self._resamplers[rate]


def _ratio(rate: int, target: int) -> Fraction:
    """rate / target in small whole numbers.

    Exact for every rate in use. A rate such as 44,101 Hz would need a filter of gigabytes; its nearest ratio is off by
    less than one part in a million, far below what a mel band resolves.
    """
    return Fraction(rate, target).limit_denominator(1000)


def _mel_filters(rate: int, window: int, hop: int, mels: int) -> MelSpectrogram:
    with torch.device("cpu"):  # also where a model is being built on another device
        mel = MelSpectrogram(
            sample_rate=rate,
            n_fft=window,
            hop_length=hop,
            n_mels=mels,
            norm="slaney",
            mel_scale="slaney",
            pad_mode="constant",  # reflection cannot fill the window of a very short sound
        )
    empty = int((mel.mel_scale.get_buffer("fb").sum(dim=0) == 0).sum())
    if empty:
        raise ValueError(f"mels={mels}: {empty} bands are narrower than window_ms={1000 * window / rate:g} resolves")
    return mel
