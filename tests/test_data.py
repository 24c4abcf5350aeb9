import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from conftest import random_boxes, real, seeds
from tinydet import data, images
from tinydet.data import Example, flip, hold_out, mean_std, near_identical, read_image, read_split, read_voc, splits, view


def noise(W, H, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def pattern(seed):
    """An image whose difference hash is all its own, as uint8 (48, 51, 3)."""
    return np.asarray(Image.fromarray(noise(17, 16, seed)).resize((51, 48), Image.Resampling.NEAREST))


def item(name, box, difficult=None):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox></object>"


def annotation(*objects, size=(40, 30)):
    tag = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{tag}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """A function that writes a VOC folder: one image of 40x30 an annotation (text or bytes), all of them in the set "train"."""
    def write(ending=".jpg", **annotations):
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
        for i, (name, text) in enumerate(annotations.items()):
            (tmp_path / "Annotations" / f"{name}.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
            Image.fromarray(noise(40, 30, i)).save(tmp_path / "JPEGImages" / (name + ending))
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{name}\n" for name in annotations))
        return tmp_path
    return write


# VOC folders

@pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".png", ".JPG", ".PNG"])
def test_read_voc(voc, ending):
    folder = voc(ending, b=annotation(item("dog", (3, 4, 10, 20)), item(" cat ", (1, 1, 40, 30), 1), item("dog", (5.5, 6, 7.25, 8), 0)),
                 a=annotation(item("ant", (2, 2, 4, 3)), size=None))
    examples, classes = read_voc(folder, "train")
    assert classes == ("ant", "cat", "dog")                         # sorted
    b, a = examples                                                 # in the order of the image set
    assert (b.name, b.size, a.name, a.size) == ("b", (40, 30), "a", (40, 30))
    assert_array_equal(b.boxes, np.array([[2, 3, 10, 20], [0, 0, 40, 30], [4.5, 5, 7.25, 8]]), strict=True)      # xmin - 1, ymin - 1
    assert_array_equal(b.labels, np.array([2, 1, 2]), strict=True)
    assert_array_equal(b.difficult, np.array([False, True, False]), strict=True)
    assert_array_equal(a.boxes, [[1, 1, 4, 3]])
    boxes, labels = b.usable()
    assert_array_equal(boxes, b.boxes[[0, 2]])
    assert_array_equal(labels, [2, 2])
    assert_array_equal(a.image(), np.asarray(Image.open(a.source)), strict=True)
    assert a.image() is a.image()                                   # decoded once


def test_given_classes_keep_their_order_and_the_set_all_reads_every_annotation(voc):
    folder = voc(b=annotation(item("dog", (3, 4, 10, 20))), a=annotation(item("cat", (3, 4, 10, 20))))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("b\n")
    examples, classes = read_voc(folder, "all", ["dog", "bird", "cat"])
    assert classes == ("dog", "bird", "cat")
    assert [(e.name, e.labels.tolist()) for e in examples] == [("a", [2]), ("b", [0])]
    assert [e.name for e in read_voc(folder, "train")[0]] == ["b"]


def test_unusable_boxes_are_dropped_or_cut_and_counted_in_one_warning(voc):
    folder = voc(a=annotation(item("x", (5, 5, 5, 9)), item("x", (5, 9, 8, 9)), item("x", (9, 5, 6, 9)), item("x", (6, 7, 8, 9))),
                 b=annotation(item("y", (0, -3, 10, 10)), item("y", (30, 20, 41, 35)), item("y", (41, 5, 50, 9)), item("y", (5, -9, 9, 0))),
                 c=annotation(item("x", (1, 1, 40, 30))))
    with pytest.warns(UserWarning) as caught:
        (a, b, c), _ = read_voc(folder, "train")
    assert [str(w.message) for w in caught] == [
        f"data.read_voc: {folder}, train: 2 boxes cut at the border of the image (first in b); "
        "2 boxes outside the image dropped (first in b); 3 degenerate boxes dropped (first in a)"]
    assert caught[0].filename == __file__                           # points at the caller
    assert_array_equal(a.boxes, [[5, 6, 8, 9]])
    assert_array_equal(b.boxes, [[0, 0, 10, 10], [29, 19, 40, 30]])
    assert len(b.labels) == len(b.difficult) == 2
    assert_array_equal(c.boxes, [[0, 0, 40, 30]])


