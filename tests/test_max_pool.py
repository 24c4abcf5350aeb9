import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import max_pool

sizes, strides = st.integers(1, 4), st.sampled_from([None, 1, 2, 3, 4])      # overlapping, touching and with gaps


def starts(side, size, stride, before, after, ceil):
    """First pixels of the windows along an axis; negative ones lie in the padding before it."""
    at, end = -before, side + after
    while at + size <= end or (ceil and at < side and at - stride + size < end):    # ceil: one more, if a part was not seen yet
        yield at
        at += stride


def by_definition(x, size, stride=None, pad=0, ceil=False):
    (N, H, W, C), stride = x.shape, stride or size
    top, bottom, left, right = pad if isinstance(pad, tuple) else [pad] * 4
    rows, cols = list(starts(H, size, stride, top, bottom, ceil)), list(starts(W, size, stride, left, right, ceil))
    y = np.empty((N, len(rows), len(cols), C), x.dtype)
    for n, i, j, c in np.ndindex(y.shape):
        y[n, i, j, c] = max(x[n, row, col, c] for row in range(max(0, rows[i]), min(H, rows[i] + size))
                            for col in range(max(0, cols[j]), min(W, cols[j] + size)))
    return y


@st.composite
def hows(draw):
    """size, stride, pad (none, all sides alike or four numbers, below size) and ceil."""
    size, side = draw(sizes), st.integers(0, 3)
    pad = draw(st.sampled_from([0, size - 1, tuple(draw(side) % size for _ in range(4))]))
    return size, draw(strides), pad, draw(st.booleans())


def holds_a_window(x, size, stride, pad, ceil):
    return 0 not in by_definition(x[:1, :, :, :1], size, stride, pad, ceil).shape


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(max_side=7), how=hows())
def test_forward_is_the_definition(backend, x, how):
    assume(holds_a_window(x, *how))
    with use(backend) as put:
        y, _ = max_pool.forward(put(x), *how)
    assert_array_equal(to_numpy(y), by_definition(x, *how), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(max_side=7), how=hows())
def test_gradient(backend, x, how):
    assume(holds_a_window(x, *how))
    with use(backend) as put:
        check_grad(lambda x: max_pool.forward(x, *how), max_pool.backward, [x], put=put)


def check_winners(backend, x, size, stride, pad=0, ceil=False):
    """Value, place in the window and gradient equal the definition exactly: the first of the largest, or the first NaN."""
    top, left = (pad[0], pad[2]) if isinstance(pad, tuple) else (pad, pad)
    rng = np.random.default_rng(0)
    with use(backend) as put:
        y, cache = max_pool.forward(put(x), size, stride, pad, ceil)
        dy = rng.integers(-8, 9, y.shape).astype(x.dtype)                   # sums of integers are exact
        dx = max_pool.backward(put(dy), cache)
    best, places, expected = np.empty_like(dy), np.empty(y.shape, int), np.zeros_like(x)
    for n, i, j, c in np.ndindex(y.shape):
        row, col = i * stride - top, j * stride - left
        inside = [(u, v) for u in range(max(0, -row), min(size, x.shape[1] - row)) for v in range(max(0, -col), min(size, x.shape[2] - col))]
        values = np.array([x[n, row + u, col + v, c] for u, v in inside])
        u, v = inside[values.argmax()]
        best[n, i, j, c], places[n, i, j, c] = values.max(), u * size + v
        expected[n, row + u, col + v, c] += dy[n, i, j, c]
    assert_array_equal(to_numpy(y), best, strict=True)
    assert_array_equal(to_numpy(cache[3]), places)
    assert_array_equal(to_numpy(dx), expected, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, sides=st.tuples(st.integers(1, 9), st.integers(1, 7)), N=st.integers(1, 2), C=st.integers(1, 3),
       size=st.integers(1, 4), stride=st.integers(1, 5), pad=st.tuples(*[st.integers(0, 3)] * 4), ceil=st.booleans())
def test_winners_over_ties_infinities_and_nan(backend, dtype, seed, sides, N, C, size, stride, pad, ceil):
    pad = tuple(p % size for p in pad)
    values = np.random.default_rng(seed).choice([-np.inf, -1, 0, 1, 2, np.inf, np.nan], (N, *sides, C), p=[0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.1])
    assume(holds_a_window(values, size, stride, pad, ceil))
    check_winners(backend, values.astype(dtype), size, stride, pad, ceil)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, size, stride", [
    ((1, 1, 1, 1), 1, 1), ((1, 3, 5, 17), 1, 1), ((1, 16, 16, 1), 1, 1), ((1, 1, 257, 1), 1, 1), ((1, 4, 258, 1), 4, 1),
    ((1, 5, 2, 128), 2, 2), ((1, 9, 3, 43), 3, 1), ((3, 11, 14, 11), 3, 2), ((2, 30, 36, 1), 17, 3)])
