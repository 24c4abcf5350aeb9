"""Mean average precision after non-maximum suppression as a loss, and pseudo-gradients of it.

Training for mAP after NMS with pseudo-gradients in the spirit of Henderson & Ferrari (ACCV 2016, 1607.03476). Read in the paper: that
mAP computed after NMS is the loss; that it is piecewise constant in the scores, so that its ordinary gradient says nothing; and that
gradient-like quantities of such functions take its place. Its formulas, schedule and tables could not be read: both estimators here,
their defaults and the choices below are this project's own (CHOICE), and reproduce none of them.
"""
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar, to_numpy
from tinydet.ops import boxes as box_ops, sort

MODES = ("prec", "interp", "11pt")
LEAST = 1e-3            # of delta, reach and least where the spread of the scores sets them
WORDS = 4               # of 64 bits: candidates, and objects, of a class in an image that the kernels hold
FIRST, LAST = np.int64(-1), np.int64(1 << 30)      # in place of a row: above, or below, every window of equal score


def loss(scores, boxes, images, gt_boxes, gt_labels, gt_images, gt_difficult=None, *, nms=0.3, match=0.5, most=100, ap="prec",
         estimator="sde", delta=None, kappa=1.0, reach=None, least=None, log=False, eps=1e-3, plus_one=False):
    """1 - mAP of a mini-batch after NMS in each class and image, and its pseudo-gradient (1607.03476; its form: CHOICE).

    Each class: its `most` best windows of each image are the candidates, frozen at the current scores; greedy NMS (dropped at IoU > nms);
    the kept ones of all images ranked together. VOC's labels: each looks at the object of largest IoU, taken or not; IoU < match: false
    positive; object difficult: it does not count, though it takes part in NMS; the first on its object: true positive, others false.
    With P objects that count, and TP number k at rank r_k:
        ap = "prec": AP = 1/P sum_k k / r_k;  "interp": AP = 1/P sum_k max_{l >= k} l / r_l;
        "11pt": mean over t = 0, 0.1..1 of the best precision at recall >= t, compared exactly (evaluate.py has the bits of VOC's codes)
        loss = 1 - mAP, the mean over classes with P > 0;  log=True: -log(mAP + eps), and the gradient times 1 / (mAP + eps)
    f_i(v) is AP with s_i replaced by v, NMS included: a step function. g_i stands for its slope; dscores = -g_i / number of such classes.
        "sde": g_i = (f_i(s_i + delta) - f_i(s_i - delta)) / (2 delta), the derivative of f_i smoothed by a box of that width
        "env": over the breakpoints at d_k <= reach above s_i, with f_k just beyond: U+ = max(0, max_k (f_k - f_i(s_i)) / max(d_k, least)),
        L+ likewise with min; U-, L- from those below;  g_i = (U+ + L+ + U- + L-) / 2
    dscores is NO derivative of the loss, which is 0 wherever it exists: never compare it with differences of the loss. Scores are moved
    one at a time: no joint step is promised to raise mAP.
    scores: (n, C), float32 or float64, any numbers that rank, no background. boxes: (n, 4), or (n, C, 4), a box for each class; CHOICE:
    constants, without pseudo-gradient. images: (n,) integers; gt_boxes (G, 4) of boxes' dtype, gt_labels (G,) in 0..C-1, gt_images
    (G,), gt_difficult (G,) bool or None: these four and images on the host. Objects in images without windows count in P.
    delta, reach (README's D; inf is allowed), least (its d0): in units of the scores; None: kappa, 3 and 0.2 standard deviations of the
    scores of the class's candidates, over all images, at least 1e-3.
    plus_one: inclusive pixels (boxes.py).
    Returns a Python float (on a GPU a 0-d array there) and dscores, scores' shape and dtype; inner work in float64. Exactly 0 for
    windows that are no candidates, for classes that the mean leaves out, and where no step is in reach. No class has an object that
    counts: 0.0 and zeros, log=True too. n = 0: mAP 0. Ties, everywhere: the higher score, then the lower row.
    "sde" goes through the TPs of a class at most twice for a window; "env" through all that is kept, and with "interp" or "11pt" through
    the TPs at each of its breakpoints, which is slow for large batches. On a GPU nothing waits for the host; there a class has at most
    256 candidates and 256 objects in an image.
    Raises ValueError for NaN or infinity, shapes, labels, options, eps = 0 where mAP is 0; TypeError for dtypes. A GPU does not look at
    values: there a score that is not finite makes the value, and dscores of all candidates, NaN.
    """
    op = "map_loss.loss"
    _positive(op, delta=delta, reach=reach, least=least, kappa=kappa)
    if estimator not in ("sde", "env"):
        raise ValueError(f"{op}: estimator must be 'sde' or 'env', got {estimator!r}")
    if not 0 <= eps < np.inf:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    batch = _arrange(op, scores, boxes, images, (gt_boxes, gt_labels, gt_images, gt_difficult), nms, match, most, ap, plus_one)
    xp = array_module(scores)
    dscores = xp.zeros(scores.shape, scores.dtype)
    if len(batch.present) == 0:
        return scalar(xp.zeros((), np.float64)), dscores
    widths = _widths(batch, delta, kappa, reach, least)
    run = pick(scores, numpy=_run_numpy, numba=_run_numba, cuda=_run_cuda)
    aps, _, _, g = run(batch, widths, estimator == "env")
    mean = aps.mean() + (scores - scores).sum()                     # NaN, on a GPU, where a score is not finite
    if log and checks.on_host(scores) and mean + eps == 0:
        raise ValueError(f"{op}: eps must be above 0 where mAP is 0, got 0")
    scale = -1 / (mean + eps) if log else 0 * mean - 1
    dscores[batch.rows, batch.columns[:, None]] = (g * (scale / len(aps))).astype(scores.dtype)
    return scalar(-xp.log(mean + eps) if log else 1 - mean), dscores