def test_an_image_without_objects(voc):
    (a,), classes = read_voc(voc(a=annotation()), "train")
    assert classes == ()
    assert_array_equal(a.boxes, np.zeros((0, 4)), strict=True)
    assert_array_equal(a.labels, np.zeros(0, np.int64), strict=True)
    assert_array_equal(a.difficult, np.zeros(0, bool), strict=True)


@pytest.mark.parametrize("text, names", [
    (b"\xef\xbb\xbfb\r\na\r\n", ["b", "a"]),                        # byte order mark, CRLF
    (b"\n  b  1\n\na -1", ["b", "a"]),                              # second column, blank lines, no newline at the end
])
def test_image_set_files_of_other_systems(voc, text, names):
    folder = voc(a=b"\xef\xbb\xbf" + annotation(item("x", (1, 1, 5, 5))).replace("><", ">\r\n<").encode(), b=annotation())
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(text)
    assert read_split(folder, "train") == names
    examples, classes = read_voc(folder, "train")
    assert [e.name for e in examples] == names and classes == ("x",)


def test_annotations_in_other_encodings(voc):
    text = annotation(item("Käfer", (1, 1, 5, 5)))
    folder = voc(a=text.encode("utf-16"), b=('<?xml version="1.0" encoding="ISO-8859-1"?>' + text).encode("latin-1"))
    assert read_voc(folder, "train")[1] == ("Käfer",)


def test_lists_of_one_class_are_no_splits(voc):
    folder = voc(a=annotation())
    for name in ("val", "trainval", "dog_train", "dog_val", "dining_table_val", "no_such"):
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("a  1\n")
    assert splits(folder) == ["no_such", "train", "trainval", "val"]


def test_sets_named_after_another_are_splits(voc):
    folder = voc(a=annotation(), b=annotation())
    for name, text in (("fold_train", "a\nb\n"), ("my_val", "\na"), ("val", "b"), ("a_val", "a 1\nb 2\n"), ("dog_val", "\na  0\nb -1\n")):
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    assert splits(folder) == ["a_val", "fold_train", "my_val", "train", "val"]
    assert [e.name for e in read_voc(folder, "my_val")[0]] == ["a"] and read_split(folder, "dog_val") == ["a", "b"]


def test_names_of_images_hold_spaces(voc):
    names = ["a", "a b", "a  1", "a 2"]
    folder = voc(**{name: annotation(item(str(i), (1, 1, 5, 5))) for i, name in enumerate(names)})
    examples, classes = read_voc(folder, "train")
    assert [e.name for e in examples] == names and [classes[k] for e in examples for k in e.labels] == list("0123")
    (folder / "ImageSets" / "Main" / "dog_train.txt").write_text("a b  1\na -1\na 2  0\n")
    assert read_split(folder, "dog_train") == ["a b", "a", "a 2"]


