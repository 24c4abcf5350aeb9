"""Softmax, and the cross-entropy that trains it."""
from tinydet import checks
from tinydet.backend import array_module


def softmax(x):
    """p_k = exp(x_k) / sum_j exp(x_j) over the last axis, shifted by the maximum so that nothing overflows. Same shape and dtype."""
    e = array_module(x).exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss(x, labels):
    """Mean softmax cross-entropy over the rows that have a label (OverFeat, sec. 3.1 and 5): value and gradient.

    value = mean_r (log sum_k exp(x[r,k]) - x[r, labels[r]]), dx = (softmax(x) - onehot) / rows counted.
    x: (R, K) float32 or float64, labels: (R,) integers in 0..K-1, or -1: the row counts neither in the mean nor in dx.
    Returns a Python float and dx (R, K), same dtype; 0.0 and zeros if no row has a label.
    Raises ValueError for shapes or labels out of range, TypeError for dtypes.
    """
    checks.float_array("softmax_loss.loss", "x", x, "(R, K)")
    checks.labels("softmax_loss.loss", labels, *x.shape)
    xp = array_module(x)
    rows = xp.flatnonzero(labels >= 0)
    dx = xp.zeros_like(x)
    if len(rows) == 0:
        return 0.0, dx
    true = labels[rows]
    shifted = x[rows] - x[rows].max(1, keepdims=True)
    e = xp.exp(shifted)
    total = e.sum(1, keepdims=True)
    value = xp.log(total[:, 0]) - shifted[xp.arange(len(rows)), true]
    gradient = e / total
    gradient[xp.arange(len(rows)), true] -= 1
    dx[rows] = gradient / len(rows)
    return float(value.mean(dtype="float64")), dx
