"""Convolution as products that need no unrolled image: the fast path of ops/conv.py for every stride, kernel and dilation.

In a channels-last image the values under one row of a kernel, kw * C numbers, lie side by side. So the outputs of a row are one matrix
product for each kernel row: its left matrix is the image itself, read with a stride of stride * C between output pixels. Each task
copies a strip of the image with its zero border to its own buffer, where it stays in the cache while simd.multiply works on it.

    forward  y[i, j] = sum_{u, v} x[i*stride + u*dilation - top, j*stride + v*dilation - left] w[u, v]: `correlate`
    dx       the rows and columns of x that leave the same remainder (by stride) form a map of their own: that map is a correlation of dy,
             stride 1, with the kernel rows and columns that reach it, turned round. Images of few channels: all these maps in one
             correlation that gives stride * stride * C channels (space-to-depth).
    dw       the same left matrix, transposed, times dy, over the pixels of a strip
"""
import math

import numpy as np
from numba import config, get_thread_id, njit, prange

from tinydet import simd, workspace

STRIP = 1 << 18         # bytes of a strip, about: with its weights it fits the second-level cache
FIRST = 1 << 15         # bytes of weights that stay in the first-level cache
PARTS = 16              # tasks of dw: their number does not depend on the threads, so neither does the order of the sums


def forward(x, w, b, stride, pad, dilation, size):
    """y of conv.forward, size (oh, ow); x and w contiguous."""
    y = np.empty((len(x), *size, w.shape[3]), x.dtype)
    correlate(x, w, b, y, stride, pad[0], pad[2], dilation)
    return y


def backward(dy, x, w, stride, pad, dilation, need_dx, need_dw):
    """dx and dw of conv.backward, each None where it is not needed; all contiguous."""
    return (input_gradient(dy, w, x.shape, stride, pad, dilation) if need_dx else None,
            weight_gradient(x, dy, w.shape, stride, pad, dilation) if need_dw else None)


def input_gradient(dy, w, shape, stride, pad, dilation):
    """dx of conv.backward for an x of that shape."""
    N, H, W, C = shape
    top, left = pad[0], pad[2]
    if dilation == 1 and stride > 1 and C < simd.lanes(dy.dtype):
        return _space_to_depth(dy, w, shape, stride, top, left)
    dx, zero = np.empty(shape, dy.dtype), np.zeros(C, dy.dtype)
    every = stride // math.gcd(stride, dilation)                        # of the kernel's rows that reach one pixel
    apart = dilation // math.gcd(stride, dilation)                      # in dy between two of them
    for row in range(min(stride, H)):
        for col in range(min(stride, W)):
            (u, up), (v, across) = (_reach(k + before, side, stride, dilation) for k, before, side in ((row, top, w.shape[0]), (col, left, w.shape[1])))
            part, taps = dx[:, row::stride, col::stride], w[u::every, v::every][::-1, ::-1] if min(u, v) >= 0 else w[:0]
            if taps.size == 0:
                part[...] = 0
            else:
                correlate(dy, taps.transpose(0, 1, 3, 2), zero, part, 1, apart * (len(taps) - 1) - up, apart * (taps.shape[1] - 1) - across, apart)
    return dx


def _reach(pixel, taps, stride, dilation):
    """The first kernel row that can see a pixel (counted in the padded image), and the output row that looks through it; -1, 0: none."""
    for u in range(min(taps, stride)):
        if (pixel - u * dilation) % stride == 0:
            return u, (pixel - u * dilation) // stride
    return -1, 0