@pytest.mark.parametrize("text, message", [
    ("<annotation><object>", "a.xml must be plain XML, got: no element found"),
    ("", "a.xml must be plain XML, got: no element found"),
    ("<annotation>&who;</annotation>", "a.xml must be plain XML, got: undefined entity"),
    (b"<annotation>\xff</annotation>", "a.xml must be plain XML, got: not well-formed"),
    ('<?xml version="1.0" encoding="gbk"?><annotation/>', "a.xml must be plain XML, got: multi-byte encodings"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "a.xml must be plain XML, got: unknown encoding: klingon"),
    ('<!DOCTYPE a SYSTEM "http://localhost/a.dtd"><annotation/>', "a.xml must be plain XML, got: a document type"),
    ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "a.xml must be plain XML, got: a document type"),
    ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'.encode("utf-16"), "a.xml must be plain XML, got: a document type"),
    (annotation(size=(30, 40)), "a.xml: <size> must be that of the image, 40x30, got 30x40"),
    (annotation(size=("", 30)), "a.xml: <size><width> must be a finite number, got ''"),
    ("<annotation><size><width>40</width></size></annotation>", "a.xml: <size><height> must be a finite number, got ''"),
    (annotation(item("x", ("nan", 1, 2, 3))), "a.xml: <bndbox><xmin> must be a finite number, got 'nan'"),
    (annotation(item("x", (1, 1, 2, "1e999"))), "a.xml: <bndbox><ymax> must be a finite number, got '1e999'"),
    (annotation(item("x", (1, "one", 2, 3))), "a.xml: <bndbox><ymin> must be a finite number, got 'one'"),
    (annotation(item("x", (1, 1, 2))), "a.xml: <bndbox><ymax> must be a finite number, got ''"),
    (annotation(item("  ", (1, 1, 2, 2))), "a.xml: each <object> must have a <name> and a <bndbox>, got one without"),
    (annotation("<object><name>x</name><part><bndbox/></part></object>"), "each <object> must have a <name> and a <bndbox>"),
    (annotation(item("x", (1, 1, 5, 5)), item("dog", (1, 1, 5, 5)), item("bee", (1, 1, 5, 5))),
     "a.xml: the class of an object must be one of cat, dog, got bee, x"),
])
def test_errors_name_the_annotation_and_the_place(voc, text, message):
    with pytest.raises(ValueError, match=r"^data\.read_voc: .*Annotations.*a\.xml") as caught:
        read_voc(voc(a=text), "train", ["cat", "dog"])
    assert message in str(caught.value)


def test_a_part_of_an_object_is_no_object(voc):
    """VOC's person layout: <part> has a name and a box of its own."""
    whole = item("person", (3, 3, 20, 20)).replace("</object>", item("head", (5, 5, 9, 9)).replace("object", "part") + "</object>")
    (a,), classes = read_voc(voc(a=annotation(whole)), "train")
    assert classes == ("person",)
    assert_array_equal(a.boxes, [[2, 2, 20, 20]])


def test_errors_name_the_missing_file_and_what_exists(voc):
    folder = voc(a=annotation(), b=annotation())
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    (folder / "ImageSets" / "Main" / "cat_val.txt").write_text("a 1\n")
    with pytest.raises(FileNotFoundError, match=r'^data\.read_split: there is no .*test\.txt; image sets here: train, val \(and "all": every annotation\)$'):
        read_voc(folder, "test")
    (folder / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"^data\.read_voc: there is no .*JPEGImages.b\.jpg"):
        read_voc(folder, "train")
    (folder / "Annotations" / "b.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"^data\.read_voc: there is no .*Annotations.b\.xml$"):
        read_voc(folder, "train")
    with pytest.raises(FileNotFoundError, match=r"^data\.read_split: a VOC folder must hold Annotations/.* got .*JPEGImages$"):
        read_voc(folder / "JPEGImages", "train")


@pytest.mark.parametrize("text, message", [
    (b"a\nb\na\n", r"data\.read_split: image set train of .* must name each image once, got a more than once"),
    (b"\n \n", r"data\.read_split: image set train of .* must name at least one image, got none"),
    (b"", r"data\.read_split: image set train of .* must name at least one image, got none"),
    (b"\xff\xfe\xff", r"data\.read_split: .*train\.txt must be UTF-8 text, got: "),
])
def test_errors_of_image_sets(voc, text, message):
    folder = voc(a=annotation(), b=annotation())
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(text)
    with pytest.raises(ValueError, match="^" + message):
        read_voc(folder, "train")


def test_an_image_that_is_none_is_named(voc):
    folder = voc(a=annotation())
    (folder / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^data\.read_voc: .*a\.jpg must be a readable image, got: "):
        read_voc(folder, "train")


# Images

def test_read_image_of_every_kind(tmp_path):
    rgb = noise(7, 5)

    def saved(image, ending="png", **options):
        image.save(path := tmp_path / f"a.{ending}", **options)
        return read_image(path)
    assert_array_equal(saved(Image.fromarray(rgb)), rgb, strict=True)
    assert_array_equal(saved(Image.fromarray(rgb[..., 0])), np.stack([rgb[..., 0]] * 3, 2), strict=True)
    assert_array_equal(saved(Image.fromarray(np.dstack([rgb, rgb[..., 0]]))), rgb, strict=True)         # RGBA: alpha is left out
    assert_array_equal(saved(Image.fromarray(np.dstack([rgb, rgb[..., 0]])[..., 2:])), np.stack([rgb[..., 2]] * 3, 2), strict=True)
    assert_array_equal(saved(Image.fromarray(rgb[..., 0] > 127)), np.stack([(rgb[..., 0] > 127) * np.uint8(255)] * 3, 2), strict=True)
    palette = Image.fromarray(rgb).quantize(256)
    assert_array_equal(saved(palette), np.asarray(palette.convert("RGB")), strict=True)
    assert_array_equal(saved(palette, transparency=bytes(range(35))), np.asarray(palette.convert("RGB")), strict=True)
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7), np.uint16)
    for ending in ("png", "tif"):                                   # 16 bits: the upper byte
        assert_array_equal(saved(Image.fromarray(deep), ending), np.stack([deep >> 8] * 3, 2).astype(np.uint8), strict=True)


