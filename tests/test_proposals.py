import itertools
import json
import math
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.io import savemat

from conftest import RUNNING, seeds
from tinydet import proposals, use
from tinydet.ops import assign
from tinydet.ops.boxes import iou
from tinydet.records import DefectWarning, Example

ROOT2 = math.sqrt(2)
BOXES = {"000005": [[1, 1, 10, 20], [3, 2, 8, 4]], "000007": [], "a b": [[5, 6, 7, 300]]}           # y1, x1, y2, x2 from 1
CONTINUOUS = {"000005": [[0, 0, 20, 10], [1, 2, 4, 8]], "000007": [], "a b": [[5, 4, 300, 7]]}


def example(name, boxes, size=(100, 80), difficult=()):
    boxes, hard = np.array(boxes, float).reshape(-1, 4), np.zeros(len(boxes), bool)
    hard[list(difficult)] = True
    return Example(name, "none", size, boxes, np.zeros(len(boxes), np.int64), hard)


def cells(values, shape):
    out = np.empty(shape, object)
    for at, value in zip(np.ndindex(shape), values):
        out[at] = value
    return out


def published(path, by_name=BOXES, dtype=float, compressed=False, **more):
    """A file as fast-rcnn publishes it. more: other variables, or these two replaced."""
    rows = [np.array(b, dtype).reshape(-1, 4) if isinstance(b, list) else b for b in by_name.values()]
    savemat(path, {"boxes": cells(rows, (1, len(rows))), "images": cells(list(by_name), (len(rows), 1))} | more, do_compression=compressed)
    return path


def same(found, expected):
    assert list(found) == list(expected)
    for name, boxes in expected.items():
        assert_array_equal(found[name], np.array(boxes, float).reshape(-1, 4), strict=True)


# .mat

@pytest.mark.parametrize("dtype", [float, np.float32, np.uint16, np.int32, np.uint8, np.int64])
@pytest.mark.parametrize("compressed", [False, True])
def test_published_layout_becomes_continuous_boxes(tmp_path, dtype, compressed):
    boxes = {name: [[min(v, 255) for v in row] for row in rows] for name, rows in BOXES.items()}
    path = published(tmp_path / "ss.mat", boxes, dtype, compressed, other={"a": np.arange(3), "b": "text"}, x=1j)
    expected = {name: [[min(v, 255) for v in row] for row in rows] for name, rows in CONTINUOUS.items()}
    same(proposals.from_mat(path), expected)
    same(proposals.from_mat(str(path), ["a b", "000005"]), {name: expected[name] for name in ("a b", "000005")})
    assert proposals.from_mat(path, []) == {}


