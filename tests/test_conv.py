import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import cuda, emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import conv, relu

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]


def by_definition(x, w, b, stride=1, pad=0, dilation=1):
    (N, H, W, C), (kh, kw, _, Cout) = x.shape, w.shape
    top, bottom, left, right = pad if isinstance(pad, tuple) else [pad] * 4
    oh = (H + top + bottom - dilation * (kh - 1) - 1) // stride + 1
    ow = (W + left + right - dilation * (kw - 1) - 1) // stride + 1
    y = np.empty((N, oh, ow, Cout))
    for n, i, j, o in np.ndindex(y.shape):
        y[n, i, j, o] = b[o]
        for u, v, c in np.ndindex(kh, kw, C):
            row, col = i * stride + u * dilation - top, j * stride + v * dilation - left
            if 0 <= row < H and 0 <= col < W:
                y[n, i, j, o] += x[n, row, col, c] * w[u, v, c, o]
    return y


@st.composite
def cases(draw):
    """x, w, b and (stride, pad, dilation) with at least one complete window, sides and kernels drawn apart."""
    N, H, W, C, kh, kw, Cout = (draw(st.integers(1, m)) for m in (2, 5, 5, 2, 3, 3, 2))
    stride, dilation, sides = draw(st.integers(1, 3)), draw(st.integers(1, 2)), tuple(draw(st.integers(0, 2)) for _ in range(4))
    pad = draw(st.sampled_from([sides[0], sides, sides]))                   # one number, or every side its own
    top, bottom, left, right = pad if isinstance(pad, tuple) else [pad] * 4
    assume(H + top + bottom > dilation * (kh - 1) and W + left + right > dilation * (kw - 1))
    rng = np.random.default_rng(draw(seeds))
    return [rng.standard_normal(s) for s in ((N, H, W, C), (kh, kw, C, Cout), (Cout,))], (stride, pad, dilation)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_forward_is_the_definition(backend, case):
    arrays, how = case
    with use(backend) as put:
        y, _ = conv.forward(*map(put, arrays), *how)
    assert_allclose(to_numpy(y), by_definition(*arrays, *how), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, case):
    arrays, how = case
    with use(backend) as put:
        check_grad(lambda x, w, b: conv.forward(x, w, b, *how), conv.backward, arrays, put=put)


def random(*shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def test_the_head_of_the_1d_example():
    """Notes 3.6: w = (1, -1, 2, 0, 1) on the pooled map of each offset, and dilated by 3 on all of them."""
    w, b = np.array([1.0, -1, 2, 0, 1]).reshape(5, 1, 1, 1), np.zeros(1)
    for pooled, head in (([18, 16, 14, 19, 17, 15], [47, 55]), ([18, 16, 12, 19, 17, 13], [43, 55]), ([18, 14, 12, 19, 15, 13], [43, 53])):
        assert_array_equal(conv.forward(np.reshape(pooled, (1, 6, 1, 1)) * 1.0, w, b)[0].ravel(), head)
    s = np.array([18.0, 18, 18, 16, 16, 14, 14, 12, 12, 19, 19, 19, 17, 17, 15, 15, 13, 13]).reshape(1, 18, 1, 1)
    assert_array_equal(conv.forward(s, w, b, dilation=3)[0].ravel(), [47, 43, 43, 55, 55, 53])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [0, (1, 0, 0, 0), (0, 0, 0, 1)])
def test_a_1x1_kernel_takes_a_short_way_and_its_neighbours_do_not(backend, kernel, stride, pad):
    arrays = random((2, 4, 4, 2), (*kernel, 2, 3), (3,))
    with use(backend) as put:
        y, _ = conv.forward(*map(put, arrays), stride, pad)
        assert_allclose(to_numpy(y), by_definition(*arrays, stride, pad), rtol=1e-12, atol=1e-12)
        check_grad(lambda x, w, b: conv.forward(x, w, b, stride, pad), conv.backward, arrays, put=put)