def _space_to_depth(dy, w, shape, stride, top, left):
    (N, H, W, C), (kh, kw, _, Cout) = shape, w.shape
    h, v = -(-kh // stride), -(-kw // stride)
    wide = np.zeros((h * stride, v * stride, C, Cout), w.dtype)
    wide[:kh, :kw] = w
    wide = wide.reshape(h, stride, v, stride, C, Cout)[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4).reshape(h, v, Cout, stride * stride * C)
    rows, cols = -(-(H + top) // stride), -(-(W + left) // stride)
    deep = np.empty((N, rows, cols, wide.shape[3]), dy.dtype)
    correlate(dy, wide, np.zeros(wide.shape[3], dy.dtype), deep, 1, h - 1, v - 1, 1)
    flat = deep.reshape(N, rows, cols, stride, stride, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, rows * stride, cols * stride, C)
    return np.ascontiguousarray(flat[:, top:top + H, left:left + W])


def correlate(x, w, b, y, stride, top, left, dilation):
    """y[n, i, j] = b + sum_{u, v} x[n, i*stride + u*dilation - top, j*stride + v*dilation - left] w[u, v], x = 0 outside the image.

    y: a view that is written, its channels side by side; top and left may be negative. w: any strides.
    """
    (kh, kw, C, Cout), lanes = w.shape, simd.lanes(x.dtype)
    P = simd.panel(Cout, x.dtype)
    _, oh, ow, _ = y.shape
    if y.size == 0:
        return
    block = simd.ROWS[P // lanes]
    wide = (-(-ow // block) * block - 1) * stride + dilation * (kw - 1) + 1                     # pixels that the blocks of a row read
    rows = min(oh, max(1, (STRIP // (wide * C * x.itemsize) - dilation * (kh - 1)) // stride))  # output rows of a strip
    deep = (rows - 1) * stride + dilation * (kh - 1) + 1
    strides = tuple(s // x.itemsize for s in y.strides[:3])
    base, start = _flat(y)
    threads, panels = config.NUMBA_NUM_THREADS, -(-Cout // P)
    with workspace.borrow(x.dtype, panels * kh * kw * C * P, threads * (deep * wide * C + simd.ALL_ROWS * P)) as (packed, local):
        _pack(w, packed.reshape(panels, kh, kw, C, P))
        _correlate(x, packed, b, base, start, strides, y.shape, local.reshape(threads, -1), rows, deep, wide, (kh, kw), stride, top, left,
                   dilation, P, lanes)


def weight_gradient(x, dy, shape, stride, pad, dilation):
    """dw of conv.backward, of that shape; x and dy contiguous."""
    (kh, kw, C, Cout), (N, oh, ow, _), lanes = shape, dy.shape, simd.lanes(x.dtype)
    P = simd.panel(Cout, x.dtype)
    panels = -(-Cout // P)
    run = kw * C if dilation == 1 else C                                # rows of the product: a kernel row, or one tap of it
    rounded = -(-run // simd.ALL_ROWS) * simd.ALL_ROWS
    wide = (ow - 1) * stride + dilation * (kw - 1) + 1
    rows = min(oh, max(1, (STRIP // (wide * C * x.itemsize) - dilation * (kh - 1)) // stride))
    deep = (rows - 1) * stride + dilation * (kh - 1) + 1
    strips = N * -(-oh // rows)
    parts = min(max(1, PARTS // panels), max(1, strips))
    each, threads = kh * (kw if dilation > 1 else 1) * rounded * P, config.NUMBA_NUM_THREADS
    with workspace.borrow(x.dtype, parts * panels * each, threads * (deep * wide * C + rounded + rows * ow * P)) as (sums, local):
        sums = sums.reshape(parts, panels, kh, -1, rounded, P)
        _weight_gradient(x, dy, sums, local.reshape(threads, -1), rows, deep, wide, kw, stride, pad[0], pad[2], dilation, run, lanes)
        total = sums.sum(0)[..., :run, :]                               # (panels, kh, 1 or kw, run, P)
        return np.ascontiguousarray(total.reshape(panels, kh, kw, C, P).transpose(1, 2, 3, 0, 4).reshape(kh, kw, C, -1)[..., :Cout])


def _flat(y):
    """The contiguous array that holds the view y, as one axis, and the place of y's first element in it."""
    base = y
    while base.base is not None and isinstance(base.base, np.ndarray):
        base = base.base
    return base.reshape(-1), (y.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // y.itemsize


@njit(cache=True, parallel=True)
def _pack(w, packed):
    """Weights in panels of output channels, 0 beyond the last."""
    panels, kh, kw, C, P = packed.shape
    for task in prange(panels * kh):
        q, u = np.int64(task) // kh, np.int64(task) % kh
        count = min(P, w.shape[3] - q * P)
        for v in range(kw):
            for c in range(C):
                for o in range(count):
                    packed[q, u, v, c, o] = w[u, v, c, q * P + o]
                for o in range(count, P):
                    packed[q, u, v, c, o] = 0


@njit
def _strip(x, n, row, col, strip, deep, wide):
    """Copy deep x wide pixels from (row, col) of image n on, which may lie outside the image: 0 there."""
    H, W, C = x.shape[1:]
    zero = x.dtype.type(0)
    before = min(max(0, -col), wide)
    inside = max(0, min(wide, W - col) - before)
    for i in range(deep):
        line = strip[i * wide * C:(i + 1) * wide * C]
        if 0 <= row + i < H and inside > 0:
            line[:before * C] = zero
            line[before * C:(before + inside) * C] = x[n, row + i, col + before:col + before + inside].reshape(-1)
            line[(before + inside) * C:] = zero
        else:
            line[:] = zero


@njit(cache=True, parallel=True)
def _correlate(x, packed, b, y, start, strides, shape, local, rows, deep, wide, kernel, stride, top, left, dilation, P, lanes):
    (N, oh, ow, Cout), (kh, kw), C = shape, kernel, x.shape[3]
    strips, panels = -(-oh // rows), -(-Cout // P)
    block = simd.rows(P // lanes)
    whole = ow // block * block                                         # outputs of a row in whole blocks; the rest goes through `rest`
    once = dilation == 1 and kh * kw * C * P * x.itemsize <= FIRST      # the whole kernel at a time, or one row of it
    for task in prange(N * strips):
        n, i0 = np.int64(task) // strips, np.int64(task) % strips * rows
        strip, rest = local[get_thread_id(), :deep * wide * C], local[get_thread_id(), deep * wide * C:]
        _strip(x, n, i0 * stride - top, -left, strip, deep, wide)
        for q in range(panels):
            columns = min(P, Cout - q * P)
            for u in range(1 if once else kh):
                if dilation == 1:
                    outer, a_outer, inner = kh if once else 1, wide * C, kw * C
                else:
                    outer, a_outer, inner = kw, dilation * C, C
                taps = (q * kh + u) * kw * C * P
                for i in range(min(rows, oh - i0)):
                    a = (i * stride + u * dilation) * wide * C
                    at = start + n * strides[0] + (i0 + i) * strides[1] + q * P
                    simd.multiply(P // lanes, strip, a, stride * C, a_outer, 1, packed, taps, inner * P,
                                  y, at, strides[2], whole, outer, inner, columns, u > 0)
                    if whole < ow:
                        simd.multiply(P // lanes, strip, a + whole * stride * C, stride * C, a_outer, 1, packed, taps, inner * P,
                                      rest, 0, P, 1, outer, inner, P, False)
                        for j in range(whole, ow):
                            for o in range(columns):
                                if u > 0:
                                    y[at + j * strides[2] + o] += rest[(j - whole) * P + o]
                                else:
                                    y[at + j * strides[2] + o] = rest[(j - whole) * P + o]
            for i in range(min(rows, oh - i0)):
                at = start + n * strides[0] + (i0 + i) * strides[1] + q * P
                for j in range(ow):
                    for o in range(columns):
                        y[at + j * strides[2] + o] += b[q * P + o]


@njit(cache=True, parallel=True)
def _weight_gradient(x, dy, sums, local, rows, deep, wide, kw, stride, top, left, dilation, run, lanes):
    parts, panels, kh, taps, rounded, P = sums.shape
    (N, oh, ow, Cout), C = dy.shape, x.shape[3]
    strips = -(-oh // rows)
    for task in prange(parts * panels):
        part, q = np.int64(task) // panels, np.int64(task) % panels
        columns = min(P, Cout - q * P)
        strip, right = local[get_thread_id(), :deep * wide * C + rounded], local[get_thread_id(), deep * wide * C + rounded:]
        strip[deep * wide * C:] = 0
        total = sums[part, q].reshape(-1)
        total[:] = 0
        for k in range(N * strips * part // parts, N * strips * (part + 1) // parts):
            n, i0 = k // strips, k % strips * rows
            count = min(rows, oh - i0)
            _strip(x, n, i0 * stride - top, -left, strip, deep, wide)
            for i in range(count):
                for j in range(ow):
                    at = (i * ow + j) * P
                    for o in range(columns):
                        right[at + o] = dy[n, i0 + i, j, q * P + o]
                    for o in range(columns, P):
                        right[at + o] = 0
            for u in range(kh):
                for v in range(taps):
                    simd.multiply(P // lanes, strip, (u * wide + v) * dilation * C, 1, stride * wide * C, stride * C, right, 0, ow * P,
                                  total, (u * taps + v) * rounded * P, P, run, count, ow, P, True)