def test_read_image_errors_name_the_file(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(FileNotFoundError, match=r"^data\.read_image: there is no file .*a\.jpg$"):
        read_image(path)
    Image.fromarray(noise(64, 64)).save(path)
    whole = path.read_bytes()
    for cut in (0, 10, 300, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"^data\.read_image: .*a\.jpg must be a readable image, got: "):
            read_image(path)
    with pytest.raises(ValueError, match=r"^data\.read_image: .* must be a readable image, got: "):
        read_image(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"junk" * 20)
    with pytest.raises(ValueError, match=r"^data\.read_image: .*a\.png must be a readable image, got: "):
        read_image(tmp_path / "a.png")


def test_the_cache_is_bounded_and_drops_what_was_unused_longest(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(10, 10, i)).save(path)
    cache = images.Cache()
    monkeypatch.setattr(images, "CACHE_BYTES", 700)                   # two images of 300
    first = cache(paths[0])
    cache(paths[1])
    assert cache(paths[0]) is first
    cache(paths[2])
    assert list(cache) == [paths[0], paths[2]] and cache.size == 600
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    assert_array_equal(cache(paths[1]), noise(10, 10, 1))
    assert list(cache) == [paths[1]] and cache.size == 300


# Splitting

def examples_of(images):
    return [Example(str(i), image, (image.shape[1], image.shape[0]), np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool))
            for i, image in enumerate(images)]


def twins(n, pairs):
    """n examples of unlike images, but for the given pairs, which are alike up to a little noise."""
    images = [pattern(i) for i in range(n)]
    for a, b in pairs:
        images[b] = (images[a].astype(int) + np.random.default_rng(b).integers(-3, 4, images[a].shape)).clip(0, 255).astype(np.uint8)
    return examples_of(images)


def names(examples):
    return [int(e.name) for e in examples]


def test_near_identical_finds_pairs_and_chains():
    assert near_identical(twins(8, [(1, 6), (2, 3)])) == [[0], [1, 6], [2, 3], [4], [5], [7]]
    assert near_identical(twins(6, [(0, 4), (0, 2)])) == [[0, 2, 4], [1], [3], [5]]
    assert near_identical([]) == []
    assert near_identical(twins(4, []), bits=256) == [[0, 1, 2, 3]]


