"""Convolution (cross-correlation with bias) over channels-last maps, with stride, zero padding and dilation."""
import contextlib
import math

import numpy as np
from numba import njit, prange

from tinydet import checks
from tinydet.backend import pick
from tinydet.ops import conv_direct, conv_winograd

ROWS = 512              # of dy that are added up at a time for db
UNROLLED = 1 << 25      # numbers in an unrolled image, at most (128 MB of float32)


def forward(x, w, b, stride=1, pad=0, dilation=1):
    """Slide the kernels w over x (OverFeat, sec. 3.1; FC layers are convolutions too).

    y[n,i,j,o] = b[o] + sum_{u,v,c} x[n, i*stride + u*dilation - top, j*stride + v*dilation - left, c] * w[u,v,c,o],
    with x = 0 outside the image. Dilation p turns a head into its skip-kernel form (sec. 3.3, notes 3.4).
    pad: one number for all sides, or (top, bottom, left, right): the first layer of Oquab et al. has (2, 1, 2, 1).
    x: (N, H, W, C), w: (kh, kw, C, Cout), b: (Cout,), one dtype, float32 or float64.
    Returns y (N, oh, ow, Cout), oh = (H + top + bottom - dilation*(kh - 1) - 1)//stride + 1, same dtype, and cache.
    N = 0 gives an empty y. NaN and infinity reach the windows that read them; on Winograd's way (see method) others of their tile, too.
    Raises ValueError if shapes do not fit or the image holds no complete window, TypeError for other or mixed dtypes.
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
    run, column_sums = pick(x, numpy=(_backward_numpy, _column_sums_numpy), numba=(_backward_numba, _column_sums_numba))
    dx, dw = run(dy, x, w, stride, pad, dilation, need_dx, need_dw)
    return dx, dw, column_sums(dy) if need_dw else None


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


def _column_sums_numpy(dy):
    return dy.sum((0, 1, 2))


# Numba: fewer products, products in registers, or BLAS

def method(x, w, stride, pad, dilation):
    """Which of three ways the Numba backend goes: "blas", "winograd" or "direct". Figures: examples/bench_cpu.py

    kernel                  stride, dilation    way         y and dx computed as                float32 error     time / that of direct
                                                                                                / largest value   (--only ways)
    1x1, no padding         1, 1                blas        one matrix product                  1e-6              1.0
    3x3, 4x4, 5x5, 7x7      1, 1                winograd    conv_winograd.py: 1/3 to 1/6 of     2e-5, dw 3e-5     0.27 (5x5) to 0.80
                                                            the products                                          (16 channels)
    fewer windows than output channels          blas        one product, image unrolled         1e-6              0.26 to 0.50
    all others                                  direct      conv_direct.py                      2e-6              1

    Winograd's filters cost more than they save where few windows share them: a 3x3 kernel needs 64, a larger one as many as it has
    outputs. Otherwise, and inside exact(), one of the two last rows serves.
    """
    kh, kw = w.shape[:2]
    windows = len(x) * math.prod(output_size(x, w, stride, pad, dilation))
    if kh == kw == stride == 1 and not any(pad):
        return "blas"
    enough = windows >= (64 if kh == 3 else max(64, w.shape[3]))
    if kh == kw and kh in conv_winograd.TILES and stride == dilation == 1 and enough and not _exact:
        return "winograd"
    return "blas" if windows < w.shape[3] and windows * w[..., 0].size <= UNROLLED else "direct"


_exact = False


@contextlib.contextmanager
def exact():
    """Context manager: no Winograd inside; every product of the formula is made, with the rounding errors of a plain sum.

    For every thread of the process; backward chooses anew, so enclose it, too.
    """
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def _forward_numba(x, w, b, stride, pad, dilation):
    x, w, b = (np.ascontiguousarray(a) for a in (x, w, b))
    way = method(x, w, stride, pad, dilation)
    if way == "blas":
        windows = _windows(x, w, stride, pad, dilation)
        y = windows.reshape(-1, w[..., 0].size) @ w.reshape(-1, w.shape[3])
        y += b
        return y.reshape(*windows.shape[:3], w.shape[3])
    if way == "winograd":
        return conv_winograd.forward(x, w, b, pad)
    return conv_direct.forward(x, w, b, stride, pad, dilation, output_size(x, w, stride, pad, dilation))


def _backward_numba(dy, x, w, stride, pad, dilation, need_dx, need_dw):
    dy, x, w = (np.ascontiguousarray(a) for a in (dy, x, w))
    way = method(x, w, stride, pad, dilation)
    if way == "blas":
        windows, right, left = _windows(x, w, stride, pad, dilation), dy.reshape(-1, w.shape[3]), w.reshape(-1, w.shape[3])
        dw = (windows.reshape(-1, len(left)).T @ right).reshape(w.shape) if need_dw else None
        return _fold((right @ left.T).reshape(windows.shape), x, w, stride, pad, dilation) if need_dx else None, dw
    if way == "winograd":
        return conv_winograd.backward(dy, x, w, pad, need_dx, need_dw)
    return conv_direct.backward(dy, x, w, stride, pad, dilation, need_dx, need_dw)


def _windows(x, w, stride, pad, dilation):
    """(N, oh, ow, kh, kw, C): what each window sees, a view of the padded image."""
    x = np.pad(x, ((0, 0), pad[:2], pad[2:], (0, 0))) if any(pad) else x
    reach = [dilation * (k - 1) + 1 for k in w.shape[:2]]
    seen = np.lib.stride_tricks.sliding_window_view(x, reach, (1, 2))[:, ::stride, ::stride, :, ::dilation, ::dilation]
    return seen.transpose(0, 1, 2, 4, 5, 3)


def _fold(dwindows, x, w, stride, pad, dilation):
    """The adjoint of _windows."""
    if dwindows.size == x.size and not any(pad) and (w.shape[:2] == (1, 1) or dwindows.shape[1:3] == (1, 1)):
        return dwindows.reshape(x.shape)                                # every pixel is seen once: the windows are the image
    (top, bottom, left, right), (N, H, W, C) = pad, x.shape
    dpadded = np.zeros((N, H + top + bottom, W + left + right, C), x.dtype)
    for u, v, at in _taps(x, w, stride, pad, dilation):
        dpadded[at] += dwindows[:, :, :, u, v]
    return np.ascontiguousarray(dpadded[:, top:top + H, left:left + W])


def _column_sums_numba(dy):
    rows = np.ascontiguousarray(dy).reshape(-1, dy.shape[3])
    parts = np.empty((-(-len(rows) // ROWS), dy.shape[3]), dy.dtype)
    _column_sums(rows, parts)
    return parts.sum(0, np.float64).astype(dy.dtype)


@njit(cache=True, parallel=True)
def _column_sums(rows, parts):
    """Sums of ROWS rows each, in their dtype: short enough to lose no digits, however many parts there are."""
    for p in prange(len(parts)):
        parts[p] = 0
        for r in range(p * ROWS, min(len(rows), (p + 1) * ROWS)):
            for c in range(rows.shape[1]):
                parts[p, c] += rows[r, c]
