"""Smoothed AP: average precision with every step of its ranks made linear, and its true derivative; AP-loss is compared with it."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module, pick, scalar
from tinydet.ops.auc_loss import arranged


def smooth_ap(scores, labels, delta=1.0):
    """1 - AP with linear steps: the value of ap_loss.ap_loss without interpolation, with its derivative in place of the update.

    H(x) = clip(x / (2 * delta) + 1/2, 0, 1); for a positive i:  a_i = 1 + sum_{k != i} H(s_k - s_i) over positives, b_i = sum_j
    H(s_j - s_i) over negatives:  value = 1/P sum_i b_i / (a_i + b_i);  with w_i = 1 / (P * (a_i + b_i)^2) and the slope
    h(x) = 1 / (2 * delta) for |x| < delta, else 0:
        g_j = sum_i w_i a_i h(s_j - s_i);  g_i = -w_i a_i sum_j h(s_j - s_i) + sum_{k != i} (w_i b_i - w_k b_k) h(s_k - s_i)
    A true derivative, unlike that update: it is 0 where H is flat, so a pair that is wrong by more than delta is left as it is. That makes
    it the control for the paper's update (1904.06373, Table 3, unverified, compares with the gradient of a smoothed AP; that this is the one
    meant: CHOICE, unverified. Smooth-AP, 2007.12163, has sigmoids for steps, unverified, and needs all pairs).
    scores: any shape, float32 or float64: raw logits. labels: same shape, integers: 1, 0, and -1 for entries that count nowhere.
    delta: from 1e-100 to 1e100, in units of the scores. At a corner of H the slope is 0.
    Returns a Python float (on a GPU a 0-d float64 array there) and g, scores' shape and dtype; inner work in float64, off by some
    2^-52 * entries * (spread of the scores) / delta, which must be at most 1e-6 (ap_loss.ap_loss has no such limit). No positive, or
    no negative: 0.0 and zeros. Adding the same number to all scores changes nothing, so g adds up to 0.
    Time O(n log n). There is no kernel: on a GPU array code serves, none of which waits for the host; that is enough for a baseline.
    Raises ValueError for shapes, other labels, scores not finite at labels 0 and 1, another delta, one too small for the scores' spread;
    TypeError for dtypes and for a delta that is no number. A GPU does not look at values before: a score that is not finite there makes
    the value NaN, a label that is none counts nowhere, and with such a delta value and g are noise.
    """
    op = "smooth_ap.smooth_ap"
    checks.float_array(op, "scores", scores)
    checks.ternary(op, labels, scores.shape)
    checks.ranked(op, scores, labels)
    delta = checks.half_width(op, delta, zero=False)
    if checks.on_host(scores) and (labels >= 0).any():
        least = 1e6 * 2.0**-52 * scores.size * float(np.ptp(scores[labels >= 0].astype(np.float64)))
        if delta < least:
            raise ValueError(f"{op}: delta must be at least {least:.2g} for {scores.size} scores of this spread, got {delta:g}: the rest is rounding")
    return pick(scores, numpy=_smooth_ap, cuda=_smooth_ap)(scores, labels, delta)


def _smooth_ap(scores, labels, delta):
    """All entries sorted; prefix sums give what a score meets in its window, (s - delta, s + delta), and above."""
    xp, y = array_module(scores), labels.reshape(-1)
    if scores.size == 0:
        return scalar(xp.zeros((), np.float64)), xp.zeros(scores.shape, scores.dtype)
    order, u, positive, negative = arranged(scores, y)
    P = xp.maximum(positive.sum(), 1)
    low, high = xp.searchsorted(u, u - delta, "right"), xp.searchsorted(u, u + delta, "left")

    def inside(x):
        sums = xp.concatenate([xp.zeros(1), xp.cumsum(x)])
        return sums[high] - sums[low], sums[-1] - sums[high]        # and above

    def steps(x):                                                   # sum of H over those that x marks
        (count, above), (total, _) = inside(x), inside(x * u)
        return above + 0.5 * count + (total - u * count) / (2 * delta)

    a, b = steps(positive) + 0.5, xp.maximum(steps(negative), 0)    # its own H is the other half
    value = (positive * b / (a + b)).sum() / P
    wa, wb = (positive * x / (P * (a + b) ** 2) for x in (a, b))
    (of_a, _), (of_b, _), (negatives, _), (positives, _) = map(inside, (wa, wb, negative, positive))
    g = xp.zeros(u.shape, np.float64)
    g[order] = (negative * xp.maximum(of_a, 0) - positive * of_b - wa * negatives + wb * positives) / (2 * delta)
    return scalar(value), g.reshape(scores.shape).astype(scores.dtype)