def average_precisions(scores, boxes, images, gt_boxes, gt_labels, gt_images, gt_difficult=None, *, nms=0.3, match=0.5, most=100,
                       ap="prec", plus_one=False):
    """AP of each class, as the loss averages it, and what became of each window, to be told or drawn: (aps, kept, flags).

    aps: (C,) float64, AP of each class, NaN where no object counts. kept: (n, C) bool, what NMS keeps, False for such classes. flags:
    (n, C) int8, 1 true positive, 0 false, -1 what does not count (not kept, on a difficult object, of such a class).

    Arguments and errors as of loss(). On a GPU all three lie there.
    """
    op, truth = "map_loss.average_precisions", (gt_boxes, gt_labels, gt_images, gt_difficult)
    batch = _arrange(op, scores, boxes, images, truth, nms, match, most, ap, plus_one)
    xp, (n, C) = array_module(scores), scores.shape
    aps, kept, flags = xp.full(C, np.nan), xp.zeros((n, C), bool), xp.full((n, C), -1, np.int8)
    if len(batch.present):
        run = pick(scores, numpy=_run_numpy, numba=_run_numba, cuda=_run_cuda)
        at = batch.rows, batch.columns[:, None]
        aps[batch.columns], kept[at], flags[at], _ = run(batch, None, None)
    return aps, kept, flags


class Profile(NamedTuple):
    """f_i of one window and class, and what the estimators make of it: float64.

    values[k] (B + 1,) is AP of the class while the score lies between breakpoints[k - 1] and breakpoints[k] (B,); each differs from the next.
    blocker: the score that it must pass to be kept, NaN if no window can suppress it (one at most: _Profile). score: where it is;
    now: AP there. delta, reach, least: as loss() takes them for the class. step: the slope of the finite step; lines: those of the envelope,
    U+, L+, U-, L- (as of loss()), whose sum over 2 is its slope.
    """

    breakpoints: np.ndarray
    values: np.ndarray
    blocker: float
    score: float
    now: float
    delta: float
    reach: float
    least: float
    step: float
    lines: tuple


def profile(scores, boxes, images, gt_boxes, gt_labels, gt_images, gt_difficult=None, *, window, label, nms=0.3, match=0.5, most=100,
            ap="prec", delta=None, kappa=1.0, reach=None, least=None, plus_one=False):
    """f_i of the window in row `window` for class `label`, for a drawing: a Profile.

    Other arguments as of loss(); works on the host. Raises ValueError for a window that is no candidate and a label that has no
    objects that count.
    """
    op = "map_loss.profile"
    checks.whole(op, 0, window=window, label=label)
    _positive(op, delta=delta, kappa=kappa, reach=reach, least=least)
    truth = gt_boxes, gt_labels, gt_images, gt_difficult
    batch = _arrange(op, to_numpy(scores), to_numpy(boxes), images, truth, nms, match, most, ap, plus_one)
    if label not in batch.present:
        raise ValueError(f"{op}: label must be of a class with objects that count, {list(map(int, batch.present))}, got {label}")
    c = batch.present.tolist().index(label)
    one = _Class(batch, c)
    if window not in one.row:
        raise ValueError(f"{op}: window must be a candidate of class {label}, got {window}")
    i, widths = int(np.flatnonzero(one.row == window)[0]), _widths(batch, delta, kappa, reach, least)[c].tolist()
    f, s, row = one.moved(i), float(one.score[i]), one.row[i]
    points = f.breakpoints()
    values = np.array([f(-np.inf, LAST), *(f(b, FIRST) for b in points)])
    change = np.flatnonzero(abs(np.diff(values)) > 1e-12)
    blocker = np.nan if f.blocker is None else float(one.score[f.blocker])
    step = (f(s + widths[0], row) - f(s - widths[0], row)) / (2 * widths[0])
    return Profile(points[change], values[np.concatenate([[0], change + 1])], blocker, s, float(f(s, row)), *widths, float(step),
                   tuple(map(float, one.lines(i, *widths))))


def _positive(op, **widths):
    for name, width in widths.items():
        if width is not None and not (isinstance(width, (int, float)) and width > 0 and (width < np.inf or name == "reach")):
            raise ValueError(f"{op}: {name} must be a number above 0, got {width!r}")


