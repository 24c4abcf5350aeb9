"""Max pooling."""
import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick


def forward(x, size, stride=None, pad=0, ceil=False):
    """Largest value of each size x size window, windows `stride` apart (default: size, so that they do not overlap).

    y[n,i,j,c] = max_{u,v < size} x[n, i*stride + u - top, j*stride + v - left, c] over the pixels that lie in the image.
    pad: one number for all sides or (top, bottom, left, right), each below size; padding never wins. Windows that the padded
    border cuts are dropped (floor); ceil=True keeps them, where they begin in the image or in its top or left padding (Caffe's
    rule: the nets of Fast R-CNN need it; Oquab et al. and OverFeat need floor).
    x: (N, H, W, C) float32 or float64. Returns y (N, oh, ow, C) and cache; oh = (H + top + bottom - size)//stride + 1, with
    ceil the quotient rounded up. Ties go to the first pixel in row order; the first NaN in a window wins it, y is NaN there.
    N = 0 gives an empty y. Raises ValueError if x holds no window, or for a size above 65536 on a GPU; TypeError for other dtypes.
    """
    return pool("max_pool.forward", x, size, size if stride is None else stride, pad, ceil)


def pool(op, x, size, stride, pad=0, ceil=False, on_gpu=None):
    """forward under another op's name in its errors, with another CUDA version: offset pooling is max pooling of stride 1."""
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.small(op, 1, size=size, stride=stride)
    pad = checks.padding(op, pad)
    if max(pad) >= size:
        raise ValueError(f"{op}: pad must be below the window's size {size}, got {pad}")
    oh, ow = (output_size(x.shape[d + 1], size, stride, *pad[2 * d:2 * d + 2], ceil) for d in (0, 1))
    if min(oh, ow, *x.shape[1:3]) < 1:
        raise ValueError(f"{op}: x {x.shape} holds no {size}x{size} window")
    run = pick(x, numpy=_forward_numpy, numba=_forward_numba, cuda=on_gpu or _forward_cuda)
    y, argmax = run(x, (len(x), oh, ow, x.shape[3]), size, stride, pad[0], pad[2])      # argmax: u * size + v, uint8 up to size 16
    return y, (x.shape, size, stride, argmax, pad[0], pad[2], x.dtype)


