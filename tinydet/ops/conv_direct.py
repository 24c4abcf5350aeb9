"""Convolution as products that need no unrolled image: the fast path of ops/conv.py for every stride, kernel and dilation.

Numba only. On a GPU kernels/conv.cu does the same.

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
DEPTH = 64              # pixels in a product of dw, at least
PARTS = 16              # tasks of dw: their number does not depend on the threads, so neither does the order of the sums

_copy = simd.scatter({1: np.ones((1, 1))}, add=False)


def forward(x, w, b, stride, pad, dilation, size):
    """y of conv.forward, size (oh, ow); x and w contiguous."""
    y = np.empty((len(x), *size, w.shape[3]), x.dtype)
    correlate(x, [(w, y, pad[0], pad[2])], y, b, stride, dilation)
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
    dx = np.empty(shape, dy.dtype)
    every = stride // math.gcd(stride, dilation)                        # of the kernel's rows that reach one pixel
    apart = dilation // math.gcd(stride, dilation)                      # in dy between two of them
    maps = []
    for row in range(min(stride, H)):
        for col in range(min(stride, W)):
            u, up = _reach(row + top, w.shape[0], stride, dilation)
            v, across = _reach(col + left, w.shape[1], stride, dilation)
            part = dx[:, row::stride, col::stride]
            taps = w[u::every, v::every][::-1, ::-1].transpose(0, 1, 3, 2) if min(u, v) >= 0 else w[:0]
            if taps.size == 0:
                part[...] = 0
            else:
                maps.append((taps, part, apart * (len(taps) - 1) - up, apart * (taps.shape[1] - 1) - across))
    correlate(dy, maps, dx, np.zeros(C, dy.dtype), 1, apart)
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
    size = N, -(-(H + top) // stride), -(-(W + left) // stride), wide.shape[3]
    dx = np.empty(shape, dy.dtype)
    with workspace.borrow(dy.dtype, math.prod(size) + simd.lanes(dy.dtype)) as (deep,):         # _copy reads whole vectors
        correlate(dy, [(wide, deep[:math.prod(size)].reshape(size), h - 1, v - 1)], deep, np.zeros(size[3], dy.dtype), 1, 1)
        _depth_to_space(deep[:math.prod(size)].reshape(*size[:3], stride, stride, C), dx, top, left, simd.lanes(dy.dtype))
    return dx


def correlate(x, maps, base, b, stride, dilation):
    """For each (w, y, top, left) of maps: y[n, i, j] = b + sum_{u, v} x[n, i*stride + u*dilation - top, j*stride + v*dilation - left] w[u, v].

    x = 0 outside the image. Each w (kh, kw, C, Cout) may have any strides; each y is a view of base, channels side by side, and is
    written. top and left may be negative.
    """
    if x.size == 0 or not maps:
        for _, y, _, _ in maps:
            y[...] = b
        return
    C, Cout, lanes, threads = x.shape[3], len(b), simd.lanes(x.dtype), config.NUMBA_NUM_THREADS
    P = simd.panel(Cout, x.dtype)
    panels, block = -(-Cout // P), simd.SHORT[P // lanes]
    top, left = (max(m[k] for m in maps) for k in (2, 3))
    shapes = [(*w.shape[:2], *y.shape[1:3], top - t, left - l) for w, y, t, l in maps]      # kernel, output, first pixel in the strip
    oh = max(s[2] for s in shapes)

    def reach(k, first, count):                                   # pixels that `count` outputs along one axis read
        return (count - 1) * stride + dilation * (k - 1) + 1 + first

    wide = max(reach(kw, col, -(-ow // block) * block) for _, kw, _, ow, _, col in shapes)
    rows = 1
    while rows < oh and wide * C * x.itemsize * max(reach(kh, row, rows + 1) for kh, _, _, _, row, _ in shapes) <= STRIP:
        rows += 1                                                       # output rows of a strip
    deep = max(reach(kh, row, rows) for kh, _, _, _, row, _ in shapes)
    sizes = [kh * kw * C * P * panels for kh, kw, *_ in shapes]
    table = np.array([(*s, _place(y, base), end - size) for s, (_, y, _, _), size, end in zip(shapes, maps, sizes, np.cumsum(sizes))])
    strides = tuple(s // x.itemsize for s in maps[0][1].strides[:3])
    with workspace.borrow(x.dtype, sum(sizes), threads * (deep * wide * C + simd.ALL_ROWS * P)) as (packed, local):
        for (w, *_), row in zip(maps, table):
            _pack(w, packed[row[7]:row[7] + w.size // Cout * P * panels].reshape(panels, *w.shape[:3], P))
        _correlate(x, packed, simd.whole(b, P), base.reshape(-1), table, strides, Cout, local.reshape(threads, -1),
                   oh, rows, deep, wide, stride, top, left, dilation, P, lanes)


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
        _weight_gradient(x, dy, sums, local.reshape(threads, -1), rows, deep, wide, stride, pad[0], pad[2], dilation, run, lanes)
        total = sums.sum(0)[..., :run, :]                               # (panels, kh, 1 or kw, run, P)
        return np.ascontiguousarray(total.reshape(panels, kh, kw, C, P).transpose(1, 2, 3, 0, 4).reshape(kh, kw, C, -1)[..., :Cout])


def _place(y, base):
    """How many numbers lie before the view y in base."""
    return (y.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // y.itemsize


@simd.jit
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


@simd.jit
def _correlate(x, packed, b, y, maps, strides, Cout, local, oh, rows, deep, wide, stride, top, left, dilation, P, lanes):
    N, H, W, C = x.shape
    strips, panels = -(-oh // rows), -(-Cout // P)
    block = simd.short(P // lanes)
    for task in prange(N * strips):
        n, i0 = np.int64(task) // strips, np.int64(task) % strips * rows
        strip, rest = local[get_thread_id(), :deep * wide * C], local[get_thread_id(), deep * wide * C:]
        _strip(x, n, i0 * stride - top, -left, strip, deep, wide)
        for m in range(len(maps)):
            kh, kw, height, ow, row, col, place, weights = maps[m]
            whole = ow // block * block                                 # outputs of a row in whole blocks; the others go through `rest`
            for q in range(panels):
                columns = min(P, Cout - q * P)
                for u, v, k, outer, inner in _pieces(kh, kw, C, P, dilation, FIRST // x.itemsize):
                    for i in range(min(rows, height - i0)):
                        above = (i0 + i) * stride - top + row           # the image's row under the kernel's first
                        low, high = _inside(above, kh, H, dilation)     # where none does, the first piece writes b
                        first, count = max(u, low), min(u + outer, high) - max(u, low)
                        begins = u + v + k == 0 if low == 0 else first == low and v + k == 0
                        if count <= 0 and not (high == 0 and begins):
                            continue
                        begin = simd.ROW if begins else simd.ADD
                        taps = weights + (((q * kh + first) * kw + v) * C + k) * P
                        a = ((i * stride + first * dilation + row) * wide + v * dilation + col) * C + k
                        at = place + n * strides[0] + (i0 + i) * strides[1] + q * P
                        simd.multiply(P // lanes, strip, a, stride * C, wide * C, 1, packed, taps, kw * C * P, P,
                                      y, at, strides[2], whole, count, inner, columns, begin, b, q * P)
                        if whole < ow:
                            simd.multiply(P // lanes, strip, a + whole * stride * C, stride * C, wide * C, 1, packed, taps, kw * C * P, P,
                                          rest, 0, P, 1, count, inner, P, simd.ROW if begins else simd.ZERO, b, q * P)
                            for j in range(whole, ow):
                                for o in range(columns):
                                    if begins:
                                        y[at + j * strides[2] + o] = rest[(j - whole) * P + o]
                                    else:
                                        y[at + j * strides[2] + o] += rest[(j - whole) * P + o]


@njit
def _inside(above, kh, H, dilation):
    """First and end of the kernel rows that lie in the image, where row 0 lies at `above`; 0, 0 where none does."""
    low = -(above // dilation) if above < 0 else 0                      # the smallest u with above + u * dilation >= 0
    high = min(kh, (H - above + dilation - 1) // dilation)
    return (low, high) if low < high else (0, 0)


@njit
def _pieces(kh, kw, C, P, dilation, most):
    """Cut the kernel so that the weights of a piece are at most so many: (u, v, k, outer, inner), from number k of tap (u, v) on `inner`
    numbers that lie side by side in the image, in `outer` kernel rows."""
    run = kw * C if dilation == 1 else C
    if dilation == 1 and kh * run * P <= most:
        return [(0, 0, 0, kh, run)]
    some = max(1, most // P)
    return [(u, v, k, 1, min(some, run - k)) for u in range(kh) for v in range(1 if dilation == 1 else kw) for k in range(0, run, some)]


@simd.jit
def _depth_to_space(deep, dx, top, left, lanes):
    """dx[n, y, x] = deep[n, (y + top) // stride, (x + left) // stride, (y + top) % stride, (x + left) % stride]."""
    N, H, W, C = dx.shape
    h, cells, stride = deep.shape[1:4]
    source, target, side = deep.reshape(-1), dx.reshape(-1), stride * C
    for task in prange(N * H):
        n, y = np.int64(task) // H, np.int64(task) % H
        at = (((n * h + (y + top) // stride) * cells) * stride + (y + top) % stride) * side
        for j in range(cells):                                          # stride pixels lie side by side in both
            begin = (j * stride - left) * C
            low, high = max(0, -begin), min(side, W * C - begin)
            for k in range(low, high, lanes):
                _copy(1, source, at + j * stride * side + k, 0, target, task * W * C + begin + k, 0, 0, 0, 1, 0, 1, high - k)


@simd.jit
def _weight_gradient(x, dy, sums, local, rows, deep, wide, stride, top, left, dilation, run, lanes):
    parts, panels, kh, taps, rounded, P = sums.shape
    (N, oh, ow, Cout), C = dy.shape, x.shape[3]
    strips = -(-oh // rows)
    some = max(1, DEPTH // ow)                                          # output rows in a product: they stay in the first-level cache
    for task in prange(parts * panels):
        part, q = np.int64(task) // panels, np.int64(task) % panels
        columns = min(P, Cout - q * P)
        strip, buffer = local[get_thread_id(), :deep * wide * C + rounded], local[get_thread_id(), deep * wide * C + rounded:]
        strip[deep * wide * C:] = 0
        total = sums[part, q].reshape(-1)
        total[:] = 0
        for k in range(N * strips * part // parts, N * strips * (part + 1) // parts):
            n, i0 = k // strips, k % strips * rows
            count = min(rows, oh - i0)
            _strip(x, n, i0 * stride - top, -left, strip, deep, wide)
            if columns == P:                                            # the panel is read where it stands
                right, begin, width = dy[n].reshape(-1), i0 * ow * Cout + q * P, Cout
            else:
                right, begin, width = buffer, 0, P
                _panel(dy[n, i0:i0 + count].reshape(-1, Cout), q * P, columns, P, right)
            for i in range(0, count, some):
                for u in range(kh):
                    for v in range(taps):
                        simd.multiply(P // lanes, strip, ((i * stride + u * dilation) * wide + v * dilation) * C, 1, stride * wide * C, stride * C,
                                      right, begin + i * ow * width, ow * width, width, total, (u * taps + v) * rounded * P, P,
                                      run, min(some, count - i), ow, P, simd.ADD, total, 0)


@njit
def _panel(dy, first, columns, P, panel):
    """Copy columns of dy to a panel of width P, 0 beyond them."""
    for r in range(len(dy)):
        for o in range(columns):
            panel[r * P + o] = dy[r, first + o]
        for o in range(columns, P):
            panel[r * P + o] = 0
