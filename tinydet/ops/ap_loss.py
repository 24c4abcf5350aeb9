"""AP-loss: 1 - average precision of a ranking, and the error-driven update that lowers it.

The update is NOT the derivative of the loss, which is 0 almost everywhere (a rank is a step function of the scores), nor of the loss with
its steps made linear. It hands each wrongly ordered pair its share of the lost precision, as the perceptron does (1904.06373, sec. 3.3,
unverified; the released code).
"""
import math

import numpy as np
from numba import get_num_threads, njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar
from tinydet.ops import scan, sort
from tinydet.ops.logistic_loss import as_int8

MOST = 1 << 20          # positives on a GPU: what it keeps for each is allocated before their number is known
FINE, CELLS = 8, 1 << 18        # of the table that shortens searches on the CPU: cells for each edge, cells at most


def ap_loss(scores, labels, delta=1.0, interpolated=True):
    """1 - AP of all entries ranked together, and the error-driven update (AP-loss, CVPR 2019, 1904.06373, sec. 3.3, unverified; its code).

    H(x) = clip(x / (2 * delta) + 1/2, 0, 1); delta = 0: 0, 1/2 or 1 for x below, at or above 0. For a positive i, over positives k and
    negatives j:  a_i = 1 + sum_{k != i} H(s_k - s_i),  b_i = sum_j H(s_j - s_i),  e_i = b_i / (a_i + b_i), the precision lost at i;
    interpolated=True: E_i = min e_k over positives with s_k <= s_i (the released code), else E_i = e_i.
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
    Raises ValueError for shapes, other labels, scores not finite at labels 0 and 1, other deltas; TypeError for dtypes, for a delta that
    is no number and an interpolated that is no bool. A GPU does not look at values before: there such scores, labels (as int8, which needs
    no conversion) and too many positives make loss and all of g NaN.
    """
    op = "ap_loss.ap_loss"
    checks.float_array(op, "scores", scores)
    checks.ternary(op, labels, scores.shape)
    checks.ranked(op, scores, labels)
    delta = checks.half_width(op, delta)
    if not isinstance(interpolated, bool):
        raise TypeError(f"{op}: interpolated must be True or False, got {interpolated!r}")
    run = pick(scores, numpy=_ap_loss_numpy, numba=_ap_loss_numba, cuda=_ap_loss_cuda)
    return run(scores, labels, delta, interpolated)


def step(x, delta):
    """H(x) = clip(x / (2 * delta) + 1/2, 0, 1), and its limit for delta = 0, where H(0) = 1/2 (1904.06373; its code has delta = 1)."""
    return np.clip(x / (2 * delta) + 0.5, 0, 1) if delta else (np.sign(x) + 1) / 2


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
            g[positive[i]] = 0 - least / P
            if b > 0:
                g[negative] += h * (least / b / P)
    return float(0 - g[positive].sum()), g.reshape(scores.shape).astype(scores.dtype)


# Numba and CUDA: the same without pairs (ours, exact). Positives p are sorted. A negative v has l = #{v - p >= delta} of them far
# below, with H = 1, and H is linear for those from l up to h = #{v - p > -delta}. So v counts 1 in b_i for i < l and
# (v - p_i) / (2 * delta) + 1/2 for l <= i < h. CUDA enters the former at l, the latter at l, and takes it back at h; then sums up to i
# give b_i. Numba sorts the edges p - delta and p + delta together and finds the place of v among them, which tells l and h; counts and
# sums over v at each place, added up, differ by b_i's share between the two edges of i. As H is linear there, sums of weights and of
# weights times p over [l, h) are enough for g at v: at each place, g is a line in v. Sums of scores are kept as 64-bit integers, modulo
# 2^64: exact in any order, right whatever the scores, since what is left within a window is at most entries * delta. The weighted p are
# seen from `origin`, the last positive up to p that no window holds together with the one before it: no window reaches across one.

def _constants(count, delta):
    """reach: half the width of a window; slope of H inside, 1 / (2 * delta); scale and unit, see `_fixed`.

    delta = 0: differences from the smallest number above 0 on are out of reach, so a window holds equal scores only, with H = 1/2.
    """
    exponent = math.frexp(count * delta)[1]                         # count * delta < 2^exponent
    slope, reach = (1 / (2 * delta), delta) if delta else (0.0, 5e-324)
    return reach, slope, math.ldexp(1, -3 - exponent), math.ldexp(1, exponent - 61)


def _ap_loss_numba(scores, labels, delta, interpolated):
    x, y = np.ascontiguousarray(scores).reshape(-1), np.ascontiguousarray(as_int8(labels)).reshape(-1)
    order = np.flatnonzero(y == 1)
    if len(order) == 0:
        return 0.0, np.zeros(scores.shape, scores.dtype)
    order = order[np.argsort(x[order], kind="stable")]
    p, (reach, slope, scale, unit) = x[order].astype(np.float64), _constants(len(x), delta)
    g = np.empty(x.shape, x.dtype)
    places = g.view(f"i{g.itemsize}")                               # what lies in g until the gradients do
    edges, enter, leave = _edges(p, reach)
    counts, sums = _negatives(x, y, places, edges, *_table(edges), scale, get_num_threads())
    least, lines = _positives(p, enter, leave, counts, sums, reach, slope, scale, unit, interpolated)
    _gradients(x, places, g, lines)
    g[order] = 0 - least / len(p)
    return float(least.sum()) / len(p), g.reshape(scores.shape)


