"""Greedy non-maximum suppression."""
import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import pick


def nms(boxes, scores, threshold, inclusive=False, plus_one=False, limit=None, groups=None):
    """Keep the best box, drop those that overlap it, go on with the best of the rest (ohem notes, sec. 6).

    In order of score: box i is kept, and every later j of its group with IoU(i, j) > threshold is dropped (inclusive=True: >=).
    Tested as inter > threshold * union, without a division; two boxes of empty union never suppress each other.
    boxes: (R, 4), scores: (R,), one float dtype. groups: (R,) integers (classes, images, labels), None is one group: compared,
    never added to the coordinates, which costs float32 its last bits and lets boxes left of 0 leak into another group.
    limit: stop after so many, over all groups. plus_one: inclusive pixels (boxes.py).
    Returns the indices kept, int64, best first; equal scores in order of index. R = 0 gives an empty array.
    Raises ValueError for NaN or infinity, for shapes, and for a threshold outside [0, 1]; TypeError for dtypes.
    """
    checks.float_array("nms.nms", "boxes", boxes, "(R, 4)")
    checks.float_array("nms.nms", "scores", scores, f"({len(boxes)},)")
    checks.same_dtype("nms.nms", boxes=boxes, scores=scores)
    checks.finite("nms.nms", boxes=boxes, scores=scores)
    checks.areas("nms.nms", boxes=boxes)
    if not 0 <= threshold <= 1:
        raise ValueError(f"nms.nms: threshold must lie in [0, 1], got {threshold}")
    if limit is not None:
        checks.whole("nms.nms", 0, limit=limit)
    groups = as_groups("nms.nms", "groups", groups, len(boxes))
    order = np.argsort(-scores, kind="stable")
    run = pick(boxes, numpy=_nms_numpy, numba=_nms_numba)
    kept = run(boxes[order], groups[order], boxes.dtype.type(threshold), inclusive, boxes.dtype.type(plus_one),
               len(boxes) if limit is None else limit)
    return order[kept]


def as_groups(op, name, groups, rows):
    """groups, (rows,) integers, as int64; zeros, one group, for None. Raises TypeError for a dtype, ValueError for a shape."""
    if groups is None:
        return np.zeros(rows, np.int64)
    checks.array(op, name, groups)
    if groups.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be integers, got {groups.dtype}")
    checks.same_shape(op, (rows,), **{name: groups})
    return groups.astype(np.int64)


def by_group(groups):
    """Arrange rows so that each group is one run, in its order. Returns order (R,) and end (R,), where the run of each place ends."""
    order = np.argsort(groups, kind="stable")
    return order, np.searchsorted(groups[order], groups[order], "right")


def _nms_numpy(boxes, groups, threshold, inclusive, one, limit):
    area = (boxes[:, 2:] - boxes[:, :2] + one).clip(0).prod(1)
    kept, left = [], np.arange(len(boxes))
    while len(left) and len(kept) < limit:
        i, left = left[0], left[1:]
        kept.append(i)
        side = np.minimum(boxes[i, 2:], boxes[left, 2:]) - np.maximum(boxes[i, :2], boxes[left, :2]) + one
        inter = side.clip(0).prod(1)
        union = area[i] + area[left] - inter
        over = inter >= threshold * union if inclusive else inter > threshold * union
        left = left[~(over & (union > 0) & (groups[i] == groups[left]))]
    return np.array(kept, np.int64)


def _nms_numba(boxes, groups, threshold, inclusive, one, limit):
    """Each box meets only its own group: 80 groups of 200 boxes cost 80 * 200^2, not 16000^2."""
    order, end = by_group(groups)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return _nms(boxes[order], place, end, threshold, inclusive, one, limit)


@njit(cache=True)
def _nms(boxes, place, end, threshold, inclusive, one, limit):
    """place[r]: where the box of rank r lies; the rest of its group, in order of rank, lies from there to end."""
    n, count, zero = len(boxes), 0, boxes.dtype.type(0)
    kept = np.empty(n, np.int64)
    dropped = np.zeros(n, np.bool_)
    area = np.empty(n, boxes.dtype)
    for i in range(n):
        area[i] = max(zero, boxes[i, 2] - boxes[i, 0] + one) * max(zero, boxes[i, 3] - boxes[i, 1] + one)
    for rank in range(n):
        i = place[rank]
        if dropped[i]:
            continue
        if count == limit:
            break
        kept[count] = rank
        count += 1
        for j in range(i + 1, end[i]):
            if dropped[j]:
                continue
            w = max(zero, min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + one)
            h = max(zero, min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + one)
            inter = w * h
            union = area[i] + area[j] - inter
            if union > 0 and (inter > threshold * union or (inclusive and inter == threshold * union)):
                dropped[j] = True
    return kept[:count]
