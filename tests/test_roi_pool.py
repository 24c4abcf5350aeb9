import math
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC, seeds
from tinydet import checks, emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import roi_pool

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
scales = st.sampled_from([1, 0.5, 1 / 16, 0.3])
EMULATED = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))


def cell(coordinate, scale):
    """round(coordinate * scale), one float32 product, halves away from 0."""
    return int(Decimal(float(np.float32(coordinate) * np.float32(scale))).quantize(Decimal(1), ROUND_HALF_UP))


def bin_edges(start, stop, count, side, float_bins=False):
    """(first, past the last) cell of each bin along an axis, in the map."""
    extent = max(stop - start + 1, 1)
    part, number = (np.float32(extent) / np.float32(count), np.float32) if float_bins else (Fraction(extent, count), int)
    edges = [(math.floor(number(i) * part), math.ceil(number(i + 1) * part)) for i in range(count)]
    return [tuple(min(max(edge + start, 0), side) for edge in pair) for pair in edges]


def by_definition(x, rois, size, scale, dy, float_bins=False):
    """y, argmax and dx by nested loops over the cells of every bin."""
    (_, H, W, C), (PH, PW) = x.shape, size
    y, argmax, dx = np.zeros((len(rois), PH, PW, C), x.dtype), np.full((len(rois), PH, PW, C), -1), np.zeros_like(x)
    for r, (n, *box) in enumerate(rois):
        xs, ys, xe, ye = (cell(v, scale) for v in box)
        rows, columns = bin_edges(ys, ye, PH, H, float_bins), bin_edges(xs, xe, PW, W, float_bins)
        for i, j, c in np.ndindex(PH, PW, C):
            for h in range(*rows[i]):
                for w in range(*columns[j]):
                    value, best = x[int(n), h, w, c], y[r, i, j, c]
                    if argmax[r, i, j, c] < 0 or value > best or (np.isnan(value) and not np.isnan(best)):
                        y[r, i, j, c], argmax[r, i, j, c] = value, h * W + w
            if (at := argmax[r, i, j, c]) >= 0:
                dx[int(n), at // W, at % W, c] += dy[r, i, j, c]
    return y, argmax, dx


def pooled(backend, x, rois, size, scale, dy, float_bins=False):
    """y, argmax and dx of the op."""
    with use(backend) as put:
        y, cache = roi_pool.forward(put(x), put(rois), size, scale, float_bins)
        return to_numpy(y), to_numpy(cache[2]), to_numpy(roi_pool.backward(put(dy), cache))


def check(backend, x, rois, size, scale, float_bins=False):
    """Values, places and gradient equal the definition exactly: sums of integers are exact."""
    dy = np.random.default_rng(0).integers(-9, 10, (len(rois), *size, x.shape[3])).astype(x.dtype)
    args = x, rois, size, scale, dy, float_bins
    for found, expected in zip(pooled(backend, *args), by_definition(*args)):
        assert found.dtype == (x.dtype if expected.dtype == x.dtype else np.int32)
        assert_array_equal(found, expected)


def random_rois(rng, R, N, H, W, scale):
    """On quarter cells, so that products end at .5 often: inside, across the border, outside, malformed, tiny, the whole map."""
    corner = rng.integers(-12, 4 * (max(H, W) + 3), (R, 2))
    box = np.concatenate([corner, corner + rng.integers(-12, 4 * max(H, W), (R, 2))], 1) / 4
    kind = rng.integers(0, 6, R)
    box[kind == 0] = 0, 0, W - 1, H - 1
    box[kind == 1, 2:] = box[kind == 1, :2]
    return np.concatenate([rng.integers(0, N, (R, 1)), box / scale], 1)


def drawn(seed, sides, N, C, scale, dtype, values=(-np.inf, -1, 0, 1, 2, np.inf, np.nan)):
    rng = np.random.default_rng(seed)
    x = rng.choice(values, (N, *sides, C)).astype(dtype)
    return x, random_rois(rng, int(rng.integers(0, 5)), N, *sides, scale).astype(dtype)


# Definition

F1 = [[0, 0, 0, 10, 10], [0, 2, 2, 7, 5], [0, 9, 1, 9, 1], [0, 4, 4, 24, 24], [0, 8, 8, 2, 3], [0, -3, -1, 3, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_fixture_of_the_notes(backend, dtype):
    """F1: halves of both signs, a RoI of one cell, one beyond the map, a malformed one, which keeps its gradient."""
    x = (7 * np.arange(36, dtype=dtype) % 37 - 10).reshape(1, 6, 6, 1)
    y, argmax, dx = pooled(backend, x, np.array(F1, dtype), 2, 1 / 2, np.arange(1, 25, dtype=dtype).reshape(6, 2, 2, 1))
    assert_array_equal(y.reshape(6, 4), [[14, 25, 24, 26], [14, 23, 19, 26], [-7] * 4, [26, 0, 0, 0], [1] * 4, [-10, 4, 0, 14]])
    assert_array_equal(argmax.reshape(6, 4), [[14, 5, 26, 21], [14, 10, 20, 21], [11] * 4, [21, -1, -1, -1], [28] * 4,
                                              [0, 2, 12, 14]])
    assert_array_equal(dx[0, :, :, 0], [[21, 0, 22, 0, 0, 2], [0, 0, 0, 0, 6, 42], [23, 0, 30, 0, 0, 0], [0, 0, 7, 25, 0, 0],
                                        [0, 0, 3, 0, 74, 0], [0] * 6])
    assert dx.sum() == 255


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, sides=st.tuples(st.integers(1, 7), st.integers(1, 6)), N=st.integers(1, 3), C=st.integers(1, 3), size=sizes,
       scale=scales, float_bins=st.booleans())
def test_it_is_the_definition_with_ties_infinities_and_nan(backend, dtype, seed, sides, N, C, size, scale, float_bins):
    check(backend, *drawn(seed, sides, N, C, scale, dtype), size, scale, float_bins)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coordinate, scale, k", [
    (8, 1 / 16, 1), (7.99, 1 / 16, 0), (24, 1 / 16, 2), (40, 1 / 16, 3), (1.5, 1, 2), (2.5, 1, 3),
    (float(np.float32(0.49999997)), 1, 0),              # + 0.5 in float32 is 1
    (25, 0.58, 15),                                     # 14.499999999999998 in float64, 14.5 in float32
    (0.35, 10, 4),                                      # a little below 3.5 where only coordinate and scale are float32
    (5.4999999999, 1, 6), (16777217, 2**-25 - 2**-49, 0),       # where only the product is float32: 5 and 1
    (1e-40, 1, 0), (0.0, 1, 0)])
