"""Damaged input of every kind ends in one clear error that names the file; and 20,000 random damages of real files (marked slow)."""
import contextlib
import gzip
import io
import json
import os
import random
import re
import signal
import struct
import time
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from test_readers import coco_json, idx_bytes, picture, put, write
from tinydet import data, files, images, records
from tinydet.models import overfeat

STARTS = ("data.read: ", "data.read_voc: ", "data.read_split: ", "data.read_yolo: ", "data.read_coco: ", "data.read_idx: ",
          "data.read_folders: ", "data.read_image: ", "coco.annotations: ", "files.read_arrays: ", "overfeat.load: ",
          "layers.load: ")


def told(error, name):
    """Is it one line that begins with the function and names the file?"""
    text = str(error)
    return text.startswith(STARTS) and name in text and "\n" not in text and (len(text) < 3000 or "files." in text)      # it quotes zipfile


def png(W, H):
    """A small file whose header claims W x H."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000)))
            + chunk(b"IEND", b""))


def jpeg(W=40, H=30, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


def taller(content):
    """A JPEG whose header claims twice the height of its data."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">H", 2 * struct.unpack(">H", content[at:at + 2])[0]) + content[at + 2:]


def turned(W, H):
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(W, H, exif=exif)


def boxed(name="cat", x1=1, y1=1, x2=9, y2=9, more=""):
    return (f"<object><name>{name}</name>{more}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
            "</object>")


def xml(inner=""):
    return f"<annotation>{inner}</annotation>"


def bomb():
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    return f'<!DOCTYPE a [<!ENTITY e0 "lol">{entities}]><annotation>&e9;</annotation>'


def record(**changes):
    value = coco_json()
    for key, change in changes.items():
        value[key] = change(value[key])
    return json.dumps(value)


def first(**changes):
    return lambda rows: [rows[0] | changes, *rows[1:]]


def folder_there(path):
    path.unlink()
    path.mkdir()


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


