"""Softmax, and the cross-entropy that trains it."""
import math

import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick, scalar


def softmax(x):
    """p_k = exp(x_k) / sum_j exp(x_j) over the last axis, shifted by the maximum so that nothing overflows.

    x: any shape whose last axis is not empty, float32 or float64 (not checked). Returns its shape and dtype; a row with NaN or +infinity is NaN.
    On a GPU array code serves: five launches.
    """
    e = array_module(x).exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss(x, labels):
    """Mean softmax cross-entropy over the rows that have a label (OverFeat, sec. 3.1 and 5): value and gradient.

    value = mean_r (log sum_k exp(x[r,k]) - x[r, labels[r]]), dx = (softmax(x) - onehot) / rows counted.
    x: (R, K) float32 or float64, labels: (R,) integers in 0..K-1, or -1: the row counts neither in the mean nor in dx.
    Returns a Python float (on a GPU a 0-d float64 array there) and dx (R, K), same dtype; 0.0 and zeros if no row has a label.
    Raises ValueError for shapes or labels out of range, TypeError for dtypes. A GPU does not look at the labels before: one out of
    range makes the value and its row of dx NaN.
    """
    checks.float_array("softmax_loss.loss", "x", x, "(R, K)")
    checks.labels("softmax_loss.loss", labels, *x.shape)
    return pick(x, numpy=_loss_numpy, numba=_loss_numba, cuda=_loss_cuda)(x, labels)


def _loss_numpy(x, labels):
    dx, rows = np.zeros_like(x), np.flatnonzero(labels >= 0)
    if len(rows) == 0:
        return 0.0, dx
    labels, each = labels[rows], np.arange(len(rows))
    shifted = x[rows] - x[rows].max(1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(1, keepdims=True)
    value = np.log(total[:, 0]) - shifted[each, labels]
    gradient = e / total
    gradient[each, labels] -= 1
    dx[rows] = gradient / len(rows)
    return float(value.mean(dtype="float64")), dx


# Numba: a block of rows at a time, all steps while it lies in the cache; which rows make a block depends on no number of threads

BLOCK = 512                                                             # numbers, at least a row
TERMS = tuple(1 / math.factorial(k) for k in range(13, -1, -1))         # of exp(r), enough for float64 where |r| <= log(2) / 2


def _loss_numba(x, labels):
    x, dx, rows = np.ascontiguousarray(x), np.zeros(x.shape, x.dtype), np.flatnonzero(labels >= 0)
    if len(rows) == 0:
        return 0.0, dx
    mantissa, bias, integer = (23, 127, np.int32) if x.dtype == np.float32 else (52, 1023, np.int64)
    unit, bias = x.dtype.type(2.0 ** mantissa), x.dtype.type(bias)
    values = _blocks(x, rows, labels[rows].astype(np.int64), dx, max(1, BLOCK // x.shape[1]), unit, bias, np.empty(0, integer))
    return float(values.sum()) / len(rows), dx


@njit(cache=True, parallel=True, error_model="numpy")
def _blocks(x, rows, labels, dx, most, unit, bias, integer):
    """Fill dx, and return the sum of the losses of each block of at most `most` rows."""
    K, count = x.shape[1], len(rows)
    values = np.zeros(-(-count // most))
    for b in prange(len(values)):
        first, n = b * most, min(most, count - b * most)
        e, bits = np.empty(n * K, x.dtype), np.empty(n * K, integer.dtype)
        for i in range(n):
            row, z = x[rows[first + i]], e[i * K:(i + 1) * K]
            top = row[0]
            for k in range(K):
                top = row[k] if row[k] > top else top                   # what is not a number is left to exp
            for k in range(K):
                z[k] = row[k] - top
            values[b] -= z[labels[first + i]]
        _exp(e, bits, bits.view(x.dtype), unit, bias)
        for i in range(n):
            d, p, label = dx[rows[first + i]], e[i * K:(i + 1) * K], labels[first + i]
            total = _sum(p)
            values[b] += np.log(total)
            scale = x.dtype.type(1 / (total * count))
            for k in range(K):
                d[k] = p[k] * scale
            d[label] = (p[label] / total - 1) / count
    return values


@njit(cache=True, fastmath={"reassoc"})
def _sum(x):
    total = 0.0
    for k in range(len(x)):
        total += x[k]
    return total


@njit(cache=True)
def _exp(x, bits, power, unit, bias):
    """x = exp(x) in place, for x <= 0; np.exp would be a call for each element. With n = x / log 2 rounded and r = x - n * log 2:

    exp(x) = 2^n * exp(r); 2^n is the number whose bits are (n + bias) * unit, which `power` shows as such.
    """
    t = x.dtype.type
    for k in range(len(x)):
        n = (x[k] * t(1 / math.log(2)) + t(1.5) * unit) - t(1.5) * unit     # the sum holds no digits behind the point
        n = n if n > -bias else -bias                                   # 2^n counts as 0 there, which has the bits 0
        r = (x[k] - n * t(0.693359375)) + n * t(2.121944400546905827679e-4)     # log 2 in two parts: the first product is exact
        p = t(0)
        for term in TERMS:
            p = p * r + t(term)
        bits[k] = (n + bias) * unit
        x[k] = t(0) if x[k] < -bias else p                              # NaN stays NaN
    for k in range(len(x)):
        x[k] *= power[k]


# CUDA: kernels/softmax_loss.cu, between array code that counts the labels (two launches) and adds up what the blocks found (one)

def _loss_cuda(x, labels):
    xp, (R, K) = array_module(x), x.shape
    x, labels, blocks = xp.ascontiguousarray(x), xp.ascontiguousarray(labels, np.int64), -(-R // 8)
    dx, partials, count = cuda.empty(x, x.shape), cuda.empty(x, blocks, np.float64), xp.asarray((labels != -1).sum())
    cuda.launch("softmax_loss.cu", "softmax_loss_rows", (x, labels, count, dx, partials, R, K), grid=blocks)
    return scalar(partials.sum()), dx
