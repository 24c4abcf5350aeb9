"""Annotations and detections in JSON files: COCO's, and those of examples/detect.py. Every field that is used is checked."""
import collections
import dataclasses
import json
import re
import reprlib
import sys
from pathlib import Path

import numpy as np

LARGEST = 1e12                      # of a box's numbers and of an area: products of two stay far from infinity
LARGEST_SIDE = 1_000_000            # of an image, pixels


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The ground truth of a COCO file: images in file order, categories in ascending order of their ids (as pycocotools sorts).

    images: list of (id, file_name, width, height); categories: list of (id, name). Arrays over the A annotations, in file order:
    id int64; image, category: int64, index into images and categories; boxes (A, 4) float64 as x, y, w, h, continuous pixels;
    area float64: the file's `area` (of the mask, so not w*h), w*h where it has none; crowd bool (iscrowd).
    """

    images: list
    categories: list
    id: np.ndarray
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
    """Detections in the order of their file. image, category: (D,) int64, index into images and categories of the Annotations;
    boxes (D, 4) float64 as x, y, w, h; scores (D,) float64."""

    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def annotations(path, complete=True):
    """Read a COCO annotation file: Annotations.

    complete=False: enough for evaluation; file_name, width and height of an image and the name of a category may be anything or
    lack (then None, or what is there), as nobody looks at them. Ids may be whole floats (1.0), as some tables write them.
    Absent iscrowd counts as 0. An annotation with w or h <= 0 is kept: evaluation counts it, and nothing can match it (IoU 0).
    Raises FileNotFoundError, or ValueError naming file and place: not JSON in UTF-8 (NaN, a key twice, nested too deep), a field
    that is missing or of another type or beyond LARGEST, an id that is no integer of 64 bits or occurs twice, or an annotation
    of an image or category that is not there.
    """
    op = f"coco.annotations: {path}:"
    value = strict_json("coco.annotations", path)
    if type(value) is not dict:
        raise ValueError(f"{op} the file must hold an object, got {_got(value)}")
    images, categories, objects = (_records(op, value, key) for key in ("images", "categories", "annotations"))
    needed = REQUIRED if complete else None
    image_ids, ids = _ids(op, "images", images), _ids(op, "annotations", objects)
    text, side_ = (_text, _side) if complete else (_anything, _anything)
    picture = [_column(op, "images", images, "file_name", text, "a name", needed)]
    for side in ("width", "height"):
        picture.append(_column(op, "images", images, side, side_, f"an integer in 1..{LARGEST_SIDE}", needed))
    names = _column(op, "categories", categories, "name", text, "a name", needed)
    kinds = sorted(zip(_ids(op, "categories", categories), names), key=lambda row: row[0])
    boxes = _boxes(op, "annotations", objects, "bbox")
    area = _column(op, "annotations", objects, "area", _number, f"a finite number up to {LARGEST:g}", None)
    area = [w * h if a is None else a for a, (w, h) in zip(area, boxes[:, 2:].tolist())]
    crowd = _column(op, "annotations", objects, "iscrowd", lambda v: type(v) in (int, bool, float) and v in (0, 1), "0 or 1", 0)
    return Annotations(
        list(zip(image_ids, *picture)), kinds, np.array(ids, np.int64),
        _index(op, "annotations", objects, "image_id", image_ids, "images"),
        _index(op, "annotations", objects, "category_id", [k for k, _ in kinds], "categories"),
        boxes, np.array(area, float), np.array(crowd, bool))


def results(path, truth):
    """Read detections for the Annotations `truth` from a COCO results file: a list of {image_id, category_id, bbox, score}.

    Other keys are left unread; boxes with w or h <= 0 are kept (IoU 0). Returns Detections.
    Raises FileNotFoundError, or ValueError naming file and place: as annotations(), a score that is no finite number, or an image
    or category that `truth` has not (pycocotools refuses unknown images too, and drops unknown categories in silence).
    """
    op = f"coco.results: {path}:"
    found = _list(op, strict_json("coco.results", path))
    return Detections(_index(op, "detections", found, "image_id", [row[0] for row in truth.images], "images"),
                      _index(op, "detections", found, "category_id", [row[0] for row in truth.categories], "categories"),
                      _boxes(op, "detections", found, "bbox"), _scores(op, found))


def named_results(path, images, classes):
    """Read detections as examples/detect.py writes them: a list of {image, class, box, score}, box as x1, y1, x2, y2.

    images, classes: the names that may occur. Returns per image a tuple boxes (D, 4), labels (D,), scores (D,), as evaluate.voc
    takes it, and per image the places (D,) of the detections in the file.
    Raises FileNotFoundError, or ValueError naming file and place: as results(), or an unknown image or class.
    """
    op = f"coco.named_results: {path}:"
    found = _list(op, strict_json("coco.named_results", path))
    image = _index(op, "detections", found, "image", images, "images", _text, "a name")
    labels = _index(op, "detections", found, "class", classes, "classes", _text, "a name")
    boxes, scores = _boxes(op, "detections", found, "box"), _scores(op, found)
    order = np.argsort(image, kind="stable")
    places = np.split(order, np.searchsorted(image[order], np.arange(1, len(images)))) if len(images) else []
    return [(boxes[at], labels[at], scores[at]) for at in places], places


# JSON without its loopholes

def strict_json(op, path):
    """The JSON value in a UTF-8 file (a byte order mark may lead). Raises FileNotFoundError, or ValueError naming the file, also
    where json is lenient: NaN and Infinity, and a key twice in one object, of which it would keep the last."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object, parse_constant=lambda name: _no_number(text, name))
    except FileNotFoundError:
        raise FileNotFoundError(f"{op}: there is no file {path}") from None
    except RecursionError:
        raise ValueError(f"{op}: {path} must be JSON, got lists or objects nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{op}: {path} must be UTF-8 text, got: {error}") from None
    except ValueError as error:
        raise ValueError(f"{op}: {path} must be JSON, got: {error}") from None