def test_fully_connected_as_convolution_of_the_notes():
    """Oquab notes 7, fixture 2: image (2, 4, 5) and kernels (2, 2, 3, 3), both channels-first there."""
    c, i, j = np.indices((2, 4, 5))
    x = ((20 * c + 5 * i + j) / 10).transpose(1, 2, 0)[None]
    o, c, i, j = np.indices((2, 2, 3, 3))
    y, _ = conv.forward(x, (((o + 1) * (c + 1) + i - j) / 10).transpose(2, 3, 1, 0), np.array([0.5, -0.5]))
    assert_allclose(y[0, :, :, 0], [[6.20, 6.47, 6.74], [7.55, 7.82, 8.09]], rtol=1e-12)
    assert_allclose(y[0, :, :, 1], [[10.42, 10.96, 11.50], [13.12, 13.66, 14.20]], rtol=1e-12)


@pytest.mark.parametrize("side, kernel, stride, pad, out", [(224, 11, 4, (2, 1, 2, 1), 55), (250, 11, 4, (2, 1, 2, 1), 61),
                                                            (27, 5, 1, 2, 27), (13, 3, 1, 1, 13), (6, 6, 1, 0, 1)])
def test_map_sizes_of_the_layer_table_of_the_notes(side, kernel, stride, pad, out):
    assert conv.forward(*random((1, side, side, 1), (kernel, kernel, 1, 1), (1,)), stride, pad)[0].shape == (1, out, out, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2])
def test_padding_wider_than_the_kernel(backend, size):
    """Windows that lie in the padding give the bias and no gradient."""
    x, w, b = random((1, 2, 3, 2), (size, size, 2, 3), (3,))
    with use(backend) as put:
        y, cache = conv.forward(put(x), put(w), put(b), 1, (4, 3, 0, 5))
        inside, _ = conv.forward(put(x), put(w), put(b), 1, (size - 1, size - 1, 0, size - 1))
        dy = np.zeros(y.shape)
        dy[:, :4 - size + 1] = dy[:, 6:] = dy[:, :, 3:] = 1
        dx, dw, db = map(to_numpy, conv.backward(put(dy), cache))
    y = to_numpy(y)
    assert y.shape == (1, 10 - size, 9 - size, 3)
    assert_array_equal(y[dy > 0], np.broadcast_to(b, y.shape)[dy > 0])
    assert_allclose(y[:, 5 - size:6, :3], to_numpy(inside), rtol=1e-12)
    assert_array_equal(dx, np.zeros(x.shape))
    assert_array_equal(dw, np.zeros(w.shape))
    assert_array_equal(db, dy.sum((0, 1, 2)))


@pytest.mark.parametrize("window, kernel, stride, out", [(231, 11, 4, 56), (221, 7, 2, 108), (28, 5, 1, 24), (6, 6, 1, 1)])
def test_map_sizes_of_the_overfeat_tables(window, kernel, stride, out):
    assert conv.forward(*random((1, window, window, 1), (kernel, kernel, 1, 1), (1,)), stride)[0].shape == (1, out, out, 1)


