"""Batch normalisation over the channels, with the batch's statistics (training) or with given ones (frozen).

OverFeat had none (2013); the small nets here use it in place of weeks of training.
"""
import numpy as np
from numba import njit, prange

from tinydet import checks
from tinydet.backend import array_module, pick

PARTS = 64              # rows are summed in this many parts whatever the thread count: the same bits on 1 or 8 threads


def forward(x, gamma, beta, eps=1e-5):
    """Normalise each channel with the mean and variance of this batch.

    y = gamma * (x - mean) / sqrt(var + eps) + beta; mean and var (biased: divided by the count) over all axes but the last.
    x: (N, H, W, C), gamma, beta: (C,), one dtype, float32 or float64. Sums run in float64.
    Returns y (N, H, W, C), cache, and (mean, var) of shape (C,) for the running averages.
    Raises ValueError for an empty batch, which has no mean, or shapes that do not fit; TypeError for other dtypes.
    """
    _check("batch_norm.forward", x, eps, gamma=gamma, beta=beta)
    if x.size == 0:
        raise ValueError(f"batch_norm.forward: x must hold at least one pixel, got {x.shape}")
    mean, var = pick(x, numpy=_moments_numpy, numba=_moments_numba)(x)
    y, cache = _normalise(x, gamma, beta, mean, var, eps, training=True)
    return y, cache, (mean, var)


def forward_frozen(x, gamma, beta, mean, var, eps=1e-5):
    """Normalise with given statistics, at test time or in a frozen trunk: y = gamma * (x - mean) / sqrt(var + eps) + beta.

    As forward, but mean and var (C,) are inputs and constants of the gradient, and an empty x is allowed.
    Returns y and cache.
    """
    _check("batch_norm.forward_frozen", x, eps, gamma=gamma, beta=beta, mean=mean, var=var)
    return _normalise(x, gamma, beta, mean, var, eps, training=False)


def backward(dy, cache):
    """dx, dgamma, dbeta of either forward; h = (x - mean) / sqrt(var + eps), m = pixels in the batch.

    dbeta = sum dy, dgamma = sum dy * h, dx = gamma / sqrt(var + eps) * (dy - dbeta / m - h * dgamma / m) in training,
    because mean and var depend on x too; frozen: dx = gamma / sqrt(var + eps) * dy.
    """
    x, gamma, mean, inverse, training = cache
    checks.same_shape("batch_norm.backward", x.shape, dy=dy)
    checks.same_dtype("batch_norm.backward", x=x, dy=dy)
    sums, gradient = pick(x, numpy=(_sums_numpy, _gradient_numpy), numba=(_sums_numba, _gradient_numba))
    dbeta, dgamma = sums(dy, x, mean, inverse)
    count = max(1, x.size // len(gamma)) if training else np.inf
    dx = gradient(dy, x, mean, inverse, gamma, (dbeta / count).astype(x.dtype), (dgamma / count).astype(x.dtype))
    return dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype)


def fold(w, b, gamma, beta, mean, var, eps=1e-5):
    """Weights and bias of one convolution that does the work of a convolution and the frozen batch norm behind it.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta, so that conv(x, w', b') =
    forward_frozen(conv(x, w, b), gamma, beta, mean, var, eps) up to rounding. w: (..., Cout), conv or linear; the others (Cout,); one
    dtype. Returns w', b' (copies). Raises ValueError for shapes, TypeError for dtypes.
    """
    op = "batch_norm.fold"
    checks.float_array(op, "w", w)
    checks.same_dtype(op, w=w, b=b, gamma=gamma, beta=beta, mean=mean, var=var)
    checks.same_shape(op, w.shape[-1:], b=b, gamma=gamma, beta=beta, mean=mean, var=var)
    _check_variance(op, eps, var)
    scale = gamma / array_module(w).sqrt(var + w.dtype.type(eps))
    return w * scale, (b - mean) * scale + beta