def _object(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {_got(twice)} twice in one object, {_got(found)}")
    return found


def _no_number(text, name):
    at = next(m.start() for m in re.finditer(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', text) if not m[0].startswith('"'))
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    raise ValueError(f"{name}, which is no number of JSON: line {line} column {column}")


# Columns of lists of records

REQUIRED = object()


def _number(v):
    return type(v) in (int, float) and -LARGEST <= v <= LARGEST


def _finite(v):
    return type(v) in (int, float) and abs(v) <= sys.float_info.max


def _box(v):
    return type(v) is list and len(v) == 4 and all(map(_number, v))


def _whole(v):
    """An integer, also one written as a float, of 64 bits (a float: of the 53 that it holds)."""
    return type(v) is int and -2**63 <= v < 2**63 or type(v) is float and abs(v) < 2**53 and v == int(v)


def _anything(v):
    return True


def _side(v):
    return type(v) is int and 1 <= v <= LARGEST_SIDE


def _text(v):
    return type(v) is str and v != "" and not re.search("[\0\ud800-\udfff]", v)


def _got(value):
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _list(op, value):
    if type(value) is not list:
        raise ValueError(f"{op} the file must hold a list of detections, got {_got(value)}")
    return _records(op, {"detections": value}, "detections")


def _records(op, value, key):
    """value[key], checked to be a list of objects."""
    if key not in value:
        raise ValueError(f"{op} {key} must be a list, got none")
    if type(value[key]) is not list:
        raise ValueError(f"{op} {key} must be a list, got {_got(value[key])}")
    for i, record in enumerate(value[key]):
        if type(record) is not dict:
            raise ValueError(f"{op} {key}[{i}] must be an object, got {_got(record)}")
    return value[key]


def _column(op, where, records, key, holds, what, default=REQUIRED):
    """The values of one key, checked by holds(value); absent ones are `default`."""
    values = [record.get(key, REQUIRED) for record in records]
    for i, v in enumerate(values):
        if v is REQUIRED and default is not REQUIRED:
            values[i] = default
        elif not holds(v):
            raise ValueError(f"{op} {where}[{i}]: {key} must be {what}, got {'none' if v is REQUIRED else _got(v)}")
    return values


def _ids(op, where, records):
    ids = _column(op, where, records, "id", _whole, "an integer of 64 bits")
    if len(set(ids)) < len(ids):
        twice = next(k for k, n in collections.Counter(ids).items() if n > 1)
        at = [i for i, k in enumerate(ids) if k == twice][:2]
        raise ValueError(f"{op} {where}[{at[1]}]: id must be given once, got {twice} as in {where}[{at[0]}]")
    return ids


def _index(op, where, records, key, known, of, holds=_whole, what="an integer of 64 bits"):
    """Ids or names as indices into the list `known`."""
    ids, index = _column(op, where, records, key, holds, what), {k: i for i, k in enumerate(known)}
    found = [index.get(k, -1) for k in ids]
    if -1 in found:
        i = found.index(-1)
        raise ValueError(f"{op} {where}[{i}]: {key} must be that of one of the {len(known)} {of}, got {_got(ids[i])}")
    return np.array(found, np.int64)


def _boxes(op, where, records, key):
    return np.array(_column(op, where, records, key, _box, f"four finite numbers up to {LARGEST:g}"), float).reshape(-1, 4)


def _scores(op, records):
    return np.array(_column(op, "detections", records, "score", _finite, "a finite number"), float)