def test_dilation_is_a_kernel_with_zeros_between():
    x, w, b = random((2, 9, 8, 3), (3, 2, 3, 4), (4,))
    wide = np.zeros((5, 3, 3, 4))
    wide[::2, ::2] = w
    assert_allclose(conv.forward(x, w, b, 1, 1, 2)[0], conv.forward(x, wide, b, 1, 1)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape, kernel, how", [
    ((3, 9, 7, 5), 3, (2, 1, 1)), ((2, 6, 8, 3), 1, (1, 0, 1)), ((2, 6, 8, 3), 1, (2, 0, 1)),
    ((3, 7, 8, 2), 3, (2, (2, 1, 0, 3), 2)), ((2, 6, 8, 3), 1, (1, (0, 0, 0, 1), 1)), ((2, 5, 9, 8), 3, (1, 1, 1)),
])
def test_backends_agree_also_in_float32_and_transposed(shape, kernel, how, all_threads):
    N, H, W, C = shape
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        x, w, b = random((N, W, H, C), (4, C, kernel, kernel), (4,), dtype=dtype)
        x, w = x.transpose(0, 2, 1, 3), w.transpose(2, 3, 1, 0)
        results = []
        for backend in RUNNING:
            with use(backend) as put:
                y, cache = conv.forward(put(x), put(w), put(b), *how)
                dy = random((N, y.shape[2], y.shape[1], 4), dtype=dtype, seed=1)[0].transpose(0, 2, 1, 3)
                results.append([to_numpy(a) for a in (y, *conv.backward(put(dy), cache))])
        for found in results[1:]:
            for a, b in zip(results[0], found, strict=True):
                assert a.dtype == b.dtype == dtype
                assert_allclose(a, b, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size, pad", [(1, 0), (3, 1), (1, (0, 1, 0, 0))])
def test_a_gradient_that_is_not_needed_is_none_and_leaves_the_others(backend, size, pad):
    x, w, b = random((2, 4, 5, 2), (size, size, 2, 3), (3,))
    with use(backend) as put:
        y, cache = conv.forward(put(x), put(w), put(b), 1, pad)
        dy = put(random(y.shape, seed=1)[0])
        full = [to_numpy(a) for a in conv.backward(dy, cache)]
        for need_dx, need_dw in ((True, False), (False, True), (False, False)):
            for a, whole, needed in zip(conv.backward(dy, cache, need_dx, need_dw), full, (need_dx, need_dw, need_dw)):
                if needed:
                    assert_array_equal(to_numpy(a), whole)
                else:
                    assert a is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 3])
