"""Box voting: a detection takes the mean of the boxes that agree with it."""
import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import pick
from tinydet.ops.nms import as_groups, by_group


def box_voting(kept_boxes, boxes, scores, threshold=0.5, kept_groups=None, groups=None, plus_one=False):
    """Each kept box becomes the score-weighted mean of the pool's boxes that overlap it (MR-CNN, 1505.01749; in OHEM, 1604.03540).

    y_i = sum_j s_j b_j / sum_j s_j over the pool's j of the same group with IoU(kept_i, b_j) >= threshold,
    tested as inter >= threshold * union; boxes of empty union do not vote. The pool is what NMS chose from, the kept boxes
    included; their scores stay, so only boxes are returned.
    kept_boxes: (R, 4), boxes: (P, 4), scores: (P,) >= 0, one float dtype; worked and added up in float64, in order of index.
    kept_groups: (R,), groups: (P,), integers (classes, images), both or neither. plus_one: inclusive pixels (boxes.py).
    Returns (R, 4), the input's dtype. A kept box without a voter, or whose voters weigh 0 in all, stays as it is.
    Works on the host, on detections after their copy there: they are few.
    Raises ValueError for NaN, infinity, negative scores, shapes, a threshold outside [0, 1], groups on one side only; TypeError
    for dtypes and for arrays on a GPU.
    """
    op = "box_voting.box_voting"
    run = pick(boxes, numpy=_vote_numpy, numba=_vote_numba)
    checks.float_array(op, "kept_boxes", kept_boxes, "(R, 4)")
    checks.float_array(op, "boxes", boxes, "(P, 4)")
    checks.float_array(op, "scores", scores, f"({len(boxes)},)")
    checks.same_dtype(op, kept_boxes=kept_boxes, boxes=boxes, scores=scores)
    checks.finite(op, kept_boxes=kept_boxes, boxes=boxes, scores=scores)
    checks.areas(op, kept_boxes=kept_boxes, boxes=boxes)
    largest = float(abs(boxes).max(initial=1.0))
    if not float(scores.sum(dtype="float64")) < np.finfo(float).max / largest:
        raise ValueError(f"{op}: scores must have a sum that times a coordinate stays finite, got scores up to {scores.max():g}")
    if (scores < 0).any():
        raise ValueError(f"{op}: scores must be at least 0, got {scores.min()}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"{op}: threshold must lie in [0, 1], got {threshold}")
    if (kept_groups is None) != (groups is None):
        only = "groups" if kept_groups is None else "kept_groups"
        raise ValueError(f"{op}: kept_groups and groups must be given together, got only {only}")
    kept_groups = as_groups(op, "kept_groups", kept_groups, kept_boxes)
    groups = as_groups(op, "groups", groups, boxes)
    voted = run(kept_boxes.astype(np.float64, "C"), boxes.astype(np.float64), scores.astype(np.float64), kept_groups, groups,
                float(threshold), float(plus_one))
    return voted.astype(boxes.dtype)


def _vote_numpy(kept, boxes, scores, kept_groups, groups, threshold, one):
    area = (kept[:, 2:] - kept[:, :2] + one).clip(0).prod(1)
    total, sums = np.zeros((len(kept), 1)), np.zeros((len(kept), 4))
    for j, b in enumerate(boxes):
        inter = (np.minimum(kept[:, 2:], b[2:]) - np.maximum(kept[:, :2], b[:2]) + one).clip(0).prod(1)
        union = area + (b[2:] - b[:2] + one).clip(0).prod() - inter
        votes = (inter >= threshold * union) & (union > 0) & (kept_groups == groups[j])
        total[votes] += scores[j]
        sums[votes] += scores[j] * b
    return np.where(total > 0, sums / np.where(total > 0, total, 1), kept)


def _vote_numba(kept, boxes, scores, kept_groups, groups, threshold, one):
    order, _ = by_group(groups)
    groups = groups[order]
    first, end = np.searchsorted(groups, kept_groups), np.searchsorted(groups, kept_groups, "right")
    return _vote(kept, boxes[order], scores[order], first, end, threshold, one)


@njit(cache=True)
def _vote(kept, boxes, scores, first, end, threshold, one):
    """The group of kept box i is boxes[first[i]:end[i]]."""
    voted = kept.copy()
    area = np.empty(len(boxes))
    for j in range(len(boxes)):
        area[j] = max(0.0, boxes[j, 2] - boxes[j, 0] + one) * max(0.0, boxes[j, 3] - boxes[j, 1] + one)
    for i in range(len(kept)):
        own = max(0.0, kept[i, 2] - kept[i, 0] + one) * max(0.0, kept[i, 3] - kept[i, 1] + one)
        total, sums = 0.0, np.zeros(4)
        for j in range(first[i], end[i]):
            w = max(0.0, min(kept[i, 2], boxes[j, 2]) - max(kept[i, 0], boxes[j, 0]) + one)
            h = max(0.0, min(kept[i, 3], boxes[j, 3]) - max(kept[i, 1], boxes[j, 1]) + one)
            inter = w * h
            union = own + area[j] - inter
            if union > 0 and inter >= threshold * union:
                total += scores[j]
                for k in range(4):
                    sums[k] += scores[j] * boxes[j, k]
        if total > 0:
            voted[i] = sums / total
    return voted
