"""Readers of YOLO, COCO, IDX and class folders, recognising a layout, and the report; VOC: test_data.py, damage: test_damaged_files.py."""
import gzip
import json
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from conftest import real
from tinydet import data, records, report
from tinydet.data import DefectWarning

LAYOUTS = ("voc", "yolo", "coco", "idx", "folders")


def picture(path, W=40, H=30, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)).save(path, **options)


def put(folder, **texts):
    """Write text files; __ in a name stands for /, the last _ for the point."""
    for name, text in texts.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def idx_bytes(a, magic=None, shape=None):
    return gzip.compress(struct.pack(f">{a.ndim + 1}I", magic or 0x0800 + a.ndim, *(shape or a.shape)) + a.astype(np.uint8).tobytes())


def coco_json(**changes):
    return {"images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
                       {"id": 5, "file_name": "b.jpg", "width": 40, "height": 30}],
            "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 8, 17], "area": 99, "iscrowd": 0},
                            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [20, 10, 5.5, 6.25], "area": 9, "iscrowd": 1}]} | changes


def write(folder, layout):
    """A small whole data set, split "train": images a and b, a with a cat (2, 3, 10, 20) and a dog (20, 10, 25.5, 16.25) if it has
    boxes."""
    if layout == "voc":
        put(folder, ImageSets__Main__train_txt="a\nb\n", Annotations__b_xml="<annotation/>", Annotations__a_xml=(
            "<annotation><size><width>40</width><height>30</height></size><object><name>cat</name><difficult>0</difficult><bndbox>"
            "<xmin>3</xmin><ymin>4</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object><object><name>dog</name><bndbox>"
            "<xmin>21</xmin><ymin>11</ymin><xmax>25.5</xmax><ymax>16.25</ymax></bndbox></object></annotation>"))
    if layout == "yolo":
        put(folder, classes_txt="cat\ndog\n", sets__train_txt="a\nb\n", labels__a_txt=(
            "0 0.15 0.38333333333333336 0.2 0.5666666666666667\n1 0.56875 0.4375 0.1375 0.20833333333333334\n"), labels__b_txt="")
    if layout == "coco":
        put(folder, annotations__instances_train_json=json.dumps(coco_json()))
    if layout == "idx":
        pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4))
        (folder / "train-images-idx3-ubyte.gz").write_bytes(idx_bytes(pixels))
        (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.array([3, 0, 9, 3, 1])))
        return folder
    places = {"voc": "JPEGImages/{}.jpg", "yolo": "images/{}.jpg", "coco": "train/{}.jpg", "folders": "train/{}.jpg"}[layout]
    for seed, name in enumerate(("cat/a", "dog/b") if layout == "folders" else "ab"):
        picture(folder / places.format(name), seed=seed)
    return folder


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


# One entry point

