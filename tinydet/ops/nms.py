"""Greedy non-maximum suppression."""
import numpy as np
from numba import njit

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, to_numpy
from tinydet.ops import sort

BLOCK = 64              # kept boxes that a box meets before it asks whether one of them suppressed it
MOST = 1 << 17          # boxes on a GPU: one bit for each pair are 2^31 bytes


def nms(boxes, scores, threshold, inclusive=False, plus_one=False, limit=None, groups=None):
    """Keep the best box, drop those that overlap it, go on with the best of the rest (as Fast R-CNN's code does).

    In order of score: box i is kept, and every later j of its group with IoU(i, j) > threshold is dropped (inclusive=True: >=;
    released codes have either, the default is a CHOICE).
    Tested as inter > threshold * union, without a division; two boxes of empty union never suppress each other.
    boxes: (R, 4), scores: (R,), one float dtype. groups: (R,) integers (classes, images, labels), None is one group: compared,
    never added to the coordinates, which costs float32 its last bits and lets boxes left of 0 leak into another group.
    limit: stop after so many, over all groups. plus_one: inclusive pixels (boxes.py).
    Returns the indices kept, int64, best first; equal scores in order of index. R = 0 gives an empty array.
    On a GPU nothing waits for the host until the number kept is read, at the end; what is wrong with the values is raised then, too.
    There it takes R^2/8 bytes, and R is at most 131072.
    Raises ValueError for NaN or infinity, for areas that the dtype does not hold, for shapes, for a threshold outside [0, 1]
    and for more boxes than a GPU takes; TypeError for dtypes.
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
    groups = as_groups("nms.nms", "groups", groups, boxes)
    run = pick(boxes, numpy=_nms_numpy, numba=_nms_numba, cuda=_nms_cuda)
    return run(boxes, scores, groups, boxes.dtype.type(threshold), bool(inclusive), boxes.dtype.type(plus_one),
               len(boxes) if limit is None else limit)


def as_groups(op, name, groups, boxes):
    """groups, (R,) integers, as int64; zeros, one group, for None. Raises TypeError for a dtype, ValueError for a shape."""
    if groups is None:
        return array_module(boxes).zeros(len(boxes), np.int64)
    checks.integers(op, name, groups, (len(boxes),))
    return groups.astype(np.int64)


def by_group(groups):
    """Arrange rows so that each group is one run, in its order. Returns order (R,) and end (R,), where the run of each place ends.

    groups: (R,) integers, on the host.
    """
    order = np.argsort(groups, kind="stable")
    return order, np.searchsorted(groups[order], groups[order], "right")


def _nms_numpy(boxes, scores, groups, threshold, inclusive, one, limit):
    area = (boxes[:, 2:] - boxes[:, :2] + one).clip(0).prod(1)
    kept, left = [], np.argsort(-scores, kind="stable")
    while len(left) and len(kept) < limit:
        i, left = left[0], left[1:]
        kept.append(i)
        side = np.minimum(boxes[i, 2:], boxes[left, 2:]) - np.maximum(boxes[i, :2], boxes[left, :2]) + one
        inter = side.clip(0).prod(1)
        union = area[i] + area[left] - inter
        over = inter >= threshold * union if inclusive else inter > threshold * union
        left = left[~(over & (union > 0) & (groups[i] == groups[left]))]
    return np.array(kept, np.int64)


def _nms_numba(boxes, scores, groups, threshold, inclusive, one, limit):
    """Each box meets only the kept boxes of its own group: 80 groups of 200 boxes cost 80 * 200^2, not 16000^2."""
    best = np.argsort(-scores, kind="stable")
    groups = groups[best]
    order = np.argsort(groups, kind="stable")
    start = np.empty_like(order)
    start[order] = np.searchsorted(groups[order], groups[order])
    return best[_nms(boxes[best], start, threshold, inclusive, one, limit)]


@njit(cache=True)
def _nms(boxes, start, threshold, inclusive, one, limit):
    """Keep a box unless a kept one of its group suppresses it: the pairs of the reference, but BLOCK of them in one vector loop.

    start[r]: where the group of box r begins in x1, y1, x2, y2, area, the coordinates of the kept boxes, group by group.
    """
    n, count, zero = len(boxes), 0, boxes.dtype.type(0)
    kept, size = np.empty(n, np.int64), np.zeros(n, np.int64)       # size: how many a group has kept, at its start
    x1, y1, x2, y2, area = [np.empty(n, boxes.dtype) for _ in range(5)]
    for r in range(n):
        if count == limit:
            break
        a1, b1, a2, b2 = boxes[r, 0], boxes[r, 1], boxes[r, 2], boxes[r, 3]
        own = max(zero, a2 - a1 + one) * max(zero, b2 - b1 + one)
        at, end = start[r], start[r] + size[start[r]]
        over = False
        while at < end and not over:
            stop = min(at + BLOCK, end)
            for k in range(np.uint64(at), np.uint64(stop)):         # signed, k could count from the end: no vector code
                w = max(zero, min(a2, x2[k]) - max(a1, x1[k]) + one)
                h = max(zero, min(b2, y2[k]) - max(b1, y1[k]) + one)
                inter = w * h
                union = own + area[k] - inter
                over = over | ((union > 0) & ((inter > threshold * union) | (inclusive & (inter == threshold * union))))
            at = stop
        if not over:
            x1[end], y1[end], x2[end], y2[end], area[end] = a1, b1, a2, b2, own
            size[start[r]] += 1
            kept[count] = r
            count += 1
    return kept[:count]


# CUDA: kernels/nms.cu, two launches after the sort

def _nms_cuda(boxes, scores, groups, threshold, inclusive, one, limit):
    xp, n = array_module(boxes), len(boxes)
    kept = cuda.empty(boxes, n, np.int64)
    if n > MOST:
        raise ValueError(f"nms.nms: on a GPU there must be at most {MOST} boxes, got {n}: keep the best by score before")
    if n == 0:
        return kept
    words, order = -(-n // 64), sort.argsort(scores, descending=True)
    mask, info = cuda.empty(boxes, n * words, np.uint64), xp.zeros(2, np.int32)         # info: number kept, whether a value is bad
    inputs = (xp.ascontiguousarray(a) for a in (boxes, scores, groups))
    cuda.launch("nms.cu", "nms_mask", (*inputs, order, mask, info, n, threshold, inclusive, one, np.finfo(boxes.dtype).max / 16),
                grid=(words, words), block=64)
    cuda.launch("nms.cu", "nms_reduce", (mask.view(np.uint32), order, kept, info, n, min(limit, n)), grid=1,
                block=256 if words <= 64 else 1024, shared=8 * words, real=cuda.CTYPES[boxes.dtype])
    count, bad = to_numpy(info).tolist()                                                # the one wait for the GPU
    if bad:
        boxes, scores = to_numpy(boxes), to_numpy(scores)
        checks.finite("nms.nms", boxes=boxes, scores=scores)
        checks.areas("nms.nms", boxes=boxes)
    return kept[:count]