def element(order, kind, data):
    if 0 < len(data) <= 4:                                                          # as MATLAB packs it
        return struct.pack(order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(order, name, kind, dims, inner, flags=0):
    return element(order, 14, element(order, 6, struct.pack(order + "II", kind | flags, 0))
                   + struct.pack(order + "II", 5, 4 * len(dims)) + struct.pack(f"{order}{len(dims)}i", *dims) + bytes(4 * len(dims) % 8)
                   + element(order, 1, name) + inner)


def by_hand(order, boxes=None, images=None, dims=(1, 3)):
    """As MATLAB writes it, which savemat does not: doubles stored in bytes, short names in 8 bytes, [] without a head, either byte order."""
    names = matrix(order, b"", 4, (1, 3), element(order, 4, np.array([97, 46, 98], order + "u2").tobytes()))
    names += matrix(order, b"", 4, (1, 2), element(order, 16, b"cd")) + matrix(order, b"", 4, (1, 1), element(order, 2, b"e"))
    rows = matrix(order, b"", 6, (1, 4), element(order, 2, bytes([1, 2, 30, 40])))
    rows += struct.pack(order + "II", 14, 0)
    rows += matrix(order, b"", 6, (2, 4), element(order, 9, np.array([1, 2, 3, 4, 50.5, 6, 7, 8], order + "f8").tobytes()))
    head = b"MATLAB 5.0 MAT-file, by hand".ljust(124) + struct.pack(order + "H", 0x100) + (b"IM" if order == "<" else b"MI")
    return (head + matrix(order, b"images", 1, (3, 1), names if images is None else images)
            + matrix(order, b"boxes", 1, dims, rows if boxes is None else boxes))


@pytest.mark.parametrize("order", "<>")
def test_what_matlab_writes(tmp_path, order):
    (tmp_path / "hand.mat").write_bytes(by_hand(order))
    same(proposals.from_mat(tmp_path / "hand.mat"), {"a.b": [[1, 0, 40, 30]], "cd": [], "e": [[2, 0, 7, 50.5], [3, 1, 8, 6]]})


def test_values_are_left_to_clean(tmp_path):
    path = published(tmp_path / "nan.mat", {"a": [[np.nan, 1, np.inf, 4], [1, 1, 5, 5]]})
    boxes = proposals.from_mat(path)["a"]
    assert_array_equal(boxes, [[0, np.nan, 4, np.inf], [0, 0, 5, 5]])
    kept, dropped = proposals.clean(boxes, 50, 50)
    assert_array_equal(kept, [[0, 0, 5, 5]])
    assert dropped == {"boxes with NaN or infinity dropped": 1}


def test_empty_files_of_the_right_layout(tmp_path):
    same(proposals.from_mat(published(tmp_path / "none.mat", {})), {})
    same(proposals.from_mat(published(tmp_path / "empty.mat", {"a": np.zeros((0, 0)), "b": np.zeros((0, 4)), "c": np.zeros((5, 0))})),
         {"a": [], "b": [], "c": []})


WRONG = [
    ({"boxes": np.zeros((3, 4))}, "boxes, which is no cell array"),
    ({"boxes": {"a": 1}}, "boxes, which is no cell array"),
    ({"boxes": cells([np.ones((1, 4))] * 4, (2, 2))}, "a cell array boxes 2 x 2"),
    ({"boxes": cells([np.ones((1, 4))] * 4, (1, 4))}, "one cell an image each, got 4 and 3"),
    ({"boxes": cells([np.ones((1, 4)), np.ones((4, 3)), np.ones((1, 4))], (1, 3))}, r"boxes\{2\} must have 4 columns, got 4 x 3"),
    ({"boxes": cells([np.ones((1, 4)), np.ones((1, 4)), np.ones((1, 2, 4))], (1, 3))}, r"boxes\{3\} of 1 x 2 x 4"),
    ({"boxes": cells([np.ones((1, 4)), np.ones((1, 4)) * 1j, np.ones((1, 4))], (1, 3))}, r"boxes\{2\}, which is no matrix of real"),
    ({"boxes": cells([np.ones((1, 4)), "text", np.ones((1, 4))], (1, 3))}, r"boxes\{2\}, which is no matrix of real"),
    ({"boxes": cells([np.ones((1, 4)), cells([1, 2, 3, 4], (1, 4)), np.ones((1, 4))], (1, 3))}, r"boxes\{2\}, which is no matrix"),
    ({"boxes": cells([{"a": 1}, np.ones((1, 4)), np.ones((1, 4))], (1, 3))}, r"boxes\{1\}, which is no matrix"),
    ({"images": np.array(["abc", "def", "ghi"])}, "images, which is no cell array"),
    ({"images": cells(["a", "b", 3.0], (3, 1))}, r"images\{3\}, which is no line of text"),
    ({"images": cells(["a", np.array(["ab", "cd"]), "c"], (3, 1))}, r"images\{2\}, which is no line of text"),
    ({"images": cells(["a", "", "c"], (3, 1))}, r"images\{2\}"),
    ({"images": cells(["a", "b\n", "c"], (3, 1))}, r"images\{2\} must be a name"),
    ({"images": cells(["a", "b", "a"], (3, 1))}, "images must name each image once, got 'a' more"),
]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("wrong, message", WRONG)
def test_another_layout_is_one_error(tmp_path, wrong, message, compressed):
    path = published(tmp_path / "wrong.mat", compressed=compressed, **wrong)
    with pytest.raises(ValueError, match=message) as error:
        proposals.from_mat(path)
    assert str(error.value).startswith(f"proposals.from_mat: {path}") and "\n" not in str(error.value)


def test_names_that_are_missing_are_listed(tmp_path):
    path = published(tmp_path / "ss.mat")
    with pytest.raises(ValueError, match="all 3 images that are asked for, 2 are missing: x, y$"):
        proposals.from_mat(path, ["x", "000005", "y"])


def deep(levels):
    """Cells in cells; the sizes claim more than follows, which scipy.io never compares."""
    inner = struct.pack("<IIIIIIIIIIII", 14, 1 << 20, 6, 8, 1, 0, 5, 8, 1, 1, 1, 0) * levels
    return by_hand("<", boxes=inner, dims=(1, 1))


DAMAGED = {
    "empty": b"", "short": b"MATLAB 5.0", "text": b"x" * 4000, "no variable": by_hand("<")[:128],
    "HDF5 of MATLAB": b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(384) + b"\x89HDF\r\n\x1a\n", "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "wide": by_hand("<", boxes=b"", dims=(1, 2**31 - 1)), "negative": by_hand("<", boxes=b"", dims=(-1, -3)), "deep": deep(100000),
    "too many": by_hand("<", dims=(1, 2)), "too few": by_hand("<", dims=(1, 4)),
    "size": by_hand("<", boxes=matrix("<", b"", 6, (2**30, 4), element("<", 9, bytes(64))), dims=(1, 1)),
    "type": by_hand("<", boxes=matrix("<", b"", 6, (2, 4), element("<", 99, bytes(64))), dims=(1, 1)),
    "class": by_hand("<", boxes=matrix("<", b"", 17, (2, 4), element("<", 9, bytes(64))), dims=(1, 1)),
    "twice": by_hand("<") + by_hand("<")[128:], "bomb": by_hand("<")[:128] + struct.pack("<II", 15, 20) + zlib.compress(bytes(10**4))[:20],
    "text longer than its letters": by_hand("<", images=b"".join(
        matrix("<", b"", 4, (1, 2**30), element("<", 16, b"ab")) for _ in range(3))),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_error(tmp_path, kind):
    path, start = tmp_path / "damaged.mat", time.perf_counter()
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match="got: ") as error:
        proposals.from_mat(path)
    assert str(error.value).startswith(f"proposals.from_mat: {path} must be a .mat file of version 5 to 7.2")
    assert ("7.3, which is HDF5" in str(error.value)) == ("HDF5" in kind) and time.perf_counter() - start < 2


def test_what_unpacks_to_more_than_allowed_is_refused(tmp_path, monkeypatch):
    path = published(tmp_path / "large.mat", {"a": np.zeros((1000, 4))}, compressed=True)
    monkeypatch.setattr(proposals, "MOST_BYTES", 20000)
    with pytest.raises(ValueError, match="that is cut, or larger than 20000 bytes"):
        proposals.from_mat(path)
    monkeypatch.setattr(proposals, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="the limit is 100"):
        proposals.from_mat(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_anywhere_or_with_any_byte_changed_it_is_right_or_one_error(tmp_path, compressed):
    """scipy.io alone ends the process on 2 of 100 such files."""
    path, rng = published(tmp_path / "ss.mat", compressed=compressed), np.random.default_rng(0)
    content = path.read_bytes()
    damaged = [content[:n] for n in range(0, len(content), 7)]
    for _ in range(250):
        bad = bytearray(content)
        for at in rng.integers(116, len(content), rng.integers(1, 4)):
            bad[at] = rng.choice([0, 1, 14, 15, 128, 255])
        at = rng.integers(32, len(content) // 4) * 4
        damaged += [bytes(bad), content[:at] + struct.pack("<i", rng.choice([-1, 0, 2**31 - 1, 2**20])) + content[at + 4:]]
    for bad in damaged:
        path.write_bytes(bad)
        try:
            found = proposals.from_mat(path)
        except ValueError as error:
            assert str(error).startswith(f"proposals.from_mat: {path}") and "\n" not in str(error)
        else:
            assert all(b.dtype == np.float64 and b.ndim == 2 and b.shape[1] == 4 for b in found.values())


def test_no_file(tmp_path):
    for reader, name in ((proposals.from_mat, "no.mat"), (proposals.from_json, "no.json")):
        with pytest.raises(FileNotFoundError, match=f"there is no file .*{name}"):
            reader(tmp_path / name)


# JSON

def as_json(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_json_by_name_and_as_results(tmp_path):
    same(proposals.from_json(as_json(tmp_path / "a.json", CONTINUOUS)), CONTINUOUS)
    same(proposals.from_json(tmp_path / "a.json", ["a b"]), {"a b": CONTINUOUS["a b"]})
    results = [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3.5, 4], "score": 0.5}, {"image": "x", "box": [1, 2, 3.5, 4]},
               {"image_id": "7", "bbox": [0, 0, 1, 1]}]
    same(proposals.from_json(as_json(tmp_path / "b.json", results)), {"7": [[1, 2, 4.5, 6], [0, 0, 1, 1]], "x": [[1, 2, 3.5, 4]]})
    same(proposals.from_json(as_json(tmp_path / "c.json", [])), {})


@pytest.mark.parametrize("value, message", [
    ("{", "must be JSON"), ('{"a": [[0, 0, NaN, 1]]}', "NaN"), ('{"a": [], "a": []}', "twice"), (3, "must hold an object of lists"),
    ({"a": 3}, "'a' must be a list of boxes, got 3"), ({"a": [[1, 2, 3]]}, "'a', box 0 must be four finite numbers"),
    ({"a": [[1, 2, 3, 4], [1, 2, "3", 4]]}, "'a', box 1 must be four"), ({"a": [[1, 2, True, 4]]}, "four finite numbers"),
    ({"a": [[1, 2, 3, 1e13]]}, "up to 1e.12"), ([[1, 2, 3, 4]], r"\[0\] must be an object with either image or image_id"),
    ([{"box": [1, 2, 3, 4]}], "either image or image_id"), ([{"image": "a", "image_id": 1, "box": [1, 2, 3, 4]}], "either image or image_id"),
    ([{"image": "a"}], "either box or bbox"), ([{"image": 1, "box": [1, 2, 3, 4]}], r"\[0\]: image must be a name, got 1"),
    ([{"image_id": 1.5, "box": [1, 2, 3, 4]}], "image_id must be a name or an integer"),
    ([{"image_id": "", "box": [1, 2, 3, 4]}], "image_id must be a name"), ([{"image_id": True, "box": [1, 2, 3, 4]}], "image_id must be"),
    ([{"image": "a", "box": [1, 2, 3, 4]}, {"image": "a", "bbox": None}], r"\[1\]: bbox must be four finite numbers"),
])
def test_wrong_json_is_one_error(tmp_path, value, message):
    path = as_json(tmp_path / "wrong.json", value)
    with pytest.raises(ValueError, match=message) as error:
        proposals.from_json(path)
    assert str(error.value).startswith(f"proposals.from_json: {path}") and len(str(error.value)) < 400


def test_names_missing_in_json_are_listed(tmp_path):
    with pytest.raises(ValueError, match="all 2 images that are asked for, 1 are missing: z$"):
        proposals.from_json(as_json(tmp_path / "a.json", CONTINUOUS), ["z", "a b"])


# Windows

def by_definition(width, height, sizes, ratios, step):
    out = []
    for s, a in itertools.product(sizes, ratios):
        w, h = s / math.sqrt(a), s * math.sqrt(a)
        if w > width + 1e-5 or h > height + 1e-5:
            continue

        def starts(length, side):
            at, k = [], 0
            while k * step * side <= length - side + 1e-7:
                at.append(k * step * side)
                k += 1
            return at + [length - side] * (length - side - at[-1] > 1e-5)
        out += [(x, y, x + w, y + h) for y in starts(height, h) for x in starts(width, w)]
    return np.array(out).reshape(-1, 4)


@given(width=st.integers(1, 90), height=st.integers(1, 90), low=st.integers(4, 60), n=st.integers(1, 4), step=st.sampled_from([0.25, 0.3, 0.5, 1.0]))
def test_windows_are_the_definition(width, height, low, n, step):
    sizes, ratios = [low * ROOT2**k for k in range(n)], [2.0, 1.0, 0.3]
    found = proposals.windows(width, height, sizes, ratios, step)
    assert found.dtype == np.float64
    assert_allclose(found, by_definition(width, height, sizes, ratios, step), atol=1e-5)
    for boxes in (found, proposals.windows(width, height, sizes, ratios, step, cut=True)):
        assert len(np.unique(np.round(boxes, 4), axis=0)) == len(boxes)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (width, height)).all() and (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("low, high, step, expected", [(32, 512, 0.25, 14077), (32, 512, 0.33, 8126), (48, 384, 0.33, 3192)])
def test_counts_of_the_notes(low, high, step, expected):
    """Section 1.7 counts without the flush windows: those that lie on the grid of their stride in both directions."""
    boxes = proposals.windows(500, 375, proposals.ladder(low, high, ROOT2), [0.5, 1, 2], step)
    at = boxes[:, :2] / (step * (boxes[:, 2:] - boxes[:, :2]))
    assert (abs(at - np.round(at)) < 1e-5).all(1).sum() == expected < len(boxes)


def test_flush_windows_touch_both_far_borders_and_repeat_none():
    assert_array_equal(proposals.windows(25, 10, [10], [1], 0.5), [[x, 0, x + 10, 10] for x in (0, 5, 10, 15)])             # 15 is flush
    assert_array_equal(proposals.windows(27, 10, [10], [1], 0.5), [[x, 0, x + 10, 10] for x in (0, 5, 10, 15, 17)])
    assert_array_equal(proposals.windows(10, 12, [10, 10.0], [1, 1], 1), [[0, 0, 10, 10], [0, 2, 10, 12]])                  # repeated sizes


def test_larger_windows_are_dropped_or_cut():
    assert proposals.windows(30, 30, [40], [1], 0.5).shape == (0, 4)
    assert_array_equal(proposals.windows(30, 30, [40, 50], [1], 0.5, cut=True), [[0, 0, 30, 30]])
    assert_array_equal(proposals.windows(30, 60, [40], [1], 0.5, cut=True), [[0, 0, 30, 40], [0, 20, 30, 60]])
    assert_array_equal(proposals.windows(512, 300, [proposals.ladder(32, 512, ROOT2)[8]], [4], 1), np.zeros((0, 4)))
    assert len(proposals.windows(512, 512, proposals.ladder(32, 512, ROOT2)[8:], [1], 0.3)) == 1         # 512.0000000000001 fits


@pytest.mark.parametrize("change, message", [
    ({"width": 0}, "width must be a positive"), ({"height": math.nan}, "height must be"), ({"step": 0}, "step must be"), ({"step": 1.5}, "step must be at most 1"),
    ({"sizes": []}, "sizes must hold at least one"), ({"sizes": [1, -2]}, "each of sizes must be"), ({"ratios": [math.inf]}, "each of ratios"),
    ({"ratios": ["1"]}, "each of ratios must be a positive, finite number, got '1'"), ({"step": True}, "step must be"),
    ({"step": 1e-4}, "at most 4194304 windows, got")])
def test_errors_of_windows(change, message):
    with pytest.raises(ValueError, match=f"proposals.windows: .*{message}"):
        proposals.windows(**{"width": 100, "height": 90, "sizes": [20], "ratios": [1], "step": 0.5} | change)


def test_ladder():
    assert_allclose(proposals.ladder(32, 512, ROOT2), [32 * ROOT2**k for k in range(9)])
    assert proposals.ladder(10, 10, 2) == [10] and proposals.ladder(10, 39.9, 2) == [10, 20]
    assert len(proposals.ladder(1, 1000, 10)) == 4 and json.loads(json.dumps(proposals.ladder(np.float64(1), 9, 3))) == [1, 3, 9]
    for wrong in ((0, 1, 2), (2, 1, 2), (1, 2, 1), (1, math.inf, 2), (1, 2, 1 + 1e-9)):
        with pytest.raises(ValueError, match="proposals.ladder: "):
            proposals.ladder(*wrong)


# What windows guarantee

NOTES = [(ROOT2, 2, 0.25, 0.568), (ROOT2, 2, 0.30, 0.533), (ROOT2, 2, 0.50, 0.357), (2, 2, 0.25, 0.461), (2 ** (1 / 3), 2, 0.25, 0.599),
         (ROOT2, 1.5, 0.25, 0.589)]
OTHERS = [(1, 1, 0.25), (4, 1, 0.01), (1, 6, 0.2), (2, 16, 0.3), (1.2, 1.1, 1), (3, 3, 0.7)]


@pytest.mark.parametrize("size_factor, ratio_factor, step, expected", NOTES)
def test_guarantees_of_the_notes(size_factor, ratio_factor, step, expected):
    assert round(proposals.guarantee(size_factor, ratio_factor, step), 3) == expected


def shifted(shape, step, window=1.0):
    """IoU of objects (n, 2) with a square window half a stride off in x and y, from the boxes themselves."""
    centre = window / 2 + step * window / 2
    objects = np.concatenate([centre - shape / 2, centre + shape / 2], 1)
    return iou(objects, np.array([[0, 0, window, window]]))[:, 0]


@pytest.mark.parametrize("case", [row[:3] for row in NOTES] + OTHERS)
def test_guarantee_is_the_least_of_a_dense_grid(case):
    """And often not that of the four corners, for larger strides."""
    size, ratio = (np.linspace(-math.log(f) / 2, math.log(f) / 2, 301) for f in case[:2])
    s, r = (a.ravel() for a in np.meshgrid(size, ratio))
    overlap = shifted(np.exp(np.stack([s - r / 2, s + r / 2], 1)), case[2])
    assert overlap.min() - 2.1e-5 <= proposals.guarantee(*case) <= overlap.min()
    corners = overlap[np.isin(s, size[[0, -1]]) & np.isin(r, ratio[[0, -1]])].min()
    if case == (ROOT2, 2, 0.30):
        assert round(corners, 3) == 0.539 and abs(r[overlap.argmin()]) < 1e-9 and s[overlap.argmin()] == size[0]


def best_overlaps(boxes, objects):
    return assign.best(boxes, objects)[3]


def place(rng, shape, width, height):
    """Objects of these shapes anywhere in the image, a third of them at borders and in corners."""
    room = np.array([width, height]) - shape
    corner = room * rng.random(shape.shape)
    border = rng.integers(0, 9, shape.shape)
    corner = np.where(border == 0, 0, np.where(border == 1, room, corner))
    return np.concatenate([corner, corner + shape], 1)


def in_range(rng, n, sizes, ratios, size_factor, ratio_factor):
    """Shapes up to half a factor off the rungs, beyond the ends too; a third lie on that limit."""
    size = rng.choice(sizes, n) * size_factor ** rng.choice([-0.5, 0.5, 0, 1], n, p=[0.2, 0.1, 0.1, 0.6])
    size = np.where(rng.random(n) < 0.6, rng.choice(sizes, n) * size_factor ** rng.uniform(-0.5, 0.5, n), np.clip(
        size, sizes[0] * size_factor**-0.5, sizes[-1] * size_factor**0.5))
    ratio = rng.choice(ratios, n) * ratio_factor ** np.where(rng.random(n) < 0.6, rng.uniform(-0.5, 0.5, n), rng.choice([-0.5, 0, 0.5], n))
    return np.stack([size / np.sqrt(ratio), size * np.sqrt(ratio)], 1)


@pytest.mark.parametrize("case", [row[:3] for row in NOTES])
def test_random_objects_keep_the_guarantee_at_borders_too(case):
    size_factor, ratio_factor, step = case
    rng, sizes = np.random.default_rng(1), [30 * size_factor**k for k in range(3)]
    ratios = [1 / ratio_factor, 1.0, ratio_factor]
    boxes = proposals.windows(611, 487, sizes, ratios, step)
    objects = place(rng, in_range(rng, 3000, sizes, ratios, size_factor, ratio_factor), 611, 487)
    assert best_overlaps(boxes, objects).min() >= proposals.guarantee(*case) - 1e-6


@pytest.mark.parametrize("case", [row[:3] for row in NOTES] + OTHERS[3:])
def test_a_single_size_attains_the_guarantee(case):
    """Random objects and places around one window shape come near to it, and never below."""
    rng, boxes = np.random.default_rng(2), proposals.windows(400, 400, [40], [1], case[2])
    shape = in_range(rng, 20000, [40], [1], *case[:2])
    half = 40 * case[2] * (0.5 + rng.integers(0, 5, (20000, 2)) + rng.choice([0, 1e-3, 0.1], (20000, 2))) + 100 // (40 * case[2]) * 40 * case[2]
    centre = half + 20
    least = best_overlaps(boxes, np.concatenate([centre - shape / 2, centre + shape / 2], 1)).min()
    assert proposals.guarantee(*case) - 1e-6 <= least <= proposals.guarantee(*case) + 0.01


def test_between_the_rungs_the_best_window_is_a_little_better():
    """What the docstring of guarantee states: 0.541 instead of 0.533."""
    w, h = (a.ravel() for a in np.meshgrid(*[np.linspace(-0.5, 0.5, 201)] * 2))
    shape, best = np.exp(np.stack([w, h], 1)), np.zeros(201 * 201)
    for i, j in itertools.product(range(-2, 3), repeat=2):
        window = np.array([ROOT2**i / math.sqrt(2.0**j), ROOT2**i * math.sqrt(2.0**j)])
        best = np.maximum(best, shifted_by(shape, window, 0.3))
    assert round(best.min(), 3) == 0.541


def shifted_by(shape, window, step):
    centre = window / 2 * (1 + step)
    return iou(np.concatenate([centre - shape / 2, centre + shape / 2], 1), np.array([[0, 0, *window]]))[:, 0]


def test_cut_windows_keep_the_guarantee_for_objects_that_fill_the_image():
    rng, sizes, ratios, case = np.random.default_rng(3), proposals.ladder(40, 160, ROOT2), [0.5, 1, 2], (ROOT2, 2, 0.3)
    shape = in_range(rng, 6000, sizes, ratios, ROOT2, 2)
    objects = place(rng, shape[(shape <= (130, 100)).all(1)], 130, 100)
    kept, cut = (best_overlaps(proposals.windows(130, 100, sizes, ratios, 0.3, cut=c), objects).min() for c in (False, True))
    assert cut >= proposals.guarantee(*case) - 1e-6 > kept                      # which is why cut exists


def test_errors_of_guarantee():
    for wrong in ((0.9, 2, 0.3), (2, 0.5, 0.3), (2, 2, 0), (2, 2, 1.1), (math.nan, 2, 0.3), (2, math.inf, 0.3)):
        with pytest.raises(ValueError, match="proposals.guarantee: "):
            proposals.guarantee(*wrong)


def scattered(seed, n=40, size=(320, 240), low=15, high=120):
    rng = np.random.default_rng(seed)
    s, a = np.exp(rng.uniform(math.log(low), math.log(high), n)), np.exp(rng.uniform(-0.7, 0.7, n))
    boxes = place(rng, np.stack([s / np.sqrt(a), s * np.sqrt(a)], 1), *size)
    return [example(f"i{k}", boxes[k::8], size if k % 2 else size[::-1]) for k in range(8)]


@pytest.mark.parametrize("least", [0.4, 0.5, 0.65])
def test_covering_reaches_all_boxes_with_few_windows(least):
    examples = [e for e in scattered(0) if e.size[0] == 320]
    settings = json.loads(json.dumps(proposals.covering(examples, least, share=1)))
    assert sorted(settings) == ["cut", "guarantee", "per_image", "ratios", "sizes", "step"]
    assert least <= settings["guarantee"] < least + 0.02
    found = proposals.for_examples(settings, examples)
    assert proposals.recall(found, examples, least)[0] == 1
    assert settings["per_image"] == np.mean([len(p) for p in found])
    factors = []
    for values, low, high in zip((settings["sizes"], settings["ratios"]), *spread(examples)):
        factors.append((high / low) ** (1 / len(values)))
        assert_allclose(values, [low * factors[-1] ** (k + 0.5) for k in range(len(values))])
    assert settings["guarantee"] == max(least, proposals.guarantee(*factors, settings["step"]))
    assert proposals.guarantee(*factors, settings["step"] + 0.01) < least           # no larger step would do
    plain = proposals.windows(320, 240, proposals.ladder(15, 120, ROOT2), [0.5, 1, 2], 0.25)
    assert least != 0.5 or settings["per_image"] < len(plain)


def spread(examples):
    sides = np.concatenate([e.boxes[:, 2:] - e.boxes[:, :2] for e in examples])
    values = np.stack([np.sqrt(sides.prod(1)), sides[:, 1] / sides[:, 0]])
    return values.min(1), values.max(1)


def test_covering_leaves_out_the_tails_and_the_difficult():
    examples = scattered(1, n=400) + [example("tiny", [[0, 0, 1, 1], [0, 0, 90, 4]], difficult=[1])]
    narrow, wide = proposals.covering(examples), proposals.covering(examples, share=1)
    assert narrow["sizes"][0] > 12 and wide["sizes"][0] < 2 and narrow["per_image"] < wide["per_image"] / 10
    assert proposals.covering([example("a", [[0, 0, 90, 4]], difficult=[0]), example("b", [[0, 0, 20, 20]])])["ratios"] == [1]


def test_covering_one_box_takes_one_size():
    settings = proposals.covering([example("a", [[10, 10, 30, 50]])])
    assert_allclose([settings["sizes"][0], settings["ratios"][0]], [math.sqrt(800), 2])
    assert len(settings["sizes"]) == len(settings["ratios"]) == 1 and settings["step"] == 0.36
    assert proposals.covering([example("a", [[10, 10, 30, 50]])], cut=False)["cut"] is False


def test_errors_of_covering():
    for wrong, message in (([], "got none in 0 images"), ([example("a", [])], "got none in 1 images")):
        with pytest.raises(ValueError, match=f"proposals.covering: examples must have a box that training uses, {message}"):
            proposals.covering(wrong)
    for options in ({"least": 0}, {"least": 0.95}, {"share": 1.5}, {"share": math.nan}):
        with pytest.raises(ValueError, match="proposals.covering: "):
            proposals.covering(scattered(0), **options)
    with pytest.raises(ValueError, match="no windows that were tried reach IoU 0.9"):
        proposals.covering([example("a", [[0, 0, 1, 99], [0, 0, 99, 1]])], least=0.9)


# What a net is given

def cleaned_by_definition(boxes, width, height, least):
    kept, dropped = [], {}
    for row in boxes.tolist():
        cut = [min(max(v, 0.0), e) for v, e in zip(row, (width, height, width, height))]
        if not all(map(math.isfinite, row)):
            kind = "boxes with NaN or infinity dropped"
        elif row[2] <= row[0] or row[3] <= row[1]:
            kind = "degenerate boxes dropped"
        elif cut[2] <= cut[0] or cut[3] <= cut[1]:
            kind = "boxes outside the image dropped"
        else:
            if max(abs(a - b) for a, b in zip(row, cut)) > 1:
                dropped["boxes cut at the border of the image"] = dropped.get("boxes cut at the border of the image", 0) + 1
            kind = None
            if min(cut[2] - cut[0], cut[3] - cut[1]) < least:
                kind = f"boxes with a side below {least:g} pixels dropped"
            elif cut in kept:
                kind = "repeated boxes dropped"
        if kind is None:
            kept.append(cut)
        else:
            dropped[kind] = dropped.get(kind, 0) + 1
    return np.array(kept, float).reshape(-1, 4), dropped


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(R=st.integers(0, 60), least=st.sampled_from([0, 1, 2, 2.5]), seed=seeds)
def test_clean_is_the_definition(dtype, R, least, seed):
    rng = np.random.default_rng(seed)
    boxes = rng.integers(-8, 16, (R, 4)) / 2.0 + rng.integers(0, 6, (R, 1)) * [0, 0, 1, 1]
    boxes[rng.random((R, 4)) < 0.03] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -0.0])
    given_ = boxes.astype(dtype)
    before = given_.copy()
    found, dropped = proposals.clean(given_, 9, 7, least)
    expected, kinds = cleaned_by_definition(given_.astype(float), 9, 7, least)
    assert_array_equal(found, expected, strict=True)
    assert dropped == kinds and not np.signbit(found).any()
    assert_array_equal(given_, before)
    again, nothing = proposals.clean(found, 9, 7, least)
    assert_array_equal(again, found)
    assert nothing == {}