A, LIST, LABEL, JSON = "Annotations/a.xml", "ImageSets/Main/train.txt", "labels/a.txt", "annotations/instances_train.json"
PIXELS, Y = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
DAMAGE = [  # layout, file that is damaged, its new content or what is done to it (None: deleted), what the error says
    # VOC
    ("voc", A, None, "there is no file"),
    ("voc", A, "", "must be plain XML, got: no element found"),
    ("voc", A, "<annotation><object>", "must be plain XML"),
    ("voc", A, xml() + "<annotation/>", "must be plain XML, got: junk after document element"),
    ("voc", A, bomb(), "got: a document type, where entities are declared"),
    ("voc", A, bomb().encode("utf-16"), "got: a document type, where entities are declared"),
    ("voc", A, '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "got: a document type"),
    ("voc", A, "<annotation>" + "<a>" * 100_000, "got: elements nested more than 50 deep"),
    ("voc", A, xml("\0"), "must be plain XML, got: not well-formed"),
    ("voc", A, xml("K\u00e4fer").encode("latin-1"), "must be plain XML, got: not well-formed"),
    ("voc", A, "<html/>", "must hold an <annotation>, got <html>"),
    ("voc", A, folder_there, "a folder has this name"),
    ("voc", A, loop, "there is no file"),
    ("voc", A, xml("<size><width>30</width><height>40</height></size>"), "<size> must be that of the image, 40x30, got 30x40"),
    ("voc", A, xml("<size/><size/>"), "<annotation> must hold one <size>, got 2"),
    ("voc", A, xml(boxed(x1="nan")), "<bndbox><xmin> must be a finite number, got 'nan'"),
    ("voc", A, xml(boxed(x2="9" * 400)), "<bndbox><xmax> must be a finite number, got '999"),
    ("voc", A, xml(boxed(x2="1_0")), "<bndbox><xmax> must be a finite number, got '1_0'"),
    ("voc", A, xml(boxed(x2="\u0663")), "<bndbox><xmax> must be a finite number"),
    ("voc", A, xml(boxed(name="")), "each <object> must have a <name> and a <bndbox>"),
    ("voc", A, xml(boxed(more="<name>dog</name>")), "<object> must hold one <name>, got 2"),
    ("voc", A, xml(boxed(more="<bndbox/>")), "<object> must hold one <bndbox>, got 2"),
    ("voc", A, xml(boxed(more="<difficult>maybe</difficult>")), "<difficult> must be 0 or 1, got 'maybe'"),
    ("voc", A, xml(boxed("cow")), "the class of an object must be one of cat, dog, got cow"),
    ("voc", LIST, "a\nb\na\n", "must name each image once, got a more than once"),
    ("voc", LIST, "", "must name at least one image, got none"),
    ("voc", LIST, "../../../etc/passwd\n", "a path must be relative and stay in the folder, got '../../../etc/passwd'"),
    ("voc", LIST, "/etc/passwd\n", "a path must be relative and stay in the folder, got '/etc/passwd'"),
    ("voc", LIST, "x/a\n", "must hold names of images without folders, got x/a"),
    ("voc", LIST, "a\0\n", "must be UTF-8 text, got a NUL byte in line 1"),
    ("voc", LIST, b"\xe4\n", "must be UTF-8 text, got: "),
    ("voc", "JPEGImages/a.jpg", None, "there is no"),
    ("voc", "JPEGImages/a.png", png(40, 30), "must differ in more than the ending, got a.jpg and a.png"),
    # images, by header
    ("voc", "JPEGImages/a.jpg", b"", "must be a readable image, got: cannot identify"),
    ("voc", "JPEGImages/a.jpg", b"no image", "must be a readable image, got: cannot identify"),
    ("voc", "JPEGImages/a.jpg", jpeg()[:100], "must be a readable image, got: "),
    ("voc", "JPEGImages/a.jpg", jpeg(41, 30), "must be that of the image, 41x30, got 40x30"),
    ("voc", "JPEGImages/a.jpg", turned(30, 40), "30x40, got 40x30 (its EXIF rotation is not applied)"),
    ("voc", "JPEGImages/a.jpg", jpeg(kind="EPS"), "must be a readable image, got: cannot identify"),   # Pillow would start Ghostscript
    ("voc", "JPEGImages/a.jpg", folder_there, "must be a readable image"),
    ("yolo", "images/a.jpg", loop, "there is no file"),
    ("voc", "JPEGImages/a.jpg", jpeg()[:2 * len(jpeg()) // 3], "must be a readable image, got: it ends without its end marker"),
    ("voc", "JPEGImages/a.jpg", jpeg(kind="PNG")[:-12], "must be a readable image, got: it ends without its end marker"),
    ("yolo", "images/a.jpg", png(31_000, 10), "31000x10 pixels; the limits are"),
    ("yolo", "images/a.jpg", png(11_000, 10_000), "11000x10000 pixels; the limits are"),
    ("yolo", "images/a.jpg", png(2**31 - 1, 2**31 - 1), "must be a readable image"),
    ("yolo", "images/a.jpg", png(0, 30), "must be a readable image"),
    # images, when decoded
    ("yolo", "images/a.jpg", jpeg()[:-400] + b"\xff\xd9", "must be a readable image, got: image file is truncated"),
    ("yolo", "images/a.jpg", taller(jpeg(64, 64)), "must be a readable image, got: image file is truncated"),
    ("yolo", "images/a.jpg", png(40, 30), "must be a readable image, got: "),
    # YOLO
    ("yolo", LABEL, "0 .5 .5 .2 .2 .9\n", "a.txt, line 1: a line must hold class, x_centre, y_centre, width, height, got 6 (is the last a"),
    ("yolo", LABEL, "\n0 .1 .1 .5 .1 .5 .5\n", "a.txt, line 2: a line must hold class, x_centre, y_centre, width, height, got a polygon"),
    ("yolo", LABEL, "0 .5 .5 .2\n", "a.txt, line 1: a line must hold class, x_centre, y_centre, width, height, got 4"),
    ("yolo", LABEL, "2 .5 .5 .2 .2\n", "a.txt, line 1: the class must be one of 0..1, got 2"),
    ("yolo", LABEL, "-1 .5 .5 .2 .2\n", "a.txt, line 1: the class must be one of 0..1, got -1"),
    ("yolo", LABEL, "0.0 .5 .5 .2 .2\n", "a.txt, line 1: the class must be one of 0..1, got 0.0"),
    ("yolo", LABEL, "9" * 9999 + " .5 .5 .2 .2\n", "a.txt, line 1: the class must be one of 0..1, got 9"),
    ("yolo", LABEL, "0 .5 .5 .2 .2\n0 .5 inf .2 .2\n", "a.txt, line 2: a box must be finite numbers, got 0 .5 inf .2 .2"),
    ("yolo", LABEL, "0 20 15 8 6\n", "a.txt, line 1: a box must be relative to the image, 0..1, got 0 20 15 8 6"),
    ("yolo", LABEL, "0 .5 .5 .2 1.02\n", "a.txt, line 1: a box must be relative to the image, 0..1, got 0 .5 .5 .2 1.02"),
    ("yolo", LABEL, "0 .5 .5 -.2 .2\n", "a.txt, line 1: a box must be relative to the image, 0..1, got 0 .5 .5 -.2 .2"),
    ("yolo", LABEL, b"0 .5 .5 .2 .2\n\xff", "must be UTF-8 text"),
    ("yolo", LABEL, folder_there, "a folder has this name"),
    ("yolo", LABEL, loop, "there is no file"),
    ("yolo", "images/a.jpg", None, "line 1: there is no image a"),
    ("yolo", "sets/train.txt", "../a\n", "sets/train.txt, line 1: a path must be relative and stay in the folder, got '../a'"),
    ("yolo", "sets/train.txt", "b\nC:\\a.jpg\n", "sets/train.txt, line 2: a path must be relative and stay in the folder"),
    ("yolo", "sets/train.txt", "/etc/a.jpg\n", "a path must be relative and stay in the folder, got '/etc/a.jpg'"),
    ("yolo", "sets/train.txt", "a\n" + "x" * 5000, "sets/train.txt, line 2: there is no image xxx"),
    ("yolo", "sets/train.txt", "a\nimages/a.jpg\n", "must name each image once, got a more than once"),
    ("yolo", "sets/train.txt", "\n\n", "must name at least one image, got none"),
    ("yolo", "classes.txt", "cat\n\ndog\n", "classes.txt must name each class once, one a line, got '' in line 2"),
    ("yolo", "classes.txt", "cat\ncat\n", "classes.txt must name each class once, one a line, got 'cat' in line 2"),
    ("yolo", "classes.txt", "\n", "classes.txt must name at least one class, got none"),
    ("yolo", "classes.txt", "cat\n", "a.txt, line 2: the class must be one of 0..0, got 1"),
    # COCO
    ("coco", JSON, "", "must be JSON, got: "),
    ("coco", JSON, record()[:-30], "must be JSON, got: "),
    ("coco", JSON, "[" * 200_000, "nested too deep"),
    ("coco", JSON, record(annotations=first(bbox=[float("nan"), 0, 1, 1])), "must be JSON, got: NaN"),
    ("coco", JSON, record(annotations=first(bbox=[1e300, 0, 1, 1])), "annotations[0]: bbox must be four finite numbers"),
    ("coco", JSON, record(annotations=first(bbox=[0, 0, 1])), "annotations[0]: bbox must be four finite numbers"),
    ("coco", JSON, record(annotations=first(id=2)), "annotations[1]: id must be given once, got 2"),
    ("coco", JSON, record(images=first(id=5)), "images[1]: id must be given once, got 5"),
    ("coco", JSON, record(annotations=first(image_id=99)), "of the 2 images, got 99"),
    ("coco", JSON, record(annotations=first(category_id=99)), "of the 2 categories, got 99"),
    ("coco", JSON, record(categories=first(name="dog")), "categories must differ in their names"),
    ("coco", JSON, record(images=first(file_name="b.jpg")), "must name each image once, got b.jpg more than once"),
    ("coco", JSON, record(images=first(file_name="../../etc/passwd")), "image 7: a path must be relative and stay in the folder"),
    ("coco", JSON, record(images=first(file_name="/etc/passwd")), "image 7: a path must be relative and stay in the folder, got '/etc"),
    ("coco", JSON, record(images=first(file_name="c.jpg")), "there is no image c.jpg in"),
    ("coco", JSON, record(images=first(width=41)), "image 7: width and height must be those of a.jpg, 40x30, got 41x30"),
    ("coco", JSON, record(images=first(height=31)), "image 7: width and height must be those of a.jpg, 40x30, got 40x31"),
    ("coco", JSON, record(images=first(width=0)), "images[0]: width must be"),
    ("coco", JSON, "{}", "images must be a list, got none"),
    ("coco", "train/b.jpg", None, "there is no file"),
    # IDX
    ("idx", PIXELS, b"", "got: "),
    ("idx", PIXELS, b"no gzip file", "got: Not a gzipped file"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)))[:-12], "got: Compressed file ended before the end-of-stream marker"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)))[:-8] + bytes(8), "got: CRC check failed"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), magic=2049), "got: the magic number 2049, not 2051"),
    ("idx", PIXELS, gzip.compress(b"\0\0"), "got: "),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(2**32 - 1, 28, 28)), "got: a declared size of 4294967295x28x28; the limits are"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(10**6, 28, 28)), "got: a declared size of 1000000x28x28, more than"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(100, 28, 28)), "got: a declared size of 100x28x28, more than"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(1, 1, 50_000)), "got: a declared size of 1x1x50000; the limits are"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(0, 6, 4)), "got: a declared size of 0x6x4; the limits are"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(6, 6, 4)), "got: a declared size of 6x6x4, 144 bytes, but 120"),
    ("idx", PIXELS, idx_bytes(np.zeros((5, 6, 4)), shape=(4, 6, 4)), "got: a declared size of 4x6x4, 96 bytes, but more"),
    ("idx", PIXELS, gzip.compress(struct.pack(">4I", 2051, 1, 1, 1) + bytes(10**8)), "a declared size of 1x1x1, 1 bytes, but more"),
    ("idx", Y, idx_bytes(np.zeros(4)), "must hold a label for each of 5 images, got 4"),
    ("idx", Y, None, "there is no file"),
    ("idx", "classes.txt", "a\nb\n", "train-labels-idx1-ubyte.gz: labels must lie in 0..1, got 3 of image 0"),
    # class folders
    ("folders", "train/cat/a.jpg", b"junk", "must be a readable image"),
    ("folders", "train/cat/a.png", png(3, 3), "must differ in more than the ending, got a.jpg and a.png"),
    ("folders", "train/x.jpg", jpeg(), "train must hold images (a class) or folders of images (a split), got both"),
    ("folders", "train/cat/a.txt", "0 .5 .5 .2 .2", "no annotations (.json, .txt, .xml) among them (image folders). Got none"),
    ("folders", "cow/x.jpg", jpeg(), "must hold either classes or splits, got class cow beside split train"),
]


