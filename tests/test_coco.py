"""JSON files of annotations and detections: what is read, and one clear error for each kind of damage."""
import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from tinydet.coco import annotations, named_results, results

GT = {
    "info": {"year": 2026}, "licenses": None,
    "images": [{"id": 7, "file_name": "b ü.jpg", "width": 640, "height": 480},
               {"id": -2, "file_name": "a.jpg", "width": 1, "height": 10**6}],
    "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat", "supercategory": "animal"}],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 3, "bbox": [1, 2.5, 3, 4], "area": 10.5, "iscrowd": 0, "segmentation": [[1]]},
        {"id": 5, "image_id": -2, "category_id": 9, "bbox": [-1, 0, 3, 4], "iscrowd": 1},
        {"id": 2**63 - 1, "image_id": 7, "category_id": 9, "bbox": [0, 0, -3, 0], "area": 0, "iscrowd": True},
        {"id": -9, "image_id": 7, "category_id": 9, "bbox": [0, 0, 1e12, 1], "area": -1}]}
DT = [{"image_id": -2, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.1},
      {"image_id": 7, "category_id": 3, "bbox": [0, 0, 0, -1], "score": -7},
      {"image_id": 7, "category_id": 3, "bbox": [0.5, 0, 1, 1], "score": 1e300, "id": "x", "segmentation": None}]
NAMED = [{"image": "b", "class": "dog", "box": [1, 2, 3, 4], "score": 0.1},
         {"image": "a", "class": "cat", "box": [0, 0, 9.5, 8], "score": 2},
         {"image": "b", "class": "cat", "box": [5, 5, 6, 6], "score": 0.3, "more": None}]


def write(folder, value, name="file.json"):
    path = folder / name
    path.write_bytes(value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode())
    return path


# What is read

def test_annotations(tmp_path):
    a = annotations(write(tmp_path, GT))
    assert a.images == [(7, "b ü.jpg", 640, 480), (-2, "a.jpg", 1, 10**6)]                # in file order
    assert a.categories == [(3, "cat"), (9, "dog")]                                      # by id
    for found, expected in ((a.id, [0, 5, 2**63 - 1, -9]), (a.image, [0, 1, 0, 0]), (a.category, [0, 1, 1, 1])):
        assert_array_equal(found, np.array(expected, np.int64), strict=True)
    assert_array_equal(a.boxes, np.array([[1, 2.5, 3, 4], [-1, 0, 3, 4], [0, 0, -3, 0], [0, 0, 1e12, 1]]), strict=True)
    assert_array_equal(a.area, np.array([10.5, 12, 0, -1]), strict=True)                 # the second has none: w * h
    assert_array_equal(a.crowd, np.array([False, True, True, False]), strict=True)


def test_results(tmp_path):
    d = results(write(tmp_path, DT, "dt.json"), annotations(write(tmp_path, GT)))
    assert_array_equal(d.image, np.array([1, 0, 0], np.int64), strict=True)
    assert_array_equal(d.category, np.array([1, 0, 0], np.int64), strict=True)
    assert_array_equal(d.boxes, np.array([[1, 2, 3, 4], [0, 0, 0, -1], [0.5, 0, 1, 1]]), strict=True)
    assert_array_equal(d.scores, np.array([0.1, -7, 1e300]), strict=True)


def test_named_results(tmp_path):
    found, places = named_results(write(tmp_path, NAMED), ["a", "none", "b"], ["cat", "dog"])
    assert [[c.tolist() for c in image] for image in found] == [[[[0, 0, 9.5, 8]], [0], [2]], [[], [], []],
                                                                [[[1, 2, 3, 4], [5, 5, 6, 6]], [1, 0], [.1, .3]]]
    assert [p.tolist() for p in places] == [[1], [], [0, 2]] and found[1][0].shape == (0, 4)
    assert named_results(write(tmp_path, []), [], ["cat"]) == ([], [])


def test_empty_lists(tmp_path):
    a = annotations(write(tmp_path, {"images": [], "categories": [], "annotations": []}))
    assert (a.images, a.categories, a.boxes.shape, a.area.shape, a.image.dtype) == ([], [], (0, 4), (0,), np.int64)
    d = results(write(tmp_path, []), a)
    assert (d.boxes.shape, d.scores.shape, d.image.dtype, d.scores.dtype) == ((0, 4), (0,), np.int64, np.float64)


