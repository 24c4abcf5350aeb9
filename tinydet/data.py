"""Images with boxes: one record for every source, readers of VOC, YOLO, COCO, IDX and class folders, splits, and the crops that
training sees. `python -m tinydet.data FOLDER` reports a data set (tinydet/report.py).
"""
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from tinydet import coco_folder, folders, idx, voc, yolo
from tinydet.images import read_image  # noqa: F401
from tinydet.records import DefectWarning, Example  # noqa: F401
from tinydet.voc import read_split  # noqa: F401

LAYOUTS = {"VOC": voc, "YOLO": yolo, "COCO": coco_folder, "IDX": idx, "class folders": folders}


# Readers

def read(folder, split, classes=None):
    """Read one split of a data set whose layout is recognised: see read_voc, read_yolo, read_coco, read_idx and read_folders.

    split: a name that splits(folder) lists; "all" reads everything. classes: names in label order; None takes those of the data
    set. Returns a list of Example and the tuple of class names. What is harmless is dropped or changed, and counted in one
    DefectWarning, whose `found` holds the places. Raises FileNotFoundError for what is missing, ValueError naming file and place
    for what cannot be read or trusted, and for a folder of several layouts or of none.
    """
    return _told("read", folder, split, layout(folder).read(folder, split, classes))


def splits(folder):
    """Names of the splits of a data set of any layout, sorted; empty if it is not split. Raises as read for an unknown layout."""
    return layout(folder).splits(folder)


def read_voc(folder, split, classes=None):
    """Read a PASCAL VOC folder: Annotations/*.xml, JPEGImages/*, ImageSets/Main/<split>.txt.

    split: name of an image set; "all" reads every annotation. classes: names in label order; None derives them, sorted, from
    the boxes read. VOC counts pixels from 1 with both ends inside: (xmin - 1, ymin - 1, xmax, ymax) is the continuous box.
    A box with xmax <= xmin or ymax <= ymin is degenerate and dropped; one that leaves the image is cut at its border, and
    dropped if nothing is left; one that repeats another of its class is dropped. All are counted in one warning.
    Returns a list of Example in the order of the image set, and the tuple of class names.
    Raises FileNotFoundError for missing files, ValueError naming file and place for what cannot be read or trusted.
    """
    return _told("read_voc", folder, split, voc.read(folder, split, classes))


def read_yolo(folder, split, classes=None):
    """Read a YOLO folder: images and, in a folder labels/ in place of images/, a text file for each.

    Images lie in images/, images/<split>/ or <split>/images/. split: the name of a list sets/<split>.txt, of train.txt,
    trainval.txt, val.txt, valid.txt or test.txt (a line is a name below images/, or the path of an image from the folder), or of a
    folder; "all" reads every image. Class names: classes.txt, labels/classes.txt or *.names, one a line (a data.yaml is not read).
    classes: label order; without a file of names, the names themselves.
    A line of a label file is `class x_centre y_centre width height`, relative to the image, in 0..1 (by 0.01 beyond it for rounding);
    confidences and polygons are errors. Corners up to one pixel outside are rounding and are cut in silence (CHOICE); further out
    the cut is counted. A missing label file means no objects (CHOICE, counted), an empty one too. A label file without image,
    anywhere below the label folders, is an error. Sub-folders of a split are read too.
    Returns and raises as read. Order: that of the list, else by name.
    """
    return _told("read_yolo", folder, split, yolo.read(folder, split, classes))


def read_coco(folder, split, classes=None):
    """Read a COCO folder: annotations/instances_<split>.json or annotations/<split>.json, instances_<split>.json beside the
    images, or <split>/_annotations.coco.json (one in the folder itself is "train").

    Images lie in <split>/, images/<split>/, images/, the folder itself or JPEGImages/: the first of them that holds the first image;
    those of a _annotations.coco.json beside it. Classes: the categories, by id. Crowd annotations are difficult.
    Corners up to one pixel outside are cut in silence, as by read_yolo.
    Returns and raises as read; what is wrong in the JSON is told by coco.annotations.
    """
    return _told("read_coco", folder, split, coco_folder.read(folder, split, classes))


def read_idx(folder, split, classes=None):
    """Read IDX files, <split>-images-idx3-ubyte.gz and <split>-labels-idx1-ubyte.gz; "test" also reads those called t10k.

    Images stay grey until Example.image() repeats the channel; their labels are the Examples' tags. Classes: classes.txt, else the
    digits "0".."9" and on. Magic number, counts and sizes are checked before memory is taken, then the length and the checksum.
    Returns and raises as read.
    """
    return _told("read_idx", folder, split, idx.read(folder, split, classes))


def read_folders(folder, split, classes=None):
    """Read images in one folder a class, <split>/<class>/ or, with split "all", <class>/ alone. Labels are the Examples' tags.

    Classes: the names of the class folders of all splits, sorted. Files that are no images are counted in the warning. Folders called
    images, labels, annotations and the like, or with text files beside the images, are no classes: such a set is of another layout.
    Returns and raises as read.
    """
    return _told("read_folders", folder, split, folders.read(folder, split, classes))


