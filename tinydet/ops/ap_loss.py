"""AP-loss: 1 - average precision of a ranking, and the error-driven update that lowers it.

The update is NOT the derivative of the loss, which is 0 almost everywhere (a rank is a step function of the scores), nor of the loss with
its steps made linear. It hands each wrongly ordered pair its share of the lost precision, as the perceptron does (notes, sec. 2.1, 2.2).
"""
import math

import numpy as np
from numba import get_num_threads, njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar
from tinydet.ops import scan, sort
from tinydet.ops.logistic_loss import small

MOST = 1 << 20          # positives on a GPU: what it keeps for each is allocated before their number is known
CELLS = 1 << 18         # at most, of the table that shortens searches on the CPU


def ap_loss(scores, labels, delta=1.0, interpolated=True):
    """1 - AP of all entries ranked together, and the error-driven update (AP-loss, CVPR 2019, 1904.06373; ap-loss notes, sec. 1 and 2).

    H(x) = clip(x / (2 * delta) + 1/2, 0, 1); delta = 0: 0, 1/2 or 1 for x below, at or above 0. For a positive i, over positives k and
    negatives j:  a_i = 1 + sum_{k != i} H(s_k - s_i),  b_i = sum_j H(s_j - s_i),  e_i = b_i / (a_i + b_i), the precision lost at i;
    interpolated=True: E_i = min e_k over positives with s_k <= s_i (sec. 2.4), else E_i = e_i.
        loss = 1/P sum_i E_i;  g_i = -E_i / P;  g_j = 1/P sum_i H(s_j - s_i) * E_i / b_i  (terms with b_i = 0 left out)
    g is NOT the derivative of the loss: never compare it with differences of the loss. It is the derivative of
    sum_ij C_ij (s_j - s_i) with the weights C_ij = H(s_j - s_i) * E_i / (b_i P) held fixed. It adds up to -loss over the positives and
    to +loss over the negatives, so |g| adds up to 2 * loss whatever the numbers of either.
    scores: any shape, float32 or float64: raw logits, ranked as one list; for a ranking of each image call once an image. labels: same
    shape, integers: 1, 0, and -1 for entries that count nowhere, whatever they hold.
    delta: 0 or from 1e-100 to 1e100, in units of the scores. Returns loss, a Python float (on a GPU a 0-d float64 array there), and g,
    scores' shape and dtype; all inner work is in float64. No positive, or no negative: 0.0 and zeros. Equal scores of equal label get
    equal g. Time O((P + N) log P); on the CPU memory for g and a little for each positive.
    On a GPU nothing waits for the host; at most 1048576 positives; scratch memory: five arrays as large as scores (the sort brings the
    positives to the front) and some 70 bytes for each of at most 1048576 entries. Sums over negatives are integers, multiples of about
    entries * delta / 2^61, so their order does not show, there or with several threads: each run gives the same bits.
    Raises ValueError for shapes, other labels, scores not finite at labels 0 and 1, other deltas; TypeError for dtypes. A GPU does not look
    at values before: there such scores, labels (as int8, which needs no conversion) and too many positives make loss and all of g NaN.
    """
    op = "ap_loss.ap_loss"
    checks.float_array(op, "scores", scores)
    checks.ternary(op, labels, scores.shape)
    finite(op, scores, labels)
    if not (delta == 0 or 1e-100 <= delta <= 1e100):
        raise ValueError(f"{op}: delta must be 0 or lie in [1e-100, 1e100], got {delta}")
    if not isinstance(interpolated, bool):
        raise TypeError(f"{op}: interpolated must be True or False, got {interpolated!r}")
    run = pick(scores, numpy=_ap_loss_numpy, numba=_ap_loss_numba, cuda=_ap_loss_cuda)
    return run(scores, labels, float(delta), interpolated)


def finite(op, scores, labels):
    """Raise ValueError unless all scores that count (labels 0 and 1) are finite; on the host alone."""
    if checks.on_host(scores) and not (np.isfinite(scores) | (labels < 0)).all():
        bad = scores[(labels >= 0) & ~np.isfinite(scores)][0]
        raise ValueError(f"{op}: scores must be finite where labels are 0 or 1, got {bad}")


def step(x, delta):
    """H(x) = clip(x / (2 * delta) + 1/2, 0, 1), and its limit for delta = 0, where H(0) = 1/2 (notes, sec. 2.3). On a GPU: array code."""
    xp = array_module(x)
    return xp.clip(x / (2 * delta) + 0.5, 0, 1) if delta else (xp.sign(x) + 1) / 2


def _ap_loss_numpy(scores, labels, delta, interpolated):
    """By definition, a positive at a time, from the lowest score up: O(P * (P + N))."""
    s, y = scores.reshape(-1).astype(np.float64), labels.reshape(-1)
    positive, negative = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    p, n, P = s[positive], s[negative], max(1, len(positive))
    g, least = np.zeros(s.shape), np.inf
    with np.errstate(over="ignore"):
        for i in np.argsort(p, kind="stable"):
            a = step(p - p[i], delta).sum() + 0.5                   # its own step is the other half
            h = step(n - p[i], delta)
            b = h.sum()
            least = min(least, b / (a + b)) if interpolated else b / (a + b)
            g[positive[i]] = -least / P
            if b > 0:
                g[negative] += h * (least / b / P)
    return float(-g[positive].sum()), g.reshape(scores.shape).astype(scores.dtype)


