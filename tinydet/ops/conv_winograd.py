"""Convolution of stride 1 with fewer products (Winograd): the fast path of ops/conv.py for 3x3, 4x4, 5x5 and 7x7 kernels.

Numba only. On a GPU kernels/conv.cu makes every product.

An m x m tile of the output needs an a x a tile of the image, a = m + r - 1 for an r x r kernel. All three are polynomials; their product
is evaluated at a points and interpolated (Toom-Cook; F(m x m, r x r) of Lavin and Gray), for every pair of channels c, o:

    y_o = A^T [ sum_c V_c * U_co ] A,   V_c = B^T x_c B,   U_co = G w_co G^T,      * elementwise: a^2 products in place of m^2 r^2.

The sum over c is a matrix product for each of the a^2 points. The gradients are the exact adjoints of these steps:

    dM = A dy A^T,   dV = dM U^T,   dx += B dV B^T (tiles overlap by r - 1 pixels),   dU = V^T dM,   dw = G^T dU G.

Layout: channels are cut into panels (simd.panel), tiles into blocks; of V and dM each block, panel and point is one matrix
(tiles, panel). Where few blocks share the filters, as in the wide layers at the end of a net, a task makes the U it needs, panel by panel,
in its own buffer, where it stays in the cache; U is then never held as a whole.
"""
import functools
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numba import config, get_thread_id, njit, prange

from tinydet import simd, workspace

TILES = {3: 4, 4: 3, 5: 4, 7: 2}    # m for each r. F(6x6, 3x3) was slower, F(4x4, 7x7) had errors of 2e-4 in dw
POINTS = ("0", "1", "-1", "2", "-2", "1/2", "-1/2")                             # and infinity; a tile takes the first it needs
BLOCK = {36: 128, 64: 54}           # tiles in a block, at most, by number of points: its products stay in the cache
TASKS = 8                           # at least, where there are as many images: shared by the threads, whatever their number
FEW = 24                            # tiles, below which no block is cut to make a task
REUSE = 3                           # blocks from which on U is held as a whole: each block would make it anew
ROOM = 16 << 20                     # numbers of V and dM in memory at a time: larger batches go in groups of images


def matrices(m, r):
    """A (a, m), B (a, a) and G (a, r), float64, a = m + r - 1, for the first a - 1 POINTS and infinity.

    Row i of G is scaled by a power of two and column i of B by its inverse, so that both stay moderate; that changes no product.
    """
    points = [Fraction(p) for p in POINTS[:m + r - 2]]
    powers = lambda p, n: [p ** k for k in range(n)]                                        # noqa: E731
    A = [powers(p, m) for p in points] + [[Fraction(0)] * (m - 1) + [Fraction(1)]]
    G = [[v / np.prod([p - q for q in points if q != p]) for v in powers(p, r)] for p in points] + [[Fraction(0)] * (r - 1) + [Fraction(1)]]
    B = [_roots([q for q in points if q != p]) + [Fraction(0)] for p in points] + [_roots(points)]
    A, G, B = (np.array(M, float) for M in (A, G, B))
    scale = 2.0 ** np.round(np.log2(np.abs(B).max(1) / np.abs(G).max(1)) / 2)[:, None]
    return A, (B / scale).T, G * scale


def _roots(points):
    """Coefficients, from the constant term up, of the polynomial prod (x - p)."""
    c = [Fraction(1)]
    for p in points:
        c = [low - p * high for low, high in zip([Fraction(0)] + c, c + [Fraction(0)])]
    return c


PAD = 16                            # numbers between matrices: keeps them out of one another's cache sets; blocks of rows may read it
A, B, G = ({r: matrices(m, r)[k] for r, m in TILES.items()} for k in range(3))
_x = simd.gather({r: M.T for r, M in B.items()})                        # V = B^T x B, of one tile and one vector of channels
_dy = simd.gather(A)                                                    # dM = A dy A^T
_w = simd.gather(G)                                                     # U = G w G^T
_y = simd.scatter({r: M.T for r, M in A.items()}, add=False)            # y = A^T M A
_dx = simd.scatter(B, add=True)                                         # dx += B dV B^T
_dw = simd.scatter({r: M.T for r, M in G.items()}, add=True)            # dw += G^T dU G


