import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, distinct, distinct_NHWC
from tinydet import cuda, emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import lrn


def by_definition(x, size=5, alpha=1e-4, beta=0.75, k=1.0, divide_by_n=True):
    C, y = x.shape[3], np.empty(x.shape)
    for n, i, j, c in np.ndindex(x.shape):
        near = [x[n, i, j, d] ** 2 for d in range(C) if abs(d - c) <= (size - 1) / 2]
        y[n, i, j, c] = x[n, i, j, c] / (k + (alpha / size if divide_by_n else alpha) * sum(near)) ** beta
    return y


inputs = distinct_NHWC(max_side=3, max_C=7)
settings = st.fixed_dictionaries(dict(
    size=st.sampled_from([1, 3, 5, 7, 19]), alpha=st.sampled_from([0, 0.3, 2]), beta=st.sampled_from([0.75, 0.75, 0, 0.5, 1, 1.5]),
    k=st.sampled_from([0.5, 1, 2]), divide_by_n=st.booleans()))


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=inputs, how=settings)
def test_forward_is_the_definition(backend, x, how):
    with use(backend) as put:
        y, _ = lrn.forward(put(x), **how)
        default, _ = lrn.forward(put(100 * x))
    assert_allclose(to_numpy(y), by_definition(x, **how), rtol=1e-12)
    assert_allclose(to_numpy(default), by_definition(100 * x), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=inputs, how=settings)
def test_gradient(backend, x, how):
    with use(backend) as put:
        check_grad(lambda x: lrn.forward(x, **how), lrn.backward, [x / 2], put=put)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how, expected", [
    (dict(alpha=1), [0.3674196, 0.4647362, 0.4653024, 0.4395363, 0.5674354, 0.7362382]),
    (dict(k=2, alpha=1, divide_by_n=False), [0.125, 0.1486509, 0.1446156, 0.134654, 0.1740235, 0.2264284]),
    (dict(), [0.9997901, 1.9991005, 2.9975274, 3.9946085, 4.9935597, 5.9930793]),
])
def test_six_channels_of_the_notes(backend, how, expected):
    """Oquab notes 7, fixture 5: a = (1 .. 6), n = 5, beta 0.75, in both conventions."""
    with use(backend) as put:
        y, _ = lrn.forward(put(np.arange(1.0, 7).reshape(1, 1, 1, 6)), **how)
    assert_allclose(to_numpy(y).ravel(), expected, atol=1e-7)


@given(x=inputs, how=settings)
def test_invariants(x, how):
    y, _ = lrn.forward(x, **how)
    assert_allclose(lrn.forward(-x, **how)[0], -y, rtol=1e-12)                                  # odd
    assert_allclose(lrn.forward(x[..., ::-1], **how)[0], y[..., ::-1], rtol=1e-12)              # the window is symmetric
    scaled, _ = lrn.forward(3 * x, **{**how, "k": 9 * how["k"]})
    assert_allclose(scaled, 3 ** (1 - 2 * how["beta"]) * y, rtol=1e-12)
    a = dict(alpha=how["alpha"] * how["size"], divide_by_n=True)                                # the one convention in the other
    assert_allclose(lrn.forward(x, **{**how, **a})[0], lrn.forward(x, **{**how, "divide_by_n": False})[0], rtol=1e-12)