def test_empty_batch_and_no_input_gradient(backend, size):
    x, w, b = random((0, 4, 5, 2), (size, size, 2, 3), (3,))
    with use(backend) as put:
        y, cache = conv.forward(put(x), put(w), put(b))
        dx, dw, db = conv.backward(y, cache)
        assert conv.backward(y, cache, need_dx=False)[0] is None
    assert y.shape == (0, 5 - size, 6 - size, 3) and dx.shape == x.shape
    assert_array_equal(to_numpy(dw), np.zeros(w.shape))
    assert_array_equal(to_numpy(db), np.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_windows_that_read_it_and_no_other(backend):
    x, w, b = random((1, 5, 5, 1), (3, 3, 1, 2), (2,))
    x[0, 0, 4, 0] = np.nan
    with use(backend) as put, conv.exact():
        y, _ = conv.forward(put(x), put(w), put(b))
    assert_array_equal(np.isnan(to_numpy(y))[0, :, :, 1], [[0, 0, 1], [0, 0, 0], [0, 0, 0]])


def test_winograd_spreads_nan_over_the_tiles_that_read_it_and_no_further():
    x, w, b = random((2, 14, 14, 1), (3, 3, 1, 2), (2,))
    x[0, 5, 7, 0] = np.nan                                          # read by output rows 3 to 5 and columns 5 to 7: tiles (0 and 1, 1)
    y = conv.forward(x, w, b)[0]
    assert np.isnan(y[0, 3:6, 5:8]).all()
    y[0, :8, 4:8] = 0
    assert np.isfinite(y).all()


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((4, 4, 2))), ValueError, r"x must have shape \(N, H, W, C\), got \(4, 4, 2\)"),
    (dict(x=[[1.0]]), TypeError, "x must be an array, got list"),
    (dict(x=np.zeros((1, 4, 4, 2), int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(w=np.zeros((3, 3, 1, 3))), ValueError, r"w must have shape \(kh, kw, 2, Cout\), got \(3, 3, 1, 3\)"),
    (dict(w=np.zeros((0, 3, 2, 3))), ValueError, "kh must be at least 1, got 0"),
    (dict(w=np.zeros((3, 3, 2, 0)), b=np.zeros(0)), ValueError, "Cout must be at least 1, got 0"),
    (dict(b=np.zeros(2)), ValueError, r"b must have shape \(3,\), got \(2,\)"),
    (dict(b=np.zeros(3, np.float32)), TypeError, "dtypes must agree, got x float64, w float64, b float32"),
    (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    (dict(stride=2**31), ValueError, r"stride must be below 2\^31, got 2147483648"),
    (dict(pad=2**31), ValueError, r"pad must be below 2\^31, got 2147483648"),
    (dict(stride=1.5), TypeError, "stride must be an integer, got 1.5"),
    (dict(pad=-1), ValueError, "pad must be at least 0, got -1"),
    (dict(pad=(1, 1)), ValueError, r"pad must be a number or \(top, bottom, left, right\), got \(1, 1\)"),
    (dict(pad=(1, 1, 1, 0.5)), TypeError, "pad must be an integer, got 0.5"),
    (dict(pad=(0, 0, 1, 0), dilation=2), ValueError, r"x \(1, 4, 4, 2\) with pad \(0, 0, 1, 0\) holds no window of w"),
    (dict(dilation=2), ValueError, r"x \(1, 4, 4, 2\) with pad \(0, 0, 0, 0\) holds no window of w \(3, 3, 2, 3\) with dilation 2"),
])
def test_forward_errors(change, error, message):
    with pytest.raises(error, match=r"^conv\.forward: " + message):
        conv.forward(**{**dict(x=np.zeros((1, 4, 4, 2)), w=np.zeros((3, 3, 2, 3)), b=np.zeros(3)), **change})


def test_backward_errors():
    y, cache = conv.forward(*random((1, 4, 4, 2), (3, 3, 2, 3), (3,)))
    with pytest.raises(ValueError, match=r"^conv\.backward: dy must have shape \(1, 2, 2, 3\), got \(1, 2, 1, 3\)"):
        conv.backward(y[:, :, :1], cache)
    with pytest.raises(TypeError, match=r"^conv\.backward: dtypes must agree, got x float64, dy float32"):
        conv.backward(y.astype(np.float32), cache)


@pytest.mark.parametrize("kernel, how, way", [
    ((3, 3), (1, 1, 1), "winograd"), ((4, 4), (1, 0, 1), "winograd"), ((5, 5), (1, 0, 1), "winograd"), ((7, 7), (1, (1, 2, 0, 1), 1), "winograd"),
    ((3, 3), (2, 1, 1), "direct"), ((3, 3), (1, 1, 2), "direct"), ((3, 5), (1, 1, 1), "direct"), ((2, 2), (1, 0, 1), "direct"),
    ((1, 1), (1, 0, 1), "blas"), ((1, 1), (2, 0, 1), "direct"), ((1, 1), (1, (0, 1, 0, 0), 1), "direct"),
    ((11, 12), (1, 0, 1), "direct"), ((12, 12), (1, 0, 1), "blas"),     # 4 and 2 windows, 3 outputs
])
def test_which_way_serves_which_shape(kernel, how, way):
    x, w, _ = random((1, 12, 13, 2), (*kernel, 2, 3), (3,))
    stride, pad, dilation = how
    assert conv.method(x, w, stride, pad if isinstance(pad, tuple) else (pad,) * 4, dilation) == way
    with conv.exact():
        assert conv.method(x, w, stride, pad if isinstance(pad, tuple) else (pad,) * 4, dilation) == way.replace("winograd", "direct")


def test_exact_has_the_error_of_a_plain_sum_and_ends_with_its_block():
    """Ones of both signs: every product and every partial sum is an integer, so only Winograd's fractions round."""
    rng = np.random.default_rng(0)
    x, w, b = (rng.choice([-1, 1], s).astype(np.float32) for s in ((2, 13, 11, 40), (3, 3, 40, 20), (20,)))
    with use("numpy"):
        expected, cache = conv.forward(x, w, b, 1, 1)
        gradients = conv.backward(np.sign(expected) + 1, cache)
    with conv.exact():
        y, cache = conv.forward(x, w, b, 1, 1)
        assert_array_equal(y, expected)
        for a, e in zip(conv.backward(np.sign(expected) + 1, cache), gradients):
            assert_array_equal(a, e)
    assert (conv.forward(x, w, b, 1, 1)[0] != expected).any()
    with pytest.raises(KeyError), conv.exact():
        raise KeyError
    assert conv.method(x, w, 1, (1, 1, 1, 1), 1) == "winograd"


@pytest.mark.parametrize("size, Cout, rows, way", [(3, 9, 8, "winograd"), (3, 9, 7, "direct"), (5, 9, 8, "winograd"), (5, 9, 7, "direct"),
                                                   (3, 72, 8, "winograd"), (5, 73, 9, "blas"), (5, 72, 9, "winograd"), (4, 72, 9, "winograd")])
def test_winograd_needs_windows_that_share_its_filters(size, Cout, rows, way):
    x, w, _ = random((1, size - 1 + 8, size - 1 + rows, 2), (size, size, 2, Cout), (3,))
    assert conv.method(x, w, 1, (0, 0, 0, 0), 1) == way


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side, size, how", [(3, 3, (3, 1, 1)), (3, 3, (2, (1, 0, 1, 0), 1)), (3, 3, (1, 1, 2)), (3, 3, (1, 0, 1)), (3, 3, (2, 0, 1)),
                                             (1, 1, (2, 0, 1)), (2, 1, (2, 0, 1)), (5, 3, (1, 0, 2)), (4, 3, (1, 0, 1)), (4, 4, (3, (0, 1, 2, 1), 1))])
