"""Files that the tests of sources read."""

import io

import pytest
from PIL import Image


def png(color=(255, 0, 0)):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """A folder with two images in it, and a secret outside it."""
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "b.png", "images/1.png", "images/2.png"):
        (folder / name).write_bytes(png())
    return folder
