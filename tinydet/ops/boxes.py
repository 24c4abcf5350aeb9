"""Boxes (x1, y1, x2, y2) in continuous pixels, area (x2 - x1) * (y2 - y1): overlap, coding, clipping.

plus_one=True counts pixels inclusively, as the VOC and Fast R-CNN codes did: a side is x2 - x1 + 1 long.
On a GPU array code serves: the arrays are small, or as large as the matrix of overlaps that is asked for.
"""
import math

from tinydet import checks
from tinydet.backend import array_module

MAX_LOG = math.log(1000 / 16)           # decode() grows no box by more than this factor (Detectron's guard)


def area(boxes, plus_one=False):
    """(R,) areas of boxes (R, 4), float32 or float64; a side that would be negative counts as 0. Raises TypeError, ValueError for dtype, shape."""
    checks.float_array("boxes.area", "boxes", boxes, "(R, 4)")
    return (boxes[:, 2:] - boxes[:, :2] + int(plus_one)).clip(0).prod(1)


def intersection(a, b, plus_one=False):
    """(A, B) intersection areas of boxes a (A, 4) and b (B, 4), one float dtype. Raises TypeError, ValueError for dtypes, shapes."""
    checks.float_array("boxes.intersection", "a", a, "(A, 4)")
    checks.float_array("boxes.intersection", "b", b, "(B, 4)")
    checks.same_dtype("boxes.intersection", a=a, b=b)
    xp = array_module(a)
    side = xp.minimum(a[:, None, 2:], b[:, 2:]) - xp.maximum(a[:, None, :2], b[:, :2]) + int(plus_one)
    return side.clip(0).prod(2)


def iou(a, b, plus_one=False):
    """(A, B) intersection over union of boxes a (A, 4) and b (B, 4), one float dtype; 0 where the union is empty. Raises as intersection."""
    inter = intersection(a, b, plus_one)
    union = area(a, plus_one)[:, None] + area(b, plus_one) - inter
    return inter / array_module(a).where(union > 0, union, 1)


def encode(anchors, boxes, plus_one=False):
    """Box deltas of R-CNN (1311.2524): (dx, dy) = centre shift / anchor side, (dw, dh) = log(side of the box / side of the anchor).

    anchors, boxes: (R, 4), one float dtype, all sides positive. Returns (R, 4). Raises ValueError for a side <= 0; on a GPU, where
    values are not looked at, its deltas are infinite or NaN.
    """
    checks.float_array("boxes.encode", "anchors", anchors, "(R, 4)")
    checks.same_shape("boxes.encode", anchors.shape, boxes=boxes)
    checks.same_dtype("boxes.encode", anchors=anchors, boxes=boxes)
    xp = array_module(anchors)
    (pc, ps), (gc, gs) = _centre_side(anchors, plus_one), _centre_side(boxes, plus_one)
    if checks.on_host(ps) and not bool((ps > 0).all() and (gs > 0).all()):
        raise ValueError("boxes.encode: every side of anchors and boxes must be positive, got one that is not")
    return xp.concatenate([(gc - pc) / ps, xp.log(gs / ps)], 1)


def decode(anchors, deltas, plus_one=False):
    """Boxes (R, 4) from anchors and deltas (R, 4), one float dtype: encode's inverse, but for rounding and the cut (Detectron's form: plus_one
    takes the pixel off again).

    dw and dh are cut at log(1000/16), so that an untrained net gives no infinite boxes. Boxes are not cut at the image (clip).
    Raises ValueError for shapes, TypeError for dtypes.
    """
    checks.float_array("boxes.decode", "anchors", anchors, "(R, 4)")
    checks.same_shape("boxes.decode", anchors.shape, deltas=deltas)
    checks.same_dtype("boxes.decode", anchors=anchors, deltas=deltas)
    xp = array_module(anchors)
    centre, side = _centre_side(anchors, plus_one)
    centre = centre + deltas[:, :2] * side
    half = side * xp.exp(xp.minimum(deltas[:, 2:], MAX_LOG)) / 2
    return xp.concatenate([centre - half, centre + half - int(plus_one)], 1)


def clip(boxes, height, width):
    """Boxes (R, 4) cut at the image, height x width pixels: x to [0, width], y to [0, height]. A box outside ends with area 0. Raises as area."""
    checks.float_array("boxes.clip", "boxes", boxes, "(R, 4)")
    xp = array_module(boxes)
    return boxes.clip(0, xp.asarray([width, height, width, height], boxes.dtype))


def _centre_side(boxes, plus_one):
    side = boxes[:, 2:] - boxes[:, :2] + int(plus_one)
    return boxes[:, :2] + side / 2, side