@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_recognises_the_layout(tmp_path, layout):
    write(tmp_path, layout)
    assert data.splits(tmp_path) == ["train"]
    for split in ("train", "all"):
        examples, classes = data.read(tmp_path, split)
        explicit, same = getattr(data, f"read_{layout}")(tmp_path, split)
        assert classes == same and [e.name for e in examples] == [e.name for e in explicit]
        for e in examples:
            assert e.boxes.dtype == np.float64 and e.labels.dtype == e.image_labels().dtype == np.int64 and e.difficult.dtype == bool
            assert e.image().shape == (e.size[1], e.size[0], 3) and e.image().dtype == np.uint8
    if layout == "idx":
        assert classes == tuple("0123456789") and [e.image_labels().tolist() for e in examples] == [[3], [0], [9], [3], [1]]
        return
    assert classes == ("dog", "cat") if layout == "coco" else classes == ("cat", "dog")     # by category id, else by name or line
    a, b = examples
    assert (a.size, b.size) == ((40, 30), (40, 30))
    if layout == "folders":
        assert [e.tags.tolist() for e in examples] == [[0], [1]] and a.boxes.shape == (0, 4)
        return
    assert_allclose(a.boxes, [[2, 3, 10, 20], [20, 10, 25.5, 16.25]], atol=1e-12)
    assert [classes[k] for k in a.labels] == ["cat", "dog"] and b.boxes.shape == (0, 4)
    assert a.difficult.tolist() == [False, layout == "coco"]        # a crowd
    assert a.image_labels().tolist() == [0, 1] and b.image_labels().tolist() == [] and a.tags is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_classes_are_the_order_of_labels(tmp_path, layout):
    write(tmp_path, layout)
    if layout == "idx":
        examples, classes = data.read(tmp_path, "train", list("zyxwvutsrq"))
        assert classes == tuple("zyxwvutsrq") and examples[0].tags.tolist() == [3]      # the file has no names: these are they
        return
    examples, classes = data.read(tmp_path, "train", ["bird", "dog", "cat"])
    assert classes == ("bird", "dog", "cat")
    assert [classes[k] for e in examples for k in (e.tags if layout == "folders" else e.labels)] == ["cat", "dog"]
    with pytest.raises(ValueError, match=rf"^data\.read_{layout}: .* must be one of bird, cat, got dog"):
        data.read(tmp_path, "train", ["bird", "cat"])
    for wrong in ("cat", ["cat", "cat"], [""], [1]):
        with pytest.raises(ValueError, match=rf"^data\.read_{layout}: classes must be distinct names, got "):
            data.read(tmp_path, "train", wrong)


def test_a_folder_of_no_layout_or_two_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data\.read: there is no folder .*nowhere$"):
        data.read(tmp_path / "nowhere", "train")
    looked = r"Annotations/ \(VOC\); labels/ beside images/.*\(YOLO\); annotations/\*\.json.*\(COCO\); "
    looked += r"\*-images-idx3-ubyte\.gz \(IDX\); <class>/"
    for call in (data.splits, lambda folder: data.read(folder, "train")):
        with pytest.raises(ValueError, match=rf"^data\.read: .* must hold one layout of {looked}.*\. Got none$"):
            call(tmp_path)
    write(write(tmp_path, "voc"), "yolo")
    with pytest.raises(ValueError, match=rf"^data\.read: .* must hold one layout of {looked}.*\. Got VOC and YOLO; call read_voc"):
        data.read(tmp_path, "train")
    assert len(data.read_voc(tmp_path, "train")[0]) == len(data.read_yolo(tmp_path, "train")[0]) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["test", "", "../x", "a/b", "/", "x" * 5000])
def test_a_split_that_is_not_there_is_told(tmp_path, layout, split):
    with pytest.raises((FileNotFoundError, ValueError), match=r"^data\.read_(voc|yolo|coco|idx|folders|split): ") as caught:
        data.read(write(tmp_path, layout), split)
    assert split != "test" or "splits here: train (and \"all\"" in str(caught.value) or "image sets here: train" in str(caught.value)


def test_defects_are_told_once_with_their_places(tmp_path):
    write(tmp_path, "yolo")
    put(tmp_path, labels__a_txt=lines("0 .5 .5 .2 .2", "0 .5 .5 .2 .2", "1 .5 .5 .2 .2", "1 .5 .5 0 .2"))
    for reader, call in (("read", data.read), ("read_yolo", data.read_yolo)):
        with pytest.warns(DefectWarning) as caught:
            (a, b), _ = call(tmp_path, "train")
        assert [str(w.message) for w in caught] == [f"data.{reader}: {tmp_path}, train: 1 degenerate boxes dropped (first in "
                                                    "a.txt, line 4); 1 repeated boxes dropped (first in a.txt, line 2)"]
        assert caught[0].filename == __file__
        assert caught[0].message.found == {"degenerate boxes dropped": ["a.txt, line 4"], "repeated boxes dropped": ["a.txt, line 2"]}
        assert a.labels.tolist() == [0, 1]