def layout(folder):
    """The module that reads a folder. Raises FileNotFoundError, or ValueError saying what was looked for unless one layout is there."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"data.read: there is no folder {folder}")
    found = [name for name, module in LAYOUTS.items() if module is not folders and module.found(folder)]
    found = found or ["class folders"] * folders.found(folder)
    if len(found) != 1:
        advice = "; call read_voc, read_yolo, read_coco or read_idx" * bool(found)
        raise ValueError(f"data.read: {folder} must hold one layout of " + "; ".join(m.LOOKS_LIKE for m in LAYOUTS.values())
                         + f". Got {' and '.join(found) or 'none'}{advice}")
    return LAYOUTS[found[0]]


def _told(reader, folder, split, result):
    """Examples and classes of a reader's result; its defects are told in one warning that points at the caller's caller."""
    examples, classes, defects = result
    if defects:
        found = "; ".join(f"{len(where)} {what} (first in {where[0]})" for what, where in sorted(defects.items()))
        warnings.warn(DefectWarning(f"data.{reader}: {Path(folder)}, {split}: {found}", dict(defects)), stacklevel=3)
    return examples, classes


# Splitting

def hold_out(examples, fraction, seed=0):
    """Split off a seeded part for validation: returns (rest, held out), each in the order given.

    Near-identical images (256-bit difference hash, at most 20 bits apart) stay on one side: consecutive shots of a scene
    would make the held-out figure too good. The part is the first that holds round(fraction * len(examples)) images.
    Raises ValueError unless 0 < fraction < 1 and both parts get an image.
    """
    groups = near_identical(examples)
    wanted, held = round(fraction * len(examples)), set()
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) >= wanted:
            break
        held.update(groups[group])
    if not 0 < len(held) < len(examples):
        raise ValueError(f"data.hold_out: both parts must hold an image, got fraction {fraction} of {len(examples)} images "
                         f"in {len(groups)} groups")
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def near_identical(examples, bits=20):
    """Groups (lists of indices) of examples whose difference hashes are linked by steps of at most `bits` of 256 bits."""
    return linked(np.array([difference_hash(e.image()) for e in examples]).reshape(len(examples), 256), bits)


def linked(hashes, bits=20):
    """Groups (lists of indices) of hashes, (N, 256) bool, linked by steps of at most `bits` bits."""
    group = np.arange(len(hashes))
    for i, h in enumerate(hashes):
        for j in np.flatnonzero((hashes[:i] != h).sum(1) <= bits):
            group[group == group[j]] = group[i]
    return [list(np.flatnonzero(group == g)) for g in dict.fromkeys(group)]


def difference_hash(image):
    """256 bits, (256,) bool, that say where an image (H, W, 3) brightens from left to right."""
    small = np.asarray(Image.fromarray(image).convert("L").resize((17, 16), Image.Resampling.BILINEAR), int)
    return (small[:, 1:] > small[:, :-1]).ravel()


# What a net sees of an image

def view(image, left, top, scale, width, height, fill):
    """Cut and resize in one step (bilinear, antialiased): width x height pixels of the image enlarged `scale` times.

    Pixel (0, 0) of the result lies at (left, top) in the image; what lies outside the image is `fill`.
    image: uint8 (H, W, 3). Returns uint8 (height, width, 3).
    """
    H, W = image.shape[:2]
    x0, x1 = max(0, math.ceil(-left * scale - 1e-6)), min(width, math.floor((W - left) * scale + 1e-6))
    y0, y1 = max(0, math.ceil(-top * scale - 1e-6)), min(height, math.floor((H - top) * scale + 1e-6))
    out = np.full((height, width, 3), fill, np.uint8)
    if x1 > x0 and y1 > y0:
        box = np.array([left + x0 / scale, top + y0 / scale, left + x1 / scale, top + y1 / scale]).clip(0, (W, H, W, H))
        piece = Image.fromarray(image).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=tuple(box))
        out[y0:y1, x0:x1] = np.asarray(piece)
    return out


def flip(image, boxes):
    """Mirror an image (H, W, 3) left to right, and its boxes (R, 4) with it: (x1, x2) -> (W - x2, W - x1)."""
    return image[:, ::-1], np.stack([image.shape[1] - boxes[:, 2], boxes[:, 1], image.shape[1] - boxes[:, 0], boxes[:, 3]], 1)


def mean_std(examples, most=50):
    """Scalar mean and standard deviation of the pixels (0..255) of the first `most` images, at least one, for normalising as OverFeat did.

    Of every fourth pixel each way. A standard deviation below 1 counts as 1: nothing to divide by.
    """
    pixels = np.concatenate([e.image()[::4, ::4].ravel() for e in examples[:most]]).astype(np.float64)
    return float(pixels.mean()), max(1.0, float(pixels.std()))


if __name__ == "__main__":
    from tinydet import report
    sys.exit(report.main())
