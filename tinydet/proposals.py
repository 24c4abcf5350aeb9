"""Region proposals of Fast R-CNN (1504.08083): from selective-search files, from JSON, or sliding windows whose worst IoU is known.

Proposals of an image are an array (M, 4) float64, continuous pixels (x1, y1, x2, y2). Everything here runs on the host, once a data set.
"""
import bisect
import collections
import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from tinydet import checks
from tinydet.coco import LARGEST, strict_json
from tinydet.ops import assign
from tinydet.records import DefectWarning, some

MOST_BYTES = 1 << 31                # of a .mat file, and of its variables unpacked
MOST_WINDOWS = 1 << 22              # of an image: 128 MiB of boxes
MOST_SIZES = 1000                   # of a ladder
SLACK = 1                           # pixels: a corner so far outside is rounding, cut in silence as read_coco does (CHOICE)
SAME = 1e-6                         # pixels: window sides are rounded to it, and a gap of no more is none (CHOICE)
CERTAIN = 1e-5                      # how far guarantee() may stay below the true value
STEPS = [k / 100 for k in range(100, 0, -1)]        # strides that covering() tries, the cheapest first (CHOICE)


# Files

def from_mat(path, names=None):
    """Read boxes from a .mat file as fast-rcnn's selective_search_data publishes it: {name: boxes (R, 4)}.

    The file: a cell array `boxes` of M matrices R x 4, 1-based inclusive rows (y1, x1, y2, x2), and a cell array `images` of the
    M names; an empty matrix of any shape means no boxes. (x1 - 1, y1 - 1, x2, y2) is the continuous box. Values are not judged
    here, NaN included: see clean.
    names: those wanted, in this order; None takes all, in file order.
    scipy.io reads the two variables, and nothing else of the file. As it crashes on some damaged files instead of raising, all
    tags, types and sizes in them are checked before. Formats 5 to 7.2, compressed or not; 7.3 is HDF5 and refused.
    Raises FileNotFoundError, or ValueError naming file and place: damaged or cut, another format, another layout or type, a name
    that is empty or there twice, names that are missing.
    """
    op = "proposals.from_mat"
    boxes, images = _mat_variables(op, path)
    names_there = [str(cell[0]) if cell.shape == (1,) else "" for cell in images]
    for i, name in enumerate(names_there):
        if not name or not name.isprintable():
            raise ValueError(f"{op}: {path}: images{{{i + 1}}} must be a name, got {name!r}")
    if len(boxes) != len(images):
        raise ValueError(f"{op}: {path}: boxes and images must have one cell an image each, got {len(boxes)} and {len(images)}")
    if twice := [n for n, count in collections.Counter(names_there).items() if count > 1]:
        raise ValueError(f"{op}: {path}: images must name each image once, got {twice[0]!r} more than once")
    cells = _wanted(op, path, {name: (i, cell) for i, (name, cell) in enumerate(zip(names_there, boxes))}, names)
    for i, cell in cells.values():
        if cell.size and cell.shape[1] != 4:
            raise ValueError(f"{op}: {path}: boxes{{{i + 1}}} must have 4 columns, got {cell.shape[0]} x {cell.shape[1]}")
    return {name: cell.reshape(-1, 4).astype(np.float64)[:, [1, 0, 3, 2]] - (1, 1, 0, 0) for name, (_, cell) in cells.items()}