def test_near_identical_is_the_definition(monkeypatch):
    """Connected components of "at most 20 of 256 bits differ", also when a late image joins two groups."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        hashes = np.cumsum(rng.random((9, 256)) < rng.choice([0.02, 0.05, 0.08, 0.3], (9, 1)), 0)[rng.permutation(9)] % 2 == 1
        near = (hashes[:, None] != hashes).sum(2) <= 20
        while (step := near @ near).sum() > near.sum():
            near = step
        monkeypatch.setattr(data, "difference_hash", lambda i: hashes[i[0, 0, 0]])
        found = near_identical([Example("", np.full((1, 1, 3), i), (), None, None, None) for i in range(9)])
        assert [list(map(int, g)) for g in found] == [list(g) for g in dict.fromkeys(tuple(np.flatnonzero(row)) for row in near)]


@given(seed=seeds, fraction=st.sampled_from([0.1, 0.25, 0.5, 0.8]))
def test_hold_out_is_seeded_disjoint_complete_and_keeps_order_and_pairs(seed, fraction):
    examples = TWINS
    rest, held = hold_out(examples, fraction, seed)
    assert sorted(names(rest) + names(held)) == list(range(12))
    assert names(rest) == sorted(names(rest)) and names(held) == sorted(names(held))
    assert all({a, b} <= set(names(held)) or not {a, b} & set(names(held)) for a, b in [(1, 9), (4, 5), (6, 11)])
    assert round(fraction * 12) <= len(held) <= round(fraction * 12) + 1
    assert names(hold_out(examples, fraction, seed)[1]) == names(held)


TWINS = twins(12, [(1, 9), (4, 5), (6, 11)])


def test_hold_out_depends_on_the_seed():
    assert len({tuple(names(hold_out(TWINS, 0.25, seed)[1])) for seed in range(20)}) > 10
    assert names(hold_out(TWINS, 0.25)[1]) == names(hold_out(TWINS, 0.25, 0)[1])


@pytest.mark.parametrize("n, pairs, fraction, told", [
    (4, [], 0.0, "fraction 0.0 of 4 images in 4 groups"), (4, [], 1.0, "fraction 1.0 of 4 images in 4 groups"),
    (4, [], -0.5, "fraction -0.5 of 4 images"), (4, [], 1.5, "fraction 1.5 of 4 images"), (4, [], 0.1, "fraction 0.1 of 4 images"),
    (1, [], 0.5, "fraction 0.5 of 1 images"), (0, [], 0.5, "fraction 0.5 of 0 images in 0 groups"),
    (2, [(0, 1)], 0.5, "fraction 0.5 of 2 images in 1 groups"),
])
def test_hold_out_errors(n, pairs, fraction, told):
    with pytest.raises(ValueError, match=r"^data\.hold_out: both parts must hold an image, got " + told):
        hold_out(twins(n, pairs), fraction)


# What a net sees

@given(seed=seeds, left=st.integers(-9, 14), top=st.integers(-9, 12), width=st.integers(1, 16), height=st.integers(1, 16))
def test_view_at_scale_1_is_slicing(seed, left, top, width, height):
    image, fill = noise(11, 8, seed), 77
    padded = np.full((60, 60, 3), fill, np.uint8)
    padded[20:28, 20:31] = image
    found = view(image, left, top, 1.0, width, height, fill)
    assert_array_equal(found, padded[20 + top:20 + top + height, 20 + left:20 + left + width], strict=True)


@pytest.mark.parametrize("W, H, scale", [(40, 30, 0.5), (40, 30, 0.1), (21, 14, 2), (12, 9, 5 / 3), (33, 27, 1 / 3), (640, 480, 0.05)])
def test_view_of_the_whole_image_is_pillows_resize(W, H, scale):
    image, size = noise(W, H), (round(W * scale), round(H * scale))
    expected = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    assert_array_equal(view(image, 0, 0, scale, *size, 0), expected, strict=True)


@given(left=st.floats(-60, 90), top=st.floats(-60, 90), scale=st.floats(0.25, 4), width=st.integers(1, 40), height=st.integers(1, 40))
def test_view_is_the_definition(left, top, scale, width, height):
    """A pixel of the view spans 1/scale pixels of the image, from left + column/scale: a ramp shows where it was read."""
    W, H, fill = 70, 55, 255
    image = np.zeros((H, W, 3), np.uint8)
    image[..., 0], image[..., 1] = 3 * np.arange(W), 4 * np.arange(H)[:, None]
    found = view(image, left, top, scale, width, height, fill)
    assert found.shape == (height, width, 3) and found.dtype == np.uint8
    reach = max(1, 1 / scale) + 0.5                                 # of the filter, in the image
    inside = []
    for start, side, n in ((left, W, width), (top, H, height)):
        a, b = start + np.arange(n) / scale, start + (np.arange(n) + 1) / scale
        inside.append(((a >= 0) & (b <= side), (a < -1e-5) | (b > side + 1e-5), (a + b) / 2, side))
    (in_x, out_x, x, _), (in_y, out_y, y, _) = inside
    assert (found[out_y] == fill).all() and (found[:, out_x] == fill).all()
    read = found[in_y][:, in_x]
    assert (read[..., 2] == 0).all()
    for channel, centre, side, slope, axis in ((0, x[in_x], W, 3, 0), (1, y[in_y], H, 4, 1)):
        far = (centre > reach) & (centre < side - reach)            # from the border, where the ramp ends
        value = np.compress(far, read[..., channel], 1 - axis).astype(float)
        expected = slope * (centre[far] - 0.5)
        assert_allclose(value, np.broadcast_to(expected if axis == 0 else expected[:, None], value.shape), rtol=0, atol=1)


@pytest.mark.parametrize("scale", [0.27193743, 0.5, 0.68357456, 1, 1.170318, 1.7, 2, 3.3])
@pytest.mark.parametrize("frame", [0, 3, 7, 100])
def test_a_frame_of_whole_pixels_is_exact(scale, frame):
    """frame / scale * scale may exceed frame by a bit: no row or column of the image may be lost to it."""
    found = view(np.zeros((60, 60, 3), np.uint8), -frame / scale, -frame / scale, scale, 2 * frame + 300, 2 * frame + 300, 255)
    side = math.floor(60 * scale + 1e-6)
    expected = np.full((2 * frame + 300, 2 * frame + 300, 3), 255)
    expected[frame:frame + side, frame:frame + side] = 0
    assert_array_equal(found, expected)


def test_a_view_that_leaves_the_image_by_rounding_only_is_whole():
    for by in (5e-7, -5e-7):
        for W, H in ((8, 3), (3, 8)):
            assert_array_equal(view(noise(W, H), by, by, 1, W, H, 0), noise(W, H))


@pytest.mark.parametrize("left, top", [(100, 0), (0, 100), (-100, 0), (0, -100), (40, 0), (0, 30), (-20, 0), (0, -20)])
def test_a_view_outside_is_fill(left, top):
    assert_array_equal(view(noise(40, 30), left, top, 1, 20, 20, 9), np.full((20, 20, 3), 9, np.uint8), strict=True)


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1, 1.5, 2, 3.3])
@pytest.mark.parametrize("left, top", [(0, 0), (7.5, 3.25), (-10, -6.5), (20, 30)])
def test_a_box_lands_where_the_arithmetic_says(scale, left, top):
    image = np.zeros((100, 120, 3), np.uint8)
    box = np.array([40, 48, 88, 72])
    image[box[1]:box[3], box[0]:box[2]] = 255
    ys, xs = np.nonzero(view(image, left, top, scale, 420, 420, 0)[..., 0] > 127)
    edges = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert np.abs(edges - (box - [left, top, left, top]) * scale).max() <= 0.5 + 1e-6


@given(boxes=random_boxes())
def test_flip_mirrors_and_twice_is_the_identity(boxes):
    image = noise(13, 6)
    mirrored, moved = flip(image, boxes)
    assert_array_equal(mirrored, [[row[x] for x in range(12, -1, -1)] for row in image])
    assert_array_equal(moved, np.reshape([[13 - x2, y1, 13 - x1, y2] for x1, y1, x2, y2 in boxes], (-1, 4)))
    again, back = flip(mirrored, moved)
    assert_array_equal(again, image)
    assert_array_equal(back, boxes)


def test_flip_takes_a_box_with_its_content():
    image = np.zeros((10, 12, 3), np.uint8)
    image[2:5, 1:4] = 1
    mirrored, ((x1, y1, x2, y2),) = flip(image, np.array([[1, 2, 4, 5]]))
    assert mirrored[y1:y2, x1:x2].all() and mirrored.sum() == image.sum()


def test_mean_std():
    images = [noise(16, 12, i) for i in range(3)]
    pixels = np.concatenate([i[::4, ::4].ravel() for i in images[:2]]).tolist()
    mean = sum(pixels) / len(pixels)
    std = math.sqrt(sum((p - mean) ** 2 for p in pixels) / len(pixels))
    assert_allclose(mean_std(examples_of(images), most=2), [mean, std], rtol=1e-12)
    assert mean_std(examples_of([np.full((8, 8, 3), 7, np.uint8)])) == (7.0, 1.0)       # one colour: nothing to divide by


# Real data: TINYDET_DATA names the folder that holds bccd/ and playing-cards/

@pytest.mark.parametrize("split, images, RBC, WBC, platelets, degenerate", [
    ("train", 205, (2382, 197), (214, 204), (209, 117), 0), ("val", 87, (968, 83), (87, 86), (83, 45), 0),
    ("test", 72, (805, 69), (71, 68), (69, 39), 0), ("all", 364, (4155, 349), (372, 358), (361, 201), 2)])
def test_bccd_counts_as_its_readme_says(split, images, RBC, WBC, platelets, degenerate):
    folder = real("bccd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples, classes = read_voc(folder, split)
    dropped = sum(int(str(w.message).split(": ")[2].split()[0]) for w in caught)
    assert classes == ("Platelets", "RBC", "WBC") and len(examples) == images
    assert not any(e.difficult.any() for e in examples) and {e.size for e in examples} == {(640, 480)}
    counts = [(sum((e.labels == k).sum() for e in examples), sum((e.labels == k).any() for e in examples)) for k in range(3)]
    assert counts[0] == platelets and counts[2] == WBC and counts[1][1] == RBC[1]
    assert counts[1][0] + dropped == RBC[0]                         # README counts the two RBC boxes without area
    assert split != "all" or dropped == degenerate


def test_near_identical_finds_the_six_pairs_of_the_cards():
    folder = real("playing-cards")
    examples, classes = read_voc(folder, "train")
    assert len(examples) == 296 and sum(len(e.boxes) for e in examples) == 527
    assert {"train", "test"} <= set(splits(folder)) <= {"train", "test", "trainval", "val"}
    counts = {c: sum((e.labels == k).sum() for e in examples) for k, c in enumerate(classes)}
    assert counts == {"nine": 89, "ten": 82, "jack": 89, "queen": 80, "king": 95, "ace": 92}
    pairs = {frozenset(examples[i].name for i in g) for g in near_identical(examples) if len(g) > 1}
    assert pairs == {frozenset(p) for p in [("IMG_2464", "IMG_2465"), ("IMG_2466", "IMG_2467"), ("IMG_2468", "IMG_2469"),
                                            ("IMG_2471", "IMG_2472"), ("IMG_2473", "IMG_2474"), ("cam_image1", "cam_image54")]}
    rest, held = hold_out(examples, 0.2)
    held = {e.name for e in held}
    assert len(rest) + len(held) == 296 and 59 <= len(held) <= 60
    assert all(len(p & held) in (0, 2) for p in pairs)