def _edges(p, reach):
    """Where windows start and end, sorted together, and for each positive the place of either: the least float64 > p - reach and the
    least >= p + reach.
    """
    def rounded_up(reach):
        s = p + reach
        back = s - p
        lost = (p - (s - back)) + (reach - back)                    # p + reach = s + lost, exactly
        with np.errstate(over="ignore"):
            return np.where(lost > 0 if reach > 0 else lost >= 0, np.nextafter(s, np.inf), s)
    edges = np.concatenate([rounded_up(-reach), rounded_up(reach)])
    order = np.argsort(edges, kind="stable")
    at = np.empty_like(order)
    at[order] = np.arange(len(at))
    return edges[order], at[:len(p)], at[len(p):]


@njit(cache=True)
def _cell(v, low, rate, last):
    """The cell of v, int64 in 0..last. Never falls as v grows, roundings or not: an edge in a cell before that of v is below v, one in a cell
    behind it above v.
    """
    return np.int64(min(max((v - low) * rate, 0.0), last))


@njit(cache=True)
def _table(edges):
    """start (cells + 1,) int32: how many edges lie in cells before each; low, rate and last cell, floats, see `_cell`."""
    cells = min(FINE * len(edges), CELLS)
    low, high = edges[0], min(edges[-1], 1.7976931348623157e308)
    rate, last = 1 / max(high / cells - low / cells, 2.2250738585072014e-308), cells - 1.0
    start = np.zeros(cells + 1, np.int32)
    for e in edges:
        start[_cell(e, low, rate, last) + 1] += 1
    for c in range(cells):
        start[c + 1] += start[c]
    return start, low, rate, last


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


@njit(cache=True, parallel=True)
def _negatives(x, y, places, edges, start, low, rate, last, scale, parts):
    """Writes places (n,): how many of the 2 P edges a negative has reached; 0 for other entries. Returns two int64 arrays (2 P + 1,): how many
    negatives are at each place or a lower one, and their sum (`_fixed`).

    All are integers, so neither the number of parts nor their order shows.
    """
    n = len(x)
    tally = np.zeros((parts, len(edges) + 1, 2), np.int64)
    for part in prange(parts):
        mine = tally[part]
        for i in range(part * n // parts, (part + 1) * n // parts):
            v = np.float64(x[i])
            m = 0
            if y[i] == 0 and v >= edges[0]:
                c = _cell(v, low, rate, last)
                m, end = start[c], start[c + 1]
                while m < end:
                    k = (m + end) >> 1
                    if edges[k] <= v:
                        m = k + 1
                    else:
                        end = k
                mine[m, 0] += 1
                mine[m, 1] += _fixed(v, scale)
            places[i] = m
    total = tally.sum(0)
    return total[:, 0].cumsum(), total[:, 1].cumsum()


@njit(cache=True)
def _positives(p, enter, leave, counts, sums, reach, slope, scale, unit, interpolated):
    """E (P,), and for each place the line in v, value + rise * (v - origin), which g is there: (2 P + 1, 3), a row value, rise, origin. All
    float64.
    """
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
        above, inside = counts[-1] - counts[leave[i]], counts[leave[i]] - counts[enter[i]]
        b = max(0.0, above + 0.5 * inside + slope * (unit * (sums[leave[i]] - sums[enter[i]] - inside * q)))
        e = b / (a + b)
        least[i] = min(e, least[i - 1]) if interpolated and i > 0 else e
        w = least[i] / b if b > 0 else 0.0
        w0[i + 1] = w0[i] + w
        origin[i] = origin[i - 1] if i > 0 and p[i] - p[i - 1] <= 2 * reach else p[i]
        w1[i + 1] = w1[i] + w * (p[i] - origin[i])
    lines, l = np.empty((2 * P + 1, 3)), 0
    for m in range(2 * P + 1):
        if m > 0 and leave[l] == m - 1:
            l += 1
        h = m - l
        w = w0[h] - w0[l]
        lines[m] = (w0[l] + 0.5 * w - slope * (w1[h] - w1[l])) / P, slope * w / P, origin[l] if l < h else 0.0
    return least, lines


@njit(cache=True, parallel=True)
def _gradients(x, places, g, lines):
    """Writes g (n,) of the negatives, 0 for other entries, by the line of each place. g may lie where places are: each is read before."""
    for i in prange(len(x)):
        m = places[i]
        v = lines[m, 0] + lines[m, 1] * (x[i] - lines[m, 2])
        g[i] = v if v > 0 else 0.0                                  # 0 for NaN, too, from entries that do not count


# CUDA: kernels/ap_loss.cu, five launches, between array code that counts the positives and marks them (four), a sort that brings them to the
# front in rising order (one launch up to 2048 entries, 13 or more beyond) and six scans (one or three each)

def _ap_loss_cuda(scores, labels, delta, interpolated):
    xp, n = array_module(scores), scores.size
    if n == 0:
        return scalar(xp.zeros((), np.float64)), xp.zeros(scores.shape, scores.dtype)
    x, y = xp.ascontiguousarray(scores).reshape(-1), xp.ascontiguousarray(as_int8(labels)).reshape(-1)
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