class Plan(NamedTuple):
    """How the tiles of a layer are cut into blocks, and its channels into panels."""

    N: int
    H: int
    W: int
    oh: int
    ow: int
    Cin: int
    Cout: int
    r: int
    m: int
    points: int
    top: int
    left: int
    across: int         # tiles in a row
    tiles: int          # of one image
    images: int         # in a group; its tiles make `parts` blocks
    parts: int
    block: int          # tiles of a block, at most
    rows: int           # the same, rounded up for simd.multiply
    blocks: int
    Pi: int             # width of the panels of input channels, of output channels, and their numbers
    Po: int
    pi: int
    po: int


@functools.lru_cache(256)
def plan(x_shape, w_shape, pad, dtype):
    """The Plan of a layer: shapes (N, H, W, Cin) and (r, r, Cin, Cout), pad (top, bottom, left, right)."""
    (N, H, W, Cin), (r, _, _, Cout) = x_shape, w_shape
    m = TILES[r]
    points = (m + r - 1) ** 2
    oh, ow = H + pad[0] + pad[1] - r + 1, W + pad[2] + pad[3] - r + 1
    across = -(-ow // m)
    tiles = -(-oh // m) * across
    Pi, Po = simd.panel(Cin, dtype), simd.panel(Cout, dtype)
    pi, po = -(-Cin // Pi), -(-Cout // Po)
    least = min(-(-TASKS // min(pi, po)), N * tiles // FEW)             # blocks
    most = BLOCK[points]
    if tiles <= most:                                                   # a block is some whole images, ...
        images, parts = max(1, -(-N // max(1, least, -(-N * tiles // most)))), 1
    else:                                                               # ... or an image is some blocks
        images, parts = 1, max(-(-tiles // most), -(-least // N) if N else 1)
    block = -(-images * tiles // parts)
    rows = -(-block // simd.ALL_ROWS) * simd.ALL_ROWS
    return Plan(N, H, W, oh, ow, Cin, Cout, r, m, points, pad[0], pad[2], across, tiles, images, parts, block, rows,
                -(-N // images) * parts, Pi, Po, pi, po)


def room(x, w, pad):
    """Numbers that V and dM of the batch take."""
    g = plan(x.shape, w.shape, pad, x.dtype)
    return g.blocks * g.points * (g.pi * (g.rows * g.Pi + PAD) + g.po * (g.rows * g.Po + PAD))


def _pieces(x, w, pad):
    """Cut the batch into pieces whose V and dM fit ROOM: some images, or some rows of one, of a row of tiles at least.

    Yields (images, output rows, input rows), slices, and the padding of the piece. Neighbouring pieces of an image share input rows.
    """
    (top, bottom, left, right), H, r, m = pad, x.shape[1], len(w), TILES[len(w)]
    oh, one = H + top + bottom - r + 1, max(1, room(x[:1], w, pad))
    for n in range(0, len(x), max(1, ROOM // one)):
        images = slice(n, n + max(1, ROOM // one))
        some = oh if one <= ROOM else max(1, oh * ROOM // one // m) * m
        for i in range(0, oh, some):
            end = min(oh, i + some)
            first, last = max(0, min(H, i - top)), max(0, min(H, end + r - 1 - top))
            yield images, slice(i, end), slice(first, last), (first - (i - top), end + r - 1 - top - last, left, right)


def forward(x, w, b, pad):
    """y of conv.forward with stride 1 and dilation 1; x (N, H, W, C), w (r, r, C, Cout), b contiguous, r in TILES."""
    g = plan(x.shape, w.shape, pad, x.dtype)
    y = np.empty((g.N, g.oh, g.ow, g.Cout), x.dtype)
    for images, rows, seen, border in _pieces(x, w, pad):
        _forward(x[images, seen], w, b, y[images, rows], border)
    return y


def backward(dy, x, w, pad, need_dx, need_dw):
    """dx and dw of forward, each None where it is not needed."""
    dx, dw = (np.zeros_like(a) if needed else None for a, needed in ((x, need_dx), (w, need_dw)))
    for images, rows, seen, border in _pieces(x, w, pad):
        _backward(dy[images, rows], x[images, seen], w, border, dx[images, seen] if need_dx else None, dw)
    return dx, dw


def _forward(x, w, b, y, pad):
    g, threads, lanes = plan(x.shape, w.shape, pad, x.dtype), config.NUMBA_NUM_THREADS, simd.lanes(x.dtype)
    filters = g.points * (g.Pi * g.Po + PAD)                            # numbers in one U; of V and M, a block and panel:
    inner, outer = g.points * (g.rows * g.Pi + PAD), g.points * (g.rows * g.Po + PAD)
    reuse = g.blocks >= REUSE
    with workspace.borrow(x.dtype, g.blocks * g.pi * inner, reuse * g.pi * g.po * filters, threads * (filters + outer)) as (V, U, local):
        local = local.reshape(threads, -1)
        _cut(x.reshape(-1), V, g, False, g.H, g.W, g.Cin, g.top, g.left, g.Pi, g.pi, lanes)
        if reuse:
            _all_filters(w.reshape(-1), g, False, U, local, lanes)
        _outputs(V, w.reshape(-1), U, simd.whole(b, g.Po), y.reshape(-1), local, g, lanes)


def _backward(dy, x, w, pad, dx, dw):
    """Add the gradients to dx and dw, where they are not None."""
    g, threads, lanes = plan(x.shape, w.shape, pad, x.dtype), config.NUMBA_NUM_THREADS, simd.lanes(x.dtype)
    filters = g.points * (g.Pi * g.Po + PAD)
    inner, outer = g.points * (g.rows * g.Pi + PAD), g.points * (g.rows * g.Po + PAD)
    local = max(filters + inner + g.r * g.r * g.Pi * g.Po, g.points * -(-g.Pi // simd.ALL_ROWS) * simd.ALL_ROWS * g.Po)
    reuse = dx is not None and g.blocks >= REUSE
    with workspace.borrow(x.dtype, (dw is not None) * g.blocks * g.pi * inner, g.blocks * g.po * outer, reuse * g.pi * g.po * filters,
                          threads * local) as (V, dM, U, local):
        local = local.reshape(threads, -1)
        _cut(dy.reshape(-1), dM, g, True, g.oh, g.ow, g.Cout, 0, 0, g.Po, g.po, lanes)
        if reuse:
            _all_filters(w.reshape(-1), g, True, U, local, lanes)
        if dx is not None:
            _input_gradients(dM, w.reshape(-1), U, dx.reshape(-1), local, g, lanes)
        if dw is not None:
            _cut(x.reshape(-1), V, g, False, g.H, g.W, g.Cin, g.top, g.left, g.Pi, g.pi, lanes)
            parts = min(g.blocks, -(-TASKS // (g.pi * g.po)))
            sums = np.zeros((parts, *dw.shape), dw.dtype) if parts > 1 else dw[None]
            _filter_gradients(V, dM, sums.reshape(parts, -1), local, g, lanes)
            if parts > 1:
                dw += sums.sum(0)


@njit
def _tiles(g, block):
    """First tile of a block, counted over all images, and the number of its tiles."""
    group, part = block // g.parts, block % g.parts
    images = min(g.images, g.N - group * g.images)
    return group * g.images * g.tiles + part * g.block, max(0, min(g.block, images * g.tiles - part * g.block))


@njit
def _where(g, tile):
    """Image, row and column of the tile's first output pixel."""
    n, k = tile // g.tiles, tile % g.tiles
    return n, k // g.across * g.m, k % g.across * g.m


@simd.jit
def _cut(image, panels, g, gradient, H, W, C, top, left, P, count, lanes):
    """V from x, or (gradient) dM from dy: transform every tile into its row of the panels; rows without a tile are 0."""
    step = g.rows * P + PAD
    for task in prange(g.blocks * count):
        block, p = np.int64(task) // count, np.int64(task) % count
        first, tiles = _tiles(g, block)
        for t in range(-(-tiles // simd.ALL_ROWS) * simd.ALL_ROWS):
            n, i, j = _where(g, first + min(t, tiles - 1))
            r0, r1, c0, c1 = top - i, top - i + H, left - j, left - j + W
            for lane in range(0, P, lanes):
                c = p * P + lane
                valid = C - c if t < tiles else 0
                source, target = ((n * H - r0) * W - c0) * C + c, np.int64(task) * g.points * step + t * P + lane
                if gradient:
                    _dy(g.r, image, source, W * C, C, r0, r1, c0, c1, valid, panels, target, step)
                else:
                    _x(g.r, image, source, W * C, C, r0, r1, c0, c1, valid, panels, target, step)


@njit
def _filters(w, at, row, tap, inside, rows, valid, P, r, U, lanes):
    """U (points, rows, P) of `rows` rows of w, tap (u, v) of row k at w[at + (u*r + v)*tap + k*row]; `inside` rows and `valid` columns exist."""
    step = rows * P + PAD
    for k in range(rows):
        for lane in range(0, P, lanes):
            _w(r, w, at + k * row + lane, r * tap, tap, 0, r, 0, r, valid - lane if k < inside else 0, U, k * P + lane, step)


@njit
def _panel_filters(w, g, p, q, gradient, U, turned, lanes):
    """U of input panel p and output panel q: rows c and columns o, or for the gradient rows o and columns c (U^T); 0 beyond the channels."""
    tap = g.Cin * g.Cout
    at = p * g.Pi * g.Cout + q * g.Po
    inputs, outputs = min(g.Pi, g.Cin - p * g.Pi), min(g.Po, g.Cout - q * g.Po)
    if not gradient:
        _filters(w, at, g.Cout, tap, inputs, g.Pi, outputs, g.Po, g.r, U, lanes)
    else:
        for k in range(g.r * g.r):                                      # turn the weights, so that c lies along the vectors
            for c in range(inputs):
                for o in range(outputs):
                    turned[(k * g.Po + o) * g.Pi + c] = w[at + k * tap + c * g.Cout + o]
        _filters(turned, 0, g.Pi, g.Po * g.Pi, outputs, g.Po, inputs, g.Pi, g.r, U, lanes)


@simd.jit
def _all_filters(w, g, gradient, U, local, lanes):
    """Every U, [p][q], where several blocks use each."""
    size = g.points * (g.Pi * g.Po + PAD)
    for task in prange(g.pi * g.po):
        p, q = np.int64(task) // g.po, np.int64(task) % g.po
        _panel_filters(w, g, p, q, gradient, U[task * size:(task + 1) * size], local[get_thread_id()], lanes)


@simd.jit
def _outputs(V, w, stored, b, y, local, g, lanes):
    """y from V: for each block and panel of outputs, U panel by panel, M = V U, y = A^T M A."""
    x_step, step, size = g.rows * g.Pi + PAD, g.rows * g.Po + PAD, g.points * (g.Pi * g.Po + PAD)
    one = g.m + g.r                                                     # the point (1, 1), where A is 1: b added there reaches all of y
    for task in prange(g.blocks * g.po):
        block, q = np.int64(task) // g.po, np.int64(task) % g.po
        first, tiles = _tiles(g, block)
        buffer = local[get_thread_id()]
        U, M = buffer[:size], buffer[size:]
        if len(stored):                                                 # all input panels in one product: M is written once
            for k in range(g.points):
                simd.multiply(g.Po // lanes, V, (block * g.pi * g.points + k) * x_step, g.Pi, g.points * x_step, 1,
                              stored, q * size + k * (g.Pi * g.Po + PAD), g.po * size, g.Po, M, k * step, g.Po, tiles, g.pi, g.Pi, g.Po,
                              simd.ROW if k == one else simd.ZERO, b, q * g.Po)
        else:
            for p in range(g.pi):
                _panel_filters(w, g, p, q, False, U, U, lanes)
                for k in range(g.points):
                    simd.multiply(g.Po // lanes, V, ((block * g.pi + p) * g.points + k) * x_step, g.Pi, 0, 1,
                                  U, k * (g.Pi * g.Po + PAD), 0, g.Po, M, k * step, g.Po, tiles, 1, g.Pi, g.Po,
                                  simd.ADD if p > 0 else simd.ROW if k == one else simd.ZERO, b, q * g.Po)
        for t in range(tiles):
            n, i, j = _where(g, first + t)
            for lane in range(0, g.Po, lanes):
                o = q * g.Po + lane
                target, row = ((n * g.oh + i) * g.ow + j) * g.Cout + o, g.ow * g.Cout
                _y(g.r, M, t * g.Po + lane, step, y, target, row, g.Cout, 0, g.oh - i, 0, g.ow - j, g.Cout - o)


@simd.jit
def _input_gradients(dM, w, stored, dx, local, g, lanes):
    """dx from dM: for each group of images and panel of inputs, dV = dM U^T and dx += B dV B^T, block after block."""
    step, y_step, size = g.rows * g.Pi + PAD, g.rows * g.Po + PAD, g.points * (g.Pi * g.Po + PAD)
    for task in prange(g.blocks // g.parts * g.pi):
        group, p = np.int64(task) // g.pi, np.int64(task) % g.pi
        buffer = local[get_thread_id()]
        U, dV, turned = buffer[:size], buffer[size:size + g.points * step], buffer[size + g.points * step:]
        for block in range(group * g.parts, (group + 1) * g.parts):
            first, tiles = _tiles(g, block)
            if len(stored):
                for k in range(g.points):
                    simd.multiply(g.Pi // lanes, dM, (block * g.po * g.points + k) * y_step, g.Po, g.points * y_step, 1,
                                  stored, p * g.po * size + k * (g.Pi * g.Po + PAD), size, g.Pi, dV, k * step, g.Pi, tiles, g.po, g.Po, g.Pi,
                                  simd.ZERO, dV, 0)
            else:
                for q in range(g.po):
                    _panel_filters(w, g, p, q, True, U, turned, lanes)
                    for k in range(g.points):
                        simd.multiply(g.Pi // lanes, dM, ((block * g.po + q) * g.points + k) * y_step, g.Po, 0, 1,
                                      U, k * (g.Pi * g.Po + PAD), 0, g.Pi, dV, k * step, g.Pi, tiles, 1, g.Po, g.Pi,
                                      simd.ADD if q > 0 else simd.ZERO, dV, 0)
            for t in range(tiles):
                n, i, j = _where(g, first + t)
                r0, r1, c0, c1 = g.top - i, g.top - i + g.H, g.left - j, g.left - j + g.W
                for lane in range(0, g.Pi, lanes):
                    c = p * g.Pi + lane
                    target, row = ((n * g.H - r0) * g.W - c0) * g.Cin + c, g.W * g.Cin
                    _dx(g.r, dV, t * g.Pi + lane, step, dx, target, row, g.Cin, r0, r1, c0, c1, g.Cin - c)


@simd.jit
def _filter_gradients(V, dM, sums, local, g, lanes):
    """dw from V and dM, in parts: for each pair of panels dU = V^T dM over the blocks of the part, then dw = G^T dU G."""
    x_step, y_step = g.rows * g.Pi + PAD, g.rows * g.Po + PAD
    step = -(-g.Pi // simd.ALL_ROWS) * simd.ALL_ROWS * g.Po             # blocks of rows go beyond the panel
    for task in prange(len(sums) * g.pi * g.po):
        part, p, q = np.int64(task) // (g.pi * g.po), np.int64(task) // g.po % g.pi, np.int64(task) % g.po
        dU, begin = local[get_thread_id()], g.blocks * part // len(sums)
        for block in range(begin, g.blocks * (part + 1) // len(sums)):
            first, tiles = _tiles(g, block)
            for k in range(g.points):
                simd.multiply(g.Po // lanes, V, ((block * g.pi + p) * g.points + k) * x_step, 1, 0, g.Pi,
                              dM, ((block * g.po + q) * g.points + k) * y_step, 0, g.Po, dU, k * step, g.Po, g.Pi, 1, tiles, g.Po,
                              simd.ADD if block > begin else simd.ZERO, dU, 0)
        tap = g.Cin * g.Cout
        for c in range(min(g.Pi, g.Cin - p * g.Pi)):
            for lane in range(0, g.Po, lanes):
                o = q * g.Po + lane
                target = (p * g.Pi + c) * g.Cout + o
                _dw(g.r, dU, c * g.Po + lane, step, sums[part], target, g.r * tap, tap, 0, g.r, 0, g.r, g.Cout - o)
