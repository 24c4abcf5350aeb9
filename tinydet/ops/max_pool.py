"""Max pooling."""
import numpy as np
from numba import njit, prange

from tinydet import checks
from tinydet.backend import pick


def forward(x, size, stride=None):
    """Largest value of each size x size window, windows `stride` apart (default: size, so that they do not overlap).

    y[n,i,j,c] = max_{u,v < size} x[n, i*stride + u, j*stride + v, c]; windows that the border cuts are dropped (floor).
    x: (N, H, W, C) float32 or float64. Returns y (N, (H - size)//stride + 1, (W - size)//stride + 1, C) and cache.
    Ties go to the first pixel in row order; NaN in a window gives NaN. N = 0 gives an empty y.
    Raises ValueError if x holds no complete window, TypeError for other dtypes.
    """
    return pool("max_pool.forward", x, size, size if stride is None else stride)


def pool(op, x, size, stride):
    """forward under another op's name in its errors: offset pooling is max pooling of stride 1."""
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.whole(op, 1, size=size, stride=stride)
    if min(x.shape[1:3]) < size:
        raise ValueError(f"{op}: x {x.shape} holds no {size}x{size} window")
    run = pick(x, numpy=_forward_numpy, numba=_forward_numba)
    y, argmax = run(x, size, stride)                            # argmax: u * size + v, uint8 up to size 16
    return y, (x.shape, size, stride, argmax)


def backward(dy, cache):
    """dx: each dy[n,i,j,c] goes to the pixel that won its window; a pixel adds up all the windows that it won."""
    checks.same_shape("max_pool.backward", cache[3].shape, dy=dy)
    run = pick(dy, numpy=_backward_numpy, numba=_backward_numba)
    return run(dy, *cache)


def _forward_numpy(x, size, stride):
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    windows = windows.reshape(*windows.shape[:4], size * size)
    argmax = windows.argmax(-1).astype(np.min_scalar_type(size * size - 1))
    return windows.max(-1), argmax


def _backward_numpy(dy, shape, size, stride, argmax):
    n, i, j, c = np.indices(dy.shape)
    u, v = np.divmod(argmax.astype(int), size)
    dx = np.zeros(shape, dy.dtype)
    np.add.at(dx, (n, i * stride + u, j * stride + v, c), dy)   # add, never assign: windows may overlap
    return dx


def _forward_numba(x, size, stride):
    N, H, W, C = x.shape
    y = np.empty((N, (H - size) // stride + 1, (W - size) // stride + 1, C), x.dtype)
    argmax = np.empty(y.shape, np.min_scalar_type(size * size - 1))
    _pool(np.ascontiguousarray(x), y, argmax, size, stride)
    return y, argmax


def _backward_numba(dy, shape, size, stride, argmax):
    dx = np.empty(shape, dy.dtype)
    _unpool(np.ascontiguousarray(dy), np.ascontiguousarray(argmax), dx, size, stride)
    return dx


@njit(cache=True, parallel=True)
def _pool(x, y, argmax, size, stride):
    N, oh, ow, C = y.shape
    for line in prange(N * oh):
        n, i = divmod(np.int64(line), oh)
        for j in range(ow):
            for c in range(C):
                best, at = x[n, i * stride, j * stride, c], 0
                for u in range(size):
                    for v in range(size):
                        value = x[n, i * stride + u, j * stride + v, c]
                        if value > best or (value != value and best == best):       # a NaN wins and stays
                            best, at = value, u * size + v
                y[n, i, j, c] = best
                argmax[n, i, j, c] = at


@njit(cache=True, parallel=True)
def _unpool(dy, argmax, dx, size, stride):
    """Gather: every pixel looks at the windows that cover it, so no two threads write to one place."""
    N, H, W, C = dx.shape
    oh, ow = dy.shape[1:3]
    for line in prange(N * H):
        n, row = divmod(np.int64(line), H)
        for col in range(W):
            for c in range(C):
                dx[n, row, col, c] = 0
            for i in range(max(0, (row - size + stride) // stride), min(oh - 1, row // stride) + 1):
                for j in range(max(0, (col - size + stride) // stride), min(ow - 1, col // stride) + 1):
                    at = (row - i * stride) * size + col - j * stride
                    for c in range(C):
                        if argmax[n, i, j, c] == at:
                            dx[n, row, col, c] += dy[n, i, j, c]