def _widths(batch, delta, kappa, reach, least):
    """delta, reach and least of each class, (c, 3) float64; those given as None from the standard deviation of its candidates' scores."""
    xp = array_module(batch.score)
    sigma = xp.sqrt(batch.score.var(1)) if batch.score.shape[1] else xp.zeros(len(batch.present))
    return xp.stack([xp.maximum(factor * sigma, LEAST) if width is None else xp.full(len(sigma), float(width))
                     for width, factor in ((delta, kappa), (reach, 3), (least, 0.2))], 1)


# Candidates, by array code that serves all backends

class Batch(NamedTuple):
    """c classes with objects that count, K candidates each: image by image, as many of each for all classes, best first in each.

    An image is one that has windows, by its place 0..I-1 among their numbers in rising order.
    """

    present: np.ndarray         # (c,) which classes, on the host
    columns: np.ndarray         # the same, where the scores lie
    P: np.ndarray               # (c,) int32 objects that count
    start: np.ndarray           # (I + 1,) int32 where the candidates of each image begin
    image: np.ndarray           # (K,) int32 which image
    longest: int                # most candidates of an image
    objects: int                # most objects of a class in an image
    rows: np.ndarray            # (c, K) int32 rows of what loss() was given
    score: np.ndarray           # (c, K) float64
    box: np.ndarray             # (c, K, 4) in the dtype of the boxes given, as are nms, match and one
    ranked: np.ndarray          # (c, K) int32 candidates best first, all images together
    gt_box: np.ndarray          # (G, 4) objects of these classes in these images, difficult ones too, by class, then image
    gt_start: np.ndarray        # (c * I + 1,) int32 where those of class k in image i begin, at k * I + i
    hard: np.ndarray            # (G,) uint8, 1: difficult
    nms: float
    match: float
    one: float                  # plus_one: 0 or 1 pixel
    mode: int                   # place in MODES