def from_json(path, names=None):
    """Read boxes from a JSON file, continuous pixels: {name: boxes (R, 4)}.

    Either an object {name: [[x1, y1, x2, y2], ...], ...}, or a list of objects, one a box: "image" (a name) or "image_id" (a name
    or an integer, of which the digits are the name), and "box" [x1, y1, x2, y2] or "bbox" [x, y, w, h], as COCO's results have it.
    Other keys, such as score, are left unread. Boxes keep the order of the file.
    names: those wanted, in this order; None takes all, in file order.
    Raises FileNotFoundError, or ValueError naming file and place: not JSON (NaN neither), another form, numbers beyond 1e12, names
    that are missing.
    """
    op = "proposals.from_json"
    value, found = strict_json(op, path), collections.defaultdict(list)
    if type(value) is dict:
        for name, rows in value.items():
            if type(rows) is not list:
                raise ValueError(f"{op}: {path}: {name!r} must be a list of boxes, got {_got(rows)}")
            found[name] = [_four(op, f"{path}: {name!r}, box {i}", row) for i, row in enumerate(rows)]
    elif type(value) is list:
        for i, record in enumerate(value):
            place = f"{path}: [{i}]"
            name, key = (_only(op, place, record, keys) for keys in (("image", "image_id"), ("box", "bbox")))
            image = record[name]
            if not (type(image) is str and image or name == "image_id" and type(image) is int):
                raise ValueError(f"{op}: {place}: {name} must be a name{' or an integer' * (name == 'image_id')}, got {_got(image)}")
            x, y, right, bottom = _four(op, f"{place}: {key}", record[key])
            found[str(image)].append((x, y, x + right, y + bottom) if key == "bbox" else (x, y, right, bottom))
    else:
        raise ValueError(f"{op}: {path} must hold an object of lists of boxes, or a list of objects, got {_got(value)}")
    return {name: np.array(rows, float).reshape(-1, 4) for name, rows in _wanted(op, path, found, names).items()}


def from_file(path, names=None):
    """from_mat or from_json, by the ending of the path. Raises ValueError for another ending, else as they do."""
    reader = {".mat": from_mat, ".json": from_json}.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"proposals.from_file: path must end in .mat or .json, got {path}")
    return reader(path, names)


def _wanted(op, path, found, names):
    """The entries of `found` for these names."""
    if names is None:
        return found
    names = list(names)
    if missing := [n for n in names if n not in found]:
        raise ValueError(f"{op}: {path} must hold proposals for all {len(names)} images that are asked for, {len(missing)} are missing: "
                         f"{some(missing)}")
    return {name: found[name] for name in names}


def _only(op, place, record, keys):
    """Which of two keys the record has."""
    there = [k for k in keys if k in record] if type(record) is dict else []
    if len(there) != 1:
        raise ValueError(f"{op}: {place} must be an object with either {' or '.join(keys)}, got {_got(record)}")
    return there[0]


def _four(op, place, row):
    if not (type(row) is list and len(row) == 4 and all(type(v) in (int, float) and -LARGEST <= v <= LARGEST for v in row)):
        raise ValueError(f"{op}: {place} must be four finite numbers up to {LARGEST:g}, got {_got(row)}")
    return row


def _got(value):
    text = repr(value) if type(value) not in (list, dict) or len(value) <= 8 else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else text[:80] + "..."


# The .mat format, level 5: elements (type, size, data), of which a matrix is one that holds others

MATRIX, COMPRESSED, CELL, CHAR, COMPLEX = 14, 15, 1, 4, 0x800
NUMBERS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}        # bytes of one number of each element type
LETTERS = (1, 2, 4, 16, 17, 18)                                                 # element types of text