def test_few_windows(backend, side, size, how):
    """Where one product of the unrolled image serves: also of windows that are the whole image, with and without padding."""
    x, w, b = random((2, side, side, 2), (size, size, 2, 20), (20,))
    assert conv.method(x, w, how[0], how[1] if isinstance(how[1], tuple) else (how[1],) * 4, how[2]) == "blas"
    with use(backend) as put:
        y, cache = conv.forward(put(x), put(w), put(b), *how)
        dy = random(y.shape, seed=1)[0]
        found = [to_numpy(a) for a in (y, *conv.backward(put(dy), cache))]
    with use("numpy"):
        y, cache = conv.forward(x, w, b, *how)
    assert_allclose(y, by_definition(x, w, b, *how), atol=1e-12)
    for a, e in zip(found, (y, *conv._backward_numpy(dy, *cache, True, True), dy.sum((0, 1, 2)))):
        assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def test_no_image_is_unrolled_beyond_the_limit(monkeypatch):
    x, w, _ = random((2, 8, 8, 3), (6, 6, 3, 20), (20,))                # 18 windows of 108 numbers
    monkeypatch.setattr(conv, "UNROLLED", 18 * 108)
    assert conv.method(x, w, 1, (0, 0, 0, 0), 1) == "blas"
    monkeypatch.setattr(conv, "UNROLLED", 18 * 108 - 1)
    assert conv.method(x, w, 1, (0, 0, 0, 0), 1) == "direct"


# relu=True

