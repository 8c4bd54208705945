"""Rows of parquet files by their place, and the media that are embedded in them.

Records of a source must be small, and rows with images are not: so a record is a row's place, and the process that
makes the sample reads the row. Neighbours are read one after another, a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.datasets.source import SUFFIXES, media_file
from mm.types import Kind, Media

BATCH = 16  # rows that are decoded at a time
SIGNATURES: dict[Kind, tuple[tuple[int, bytes, str], ...]] = {  # (offset, bytes, suffix)
    "image": (
        (0, b"\x89PNG", ".png"),
        (0, b"\xff\xd8\xff", ".jpg"),
        (0, b"GIF8", ".gif"),
        (8, b"WEBP", ".webp"),
        (0, b"BM", ".bmp"),
        (0, b"II*\0", ".tif"),
        (0, b"MM\0*", ".tif"),
    ),
    "audio": (
        (8, b"WAVE", ".wav"),
        (0, b"fLaC", ".flac"),
        (0, b"OggS", ".ogg"),
        (0, b"ID3", ".mp3"),
        (0, b"\xff\xfb", ".mp3"),
        (0, b"\xff\xf3", ".mp3"),
        (0, b"\xff\xf2", ".mp3"),
        (0, b"\xff\xf1", ".aac"),
        (4, b"ftyp", ".m4a"),
    ),
    "video": ((4, b"ftyp", ".mp4"), (0, b"\x1aE\xdf\xa3", ".mkv"), (8, b"AVI ", ".avi")),
}


class Row(NamedTuple):
    path: Path
    group: int
    number: int  # in its group
    total: int  # in the file: for messages

    @property
    def where(self) -> str:
        return f"{self.path}: row {self.total}"


class Rows:
    """The rows of parquet files. `read` goes on from the last row that it read where it can. Pickles small."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._place: tuple[Path, int] | None = None
        self._batches: Iterator[Any] = iter(())
        self._rows: list[dict[str, Any]] = []
        self._first = 0  # number in the group of the first of `_rows`

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])

    def schema(self, path: Path) -> Any:
        """The pyarrow schema of a file. Raises ValueError naming a file that is not parquet."""
        return _open(path).schema_arrow

    def __iter__(self) -> Iterator[Row]:
        for path in self.files:
            metadata = _open(path).metadata
            total = 0
            for group in range(metadata.num_row_groups):
                for number in range(metadata.row_group(group).num_rows):
                    yield Row(path, group, number, total)
                    total += 1

    def read(self, row: Row) -> dict[str, Any]:
        """The row's values by column. Raises ValueError naming a file that is damaged."""
        from pyarrow import ArrowException

        if self._place != (row.path, row.group) or row.number < self._first:
            self._place, self._rows, self._first = (row.path, row.group), [], 0
            self._batches = _open(row.path).iter_batches(BATCH, row_groups=[row.group])
        while row.number >= self._first + len(self._rows):
            self._first += len(self._rows)
            try:
                self._rows = next(self._batches).to_pylist()
            except (ArrowException, OSError, StopIteration) as error:
                self._place = None
                raise ValueError(f"{row.where}: damaged ({error})") from None
        return self._rows[row.number - self._first]


def embedded(value: Any, kind: Kind, root: Path | None, name: str, where: str) -> Media:
    """A medium in a cell: bytes, or {"bytes", "path"} as Hugging Face's `datasets` writes it. A path is taken
    below `root`, and not at all without one.

    Raises ValueError, beginning with `where`, for a cell with neither, and for bytes of no known format.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path") and root is not None:
        return media_file(root, value["path"], where, kind)
    if not isinstance(data, bytes) or not data:
        raise ValueError(f"{where}: expected {kind} bytes, got {value!r:.60}")
    suffix = next((end for at, start, end in SIGNATURES[kind] if data.startswith(start, at)), None)
    given = Path(value["path"]).suffix.lower() if isinstance(value, dict) and value.get("path") else ""
    if suffix is None and SUFFIXES.get(given) == kind:
        suffix = given
    if suffix is None:
        raise ValueError(f"{where}: not {kind} of a known format (it begins with {data[:8]!r})")
    return Media(kind, data, name + suffix)


def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: parquet needs the package pyarrow: pip install 'mm[parquet]'") from None
    try:
        return ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None
