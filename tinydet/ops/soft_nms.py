"""Soft-NMS: a box that overlaps a better one is not dropped, its score falls."""
import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import pick
from tinydet.ops.nms import as_groups, by_group

METHODS = ("linear", "gaussian")


def soft_nms(boxes, scores, method="linear", threshold=0.3, sigma=0.5, min_score=0.001, groups=None, plus_one=False, limit=None):
    """Put out the best box, lower the scores of those that overlap it, and go on (Soft-NMS, 1704.04503).

        loop: i = argmax s;  if s_i < min_score: stop;  put out (i, s_i);  for every j left in the group of i, with o = IoU(i, j):
              "linear": s_j *= 1 - o where o > threshold        "gaussian": s_j *= exp(-o^2 / sigma), whatever o is
    o > threshold is tested as inter > threshold * union; IoU is 0 where the union is empty.
    CHOICE: a first box below min_score is not put out either (some codes do that).
    boxes: (R, 4), scores: (R,) >= 0, one float dtype; worked in float64. groups, (R,) integers, and plus_one: as in nms.
    limit: stop after so many, over all groups.
    Returns indices int64, in the order they were put out, and their scores at that time, never rising, in the input's dtype.
    Ties: the lowest index. R = 0 gives empty arrays. Both backends give the same bits for "linear"; their exp may differ
    in the last bit, and so may a "gaussian" score by 2.2e-16 of itself for each decay.
    Works on the host, on detections after their copy there: each step needs the last one's scores, and they are few.
    Raises ValueError for NaN, infinity, negative scores, shapes, an unknown method, threshold outside [0, 1], sigma that is
    not finite and > 0, min_score that is not finite and >= 0; TypeError for dtypes
    and for arrays on a GPU.
    """
    op = "soft_nms.soft_nms"
    run = pick(boxes, numpy=_soft_nms_numpy, numba=_soft_nms_numba)
    checks.float_array(op, "boxes", boxes, "(R, 4)")
    checks.float_array(op, "scores", scores, f"({len(boxes)},)")
    checks.same_dtype(op, boxes=boxes, scores=scores)
    checks.finite(op, boxes=boxes, scores=scores)
    checks.areas(op, boxes=boxes)
    if (scores < 0).any():
        raise ValueError(f"{op}: scores must be at least 0, got {scores.min()}")
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"{op}: threshold must lie in [0, 1], got {threshold}")
    if not 0 < sigma < np.inf:
        raise ValueError(f"{op}: sigma must be finite and > 0, got {sigma}")
    if not 0 <= min_score < np.inf:
        raise ValueError(f"{op}: min_score must be finite and >= 0, got {min_score}")
    if limit is not None:
        checks.whole(op, 0, limit=limit)
    groups = as_groups(op, "groups", groups, boxes)
    kept, decayed = run(boxes.astype(np.float64), scores.astype(np.float64), groups, method == "linear", float(threshold),
                        float(sigma), float(min_score), float(plus_one), len(boxes) if limit is None else limit)
    return kept, decayed.astype(scores.dtype)


def _soft_nms_numpy(boxes, scores, groups, linear, threshold, sigma, min_score, one, limit):
    area = (boxes[:, 2:] - boxes[:, :2] + one).clip(0).prod(1)
    kept, left = [], np.arange(len(boxes))
    while len(left) and len(kept) < limit:
        best = np.argmax(scores[left])
        i, left = left[best], np.delete(left, best)
        if scores[i] < min_score:
            break
        kept.append(i)
        side = np.minimum(boxes[i, 2:], boxes[left, 2:]) - np.maximum(boxes[i, :2], boxes[left, :2]) + one
        inter = side.clip(0).prod(1)
        union = area[i] + area[left] - inter
        iou = inter / np.where(union > 0, union, 1)             # inter is 0 where the union is
        if linear:
            decay = np.where(inter > threshold * union, 1 - iou, 1)
        else:
            decay = np.exp(-(iou * iou) / sigma)
        scores[left] *= np.where(groups[left] == groups[i], decay, 1)
    kept = np.array(kept, np.int64)
    return kept, scores[kept]


def _soft_nms_numba(boxes, scores, groups, linear, threshold, sigma, min_score, one, limit):
    """The groups one after the other, then all by falling score: what the loop over all of them would put out."""
    order, end = by_group(groups)
    boxes, scores, starts = boxes[order], scores[order], np.unique(end)
    kept = _soft_nms(boxes, scores, np.concatenate([[0], starts]), linear, threshold, sigma, min_score, one)
    kept = kept[np.lexsort((order[kept], -scores[kept]))][:limit]
    return order[kept], scores[kept]


@njit(cache=True)
def _soft_nms(boxes, scores, borders, linear, threshold, sigma, min_score, one):
    """Lower the scores in place, within each group borders[g]:borders[g + 1]. Returns the places of the boxes put out."""
    n, count = len(boxes), 0
    kept, left, area = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    for i in range(n):
        area[i] = max(0.0, boxes[i, 2] - boxes[i, 0] + one) * max(0.0, boxes[i, 3] - boxes[i, 1] + one)
    for g in range(len(borders) - 1):
        waiting, best = 0, -1                   # left[:waiting]: those that may still be put out, in order; best: a place in it
        for j in range(borders[g], borders[g + 1]):
            if scores[j] >= min_score:
                left[waiting] = j
                if best < 0 or scores[j] > scores[left[best]]:
                    best = waiting
                waiting += 1
        while best >= 0:
            i = left[best]
            kept[count] = i
            count += 1
            passed, waiting, best = left[:waiting], 0, -1
            for j in passed:
                if j == i:
                    continue
                w = max(0.0, min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + one)
                h = max(0.0, min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + one)
                inter = w * h
                union = area[i] + area[j] - inter
                iou = inter / union if union > 0 else 0.0
                if not linear:
                    scores[j] *= np.exp(-(iou * iou) / sigma)
                elif inter > threshold * union:
                    scores[j] *= 1 - iou
                if scores[j] >= min_score:
                    left[waiting] = j
                    if best < 0 or scores[j] > scores[left[best]]:
                        best = waiting
                    waiting += 1
    return kept[:count]
