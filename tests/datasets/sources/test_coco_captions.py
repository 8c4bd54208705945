"""COCO captions."""

import json
from pathlib import Path

import pytest

from mm.datasets.sources.coco_captions import COCOCaptions


def dump(path: Path, value):
    path.write_text(json.dumps(value))
    return path


def parts(sample, index=0):
    return [part.get("text", part.get("media")) for part in sample.messages[index]["content"]]


def coco(root):
    (root / "annotations").mkdir()
    images = [{"id": 2, "file_name": "2.png"}, {"id": 1, "file_name": "1.png"}, {"id": 3, "file_name": "1.png"}]
    listed = [{"id": 20 + i, "image_id": image, "caption": f" c{i}.\n"} for i, image in enumerate((1, 2, 1))]
    return dump(root / "annotations" / "captions_images.json", {"images": images, "annotations": listed})


def test_coco_captions(root):
    file = coco(root)
    two, one = COCOCaptions(file)
    assert [sample.meta["image_id"] for sample in (two, one)] == [2, 1]  # image 3 has no caption
    assert one.branches == [[{"role": "assistant", "content": text}] for text in ("c0.", "c2.")]
    assert isinstance(two.media[0].data, Path)
    assert two.media[0].data.resolve() == (root / "images" / "2.png").resolve()
    single = list(COCOCaptions(file, branches=False, prompt="describe it."))
    assert [sample.messages[1]["content"] for sample in single] == ["c1.", "c0.", "c2."]
    assert parts(single[0]) == [0, "describe it."]


def test_coco_captions_bad_input(root):
    file = coco(root)
    (root / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"captions_images\.json: image_id 2: key 'file_name': no file"):
        list(COCOCaptions(file))
    with pytest.raises(ValueError, match="no folder of images"):
        list(COCOCaptions(file, images=root / "nowhere"))
    with pytest.raises(ValueError, match="annotation 0: no image with id 7"):
        list(COCOCaptions(dump(file, {"images": [], "annotations": [{"image_id": 7}]})))
    with pytest.raises(ValueError, match="key 'images' is missing"):
        list(COCOCaptions(dump(file, {"annotations": []})))