def test_an_example_without_tags_is_made_as_before():
    e = records.Example("x", np.zeros((3, 4, 3), np.uint8), (4, 3), np.zeros((3, 4)), np.array([2, 0, 2]), np.array([False, True, False]))
    assert e.image_labels().tolist() == [0, 2] and e.tags is None
    grey = records.Example("x", np.arange(12, dtype=np.uint8).reshape(3, 4), (4, 3), None, None, None, np.array([5]))
    assert_array_equal(grey.image(), np.stack([np.arange(12).reshape(3, 4)] * 3, 2).astype(np.uint8), strict=True)
    assert grey.image_labels().tolist() == [5]


# YOLO

@pytest.mark.parametrize("files", [
    {"sets/train.txt": "b\na\n", "sets/val.txt": "c\n"},
    {"train.txt": "images/b.jpg\n./images/a.jpg\n", "val.txt": "images/c.jpg"},
    {"train.txt": "b.jpg\r\n\r\na.jpg\r\n", "val.txt": "c.jpg", "notes.txt": "no list"},
    {"sets/train.txt": "b\ra\r", "sets/val.txt": "c"},
    {"sets/train.txt": "\ufeffb\n a \n", "sets/val.txt": "c", "train.txt": "not used where sets/ is"},
])
def test_yolo_split_lists(tmp_path, files):
    for i, name in enumerate("abc"):
        picture(tmp_path / "images" / f"{name}.jpg", seed=i)
        put(tmp_path, **{f"labels__{name}_txt": "0 .5 .5 .5 .5"})
    for name, text in files.items():
        put(tmp_path, **{name.replace("/", "__").replace(".", "_"): text})
    put(tmp_path, classes_txt="thing")
    assert data.splits(tmp_path) == ["train", "val"]
    assert [e.name for e in data.read(tmp_path, "train")[0]] == ["b", "a"]
    assert [e.name for e in data.read(tmp_path, "val")[0]] == ["c"]
    assert [e.name for e in data.read(tmp_path, "all")[0]] == ["a", "b", "c"]
    assert_array_equal(data.read(tmp_path, "val")[0][0].boxes, [[10, 7.5, 30, 22.5]])


@pytest.mark.parametrize("image, label", [("images/{}/{}.jpg", "labels/{}/{}.txt"), ("{}/images/{}.jpg", "{}/labels/{}.txt")])
def test_yolo_split_folders(tmp_path, image, label):
    for split, name in (("train", "b"), ("train", "a"), ("val", "a")):
        picture(tmp_path / image.format(split, name))
        (tmp_path / label.format(split, name)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / label.format(split, name)).write_text("0 .5 .5 .5 .5")
    put(tmp_path, obj_names="thing\n\n")
    assert data.splits(tmp_path) == ["train", "val"]
    assert [e.name for e in data.read(tmp_path, "train")[0]] == ["train/a", "train/b"]
    assert [e.name for e in data.read(tmp_path, "val")[0]] == ["val/a"]
    assert [e.name for e in data.read(tmp_path, "all")[0]] == ["train/a", "train/b", "val/a"]
    put(tmp_path, train_txt=f"./{image.format('val', 'a')}\n")      # a list names images of any folder
    assert data.splits(tmp_path) == ["train"]
    assert [e.name for e in data.read(tmp_path, "train")[0]] == ["val/a"]


def test_yolo_folders_within_a_split_are_read(tmp_path):
    for name in ("train/s1/b", "train/a", "train/s1/deep/b", "train/.hidden/x"):
        picture(tmp_path / "images" / f"{name}.jpg")
        (tmp_path / "labels" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / f"{name}.txt").write_text("0 .5 .5 .5 .5")
    put(tmp_path, classes_txt="thing")
    assert data.splits(tmp_path) == ["train"]
    for split in ("train", "all"):
        examples, _ = data.read(tmp_path, split)
        assert [e.name for e in examples] == ["train/a", "train/s1/b", "train/s1/deep/b"] and all(len(e.boxes) == 1 for e in examples)
    put(tmp_path, train_txt="images/train/s1/b.jpg\n")
    assert [e.name for e in data.read(tmp_path, "train")[0]] == ["train/s1/b"]