RELU = [((2, 6, 5, 3), (1, 1, 3, 4), (1, 0, 1)), ((2, 9, 8, 3), (3, 3, 3, 4), (1, 1, 1)), ((2, 9, 8, 3), (3, 2, 3, 5), (2, 1, 2)),
        ((1, 4, 4, 2), (4, 4, 2, 20), (1, 0, 1)), ((0, 4, 4, 2), (3, 3, 2, 3), (1, 0, 1))]      # Numba: blas, winograd, direct, blas


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, kernel, how", RELU)
def test_relu_is_the_op_behind_the_convolution_to_the_bit(backend, shape, kernel, how, dtype):
    arrays = random(shape, kernel, kernel[3:], dtype=dtype)
    with use(backend) as put:
        plain, cache = conv.forward(*map(put, arrays), *how)
        expected, positive = relu.forward(plain)
        dy = put(random(plain.shape, dtype=dtype, seed=1)[0])
        gradients = conv.backward(relu.backward(dy, positive), cache)
        y, cache = conv.forward(*map(put, arrays), *how, relu=True)
        found = conv.backward(dy, cache)
    assert y.size == 0 or (0 < (to_numpy(y) > 0).mean() < 1)
    for a, e in zip((y, *found), (expected, *gradients), strict=True):
        assert_array_equal(to_numpy(a), to_numpy(e), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, kernel, how", RELU[1:4])
def test_gradient_through_relu(backend, shape, kernel, how):
    for seed in range(100):
        arrays = random((1, *shape[1:3], 1), (*kernel[:2], 1, 2), (2,), seed=seed)
        if abs(conv.forward(*arrays, *how)[0]).min() > 1e-3:            # off the kink
            break
    with use(backend) as put:
        check_grad(lambda x, w, b: conv.forward(x, w, b, *how, relu=True), conv.backward, arrays, put=put)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_relu_keeps_nan_and_the_kink_passes_no_gradient(backend, size):
    x, w = np.zeros((1, 12, 12, 1)), np.ones((size, size, 1, 1))
    x[0, 1, 1], x[0, 9, 9], x[0, 9, 1] = np.nan, 2, -2
    with use(backend) as put, conv.exact():
        y, cache = conv.forward(put(x), put(w), put(np.zeros(1)), relu=True)
        dx, dw, db = map(to_numpy, conv.backward(put(np.full(y.shape, 3.0)), cache))
    y = to_numpy(y)[0, :, :, 0]
    assert_array_equal(np.isnan(y).nonzero(), np.isnan(by_definition(x, w, np.zeros(1))[0, :, :, 0]).nonzero())
    assert np.isnan(y).sum() == min(4, size * size) and (y == 2).sum() == size * size and (np.nan_to_num(y) < 0).sum() == 0
    assert db == 3 * size * size
    assert_array_equal(dx[0, 9 - size + 1:9 + size, 9 - size + 1:9 + size].ravel() > 0, True)
    assert dx.sum() == 3 * size ** 4 and np.isfinite(dx).all()


def test_the_cache_grows_with_relu_only():
    arrays = random((1, 3, 3, 1), (2, 2, 1, 1), (1,))
    assert len(conv.forward(*arrays)[1]) == 5
    y, cache = conv.forward(*arrays, relu=True)
    assert cache[5] is y


# Every backend, and every variant of the kernels, against the reference in float64

def distance(a, b):
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


def check(backend, shape, kernel, how, dtype, bound):
    """y, dx, dw and db of random arrays against the NumPy backend in float64."""
    arrays = random(shape, kernel, kernel[3:], dtype=dtype)
    with use("numpy"):
        y, cache = conv.forward(*(a.astype(np.float64) for a in arrays), *how)
        dy = random(y.shape, dtype=dtype, seed=1)[0]
        expected = y, *conv.backward(dy.astype(np.float64), cache)
    with use(backend) as put, conv.exact():
        y, cache = conv.forward(*map(put, arrays), *how)
        found = y, *conv.backward(put(dy), cache)
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype and distance(a, e) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, kernel, how", [
    ((2, 7, 5, 3), (1, 1, 3, 5), (1, 0, 1)), ((2, 7, 6, 3), (1, 1, 3, 5), (2, 0, 1)), ((1, 7, 7, 1), (1, 1, 1, 1), (3, (0, 1, 2, 0), 1)),
    ((1, 12, 14, 1), (7, 9, 1, 65), (1, (3, 2, 0, 4), 1)), ((1, 9, 9, 11), (3, 3, 11, 1), (1, 1, 1)),
    ((2, 13, 11, 3), (3, 2, 3, 5), (3, (2, 1, 0, 3), 2)), ((1, 13, 11, 4), (3, 3, 4, 8), (2, 2, 2)), ((1, 14, 11, 2), (2, 3, 2, 3), (2, 3, 3)),
    ((2, 7, 7, 55), (3, 3, 55, 4), (1, 0, 1)), ((1, 4, 6, 3), (4, 6, 3, 7), (1, 0, 1)), ((1, 2, 2, 3), (3, 3, 3, 4), (5, (3, 2, 4, 1), 1)),
    ((2, 30, 29, 3), (11, 11, 3, 8), (4, (2, 1, 2, 1), 1)), ((1, 1, 300, 1), (1, 3, 1, 2), (1, 0, 1)), ((1, 0, 2, 3), (2, 2, 3, 4), (1, 2, 1)),
])
@pytest.mark.parametrize("dtype, bound", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_shapes(backend, shape, kernel, how, dtype, bound):
    check(backend, shape, kernel, how, dtype, bound)


VARIANTS = [(cuda.DTYPES[v["real"]], int(v["BM"]), int(v["BN"]), int(v["VEC"])) for v in cuda.variants(cuda.source("conv.cu"))]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype, BM, BN, VEC, C, Cout, how, parts", [
    (*variant, C, *rest) for variant in VARIANTS for C, *rest in [
        (12, 132, (1, (1, 1, 2, 2), 1), 1), (12, 132, (1, (2, 2, 4, 4), 2), 1), (8, 68, (2, (1, 0, 2, 1), 1), 3),
        (5, 67, (1, (1, 1, 2, 2), 1), 7), (5, 67, (3, (2, 2, 1, 4), 2), 7)] if C % variant[3] == 0])
