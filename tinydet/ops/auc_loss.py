"""AUC-loss: the pairwise ranking loss in which every pair of a positive and a negative counts alike; AP-loss is compared with it."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module, pick, scalar
from tinydet.ops import sort

LARGEST = 1e100         # of scores, which are squared


def auc_loss(scores, labels, delta=1.0):
    """Mean over all pairs of a positive i and a negative j of f(s_j - s_i): value and gradient, without pairs (1904.06373, Table 2, unverified).

    f(x) = 0 for x < -delta, (x + delta)^2 / (4 * delta) up to x = delta, then x; delta = 0: max(x, 0), with slope 1/2 at 0.
        g_i = -1/(P N) sum_j H(s_j - s_i),  g_j = 1/(P N) sum_i H(s_j - s_i),  H = f', the step of ap_loss.ap_loss
    So g is AP-loss's update with the rank of every positive replaced by N: no weight on the top of the list, where precision is made.
    Here, unlike there, it is a true derivative, as it does not divide by a rank that moves: of the mean of f, not of the area above the
    ROC curve, the mean of H, which the update was made for (that reading of the paper's comparison: CHOICE, unverified).
    scores: any shape, float32 or float64: raw logits. labels: same shape, integers: 1, 0, and -1 for entries that count nowhere.
    Returns a Python float (on a GPU a 0-d float64 array there) and g, scores' shape and dtype; inner work in float64, off by some
    2^-52 * (spread of the scores)^2 / delta. No positive, or no negative: 0.0 and zeros.
    Time O(n log n). There is no kernel: on a GPU array code serves, some 60 launches around the sort, none of which waits for the host;
    that is enough for a baseline.
    delta: 0 or from 1e-100 to 1e100, in units of the scores.
    Raises ValueError for shapes, other labels, scores at labels 0 and 1 that are not finite or beyond 1e100, other deltas; TypeError for
    dtypes and for a delta that is no number. A GPU does not look at values before: such a score there makes the value NaN, a label that is
    none counts nowhere.
    """
    op = "auc_loss.auc_loss"
    checks.float_array(op, "scores", scores)
    checks.ternary(op, labels, scores.shape)
    checks.ranked(op, scores, labels)
    delta = checks.half_width(op, delta)
    if checks.on_host(scores) and (most := float(abs(scores[labels >= 0]).max(initial=0))) > LARGEST:
        raise ValueError(f"{op}: scores must lie in [-{LARGEST:g}, {LARGEST:g}] where labels are 0 or 1, got {most:g}")
    return pick(scores, numpy=_auc_loss, cuda=_auc_loss)(scores, labels, delta)


def arranged(scores, y):
    """What pairwise losses sum over: the order of the scores; they, sorted, seen from the middle of the positives, where sums lose the
    least; and which of them are positive and negative, as 1.0 and 0.0. scores: any shape, n entries; y: labels (n,). Returns order (n,)
    int32 and three arrays (n,) float64. Equal scores in order of index; scores that count nowhere stand at 0, before the shift."""
    xp = array_module(scores)
    s = xp.where(y < 0, 0, scores.reshape(-1)).astype(np.float64)
    order = sort.argsort(s)
    s, y = s[order], y[order]
    positive, negative = (y == 1).astype(np.float64), (y == 0).astype(np.float64)
    return order, s - (positive * s).sum() / xp.maximum(positive.sum(), 1), positive, negative


def _auc_loss(scores, labels, delta):
    """All entries sorted; prefix sums over the positives (and the negatives) give what a score meets below, in and above its window."""
    xp, y = array_module(scores), labels.reshape(-1)
    if scores.size == 0:
        return scalar(xp.zeros((), np.float64)), xp.zeros(scores.shape, scores.dtype)
    order, u, positive, negative = arranged(scores, y)
    pairs = xp.maximum(positive.sum() * negative.sum(), 1)
    low, high = (xp.searchsorted(u, u + side * delta, way) for side, way in ((-1, "left"), (1, "right")))
    half = 1 / (2 * delta) if delta else 0.0

    def before(x):
        return xp.concatenate([xp.zeros(1), xp.cumsum(x)])

    p0, p1, p2, n0, n1 = (before(x) for x in (positive, positive * u, positive * u * u, negative, negative * u))
    windows = p0[high] - p0[low], p1[high] - p1[low], p2[high] - p2[low]
    met = p0[low] + 0.5 * windows[0] + half * (u * windows[0] - windows[1])                 # sum of H over the positives
    count, total = n0[high] - n0[low], n1[high] - n1[low]
    meets = n0[-1] - n0[high] + 0.5 * count + half * (total - u * count)                    # sum of H over the negatives
    v = u + delta
    inside = half / 2 * (v * v * windows[0] - 2 * v * windows[1] + windows[2])              # sum of (u - p + delta)^2 / (4 * delta)
    value = (negative * (u * p0[low] - p1[low] + xp.maximum(inside, 0))).sum() / pairs
    g = xp.zeros(u.shape, np.float64)
    g[order] = (negative * xp.maximum(met, 0) - positive * xp.maximum(meets, 0)) / pairs
    return scalar(value), g.reshape(scores.shape).astype(scores.dtype)