def test_clean_of_none_and_its_errors():
    for dtype in (np.float32, np.float64):
        boxes, dropped = proposals.clean(np.zeros((0, 4), dtype), 10, 10)
        assert boxes.shape == (0, 4) and boxes.dtype == np.float64 and dropped == {}
    assert_array_equal(proposals.clean(np.array([[-0.5, 0, 2.0, 3]]), 9, 9)[0], [[0, 0, 2, 3]])            # the side is 2 after the cut
    assert proposals.clean(np.array([[-0.5, 0, 1.75, 3]]), 9, 9)[1] == {"boxes with a side below 2 pixels dropped": 1}
    for boxes, size, least, kind in ((np.zeros((2, 5)), (9, 9), 2, ValueError), (np.zeros((2, 4), int), (9, 9), 2, TypeError),
                                     ([[0, 0, 1, 1]], (9, 9), 2, TypeError), (np.zeros((2, 4)), (0, 9), 2, ValueError),
                                     (np.zeros((2, 4)), (9, math.nan), 2, ValueError), (np.zeros((2, 4)), (9, 9), -1, ValueError)):
        with pytest.raises(kind, match="proposals.clean: "):
            proposals.clean(boxes, *size, least)


def test_many_windows_take_milliseconds():
    sizes, best = proposals.ladder(32, 512, ROOT2), [math.inf] * 2
    for _ in range(5):
        start = time.perf_counter()
        boxes = proposals.windows(500, 375, sizes, [0.5, 1, 2], 0.25)
        middle = time.perf_counter()
        assert proposals.clean(boxes, 500, 375)[1] == {} and len(boxes) == 15021
        best = np.minimum(best, (middle - start, time.perf_counter() - middle))
    assert best[0] < 0.05 and best[1] < 0.2                                    # 0.5 and 5 ms on an idle core