@pytest.mark.parametrize("layout, name, damage, message", DAMAGE, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGE)])
def test_every_damage_is_one_error_that_names_the_file(tmp_path, layout, name, damage, message):
    path = write(tmp_path, layout) / name
    if damage is None:
        path.unlink()
    elif callable(damage):
        damage(path)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    start = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        for e in data.read(tmp_path, "train", None if layout in ("idx", "folders") or name == "classes.txt" else ["cat", "dog"])[0]:
            e.image()
    assert time.perf_counter() - start < 5
    assert message in str(caught.value) and told(caught.value, str(tmp_path)), str(caught.value)
    if name not in ("classes.txt", "JPEGImages/a.png", "train/cat/a.png", "train/x.jpg", "cow/x.jpg", "train/cat/a.txt"):
        assert Path(name).stem.split("_")[0] in str(caught.value)


def test_there_are_at_least_forty_kinds():
    assert len({d[3] for d in DAMAGE}) >= 40


def test_a_label_file_without_image_is_an_error(tmp_path):
    put(write(tmp_path, "yolo"), labels__c_txt="")
    assert len(data.read(tmp_path, "train")[0]) == 2                # the list does not name it
    with pytest.raises(FileNotFoundError, match=r"^data\.read_yolo: .*c\.txt must belong to an image, but there is no .*images/c\.jpg"):
        data.read(tmp_path, "all")
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    (tmp_path / "images").rmdir()                                   # labels alone are a YOLO folder that lacks its images
    with pytest.raises(FileNotFoundError, match=r"labels/a\.txt must belong to an image"):
        data.read(tmp_path, "all")


