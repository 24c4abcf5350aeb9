import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import conv


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
        for backend in BACKENDS:
            with use(backend) as put:
                y, cache = conv.forward(put(x), put(w), put(b), *how)
                dy = random((N, y.shape[2], y.shape[1], 4), dtype=dtype, seed=1)[0].transpose(0, 2, 1, 3)
                results.append([to_numpy(a) for a in (y, *conv.backward(put(dy), cache))])
        for a, b in zip(*results):
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
