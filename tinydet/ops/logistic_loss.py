"""Logistic loss: one yes-or-no question for every class of an image."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar


def loss(x, labels, *, signed):
    """Sum over the classes, mean over the rows, of log(1 + exp(-t * x)), t = +1 or -1 (Oquab et al., CVPR 2015; the released code).

    value = 1/R sum_{r,k} log(1 + exp(-t[r,k] * x[r,k])), dx = -t * sigmoid(-t * x) / R; sigmoid(x) is the probability of t = +1.
    x: (R, K) float32 or float64: scores, no sigmoid. labels: (R, K) integers. signed=True: +1 yes, -1 no, 0 counts nowhere;
    signed=False: 1 yes, 0 no, -1 counts nowhere. There is no default: 0 means one thing in the one and another in the other.
    R divides whatever is ignored (the released code divides by the batch). A NaN in x that counts makes the value and its dx NaN.
    Returns a Python float (on a GPU a 0-d float64 array there) and dx (R, K), same dtype; 0.0 for no rows.
    Large scores do not overflow: x = -800, t = +1 gives 800.
    Raises ValueError for shapes and other labels, TypeError for dtypes. A GPU does not look at the labels before: as int8, which
    needs no conversion, others than these make the value and their place in dx NaN.
    """
    op = "logistic_loss.loss"
    checks.float_array(op, "x", x, "(R, K)")
    checks.ternary(op, labels, x.shape)
    if not isinstance(signed, bool):
        raise TypeError(f"{op}: signed must be True or False, got {signed!r}")
    return pick(x, numpy=_loss_numpy, cuda=_loss_cuda)(x, labels, signed)


def _loss_numpy(x, labels, signed):
    counts = labels != 0 if signed else labels >= 0
    t = np.where(labels > 0, 1, -1).astype(x.dtype)
    z = np.where(counts, -t * x, 0)
    rows = max(1, len(x))
    value = np.where(counts, softplus(z), 0).sum(dtype="float64") / rows
    dx = np.where(counts, -t * sigmoid(z), 0) / x.dtype.type(rows)
    return float(value), dx


def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow at either end; -inf gives 0. Same shape and dtype. On a GPU array code: seven launches."""
    xp = array_module(x)
    e = xp.exp(-abs(x))
    return xp.where(x >= 0, 1, e) / (1 + e)


def softplus(x):
    """log(1 + exp(x)) = -log(sigmoid(-x)) without overflow at either end; NaN stays NaN. Same shape and dtype. On a GPU: six launches."""
    xp = array_module(x)
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-abs(x)))


# CUDA: kernels/logistic_loss.cu, then array code adds up what the blocks found

def _loss_cuda(x, labels, signed):
    xp, blocks = array_module(x), -(-x.size // 1024)
    x, labels = xp.ascontiguousarray(x), xp.ascontiguousarray(as_int8(labels)).view(np.uint8)
    dx, partials = cuda.empty(x, x.shape), cuda.empty(x, blocks, np.float64)
    cuda.launch("logistic_loss.cu", "logistic_loss_entries", (x, labels, dx, partials, x.size, max(1, len(x)), signed), grid=blocks)
    return scalar(partials.sum()), dx


def as_int8(labels):
    """Labels as int8, those outside -1..1 as -2 or 2: a plain cast would make 255 an ignored one.

    labels: integers of any shape. Returns int8, same shape and device; labels themselves if they are int8. Nothing is checked.
    """
    return labels if labels.dtype == np.int8 else labels.astype(np.int64, copy=False).clip(-2, 2).astype(np.int8)