def test_many_objects_are_not_nested_deep(tmp_path):
    put(write(tmp_path, "voc"), Annotations__a_xml=xml("".join(boxed(x2=9 + i / 9) for i in range(100))))
    assert len(data.read(tmp_path, "train")[0][0].boxes) == 100


def test_a_file_that_changed_after_reading_is_told(tmp_path):
    (a, _), _ = data.read(write(tmp_path, "voc"), "train")
    picture(tmp_path / "JPEGImages" / "a.jpg", 50, 30)
    with pytest.raises(ValueError, match=r"^Example\.image: .*a\.jpg must be 40x30 as when it was read, got 50x30$"):
        a.image()


def test_texts_and_images_have_a_largest_size(tmp_path, monkeypatch):
    write(tmp_path, "yolo")
    monkeypatch.setattr(records, "MOST_TEXT", 100)
    put(tmp_path, labels__a_txt="0 .5 .5 .5 .5\n" * 8)
    with pytest.raises(ValueError, match=r"^data\.read_yolo: .*a\.txt must not be larger than 100 bytes, got more$"):
        data.read(tmp_path, "train")
    put(tmp_path, labels__a_txt="0 .5 .5 .5 .5\n" * 7)
    with pytest.warns(data.DefectWarning, match="6 repeated boxes dropped"):
        data.read(tmp_path, "train")
    monkeypatch.setattr(images, "MOST_PIXELS", 1199)
    with pytest.raises(ValueError, match=r"a\.jpg must be a readable image, got: 40x30 pixels; the limits are 1199 and 30000 a side$"):
        data.read(tmp_path, "train")
    monkeypatch.setattr(images, "MOST_PIXELS", 1200)
    monkeypatch.setattr(images, "LONGEST_SIDE", 39)
    with pytest.raises(ValueError, match=r"40x30 pixels; the limits are 1200 and 39 a side$"):
        data.read_image(tmp_path / "images" / "a.jpg")


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"progressive": True},
                                     {"optimize": True}])
