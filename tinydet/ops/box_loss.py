"""Losses of box regression. Both divide by the number of boxes that count, and both return value and gradient."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module


def l2(x, target, mask=None):
    """Half the squared distance, per box (OverFeat, sec. 4.2): value = 0.5 * sum_{kept} |x - target|^2 / kept.

    Normalising by the number of kept boxes is a CHOICE. x, target: (R, D), D = 4 edges, one float dtype;
    mask: (R,) bool, False rows give no loss and no gradient (the 50 % rule); None keeps all.
    Returns a Python float and dx (R, D), same dtype; 0.0 and zeros if no box is kept. Masked rows may hold anything, NaN too.
    """
    d, kept, mask = _difference("box_loss.l2", x, target, mask)
    return float((d * d).sum(dtype="float64") / 2 / kept), _scatter(d / kept, x, mask)


def smooth_l1(x, target, mask=None, beta=1.0):
    """Huber-like loss (Fast R-CNN, eq. 3, in the beta form), summed over the D numbers of a box, divided by the kept boxes.

    With d = x - target: 0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta; gradient d / beta or sign(d). beta = 1/sigma^2.
    beta = 0 is pure L1 (gradient 0 at d = 0). Arguments, result and mask as in l2. Raises ValueError for beta < 0 or NaN.
    """
    if not 0 <= beta < np.inf:
        raise ValueError(f"box_loss.smooth_l1: beta must be a finite number >= 0, got {beta}")
    d, kept, mask = _difference("box_loss.smooth_l1", x, target, mask)
    xp = array_module(x)
    size, inside = xp.abs(d), xp.abs(d) < beta
    half = x.dtype.type(beta) / 2
    curve = xp.where(inside, d * d / (4 * half) if beta else 0, size - half)
    slope = xp.where(inside, d / (2 * half) if beta else 0, xp.sign(d))
    return float(curve.sum(dtype="float64") / kept), _scatter(slope / kept, x, mask)


def _difference(op, x, target, mask):
    checks.float_array(op, "x", x, "(R, D)")
    checks.same_shape(op, x.shape, target=target)
    checks.same_dtype(op, x=x, target=target)
    mask = array_module(x).ones(len(x), bool) if mask is None else mask
    checks.array(op, "mask", mask)
    if mask.dtype != bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    checks.same_shape(op, (len(x),), mask=mask)
    return (x - target)[mask] if bool(mask.all()) else x[mask] - target[mask], max(1, int(mask.sum())), mask


def _scatter(rows, x, mask):
    dx = array_module(x).zeros_like(x)
    dx[mask] = rows
    return dx