def _mat_variables(op, path):
    """The cells of boxes and of images, lists of arrays: numbers (R, C) and text (1,)."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{op}: there is no file {path}")
    try:
        if (size := Path(path).stat().st_size) > MOST_BYTES:
            raise ValueError(f"{size} bytes; the limit is {MOST_BYTES}")
        content = Path(path).read_bytes()
        order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
        version = struct.unpack(order + "H", content[124:126])[0] if order else None
        if version == 0x200 or content.startswith(b"\x89HDF"):
            raise ValueError("version 7.3, which is HDF5; in MATLAB, save(file, 'boxes', 'images', '-v7') writes version 7")
        if version != 0x100:
            raise ValueError(f"a file of {len(content)} bytes without such a header")
        safe = b"MATLAB 5.0 MAT-file".ljust(124) + content[124:128]
        for name, variable in _mat_checked(content, order).items():
            safe += variable
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = loadmat(io.BytesIO(safe), variable_names=["boxes", "images"], mat_dtype=True, chars_as_strings=True)
        return list(read["boxes"].ravel()), list(read["images"].ravel())
    except Exception as error:          # SciPy, zlib and struct raise a dozen kinds
        raise ValueError(f"{op}: {path} must be a .mat file of version 5 to 7.2 with cell arrays boxes and images, got: "
                         f"{str(error)[:300]}") from None


def _mat_checked(content, order):
    """The bytes of the variables boxes and images, unpacked, each by its name: all that they hold is as it must be."""
    found, at, room = {}, 128, MOST_BYTES
    while at < len(content):
        kind, start, size, _ = _element(content, at, len(content), order)
        element, at = content[at:start + size], start + size
        if kind == COMPRESSED:
            unpack = zlib.decompressobj()
            element = unpack.decompress(content[start:at], room + 1)
            if len(element) > room or not unpack.eof:
                raise ValueError(f"a compressed variable at byte {start - 8} that is cut, or larger than {MOST_BYTES} bytes")
            room -= len(element)
        name, *matrix = _matrix(element, 0, len(element), order)
        if name in (b"boxes", b"images"):
            if name in found:
                raise ValueError(f"two variables {name.decode()}")
            _check_cells(name.decode(), element, matrix, order)
            found[name] = element
    if len(found) < 2:
        raise ValueError("no variable " + " and no variable ".join(n for n in ("boxes", "images") if n.encode() not in found))
    return found


def _check_cells(name, content, matrix, order):
    kind, _, dims, at, end = matrix
    if kind != CELL or len(dims) != 2 or min(dims) < 0 or math.prod(dims) != max(dims) * (min(dims) > 0) or math.prod(dims) * 8 > end - at:
        raise ValueError(f"{name}, which is no cell array 1 x M" if kind != CELL else f"a cell array {name} {_by(dims)}")
    for i in range(math.prod(dims)):
        place = f"{name}{{{i + 1}}}"
        kind, start, size, following = _element(content, at, end, order)
        if kind == MATRIX and size == 0 and name == "boxes":            # how MATLAB may write []
            at = following
            continue
        _, kind, flags, dims, start, stop = _matrix(content, at, end, order)
        if len(dims) != 2 or min(dims) < 0:
            raise ValueError(f"{place} of {_by(dims)}")
        if not (6 <= kind <= 15 and not flags & COMPLEX if name == "boxes" else kind == CHAR and dims[0] == 1):
            raise ValueError(f"{place}, which is no {'matrix of real numbers' if name == 'boxes' else 'line of text'}")
        of, _, size, _ = _element(content, start, stop, order)
        count = math.prod(dims)
        if size != count * NUMBERS.get(of, -1) if name == "boxes" else of not in LETTERS or not count <= size <= 4 * count:
            raise ValueError(f"{place} of {_by(dims)} in {size} bytes of type {of}")
        at = following
    if at != end:
        raise ValueError(f"{name} with {end - at} bytes too many")


def _matrix(content, at, end, order):
    """name, class, flags, dimensions, first and last byte of the data of the matrix at `at`."""
    kind, at, size, _ = _element(content, at, end, order)
    end, head = at + size, []
    if kind != MATRIX:
        raise ValueError(f"an element of type {kind} at byte {at - 8} where a variable must be")
    for wanted in (6, 5, 1):                                            # flags, dimensions, name
        kind, start, size, at = _element(content, at, end, order)
        if kind != wanted or wanted == 6 and size != 8 or wanted == 5 and (size % 4 or not size):
            raise ValueError(f"a damaged head of a variable at byte {start}")
        head.append(content[start:start + size])
    flags = struct.unpack(order + "II", head[0])[0]
    return head[2], flags & 0xff, flags, struct.unpack(f"{order}{len(head[1]) // 4}i", head[1]), at, end


def _element(content, at, end, order):
    """Type, first byte, size of the element at `at`, and where the next begins."""
    if end - at < 8:
        raise ValueError(f"a file cut at byte {end}")
    kind, size = struct.unpack_from(order + "II", content, at)
    small = kind >> 16                                                  # size and type share a word: data in the other one
    kind, start, size = (kind & 0xffff, at + 4, small) if small else (kind, at + 8, size)
    following = at + 8 if small else start + size + -size % 8 * (kind != COMPRESSED)
    if small > 4 or following > end:
        raise ValueError(f"an element of {size} bytes at byte {at}, where {max(0, end - start)} are left")
    return kind, start, size, following


def _by(dims):
    return " x ".join(map(str, dims))


# Sliding windows

def windows(width, height, sizes, ratios, step, cut=False):
    """Windows of every size and shape over an image (CHOICE; 1504.08083, sec. 5.5, has dense boxes, too): boxes (M, 4) float64, no two alike.

        w = s / sqrt(a), h = s * sqrt(a) for sizes s (pixels, the root of the area) and ratios a (height / width);
        x1 = 0, step * w, 2 * step * w, ... while the window lies in the image, and one more flush with the right border; y1 likewise
    A window larger than the image is dropped (CHOICE). cut=True keeps it, cut at the image (CHOICE): then guarantee() holds
    for objects, too, that nearly fill the image. Sides are rounded to 1e-6 pixels.
    Order: sizes as given, ratios as given, rows, columns. M is 0 where no window fits.
    Raises ValueError unless all numbers are positive and finite, and step at most 1 (else pixels lie in no window), or for more than
    MOST_WINDOWS windows.
    """
    op = "proposals.windows"
    _positive(op, width=width, height=height, step=step)
    for name, values in (("sizes", sizes), ("ratios", ratios)):
        if not len(values):
            raise ValueError(f"{op}: {name} must hold at least one number, got none")
        for v in values:
            _positive(op, **{f"each of {name}": v})
    if step > 1:
        raise ValueError(f"{op}: step must be at most 1, got {step}")
    sides = _sides(width, height, sizes, ratios, cut)
    if (count := _count(width, height, sides, step)) > MOST_WINDOWS:
        raise ValueError(f"{op}: an image must have at most {MOST_WINDOWS} windows, got {count:.0f}")
    found = [np.zeros((0, 4))]
    for w, h in sides.tolist():
        x, y = _starts(width, w, step), _starts(height, h, step)
        boxes = np.empty((len(y), len(x), 4))
        boxes[..., 0], boxes[..., 1] = x, y[:, None]
        boxes[..., 2], boxes[..., 3] = np.minimum(x + w, width), np.minimum(y + h, height)[:, None]
        found.append(boxes.reshape(-1, 4))
    return np.concatenate(found)


def _sides(width, height, sizes, ratios, cut):
    """(n, 2) sides of the windows of an image."""
    s, root = np.repeat(np.asarray(sizes, float), len(ratios)), np.sqrt(np.tile(np.asarray(ratios, float), len(sizes)))
    sides = np.maximum(np.round(np.stack([s / root, s * root], 1) / SAME) * SAME, SAME)
    sides = np.minimum(sides, (width, height)) if cut else sides[(sides <= (width, height)).all(1)]
    return np.array(list(dict.fromkeys(map(tuple, sides.tolist())))).reshape(-1, 2)


def _fit(length, side, stride):
    """How many strides fit, and whether a gap remains behind them."""
    n = np.floor((length - side) / stride + 1e-9)
    return n, length - side - n * stride > SAME


def _starts(length, side, step):
    n, gap = _fit(length, side, step * side)
    return np.append(np.minimum(np.arange(n + 1) * (step * side), length - side), [length - side] * int(gap))


def _count(width, height, sides, step):
    """len(windows) of these sides."""
    (across, right), (down, below) = _fit(width, sides[:, 0], step * sides[:, 0]), _fit(height, sides[:, 1], step * sides[:, 1])
    return float(((across + 1 + right) * (down + 1 + below)).sum())


def ladder(low, high, factor):
    """Sizes low, low * factor, low * factor^2, ... up to high (included, rounding allowed for), a list of floats.

    Raises ValueError unless 0 < low <= high, factor > 1, and for more than MOST_SIZES sizes.
    """
    _positive("proposals.ladder", low=low, high=high, factor=factor)
    if not (low <= high and factor > 1):
        raise ValueError(f"proposals.ladder: low must be at most high and factor above 1, got {low}, {high} and {factor}")
    n = math.log(high / low) / math.log(factor) + 1e-9
    if n >= MOST_SIZES:
        raise ValueError(f"proposals.ladder: there must be at most {MOST_SIZES} sizes, got {n:.0f}")
    return [float(low * factor**k) for k in range(int(n) + 1)]


def guarantee(size_factor, ratio_factor, step):
    """The IoU that some window reaches with any object in range (ours), wherever the object lies: a float.

    size_factor, ratio_factor: from one size or ratio to the next, at least 1; step: as in windows. In range is an object at most
    half a factor off some size and some ratio (by sqrt(factor), beyond the ends of the ladders too), in an image that holds the
    window of that size and ratio; with cut=True, in any image that holds the object.
    Of that window the nearest in place is half a stride off in x and y at most, and nearer at the borders, where the flush ones are:
    the result is the least IoU over all such shapes, each with both offsets at half a stride, the worst there is. A single size and
    ratio attains it; between the rungs of a ladder the best window is a little better (sqrt(2), 2, 0.3: 0.541 instead of 0.533).
    The search splits the range of shapes until no part can hold a smaller value: the result is at most 1e-5 below the least. It
    does not assume a corner of the range, where the least often is not: at sqrt(2), 2, 0.3 the four corners have 0.539 at least,
    an object half a size step below the window, of the window's ratio, 0.533.
    Raises ValueError unless the factors are >= 1 and finite and 0 < step <= 1.
    """
    return _guaranteed(size_factor, ratio_factor, step)


def _guaranteed(size_factor, ratio_factor, step, least=None):
    """guarantee; with least, min(least, guarantee) or, sooner, any value below least where the guarantee is."""
    _positive("proposals.guarantee", size_factor=size_factor, ratio_factor=ratio_factor, step=step)
    if not (size_factor >= 1 and ratio_factor >= 1 and step <= 1):
        raise ValueError("proposals.guarantee: size_factor and ratio_factor must be at least 1 and step at most 1, got "
                         f"{size_factor}, {ratio_factor} and {step}")

    def iou(w, h, area):                            # of the window 1 x 1 half a stride off; less for a smaller w or h or a larger area
        x, y = (np.maximum(np.minimum(np.minimum(side, 1), (1 + side - step) / 2), 0) for side in (w, h))
        return x * y / (1 + area - x * y)

    def shape(s, r):                                # s, r: logs of size and ratio
        return np.exp(s - r / 2), np.exp(s + r / 2), np.exp(2 * s)

    half = math.log(size_factor) / 2, math.log(ratio_factor) / 2
    parts, best = np.array([[-half[0], half[0], 0, half[1]]]), 1.0      # a and 1/a are alike: width and height change places
    while len(parts):
        s0, s1, r0, r1 = parts.T
        best = min(best, *(iou(*shape(s, r)).min() for s in (s0, s1) for r in (r0, r1)))
        if least is not None and best - CERTAIN < least:
            break
        below = iou(shape(s0, r1)[0], shape(s0, r0)[1], shape(s1, r0)[2])           # the smallest sides, the largest area
        s0, s1, r0, r1 = parts[below < (best - CERTAIN if least is None else least)].T
        s, r = (s0 + s1) / 2, (r0 + r1) / 2
        parts = np.concatenate([np.stack(p, 1) for p in ((s0, s, r0, r), (s0, s, r, r1), (s, s1, r0, r), (s, s1, r, r1))])
    return float(best - CERTAIN) if least is None else min(least, float(best - CERTAIN))


def covering(examples, least=0.5, share=0.98, cut=True):
    """Settings of sliding windows that reach IoU `least` with every object in range, at the fewest windows an image: a dict.

    In range are the central `share` of the sizes and the central `share` of the ratios of the boxes that training uses (CHOICE:
    quantiles, so that one tiny box does not multiply the windows; share=1 takes all). Tried are numbers of sizes and ratios, evenly
    spaced in the logarithm, each with the largest step in hundredths that guarantee() allows; counted on an image of the median size.
    Returns what JSON can hold: {"sizes", "ratios", "step", "cut"} for windows() and for_examples(), and "guarantee", "per_image"
    (mean number of windows on these examples). With cut=False it holds for objects whose window fits the image.
    Raises ValueError without a box, or unless 0 < least <= 0.9 and 0 < share <= 1.
    """
    op = "proposals.covering"
    _positive(op, least=least, share=share)
    if not (least <= 0.9 and share <= 1):
        raise ValueError(f"{op}: least must be at most 0.9 and share at most 1, got {least} and {share}")
    sides = np.concatenate([np.zeros((0, 2)), *((b[:, 2:] - b[:, :2]) for b, _ in (e.usable() for e in examples))])
    sides = sides[(sides > 0).all(1)]
    if not len(sides):
        raise ValueError(f"{op}: examples must have a box that training uses, got none in {len(examples)} images")
    ends = (1 - share) / 2, (1 + share) / 2
    size, ratio = np.quantile(np.sqrt(sides.prod(1)), ends), np.quantile(sides[:, 1] / sides[:, 0], ends)
    width, height = np.median([e.size for e in examples], 0)
    few = max(1, math.ceil(math.log(size[1] / size[0]) / -math.log(least)))         # fewer cannot do, at any step
    best = None
    for n in range(few, 4 * few + 3):
        for m in range(1, 13):
            factors = (size[1] / size[0]) ** (1 / n), (ratio[1] / ratio[0]) ** (1 / m)
            rungs, shapes = _rungs(size[0], factors[0], n), _rungs(ratio[0], factors[1], m)
            kinds = _sides(width, height, rungs, shapes, cut)
            fewer = len(STEPS) if best is None else bisect.bisect_left(STEPS, best[0], key=lambda f: _count(width, height, kinds, f))
            if not fewer or _guaranteed(*factors, STEPS[fewer - 1], least) < least:
                continue                                                # no step that is left is small enough
            at = bisect.bisect_left(STEPS[:fewer], True, key=lambda f: _guaranteed(*factors, f, least) >= least)
            best = _count(width, height, kinds, STEPS[at]), rungs, shapes, STEPS[at], factors
    if best is None:
        raise ValueError(f"{op}: no windows that were tried reach IoU {least} with objects of sizes {size[0]:g}..{size[1]:g} and ratios "
                         f"{ratio[0]:g}..{ratio[1]:g}")
    _, sizes, ratios, step, factors = best
    seen = collections.Counter(tuple(e.size) for e in examples)
    total = sum(k * _count(W, H, _sides(W, H, sizes, ratios, cut), step) for (W, H), k in seen.items())
    return {"sizes": sizes, "ratios": ratios, "step": step, "cut": cut, "guarantee": max(least, guarantee(*factors, step)),
            "per_image": total / len(examples)}


def _rungs(low, factor, n):
    """n values, each in the middle (of the logarithm) of one of the n steps from low."""
    return [float(low * factor ** (k + 0.5)) for k in range(n)]


def _positive(op, **values):
    for name, v in values.items():
        if isinstance(v, bool) or not isinstance(v, (int, float, np.number)) or not 0 < v < math.inf:
            raise ValueError(f"{op}: {name} must be a positive, finite number, got {v!r}")


# What a net is given

def clean(boxes, width, height, least=2):
    """Proposals cut at the image, without what no net can use, and a dict that counts what was cut or dropped, by kind.

    Dropped: rows with NaN or infinity; no area (x2 <= x1 or y2 <= y1); outside the image; a side below `least` pixels after the cut
    (Fast R-CNN's code: 2); rows that repeat an earlier one exactly. A cut of more than one pixel is counted. Kinds that did not occur
    are not in the dict. boxes: (R, 4), float32 or float64, of any values. Returns (M, 4) float64 in the order given; none for none.
    Raises TypeError or ValueError for another dtype or shape, ValueError unless width and height are positive and least >= 0.
    """
    op = "proposals.clean"
    checks.float_array(op, "boxes", boxes, "(R, 4)")
    _positive(op, width=width, height=height)
    if not 0 <= least < math.inf:
        raise ValueError(f"{op}: least must be at least 0 and finite, got {least!r}")
    boxes, dropped = boxes.astype(np.float64), {}

    def keep(boxes, good, kind):
        if bad := len(good) - int(np.count_nonzero(good)):
            dropped[kind] = bad
            return boxes[good]
        return boxes

    boxes = keep(boxes, np.isfinite(boxes).all(1), "boxes with NaN or infinity dropped")
    boxes = keep(boxes, (boxes[:, 2:] > boxes[:, :2]).all(1), "degenerate boxes dropped")
    border = np.array([width, height, width, height], float)
    inside = np.minimum(np.maximum(boxes, 0.0), border) + 0.0           # + 0.0: no -0.0
    good = (inside[:, 2:] > inside[:, :2]).all(1)
    if cut := int(np.count_nonzero((abs(inside - boxes) > SLACK).any(1) & good)):
        dropped["boxes cut at the border of the image"] = cut
    boxes = keep(inside, good, "boxes outside the image dropped")
    boxes = keep(boxes, (boxes[:, 2:] - boxes[:, :2] >= least).all(1), f"boxes with a side below {least:g} pixels dropped")
    return keep(boxes, _first(boxes), "repeated boxes dropped"), dropped


def _first(boxes):
    """(R,) bool: rows that repeat no earlier one."""
    order = np.lexsort(boxes.T)                                         # stable: of equal rows the first stays in front
    same = (boxes[order[1:]] == boxes[order[:-1]]).all(1)
    first = np.ones(len(boxes), bool)
    first[order[1:][same]] = False
    return first


def recall(proposals, examples, iou=0.5):
    """What proposals can give at most: the share of boxes that some proposal of their image overlaps by IoU >= iou, and the mean of
    the best overlaps.

    proposals: an array (M, 4) float64 for each of the examples, as for_examples makes them. Boxes: those that training uses, not
    the difficult ones; a box without any proposal counts with overlap 0. Returns two floats, both NaN if there is no box.
    Raises ValueError unless there are as many arrays as examples, iou is in 0..1 and all proposals are finite.
    """
    if len(proposals) != len(examples):
        raise ValueError(f"proposals.recall: proposals must hold an array for each of {len(examples)} examples, got {len(proposals)}")
    if not 0 <= iou <= 1:
        raise ValueError(f"proposals.recall: iou must be in 0..1, got {iou!r}")
    best = np.concatenate([np.zeros(0), *(assign.best(p, e.usable()[0])[3] for p, e in zip(proposals, examples))])
    return (float((best >= iou).mean()), float(best.mean())) if len(best) else (math.nan, math.nan)


def for_examples(source, examples):
    """Cleaned proposals for every Example, a list of read-only arrays (M, 4) float64; for windows, images of one size share one array.

    source: the path of a .mat (from_mat) or .json file (from_json), a dict {Example.name: boxes (R, 4)}, or settings of windows, a
    dict with "sizes", "ratios", "step" and perhaps "cut", as covering gives. Nothing is added from the ground truth.
    An image of which the source has nothing, or nothing of use, gets an empty array. Such images, and what clean cut or dropped, are
    counted in one DefectWarning, whose `found` holds the names of the images by kind.
    Raises as the readers, windows and clean; ValueError for an unknown source, and if a source by name has none of the examples.
    """
    op, owner, made = "proposals.for_examples", "a dict of boxes", {}
    if isinstance(source, (str, os.PathLike)):
        owner, source = str(source), from_file(source)
    if not isinstance(source, dict):
        raise ValueError(f"{op}: source must be a path, a dict of boxes or settings of windows, got {type(source).__name__}")
    if settings := {k: source[k] for k in ("sizes", "ratios", "step", "cut") if k in source} if "step" in source else None:
        if len(settings.keys() - {"cut"}) < 3:
            raise ValueError(f"{op}: settings of windows must hold sizes, ratios and step, got {some(source)}")
        owner = "windows"
    elif examples and not any(e.name in source for e in examples):
        raise ValueError(f"{op}: {owner} must hold proposals for some of the {len(examples)} examples, such as {examples[0].name!r}, got "
                         f"{some(map(repr, source))}")
    lists, found, counts = [], collections.defaultdict(list), collections.Counter()
    for e in examples:
        key = tuple(e.size) if settings else e.name
        if key not in made:
            boxes = windows(*e.size, **settings) if settings else np.asarray(source.get(e.name, np.zeros((0, 4))))
            made[key] = clean(boxes, *e.size)
            made[key][0].flags.writeable = False
        boxes, dropped = made[key]
        lists.append(boxes)
        for kind, count in [*dropped.items(), *[("images without proposals", 1)] * (len(boxes) == 0)]:
            found[kind].append(e.name)
            counts[kind] += count
    if found:
        told = "; ".join(f"{counts[kind]} {kind} (first in {names[0]})" for kind, names in sorted(found.items()))
        warnings.warn(DefectWarning(f"{op}: {owner}: {told}", dict(found)), stacklevel=2)
    return lists