@pytest.mark.parametrize("orphan", ["a.txt", "trian/a.txt", "train/b.txt", "train/s1/a.txt", "val/a.txt"])
def test_yolo_label_files_without_image_in_split_folders(tmp_path, orphan):
    picture(tmp_path / "images" / "train" / "a.jpg")
    (tmp_path / "labels" / orphan).parent.mkdir(parents=True)
    (tmp_path / "labels" / orphan).write_text("0 .5 .5 .5 .5")
    put(tmp_path, classes_txt="thing")
    for split in ("train", "all"):
        with pytest.raises(FileNotFoundError, match=rf"^data\.read_yolo: .*{orphan} must belong to an image, but there is no "):
            data.read(tmp_path, split)


def test_yolo_class_names(tmp_path):
    write(tmp_path, "yolo")
    (tmp_path / "classes.txt").rename(tmp_path / "labels" / "classes.txt")      # as labelImg writes it
    assert data.read(tmp_path, "all")[1] == ("cat", "dog")
    (tmp_path / "labels" / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"^data\.read_yolo: there is no .*classes\.txt \(or labels/classes\.txt, or \*\.names\)"):
        data.read(tmp_path, "train")
    examples, classes = data.read(tmp_path, "train", ["x", "y"])    # then these are the names
    assert classes == ("x", "y") and examples[0].labels.tolist() == [0, 1]
    put(tmp_path, classes_txt="cat\ndog", coco_names="cat\ndog")
    with pytest.raises(ValueError, match=r"must hold one file of class names, got classes\.txt, coco\.names$"):
        data.read(tmp_path, "train")


def test_yolo_images_without_labels_are_counted_and_boxes_are_cut(tmp_path):
    write(tmp_path, "yolo")
    (tmp_path / "labels" / "b.txt").unlink()
    put(tmp_path, labels__a_txt=lines("0 .025 .5 .1 .5", "0 1.005 .5 1.005 1.0001", "1 .05 .5 .14 .5", "1 1 1 .5 .5", "0 1 .5 0 .5",
                                          "0 .05 .5 .2 .5"))
    with pytest.warns(DefectWarning) as caught:
        (a, b), _ = data.read(tmp_path, "train")
    assert_allclose(a.boxes, [[0, 7.5, 3, 22.5], [20.1, 0, 40, 30], [0, 7.5, 4.8, 22.5], [30, 22.5, 40, 30], [0, 7.5, 6, 22.5]], atol=1e-12)
    assert caught[0].message.found == {                             # the first and third leave the image by at most a pixel
        "images without a label file, taken as images without objects": ["b"], "degenerate boxes dropped": ["a.txt, line 5"],
        "boxes cut at the border of the image": ["a.txt, line 2", "a.txt, line 4", "a.txt, line 6"]}
    assert b.boxes.shape == (0, 4)


# COCO

@pytest.mark.parametrize("where, image", [
    ("annotations/instances_train2017.json", "train2017/a.jpg"), ("annotations/train2017.json", "images/train2017/a.jpg"),
    ("annotations/train2017.json", "images/a.jpg"), ("instances_train2017.json", "a.jpg"),
    ("train2017/_annotations.coco.json", "train2017/a.jpg")])
def test_coco_layouts(tmp_path, where, image):
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    value = coco_json()
    (tmp_path / where).write_text(json.dumps(value | {"images": value["images"][:1]}))
    put(tmp_path, annotations__captions_train2017_json="{}") if where.startswith("annotations") else put(tmp_path, package_json="{}")
    picture(tmp_path / image)
    assert data.splits(tmp_path) == ["train2017"]
    (a,), classes = data.read(tmp_path, "train2017")
    assert a.name == "a" and classes == ("dog", "cat") and a.labels.tolist() == [1, 0] and a.difficult.tolist() == [False, True]


def test_coco_beside_its_images_is_train(tmp_path):
    value = coco_json()
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(value | {"images": value["images"][:1]}))
    picture(tmp_path / "a.jpg")
    assert data.splits(tmp_path) == ["train"] and len(data.read(tmp_path, "train")[0]) == 1


