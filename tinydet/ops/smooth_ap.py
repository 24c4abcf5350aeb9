"""Smooth-AP: average precision with every step of its ranks replaced by a sigmoid, and its true gradient; AP-loss is compared with it."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module, pick, scalar
from tinydet.ops.ap_loss import finite
from tinydet.ops.logistic_loss import sigmoid

PAIRS = 1 << 22         # at once: 32 MB an array


def smooth_ap(scores, labels, tau=0.5):
    """1 - AP with smooth ranks: value and gradient (Brown et al., 2007.12163, unverified; the kind of ap-loss notes, sec. 6, Table 3).

    S(x) = 1 / (1 + exp(-x / tau)); for a positive i:  a_i = 1 + sum_{k != i} S(s_k - s_i) over positives, b_i = sum_j S(s_j - s_i) over
    negatives:  value = 1/P sum_i b_i / (a_i + b_i);  with w_i = 1 / (P * (a_i + b_i)^2) and the slopes S' = S * (1 - S) / tau
        g_j = sum_i w_i a_i S'(s_j - s_i);  g_k = -sum_{i != k} w_i b_i S'(s_k - s_i) - (what i = k hands to all others)
    A true derivative, unlike ap_loss.ap_loss: it fades where S is flat, so a pair ordered badly enough is left as it is.
    tau: above 0, in units of the scores. CHOICE 0.5: S is then as steep at 0 as AP-loss's step with delta = 1; Smooth-AP's 0.01
    (unverified) is for cosine similarities.
    scores: any shape, float32 or float64: raw logits. labels: same shape, integers: 1, 0, and -1 for entries that count nowhere.
    Returns a Python float (on a GPU a 0-d float64 array there) and g, scores' shape and dtype; inner work in float64. No positive, or no
    negative: 0.0 and zeros. Adding the same number to all scores changes nothing, so g adds up to 0.
    Time O(P * (P + N)), some 4 million pairs at once. There is no kernel: array code serves, on a GPU too, where the numbers of
    positives and negatives are read from it; a baseline for small sets only.
    Raises ValueError for shapes, other labels, scores not finite at labels 0 and 1, another tau; TypeError for dtypes. A GPU does not look
    at values before: a score that is not finite there makes the value NaN, a label that is none counts nowhere.
    """
    op = "smooth_ap.smooth_ap"
    checks.float_array(op, "scores", scores)
    checks.ternary(op, labels, scores.shape)
    finite(op, scores, labels)
    if not 0 < tau < np.inf:
        raise ValueError(f"{op}: tau must be finite and above 0, got {tau}")
    return pick(scores, numpy=_smooth_ap, cuda=_smooth_ap)(scores, labels, float(tau))


def _smooth_ap(scores, labels, tau):
    xp, s, y = array_module(scores), scores.reshape(-1).astype(np.float64), labels.reshape(-1)
    positive, negative = xp.flatnonzero(y == 1), xp.flatnonzero(y == 0)
    P, both = len(positive), xp.concatenate([positive, negative])
    value, g, u = xp.zeros((), np.float64), xp.zeros(s.shape, np.float64), s[both]
    rows = max(1, PAIRS // max(1, len(both)))
    for first in range(0, P if len(negative) else 0, rows):
        i = slice(first, min(P, first + rows))
        S = sigmoid((u - u[i, None]) / tau)                         # (rows, P + N)
        slope = S * (1 - S) / tau
        a, b = S[:, :P].sum(1) + 0.5, S[:, P:].sum(1)               # its own S is 1/2; its own slope is added and taken away below
        value += (b / (a + b)).sum() / P
        w = 1 / (P * (a + b) ** 2)
        slope[:, :P] *= -(w * b)[:, None]
        slope[:, P:] *= (w * a)[:, None]
        g[both] += slope.sum(0)
        g[both[i]] -= slope.sum(1)
    return scalar(value), g.reshape(scores.shape).astype(scores.dtype)
