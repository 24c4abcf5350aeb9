"""Losses of box regression. Both divide by the number of boxes that count, and both return value and gradient."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar


def l2(x, target, mask=None):
    """Half the squared distance, per box (OverFeat, sec. 4.2): value = 0.5 * sum_{kept} |x - target|^2 / kept.

    Gradient (x - target) / kept. Normalising by the number of kept boxes is a CHOICE. x, target: (R, D), D = 4 edges, float32 or float64,
    both the same; mask: (R,) bool, False rows give no loss and no gradient (the 50 % rule); None keeps all.
    Returns a Python float (on a GPU a 0-d float64 array there) and dx (R, D), same dtype; 0.0 and zeros if no box is kept. Masked
    rows may hold anything, NaN too. Raises ValueError for shapes, TypeError for dtypes and a mask that is not bool.
    """
    mask = _checked("box_loss.l2", x, target, mask)
    return pick(x, numpy=_l2_numpy, cuda=_l2_cuda)(x, target, mask)


def smooth_l1(x, target, mask=None, beta=1.0):
    """Huber-like loss (Fast R-CNN, eq. 3, in the beta form), summed over the D numbers of a box, divided by the kept boxes.

    RetinaNet takes it of normalised box deltas with beta 1, and a quarter of it (the code of AP-loss, 1904.06373; retinanet.loss).
    With d = x - target: 0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta; gradient d / beta or sign(d). beta = 1/sigma^2.
    beta = 0 is pure L1 (gradient 0 at d = 0); gradient over kept. Arguments, result, mask and errors as in l2, and ValueError for
    beta < 0, infinite or NaN.
    """
    if not 0 <= beta < np.inf:
        raise ValueError(f"box_loss.smooth_l1: beta must be a finite number >= 0, got {beta}")
    mask = _checked("box_loss.smooth_l1", x, target, mask)
    return pick(x, numpy=_smooth_l1_numpy, cuda=_smooth_l1_cuda)(x, target, mask, beta)


def _checked(op, x, target, mask):
    """The mask, after the checks; all true for None."""
    checks.float_array(op, "x", x, "(R, D)")
    checks.same_shape(op, x.shape, target=target)
    checks.same_dtype(op, x=x, target=target)
    mask = array_module(x).ones(len(x), bool) if mask is None else mask
    checks.array(op, "mask", mask)
    if mask.dtype != bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    checks.same_shape(op, (len(x),), mask=mask)
    return mask


def _l2_numpy(x, target, mask):
    d, kept = _difference(x, target, mask)
    return float((d * d).sum(dtype="float64") / 2 / kept), _scatter(d / kept, x, mask)


def _smooth_l1_numpy(x, target, mask, beta):
    d, kept = _difference(x, target, mask)
    size, inside = np.abs(d), np.abs(d) < beta
    half = x.dtype.type(beta) / 2
    curve = np.where(inside, d * d / (4 * half) if beta else 0, size - half)
    slope = np.where(inside, d / (2 * half) if beta else 0, np.sign(d))
    return float(curve.sum(dtype="float64") / kept), _scatter(slope / kept, x, mask)


def _difference(x, target, mask):
    return (x - target)[mask] if bool(mask.all()) else x[mask] - target[mask], max(1, int(mask.sum()))


def _scatter(rows, x, mask):
    dx = np.zeros_like(x)
    dx[mask] = rows
    return dx


# CUDA: kernels/box_loss.cu, between array code that counts the rows kept and adds up what the blocks found (one launch each)

def _l2_cuda(x, target, mask):
    return _launch("box_loss_l2", x, target, mask)


def _smooth_l1_cuda(x, target, mask, beta):
    return _launch("box_loss_smooth_l1", x, target, mask, float(beta))


def _launch(kernel, x, target, mask, *how):
    xp, blocks = array_module(x), -(-x.size // 1024)
    dx, partials, kept = cuda.empty(x, x.shape), cuda.empty(x, blocks, np.float64), xp.asarray(mask.sum())
    inputs = (xp.ascontiguousarray(a) for a in (x, target, mask))
    cuda.launch("box_loss.cu", kernel, (*inputs, kept, dx, partials, x.size, x.shape[1], *how), grid=blocks)
    return scalar(partials.sum()), dx