def test_a_byte_order_mark(tmp_path):
    assert annotations(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GT).encode())).images[0][0] == 7


def test_evaluation_needs_no_names_and_sizes(tmp_path):
    value = copy.deepcopy(GT)
    del value["images"][0]["file_name"], value["images"][1]["width"], value["categories"][0]["name"]
    path = write(tmp_path, value)
    with pytest.raises(ValueError, match=r"file\.json: images\[0\]: file_name must be a name, got none"):
        annotations(path)
    a = annotations(path, complete=False)
    assert a.images == [(7, None, 640, 480), (-2, "a.jpg", None, 10**6)] and a.categories == [(3, "cat"), (9, None)]
    value["images"][0]["width"], value["images"][0]["file_name"], value["categories"][1]["name"] = 0, 3, None          # nobody looks
    assert annotations(write(tmp_path, value), complete=False).images[0] == (7, 3, 0, 480)


def test_whole_numbers_written_as_floats_are_ids(tmp_path):
    value = copy.deepcopy(GT)
    for record in (*value["images"], *value["categories"], *value["annotations"]):
        record.update({k: float(record[k]) for k in ("id", "image_id", "category_id", "iscrowd") if abs(record.get(k, 2**60)) < 2**53})
    found, expected = annotations(write(tmp_path, value)), annotations(write(tmp_path, GT))
    for field in ("id", "image", "category", "crowd"):
        assert_array_equal(getattr(found, field), getattr(expected, field), strict=True)


# Damage

MISSING = object()


def damaged(value, *path_and_new):
    """A copy of value in which what lies at the path is another, or missing."""
    *path, last, new = path_and_new
    value = copy.deepcopy(value)
    at = value
    for key in path:
        at = at[key]
    if new is MISSING:
        del at[last]
    else:
        at[last] = new
    return value