def output_size(side, size, stride, before, after, ceil):
    """Number of windows along one axis of `side` pixels (formula: forward)."""
    room = side + before + after - size
    if not ceil:
        return room // stride + 1
    windows = -(-room // stride) + 1
    return windows - ((windows - 1) * stride >= side + before)


def backward(dy, cache):
    """dx: each dy[n,i,j,c] goes to the pixel that won its window; a pixel adds up all the windows that it won, 0 if none.

    dy: (N, oh, ow, C), the dtype of x. Returns dx (N, H, W, C). Raises ValueError or TypeError where dy does not fit the cache.
    """
    checks.gradient("max_pool.backward", cache[3].shape, cache[-1], dy)
    return unpool(dy, cache)


def unpool(dy, cache, on_gpu=None):
    """backward without its checks, with another CUDA version: for ops that call pool."""
    *cache, _ = cache
    run = pick(dy, numpy=_backward_numpy, numba=_backward_numba, cuda=on_gpu or _backward_cuda)
    return run(dy, *cache)


def _forward_numpy(x, shape, size, stride, top, left):
    _, oh, ow, _ = shape
    reach = min(size, x.shape[1] + top), min(size, x.shape[2] + left)   # beyond, every window lies outside the image
    H, W = (oh - 1) * stride + reach[0], (ow - 1) * stride + reach[1]   # of the padded image, as far as windows reach
    padded, inside = np.zeros((len(x), H, W, x.shape[3]), x.dtype), np.zeros((1, H, W, 1), bool)
    real = slice(None), slice(top, min(H, top + x.shape[1])), slice(left, min(W, left + x.shape[2]))
    padded[real], inside[real] = x[:, :H - top, :W - left], True
    y, argmax = np.zeros(shape, x.dtype), np.full(shape, -1)
    for u in range(reach[0]):
        for v in range(reach[1]):
            at = slice(None), slice(u, u + stride * (oh - 1) + 1, stride), slice(v, v + stride * (ow - 1) + 1, stride)
            value = padded[at]
            wins = inside[at] & ((argmax < 0) | (value > y) | (np.isnan(value) & ~np.isnan(y)))
            y, argmax = np.where(wins, value, y), np.where(wins, u * size + v, argmax)
    return y, argmax.astype(np.min_scalar_type(size * size - 1))


def _backward_numpy(dy, shape, size, stride, argmax, top, left):
    n, i, j, c = np.indices(dy.shape)
    u, v = np.divmod(argmax.astype(int), size)
    dx = np.zeros(shape, dy.dtype)
    np.add.at(dx, (n, i * stride + u - top, j * stride + v - left, c), dy)      # add, never assign: windows may overlap
    return dx


# Numba: a row of windows at a time, and for each place in the window a loop over channels, which becomes vector code. With stride 1
# neighbouring windows read neighbouring pixels: one loop over all columns and channels

def _forward_numba(x, shape, size, stride, top, left):
    y, argmax = np.empty(shape, x.dtype), np.empty(shape, np.min_scalar_type(size * size - 1))
    _pool(_lines(x), _lines(y), _lines(argmax), x.shape, shape, size, stride, top, left)
    return y, argmax


def _backward_numba(dy, shape, size, stride, argmax, top, left):
    dx = np.empty(shape, dy.dtype)
    _unpool(_lines(dy), _lines(argmax), _lines(dx), dy.shape, shape, size, stride, top, left)
    return dx


def _lines(x):
    N, H, W, C = x.shape
    return np.ascontiguousarray(x).reshape(N * H, W * C)


@njit(cache=True)
def _columns(v, W, ow, stride, left):
    """The windows whose column v lies in the image: first, and past the last."""
    first = max(0, (left - v + stride - 1) // stride)
    return first, max(first, min(ow, (W - 1 + left - v) // stride + 1))


@njit(cache=True, parallel=True)
def _pool(x, y, argmax, shape, yshape, size, stride, top, left):
    (H, W, C), (N, oh, ow) = shape[1:], yshape[:3]
    for line in prange(N * oh):
        n, i = divmod(np.int64(line), oh)
        row = i * stride - top                                          # the windows' first row
        above, below = max(0, -row), min(size, H - row)                 # of those in the image
        best, place = y[line], argmax[line]
        for j in range(ow):
            for c in range(C):
                best[j * C + c] = -np.inf
                place[j * C + c] = above * size + max(0, left - j * stride)             # where no pixel is above -inf
        for u in range(above, below):
            for v in range(min(size, W + left)):
                here, (first, last) = argmax.dtype.type(u * size + v), _columns(v, W, ow, stride, left)
                step, count = (last - first, (last - first) * C) if stride == 1 else (1, C)
                for j in range(first, last, max(1, step)):
                    _win(x[n * H + row + u], (j * stride + v - left) * C, best, place, j * C, count, here)


@njit(cache=True)
def _win(x, start, best, place, at, count, here):
    """Let count values of x from `start` on challenge those of best from `at` on. A NaN wins, and stays."""
    start, at = np.uintp(start), np.uintp(at)                           # never negative, which Numba would look for at every element
    for k in range(np.uintp(count)):
        value, old = x[start + k], best[at + k]
        wins = (old == old) & (not value <= old)
        best[at + k] = value if wins else old
        place[at + k] = here if wins else place[at + k]


@njit(cache=True, parallel=True)
def _unpool(dy, argmax, dx, yshape, shape, size, stride, top, left):
    """Gather: every row of pixels looks at the windows that cover it, so no two threads write to one place."""
    (N, H, W, C), (oh, ow) = shape, yshape[1:3]
    for line in prange(N * H):
        n, row = divmod(np.int64(line), H)
        d, y = dx[line], row + top                                      # y: in the padded image
        for k in range(W * C):
            d[k] = 0
        for i in range(max(0, (y - size + stride) // stride), min(oh - 1, y // stride) + 1):
            g, place = dy[n * oh + i], argmax[n * oh + i]
            for v in range(min(size, W + left) - 1, -1, -1):            # the first window first, as NumPy adds
                here, (first, last) = argmax.dtype.type((y - i * stride) * size + v), _columns(v, W, ow, stride, left)
                step, count = (last - first, (last - first) * C) if stride == 1 else (1, C)
                for j in range(first, last, max(1, step)):
                    at = (j * stride + v - left) * C
                    _give(g[j * C:j * C + count], place[j * C:j * C + count], d[at:at + count], here)


@njit(cache=True)
def _give(dy, place, dx, here):
    """Add to dx what was won here."""
    zero = dy.dtype.type(0)
    for k in range(len(dy)):
        dx[k] += dy[k] if place[k] == here else zero


# CUDA: kernels/max_pool.cu

def _forward_cuda(x, shape, size, stride, top, left):
    if size > 65536:
        raise ValueError(f"max_pool.forward: on a GPU size must be at most 65536, as places in a window are counted in 32 bits, got {size}")
    x, y = array_module(x).ascontiguousarray(x), cuda.empty(x, shape)
    argmax = cuda.empty(x, shape, np.min_scalar_type(size * size - 1))
    sizes = (*x.shape, *shape[1:3], size, stride, top, left)
    cuda.launch("max_pool.cu", "max_pool_forward", (x, y, argmax, *sizes), threads=y.size)
    return y, argmax


def _backward_cuda(dy, shape, size, stride, argmax, top, left):
    dy, dx = array_module(dy).ascontiguousarray(dy), cuda.empty(dy, shape)
    sizes = (*shape[1:], *dy.shape[1:3], size, stride, top, left)
    cuda.launch("max_pool.cu", "max_pool_backward", (dy, argmax, dx, *sizes), **strips(shape, 4))
    return dx


def strips(shape, each):
    """Grid and block of kernels whose threads stand along the rows, W * C, and do `each` rows of an image."""
    N, H, W, C = shape
    block = min(256, -(-W * C // 32) * 32)
    return {"grid": N * -(-H // each) * -(-W * C // max(1, block)), "block": block}
