"""Convolution (cross-correlation with bias) over channels-last maps, with stride, zero padding and dilation."""
import numpy as np
from numba import njit, prange

from tinydet import checks
from tinydet.backend import pick

BLOCK = 1 << 20         # elements of the unrolled matrix that are in memory at a time (4 MB of float32)


def forward(x, w, b, stride=1, pad=0, dilation=1):
    """Slide the kernels w over x (OverFeat, sec. 3.1; FC layers are convolutions too).

    y[n,i,j,o] = b[o] + sum_{u,v,c} x[n, i*stride + u*dilation - top, j*stride + v*dilation - left, c] * w[u,v,c,o],
    with x = 0 outside the image. Dilation p turns a head into its skip-kernel form (sec. 3.3, notes 3.4).
    pad: one number for all sides, or (top, bottom, left, right): the first layer of Oquab et al. has (2, 1, 2, 1).
    x: (N, H, W, C), w: (kh, kw, C, Cout), b: (Cout,), one dtype, float32 or float64.
    Returns y (N, oh, ow, Cout), oh = (H + top + bottom - dilation*(kh - 1) - 1)//stride + 1, same dtype, and cache.
    N = 0 gives an empty y. Raises ValueError if shapes do not fit or the image holds no complete window, TypeError for
    other or mixed dtypes.
    """
    op = "conv.forward"
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.float_array(op, "w", w, f"(kh, kw, {x.shape[3]}, Cout)")
    checks.float_array(op, "b", b, f"({w.shape[3]},)")
    checks.same_dtype(op, x=x, w=w, b=b)
    checks.small(op, 1, stride=stride, dilation=dilation, **dict(zip(("kh", "kw", "Cin", "Cout"), w.shape)))
    pad = checks.padding(op, pad)
    if min(output_size(x, w, stride, pad, dilation)) < 1:
        raise ValueError(f"{op}: x {x.shape} with pad {pad} holds no window of w {w.shape} with dilation {dilation}")
    run = pick(x, numpy=_forward_numpy, numba=_forward_numba)
    return run(x, w, b, stride, pad, dilation), (x, w, stride, pad, dilation)


def backward(dy, cache, need_dx=True, need_dw=True):
    """Gradients of forward: dx, dw, db. need_dx=False skips dx (None), as for the layer that sees the image; need_dw=False
    skips dw and db, as for a frozen layer.

    dx[n,y,x,c] = sum over the windows that read the pixel of dy * w, dw[u,v,c,o] = sum dy * x, db = sum dy.
    dy: (N, oh, ow, Cout), the dtype of x. Raises ValueError or TypeError where dy does not fit the cache.
    """
    x, w, stride, pad, dilation = cache
    checks.same_shape("conv.backward", (len(x), *output_size(x, w, stride, pad, dilation), w.shape[3]), dy=dy)
    checks.same_dtype("conv.backward", x=x, dy=dy)
    run = pick(x, numpy=_backward_numpy, numba=_backward_numba)
    dx, dw = run(dy, x, w, stride, pad, dilation, need_dx, need_dw)
    return dx, dw, dy.sum((0, 1, 2)) if need_dw else None