def test_rounding(backend, coordinate, scale, k):
    """Halves away from 0 on both sides: a RoI of cells -k..k in 2k + 1 bins has one cell in each, in both dtypes."""
    for dtype in (np.float32, np.float64):
        rois = np.array([[0, -coordinate, -coordinate, coordinate, coordinate]], dtype)
        for size, shape in (((2 * k + 1, 1), (1, 40, 1, 1)), ((1, 2 * k + 1), (1, 1, 40, 1))):
            rising = np.arange(40, dtype=dtype).reshape(shape)
            _, argmax, _ = pooled(backend, rising, rois, size, scale, np.zeros((1, *size, 1), dtype))
            assert_array_equal(argmax.ravel(), [-1] * k + list(range(k + 1)))
    assert cell(coordinate, scale) == -cell(-coordinate, scale) == k


@pytest.mark.parametrize("backend", BACKENDS)
def test_float_bins_repeat_the_nine_errors_of_float32(backend):
    """Sizes 1..200 in 2, 3, 6, 7 or 14 bins (notes, sec. 1.2), on maps whose values rise (y: last row) or fall (y: first)."""
    x, rois, wrong = np.arange(201.0).reshape(1, 201, 1, 1), np.zeros((200, 5)), []
    rois[:, 4] = np.arange(200)
    for PH in (2, 3, 6, 7, 14):
        edges = np.array([bin_edges(0, r, PH, 201) for r in range(200)])
        for float_bins in (False, True):
            with use(backend) as put:
                y = [to_numpy(roi_pool.forward(put(s * x), put(rois), (PH, 1), 1, float_bins)[0])[:, :, 0, 0] for s in (-1, 1)]
            found = np.stack([-y[0], y[1] + 1], 2).astype(int)
            odd = np.argwhere((found != edges).any(2)).tolist()
            wrong += [(PH, r + 1, i, *edges[r, i], *found[r, i]) for r, i in odd if float_bins]
            assert float_bins or odd == []
    assert len(wrong) == 9 and (7, 57, 6, 48, 57, 48, 58) in wrong and 29 not in [extent for _, extent, *_ in wrong]