@pytest.mark.parametrize("W, H", [(1, 1), (8, 8), (17, 9), (64, 48), (5, 131)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_whole_jpeg_that_ends_in_grey_is_read(tmp_path, options, W, H, mode):
    a = np.full((H, W, 3), 128, np.uint8)
    a[:H // 2] = np.random.default_rng(0).integers(0, 256, (H // 2, W, 3))
    Image.fromarray(a).convert(mode).save(tmp_path / "a.jpg", **options)
    assert data.read_image(tmp_path / "a.jpg").shape == (H, W, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("cut", [0.5, 0.8, 0.95, 0.99])
def test_a_jpeg_that_lacks_blocks_is_not_read(tmp_path, mode, cut):
    """libjpeg fills them with grey and says nothing."""
    Image.open(io.BytesIO(jpeg(200, 150))).convert(mode).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    data.read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(content[:int(cut * len(content))] + b"\xff\xd9")
    with Image.open(tmp_path / "a.jpg") as image:
        image.load()                                                # Pillow alone accepts it
    with pytest.raises(ValueError, match=r"^data\.read_image: .*a\.jpg must be a readable image, got: image file is truncated"):
        data.read_image(tmp_path / "a.jpg")


def zero_filled(content, share):
    n = int(share * len(content))
    return content[:n] + bytes(len(content) - n)


@pytest.mark.parametrize("kind, message", [("JPEG", "it ends without its end marker"), ("PNG", "it ends without its end marker"),
                                           ("png with its end", "broken PNG file")])
@pytest.mark.parametrize("share", [0.3, 0.67, 0.99])
def test_zeros_in_place_of_the_tail_are_told(tmp_path, kind, message, share):
    content = jpeg(200, 150, kind[:4].strip().upper())
    (tmp_path / "a").write_bytes(zero_filled(content, share) if kind.isupper() else zero_filled(content[:-12], share) + content[-12:])
    with pytest.raises(ValueError, match=rf"^data\.read_image: .*a must be a readable image, got: {message}"):
        data.read_image(tmp_path / "a")


def test_what_follows_the_end_of_an_image_is_no_matter(tmp_path):
    """Telephones append a film, with any bytes; a thumbnail has an end marker of its own."""
    film = b"\xff\xd9" + b"\xff\xda film" * 9999
    for kind in ("JPEG", "PNG"):
        (tmp_path / "a").write_bytes(jpeg(kind=kind) + film)
        assert data.read_image(tmp_path / "a").shape == (30, 40, 3)
    for W, H in ((40, 30), (200, 150)):                             # the thumbnail lies in the tail, and before it
        (tmp_path / "a").write_bytes(jpeg(W, H, exif=b"Exif\0\0" + jpeg(9, 9))[:-2])
        with pytest.raises(ValueError, match="it ends without its end marker"):
            data.read_image(tmp_path / "a")


def test_what_is_odd_but_harmless_is_read_and_counted(tmp_path):
    write(tmp_path, "folders")
    (tmp_path / "train" / "cat" / "r.jpg").write_bytes(turned(30, 40))
    frames = [Image.fromarray(np.full((5, 6, 3), v, np.uint8)) for v in (10, 200)]
    for ending in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / "train" / "dog" / f"f{ending}.{ending}", save_all=True, append_images=frames[1:])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8), "CMYK").save(tmp_path / "train" / "cat" / "c.jpg")
    with pytest.warns(data.DefectWarning) as caught:
        examples, _ = data.read(tmp_path, "train")
    assert caught[0].message.found == {"images with an EXIF rotation, which is not applied": ["r.jpg"],
                                       "images of several pictures, of which the first is used": [
                                           "fgif.gif", "fpng.png", "ftif.tif", "fwebp.webp"]}
    by_name = {e.name.split("/")[-1]: e for e in examples}
    assert by_name["r"].size == (30, 40) and by_name["r"].image().shape == (40, 30, 3)
    assert all(abs(int(by_name[f"f{k}"].image()[0, 0, 0]) - 10) < 4 for k in ("gif", "webp", "png", "tif"))


def test_float_pixels_have_no_known_range(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif must be a readable image, got: floating-point pixels$"):
        data.read_image(tmp_path / "a.tif")


# Random damage

def tokens(content):
    """Where words and numbers of a text begin and end."""
    return [m.span() for m in re.finditer(rb"[\w.+-]+", content)]


def mutate(content, rng):
    """One to three random damages: flipped bytes, truncation, deletion, duplication, and tokens swapped or replaced; zeros
    in place of the tail."""
    b = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind, n = rng.randrange(10), len(b)
        i = rng.randrange(n + 1)
        j = min(n, i + rng.choice((1, 2, 4, 16, 200)))
        if kind == 0 and n:
            for _ in range(rng.choice((1, 1, 4, 20))):
                b[rng.randrange(n)] = rng.randrange(256)
        elif kind == 1 and n:
            b[rng.randrange(n)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del b[i:]
        elif kind == 9:
            b[i:] = bytes(n - i)
        elif kind == 3:
            del b[i:j]
        elif kind == 4:
            b[i:i] = b[i:j]
        elif kind == 5:
            b[i:i] = rng.choice((b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"-1", b"1e999", b"nan", b"<", b"[", b'"', b"\n",
                                 b"\xff\xd9", b"../"))
        elif kind == 6 and n:                                       # the head, where sizes are declared
            k = rng.randrange(min(n, 64))
            b[k:k + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", struct.pack(">I", rng.randrange(2**32))))
        else:
            spans = tokens(bytes(b[:20_000]))
            if len(spans) > 1:
                (p, q), (r, s) = sorted(rng.sample(spans, 2))
                if kind == 7:
                    b[p:s] = b[r:s] + b[q:r] + b[p:q]
                else:
                    b[p:q] = rng.choice((b"", b"0", b"-5", b"99999", b"1e308", b"NaN", b"Infinity", b"9" * 400, b"null", b"name",
                                     b"true"))
    return bytes(b)


class Hang(BaseException):
    """No reader catches it."""


@contextlib.contextmanager
def watched(seconds=5, room=2 << 30):
    """Stop what takes longer, and let fail what takes more memory than the process has now and `room` bytes."""
    def stop(*_):
        raise Hang(f"no answer in {seconds} s")

    resource = pytest.importorskip("resource")
    limit, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, limit[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def sound(folder):
    """Read a set and check it from scratch, pixels included: finite boxes with area inside the image, labels in range, true sizes.
    Returns how many objects were kept or counted as dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples, classes = data.read(folder, "train")
    assert examples and all(issubclass(w.category, data.DefectWarning) for w in caught)
    for e in examples:
        image = e.image()
        assert image.dtype == np.uint8 and image.shape == (e.size[1], e.size[0], 3)
        assert e.boxes.shape == (len(e.labels), 4) and e.boxes.dtype == np.float64 and len(e.difficult) == len(e.labels)
        for (x1, y1, x2, y2), label in zip(e.boxes.tolist(), e.labels.tolist()):
            assert 0 <= x1 < x2 <= e.size[0] and 0 <= y1 < y2 <= e.size[1] and 0 <= label < len(classes)
        assert all(0 <= k < len(classes) for k in e.image_labels().tolist())
    dropped = sum(len(where) for w in caught for what, where in w.message.found.items() if "dropped" in what)
    return len(examples), sum(len(e.boxes) for e in examples) + dropped


def sound_voc(folder):
    _, objects = sound(folder)
    assert objects == sum(len(list(ElementTree.parse(folder / "Annotations" / f"{n}.xml").iter("object"))) for n in "ab")


def sound_yolo(folder):
    count, objects = sound(folder)
    named = [Path(n).stem for n in (folder / "sets" / "train.txt").read_text("utf-8-sig").split()]
    labels = [(folder / "labels" / f"{n}.txt").read_text("utf-8-sig").split("\n") for n in named]
    assert count == len(named) and objects == sum(bool(row.strip()) for rows in labels for row in rows)


def sound_coco(folder):
    found = sound(folder)
    value = json.loads((folder / JSON).read_text("utf-8-sig"))
    assert found == (len(value["images"]), len(value["annotations"]))


def sound_idx(folder):
    count, _ = sound(folder)
    shape = struct.unpack(">4I", gzip.decompress((folder / PIXELS).read_bytes())[:16])[1:]
    assert len(gzip.decompress((folder / PIXELS).read_bytes())) == 16 + np.prod(shape) and shape[0] == count
    assert len(gzip.decompress((folder / Y).read_bytes())) == 8 + count


def sound_arrays(folder):
    arrays, _ = files.read_arrays(folder / "a.npz")
    with np.load(folder / "a.npz") as file:
        listed = json.loads(str(file["meta"]))["arrays"]
    assert {k: (a.dtype.name, list(a.shape)) for k, a in arrays.items()} == {k: (v["dtype"], v["shape"]) for k, v in listed.items()}


def sound_net(folder):
    net, settings = overfeat.load(folder / "o.npz")
    assert isinstance(settings, dict) and all(np.isfinite(a).all() for a in net.arrays().values())


def as_png(content, rng):
    with Image.open(io.BytesIO(content)) as image:
        image.save(file := io.BytesIO(), "PNG")
    return mutate(file.getvalue(), rng)


def inside_gzip(content, rng):
    return gzip.compress(mutate(gzip.decompress(content), rng), 1)


def inside_zip(content, rng):
    """Damage one member of an .npz and pack it again: the checksums are right. Of "meta" the JSON text is damaged."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(["meta.npy", "meta.npy", *old.namelist()])
        for name in old.namelist():
            member = old.read(name)
            if name == chosen == "meta.npy":
                text = mutate(str(np.load(io.BytesIO(member))).encode(), rng).decode(errors="replace")
                np.save(file := io.BytesIO(), np.array(text))
                member = file.getvalue()
            elif name == chosen:
                member = mutate(member, rng)
            new.writestr(name, member)
    return out.getvalue()


def real_files():
    """A few files of the real sets, {layout: [(annotation, image)]}, where TINYDET_DATA names their folder."""
    root = Path(os.environ.get("TINYDET_DATA") or "nowhere")
    found = {"voc": [], "yolo": []}
    for name in ("bccd", "playing-cards"):
        annotations = sorted((root / name / "Annotations").glob("*.xml"))[:3]
        found["voc"] += [(p, root / name / "JPEGImages" / f"{p.stem}.jpg") for p in annotations]
    labels = sorted((root / "apple-orchard" / "labels").glob("*.txt"))[:4]
    found["yolo"] += [(p, root / "apple-orchard" / "images" / f"{p.stem}.jpg") for p in labels]
    return found


def sets(folder):
    """Small sets, made up and (TINYDET_DATA) with a real file as the one to damage: lists of folders by layout."""
    made = {layout: [folder / f"{layout}-made"] for layout in ("voc", "yolo", "coco", "idx", "npz")}
    for layout, (place,) in made.items():
        place.mkdir()
        if layout != "npz":
            write(place, layout)
    files.write_arrays(folder / "npz-made" / "a.npz", {"w": np.arange(12.0).reshape(3, 4), "b": np.zeros(5, np.float32)}, {"steps": 3})
    net = overfeat.OverFeat(overfeat.Spec(("a", "b"), "small", 0.1, "SCR", k=2, background=True, scales=(1.0, 0.5)), np.random.default_rng(0))
    overfeat.save(net, folder / "npz-made" / "o.npz", {"merging": "merge"})
    for layout, pairs in real_files().items():
        for i, (label, image) in enumerate(pairs):
            made[layout].append(place := folder / f"{layout}-{i}")
            place.mkdir()
            write(place, layout)
            (place / (A if layout == "voc" else LABEL)).write_bytes(label.read_bytes())
            (place / ("JPEGImages" if layout == "voc" else "images") / "a.jpg").write_bytes(image.read_bytes())
    if len(made["yolo"]) > 1:                                       # no set here is COCO: the apples, turned into it
        made["coco"].append(place := folder / "coco-0")
        place.mkdir()
        write(place, "coco")
        (a, b), _ = data.read(made["yolo"][1], "train")
        picture(place / "train" / "a.jpg", 320, 320)
        boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in a.boxes.tolist()]
        (place / JSON).write_text(record(images=first(width=320, height=320), annotations=lambda _: [
            {"id": i, "image_id": 7, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0} for i, box in enumerate(boxes)]))
    fashion = Path(os.environ.get("TINYDET_DATA") or "nowhere") / "fashion-mnist"
    if fashion.is_dir():
        made["idx"].append(place := folder / "idx-0")
        place.mkdir()
        with gzip.open(fashion / "t10k-images-idx3-ubyte.gz") as x, gzip.open(fashion / "t10k-labels-idx1-ubyte.gz") as y:
            pixels, labels = np.frombuffer(x.read(16 + 60 * 784)[16:], np.uint8), np.frombuffer(y.read(68)[8:], np.uint8)
        (place / PIXELS).write_bytes(idx_bytes(pixels.reshape(60, 28, 28)))
        (place / Y).write_bytes(idx_bytes(labels))
    return made


PLANS = [  # layout, file, share of 20,000, check, how it is damaged
    ("voc", A, 4000, sound_voc, mutate), ("voc", "JPEGImages/a.jpg", 3500, sound_voc, mutate),
    ("voc", "JPEGImages/a.jpg", 500, sound_voc, as_png), ("voc", LIST, 500, sound, mutate),
    ("yolo", LABEL, 2500, sound_yolo, mutate), ("yolo", "images/a.jpg", 1000, sound_yolo, mutate),
    ("yolo", "sets/train.txt", 500, sound_yolo, mutate),
    ("yolo", "classes.txt", 500, sound_yolo, mutate), ("coco", JSON, 2500, sound_coco, mutate), ("idx", PIXELS, 500, sound_idx, mutate),
    ("idx", PIXELS, 750, sound_idx, inside_gzip), ("idx", Y, 500, sound_idx, mutate), ("idx", Y, 750, sound_idx, inside_gzip),
    ("npz", "a.npz", 500, sound_arrays, mutate), ("npz", "a.npz", 500, sound_arrays, inside_zip),
    ("npz", "o.npz", 500, sound_net, mutate), ("npz", "o.npz", 500, sound_net, inside_zip)]


def damage_many(folder, plans, seed):
    """Damage files again and again, put each in its place and read the set. Returns a line a plan. Raises AssertionError with all
    that is wrong."""
    made, told_of, wrong = sets(folder), [], []
    for layout, name, count, check, damage in plans:
        refused, slowest, start = 0, 0.0, time.perf_counter()
        originals = [(place, (place / name).read_bytes()) for place in made[layout]]
        for i in range(count):
            place, content = originals[i % len(originals)]
            (place / name).write_bytes(damage(content, random.Random(f"{seed} {name} {i}")))
            if name.endswith("jpg"):
                images.cached.pop(str(place / name), None)
            began = time.perf_counter()
            try:
                with watched():
                    check(place)
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                if not told(error, str(place)):
                    wrong.append(f"{name} {damage.__name__} {i}: unclear: {error!r}")
            except BaseException as error:
                wrong.append(f"{name} {damage.__name__} {i}: {error!r}"[:600])
            slowest = max(slowest, time.perf_counter() - began)
            (place / name).write_bytes(content)
        told_of.append(f"{layout} {name} {damage.__name__}: {count} damaged, {refused} refused, slowest {slowest:.2f} s, "
                       f"{time.perf_counter() - start:.0f} s")
        if slowest > 5:
            wrong.append(f"{name}: {slowest:.1f} s")
    assert not wrong, f"{len(wrong)} wrong: " + "\n".join(wrong[:40])
    return told_of


def test_a_few_random_damages(tmp_path):
    damage_many(tmp_path, [(layout, name, 12, check, damage) for layout, name, _, check, damage in PLANS], 1)


@pytest.mark.slow
def test_twenty_thousand_random_damages(tmp_path):
    """No crash, no hang, nothing broken taken as whole; pytest -m slow -s shows the counts."""
    assert sum(plan[2] for plan in PLANS) == 20_000
    print("\n" + "\n".join(damage_many(tmp_path, PLANS, 0)))