@pytest.mark.parametrize("backend", RUNNING)
def test_recall(backend):
    examples = [example("a", [[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]], difficult=[2]), example("b", []), example("c", [[0, 0, 8, 4]])]
    found = [np.array([[0, 0, 10, 5.0], [0, 0, 10, 8], [20, 20, 40, 29]]), np.array([[0, 0, 5, 5.0]]), np.zeros((0, 4))]
    with use(backend):
        share, mean = proposals.recall(found, examples)
        assert share == pytest.approx(1 / 3) and mean == pytest.approx((0.8 + 0.45 + 0) / 3) and type(share) is type(mean) is float
        assert proposals.recall(found, examples, 0.8)[0] == pytest.approx(1 / 3)                               # at least, not above
        assert proposals.recall(found, examples, 0.81)[0] == 0
        assert proposals.recall([e.boxes for e in examples], examples, 1) == (1, 1)
        assert all(map(math.isnan, proposals.recall([np.zeros((0, 4))], examples[1:2])))
        assert all(map(math.isnan, proposals.recall([], [])))
    for wrong in ((found[:2], examples, 0.5), (found, examples, 1.5), (found, examples, math.nan), ([np.full((1, 4), np.nan)] * 3, examples, 0.5)):
        with pytest.raises(ValueError):
            proposals.recall(*wrong)