# Numba and CUDA: the same without pairs (notes, sec. 4.3). Positives p are sorted. A negative v has l = #{v - p >= delta} of them far
# below, with H = 1, and H is linear for those from l up to h = #{v - p > -delta}. So v counts 1 in b_i for i < l, which is noted at l, and
# (v - p_i) / (2 * delta) + 1/2 for l <= i < h, which is noted at l and taken back at h; then sums up to i give b_i. As H is linear there,
# sums of weights and of weights times p over [l, h) are enough for g at v. Sums of scores are kept as 64-bit integers, modulo 2^64:
# exact in any order, right whatever the scores, since what is left within a window is at most entries * delta. The weighted p are
# seen from `origin`, the last positive up to p that no window holds together with the one before it: no window reaches across one.

def _constants(count, delta):
    """reach: half the width of a window; slope of H inside, 1 / (2 * delta); scale and unit, see `_fixed`.

    delta = 0: differences from the smallest number above 0 on are out of reach, so a window holds equal scores only, with H = 1/2.
    """
    exponent = math.frexp(count * delta)[1]                         # count * delta < 2^exponent
    slope, reach = (1 / (2 * delta), delta) if delta else (0.0, 5e-324)
    return reach, slope, math.ldexp(1, -3 - exponent), math.ldexp(1, exponent - 61)


def _ap_loss_numba(scores, labels, delta, interpolated):
    x, y = np.ascontiguousarray(scores).reshape(-1), np.ascontiguousarray(small(labels)).reshape(-1)
    g = np.zeros(x.shape, x.dtype)
    order = np.flatnonzero(y == 1)
    if len(order) == 0:
        return 0.0, g.reshape(scores.shape)
    order = order[np.argsort(x[order], kind="stable")]
    p, (reach, slope, scale, unit) = x[order].astype(np.float64), _constants(len(x), delta)
    table = _table(p, reach)
    above, inside, sums = _negatives(x, y, p, reach, scale, *table, get_num_threads())
    least, w0, w1, origin = _positives(p, above, inside, sums, reach, slope, scale, unit, interpolated)
    _gradients(x, y, g, p, w0, w1, origin, reach, slope, *table)
    g[order] = 0 - least / len(p)
    return float(least.sum()) / len(p), g.reshape(scores.shape)


def _table(p, reach):
    """What bounds l and h of a score v: with c its cell, int((v - low) * rate) clipped to the table, left[c] <= l <= left[c + 3],
    and right likewise for h.

    One cell on either side is to spare, and cells are wider than some roundings of a score.
    """
    cells, low, high = min(16 * len(p), CELLS), p[0] - reach, p[-1] + reach
    eps, tiny = np.finfo(np.float64).eps, np.finfo(np.float64).tiny
    rate = 1 / max(high / cells - low / cells, 8 * eps * max(abs(low), abs(high)), tiny)

    def up_to(edges):
        cell = np.clip((edges - low) * rate, 0, cells - 1).astype(np.int64)
        return np.cumsum(np.bincount(cell + 2, minlength=cells + 3)).astype(np.int32)
    with np.errstate(over="ignore"):
        return low, rate, up_to(p + reach), up_to(p - reach)


@njit(cache=True)
def _fixed(v, scale):
    """v as a whole multiple of the unit, modulo 2^64. scale = 1 / (unit * 2^64), a power of two; one that leaves float64 is 0 modulo 2^64."""
    turns = v * scale
    if abs(turns) >= 4503599627370496.0:
        return np.int64(0)
    turns -= np.rint(turns)
    if turns == 0.5:
        turns = -0.5
    return np.int64(np.rint(turns * 18446744073709551616.0))


@njit(cache=True)
def _window(v, p, reach, low, rate, left, right):
    """l and h of a score v."""
    at = (v - low) * rate
    last = len(left) - 4
    cell = 0 if at < 0 else last if at > last else int(at)
    l, end = left[cell], left[cell + 3]
    while l < end:
        k = (l + end) >> 1
        if v - p[k] >= reach:
            l = k + 1
        else:
            end = k
    h, end = max(l, right[cell]), right[cell + 3]
    while h < end:
        k = (h + end) >> 1
        if v - p[k] > -reach:
            h = k + 1
        else:
            end = k
    return l, h