def _arrange(op, scores, boxes, images, truth, nms, match, most, ap, plus_one):
    """Check the arguments of loss(); the candidates as a Batch. truth: gt_boxes, gt_labels, gt_images, gt_difficult."""
    xp, (gt_boxes, gt_labels, gt_images, gt_difficult) = array_module(scores), truth
    checks.float_array(op, "scores", scores, "(n, C)")
    n, C = scores.shape
    checks.float_array(op, "boxes", boxes, f"({n}, 4)" if getattr(boxes, "ndim", 2) == 2 else f"({n}, {C}, 4)")
    checks.float_array(op, "gt_boxes", gt_boxes, "(G, 4)")
    G = len(gt_boxes)
    gt_difficult = np.zeros(G, bool) if gt_difficult is None else gt_difficult
    checks.same_shape(op, (G,), gt_difficult=gt_difficult)
    for name, a, length in (("images", images, n), ("gt_labels", gt_labels, G), ("gt_images", gt_images, G)):
        checks.integers(op, name, a, (length,))
    if not all(map(checks.on_host, (images, gt_boxes, gt_labels, gt_images, gt_difficult))):
        raise TypeError(f"{op}: images and objects must lie on the host, got an array on the GPU")
    if array_module(boxes) is not xp:
        raise TypeError(f"{op}: scores and boxes must both be NumPy's or both CuPy's, got {xp.__name__} and {array_module(boxes).__name__}")
    if gt_boxes.dtype != boxes.dtype:
        raise TypeError(f"{op}: gt_boxes must be {boxes.dtype}, as boxes are, got {gt_boxes.dtype}")
    if gt_difficult.dtype != bool:
        raise TypeError(f"{op}: gt_difficult must be bool, got {gt_difficult.dtype}")
    checks.finite(op, scores=scores, boxes=boxes, gt_boxes=gt_boxes)
    checks.areas(op, boxes=boxes.reshape(-1, 4), gt_boxes=gt_boxes)
    if G and not (0 <= gt_labels.min() and gt_labels.max() < C):
        raise ValueError(f"{op}: gt_labels must lie in 0..{C - 1}, got {gt_labels.min()}..{gt_labels.max()}")
    if not (0 <= nms <= 1 and 0 <= match <= 1):
        raise ValueError(f"{op}: nms and match must lie in [0, 1], got {nms} and {match}")
    if ap not in MODES:
        raise ValueError(f"{op}: ap must be one of {', '.join(MODES)}, got {ap!r}")
    checks.small(op, 1, most=most)
    P = np.bincount(gt_labels[~gt_difficult], minlength=C)
    present = np.flatnonzero(P)
    c, (names, image) = len(present), np.unique(images, return_inverse=True)
    I, count = len(names), np.bincount(image, minlength=len(names))
    if max(c, 10) * n >= 2**31:                                     # the kernels count 9 * place and 10 * TPs in 32 bits
        raise ValueError(f"{op}: scores must have fewer than 2^31 entries (10 columns at least), got {n} rows, {c} classes with objects")
    sizes = np.minimum(count, most)
    start, K = np.concatenate([[0], np.cumsum(sizes)]), int(sizes.sum())
    seat = np.repeat(np.arange(I), sizes)
    picks = (np.cumsum(count) - count - start[:-1])[seat] + np.arange(K)            # the best of each image, among all its windows

    columns, image, n_ = xp.asarray(present), xp.asarray(image.astype(np.int32)), max(n, 1)
    s = xp.ascontiguousarray(scores[:, columns].T)                  # (c, n); entry c * n + row
    order = sort.argsort(s.reshape(-1), descending=True)
    order = order[sort.argsort(order // n_)]                        # by class, then best first; equal scores by row
    grouped = order[sort.argsort(order // n_ * I + image[order % n_])]              # by class and image, then best first
    chosen = grouped[xp.asarray((np.arange(c)[:, None] * n + picks).astype(np.int32)).reshape(-1)]
    place = xp.full(c * n, -1, np.int32)
    place[chosen] = xp.asarray((np.arange(c * K) % max(K, 1)).astype(np.int32))
    among = place[order]                                            # the candidate, or -1, at each place of the ranking
    ranked = xp.zeros(c * K + 1, np.int32)
    ranked[xp.where(among < 0, c * K, xp.cumsum(among >= 0) - 1)] = among           # the last is waste
    rows = (chosen % n_).reshape(c, K)
    box = boxes[rows] if boxes.ndim == 2 else boxes[rows, columns[:, None]]

    at, held = np.searchsorted(present, gt_labels), np.searchsorted(names, gt_images)
    met = np.isin(gt_labels, present) & np.isin(gt_images, names)   # objects that a window may match
    key = (at * I + held)[met]
    by = np.argsort(key, kind="stable")
    gt_start = np.searchsorted(key[by], np.arange(c * I + 1))
    objects, score = int(np.diff(gt_start).max(initial=0)), s.reshape(-1)[chosen].reshape(c, K).astype(np.float64)
    P, start, seat, gt_start = (xp.asarray(a.astype(np.int32)) for a in (P[present], start, seat, gt_start))
    gt_box, hard = xp.asarray(gt_boxes[met][by]), xp.asarray(gt_difficult[met][by].astype(np.uint8))
    return Batch(present, columns, P, start, seat, int(sizes.max(initial=0)), objects, rows, score, box, ranked[:c * K].reshape(c, K),
                 gt_box, gt_start, hard, *map(boxes.dtype.type, (nms, match, plus_one)), MODES.index(ap))


# The reference (ours, exact)

def _run_numpy(batch, widths, env):
    """aps (c,); kept, flags as average_precisions() has them, and slopes g, (c, K) each, g 0 where widths is None. So do the other two."""
    shape = batch.rows.shape
    aps, kept, flags, g = np.zeros(shape[0]), np.zeros(shape, bool), np.full(shape, -1), np.zeros(shape)
    for c, order in enumerate(batch.ranked):
        one = _Class(batch, c)
        aps[c], kept[c, order], flags[c, order[one.listed]] = one.average(one.hit), one.kept, one.hit
        if widths is not None:
            slope = one.envelope if env else one.difference
            g[c, order] = [slope(i, *widths[c]) for i in range(len(order))]
    return aps, kept, flags, g


class _Class:
    """The candidates of one class over all images, best first."""

    def __init__(self, batch, c):
        at, I = batch.ranked[c], len(batch.start) - 1
        self.score, self.row, self.image = batch.score[c, at], batch.rows[c, at], batch.image[at]
        self.P, self.mode = int(batch.P[c]), batch.mode
        self.near, self.gt = [None] * len(at), np.full(len(at), -1)         # those that overlap; object, -1 none, -2 a difficult one
        for i in range(I):
            mine, (a, b) = np.flatnonzero(self.image == i), batch.gt_start[c * I + i:c * I + i + 2]
            box = batch.box[c, at[mine]]
            inter, area = box_ops.intersection(box, box, batch.one), box_ops.area(box, batch.one)
            union = area[:, None] + area - inter
            over = (inter > batch.nms * union) & (union > 0) & ~np.eye(len(mine), dtype=bool)
            for j, row in zip(mine, over):
                self.near[j] = mine[row]
            if b > a:
                overlap = box_ops.iou(box, batch.gt_box[a:b], batch.one)
                best = a + overlap.argmax(1)
                self.gt[mine] = np.where(overlap.max(1) < batch.match, -1, np.where(batch.hard[best], -2, best))
        self.kept = np.zeros(len(at), bool)
        self.kept[self.greedy(np.arange(len(at)))] = True
        self.listed, self.hit = self.flags(np.flatnonzero(self.kept))

    def greedy(self, members):
        """Those that NMS keeps of members, which are best first."""
        gone, kept = np.zeros(len(self.near), bool), []
        for j in members:
            if not gone[j]:
                kept.append(j)
                gone[self.near[j]] = True
        return np.array(kept, int)

    def flags(self, members):
        """Those that count, and which of them are the first on their object."""
        members = members[self.gt[members] != -2]
        hit = np.zeros(len(members), bool)
        hit[np.unique(self.gt[members], return_index=True)[1]] = True
        return members, hit & (self.gt[members] >= 0)

    def average(self, hit):
        """AP of a ranking, of which hit, (M,) bool, tells the TPs."""
        k = np.arange(1, hit.sum() + 1)
        precision = k / (np.flatnonzero(hit) + 1)
        if self.mode == 0:
            return precision.sum() / self.P
        best = np.maximum.accumulate(precision[::-1])[::-1]
        if self.mode == 1:
            return best.sum() / self.P
        first = np.searchsorted(10 * k, np.arange(11) * self.P)             # the first TP at which recall >= t
        return best[first[first < len(k)]].sum() / 11

    def above(self, v, row, j):
        """Whether a window of score v in that row ranks above candidate j."""
        return v > self.score[j] or (v == self.score[j] and row < self.row[j])

    def rank(self, members, v, row):
        """How many of the members lie above (v, row)."""
        s = self.score[members]
        return np.count_nonzero((s > v) | ((s == v) & (self.row[members] < row)))

    def moved(self, i):
        return _Profile(self, i)

    def skips(self, i, delta):
        """Whether no step of f_i lies within delta, as can be told without another NMS (ours, exact)."""
        s, row, near = self.score[i], self.row[i], self.near[i]
        if not self.kept[i]:
            return not self.above(s + delta, row, near[self.kept[near]][0])
        below = near[near > i]
        if len(below) and not self.above(s - delta, row, below[0]):
            return False
        within = self.hit[self.rank(self.listed, s + delta, row):self.rank(self.listed, s - delta, row)]
        if self.gt[i] == -2 or len(within) == 0:
            return True
        return within.all() if self.hit[np.searchsorted(self.listed, i)] else not within.any()

    def difference(self, i, delta, reach, least):
        """The slope of the finite step (CHOICE); reach and least have no part."""
        if self.skips(i, delta):
            return 0.0
        f, s, row = self.moved(i), self.score[i], self.row[i]
        return (f(s + delta, row) - f(s - delta, row)) / (2 * delta)

    def envelope(self, i, delta, reach, least):
        """The slope of the envelope (CHOICE); delta has no part."""
        return sum(self.lines(i, delta, reach, least)) / 2

    def lines(self, i, delta, reach, least):
        """Slopes of the lines that bound f_i: U+, L+, U-, L-."""
        f, s, slopes = self.moved(i), self.score[i], []
        now = f(s, self.row[i])
        for side, beyond in ((1, FIRST), (-1, LAST)):
            points = [b for b in f.breakpoints() if 0 <= side * (b - s) <= reach]
            found = [0.0, *(side * (f(b, beyond) - now) / max(side * (b - s), least) for b in points)]
            slopes += [max(found), min(found)]
        return slopes


class _Profile:
    """f_i, by the two-state theorem (ours): i is suppressed below its blocker; above that the others kept are always the same.

    below: AP while it is suppressed; values[r]: AP while r of the others that count lie above it.
    """

    def __init__(self, one, i):
        mine = np.flatnonzero((one.image == one.image[i]) & (np.arange(len(one.row)) != i))
        rest, same = np.flatnonzero(one.kept & (one.image != one.image[i])), mine[one.kept[mine]]
        off, on = (one.greedy(mine), same) if one.kept[i] else (same, one.greedy(np.setdiff1d(mine, one.near[i])))
        blockers = np.intersect1d(off, one.near[i])
        self.one, self.blocker = one, int(blockers[0]) if len(blockers) else None
        self.below = one.average(one.flags(np.union1d(rest, off))[1])
        self.others, hit = one.flags(np.union1d(rest, on))
        g, M = one.gt[i], len(self.others)
        again = np.flatnonzero((one.gt[self.others] == g) & (g >= 0))
        d = int(again[0]) if len(again) else M                              # the first on the same object: a duplicate if i is above
        at = np.arange(M + 1)                                               # i with r others above
        if g == -2:
            self.values = np.full(M + 1, one.average(hit))
        elif one.mode:
            self.values = np.array([one.average(np.insert(hit & ((at[:M] != d) | (r > d)), r, g >= 0 and r <= d)) for r in at])
        else:
            before = np.concatenate([[0], np.cumsum(hit)])                  # TPs among the first r

            def sums(x):
                return np.concatenate([[0], np.cumsum(np.where(hit, x, 0))])
            k, r = before[1:], at[1:]
            s0, s1, s2 = sums(k / r), sums(k / (r + 1)), sums((k + 1) / (r + 1))
            false = s0 + s1[-1] - s1                                        # i as a false positive
            true = s0 + (before + 1) / (at + 1) + s2[d] - s2 + s1[-1] - s1[min(d + 1, M)]           # and as a true one
            self.values = np.where((at <= d) & (g >= 0), true, false) / one.P

    def __call__(self, v, row):
        if self.blocker is not None and not self.one.above(v, row, self.blocker):
            return self.below
        return self.values[self.one.rank(self.others, v, row)]

    def breakpoints(self):
        return np.unique(self.one.score[self.others if self.blocker is None else np.append(self.others, self.blocker)])


# Numba and CUDA: the edit form (ours, exact). A class has a list: of the kept windows of all images those that count, best first.
# place: how many of it lie above a candidate; tops: the places of its TPs. Another score of i changes what is kept in its own image
# alone. Each difference from the list is an edit, 9 * place + 3 * (dp + 1) + dk + 1, from where on there are dp entries and dk TPs more,
# -1, 0 or 1. AP follows from the places of the TPs and the edits above each. Sets of windows (on, off, gone) are of one image, from its first.

def _lists(batch, flags):
    """place (c, K); tops (c, K + 1), last in each line their number; entries (c, K + 1), the list and its length likewise."""
    xp, K = array_module(flags), flags.shape[1]
    line, f = xp.arange(len(flags))[:, None], xp.take_along_axis(flags, batch.ranked, 1)
    above, (tops, entries) = xp.cumsum(f >= 0, 1) - (f >= 0), (xp.zeros((len(flags), K + 1), np.int32) for _ in "ab")
    place = xp.empty(flags.shape, np.int32)
    place[line, batch.ranked] = above.astype(np.int32)
    tops[line, xp.where(f == 1, xp.cumsum(f == 1, 1) - 1, K)] = above.astype(np.int32)
    entries[line, xp.where(f >= 0, above, K)] = batch.ranked
    tops[:, K], entries[:, K] = (f == 1).sum(1), (f >= 0).sum(1)
    return place, tops, entries


# Compilation takes seconds: no wrappers for what only loops call, int64 alone (np.int64(-1), too: -1 has a type of its own), no copied slices.
_inner = njit(cache=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _run_numba(batch, widths, env):
    c, K = batch.rows.shape
    near, gt, kept = np.zeros((c, K, batch.longest), bool), np.full((c, K), -1), np.zeros((c, K), bool)
    flags, g, aps = np.full((c, K), -1), np.zeros((c, K)), np.empty(c)
    start, gt_start, rows, P = (a.astype(np.int64) for a in (batch.start, batch.gt_start, batch.rows, batch.P))
    _label(batch.box, start, batch.gt_box, gt_start, batch.hard, batch.objects, batch.nms, batch.match, batch.one, near, gt, kept, flags)
    place, tops, entries = (a.astype(np.int64) for a in _lists(batch, flags))
    for k in range(c):
        aps[k] = _walk(tops[k], P[k], batch.mode, tops[k, :0], 0)
    if widths is not None:
        _slopes(start, batch.score, rows, near, gt, kept, flags, place, tops, entries, P, aps, widths,
                batch.mode, batch.objects, bool(env), g)
    return aps, kept, flags, g


class _Ranking(NamedTuple):
    """What the loops read of one class: integers are int64."""

    score: np.ndarray
    row: np.ndarray
    near: np.ndarray
    gt: np.ndarray
    kept: np.ndarray
    flag: np.ndarray
    place: np.ndarray
    tops: np.ndarray
    entries: np.ndarray
    P: int
    mode: int


@_inner
def _areas(a, b, one, zero):
    """Intersection and union."""
    inter = max(zero, min(a[2], b[2]) - max(a[0], b[0]) + one) * max(zero, min(a[3], b[3]) - max(a[1], b[1]) + one)
    own, other = max(zero, a[2] - a[0] + one) * max(zero, a[3] - a[1] + one), max(zero, b[2] - b[0] + one) * max(zero, b[3] - b[1] + one)
    return inter, own + other - inter


@njit(cache=True, parallel=True, error_model="numpy", no_cfunc_wrapper=True)
def _label(box, start, gt_box, gt_start, hard, objects, nms, match, one, near, gt, kept, flags):
    """Overlaps, objects, NMS and flags, a class and image at a time."""
    images, zero = len(start) - 1, box.dtype.type(0)
    for at in prange(len(box) * images):
        c, first, end = at // images, start[at % images], start[at % images + 1]
        gone, claimed = np.zeros(end - first, np.bool_), np.zeros(objects, np.bool_)
        for i in range(first, end):
            for j in range(first, end):
                inter, union = _areas(box[c, i], box[c, j], one, zero)
                near[c, i, j - first] = i != j and union > 0 and inter > nms * union
            best = -1 + zero
            for r in range(gt_start[at], gt_start[at + 1]):
                inter, union = _areas(box[c, i], gt_box[r], one, zero)
                overlap = inter / union if union > 0 else zero
                if overlap > best:
                    best = overlap
                    gt[c, i] = -1 if overlap < match else -2 if hard[r] else r - gt_start[at]
        _greedy(near[c], first, end, gone, kept[c, first:end])
        for i in range(first, end):
            g = gt[c, i]
            if kept[c, i] and g != -2:
                flags[c, i] = g >= 0 and not claimed[g]
                if g >= 0:
                    claimed[g] = True


@_inner
def _greedy(near, first, end, gone, kept):
    """NMS of an image's candidates but those gone; both sets are written."""
    for j in range(end - first):
        kept[j] = not gone[j]
        if kept[j]:
            for l in range(end - first):
                gone[l] |= near[first + j, l]


@_inner
def _above(v, row, k, j):
    """Whether a window of score v in that row ranks above candidate j."""
    return v > k.score[j] or (v == k.score[j] and row < k.row[j])


@njit(cache=True)
def _walk(tops, P, mode, edits, count):
    """AP after the edits, which lie in order of place: from the last TP to the first."""
    t, dp, dk, best, total = tops[-1], 0, 0, 0.0, 0.0
    for e in range(count):
        dp += edits[e] % 9 // 3 - 1
        dk += edits[e] % 3 - 1
    for e in range(count, -1, -1):
        p = edits[e - 1] // 9 if e > 0 else -1
        new, hit = (edits[e - 1] % 9 // 3 - 1, edits[e - 1] % 3 - 1) if e > 0 else (0, 0)
        while t > 0 and tops[t - 1] >= p + (new < 1):               # an entry comes in above the one at its place
            best, total = _add(t + dk, tops[t - 1] + dp + 1, P, mode, best, total)
            t -= 1
        if e > 0:
            dp -= new
            if hit == 1:
                best, total = _add(t + dk, p + dp + 1, P, mode, best, total)
            elif hit == -1:
                t -= 1
            dk -= hit
    return total / (11 if mode == 2 else P)


@_inner
def _add(k, rank, P, mode, best, total):
    """One TP more, number k at that rank, in a walk from the last to the first; best: precision there or below."""
    precision = k / rank
    if mode == 0:
        return best, total + precision
    best = max(best, precision)
    return best, total + best * (1 if mode == 1 else 10 * k // P - 10 * (k - 1) // P + (k == 1))


@_inner
def _rank(k, v, row):
    """How many entries of the list lie above (v, row)."""
    low, high = 0, k.entries[-1]
    while low < high:
        middle = (low + high) // 2
        if _above(v, row, k, k.entries[middle]):
            high = middle
        else:
            low = middle + 1
    return low


@_inner
def _value(k, first, end, others, i, v, row, edits, claimed):
    """AP if of this image `others` are kept, and i, if it is not -1, at (v, row)."""
    count, seat = np.int64(0), end + 1
    claimed[:] = False
    if i >= 0 and k.gt[i] != -2:
        seat = first
        while seat < end and not _above(v, row, k, seat):
            seat += 1
    for j in range(first, end + 1):
        if j == seat:
            g = k.gt[i]
            hit = g >= 0 and not claimed[g]
            if g >= 0:
                claimed[g] = True
            edits[count] = 9 * _rank(k, v, row) + 7 + hit           # dp = 1, dk = hit
            count += 1
        if j < end:
            flag, g = -1, k.gt[j]
            if others[j - first] and g != -2:
                flag = 0
                if g >= 0 and not claimed[g]:
                    flag, claimed[g] = 1, True
            old = k.flag[j]
            if flag != old:
                edits[count] = 9 * k.place[j] + 3 * ((flag >= 0) - (old >= 0) + 1) + (flag == 1) - (old == 1) + 1
                count += 1
    return _walk(k.tops, k.P, k.mode, edits, count)


@_inner
def _states(k, first, end, i, on, off, gone):
    """on: the others kept while i is kept, off: while it is not (as in _Profile). Returns the blocker, -1 if there is none."""
    again, same = (off, on) if k.kept[i] else (on, off)
    for l in range(end - first):
        gone[l], same[l] = k.near[i, l] and not k.kept[i], k.kept[first + l]
    gone[i - first], same[i - first] = True, False
    _greedy(k.near, first, end, gone, again)
    for j in range(first, end):
        if off[j - first] and k.near[i, j - first]:
            return j
    return -1


@_inner
def _difference(k, first, end, i, now, delta, on, off, gone, edits, claimed):
    """The slope of the finite step. Of the skips of _Class those of NMS: what stays suppressed, or has no neighbour within the step."""
    s, row, g = k.score[i], k.row[i], k.gt[i]
    high, low = s + delta, s - delta
    if not k.kept[i]:
        j = first
        while not (k.kept[j] and k.near[i, j - first]):
            j += 1
        if not _above(high, row, k, j):
            return 0.0
        _states(k, first, end, i, on, off, gone)
        return (_value(k, first, end, on, i, high, row, edits, claimed) - now) / (2 * delta)
    j = i + 1
    while j < end and not k.near[i, j - first]:
        j += 1
    blocker = -1
    if j < end and not _above(low, row, k, j):
        blocker = _states(k, first, end, i, on, off, gone)
    else:
        for l in range(end - first):
            on[l] = k.kept[first + l] and l != i - first
    if blocker >= 0 and not _above(low, row, k, blocker):
        down = _value(k, first, end, off, np.int64(-1), low, row, edits, claimed)
    elif g == -2:
        return 0.0
    else:
        down = _value(k, first, end, on, i, low, row, edits, claimed)
    return (_value(k, first, end, on, i, high, row, edits, claimed) - down) / (2 * delta)


@_inner
def _envelope(k, first, end, i, now, reach, least, on, off, gone, edits, claimed):
    """The slope of the envelope, by one walk up the list and one down, from i's place: "prec" changes by what a swap with each entry does.

    A TP of rank r + 2, with h TPs above it, that passes the FP of rank r + 1 adds (h + 1) * (1 / (r + 1) - 1 / (r + 2)) / P to AP.
    """
    s, g, total = k.score[i], k.gt[i], 0.0
    blocker = _states(k, first, end, i, on, off, gone)
    v, row, f0 = s, k.row[i], now
    if not k.kept[i]:                                               # nothing happens below the blocker: from just above it
        v, row = k.score[blocker], FIRST
        if v - s > reach:
            return 0.0
        f0 = _value(k, first, end, on, i, v, row, edits, claimed)
    rank, hits, first_same, at = _rank(k, v, row), 0, -1, first
    while hits < k.tops[-1] and k.tops[hits] < rank:
        hits += 1
    base, gone[:], claimed[:] = rank, False, False                  # gone: which others are TPs without i
    while at < end and not _above(v, row, k, at):
        at += 1
    for j in range(first, end):
        if on[j - first] and k.gt[j] >= 0 and not claimed[k.gt[j]]:
            gone[j - first], claimed[k.gt[j]] = True, True
            if k.gt[j] == g:
                first_same = j
        on[j - first] &= k.gt[j] != -2
        if j < at:
            rank += on[j - first] - (k.flag[j] >= 0)
            hits += gone[j - first] - (k.flag[j] == 1)
    for side in (1, -1):
        f, low, high, b, j, e = f0, 0.0, 0.0, np.nan if k.kept[i] else v, at - (side > 0), base - (side > 0)
        r, h, true = rank, hits, g >= 0 and (first_same < 0 or first_same >= at)
        while k.kept[i] or side > 0:
            while first <= j < end and not on[j - first]:
                j -= side
            while 0 <= e < k.entries[-1] and first <= k.entries[e] < end:
                e -= side
            mine, other, x = first <= j < end, 0 <= e < k.entries[-1], -1
            if g != -2 and (mine or other):
                mine = mine and (not other or (k.place[j] > e) == (side > 0))
                x = j if mine else k.entries[e]
                if abs(k.score[x] - s) > reach or (side < 0 and blocker >= 0 and k.score[x] <= k.score[blocker]):
                    x = -1
            if not np.isnan(b) and (x < 0 or k.score[x] != b):      # all of one score are passed
                if k.mode:
                    f = _value(k, first, end, on, i, b, FIRST if side > 0 else LAST, edits, claimed)
                slope = side * (f - now) / max(abs(b - s), least)
                low, high = min(low, slope), max(high, slope)
            if x < 0:
                break
            b, hit = k.score[x], gone[j - first] if mine else k.flag[x] == 1
            r, h = r - (side > 0), h - (hit and side > 0)
            if x == first_same:
                true = side > 0
            elif hit != true:
                f += side * (2 * true - 1) * (h + 1) * (1 / (r + 1) - 1 / (r + 2)) / k.P
            r, h = r + (side < 0), h + (hit and side < 0)
            if mine:
                j -= side
            else:
                e -= side
        if side < 0 and k.kept[i] and blocker >= 0 and s - k.score[blocker] <= reach:
            slope = (now - _value(k, first, end, off, np.int64(-1), s, row, edits, claimed)) / max(s - k.score[blocker], least)
            low, high = min(low, slope), max(high, slope)
        total += low + high
    return total / 2


@njit(cache=True, parallel=True, no_cfunc_wrapper=True)
def _slopes(start, score, rows, near, gt, kept, flags, place, tops, entries, P, aps, widths, mode, objects, env, g):
    images = len(start) - 1
    for at in prange(len(score) * images):
        c, first, end = at // images, start[at % images], start[at % images + 1]
        k = _Ranking(score[c], rows[c], near[c], gt[c], kept[c], flags[c], place[c], tops[c], entries[c], P[c], mode)
        on, off, gone = np.empty(end - first, np.bool_), np.empty(end - first, np.bool_), np.empty(end - first, np.bool_)
        edits, claimed = np.empty(end - first + 1, np.int64), np.empty(objects, np.bool_)
        for i in range(first, end):
            if env:
                g[c, i] = _envelope(k, first, end, i, aps[c], widths[c, 1], widths[c, 2], on, off, gone, edits, claimed)
            else:
                g[c, i] = _difference(k, first, end, i, aps[c], widths[c, 0], on, off, gone, edits, claimed)


# CUDA: kernels/map_loss.cu, four launches after three sorts, and array code that makes the lists

def _run_cuda(batch, widths, env):
    xp, (c, K), images, words = array_module(batch.score), batch.rows.shape, len(batch.start) - 1, -(-batch.longest // 64)
    if max(batch.longest, batch.objects) > 64 * WORDS:
        raise ValueError(f"map_loss.loss: on a GPU a class must have at most {64 * WORDS} candidates and objects in an image, "
                         f"got {batch.longest} and {batch.objects}")
    near, aps = cuda.empty(batch.score, c * K * words, np.uint64), cuda.empty(batch.score, c)
    gt, kept, flags, g = (cuda.empty(batch.score, (c, K), t) for t in (np.int32, np.uint8, np.int32, np.float64))
    boxes = xp.ascontiguousarray(batch.box), batch.start, batch.image, batch.gt_box, batch.gt_start, batch.hard

    def launch(name, threads, *args):
        cuda.launch("map_loss.cu", name, args, threads=threads, real=cuda.CTYPES[batch.box.dtype])
    launch("map_loss_overlaps", c * K, *boxes, near, gt, c * K, K, images, words, batch.nms, batch.match, batch.one)
    launch("map_loss_keep", c * images, near, gt, batch.start, kept, flags, c * images, K, images, words)
    place, tops, entries = _lists(batch, flags)
    launch("map_loss_values", c, tops, batch.P, aps, c, K, batch.mode)
    if widths is not None:
        launch("map_loss_gradients", c * K, batch.start, batch.image, batch.score, batch.rows, near, gt, kept, flags, place, tops, entries,
               batch.P, aps, widths, g, c * K, K, words, batch.mode, env)
    return aps, kept != 0, flags, g
