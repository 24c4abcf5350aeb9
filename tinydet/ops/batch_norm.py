"""Batch normalisation over the channels, with the batch's statistics (training) or with given ones (frozen).

OverFeat had none (2013); the small nets here use it in place of weeks of training.
"""
import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick

PARTS, BLOCK, WIDTH = 64, 256, 64       # see _blocks and _wide
GRID, EACH = 1024, 4                    # CUDA: blocks that sum, as many as fill a large GPU; pixels of a thread (EACH of the kernel file)


def forward(x, gamma, beta, eps=1e-5, relu=False):
    """Normalise each channel with the mean and variance of this batch.

    y = gamma * (x - mean) / sqrt(var + eps) + beta; mean and var (biased: divided by the count) over all axes but the last.
    relu=True: y = max(0, that), as ops.relu behind it would make it, in the same pass; NaN stays NaN.
    x: (N, H, W, C), gamma, beta: (C,), one dtype, float32 or float64. Sums run in float64 (Numba and CUDA: of sums over short
    blocks of rows, which run in x's dtype about the mean of the block, in CUDA of some of its rows, so that a large mean swamps
    nothing).
    Returns y (N, H, W, C), cache, and (mean, var) of shape (C,) for the running averages.
    Raises ValueError for an empty batch, which has no mean, or shapes that do not fit; TypeError for other dtypes.
    """
    _check("batch_norm.forward", x, eps, gamma=gamma, beta=beta)
    if x.size == 0:
        raise ValueError(f"batch_norm.forward: x must hold at least one pixel, got {x.shape}")
    mean, var = pick(x, numpy=_moments_numpy, numba=_moments_numba, cuda=_moments_cuda)(x)
    y, cache = _normalise(x, gamma, beta, mean, var, eps, relu, training=True)
    return y, cache, (mean, var)


def forward_frozen(x, gamma, beta, mean, var, eps=1e-5, relu=False):
    """Normalise with given statistics, at test time or in a frozen trunk: y = gamma * (x - mean) / sqrt(var + eps) + beta.

    As forward, but mean and var (C,) are inputs and constants of the gradient, and an empty x is allowed.
    Returns y and cache. A var below 0 is refused on the host; on a GPU y is NaN where var + eps < 0.
    """
    _check("batch_norm.forward_frozen", x, eps, gamma=gamma, beta=beta, mean=mean, var=var)
    return _normalise(x, gamma, beta, mean, var, eps, relu, training=False)


def backward(dy, cache):
    """dx, dgamma, dbeta of either forward; h = (x - mean) / sqrt(var + eps), m = pixels in the batch.

    dbeta = sum dy, dgamma = sum dy * h, dx = gamma / sqrt(var + eps) * (dy - dbeta / m - h * dgamma / m) in training,
    because mean and var depend on x too; frozen: dx = gamma / sqrt(var + eps) * dy. With relu, dy counts as 0 where not y > 0;
    y is made again from x, which costs less than to read it.
    dy: the shape and dtype of x, as dx; dgamma, dbeta: (C,). Raises ValueError or TypeError where dy does not fit the cache.
    """
    x = cache[0]
    checks.same_shape("batch_norm.backward", x.shape, dy=dy)
    checks.same_dtype("batch_norm.backward", x=x, dy=dy)
    return pick(x, numpy=_backward_numpy, numba=_backward_numba, cuda=_backward_cuda)(dy, *cache)


