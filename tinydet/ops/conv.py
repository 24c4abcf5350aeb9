"""Convolution (cross-correlation with bias) over channels-last maps, with stride, zero padding and dilation."""
import contextlib
import functools
import math

import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick
from tinydet.ops import conv_direct, conv_im2col, conv_winograd
from tinydet.ops import relu as rectifier

ROWS = 512              # of dy that are added up at a time for db
UNROLLED = 1 << 25      # numbers in an unrolled image, at most (128 MB of float32)


def forward(x, w, b, stride=1, pad=0, dilation=1, relu=False):
    """Slide the kernels w over x (OverFeat, sec. 3.1; FC layers are convolutions too).

    y[n,i,j,o] = b[o] + sum_{u,v,c} x[n, i*stride + u*dilation - top, j*stride + v*dilation - left, c] * w[u,v,c,o],
    with x = 0 outside the image. Dilation p turns a head into its skip-kernel form (sec. 3.3).
    pad: one number for all sides, or (top, bottom, left, right): the first layer of Oquab et al. has (2, 1, 2, 1).
    relu=True: max(0, y) in place of y, what ops/relu.py makes of it (NaN stays NaN), without another pass over memory on a GPU.
    x: (N, H, W, C), w: (kh, kw, C, Cout), b: (Cout,), one dtype, float32 or float64.
    Returns y (N, oh, ow, Cout), oh = (H + top + bottom - dilation*(kh - 1) - 1)//stride + 1, same dtype, and cache.
    N = 0 gives an empty y. NaN and infinity reach the windows that read them; on Winograd's way (see method) others of their tile, too.
    CUDA makes every product of the formula in one launch without an unrolled image (kernels/conv.cu); inside unrolled() with one.
    Raises ValueError if shapes do not fit or the image holds no complete window, TypeError for other or mixed dtypes; on CUDA
    ValueError for a padded image of 2^30 rows or of 2^30 numbers in a row.
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
    run = pick(x, numpy=_forward_numpy, numba=_forward_numba, cuda=_forward_cuda)
    y = run(x, w, b, stride, pad, dilation, relu)
    return y, (x, w, stride, pad, dilation, y) if relu else (x, w, stride, pad, dilation)


def backward(dy, cache, need_dx=True, need_dw=True):
    """Gradients of forward: dx, dw, db. need_dx=False skips dx (None), as for the layer that sees the image; need_dw=False
    skips dw and db, as for a frozen layer.

    dx[n,y,x,c] = sum over the windows that read the pixel of dy * w, dw[u,v,c,o] = sum dy * x, db = sum dy; with relu=True
    dy counts as 0 where not y > 0. On CUDA the sums have a fixed order, which depends on the shapes and the GPU's size only.
    dy: (N, oh, ow, Cout), the dtype of x. Raises ValueError or TypeError where dy does not fit the cache.
    """
    x, w, stride, pad, dilation, *y = cache
    checks.same_shape("conv.backward", (len(x), *output_size(x, w, stride, pad, dilation), w.shape[3]), dy=dy)
    checks.same_dtype("conv.backward", x=x, dy=dy)
    run, column_sums = pick(x, numpy=(_backward_numpy, _column_sums_numpy), numba=(_backward_numba, _column_sums_numba),
                            cuda=(_backward_cuda, _column_sums_cuda))
    dy = rectifier.backward(dy, *y) if y else dy
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


def _forward_numpy(x, w, b, stride, pad, dilation, relu):
    padded = np.pad(x, ((0, 0), pad[:2], pad[2:], (0, 0)))
    y = np.zeros((len(x), *output_size(x, w, stride, pad, dilation), w.shape[3]), x.dtype) + b
    for u, v, at in _taps(x, w, stride, pad, dilation):
        y += padded[at] @ w[u, v]
    return np.maximum(y, 0) if relu else y


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
    outputs. Otherwise, and inside exact(), one of the two last rows serves. CUDA has ways of its own: forward, unrolled.
    """
    kh, kw = w.shape[:2]
    windows = len(x) * math.prod(output_size(x, w, stride, pad, dilation))
    if kh == kw == stride == 1 and not any(pad):
        return "blas"
    enough = windows >= (64 if kh == 3 else max(64, w.shape[3]))
    if kh == kw and kh in conv_winograd.TILES and stride == dilation == 1 and enough and not _exact:
        return "winograd"
    return "blas" if windows < w.shape[3] and windows * w[..., 0].size <= UNROLLED else "direct"


_exact = _unrolled = False


@contextlib.contextmanager
def exact():
    """Context manager: no Winograd inside; every product of the formula is made, with the rounding errors of a plain sum.

    For every thread of the process; backward chooses anew, so enclose it, too. On CUDA it has no effect: that is always so.
    """
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


