"""Which box each anchor overlaps most, and which anchor each box."""
import numpy as np
from numba import njit, prange

from tinydet import checks
from tinydet.backend import pick
from tinydet.ops import boxes as box_ops

PART = 2048             # anchors that one thread takes at a time


def best(anchors, boxes, plus_one=False):
    """The box of largest IoU for each anchor (or window), and the anchor of largest IoU for each box: what targets are made from
    (RetinaNet: the code of AP-loss, 1904.06373, retinanet.label; Fast R-CNN: 1504.08083, sec. 2.3; the thresholds are theirs).

        box[m] = argmax_r IoU(m, r),  iou[m] = max_r IoU(m, r);    anchor[r] = argmax_m IoU(m, r),  anchor_iou[r] = max_m IoU(m, r)
    anchors: (M, 4), boxes: (R, 4), one float dtype. plus_one: inclusive pixels (boxes.py). IoU is 0 where the union is empty.
    Returns box (M,) int64, iou (M,), anchor (R,) int64, anchor_iou (R,); IoUs in the input's dtype, to the bits of boxes.iou.
    Numba never holds the (M, R) matrix: its memory grows with M + R * M / 2048. Any number of threads gives the same.
    Ties: the first box, the first anchor, also where all IoUs are 0. With no boxes box is -1 and iou 0, with no anchors
    anchor is -1 and anchor_iou 0.
    Works on the host: anchors and annotations lie there.
    Raises ValueError for NaN, infinity, shapes and areas that the dtype does not hold; TypeError for dtypes and for arrays on a GPU.
    """
    run = pick(anchors, numpy=_best_numpy, numba=_best_numba)
    checks.float_array("assign.best", "anchors", anchors, "(M, 4)")
    checks.float_array("assign.best", "boxes", boxes, "(R, 4)")
    checks.same_dtype("assign.best", anchors=anchors, boxes=boxes)
    checks.finite("assign.best", anchors=anchors, boxes=boxes)
    checks.areas("assign.best", anchors=anchors, boxes=boxes)
    if len(anchors) == 0 or len(boxes) == 0:
        shapes = len(anchors), len(boxes)
        return tuple(np.full(n, value, dtype) for n in shapes for value, dtype in ((-1, np.int64), (0, anchors.dtype)))
    return run(anchors, boxes, plus_one)


def _best_numpy(anchors, boxes, plus_one):
    overlap = box_ops.iou(anchors, boxes, plus_one)
    return overlap.argmax(1), overlap.max(1), overlap.argmax(0), overlap.max(0)


def _best_numba(anchors, boxes, plus_one):
    """Each part of the anchors finds its best for every box, then among the parts of the largest IoU the first wins."""
    M, R, dtype = len(anchors), len(boxes), anchors.dtype
    parts = -(-M // PART)
    box, iou = np.zeros(M, np.int64), np.zeros(M, dtype)            # the zeros stay where all IoUs are 0
    anchor, top = np.zeros((parts, R), np.int64), np.zeros((parts, R), dtype)
    arrays = np.ascontiguousarray(anchors).view(), np.ascontiguousarray(boxes), dtype.type(plus_one), box, iou, anchor, top
    arrays[0].flags.writeable = False                               # as proposals.py keeps them: to Numba another type, compiled anew
    if parts > 1:
        _parts(*arrays)
    else:
        _part(0, *arrays)                                           # which takes less time than waking a thread
    best = top.argmax(0), np.arange(R)
    return box, iou, anchor[best], top[best]


@njit(cache=True, error_model="numpy")
def _part(p, anchors, boxes, one, box, iou, anchor, top):
    """One pass over the anchors of part p: box and iou for each, and in row p of anchor and top the best of the part for each box."""
    zero, area = anchors.dtype.type(0), np.empty(len(boxes), anchors.dtype)
    for r in range(len(boxes)):
        area[r] = max(zero, boxes[r, 2] - boxes[r, 0] + one) * max(zero, boxes[r, 3] - boxes[r, 1] + one)
    for m in range(p * PART, min((p + 1) * PART, len(anchors))):
        x1, y1, x2, y2 = anchors[m, 0], anchors[m, 1], anchors[m, 2], anchors[m, 3]
        own = max(zero, x2 - x1 + one) * max(zero, y2 - y1 + one)
        for r in range(len(boxes)):
            w = max(zero, min(x2, boxes[r, 2]) - max(x1, boxes[r, 0]) + one)
            h = max(zero, min(y2, boxes[r, 3]) - max(y1, boxes[r, 1]) + one)
            inter = w * h
            overlap = inter / (own + area[r] - inter)               # NaN where the union is empty, which is above nothing
            if overlap > iou[m]:
                box[m], iou[m] = r, overlap
            if overlap > top[p, r]:
                anchor[p, r], top[p, r] = m, overlap


@njit(cache=True, parallel=True)
def _parts(anchors, boxes, one, box, iou, anchor, top):
    for p in prange(len(top)):
        _part(np.int64(p), anchors, boxes, one, box, iou, anchor, top)