def test_block_borders_and_wide_indices(backend, shape, size, stride):
    """1, 255, 256, 257 threads along a row and more, heights about the 4 rows of a thread; places above 255."""
    check_winners(backend, np.random.default_rng(0).integers(0, 50, shape).astype(np.float32 if size < 17 else float), size, stride)
    x = np.indices(shape)[1:3].sum(0, dtype=float)                          # the last pixel of each window wins: places reach their end
    check_winners(backend, x, size, stride, size // 2)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("numba",)])       # which would compile for seconds
def test_places_above_65535(backend):
    check_winners(backend, np.indices((1, 301, 2, 1))[1:3].sum(0, dtype=float), 300, 2, (0, 0, 0, 298))


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_threads_changes_no_bit(seed):
    x, results = np.random.default_rng(0).standard_normal((2, 9, 7, 40)).astype(np.float32), []
    for order in ("forward", "random"):
        with use("emulated"), emulate.options(order=order, seed=seed):
            y, cache = max_pool.forward(x, 3, 2, 1)
            results.append((y, cache[3], max_pool.backward(y, cache)))
    for a, b in zip(*results):
        assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_goes_to_the_first_pixel_in_row_order(backend):
    x = np.array([[1.0, 5], [5, 5]]).reshape(1, 2, 2, 1)
    with use(backend) as put:
        y, cache = max_pool.forward(put(x), 2)
        dx = max_pool.backward(put(np.full((1, 1, 1, 1), 7.0)), cache)
    assert_array_equal(to_numpy(dx)[0, :, :, 0], [[0, 7], [0, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [[0], [1], [3], [1, 3], [0, 4]])
def test_the_first_nan_wins_its_window_and_takes_the_gradient(backend, at):
    x = np.array([2.0, 9, 4, 1, 3, 5]).reshape(1, 2, 3, 1)
    x.flat[at] = np.nan                                     # the window is pixels 0, 1, 3, 4
    with use(backend) as put:
        y, cache = max_pool.forward(put(x), 2)
        dx = max_pool.backward(put(np.ones((1, 1, 1, 1))), cache)
    assert np.isnan(to_numpy(y)).all()
    assert_array_equal(to_numpy(dx).ravel(), np.arange(6) == at[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-np.inf, -7.0, np.nan])
@pytest.mark.parametrize("pad, ceil", [(2, False), ((1, 2, 0, 1), True)])
def test_padding_never_wins(backend, value, pad, ceil):
    """Nor where all else is -inf, and the gradient stays in the image, at the first pixel of each window."""
    x = np.full((1, 4, 5, 1), value)
    with use(backend) as put:
        y, cache = max_pool.forward(put(x), 3, 2, pad, ceil)
        dx = to_numpy(max_pool.backward(put(np.ones(y.shape)), cache))
    assert_array_equal(to_numpy(y), np.full(y.shape, value))
    top, left = (2, 2) if pad == 2 else (1, 0)
    expected = np.zeros((4, 5))
    for i, j in np.ndindex(y.shape[1:3]):
        expected[max(0, 2 * i - top), max(0, 2 * j - left)] += 1
    assert_array_equal(dx[0, :, :, 0], expected)


@pytest.mark.parametrize("side, size, stride, before, after, floor, ceil", [
    (6, 2, 2, 0, 0, 3, 3),          # no rest: both agree
    (7, 2, 2, 0, 0, 3, 4),
    (7, 3, 2, 0, 0, 3, 3),
    (8, 3, 2, 0, 0, 3, 4),
    (2, 3, 2, 0, 0, 0, 1),          # smaller than a window
    (4, 3, 2, 1, 1, 2, 3),
    (3, 2, 2, 1, 1, 2, 2),          # ceil alone gives 3, but the third window would begin in the bottom padding
    (3, 3, 3, 1, 1, 1, 2),
    (4, 3, 3, 2, 2, 2, 2),          # again: the third would begin at 6 - 2 = 4
    (5, 3, 3, 2, 2, 3, 3),
    (5, 2, 4, 0, 0, 1, 2),          # windows with gaps
    (5, 1, 5, 0, 0, 1, 1),          # the second would begin at 5
    (112, 3, 2, 0, 0, 55, 56),
    (112, 3, 2, 1, 1, 56, 57),
])
def test_output_sizes_by_hand(side, size, stride, before, after, floor, ceil):
    assert max_pool.output_size(side, size, stride, before, after, False) == floor
    assert max_pool.output_size(side, size, stride, before, after, True) == ceil


@given(x=distinct_NHWC(max_side=7, max_N=1, max_C=1), how=hows())
def test_output_sizes_are_those_of_the_definition_and_every_window_holds_a_pixel(x, how):
    size, stride, pad, ceil = how
    sides = pad if isinstance(pad, tuple) else (pad,) * 4
    for side, (before, after) in zip(x.shape[1:3], (sides[:2], sides[2:])):
        at = list(starts(side, size, stride or size, before, after, ceil))
        assert max(0, max_pool.output_size(side, size, stride or size, before, after, ceil)) == len(at)
        assert all(-size < first < side for first in at)


def alexnet_sides(side, ceil):
    """C1, P1, P2, P5 and score map of Oquab et al. for an image of that side (notes, sec. 1 and 4.1); pools are 3/2."""
    c1 = (side + 3 - 11) // 4 + 1
    p1 = max_pool.output_size(c1, 3, 2, 0, 0, ceil)
    p2 = max_pool.output_size(p1, 3, 2, 0, 0, ceil)
    p5 = max_pool.output_size(p2, 3, 2, 0, 0, ceil)
    return c1, p1, p2, p5, p5 - 5


@pytest.mark.parametrize("side, sides", [
    (224, (55, 27, 13, 6, 1)), (250, (61, 30, 14, 6, 1)), (256, (63, 31, 15, 7, 2)), (287, (70, 34, 16, 7, 2)),
    (288, (71, 35, 17, 8, 3)), (350, (86, 42, 20, 9, 4)), (500, (124, 61, 30, 14, 9)), (700, (174, 86, 42, 20, 15)),
    (1000, (249, 124, 61, 30, 25)), (1024, (255, 127, 63, 31, 26)), (1400, (349, 174, 86, 42, 37)), (2048, (511, 255, 127, 63, 58)),
])
def test_map_sides_of_the_notes(side, sides):
    assert alexnet_sides(side, False) == sides


def test_floor_gives_the_score_map_of_the_notes_and_ceil_does_not():
    assert all(alexnet_sides(side, False)[-1] == (side - 224) // 32 + 1 for side in range(224, 2049))
    assert [alexnet_sides(side, True)[-1] for side in (250, 500)] == [2, 10]


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_kernels_refuse_windows_whose_places_leave_32_bits():
    with use("emulated"), pytest.raises(ValueError, match=r"^max_pool\.forward: on a GPU size must be at most 65536, .* got 65537"):
        max_pool.forward(np.zeros((1, 2, 2, 1)), 65537, 65537, 0, True)


@pytest.mark.parametrize("shape, size, stride, pad, ceil", [
    ((2, 9, 7, 3), 3, 2, 0, False), ((1, 5, 5, 1), 5, 1, 0, False), ((1, 19, 18, 2), 17, 1, 0, False),
    ((2, 9, 8, 3), 3, 2, 1, True), ((2, 5, 9, 2), 4, 3, (3, 0, 1, 2), True), ((3, 6, 5, 1), 4, 2, (0, 3, 2, 1), False),
])
def test_numba_equals_numpy_exactly(shape, size, stride, pad, ceil, all_threads):
    """With ties, transposed, in both dtypes; a window of 17 x 17 has more places than a uint8 holds."""
    for dtype in (np.float64, np.float32)[:1 if size > 16 else 2]:
        x = np.random.default_rng(0).integers(0, 50, shape[::-1]).astype(dtype).T
        x[0, -1, -1, 0] = 99                                # the last place of its window
        results = []
        for backend in ("numpy", "numba"):
            with use(backend):
                y, cache = max_pool.forward(x, size, stride, pad, ceil)
                dy = np.random.default_rng(1).integers(-9, 9, y.shape[::-1]).astype(dtype).T
                results.append((y, cache[3], max_pool.backward(dy, cache)))
        for a, b in zip(*results):
            assert_array_equal(a, b, strict=True)
        assert results[0][2].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_winners_are_kept_in_a_byte_up_to_size_16(backend):
    with use(backend) as put:
        for size, dtype in ((2, np.uint8), (16, np.uint8), (17, np.uint16)):
            assert max_pool.forward(put(np.zeros((1, size, size, 1))), size)[1][3].dtype == dtype


@given(x=distinct_NHWC(), how=hows())
def test_gradient_is_conserved_and_stays_on_winners(x, how):
    assume(holds_a_window(x, *how))
    y, cache = max_pool.forward(x, *how)
    dx = max_pool.backward(np.ones(y.shape), cache)
    assert dx.sum() == y.size                               # dropped pixels get nothing, no share is lost
    assert set(x[dx > 0]) == set(y.ravel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_one_element(backend):
    with use(backend) as put:
        y, cache = max_pool.forward(put(np.zeros((0, 4, 5, 2))), 2)
        assert y.shape == (0, 2, 2, 2) and max_pool.backward(y, cache).shape == (0, 4, 5, 2)
        y, cache = max_pool.forward(put(np.zeros((1, 4, 5, 0))), 2, 1, 1)
        assert y.shape == (1, 5, 6, 0) and max_pool.backward(y, cache).shape == (1, 4, 5, 0)
        y, cache = max_pool.forward(put(np.full((1, 1, 1, 1), -3.0)), 1)
        assert to_numpy(y).item() == -3 and to_numpy(max_pool.backward(y, cache)).item() == -3


@pytest.mark.parametrize("change, error, message", [
    (dict(size=3), ValueError, r"x \(1, 2, 3, 1\) holds no 3x3 window"),
    (dict(size=5, stride=2, ceil=True), ValueError, r"x \(1, 2, 3, 1\) holds no 5x5 window"),
    (dict(x=np.zeros((1, 0, 3, 1)), pad=1), ValueError, r"x \(1, 0, 3, 1\) holds no 2x2 window"),
    (dict(x=np.zeros((1, 3, 0, 1)), pad=1), ValueError, r"x \(1, 3, 0, 1\) holds no 2x2 window"),
    (dict(x=np.zeros((2, 3, 1))), ValueError, r"x must have shape \(N, H, W, C\), got \(2, 3, 1\)"),
    (dict(x=np.zeros((1, 2, 3, 1), int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(size=0, stride=1), ValueError, "size must be at least 1, got 0"),
    (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    (dict(stride=10**20), ValueError, r"stride must be below 2\^31, got 1" + 20 * "0"),
    (dict(size=2.0, stride=1), TypeError, "size must be an integer, got 2.0"),
    (dict(pad=2), ValueError, r"pad must be below the window's size 2, got \(2, 2, 2, 2\)"),
    (dict(pad=(0, 0, 0, 3)), ValueError, r"pad must be below the window's size 2, got \(0, 0, 0, 3\)"),
    (dict(pad=(1, 1)), ValueError, r"pad must be a number or \(top, bottom, left, right\), got \(1, 1\)"),
    (dict(pad=-1), ValueError, "pad must be at least 0, got -1"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^max_pool\.forward: " + message):
        max_pool.forward(**{**dict(x=np.zeros((1, 2, 3, 1)), size=2), **change})


def test_backward_error():
    with pytest.raises(ValueError, match=r"^max_pool\.backward: dy must have shape \(1, 2, 2, 1\), got \(1, 4, 4, 1\)"):
        max_pool.backward(np.zeros((1, 4, 4, 1)), max_pool.forward(distinct((1, 4, 4, 1), 0), 2)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, size, stride, pad", [
    ((1, 1, 1, 1), 3, 1, (1, 1, 0, 2)), ((1, 2, 3, 2), 5, 2, (4, 4, 3, 4)), ((1, 2, 2, 1), 30, 30, (29, 0, 29, 0))])
def test_places_are_counted_in_the_whole_window_also_where_it_leaves_the_image(backend, shape, size, stride, pad):
    check_winners(backend, np.random.default_rng(0).standard_normal(shape), size, stride, pad)


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_kernels_count_places_beyond_31_bits():
    with use("emulated"):
        y, cache = max_pool.forward(np.ones((1, 2, 2, 1)), 50000, 50000, (49999, 0, 49999, 0))
        assert cache[3].tolist() == [[[[50000 * 49999 + 49999]]]] and max_pool.backward(y, cache).ravel().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("backend, size", [("numba", 250)] + [
    pytest.param(*b.values, 20000, marks=[*b.marks, *[pytest.mark.slow] * (b.values == ("numba",))]) for b in BACKENDS])     # slow: compiles
def test_a_window_far_larger_than_the_image(backend, size):
    x = distinct((1, 4, 6, 2), 0)
    with use(backend) as put:
        y, cache = max_pool.forward(put(x), size, size, 0, True)
        assert_array_equal(to_numpy(y)[0, 0, 0], x.max((0, 1, 2)))
        assert_array_equal(to_numpy(max_pool.backward(y, cache)).sum((0, 1, 2)), x.max((0, 1, 2)))
