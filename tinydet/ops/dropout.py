"""Dropout of single values or of whole maps, inverted or classical."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module


def forward(x, p, rng, by_map=False, inverted=True):
    """Training: zero each value with probability p; inverted, scale the rest by 1/(1 - p) so that the mean stays.

    y = x * mask, mask in {0, 1/(1 - p)} (inverted) or {0, 1} (classical: the test then multiplies by 1 - p, forward_test).
    OverFeat (1312.6229): p = 0.5; the released nets have no scaling layer at test time, hence inverted (CHOICE).
    by_map: one draw for each channel (last axis), shared by all positions and by the whole batch: "dropmap" of the released
    code of Oquab et al. (CVPR 2015), which is classical there.
    x: any shape, float32 or float64; 0 <= p < 1; rng: numpy.random.Generator, the same bits on every backend.
    Returns y (same shape and dtype) and cache. Raises ValueError for p outside [0, 1), TypeError for dtypes or another rng.
    On a GPU array code serves: the mask is drawn on the host and sent as bool, which takes longer than the two launches.
    """
    _check("dropout.forward", x, p)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"dropout.forward: rng must be a numpy.random.Generator, got {type(rng).__name__}")
    keep = rng.random(x.shape[-1:] if by_map else x.shape, np.float32) >= p
    mask = array_module(x).asarray(keep) * x.dtype.type(1 / (1 - p) if inverted else 1)
    return x * mask, (x.shape, mask)


def forward_test(x, p):
    """Test time of classical dropout: y = x * (1 - p). Inverted dropout is the identity there. Returns y and cache.

    x, p and errors: as in forward.
    """
    _check("dropout.forward_test", x, p)
    factor = x.dtype.type(1 - p)
    return x * factor, (x.shape, factor)


def backward(dy, cache):
    """dx = dy * mask, with the mask (or factor) of the forward pass. dy: the shape and dtype of x; ValueError or TypeError for others."""
    shape, mask = cache
    checks.gradient("dropout.backward", shape, mask.dtype, dy)
    return dy * mask


def _check(op, x, p):
    checks.float_array(op, "x", x)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: p must lie in [0, 1), got {p}")