# All at once

@pytest.mark.parametrize("form", ["mat", "json", "dict"])
def test_for_examples_reads_cleans_and_warns_once(tmp_path, form):
    rows = {"a": [[0, 0, 10, 10], [5, 5, 30, 30], [0, 0, 10, 10], [0, 0, 10, 10], [3, 3, 4, 9]], "b": [[200, 200, 300, 300]], "other": [[0, 0, 5, 5]]}
    if form == "mat":
        source = published(tmp_path / "p.mat", {n: [[y1 + 1, x1 + 1, y2, x2] for x1, y1, x2, y2 in r] for n, r in rows.items()})
    else:
        source = as_json(tmp_path / "p.json", rows) if form == "json" else {n: np.array(r, float) for n, r in rows.items()}
    examples = [example("c", []), example("b", []), example("a", [])]
    with pytest.warns(DefectWarning) as caught:
        c, b, a = proposals.for_examples(source, examples)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_array_equal(a, [[0, 0, 10, 10], [5, 5, 30, 30]])
    assert a.dtype == b.dtype == c.dtype == np.float64 and b.shape == c.shape == (0, 4) and not a.flags.writeable
    assert caught[0].message.found == {"boxes with a side below 2 pixels dropped": ["a"], "repeated boxes dropped": ["a"],
                                       "boxes outside the image dropped": ["b"], "images without proposals": ["c", "b"]}
    text = str(caught[0].message)
    assert text.startswith(f"proposals.for_examples: {'a dict of boxes' if form == 'dict' else source}: 1 boxes outside the image dropped (first in b); ")
    assert "2 repeated boxes dropped (first in a)" in text and "2 images without proposals (first in c)" in text