@njit(cache=True, parallel=True)
def _negatives(x, y, p, reach, scale, low, rate, left, right, parts):
    """For each positive: how many negatives lie beyond the window of the one before, how many inside its own, and the sum of the latter.

    All are integers, so neither the number of parts nor their order shows.
    """
    P, n = len(p), len(x)
    above, inside, sums = np.zeros((parts, P + 1), np.int64), np.zeros((parts, P + 1), np.int64), np.zeros((parts, P + 1), np.int64)
    for part in prange(parts):
        beyond, within, total = above[part], inside[part], sums[part]
        for i in range(part * n // parts, (part + 1) * n // parts):
            v = np.float64(x[i])
            if y[i] == 0 and v - p[0] > -reach:
                l, h = _window(v, p, reach, low, rate, left, right)
                beyond[l] += 1
                if l < h:
                    q = _fixed(v, scale)
                    within[l] += 1
                    within[h] -= 1
                    total[l] += q
                    total[h] -= q
    return above.sum(0)[::-1].cumsum()[::-1], inside.sum(0).cumsum(), sums.sum(0).cumsum()


@njit(cache=True)
def _positives(p, above, inside, sums, reach, slope, scale, unit, interpolated):
    """E; the sums of w = E / b and of w * (p - origin) over the positives before each; origin."""
    P = len(p)
    least, w0, w1, origin = np.empty(P), np.zeros(P + 1), np.zeros(P + 1), np.empty(P)
    lo, hi, within = 0, 0, np.int64(0)                              # the window of i among the positives themselves, and its sum
    for i in range(P):
        q = _fixed(p[i], scale)
        while hi < P and p[hi] - p[i] < reach:
            within += _fixed(p[hi], scale)
            hi += 1
        while p[lo] - p[i] <= -reach:
            within -= _fixed(p[lo], scale)
            lo += 1
        a = (P - hi) + 0.5 * (hi - lo + 1) + slope * (unit * (within - (hi - lo) * q))
        b = max(0.0, above[i + 1] + 0.5 * inside[i] + slope * (unit * (sums[i] - inside[i] * q)))
        e = b / (a + b)
        least[i] = min(e, least[i - 1]) if interpolated and i > 0 else e
        w = least[i] / b if b > 0 else 0.0
        w0[i + 1] = w0[i] + w
        origin[i] = origin[i - 1] if i > 0 and p[i] - p[i - 1] <= 2 * reach else p[i]
        w1[i + 1] = w1[i] + w * (p[i] - origin[i])
    return least, w0, w1, origin


@njit(cache=True, parallel=True)
def _gradients(x, y, g, p, w0, w1, origin, reach, slope, low, rate, left, right):
    P = len(p)
    for i in prange(len(x)):
        v = np.float64(x[i])
        if y[i] == 0 and v - p[0] > -reach:
            l, h = _window(v, p, reach, low, rate, left, right)
            total = w0[l]
            if l < h:
                w = w0[h] - w0[l]
                total += 0.5 * w + slope * ((v - origin[l]) * w - (w1[h] - w1[l]))
            g[i] = max(0.0, total) / P


# CUDA: kernels/ap_loss.cu, five launches, between array code that counts the positives and marks them (four), a sort that brings them to the
# front in rising order (one launch up to 2048 entries, 13 or more beyond) and six scans (one or three each)

def _ap_loss_cuda(scores, labels, delta, interpolated):
    xp, n = array_module(scores), scores.size
    if n == 0:
        return scalar(xp.zeros((), np.float64)), xp.zeros(scores.shape, scores.dtype)
    x, y = xp.ascontiguousarray(scores).reshape(-1), xp.ascontiguousarray(small(labels)).reshape(-1)
    reach, slope, scale, unit = _constants(n, delta)
    count, order = xp.asarray((y == 1).sum()), sort.argsort(xp.where(y == 1, x, x.dtype.type(np.nan)))      # NaN comes last
    y, C = y.view(np.uint8), min(n, MOST)
    order = order[:C]

    def new(dtype, size=C + 1):
        return cuda.empty(x, size, dtype)

    p, q, bad = new(x.dtype, C), new(np.int64), new(np.int32, 1)
    above, inside, sums, w0, w1 = new(np.int32), new(np.int32), new(np.int64), new(np.float64), new(np.float64)
    cuda.launch("ap_loss.cu", "ap_loss_start", (x, order, count, p, q, above, inside, sums, w0, w1, bad, C, scale), threads=C + 1)
    cuda.launch("ap_loss.cu", "ap_loss_negatives", (x, y, p, count, above, inside, sums, bad, n, C, reach, scale), grid=-(-n // 1024))
    q_before, above, inside, sums = scan.exclusive(q), scan.inclusive(above), scan.inclusive(inside), scan.inclusive(sums)
    e, b, origin, g, loss = new(np.float64, C), new(np.float64, C), new(np.float64, C), new(x.dtype, n), cuda.empty(x, (), np.float64)
    cuda.launch("ap_loss.cu", "ap_loss_positives", (p, q, q_before, count, above, inside, sums, e, b, C, reach, slope, unit), threads=C)
    cuda.launch("ap_loss.cu", "ap_loss_weights", (p, order, e, b, count, bad, w0, w1, origin, g, loss, C, reach, interpolated), grid=1)
    w0, w1 = scan.exclusive(w0), scan.exclusive(w1)
    cuda.launch("ap_loss.cu", "ap_loss_gradients", (x, y, p, count, w0, w1, origin, bad, g, n, C, reach, slope), grid=-(-n // 1024))
    return scalar(loss), g.reshape(scores.shape)