def test_coco_all_needs_no_name_twice_and_classes_of_all_splits(tmp_path):
    write(tmp_path, "coco")
    second = coco_json(images=[{"id": 1, "file_name": "c.jpg", "width": 9, "height": 8}], annotations=[],
                       categories=[{"id": 1, "name": "dog"}, {"id": 4, "name": "eel"}])
    put(tmp_path, annotations__instances_val_json=json.dumps(second))
    picture(tmp_path / "val" / "c.jpg", 9, 8)
    examples, classes = data.read(tmp_path, "all")
    assert classes == ("dog", "cat", "eel") and [e.name for e in examples] == ["a", "b", "c"]
    assert data.read(tmp_path, "val")[1] == ("dog", "eel")


def test_coco_boxes_are_cut_as_by_yolo(tmp_path):
    write(tmp_path, "coco")
    boxes = [[-0.9, 3, 5, 5], [36, 3, 4.9, 5], [-1.1, 3, 9, 9], [50, 3, 5, 5], [3, 3, 0, 5], [3, 3, -2, 5]]
    put(tmp_path, annotations__instances_train_json=json.dumps(coco_json(annotations=[
        {"id": i, "image_id": 5, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)])))
    with pytest.warns(DefectWarning) as caught:
        (_, b), _ = data.read(tmp_path, "train")
    assert_allclose(b.boxes, [[0, 3, 4.1, 8], [36, 3, 40, 8], [0, 3, 7.9, 12]])
    place = "instances_train.json, annotation "
    assert caught[0].message.found == {"boxes cut at the border of the image": [place + "2"],
                                       "boxes outside the image dropped": [place + "3"],
                                       "degenerate boxes dropped": [place + "4", place + "5"]}


# IDX

def test_idx_is_lazy_and_t10k_is_the_test_set(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (300, 6, 4), np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(pixels))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.arange(300) % 12))
    assert data.splits(tmp_path) == ["test"]
    for split in ("test", "t10k", "all"):
        examples, classes = data.read(tmp_path, split)
        assert classes == tuple(map(str, range(12))) and len(examples) == 300
    assert_array_equal(examples[299].image(), np.repeat(pixels[299][..., None], 3, 2), strict=True)
    assert examples[0].size == (4, 6) and examples[13].tags.tolist() == [1]
    assert examples[0].source.base is not None                      # a view: nothing was copied or tripled
    put(tmp_path, classes_txt=lines(*"abcdefghijkl"))
    assert data.read(tmp_path, "test")[1] == tuple("abcdefghijkl")


# Class folders

def test_class_folders_without_splits(tmp_path):
    for name in ("dog/b", "cat/c", "cat/a"):
        picture(tmp_path / f"{name}.png")
    put(tmp_path, README_md="text", cat__Thumbs_db="x")
    assert data.splits(tmp_path) == []
    with pytest.warns(DefectWarning, match=r"1 files that are no images passed over \(first in cat/Thumbs\.db\)"):
        examples, classes = data.read(tmp_path, "all")
    assert classes == ("cat", "dog") and [(e.name, e.tags.tolist()) for e in examples] == [("cat/a", [0]), ("cat/c", [0]), ("dog/b", [1])]


@pytest.mark.parametrize("image, other", [
    ("images/a.jpg", "annotations.json"), ("images/a.jpg", "annotations/a.xml"), ("images/train/a.jpg", "labels.json"),
    ("obj_train_data/a.jpg", "obj_train_data/a.txt"), ("obj_train_data/a.jpg", "obj.names"), ("JPEGImages/a.jpg", "x.md"),
    ("data/a.jpg", "x.md"), ("train/a.jpg", "train/a.xml"), ("pictures/a.jpg", "pictures/boxes.json"),
    ("train/Images/a.jpg", "train/Labels/a.md"), ("cat/a.jpg", "annotations/a.md")])