TEXT = json.dumps(GT)
BAD_TEXT = [
    ("", r"must be JSON, got: Expecting value: line 1 column 1"),
    (TEXT[:-30], r"must be JSON, got: "),                           # cut off
    (TEXT + "]", r"must be JSON, got: Extra data"),
    (b"\xff\xfe" + TEXT.encode("utf-16-le"), r"must be UTF-8 text, got: "),
    (TEXT.encode().replace(b"\\u00fc", b"\xfc"), r"must be UTF-8 text, got: "),
    (b"\x1f\x8b\x08\x00" + bytes(20), r"must be UTF-8 text, got: "),
    (TEXT.replace("2.5", "NaN"), r"must be JSON, got: NaN, which is no number of JSON: line 1 column \d+"),
    ('{"info": "NaN \\" Infinity",\n "x": -Infinity}', r"got: -Infinity, which is no number of JSON: line 2 column 7"),
    ('{"x": [\n\n1, Infinity]}', r"got: Infinity, which is no number of JSON: line 3 column 4"),
    (TEXT.replace('"id": 5', '"id": 5, "iscrowd": 0'), r"must be JSON, got: the key 'iscrowd' twice in one object, \{.*'id': 5"),
    ('{"images": [], "images": []}', r"must be JSON, got: the key 'images' twice in one object"),
    ("[" * 200000, r"must be JSON, got lists or objects nested too deep"),
    ('{"a":' * 200000 + "1" + "}" * 200000, r"must be JSON, got lists or objects nested too deep"),
    ("[1" + "0" * 5000 + "]", r"must be JSON, got: .*digits|the file must hold an object|detections\[0\] must be an object"),
]
BOX = r"bbox must be four finite numbers up to 1e\+12, got "
BAD_GT = [
    ([], r"the file must hold an object, got \[\]"),
    (None, r"the file must hold an object, got None"),
    (7, r"the file must hold an object, got 7"),
    *((damaged(GT, key, MISSING), rf"{key} must be a list, got none") for key in ("images", "annotations", "categories")),
    *((damaged(GT, key, {}), rf"{key} must be a list, got \{{\}}") for key in ("images", "annotations", "categories")),
    *((damaged(GT, key, 1, 3), rf"{key}\[1\] must be an object, got 3") for key in ("images", "annotations", "categories")),
    *((damaged(GT, key, 1, "id", MISSING), rf"{key}\[1\]: id must be an integer of 64 bits, got none")
      for key in ("images", "annotations", "categories")),
    *((damaged(GT, key, 1, "id", GT[key][0]["id"]), rf"{key}\[1\]: id must be given once, got \d as in {key}\[0\]")
      for key in ("images", "annotations", "categories")),
    *((damaged(GT, "images", 0, "id", bad), rf"images\[0\]: id must be an integer of 64 bits, got {told}")
      for bad, told in (("7", "'7'"), (7.5, "7.5"), (True, "True"), (None, "None"), ([7], r"\[7\]"), (2**63, 2**63),
                        (-2**63 - 1, "-9"))),
    *((damaged(GT, "images", 1, "file_name", bad), rf"images\[1\]: file_name must be a name, got {told}")
      for bad, told in ((MISSING, "none"), (1, "1"), ("", "''"), ("a\0b", r"'a\\x00b'"), ("a\ud800", r"'a\\ud800'"),
                        (None, "None"))),
    *((damaged(GT, "images", 1, side, bad), rf"images\[1\]: {side} must be an integer in 1\.\.1000000, got {told}")
      for side in ("width", "height")
      for bad, told in ((MISSING, "none"), ("5", "'5'"), (0, "0"), (-4, "-4"), (5.5, "5.5"), (10**6 + 1, "1000001"),
                        (10**400, "1000"))),
    *((damaged(GT, "categories", 1, "name", bad), r"categories\[1\]: name must be a name, got ")
      for bad in (MISSING, 4, "", None, ["cat"])),
    *((damaged(GT, "annotations", 2, "bbox", bad), r"annotations\[2\]: " + BOX + told)
      for bad, told in ((MISSING, "none"), ([1, 2, 3], r"\[1, 2, 3\]"), ([1, 2, 3, 4, 5], r"\[1, 2, 3, 4, 5\]"),
                        ("1234", "'1234'"), ([1, 2, 3, "4"], r"\[1, 2, 3, '4'\]"), ([1, 2, 3, None], ""),
                        ([1, 2, 3, True], ""), ({"x": 1}, ""), (None, "None"),
                        ([1, 2, 3, [4]], ""), ([0, 0, 1.1e12, 1], ""), ([0, 0, 1, 10**400], ""), ([[1, 2, 3, 4]], ""), (5, "5"))),
    *((damaged(GT, "annotations", 1, key, bad), rf"annotations\[1\]: {key} must be {what}, got {told}")
      for key, what in (("image_id", "an integer of 64 bits"), ("category_id", "an integer of 64 bits"))
      for bad, told in ((MISSING, "none"), ("7", "'7'"), (3.5, "3.5"), (10**30, ""))),
    (damaged(GT, "annotations", 1, "image_id", 8), r"annotations\[1\]: image_id must be that of one of the 2 images, got 8"),
    (damaged(GT, "annotations", 1, "category_id", 1), r"\[1\]: category_id must be that of one of the 2 categories, got 1"),
    *((damaged(GT, "annotations", 0, "area", bad), r"annotations\[0\]: area must be a finite number up to 1e\+12, got ")
      for bad in ("1", None, True, [1], 1.1e12, 10**400)),
    *((damaged(GT, "annotations", 0, "iscrowd", bad), rf"annotations\[0\]: iscrowd must be 0 or 1, got {bad!r}")
      for bad in (2, -1, "0", None, 0.5)),
]
BAD_DT = [
    ({}, r"the file must hold a list of detections, got \{\}"),
    (GT, r"the file must hold a list of detections, got \{"),
    (None, r"the file must hold a list of detections, got None"),
    (damaged(DT, 1, [1]), r"detections\[1\] must be an object, got \[1\]"),
    *((damaged(DT, 1, key, MISSING), rf"detections\[1\]: {key} must be .*, got none")
      for key in ("image_id", "category_id", "bbox", "score")),
    *((damaged(DT, 2, key, bad), rf"detections\[2\]: {key} must be an integer of 64 bits, got ")
      for key in ("image_id", "category_id") for bad in ("7", 7.5, None, True, 10**30)),
    (damaged(DT, 2, "image_id", 1), r"detections\[2\]: image_id must be that of one of the 2 images, got 1"),
    (damaged(DT, 2, "category_id", 4), r"detections\[2\]: category_id must be that of one of the 2 categories, got 4"),
    *((damaged(DT, 0, "bbox", bad), r"detections\[0\]: " + BOX)
      for bad in ([], [1, 2, 3], [1, 2, 3, "4"], None, [1, 2, 3, False], 1e13)),
    *((damaged(DT, 0, "score", bad), r"detections\[0\]: score must be a finite number, got ")
      for bad in ("0.5", None, True, [0.5], 10**400)),
]
BAD_NAMED = [
    ({"image": "a"}, r"the file must hold a list of detections, got \{'image': 'a'\}"),
    (damaged(NAMED, 2, "a"), r"detections\[2\] must be an object, got 'a'"),
    *((damaged(NAMED, 1, key, MISSING), rf"detections\[1\]: {key} must be .*, got none")
      for key in ("image", "class", "box", "score")),
    *((damaged(NAMED, 1, key, bad), rf"detections\[1\]: {key} must be a name, got ")
      for key in ("image", "class") for bad in (1, None, "", ["a"])),
    (damaged(NAMED, 1, "image", "A"), r"detections\[1\]: image must be that of one of the 2 images, got 'A'"),
    (damaged(NAMED, 1, "class", "cats"), r"detections\[1\]: class must be that of one of the 2 classes, got 'cats'"),
    *((damaged(NAMED, 1, "box", bad), r"detections\[1\]: box must be four finite numbers up to 1e\+12, got ")
      for bad in ([1], "box", [1, 2, 3, None])),
    *((damaged(NAMED, 1, "score", bad), r"detections\[1\]: score must be a finite number, got ") for bad in ("1", None, True)),
]


