"""Greedy non-maximum suppression."""
import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import pick


def nms(boxes, scores, threshold, inclusive=False, plus_one=False, limit=None):
    """Keep the best box, drop those that overlap it, go on with the best of the rest (ohem notes, sec. 6).

    In order of score: box i is kept, and every later j with IoU(i, j) > threshold is dropped (inclusive=True: >=).
    Tested as inter > threshold * union, without a division; two boxes of empty union never suppress each other.
    boxes: (R, 4), scores: (R,), one float dtype. limit: stop after so many. plus_one: inclusive pixels (boxes.py).
    Returns the indices kept, int64, best first; equal scores in order of index. R = 0 gives an empty array.
    Raises ValueError for NaN or infinity, for shapes, and for a threshold outside [0, 1].
    """
    checks.float_array("nms.nms", "boxes", boxes, "(R, 4)")
    checks.float_array("nms.nms", "scores", scores, f"({len(boxes)},)")
    checks.same_dtype("nms.nms", boxes=boxes, scores=scores)
    checks.finite("nms.nms", boxes=boxes, scores=scores)
    if not 0 <= threshold <= 1:
        raise ValueError(f"nms.nms: threshold must lie in [0, 1], got {threshold}")
    if limit is not None:
        checks.whole("nms.nms", 0, limit=limit)
    order = np.argsort(-scores, kind="stable")
    run = pick(boxes, numpy=_nms_numpy, numba=_nms_numba)
    kept = run(boxes[order], boxes.dtype.type(threshold), inclusive, boxes.dtype.type(plus_one),
               len(boxes) if limit is None else limit)
    return order[kept]


def _nms_numpy(boxes, threshold, inclusive, one, limit):
    area = (boxes[:, 2:] - boxes[:, :2] + one).clip(0).prod(1)
    kept, left = [], np.arange(len(boxes))
    while len(left) and len(kept) < limit:
        i, left = left[0], left[1:]
        kept.append(i)
        side = np.minimum(boxes[i, 2:], boxes[left, 2:]) - np.maximum(boxes[i, :2], boxes[left, :2]) + one
        inter = side.clip(0).prod(1)
        union = area[i] + area[left] - inter
        over = inter >= threshold * union if inclusive else inter > threshold * union
        left = left[~(over & (union > 0))]
    return np.array(kept, np.int64)


def _nms_numba(boxes, threshold, inclusive, one, limit):
    return _nms(np.ascontiguousarray(boxes), threshold, inclusive, one, limit)


@njit(cache=True)
def _nms(boxes, threshold, inclusive, one, limit):
    n, count, zero = len(boxes), 0, boxes.dtype.type(0)
    kept = np.empty(n, np.int64)
    dropped = np.zeros(n, np.bool_)
    area = np.empty(n, boxes.dtype)
    for i in range(n):
        area[i] = max(zero, boxes[i, 2] - boxes[i, 0] + one) * max(zero, boxes[i, 3] - boxes[i, 1] + one)
    for i in range(n):
        if dropped[i]:
            continue
        if count == limit:
            break
        kept[count] = i
        count += 1
        for j in range(i + 1, n):
            if dropped[j]:
                continue
            w = max(zero, min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + one)
            h = max(zero, min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + one)
            inter = w * h
            union = area[i] + area[j] - inter
            if union > 0 and (inter > threshold * union or (inclusive and inter == threshold * union)):
                dropped[j] = True
    return kept[:count]