def test_images_with_annotations_are_no_class_folders(tmp_path, image, other):
    picture(tmp_path / image)
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).write_text("{}")
    for call in (lambda: data.read(tmp_path, "all"), lambda: data.splits(tmp_path)):
        with pytest.raises(ValueError, match=r"^data\.read: .* no annotations \(\.json, \.txt, \.xml\) among them .*\. Got none$"):
            call()
    with pytest.raises(FileNotFoundError, match=r"^data\.read_folders: a folder must hold <class>/.* no annotations"):
        data.read_folders(tmp_path, "all")


def test_class_folders_of_all_splits_give_the_classes(tmp_path):
    for name in ("train/dog/b", "train/cat/c", "val/eel/a", ".hidden/x/a"):
        picture(tmp_path / f"{name}.jpg")
    assert data.splits(tmp_path) == ["train", "val"]
    examples, classes = data.read(tmp_path, "val")
    assert classes == ("cat", "dog", "eel") and [e.tags.tolist() for e in examples] == [[2]] and examples[0].name == "val/eel/a"
    assert len(data.read(tmp_path, "all")[0]) == 3


# The report

def run(*command, **options):
    command = [sys.executable, "-m", "tinydet.data", *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_of_every_layout(tmp_path, capsys, layout):
    folder = tmp_path / "set"
    folder.mkdir()
    assert report.main([str(write(folder, layout)), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert list(found["sets"]) == ["train"] and f"{found['layout']}; splits train;" in told
    s, classes = found["sets"]["train"], found["classes"]
    examples, _ = data.read(folder, "train")
    pixels = np.concatenate([e.image().reshape(-1, 3) for e in examples]) / 255
    assert_allclose([s["mean"], s["std"]], [pixels.mean(0), pixels.std(0)], atol=6e-5)
    if layout in ("idx", "folders"):
        assert {c: r["images"] for c, r in s["classes"].items() if r["images"]} == (
            {"0": 1, "1": 1, "3": 2, "9": 1} if layout == "idx" else {"cat": 1, "dog": 1})
        assert "boxes" not in s
    else:
        assert (s["images"], s["boxes"], s["empty"], s["images_of_several_classes"], set(classes)) == (2, 2, 1, 1, {"cat", "dog"})
        assert s["classes"]["cat"] == {"images": 1, "boxes": 1, "width": report.spread([8.0]), "height": report.spread([17.0]),
                                       "aspect": report.spread([8 / 17]), "area": {"small": 1, "medium": 0, "large": 0}}
        assert s["boxes_an_image"] == {"min": 0, "5%": 0.1, "median": 1, "mean": 1, "95%": 1.9, "max": 2}
        assert s["sizes"] == {"40x30": 2} and s["difficult"] == (layout == "coco")
        assert "train: 2 images, 2 boxes" in told and "defects: none" in told
    with Image.open(tmp_path / "out" / "train.png") as sheet:
        sheet.load()
        assert sheet.width == 4 * 326 + 6 and sheet.height > 240


def of_boxes(*sides, label=0):
    boxes = np.array([[0, 0, w, h] for w, h in sides], float).reshape(-1, 4)
    none = np.zeros(len(sides), bool)
    return records.Example("e", np.zeros((100, 100, 3), np.uint8), (100, 100), boxes, np.full(len(sides), label), none)


def test_sizes_end_where_coco_ends_them():
    s = report.describe([of_boxes((31, 33), (32, 32), (95, 97), (96, 96)), of_boxes()], ("a",), {})
    assert s["area"] == {"small": 1, "medium": 2, "large": 1} and s["aspect"]["min"] == round(31 / 33, 4) and s["empty"] == 1
    assert report.describe([], ("a",), {})["classes"]["a"]["width"] is None


def test_the_sheet_shows_every_class_and_no_image_twice(monkeypatch):
    shown, boxes = [], report.draw.boxes

    def drawn(image, b, labels, *rest, **more):
        shown.append(labels)
        return boxes(image, b, labels, *rest, **more)

    monkeypatch.setattr(report.draw, "boxes", drawn)
    for seed in range(5):
        shown.clear()
        report.sheet([of_boxes((9, 9), label=label) for label in [0] * 97 + [1, 2, 3]], tuple("abcd"), seed)
        assert sorted({k for labels in shown for k in labels.tolist()}) == [0, 1, 2, 3] and len({id(s) for s in shown}) == len(shown) == 12


def test_the_report_finds_images_that_occur_twice(tmp_path, capsys):
    for i, name in enumerate(("train/x/a", "train/x/b", "val/x/c")):
        picture(tmp_path / f"{name}.png", seed=i)
    picture(tmp_path / "val" / "x" / "d.png", seed=1)
    with Image.open(tmp_path / "train" / "x" / "a.png") as image:
        near = np.asarray(image).copy()
    near[3, 3] ^= 1
    Image.fromarray(near).save(tmp_path / "train" / "x" / "e.png")
    found, _, _ = report.report(tmp_path)
    assert found["identical"] == [{"images": ["train/x/b", "val/x/d"], "sets": ["train", "val"]}] and found["identical_across"] == 1
    assert sorted(sorted(g["images"]) for g in found["near_identical"]) == [["train/x/a", "train/x/e"], ["train/x/b", "val/x/d"]]
    assert found["near_identical_across"] == 1
    assert list(found["sets"]) == ["train", "val", "all"] and found["sets"]["all"]["images"] == 5


def test_the_report_as_a_command(tmp_path):
    folder = write(tmp_path, "yolo")
    put(folder, labels__b_txt=lines(*["0 .5 .5 0 .2"] * 9))
    done = run(folder, "--set", "train", cwd=tmp_path)
    assert done.returncode == 0 and f"sheets of examples: {Path('runs') / ('data-' + tmp_path.name)}" in done.stdout
    places = ", ".join(f"b.txt, line {i}" for i in range(1, 6))
    assert f"defect: 9 degenerate boxes dropped: {places}, and 4 more" in done.stdout
    assert (tmp_path / "runs" / f"data-{tmp_path.name}" / "train.png").is_file()
    content = (folder / "images" / "b.jpg").read_bytes()            # truncated: the header is right
    (folder / "images" / "b.jpg").write_bytes(content[:len(content) // 2] + b"\xff\xd9")
    done = run(folder, "--json", tmp_path / "r.json", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: 1 images do not decode, first: data.read_image: ")
    assert "b.jpg must be a readable image" in done.stderr and len(json.loads((tmp_path / "r.json").read_text())["unreadable"]) == 1
    for wrong, message in ((["nowhere"], "data.read: there is no folder nowhere"),
                           ([folder, "--set", "x"], "data.read_yolo: there is no split x")):
        done = run(*wrong, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {message}") and not done.stdout
        assert "Traceback" not in done.stderr


# Real data: TINYDET_DATA names the folder that holds the data sets

def test_the_report_of_the_apples_is_their_readme():
    found, _, _ = report.report(real("apple-orchard"))
    assert found["layout"] == "YOLO" and found["classes"] == ["apple"] and found["splits"] == ["test", "train", "val"]
    for split, images, boxes, least, median, mean, most, empty in (
            ("train", 149, 1223, 1, 7, 8.2, 30, 0), ("val", 43, 319, 1, 6, 7.4, 26, 0), ("test", 52, 448, 0, 8, 8.6, 25, 1)):
        s = found["sets"][split]
        assert (s["images"], s["boxes"], s["empty"], s["defects"]) == (images, boxes, empty, {})
        each = s["boxes_an_image"]
        assert (each["min"], each["median"], round(each["mean"], 1), each["max"]) == (least, median, mean, most)
    s = found["sets"]["all"]
    assert s["area"] == {"small": 1258, "medium": 732, "large": 0} and s["sizes"] == {"320x320": 244}
    edges = [[round(s[k][q]) for q in ("5%", "median", "95%")] for k in ("width", "height")]
    assert_allclose(edges, [[14, 30, 44], [13, 30, 44]], atol=1.2)      # as read off whole pixels there
    assert_allclose(found["sets"]["train"]["mean"] + found["sets"]["train"]["std"], [.5623, .6098, .4536, .2331, .2340, .3169], atol=1.1e-4)


def test_the_report_of_the_cards_is_their_readme():
    found, _, _ = report.report(real("playing-cards"))
    train, test, s = (found["sets"][k] for k in ("train", "test", "all"))
    counts = [{c: (r["boxes"], r["images"]) for c, r in part["classes"].items()} for part in (train, test)]
    assert counts[0] == {"nine": (89, 79), "ten": (82, 76), "jack": (89, 77), "queen": (80, 72), "king": (95, 84), "ace": (92, 82)}
    assert counts[1] == {"nine": (26, 19), "ten": (18, 15), "jack": (24, 17), "queen": (26, 20), "king": (23, 20), "ace": (26, 20)}
    assert (train["images_of_several_classes"], test["images_of_several_classes"]) == (111, 25)
    assert s["area"] == {"small": 0, "medium": 425, "large": 245} and s["sizes"] == {"240x320": 311, "320x180": 52}
    assert (s["boxes_an_image"]["median"], round(s["boxes_an_image"]["mean"], 2), s["boxes_an_image"]["max"]) == (1, 1.85, 5)
    edges = [[round(s[k][q]) for q in ("5%", "median", "95%")] for k in ("width", "height")]
    assert edges == [[49, 78, 132], [62, 97, 165]] and all(not part["defects"] for part in found["sets"].values())
    assert_allclose(train["mean"] + train["std"], [.4592, .4012, .3425, .2625, .2626, .2679], atol=1.1e-4)
    assert (len(found["near_identical"]), found["near_identical_across"], found["identical"]) == (6, 0, [])


def test_the_report_of_the_blood_cells_is_their_readme():
    found, _, _ = report.report(real("bccd"))
    for split, images, RBC, WBC, platelets, without_area in (
            ("train", 205, (2382, 197), (214, 204), (209, 117), 1), ("val", 87, (968, 83), (87, 86), (83, 45), 1),
            ("test", 72, (805, 69), (71, 68), (69, 39), 0), ("all", 364, (4155, 349), (372, 358), (361, 201), 2)):
        s = found["sets"][split]
        c = {k: (r["boxes"] + without_area * (k == "RBC"), r["images"]) for k, r in s["classes"].items()}       # README has them
        assert c == {"RBC": RBC, "WBC": WBC, "Platelets": platelets} and s["images"] == images and s["difficult"] == 0
        assert sum(d["count"] for d in s["defects"].values()) == without_area
    assert found["sets"]["all"]["defects"]["degenerate boxes dropped"]["first"] == ["BloodImage_00338", "BloodImage_00343"]
    each, train = found["sets"]["all"]["boxes_an_image"], found["sets"]["train"]
    assert (each["min"], round(each["median"]), round(each["mean"], 1), each["max"]) == (1, 14, 13.4, 30)
    assert_allclose(train["mean"] + train["std"], [.7373, .6962, .7148, .0607, .1020, .0757], atol=1.1e-4)
    wbc = found["sets"]["all"]["classes"]["WBC"]["width"]           # the table of sizes there leaves out VOC's last pixel
    assert_allclose([wbc[k] - 1 for k in ("5%", "median", "95%")], [122, 201, 258], atol=0.6)
    assert found["near_identical"] == [] == found["identical"]


def test_fashion_mnist_is_its_readme_and_read_fast():
    folder, start = real("fashion-mnist"), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (train, classes), (test, _) = data.read(folder, "train"), data.read(folder, "test")
    assert time.perf_counter() - start < 20                         # about 1 s
    assert data.splits(folder) == ["test", "train"] and classes == tuple("0123456789")
    for examples, each in ((train, 6000), (test, 1000)):
        assert np.bincount([e.tags[0] for e in examples]).tolist() == [each] * 10
    pixels = np.stack([e.source for e in train]) / np.float32(255)
    assert_allclose([pixels.mean(dtype=float), pixels.std(dtype=float)], [.2860, .3530], atol=5e-5)
    assert train[0].image().shape == (28, 28, 3) and train[0].tags.tolist() == [9]      # an ankle boot