def test_every_tile_with_ragged_borders(backend, dtype, BM, BN, VEC, C, Cout, how, parts, monkeypatch):
    """Windows, channels, and weights of an output are no multiple of any tile; sums over windows in one part and in 3 and 7 of odd length."""
    monkeypatch.setattr(conv, "_tile", lambda *_: ((BM, BN, VEC), parts))
    check(backend, (2, 7, 11, C), (3, 5, C, Cout), how, dtype, 1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("windows, parts", [(1, 1), (7, 1), (7, 7), (7, 5), (8, 3), (9, 4), (63, 2), (65, 64)])
def test_weight_gradients_in_parts(backend, windows, parts, monkeypatch):
    monkeypatch.setattr(conv, "_tile", lambda *_: ((32, 32, 1), parts))
    check(backend, (1, windows, 1, 3), (1, 1, 3, 5), (1, 0, 1), np.float64, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 511, 512, 1023, 1024, 1537])
@pytest.mark.parametrize("Cout", [1, 31, 33, 64])
def test_column_sums_keep_their_digits(backend, rows, Cout):
    dy = random((rows, 1, 1, Cout), dtype=np.float32)[0] + np.float32(30)
    with use(backend) as put:
        _, cache = conv.forward(*(put(np.zeros(s, np.float32)) for s in ((rows, 1, 1, 1), (1, 1, 1, Cout), (Cout,))))
        db = to_numpy(conv.backward(put(dy), cache, need_dx=False)[2])
    assert db.dtype == np.float32
    assert_allclose(db, dy.sum((0, 1, 2), np.float64), rtol=2e-6)


@pytest.mark.parametrize("tile", [(32, 32, 1), (64, 64, 4)])
def test_no_bit_depends_on_the_order_of_threads(tile, monkeypatch):
    if "emulated" not in RUNNING:
        pytest.skip("needs the emulator")
    monkeypatch.setattr(conv, "_tile", lambda *_: (tile, 3))
    x, w, b = random((2, 7, 9, 8), (3, 3, 8, 36), (36,), dtype=np.float32)
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with use("emulated"), emulate.options(order=order, seed=seed):
            y, cache = conv.forward(x, w, b, 2, 1)
            results.append((y, *conv.backward(random(y.shape, dtype=np.float32, seed=1)[0], cache)))
    for found in results[1:]:
        for a, e in zip(found, results[0], strict=True):
            assert_array_equal(a, e)


