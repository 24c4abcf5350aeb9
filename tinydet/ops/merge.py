"""OverFeat's greedy merging: boxes that agree are averaged and their confidence adds up, none is suppressed."""
import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import pick

MATCHES = ("dissimilarity", "literal", "diff")
MODES = ("mean", "count")


def merge(boxes, scores, threshold=0.5, mode="mean", match="dissimilarity"):
    """Merge the pair of boxes that match best until no pair matches well enough (OverFeat, sec. 4.3). For one class.

        loop: (a, b) = argmin over pairs of match_score;  if match_score(a, b) > threshold: stop
              replace both by their average, appended at the end, with score(a) + score(b)
    The paper says only that match_score sums centre distance and intersection area. CHOICE, as that would punish overlap:
    "dissimilarity": distance of centres / sqrt(mean area) + 1 - IoU, 0 for identical boxes, free of scale.
    Options for study: "literal": distance + intersection; "diff": distance - intersection / sqrt(mean area): in the boxes' unit, so
    the threshold depends on it. Two boxes without area score 0 where their centres coincide, else infinity, but for "literal".
    mode "mean": plain average of the two (literal: late boxes weigh more); "count": weighted by the members, so that the
    result is the mean of all of them. The threshold is not in the paper either (CHOICE 0.5: IoU of about 0.69).
    boxes: (R, 4), scores: (R,), one float dtype; worked in float64. Ties: the lowest (a, b).
    Returns boxes (M, 4), scores (M,) in the input's dtype, unmerged ones first, in order; members (M,) int64.
    R = 0 gives empty arrays. Time grows as R^2, at worst as R^3. Works on the host, on detections after their copy there: each merge needs the last.
    Raises ValueError for NaN or infinity, shapes, unknown names, a threshold of NaN; TypeError for dtypes and for arrays on a GPU.
    """
    run = pick(boxes, numpy=_merge_numpy, numba=_merge)
    checks.float_array("merge.merge", "boxes", boxes, "(R, 4)")
    checks.float_array("merge.merge", "scores", scores, f"({len(boxes)},)")
    checks.same_dtype("merge.merge", boxes=boxes, scores=scores)
    checks.finite("merge.merge", boxes=boxes, scores=scores)
    if mode not in MODES or match not in MATCHES:
        raise ValueError(f"merge.merge: mode must be one of {MODES} and match one of {MATCHES}, got {mode!r}, {match!r}")
    if np.isnan(threshold):
        raise ValueError("merge.merge: threshold must be a number, got NaN")
    box, score, members = run(boxes.astype(np.float64, order="C"), scores.astype(np.float64), float(threshold), mode == "count",
                              MATCHES.index(match))
    return box.astype(boxes.dtype), score.astype(boxes.dtype), members


@njit(cache=True)
def _match(a, b, kind):
    """The match score of two boxes (see merge): small = they agree."""
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    distance = np.sqrt(dx * dx + dy * dy)
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1]), max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1])
    side = np.sqrt((area_a + area_b) / 2)
    if kind == 1:
        return distance + inter
    if side == 0:                           # two boxes without area agree only where they coincide
        return 0.0 if distance == 0 else np.inf
    if kind == 2:
        return distance - inter / side
    return distance / side + 1 - inter / (area_a + area_b - inter)


@njit(cache=True)
def _average(a, b, members_a, members_b, count):
    wa, wb = (members_a, members_b) if count else (1, 1)
    return (wa * a + wb * b) / (wa + wb)


def _merge_numpy(boxes, scores, threshold, count, kind):
    boxes, scores, members = list(boxes), list(scores), [1] * len(boxes)
    while len(boxes) > 1:
        pairs = [(a, b) for a in range(len(boxes)) for b in range(a + 1, len(boxes))]
        values = [_match.py_func(boxes[a], boxes[b], kind) for a, b in pairs]
        best = int(np.argmin(values))
        if values[best] > threshold:
            break
        a, b = pairs[best]
        boxes.append(_average.py_func(boxes[a], boxes[b], members[a], members[b], count))
        scores.append(scores[a] + scores[b])
        members.append(members[a] + members[b])
        for column in (boxes, scores, members):
            del column[b], column[a]
    return np.array(boxes).reshape(-1, 4), np.array(scores, float), np.array(members, np.int64)


@njit(cache=True)
def _merge(boxes0, scores0, threshold, count, kind):
    """The same with each box's best later partner kept: a merge costs one pass, and one for each box that lost its partner.

    Only pairs within the threshold matter, and most are ruled out by the distance of their centres alone (_far).
    """
    n = len(boxes0)
    boxes, scores, members = np.empty((2 * n, 4)), np.empty(2 * n), np.ones(2 * n, np.int64)
    boxes[:n], scores[:n] = boxes0, scores0
    places = np.empty((2 * n, 3))                                       # centre and area, for _far
    for r in range(n):
        _place(boxes, places, r)
    alive = np.zeros(2 * n, np.bool_)
    alive[:n] = True
    best, partner = np.full(2 * n, threshold), np.full(2 * n, -1)       # no partner yet: any within the threshold will do
    for r in range(n):
        _find_partner(r, n, boxes, places, alive, best, partner, threshold, kind)
    for new in range(n, 2 * n - 1):
        a = -1
        for r in range(new):
            if alive[r] and partner[r] >= 0 and (a < 0 or best[r] < best[a]):
                a = r
        if a < 0:
            break
        b = partner[a]
        boxes[new] = _average(boxes[a], boxes[b], members[a], members[b], count)
        scores[new], members[new] = scores[a] + scores[b], members[a] + members[b]
        _place(boxes, places, new)
        alive[a], alive[b], alive[new] = False, False, True
        for r in range(new):
            if alive[r]:
                if partner[r] == a or partner[r] == b:
                    _find_partner(r, new + 1, boxes, places, alive, best, partner, threshold, kind)
                elif not _far(places, r, new, best[r], kind):
                    _offer(r, new, boxes, best, partner, kind)
    left = np.flatnonzero(alive)
    return boxes[left], scores[left], members[left]


@njit(cache=True)
def _find_partner(r, end, boxes, places, alive, best, partner, threshold, kind):
    best[r], partner[r] = threshold, -1
    for s in range(r + 1, end):
        if alive[s] and not _far(places, r, s, best[r], kind):
            _offer(r, s, boxes, best, partner, kind)


@njit(cache=True)
def _offer(r, s, boxes, best, partner, kind):
    """Make s the partner of r if it matches better than the one it has; an equal one stays, it came first."""
    value = _match(boxes[r], boxes[s], kind)
    if value < best[r] or (value == best[r] and partner[r] < 0):
        best[r], partner[r] = value, s


@njit(cache=True)
def _place(boxes, places, r):
    places[r, 0], places[r, 1] = (boxes[r, 0] + boxes[r, 2]) / 2, (boxes[r, 1] + boxes[r, 3]) / 2
    places[r, 2] = max(0.0, boxes[r, 2] - boxes[r, 0]) * max(0.0, boxes[r, 3] - boxes[r, 1])


@njit(cache=True)
def _far(places, r, s, bound, kind):
    """True only if the distance of the centres alone proves that the match score is above the bound."""
    dx, dy = places[r, 0] - places[s, 0], places[r, 1] - places[s, 1]
    area = (places[r, 2] + places[s, 2]) / 2 if kind == 0 else 1.0
    return kind != 2 and bound >= 0 and dx * dx + dy * dy > bound * bound * area * (1 + 1e-9)      # "diff" has no such bound
