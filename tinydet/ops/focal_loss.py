"""Focal loss: cross-entropy in which easy examples fade, for the many negatives of a one-stage detector."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar
from tinydet.ops.logistic_loss import as_int8, sigmoid, softplus


def loss(x, labels, alpha=0.25, gamma=2.0, normalizer=None):
    """Sum over all entries of -alpha_t * (1 - p_t)^gamma * log(p_t), divided by the number of positives (Lin et al., 1708.02002).

    p_t = sigmoid(z), z = x for label 1 and -x for label 0; alpha_t = alpha or 1 - alpha (alpha=None: 1 for both).
    dvalue/dz = alpha_t * (1 - p_t)^gamma * (gamma * p_t * log(p_t) - (1 - p_t)) / normalizer; dx = dvalue/dz for label 1, -dvalue/dz for
    label 0, 0 for label -1. gamma = 0 is the cross-entropy.
    (AP-loss, 1904.06373, Table 2, unverified, has it as a rival; formula, alpha 0.25, gamma 2 and the normaliser as in Lin et al., unverified.)
    x: any shape, float32 or float64: scores, no sigmoid, one entry an anchor and class. labels: same shape, integers: 1, 0, and
    -1 for entries that count nowhere. normalizer: a number > 0; default the number of labels 1 (an anchor has one), at least 1.
    Returns a Python float (on a GPU a 0-d float64 array there) and dx, x's shape and dtype; 0.0 for an empty x.
    Scores that are not finite are let through (the ranking losses refuse them): NaN makes the value NaN, an infinite one on the wrong side
    infinite.
    Raises ValueError for shapes, other labels, alpha outside [0, 1], gamma < 0, a normalizer <= 0; TypeError for dtypes. A GPU does
    not look at the labels before: as int8, which needs no conversion, others than these make the value and their place in dx NaN.
    """
    op = "focal_loss.loss"
    checks.float_array(op, "x", x)
    checks.ternary(op, labels, x.shape)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must be None or lie in [0, 1], got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{op}: gamma must be finite and at least 0, got {gamma}")
    if normalizer is not None and not 0 < normalizer < float("inf"):
        raise ValueError(f"{op}: normalizer must be finite and above 0, got {normalizer}")
    yes, no = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return pick(x, numpy=_loss_numpy, cuda=_loss_cuda)(x, labels, yes, no, gamma, normalizer)


def _loss_numpy(x, labels, yes, no, gamma, normalizer):
    normalizer = max(1, int((labels == 1).sum())) if normalizer is None else normalizer
    sign = np.where(labels == 1, 1, -1).astype(x.dtype)
    z = np.where(labels < 0, 0, sign * x)
    weight = np.where(labels < 0, 0, np.where(labels == 1, yes, no) / normalizer).astype(x.dtype)
    p, rest, log_p = sigmoid(z), sigmoid(-z), -softplus(-z)             # p_t, 1 - p_t and log(p_t), each exact for large |z|
    fade = weight * rest ** x.dtype.type(gamma)
    value = -(fade * log_p).sum(dtype="float64")
    p_log_p = p * np.where(p > 0, log_p, 0)                             # 0 where p_t is, though its logarithm may be infinite
    return float(value), sign * fade * (x.dtype.type(gamma) * p_log_p - rest)


# CUDA: kernels/focal_loss.cu, between array code that counts the positives (two launches) and adds up what the blocks found (one)

def _loss_cuda(x, labels, yes, no, gamma, normalizer):
    xp, shape, blocks = array_module(x), x.shape, -(-x.size // 1024)    # np.ascontiguousarray gives an axis to what has none
    positives = xp.asarray((labels == 1).sum()) if normalizer is None else cuda.empty(x, (), np.int64)
    x, labels = xp.ascontiguousarray(x), xp.ascontiguousarray(as_int8(labels)).view(np.uint8)
    dx, partials = cuda.empty(x, shape), cuda.empty(x, blocks, np.float64)
    how = x.size, 0 if normalizer is None else float(normalizer), float(yes), float(no), float(gamma)
    cuda.launch("focal_loss.cu", "focal_loss_entries", (x, labels, positives, dx, partials, *how), grid=blocks)
    return scalar(partials.sum()), dx