def fold(w, b, gamma, beta, mean, var, eps=1e-5):
    """Weights and bias of one convolution that does the work of a convolution and the frozen batch norm behind it.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta, so that conv(x, w', b') =
    forward_frozen(conv(x, w, b), gamma, beta, mean, var, eps) up to rounding. w: (..., Cout), conv or linear; the others (Cout,); one
    dtype. Returns w', b' (copies). Raises ValueError for shapes, TypeError for dtypes. Array code also on a GPU: done once.
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
    if var is not None and checks.on_host(var) and bool((var < 0).any()):
        raise ValueError(f"{op}: var must be at least 0, got {float(var.min())}")


def _normalise(x, gamma, beta, mean, var, eps, relu, training):
    run, eps = pick(x, numpy=_forward_numpy, numba=_forward_numba, cuda=_forward_cuda), x.dtype.type(eps)
    return run(x, gamma, beta, mean, var, eps, relu), (x, gamma, beta, mean, var, eps, relu, training)


# NumPy

def _moments_numpy(x):
    return tuple(m.astype(x.dtype) for m in (x.mean((0, 1, 2), np.float64), x.var((0, 1, 2), np.float64)))


def _forward_numpy(x, gamma, beta, mean, var, eps, relu):
    y = (x - mean) * (1 / np.sqrt(var + eps) * gamma) + beta
    return np.maximum(y, 0) if relu else y


def _backward_numpy(dy, x, gamma, beta, mean, var, eps, relu, training):
    if relu:
        dy = np.where(_forward_numpy(x, gamma, beta, mean, var, eps, False) > 0, dy, x.dtype.type(0))
    inverse, count = 1 / np.sqrt(var + eps), max(1, x.size // len(gamma))
    h = (x - mean) * inverse
    sums = dy.sum((0, 1, 2), np.float64), (dy * h).sum((0, 1, 2), np.float64)
    dbeta, dgamma, shift, slope = (v.astype(x.dtype) for v in (*sums, *(s / count for s in sums)))
    return inverse * gamma * (dy - shift - h * slope if training else dy), dgamma, dbeta


# Numba: one pass over memory each

def _wide(x):
    """x as rows of k pixels each, and k: C * k is at least WIDTH if the number of pixels allows, so that short rows fill vectors."""
    C, k = x.shape[3], _side(x)
    return np.ascontiguousarray(x).reshape(-1, C * k), k


def _side(x):
    C, k = x.shape[3], 1
    while C * k < WIDTH and x.size // C % (2 * k) == 0:
        k *= 2
    return k


def _blocks(x):
    """In how many blocks the rows are summed: enough for any number of threads, which therefore changes no bit, and short ones."""
    return min(len(x), max(PARTS, len(x) // BLOCK, x.size // (BLOCK * WIDTH)))


def _moments_numba(x):
    rows, k = _wide(x)
    means, squares, counts = _moments(rows, _blocks(rows))
    total = counts.sum() * k
    mean = (counts * means).sum(0).reshape(k, -1).sum(0) / total
    squares += counts * (means - np.tile(mean, k)) ** 2             # about the mean of all
    var = squares.sum(0).reshape(k, -1).sum(0) / total
    return mean.astype(x.dtype), np.maximum(var, 0).astype(x.dtype)


def _forward_numba(x, gamma, beta, mean, var, eps, relu):
    (rows, k), y, scale = _wide(x), np.empty(x.shape, x.dtype), 1 / np.sqrt(var + eps) * gamma
    _scale(rows, *(np.tile(v, k) for v in (mean, scale, beta)), relu, y.reshape(rows.shape))
    return y


def _backward_numba(dy, x, gamma, beta, mean, var, eps, relu, training):
    (rows, k), dx, inverse, count = _wide(x), np.empty(x.shape, x.dtype), 1 / np.sqrt(var + eps), max(1, x.size // len(gamma))
    channel, dy = [np.tile(v, k) for v in (mean, inverse * gamma, beta)], _wide(dy)[0]
    dbeta, dgamma = _sums(dy, rows, *channel, relu, _blocks(rows)).sum(0).reshape(2, k, -1).sum(1)
    dgamma *= inverse
    shift, slope = (v.astype(x.dtype) for v in (dbeta / count, dgamma / count))
    _gradient(dy, rows, *channel, np.tile(shift, k), np.tile(inverse * slope, k), relu, training, dx.reshape(rows.shape))
    return dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype)


@njit(cache=True, parallel=True)
def _moments(x, blocks):
    """Of each block: mean, sum of the squared differences from it, and number of rows, in float64."""
    rows, C = x.shape
    means, squares, counts = np.empty((blocks, C)), np.empty((blocks, C)), np.empty((blocks, 1))
    for b in prange(blocks):
        first, last = rows * b // blocks, rows * (b + 1) // blocks
        n = x.dtype.type(last - first)
        centre, s, q = np.zeros(C, x.dtype), np.zeros(C, x.dtype), np.zeros(C, x.dtype)
        for r in range(first, last):
            for c in range(C):
                centre[c] += x[r, c]
        for c in range(C):
            centre[c] /= n
        for r in range(first, last):                                # the block lies in the cache now
            for c in range(C):
                d = x[r, c] - centre[c]
                s[c] += d                                           # not quite 0: the centre was rounded
                q[c] += d * d
        counts[b, 0] = n
        for c in range(C):
            means[b, c] = np.float64(centre[c]) + np.float64(s[c]) / n
            squares[b, c] = np.float64(q[c]) - np.float64(s[c]) * np.float64(s[c]) / n
    return means, squares, counts


@njit(cache=True, parallel=True)
def _scale(x, mean, scale, beta, relu, y):
    rows, C = x.shape
    zero = x.dtype.type(0)
    for r in prange(rows):
        for c in range(C):
            z = (x[r, c] - mean[c]) * scale[c] + beta[c]
            y[r, c] = zero if relu and z <= zero else z


@njit(cache=True, parallel=True)
def _sums(dy, x, mean, scale, beta, relu, blocks):
    """Of each block, in float64: sum dy and sum dy * (x - mean) of each channel."""
    rows, C = x.shape
    zero, sums = x.dtype.type(0), np.empty((blocks, 2, C))
    for b in prange(blocks):
        s = np.zeros((2, C), x.dtype)
        for r in range(rows * b // blocks, rows * (b + 1) // blocks):
            for c in range(C):
                d = x[r, c] - mean[c]
                g = zero if relu and not d * scale[c] + beta[c] > zero else dy[r, c]
                s[0, c] += g
                s[1, c] += g * d
        for c in range(C):
            sums[b, 0, c], sums[b, 1, c] = s[0, c], s[1, c]
    return sums


@njit(cache=True, parallel=True)
def _gradient(dy, x, mean, scale, beta, shift, slope, relu, training, dx):
    rows, C = x.shape
    zero = x.dtype.type(0)
    for r in prange(rows):
        for c in range(C):
            d = x[r, c] - mean[c]
            g = zero if relu and not d * scale[c] + beta[c] > zero else dy[r, c]
            dx[r, c] = scale[c] * (g - shift[c] - d * slope[c] if training else g)


# CUDA: kernels/batch_norm.cu

def _slabs(x):
    """Rows and columns of x as _wide reads it, rows of a block, number of such parts, and the grid: every part times 32 columns."""
    columns = x.shape[3] * _side(x)
    rows, slabs = x.size // columns, -(-columns // 32)
    per = max(64, -(-rows * slabs // GRID))
    parts = -(-rows // per)
    return rows, columns, per, parts, parts * slabs


def _moments_cuda(x):
    x = array_module(x).ascontiguousarray(x)
    (rows, columns, per, parts, grid), C = _slabs(x), x.shape[3]
    partial, mean, var = cuda.empty(x, (parts, 2, columns), np.float64), cuda.empty(x, C), cuda.empty(x, C)
    cuda.launch("batch_norm.cu", "batch_norm_moments", (x, partial, rows, columns, per), grid=grid, block=(32, 8))
    cuda.launch("batch_norm.cu", "batch_norm_statistics", (partial, mean, var, parts, rows, columns, per, C), grid=C, block=128)
    return mean, var


def _forward_cuda(x, gamma, beta, mean, var, eps, relu):
    x, mean, var, gamma, beta = map(array_module(x).ascontiguousarray, (x, mean, var, gamma, beta))
    y, C, pixels = cuda.empty(x, x.shape), x.shape[3], x.size // x.shape[3]
    step = -(-pixels // EACH)
    cuda.launch("batch_norm.cu", "batch_norm_forward", (x, mean, var, gamma, beta, y, pixels, C, step, eps, relu), threads=step * C)
    return y


def _backward_cuda(dy, x, gamma, beta, mean, var, eps, relu, training):
    given = [array_module(x).ascontiguousarray(a) for a in (dy, x, mean, var, gamma, beta)]
    (rows, columns, per, parts, grid), C, pixels = _slabs(x), x.shape[3], x.size // x.shape[3]
    partial, step = cuda.empty(x, (parts, 2, columns), np.float64), -(-pixels // EACH)
    dx, dgamma, dbeta = cuda.empty(x, x.shape), cuda.empty(x, C), cuda.empty(x, C)
    cuda.launch("batch_norm.cu", "batch_norm_sums", (*given, partial, rows, columns, per, C, eps, relu), grid=grid, block=(32, 8))
    cuda.launch("batch_norm.cu", "batch_norm_totals", (partial, given[3], dgamma, dbeta, parts, columns, C, eps), grid=C, block=128)
    cuda.launch("batch_norm.cu", "batch_norm_backward", (*given, dgamma, dbeta, dx, pixels, C, step, eps, relu, training), threads=step * C)
    return dx, dgamma, dbeta