def refused(read, path, op, message):
    with pytest.raises(ValueError) as caught:
        read(path)
    told = str(caught.value)
    assert told.startswith(f"coco.{op}: {path}"), told[:300]
    assert "\n" not in told and len(told) < len(str(path)) + 250
    assert caught.type is ValueError
    caught.match(message)


@pytest.mark.parametrize("value, message", BAD_TEXT, ids=range(len(BAD_TEXT)))
def test_what_is_no_json_is_refused_by_every_reader(tmp_path, value, message):
    truth = annotations(write(tmp_path, GT, "gt.json"))
    path = write(tmp_path, value)
    refused(annotations, path, "annotations", message)
    refused(lambda p: results(p, truth), path, "results", message)
    refused(lambda p: named_results(p, [], []), path, "named_results", message)


@pytest.mark.parametrize("value, message", BAD_GT, ids=range(len(BAD_GT)))
def test_damaged_annotations(tmp_path, value, message):
    refused(annotations, write(tmp_path, value), "annotations", message)


@pytest.mark.parametrize("value, message", BAD_DT, ids=range(len(BAD_DT)))
def test_damaged_results(tmp_path, value, message):
    truth = annotations(write(tmp_path, GT, "gt.json"))
    refused(lambda p: results(p, truth), write(tmp_path, value), "results", message)


@pytest.mark.parametrize("value, message", BAD_NAMED, ids=range(len(BAD_NAMED)))
def test_damaged_named_results(tmp_path, value, message):
    refused(lambda p: named_results(p, ["a", "b"], ["cat", "dog"]), write(tmp_path, value), "named_results", message)


def test_a_missing_file(tmp_path):
    for read in (annotations, lambda p: results(p, None), lambda p: named_results(p, [], [])):
        with pytest.raises(FileNotFoundError, match=r"^coco\.\w+: there is no file .*none\.json$"):
            read(tmp_path / "none.json")


LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)
ANY = st.recursive(LEAF, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=5)


@given(data=st.data(), new=ANY)
def test_any_value_anywhere_is_read_or_refused(tmp_path_factory, data, new):
    """Whatever stands in place of one value: arrays of the right form, or a ValueError that names the file."""
    key = data.draw(st.sampled_from(["images", "categories", "annotations"]))
    where = [key] + data.draw(st.sampled_from([[], [0]]))
    if len(where) > 1:
        where += data.draw(st.sampled_from([[], *([k] for k in GT[key][0])]))
    path = write(tmp_path_factory.mktemp("any"), damaged(GT, *where, new))
    try:
        a = annotations(path)
    except ValueError as error:
        assert str(error).startswith(f"coco.annotations: {path}: ")
    else:
        n = len(a.id)
        assert a.boxes.shape == (n, 4) and a.area.shape == a.crowd.shape == a.image.shape == a.category.shape == (n,)
        assert np.isfinite(a.boxes).all() and np.isfinite(a.area).all()