def test_for_examples_of_windows_says_nothing_and_shares():
    examples = [example("a", []), example("b", [], (50, 60)), example("c", []), example("d", [], (60, 50))]
    settings = {"sizes": [20, 40], "ratios": [1], "step": 0.3, "guarantee": 0.5, "per_image": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = proposals.for_examples(settings, examples)
        assert proposals.for_examples(settings, []) == proposals.for_examples({}, []) == []
    for e, boxes in zip(examples, found):
        assert_array_equal(boxes, proposals.windows(*e.size, [20, 40], [1], 0.3))
    assert found[0] is found[2]
    with pytest.warns(DefectWarning, match="windows: 2 images without proposals"):
        proposals.for_examples(settings | {"sizes": [55]}, [example("a", [], (50, 60)), example("b", [], (40, 40))])
    assert len(proposals.for_examples(settings | {"sizes": [55], "cut": True}, examples)[1]) > 0


@pytest.mark.parametrize("source, message", [
    ("p.txt", "proposals.from_file: path must end in .mat or .json, got p.txt"), (3, "source must be a path, a dict"), ({"step": 0.5, "sizes": [3]}, "must hold sizes, ratios and step"),
    ({"x": np.zeros((1, 4))}, "a dict of boxes must hold proposals for some of the 1 examples, such as 'a', got 'x'"), ({}, "got none"),
    ({"a": np.zeros((2, 3))}, "must have shape"), ({"a": [[1, 2, 3, 4]]}, "must be float32 or float64"),
    ({"sizes": [3], "ratios": [1], "step": -1}, "step must be")])
def test_errors_of_for_examples(source, message):
    with pytest.raises((ValueError, TypeError), match=message):
        proposals.for_examples(source, [example("a", [])])