@pytest.mark.parametrize("backend", KERNELS)
def test_numbers_at_odd_addresses_are_read_one_by_one(backend):
    x, w, b = random((1, 5, 6, 4), (3, 3, 4, 8), (8,), dtype=np.float32)
    with use(backend) as put:
        odd = put(np.zeros(x.size + 1, np.float32))
        odd[1:] = put(x).ravel()
        odd = odd[1:].reshape(x.shape)
        assert conv._tile(30, 8, 0, odd, put(w))[0][2] == 1 and conv._tile(30, 8, 0, put(x), put(w))[0][2] == 4
        assert conv._tile(30, 8, 0, put(x), put(w[..., :7]))[0][2] == conv._tile(30, 8, 0, put(x.astype(float)))[0][2] == 1
        a, e = (conv.forward(image, put(w), put(b), 1, 1)[0] for image in (odd, put(x)))
        assert distance(a, e) <= 1e-6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("stride, pad", [(2**30, (2**30, 0, 0, 0)), (2**30, (0, 0, 2**29, 0))])
def test_images_beyond_the_kernels_indices_are_refused(backend, stride, pad):
    with use(backend) as put, pytest.raises(ValueError, match=r"^conv\.forward: the padded image must have fewer than 2\^30 rows"):
        conv.forward(*map(put, random((1, 1, 1, 1), (1, 1, 1, 2), (2,))), stride, pad)


# The choice of a tile

def waste(tile, parts, rows, columns, windows, multiprocessors):
    """What best_tile promises to keep, from its words."""
    _, at_a_time, speed = conv.TILES[tile]
    blocks = int(np.ceil(rows / tile[0])) * int(np.ceil(columns / tile[1]))
    rounds = int(np.ceil(blocks * parts / (multiprocessors * at_a_time)))
    kept = speed * (rows * columns) / (blocks * tile[0] * tile[1]) * (blocks * parts) / (rounds * multiprocessors * at_a_time)
    return kept * (windows / (windows + conv.SAVED * parts) if parts > 1 else 1)


@given(rows=st.integers(1, 10**6), columns=st.integers(1, 600), windows=st.integers(0, 10**6), multiprocessors=st.integers(1, 200))
def test_the_best_tile_and_parts_waste_least(rows, columns, windows, multiprocessors):
    tile, parts = conv.best_tile(rows, columns, windows, tuple(conv.TILES), multiprocessors)
    best = waste(tile, parts, rows, columns, windows, multiprocessors)
    most = max(1, min(conv.PARTS, windows, conv.UNROLLED // (rows * columns)))
    assert 1 <= parts <= most
    for other in conv.TILES:
        for p in {1, *(p for p in (2, 3, 7, 50, most) if p <= most)}:
            assert waste(other, p, rows, columns, windows, multiprocessors) <= best * (1 + 1e-9)


@pytest.mark.parametrize("rows, columns, windows, tile, parts", [
    (32 * 56 * 56, 256, 0, (128, 128), 1),      # VGG conv3 at batch 32: 1568 blocks, 264 at a time: 5.94 of 6 rounds
    (32 * 112 * 112, 64, 0, (128, 64), 1),      # 64 channels: half of a wider block would be idle
    (7 * 7, 512, 0, (32, 32), 1),               # few outputs: many small blocks
    (20, 2, 0, (32, 32), 1),
    (9 * 512, 512, 32 * 14 * 14, (128, 128), 11),
])
def test_tiles_of_known_layers(rows, columns, windows, tile, parts):
    assert conv.best_tile(rows, columns, windows, tuple(conv.TILES), 132) == (tile, parts)


def test_tiles_and_kernel_name_the_same_threads():
    """threads = outputs of a block / outputs of a thread, of which kernels/conv.cu says TM x TN."""
    for (BM, BN), (threads, _, _) in conv.TILES.items():
        assert threads == BM * BN // ((8 if BM >= 64 else 4) * (8 if BM * BN >= 8192 else 4))
    assert {v[1:3] for v in VARIANTS} == set(conv.TILES)
