"""The report of a data set where something cannot be read: the rest of it is told."""
import json

import numpy as np
import pytest
from PIL import Image

from tinydet import report


@pytest.fixture
def coco(tmp_path):
    """Two COCO splits that share a file name; the classes lie in both."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / split / "1.png")
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}], "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 20], "area": 200, "iscrowd": 0}]}))
    return tmp_path


def test_splits_that_share_a_name_are_reported_one_by_one(coco, capsys):
    assert report.main([str(coco), "--out", str(coco / "out")]) == 0
    out = capsys.readouterr().out
    assert "train: 1 images, 1 boxes" in out and "val: 1 images, 1 boxes" in out and "all:" not in out
    assert {p.name for p in (coco / "out").iterdir()} == {"train.png", "val.png"}


def test_a_split_without_its_images_does_not_hide_the_other(coco, capsys):
    (coco / "train" / "1.png").unlink()
    assert report.main([str(coco), "--set", "val", "--out", str(coco / "out")]) == 0
    assert "val: 1 images" in capsys.readouterr().out
    assert report.main([str(coco), "--out", str(coco / "out"), "--json", str(coco / "r.json")]) == 1
    told = capsys.readouterr()
    assert "val: 1 images" in told.out and "train: cannot be read: data.read_coco: " in told.out
    assert told.err.splitlines()[-1].startswith("error: data.read_coco: ") and "1.png" in told.err
    found = json.loads((coco / "r.json").read_text())
    assert list(found["errors"]) == ["train"] and list(found["sets"]) == ["val"]


def test_nothing_that_can_be_read_is_an_error(coco, capsys):
    for split in ("train", "val"):
        (coco / "annotations" / f"instances_{split}.json").write_text("{")
    assert report.main([str(coco), "--out", str(coco / "out")]) == 1
    assert "must be JSON" in capsys.readouterr().err