@contextlib.contextmanager
def unrolled():
    """Context manager: CUDA unrolls the image inside and multiplies matrices by cuBLAS (conv_im2col.py), the simple way to compare with.

    Threads and backward as for exact(). On the CPU it has no effect.
    """
    global _unrolled
    before, _unrolled = _unrolled, True
    try:
        yield
    finally:
        _unrolled = before


def _forward_numba(x, w, b, stride, pad, dilation, relu):
    x, w, b = (np.ascontiguousarray(a) for a in (x, w, b))
    way = method(x, w, stride, pad, dilation)
    if way == "blas":
        windows = _windows(x, w, stride, pad, dilation)
        y = windows.reshape(-1, w[..., 0].size) @ w.reshape(-1, w.shape[3])
        y += b
        y = y.reshape(*windows.shape[:3], w.shape[3])
    elif way == "winograd":
        y = conv_winograd.forward(x, w, b, pad)
    else:
        y = conv_direct.forward(x, w, b, stride, pad, dilation, output_size(x, w, stride, pad, dilation))
    return np.maximum(y, 0, out=y) if relu else y


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


# CUDA: kernels/conv.cu, whose header says what its kernels compute. Of dx, the pixels whose row and column leave one remainder by the
# stride are a convolution of dy with the weights that reach them, turned round, as in conv_direct.py: a launch for each remainder that
# any weight reaches, min(stride^2, kh * kw) at most, and no product in vain

TILES = {(128, 128): (256, 2, 1.0), (128, 64): (128, 3, 0.95), (64, 64): (128, 4, 0.8), (32, 32): (64, 8, 0.5)}
# windows and channels of a block: its threads, the blocks that a multiprocessor runs at a time, and the speed they are taken to reach when all
# are at work. The speeds are a guess from the number of loads for a product, not measured
SM = 132                # multiprocessors where none can be counted: those of an H100
PARTS = 256             # of a sum over windows, at most
SAVED = 40              # windows whose products take about as long as to write and read one part of dw: at 10 operations for a byte


def _forward_cuda(x, w, b, stride, pad, dilation, relu):
    xp, size = array_module(x), output_size(x, w, stride, pad, dilation)
    x, w, b = (xp.ascontiguousarray(a) for a in (x, w, b))
    if _unrolled:
        y = conv_im2col.forward(x, w, b, stride, pad, dilation, size, UNROLLED)
        return xp.maximum(y, 0, out=y) if relu else y
    (_, H, W, _), (kh, kw, C, Cout) = x.shape, w.shape
    if (far := max(H + pad[0] + pad[1], (W + pad[2] + pad[3]) * max(C, Cout))) >= 2**30:
        raise ValueError(f"conv.forward: the padded image must have fewer than 2^30 rows, and numbers in a row, on CUDA, got {far}")
    y = cuda.empty(x, (len(x), *size, Cout))
    taps, places = (kh, kw, dilation, 0, kw * C, C), (0, size[0] * size[1] * Cout, size[1] * Cout, Cout)
    _correlate(x, w, b, y, size, (stride, -pad[0], -pad[2]), taps, places, relu)
    return y


def _backward_cuda(dy, x, w, stride, pad, dilation, need_dx, need_dw):
    dy, x, w = (array_module(x).ascontiguousarray(a) for a in (dy, x, w))
    if _unrolled:
        return conv_im2col.backward(dy, x, w, stride, pad, dilation, need_dx, need_dw, UNROLLED)
    return (_input_gradient(dy, w, x.shape, stride, pad, dilation) if need_dx else None,
            _weight_gradient(x, dy, w.shape, stride, pad, dilation) if need_dw else None)


def _correlate(x, w, b, y, size, corner, taps, places, relu):
    """Launch conv_forward for size (oh, ow). corner: stride, row, col; taps: kh, kw, apart, first, wu, wv; places: place, yn, yi, yj."""
    (N, H, W, C), Cout, (kh, kw, apart, *at) = x.shape, len(b), taps
    M = N * math.prod(size)
    if M:
        kw, run = (1, kw * C) if apart == 1 and at[2] == C else (kw, C)  # a row of the kernel is one tap
        tile, _ = _tile(M, Cout, 0, x, w, y)
        args = x, w, b, y, M, H, W, C, Cout, *size, *corner, kh, kw, run, apart, *at, *places, relu
        _launch("conv_forward", args, tile, M, Cout)


def _input_gradient(dy, w, shape, stride, pad, dilation):
    xp, (_, H, W, C), (kh, kw, _, Cout) = array_module(dy), shape, w.shape
    every, apart = stride // math.gcd(stride, dilation), dilation // math.gcd(stride, dilation)
    maps = [(r, c) for r in _remainders(H, kh, stride, pad[0], dilation) for c in _remainders(W, kw, stride, pad[2], dilation)]
    dx = (cuda.empty if len(maps) == min(stride, H) * min(stride, W) else _zeros)(dy, shape)
    turned, zeros = xp.ascontiguousarray(w[::-1, ::-1].transpose(0, 1, 3, 2)), _zeros(w, C)
    for (row, height, top, u, rows), (col, width, left, v, columns) in maps:
        taps = rows, columns, apart, (u * kw + v) * Cout, (rows > 1) * every * kw * Cout, (columns > 1) * every * Cout
        places = (row * W + col) * C, H * W * C, stride * W * C, stride * C
        _correlate(dy, turned, zeros, dx, (height, width), (1, top, left), taps, places, False)
    return dx


