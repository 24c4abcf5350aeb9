import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import conv, linear


def by_definition(x, w, b):
    y = np.empty((len(x), w.shape[1]))
    for r, o in np.ndindex(y.shape):
        y[r, o] = b[o] + sum(x[r, c] * w[c, o] for c in range(len(w)))
    return y


@st.composite
def cases(draw):
    """x, w, b; the number of rows may be 0."""
    R, C, Cout, rng = draw(st.integers(0, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4)), np.random.default_rng(draw(seeds))
    return [rng.standard_normal(s) for s in ((R, C), (C, Cout), (Cout,))]


@pytest.mark.parametrize("backend", BACKENDS)
@given(arrays=cases())
def test_forward_is_the_definition(backend, arrays):
    with use(backend) as put:
        y, _ = linear.forward(*map(put, arrays))
    assert y.dtype == np.float64
    assert_allclose(to_numpy(y), by_definition(*arrays), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(arrays=cases())
def test_gradient(backend, arrays):
    with use(backend) as put:
        check_grad(linear.forward, linear.backward, arrays, put=put)


@given(arrays=cases())
def test_need_dw_false_skips_dw_and_db_and_leaves_dx(arrays):
    y, cache = linear.forward(*arrays)
    dx, dw, db = linear.backward(y, cache, need_dw=False)
    assert dw is None and db is None
    assert_array_equal(dx, linear.backward(y, cache)[0])


@given(arrays=cases())
def test_a_row_is_a_1x1_convolution_of_one_pixel(arrays):
    x, w, b = arrays
    assert_allclose(linear.forward(x, w, b)[0], conv.forward(x[:, None, None], w[None, None], b)[0][:, 0, 0], rtol=1e-12, atol=1e-12)


def test_fully_connected_on_two_windows_of_the_notes():
    """Oquab notes 7, fixture 2: kernels (2, 2, 3, 3) and image (2, 4, 5) channels-first, as a matrix on flattened windows."""
    c, i, j = np.indices((2, 4, 5))
    x = (20 * c + 5 * i + j).transpose(1, 2, 0) / 10
    o, c, i, j = np.indices((2, 2, 3, 3))
    w = (((o + 1) * (c + 1) + i - j) / 10).transpose(2, 3, 1, 0).reshape(-1, 2)
    y, _ = linear.forward(np.stack([x[:3, :3].ravel(), x[1:4, 2:5].ravel()]), w, np.array([0.5, -0.5]))
    assert_allclose(y, [[6.20, 10.42], [8.09, 14.20]], rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_and_transposed(backend):
    rng = np.random.default_rng(0)
    x, w, b, dy = (rng.standard_normal(s) for s in ((4, 7), (3, 4), (3,), (3, 7)))
    with use(backend) as put:
        y, cache = linear.forward(*map(put, (x.T, w.T, b)))
        y32, cache32 = linear.forward(*(put(a.astype(np.float32)) for a in (x.T, w.T, b)))
        wide = [y, *linear.backward(put(dy.T), cache)]
        narrow = [y32, *linear.backward(put(dy.T.astype(np.float32)), cache32)]
    assert_allclose(to_numpy(y), by_definition(x.T, w.T, b), rtol=1e-12)
    for a, a32 in zip(wide, narrow):
        assert a32.dtype == np.float32
        assert_allclose(to_numpy(a32), to_numpy(a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_one_element(backend):
    with use(backend) as put:
        y, cache = linear.forward(put(np.zeros((0, 2))), put(np.ones((2, 3))), put(np.ones(3)))
        dx, dw, db = map(to_numpy, linear.backward(y, cache))
        one, _ = linear.forward(put(np.full((1, 1), 3.0)), put(np.full((1, 1), -2.0)), put(np.ones(1)))
    assert y.shape == (0, 3) and dx.shape == (0, 2) and to_numpy(one).item() == -5
    assert_array_equal(dw, np.zeros((2, 3)))
    assert_array_equal(db, np.zeros(3))


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((1, 4, 2))), ValueError, r"x must have shape \(R, C\), got \(1, 4, 2\)"),
    (dict(x=[[1.0, 2.0]]), TypeError, "x must be an array, got list"),
    (dict(x=np.zeros((4, 2), int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(w=np.zeros((3, 3))), ValueError, r"w must have shape \(2, Cout\), got \(3, 3\)"),
    (dict(w=np.zeros((2, 3), int)), TypeError, "w must be float32 or float64, got int64"),
    (dict(b=np.zeros(2)), ValueError, r"b must have shape \(3,\), got \(2,\)"),
    (dict(b=np.zeros(3, np.float32)), TypeError, "dtypes must agree, got x float64, w float64, b float32"),
    (dict(w=np.zeros((2, 3), np.float32), b=np.zeros(3, np.float32)), TypeError, "dtypes must agree, got x float64, w float32"),
])
def test_forward_errors(change, error, message):
    with pytest.raises(error, match=r"^linear\.forward: " + message):
        linear.forward(**{**dict(x=np.zeros((4, 2)), w=np.zeros((2, 3)), b=np.zeros(3)), **change})


def test_backward_errors():
    y, cache = linear.forward(np.zeros((4, 2)), np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"^linear\.backward: dy must have shape \(4, 3\), got \(4, 1\)"):
        linear.backward(y[:, :1], cache)
    with pytest.raises(TypeError, match=r"^linear\.backward: dtypes must agree, got x float64, dy float32"):
        linear.backward(y.astype(np.float32), cache)