@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_backends_agree_also_in_float32_and_transposed(beta, all_threads):
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        x = np.random.default_rng(0).standard_normal((9, 4, 5, 3)).astype(dtype).T
        dy = np.random.default_rng(1).standard_normal((9, 4, 5, 3)).astype(dtype).T
        expected = by_definition(x.astype(float), 5, 0.5, beta)
        wide, wide_cache = lrn.forward(x.astype(float), 5, 0.5, beta)
        dexpected = lrn.backward(dy.astype(float), wide_cache)
        for backend in RUNNING:
            with use(backend) as put:
                y, cache = lrn.forward(put(x), 5, *map(np.float64, (0.5, beta, 1)))                         # no promotion
                dx, again = lrn.backward(put(dy), cache), lrn.backward(put(dy), cache)
            assert y.dtype == dx.dtype == cache[1].dtype == dtype
            assert_allclose(to_numpy(y), expected, rtol=tolerance, atol=tolerance)
            assert_allclose(to_numpy(dx), dexpected, rtol=tolerance, atol=tolerance)
            assert_array_equal(to_numpy(again), to_numpy(dx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_channels_whose_window_holds_it_and_no_other(backend):
    x = distinct((1, 1, 2, 6), 0)
    x[0, 0, 1, 1] = np.nan
    with use(backend) as put:
        y, _ = lrn.forward(put(x), 3)
    assert_array_equal(np.isnan(to_numpy(y))[0, 0], [[0] * 6, [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_one_element(backend):
    with use(backend) as put:
        for shape in ((0, 4, 5, 2), (2, 0, 3, 4), (2, 3, 3, 0)):
            y, cache = lrn.forward(put(np.zeros(shape)))
            assert y.shape == lrn.backward(y, cache).shape == shape
        y, cache = lrn.forward(put(np.full((1, 1, 1, 1), 2.0)), 1, 2, 0.5)
        assert_allclose(to_numpy(y).item(), 2 / 3, rtol=1e-15)
        assert_allclose(to_numpy(lrn.backward(put(np.ones((1, 1, 1, 1))), cache)).item(), 1 / 27, rtol=1e-14)     # k / s^1.5


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((2, 3))), ValueError, r"x must have shape \(N, H, W, C\), got \(2, 3\)"),
    (dict(x=np.zeros((1, 2, 2, 3), int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(size=0), ValueError, "size must be at least 1, got 0"),
    (dict(size=5.0), TypeError, "size must be an integer, got 5.0"),
    (dict(size=4), ValueError, "size must be odd, got 4"),
    *[(change, ValueError, "k must be above 0, alpha and beta at least 0, all finite, got k .*, alpha .*, beta ")
      for change in (dict(k=0), dict(k=-1.0), dict(k=np.inf), dict(k=np.nan), dict(alpha=-1), dict(alpha=np.inf), dict(alpha=np.nan),
                     dict(beta=-0.5), dict(beta=np.inf), dict(beta=np.nan))],
    (dict(k=0, alpha=0.5, beta=0.25), ValueError, "k must be above 0, .* got k 0, alpha 0.5, beta 0.25"),
])
def test_forward_errors(change, error, message):
    with pytest.raises(error, match=r"^lrn\.forward: " + message):
        lrn.forward(**{**dict(x=np.zeros((1, 2, 2, 3))), **change})


def test_backward_errors():
    y, cache = lrn.forward(np.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match=r"^lrn\.backward: dy must have shape \(1, 2, 2, 3\), got \(1, 2, 2, 1\)"):
        lrn.backward(y[..., :1], cache)
    with pytest.raises(TypeError, match=r"^lrn\.backward: dtypes must agree, got x float64, dy float32"):
        lrn.backward(y.astype(np.float32), cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_far_wider_than_the_channels_holds_them_all(backend):
    x = distinct((1, 2, 2, 4), 0)
    with use(backend) as put:
        found, expected = (to_numpy(lrn.forward(put(x), size, 0.5, divide_by_n=False)[0]) for size in (10**9 + 1, 9))
    assert_array_equal(found, expected)


def both(backend, x, *how):
    """y and dx of dy = x[..., ::-1]."""
    with use(backend) as put:
        y, cache = lrn.forward(put(x), *how)
        return to_numpy(y), to_numpy(lrn.backward(put(x[..., ::-1]), cache))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("shape, size", [((1, 1, 255, 1), 5), ((2, 8, 8, 2), 5), ((1, 1, 1, 257), 5), ((1, 5, 3, 63), 1), ((1, 3, 2, 86), 9),
                                         ((1, 1, 3, 400), 5), ((1, 2, 1, 400), 701)])
def test_block_borders(backend, shape, size, beta):
    """Pixels that two or three blocks share, and windows wider than a block; float32 against NumPy in float64."""
    x = np.random.default_rng(0).standard_normal(shape)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        for a, b in zip(both(backend, x.astype(dtype), size, 0.5, beta), both("numpy", x, size, 0.5, beta)):
            assert a.dtype == dtype and np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_that_shared_memory_does_not_hold(backend, monkeypatch):
    monkeypatch.setattr(cuda, "PLENTY", 2 ** 11)
    x = distinct((1, 2, 3, 40), 0)
    for a, b in zip(both(backend, x, 71, 0.5), both("numpy", x, 71, 0.5)):
        assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_the_order_of_threads_changes_no_bit():
    x, results = np.random.default_rng(0).standard_normal((2, 5, 3, 33)).astype(np.float32), []
    for order in ("forward", "reverse", "random"):
        with emulate.options(order=order, seed=3):
            results.append(both("emulated", x, 5, 0.5))
    for result in results:
        for a, b in zip(result, results[0]):
            assert_array_equal(a, b, strict=True)


def test_k_must_not_vanish_in_float32():
    with pytest.raises(ValueError, match=r"^lrn\.forward: k must be above 0 in float32 too, got a smaller one"):
        lrn.forward(np.zeros((1, 1, 1, 1), np.float32), k=1e-50)