def output_size(x, w, stride, pad, dilation):
    """Height and width of the output map; pad: (top, bottom, left, right)."""
    return tuple((x.shape[d + 1] + sum(pad[2 * d:2 * d + 2]) - dilation * (w.shape[d] - 1) - 1) // stride + 1 for d in (0, 1))


# NumPy: one product for each tap of the kernel

def _taps(x, w, stride, pad, dilation):
    """For every kernel tap (u, v): the slice of the padded image that it multiplies."""
    oh, ow = output_size(x, w, stride, pad, dilation)
    for u in range(w.shape[0]):
        for v in range(w.shape[1]):
            rows = slice(u * dilation, u * dilation + stride * (oh - 1) + 1, stride)
            cols = slice(v * dilation, v * dilation + stride * (ow - 1) + 1, stride)
            yield u, v, (slice(None), rows, cols)


def _forward_numpy(x, w, b, stride, pad, dilation):
    padded = np.pad(x, ((0, 0), pad[:2], pad[2:], (0, 0)))
    y = np.zeros((len(x), *output_size(x, w, stride, pad, dilation), w.shape[3]), x.dtype) + b
    for u, v, at in _taps(x, w, stride, pad, dilation):
        y += padded[at] @ w[u, v]
    return y


def _backward_numpy(dy, x, w, stride, pad, dilation, need_dx, need_dw):
    padded = np.pad(x, ((0, 0), pad[:2], pad[2:], (0, 0)))
    dpadded, dw = np.zeros_like(padded), np.empty_like(w)
    for u, v, at in _taps(x, w, stride, pad, dilation):
        if need_dw:
            dw[u, v] = np.tensordot(padded[at], dy, ((0, 1, 2), (0, 1, 2)))
        if need_dx:
            dpadded[at] += dy @ w[u, v].T
    top, left = pad[0], pad[2]
    return dpadded[:, top:top + x.shape[1], left:left + x.shape[2]] if need_dx else None, dw if need_dw else None


# Numba: unroll a block of windows into a matrix, one BLAS product for the block. Figures: examples/bench_ops.py

def _forward_numba(x, w, b, stride, pad, dilation):
    oh, ow = output_size(x, w, stride, pad, dilation)
    y = np.empty((len(x), oh, ow, w.shape[3]), x.dtype)
    matrix, out = np.ascontiguousarray(w).reshape(-1, w.shape[3]), y.reshape(-1, w.shape[3])
    for rows, cols in _blocks(x, w, stride, pad, dilation):
        np.matmul(cols, matrix, out=out[rows])
    y += b
    return y


def _backward_numba(dy, x, w, stride, pad, dilation, need_dx, need_dw):
    dy = np.ascontiguousarray(dy)
    flat, matrix = dy.reshape(-1, w.shape[3]), np.ascontiguousarray(w).reshape(-1, w.shape[3])
    dw = np.zeros_like(matrix) if need_dw else None
    if need_dw:
        for rows, cols in _blocks(x, w, stride, pad, dilation):
            dw += cols.T @ flat[rows]
        dw = dw.reshape(w.shape)
    return _input_gradient(dy, flat, matrix, x, w, stride, pad, dilation) if need_dx else None, dw


def _input_gradient(dy, flat, matrix, x, w, stride, pad, dilation):
    N, C, (kh, kw) = len(x), x.shape[3], w.shape[:2]
    if kh == kw == stride == 1 and not any(pad):
        return (flat @ matrix.T).reshape(x.shape)
    dx = np.empty(x.shape, x.dtype)
    pixels = dy.shape[1] * dy.shape[2]
    some = max(1, BLOCK // max(1, pixels * len(matrix)))                 # images whose unrolled gradient fits a block
    for n in range(0, N, some):
        dcols = flat[n * pixels:(n + some) * pixels] @ matrix.T
        _fold(dcols.reshape(-1, *dy.shape[1:3], kh, kw, C), dx[n:n + some], stride, pad[0], pad[2], dilation)
    return dx


def _blocks(x, w, stride, pad, dilation):
    """Yield (rows, cols): cols holds the windows of those output rows, one a line, kh*kw*C long."""
    (kh, kw, C, _), (oh, ow) = w.shape, output_size(x, w, stride, pad, dilation)
    if kh == kw == stride == 1 and not any(pad):
        yield slice(None), np.ascontiguousarray(x).reshape(-1, C)        # a 1x1 convolution needs no unrolling
        return
    x = np.ascontiguousarray(x)
    lines = len(x) * oh                                                  # output lines (n, i) in all, and per block
    some = max(1, BLOCK // (ow * kh * kw * C))
    for start in range(0, lines, some):
        count = min(some, lines - start)
        cols = np.empty((count, ow, kh, kw, C), x.dtype)
        _unfold(x, cols, start, oh, stride, pad[0], pad[2], dilation)
        yield slice(start * ow, (start + count) * ow), cols.reshape(count * ow, -1)


@njit(cache=True, parallel=True)
def _unfold(x, cols, start, oh, stride, top, left, dilation):
    H, W = x.shape[1:3]
    count, ow, kh, kw, C = cols.shape
    for line in prange(count):
        n, i = divmod(start + np.int64(line), oh)         # prange counts unsigned: mixed with int64 it turns to float
        for j in range(ow):
            for u in range(kh):
                row = i * stride + u * dilation - top
                for v in range(kw):
                    col = j * stride + v * dilation - left
                    if 0 <= row < H and 0 <= col < W:
                        for c in range(C):
                            cols[line, j, u, v, c] = x[n, row, col, c]
                    else:
                        for c in range(C):
                            cols[line, j, u, v, c] = 0


@njit(cache=True, parallel=True)
def _fold(dcols, dx, stride, top, left, dilation):
    """The adjoint of _unfold as a gather: each input pixel adds up the windows that read it."""
    N, H, W, C = dx.shape
    oh, ow, kh, kw = dcols.shape[1:5]
    for line in prange(N * H):
        n, row = divmod(np.int64(line), H)
        for col in range(W):
            for c in range(C):
                dx[n, row, col, c] = 0
            for u in range(kh):
                y = row + top - u * dilation                # the window's first row in the padded image
                if y < 0 or y % stride or y // stride >= oh:
                    continue
                for v in range(kw):
                    x = col + left - v * dilation
                    if x < 0 or x % stride or x // stride >= ow:
                        continue
                    for c in range(C):
                        dx[n, row, col, c] += dcols[n, y // stride, x // stride, u, v, c]