def _remainders(side, taps, stride, before, dilation):
    """For each remainder of x's rows (or columns) by the stride that a weight reaches: the first such row, the number of such rows, the row of
    dy (perhaps outside) under its first weight, that weight in the kernel turned round, and the number of weights that reach it."""
    every, apart = stride // math.gcd(stride, dilation), dilation // math.gcd(stride, dilation)
    for row in range(min(stride, side)):
        last, up = conv_direct._reach(row + before, taps, stride, dilation)
        if last >= 0:
            count = -(-(taps - last) // every)
            yield row, -(-(side - row) // stride), up - apart * (count - 1), taps - 1 - last - every * (count - 1), count


def _weight_gradient(x, dy, shape, stride, pad, dilation):
    (N, H, W, C), (kh, kw, _, Cout), (_, oh, ow, _) = x.shape, shape, dy.shape
    K, windows = kh * kw * C, N * oh * ow
    kw, run = (1, kw * C) if dilation == 1 else (kw, C)                 # a row of the kernel is one tap
    tile, parts = _tile(K, Cout, windows, x, dy)
    each, sums = -(-windows // parts), cuda.empty(x, (parts, *shape))
    args = x, dy, sums, K, H, W, C, Cout, N, oh, ow, stride, -pad[0], -pad[2], kw, run, dilation, each
    _launch("conv_dw", args, tile, K, Cout, parts)
    return _sum(sums)


def _column_sums_cuda(dy):
    dy, Cout = array_module(dy).ascontiguousarray(dy), dy.shape[3]
    M = dy.size // Cout
    parts = max(1, min(PARTS, M // ROWS))
    sums = cuda.empty(dy, (parts, Cout))
    cuda.launch("conv.cu", "conv_db", (dy, sums, M, Cout, -(-M // parts)), grid=(-(-Cout // 32), parts), BM=32, BN=32, VEC=1)
    return _sum(sums)


def _sum(parts):
    """The sum over the first axis."""
    if len(parts) == 1:
        return parts[0]
    out = cuda.empty(parts, parts.shape[1:])
    cuda.launch("conv.cu", "conv_sum", (parts, out, len(parts), out.size), threads=out.size, BM=32, BN=32, VEC=1)
    return out


def _zeros(like, shape):
    return array_module(like).zeros(shape, like.dtype)


def _launch(kernel, args, tile, rows, columns, parts=1):
    (BM, BN, VEC), blocks = tile, -(-rows // tile[0]) * -(-columns // tile[1])
    cuda.launch("conv.cu", kernel, args, grid=(blocks, parts), block=TILES[BM, BN][0], BM=BM, BN=BN, VEC=VEC)


def _tile(rows, columns, windows, *arrays):
    """(BM, BN, VEC) and the number of parts for a product: best_tile for these arrays, on the GPU where they lie."""
    x, xp = arrays[0], array_module(arrays[0])
    vector = x.dtype == np.float32 and all(a.shape[-1] % 4 == 0 and (a.ctypes.data if xp is np else a.data.ptr) % 16 == 0 for a in arrays)
    sizes = [t for t in TILES if vector or max(t) <= 64]
    (BM, BN), parts = best_tile(rows, columns, windows, tuple(sizes), SM if xp is np else _multiprocessors(x.device.id))
    return (BM, BN, 4 if vector else 1), parts


@functools.cache
def _multiprocessors(device):
    import cupy
    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]


@functools.lru_cache(maxsize=1024)
def best_tile(rows, columns, windows, sizes, multiprocessors):
    """The tile of `sizes` and the number of parts of the sum (1 where windows is 0) that waste least of a GPU, as a product of
    the speed of the tile (TILES), outputs / those computed, blocks / those that fit in as many rounds, and products / those plus the
    writing and reading of parts."""
    best = 0, None, 1
    for tile in sizes:
        blocks, slots = -(-rows // tile[0]) * -(-columns // tile[1]), multiprocessors * TILES[tile][1]
        used = TILES[tile][2] * rows * columns / (blocks * tile[0] * tile[1])
        for parts in range(1, max(1, min(PARTS, windows, UNROLLED // (rows * columns))) + 1):
            busy = blocks * parts / (-(-blocks * parts // slots) * slots)
            kept = windows / (windows + SAVED * parts) if parts > 1 else 1
            best = max(best, (used * busy * kept, tile, parts), key=lambda b: b[0])
    return best[1:]
