"""Fast R-CNN's loss of a region: which class it holds, and where its box lies."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module, scalar


def each(scores, deltas, labels, targets, beta=1.0, box_weight=1.0, gamma=0.0):
    """The loss of every region (Fast R-CNN, 1504.08083, Eq. 1 to 3), by which OHEM ranks them (1604.03540).

    L_r = -log softmax(scores[r])[u] + box_weight * [u < K] * sum_{i < 4} smooth_l1(deltas[r,u,i] - targets[r,i]),  u = labels[r];
    smooth_l1(d) = 0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta (beta = 1/sigma^2; the paper's is 1; 0 is pure L1).
    gamma > 0: the first term times (1 - p_u)^gamma, the focal form (1708.02002, Table 1d: a rival of OHEM), of the softmax (CHOICE: as
    published, of sigmoids).
    scores: (R, K + 1), background last (label K; the published nets have it first), deltas: (R, 4 * (K + 1)): four numbers a class, those of
    the background never used, targets: (R, 4), one float dtype. labels: (R,) integers in 0..K, or -1: the region is ignored, its loss 0.
    Targets of background and ignored regions may hold anything, NaN too. Returns (R,), same dtype. R = 0 gives an empty array.
    On a GPU array code serves, about 25 launches beside the head's matrix products; a label out of range gives NaN there.
    Raises ValueError for shapes, labels out of range, a beta or box_weight below 0, a gamma that is neither 0 nor at least 1; TypeError for dtypes.
    """
    return _each("roi_loss.each", scores, deltas, labels, targets, beta, box_weight, gamma)[0]


def loss(scores, deltas, labels, targets, weights=None, beta=1.0, box_weight=1.0, gamma=0.0):
    """value = sum_r weights[r] * L_r, L_r as in each, and its gradients.

    weights: (R,), the floats' dtype; default 1 / (number of labels other than -1), the mean: both terms are divided by the regions of the
    batch, not by those with a box (the released code). Weights of 0 are the "zeroing" form of OHEM (1604.03540, sec. 4.2).
    dscores[r] = weights[r] * f * (softmax(scores[r]) - onehot(u)), f = (1 - p_u)^gamma - gamma p_u (1 - p_u)^(gamma - 1) log p_u, 1 for gamma 0;
    ddeltas[r,u,i] = weights[r] * box_weight * smooth_l1'(d), zero elsewhere.
    Returns value (scalar), dscores, ddeltas. R = 0 gives 0.0 and empty gradients. Arguments and errors else as in each.
    """
    op = "roi_loss.loss"
    losses, p, log_p, d, rows, u, foreground = _each(op, scores, deltas, labels, targets, beta, box_weight, gamma)
    xp, dtype = array_module(scores), scores.dtype
    if weights is None:
        counted = labels != -1
        weights = counted.astype(dtype) / xp.maximum(counted.sum(), 1).astype(dtype)
    else:
        checks.float_array(op, "weights", weights, f"({len(scores)},)")
        checks.same_dtype(op, scores=scores, weights=weights)
        weights = xp.where(labels == -1, dtype.type(0), weights)
    own = p[rows, u]
    fade = (1 - own) ** dtype.type(gamma) - dtype.type(gamma) * own * (1 - own) ** dtype.type(max(0, gamma - 1)) * log_p
    p[rows, u] -= dtype.type(1)
    slope = xp.where(xp.abs(d) < beta, d / dtype.type(beta or 1), xp.sign(d)) * dtype.type(box_weight)
    ddeltas = xp.zeros((len(scores), scores.shape[1], 4), dtype)
    ddeltas[rows, u] = xp.where(foreground[:, None], slope * weights[:, None], dtype.type(0))
    return scalar((weights * losses).sum(dtype=np.float64)), p * (weights * fade)[:, None], ddeltas.reshape(deltas.shape)


def _each(op, scores, deltas, labels, targets, beta, box_weight, gamma):
    """Losses (R,), softmax, log of that of the label, differences of the boxes (R, 4), row numbers, labels to index with, which rows have a box."""
    checks.float_array(op, "scores", scores, "(R, K)")
    R, K1 = scores.shape
    checks.same_shape(op, (R, 4 * K1), deltas=deltas)
    checks.same_shape(op, (R, 4), targets=targets)
    checks.same_dtype(op, scores=scores, deltas=deltas, targets=targets)
    checks.labels(op, labels, R, K1)
    for name, value in (("beta", beta), ("box_weight", box_weight)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{op}: {name} must be finite and at least 0, got {value}")
    if not (gamma == 0 or 1 <= gamma < np.inf):
        raise ValueError(f"{op}: gamma must be 0, or finite and at least 1, got {gamma}")
    xp, dtype = array_module(scores), scores.dtype
    rows, u = xp.arange(R), xp.clip(labels, 0, max(0, K1 - 1))
    foreground, known = (labels >= 0) & (labels < K1 - 1), (labels >= -1) & (labels < K1)
    if R == 0:
        return xp.zeros(0, dtype), scores.copy(), xp.zeros(0, dtype), xp.zeros((0, 4), dtype), rows, u, foreground
    shifted = scores - scores.max(1, keepdims=True)
    p = xp.exp(shifted)
    total = p.sum(1, keepdims=True)
    d = xp.where(foreground[:, None], deltas.reshape(R, K1, 4)[rows, u] - targets, dtype.type(0))
    size = xp.abs(d)
    curve = xp.where(size < beta, d * d / dtype.type(2 * beta or 1), size - dtype.type(beta / 2)).sum(1)
    log_p = shifted[rows, u] - xp.log(total[:, 0])
    losses = dtype.type(box_weight) * curve - (1 - p[rows, u] / total[:, 0]) ** dtype.type(gamma) * log_p
    losses = xp.where(labels == -1, dtype.type(0), xp.where(known, losses, dtype.type(np.nan)))
    return losses, p / total, log_p, d, rows, u, foreground