def _check(op, x, eps, **channel):
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.same_dtype(op, x=x, **channel)
    checks.same_shape(op, (x.shape[3],), **channel)
    checks.whole(op, 1, C=x.shape[3])
    _check_variance(op, eps, channel.get("var"))


def _check_variance(op, eps, var):
    if not 0 <= eps < np.inf:
        raise ValueError(f"{op}: eps must be finite and at least 0, got {eps}")
    if var is not None and bool((var < 0).any()):
        raise ValueError(f"{op}: var must be at least 0, got {float(var.min())}")


def _normalise(x, gamma, beta, mean, var, eps, training):
    inverse = 1 / array_module(x).sqrt(var + x.dtype.type(eps))
    run = pick(x, numpy=_scale_numpy, numba=_scale_numba)
    return run(x, mean, inverse * gamma, beta), (x, gamma, mean, inverse, training)


# NumPy

def _moments_numpy(x):
    return tuple(m.astype(x.dtype) for m in (x.mean((0, 1, 2), np.float64), x.var((0, 1, 2), np.float64)))


def _scale_numpy(x, mean, scale, beta):
    return (x - mean) * scale + beta


def _sums_numpy(dy, x, mean, inverse):
    return dy.sum((0, 1, 2), np.float64), (dy * ((x - mean) * inverse)).sum((0, 1, 2), np.float64)


def _gradient_numpy(dy, x, mean, inverse, gamma, dbeta, dgamma):
    return gamma * inverse * (dy - dbeta - (x - mean) * inverse * dgamma)


# Numba: one pass over memory each, rows = N*H*W

def _rows(x):
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def _moments_numba(x):
    rows, zero, one = _rows(x), np.zeros(x.shape[3], x.dtype), np.ones(x.shape[3], x.dtype)
    mean = (_add(rows, rows, zero, one)[0] / len(rows)).astype(x.dtype)
    off, squares = _add(rows - mean, rows, mean, one) / len(rows)
    return mean, np.maximum(squares, 0).astype(x.dtype)


def _scale_numba(x, mean, scale, beta):
    y = np.empty(x.shape, x.dtype)
    _scale(_rows(x), mean, scale, beta, y.reshape(-1, x.shape[3]))
    return y


def _sums_numba(dy, x, mean, inverse):
    return _add(_rows(dy), _rows(x), mean, inverse)


def _gradient_numba(dy, x, mean, inverse, gamma, dbeta, dgamma):
    dx = np.empty(x.shape, x.dtype)
    _gradient(_rows(dy), _rows(x), mean, inverse, gamma * inverse, dbeta, dgamma, dx.reshape(-1, x.shape[3]))
    return dx


@njit(cache=True, parallel=True)
def _add(a, x, mean, inverse):
    """Per channel, in float64: sum a and sum a * (x - mean) * inverse."""
    rows, C = x.shape
    parts = np.zeros((PARTS, 2, C))
    for p in prange(PARTS):
        for r in range(rows * p // PARTS, rows * (p + 1) // PARTS):
            for c in range(C):
                parts[p, 0, c] += a[r, c]
                parts[p, 1, c] += a[r, c] * ((x[r, c] - mean[c]) * inverse[c])
    total = np.zeros((2, C))
    for p in range(PARTS):
        total += parts[p]
    return total


@njit(cache=True, parallel=True)
def _scale(x, mean, scale, beta, y):
    rows, C = x.shape
    for p in prange(PARTS):
        for r in range(rows * p // PARTS, rows * (p + 1) // PARTS):
            for c in range(C):
                y[r, c] = (x[r, c] - mean[c]) * scale[c] + beta[c]


@njit(cache=True, parallel=True)
def _gradient(dy, x, mean, inverse, scale, dbeta, dgamma, dx):
    rows, C = x.shape
    for p in prange(PARTS):
        for r in range(rows * p // PARTS, rows * (p + 1) // PARTS):
            for c in range(C):
                dx[r, c] = scale[c] * (dy[r, c] - dbeta[c] - (x[r, c] - mean[c]) * inverse[c] * dgamma[c])