# Gradient

@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(max_side=4), seed=seeds, size=sizes, scale=scales)
def test_gradient(backend, x, seed, size, scale):
    rois = random_rois(np.random.default_rng(seed), 3, *x.shape[:3], scale)
    with use(backend) as put:
        check_grad(lambda x: roi_pool.forward(x, put(rois), size, scale), roi_pool.backward, [x], put=put)


@given(seed=seeds, size=sizes, scale=scales)
def test_gradient_is_conserved(seed, size, scale):
    x, rois = drawn(seed, (5, 6), 2, 2, scale, float)
    y, cache = roi_pool.forward(x, rois, size, scale)
    dy = np.random.default_rng(seed).integers(-9, 10, y.shape).astype(float)
    dx = roi_pool.backward(dy, cache)
    for n in range(2):
        own = rois[:, 0] == n
        assert_array_equal(dx[n].sum((0, 1)), np.where(cache[2] >= 0, dy, 0)[own].sum((0, 1, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_have_the_bits_of_the_reference(backend, dtype, all_threads):
    """Every cell adds in the order of RoIs and bins, on every backend and with any number of threads; float32 is near float64."""
    rng = np.random.default_rng(0)
    x, rois = rng.standard_normal((2, 5, 4, 70)), random_rois(rng, 40, 2, 5, 4, 1 / 16)
    dy = rng.standard_normal((40, 3, 2, 70))
    expected = pooled("numpy", x.astype(dtype), rois.astype(dtype), (3, 2), 1 / 16, dy.astype(dtype))
    found = pooled(backend, x.astype(dtype), rois.astype(dtype), (3, 2), 1 / 16, dy.astype(dtype))
    for a, b in zip(found, expected):
        assert_array_equal(a, b, strict=True)
    exact = pooled("numpy", x.astype(dtype).astype(float), rois, (3, 2), 1 / 16, dy)[2]
    assert np.linalg.norm(found[2] - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("C", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_channels_are_shared_out_to_threads_without_loss(C, threads, monkeypatch):
    monkeypatch.setattr(roi_pool, "get_num_threads", lambda: threads)
    rng = np.random.default_rng(0)
    x, rois, dy = rng.standard_normal((2, 3, 4, C)), random_rois(rng, 6, 2, 3, 4, 1), rng.standard_normal((6, 2, 2, C))
    assert_array_equal(pooled("numba", x, rois, 2, 1, dy)[2], pooled("numpy", x, rois, 2, 1, dy)[2])


# Invariants

@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC())
def test_one_bin_of_the_whole_map_is_the_global_maximum(backend, x):
    N, H, W, C = x.shape
    rois = np.array([[n, 0, 0, 16 * (W - 1), 16 * (H - 1)] for n in range(N)], float)
    with use(backend) as put:
        y, _ = roi_pool.forward(put(x), put(rois), 1, 1 / 16)
    assert_array_equal(to_numpy(y)[:, 0, 0], x.max((1, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(), seed=seeds, size=sizes)
def test_a_constant_moves_all_but_empty_bins_and_a_shift_of_image_and_rois_nothing(backend, x, seed, size):
    rois = random_rois(np.random.default_rng(seed), 4, *x.shape[:3], 1 / 16)
    rois[:, 1:] = np.maximum(rois[:, 1:], 0)                # a shift moves halves to halves, but -.5 goes down and .5 up
    dy = np.zeros((4, *size, x.shape[3]))
    y, argmax, _ = pooled(backend, x, rois, size, 1 / 16, dy)
    moved, again, _ = pooled(backend, x + 3, rois, size, 1 / 16, dy)
    assert_array_equal(moved, y + 3 * (argmax >= 0))
    assert_array_equal(again, argmax)
    low = np.full((len(x), x.shape[1] + 1, x.shape[2] + 1, x.shape[3]), -1e9)
    low[:, 1:, 1:] = x                                      # one cell down and to the right; what is new lies outside every RoI
    h, w = np.divmod(argmax, x.shape[2])
    shifted, places, _ = pooled(backend, low, rois + np.array([0, 16, 16, 16, 16]), size, 1 / 16, dy)
    assert_array_equal(shifted, y)
    assert_array_equal(places, np.where(argmax < 0, -1, (h + 1) * low.shape[2] + w + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_overlap_and_small_regions_repeat(backend):
    """5 rows in 2 bins: 0..2 and 2..4; one cell in 3 x 3 bins: nine times."""
    x = np.arange(25.0).reshape(1, 5, 5, 1)
    y, _, _ = pooled(backend, x, np.array([[0, 0, 0, 4.0, 4]]), 2, 1, np.ones((1, 2, 2, 1)))
    assert_array_equal(y[0, :, :, 0], [[12, 14], [22, 24]])
    _, _, dx = pooled(backend, x, np.array([[0, 3, 1, 3, 1.0]]), 3, 1, np.ones((1, 3, 3, 1)))
    assert dx[0, 1, 3, 0] == dx.sum() == 9


# Kernels

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("R, size, C", [
    (1, (1, 1), 1), (1, (5, 17), 3), (1, (16, 16), 1), (1, (1, 257), 1), (3, (1, 2), 31), (2, (1, 1), 32), (2, (2, 1), 33),
    (1, (1, 1), 255), (1, (1, 2), 256), (2, (1, 1), 257)])
def test_block_borders(backend, R, size, C):
    """1, 255, 256, 257 and more outputs, and channels about those of a warp and a block."""
    rng = np.random.default_rng(0)
    x, rois = rng.integers(0, 9, (1, 3, 2, C)), random_rois(rng, R, 1, 3, 2, 1)
    check(backend, x.astype(np.float32), rois.astype(np.float32), size, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("R", [31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_many_regions(backend, R):
    """About the 32 that a warp looks at together, and with PH + PW 2, about the 256 of a block that computes bins."""
    rng = np.random.default_rng(R)
    x, rois = rng.integers(0, 9, (2, 3, 4, 1)), random_rois(rng, R, 2, 3, 4, 1 / 16)
    check(backend, x.astype(np.float32), rois.astype(np.float32), (1, 1), 1 / 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strides_do_not_matter(backend, dtype):
    rng = np.random.default_rng(0)
    x, rois = rng.integers(0, 99, (3, 6, 5, 2)).astype(dtype).T, random_rois(rng, 5, 2, 5, 6, 1).astype(dtype)
    spread = np.full((10, 10), np.nan, dtype)
    spread[::2, ::2] = rois
    dy = rng.integers(-9, 9, (3, 2, 3, 5)).astype(dtype).T
    for a, b in zip(pooled(backend, x, spread[::2, ::2], (3, 2), 1, dy), pooled("numpy", x.copy(), rois, (3, 2), 1, dy.copy())):
        assert_array_equal(a, b, strict=True)


@EMULATED
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_threads_changes_no_bit(seed):
    rng, results = np.random.default_rng(0), []
    x, rois = rng.standard_normal((2, 5, 6, 40)).astype(np.float32), random_rois(rng, 40, 2, 5, 6, 1 / 16).astype(np.float32)
    dy = rng.standard_normal((40, 2, 3, 40)).astype(np.float32)
    for order in ("forward", "random"):
        with emulate.options(order=order, seed=seed):
            results.append(pooled("emulated", x, rois, (2, 3), 1 / 16, dy))
    for a, b in zip(*results):
        assert_array_equal(a, b, strict=True)


BAD = [[0.5, 0, 0, 2, 2], [2, 0, 0, 2, 2], [-1, 0, 0, 2, 2], [np.nan, 0, 0, 2, 2], [1e30, 0, 0, 2, 2], [1, np.nan, 0, 2, 2],
       [1, 0, np.inf, 2, 2], [0, 0, 0, -np.inf, 2], [0, 0, 0, 2, np.nan]]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] in ("emulated", "cuda")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gpu_gives_nan_for_a_roi_that_may_not_be(backend, dtype, monkeypatch):
    """Values on a GPU are not looked at before: y is NaN there, dx gets nothing, and the others are as ever."""
    rng = np.random.default_rng(0)
    x, good = distinct((2, 4, 5, 3), 0).astype(dtype), [[1, 0, 0, 4, 3], [0, 1, 1, 3, 3]]
    rois, dy = np.array([good[0], *BAD, good[1]], dtype), rng.integers(-9, 9, (len(BAD) + 2, 2, 3, 3)).astype(dtype)
    expected = pooled("numpy", x, np.array(good, dtype), (2, 3), 1, dy[[0, -1]])
    monkeypatch.setattr(checks, "on_host", lambda x: False)
    y, argmax, dx = pooled(backend, x, rois, (2, 3), 1, dy)
    assert np.isnan(y[1:-1]).all() and (argmax[1:-1] == -1).all()
    for a, b in zip((y[[0, -1]], argmax[[0, -1]], dx), expected):
        assert_array_equal(a, b, strict=True)


# Limits and errors

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("float_bins", [False, True])
def test_coordinates_far_outside_are_safe(backend, dtype, float_bins):
    """Beyond int32, and in float64 beyond float32: the whole map, all before it, all behind it, one malformed cell out there."""
    far = np.finfo(dtype).max
    x = distinct((1, 4, 5, 2), 0).astype(dtype)
    rois = np.array([[0, -far, -far, far, far], [0, -far, -far, -far, -far], [0, far, far, far, far], [0, far, far, -far, -far],
                     [0, -3e9, -3e9, 3e9, 3e9], [0, 0, -far, 4, far]], dtype)
    y, argmax, dx = pooled(backend, x, rois, 1, 2, np.ones((6, 1, 1, 2), dtype), float_bins)
    assert_array_equal(y[[0, 4], 0, 0], [x.max((0, 1, 2))] * 2)
    assert_array_equal(y[[1, 2, 3], 0, 0], np.zeros((3, 2)))
    assert_array_equal(argmax[[1, 2, 3]], -1)
    assert_array_equal(y[5, 0, 0], x[0].max((0, 1)))
    assert dx.sum() == 6
    y, argmax, _ = pooled(backend, x, rois, (3, 2), 2, np.ones((6, 3, 2, 2), dtype), float_bins)
    assert (argmax >= -1).all() and (argmax < 20).all() and np.isfinite(y).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_bins_over_a_far_region_do_not_overflow(backend):
    """70000 bins over 2^31 cells: products leave 31 bits, and 32. The region's end is cell 2^30."""
    x = np.ones((1, 2, 1, 1))
    y, argmax, dx = pooled(backend, x, np.array([[0, 0, -1e9, 0, 1e30]]), (70000, 1), 1, np.ones((1, 70000, 1, 1)))
    edges = bin_edges(-10**9, 2**30, 70000, 2)
    assert_array_equal(argmax.ravel(), [first if first < past else -1 for first, past in edges])
    assert (argmax >= 0).sum() == dx.sum() == y.sum() >= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, R", [
    ((2, 4, 5, 3), 0), ((0, 4, 5, 3), 0), ((2, 4, 5, 0), 2), ((1, 0, 5, 3), 2), ((1, 4, 0, 3), 2)])
def test_empty(backend, dtype, shape, R):
    """No RoI, image, channel; a map without a cell has empty bins only."""
    rois = np.zeros((R, 5), dtype)
    y, argmax, dx = pooled(backend, np.ones(shape, dtype), rois, (2, 3), 1 / 16, np.ones((R, 2, 3, shape[3]), dtype))
    assert_array_equal(y, np.zeros((R, 2, 3, shape[3]), dtype), strict=True)
    assert_array_equal(argmax, np.full(y.shape, -1, np.int32), strict=True)
    assert_array_equal(dx, np.zeros(shape, dtype), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_element_and_a_size_for_both_sides(backend):
    y, _, dx = pooled(backend, np.full((1, 1, 1, 1), -3.0), np.zeros((1, 5)), 2, 1, np.full((1, 2, 2, 1), 7.0))
    assert_array_equal(y, np.full((1, 2, 2, 1), -3))
    assert dx.item() == 28


ZERO = np.zeros((1, 5))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "cuda"])
@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((2, 3, 1))), ValueError, r"x must have shape \(N, H, W, C\), got \(2, 3, 1\)"),
    (dict(x=np.zeros((2, 4, 3, 1), int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(x=[1.0]), TypeError, "x must be an array, got list"),
    (dict(x=np.zeros((2, 4, 3, 1), np.float32)), TypeError, "dtypes must agree, got x float32, rois float64"),
    (dict(rois=np.zeros((12, 4))), ValueError, r"rois must have shape \(R, 5\), got \(12, 4\)"),
    (dict(rois=np.zeros((1, 5), int)), TypeError, "rois must be float32 or float64, got int64"),
    *((dict(rois=np.where(np.arange(5) == k, v, ZERO)), ValueError, "rois must be finite, got NaN or infinity")
      for k in (0, 1, 4) for v in (np.nan, np.inf)),
    (dict(rois=ZERO + [2, 0, 0, 0, 0]), ValueError, r"rois\[:, 0\] must be indices of the 2 images, got 2"),
    (dict(rois=ZERO + [-1, 0, 0, 0, 0]), ValueError, r"rois\[:, 0\] must be indices of the 2 images, got -1"),
    (dict(rois=np.array([[0.0] * 5, [0.5] * 5])), ValueError, r"rois\[:, 0\] must be indices of the 2 images, got 0\.5"),
    (dict(x=np.zeros((0, 4, 3, 1))), ValueError, r"rois\[:, 0\] must be indices of the 0 images, got 0"),
    (dict(size=0), ValueError, "size must be at least 1, got 0"),
    (dict(size=(2, 0)), ValueError, "size must be at least 1, got 0"),
    (dict(size=2.0), TypeError, r"size must be an integer, got 2\.0"),
    (dict(size=(1, 2**31)), ValueError, r"size must be below 2\^31, got 2147483648"),
    (dict(size=(1, 2, 3)), ValueError, r"size must be a number or \(PH, PW\), got \(1, 2, 3\)"),
    (dict(scale=0), ValueError, "scale must lie between 1e-30 and 1e30, got 0"),
    (dict(scale=-1), ValueError, "scale must lie between 1e-30 and 1e30, got -1"),
    (dict(scale=np.nan), ValueError, "scale must lie between 1e-30 and 1e30, got nan"),
    (dict(scale=np.inf), ValueError, "scale must lie between 1e-30 and 1e30, got inf"),
    (dict(x=np.broadcast_to(np.zeros(1), (1, 2**16, 2**15, 1))), ValueError,
     r"x must have fewer than 2\^31 cells in a map, got \(1, 65536, 32768, 1\)"),
])
def test_errors(backend, change, error, message):
    with use(backend), pytest.raises(error, match=r"^roi_pool\.forward: " + message):
        roi_pool.forward(**{**dict(x=np.zeros((2, 4, 3, 1)), rois=ZERO, size=2, scale=1 / 16), **change})


@pytest.mark.parametrize("dy, error, message", [
    (np.zeros((1, 4, 4, 1)), ValueError, r"dy must have shape \(1, 2, 2, 1\), got \(1, 4, 4, 1\)"),
    (np.zeros((1, 2, 2, 1), np.float32), TypeError, "dy must be float64, as the result was, got float32"),
])
def test_backward_errors(dy, error, message):
    with pytest.raises(error, match=r"^roi_pool\.backward: " + message):
        roi_pool.backward(dy, roi_pool.forward(np.zeros((1, 4, 4, 1)), ZERO, 2, 1)[1])
