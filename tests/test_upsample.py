import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import upsample


def by_definition(x, factor, size):
    N, H, W, C = x.shape
    y = np.empty((N, *(size or (factor * H, factor * W)), C))
    for n, i, j, c in np.ndindex(y.shape):
        y[n, i, j, c] = x[n, i // factor, j // factor, c]
    return y


@st.composite
def cases(draw):
    """x, a factor, and a size: None or up to factor - 1 short of the full one, drawn apart for height and width."""
    x, factor = draw(distinct_NHWC(max_side=3)), draw(st.integers(1, 4))
    short = st.integers(0, factor - 1)
    return x, factor, draw(st.sampled_from([None, tuple(factor * s - draw(short) for s in x.shape[1:3])]))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_forward_is_the_definition(backend, case):
    x, factor, size = case
    with use(backend) as put:
        y, _ = upsample.forward(put(x), factor, size)
    assert_array_equal(to_numpy(y), by_definition(x, factor, size), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, case):
    x, factor, size = case
    with use(backend) as put:
        check_grad(lambda x: upsample.forward(x, factor, size), upsample.backward, [x], put=put)


@given(case=cases())
def test_gradient_counts_the_copies_of_a_pixel(case):
    x, factor, size = case
    y, cache = upsample.forward(x, factor, size)
    dx = upsample.backward(np.ones(y.shape), cache)
    assert dx.sum() == y.size
    assert (dx[:, :-1, :-1] == factor ** 2).all() and (dx > 0).all()


def test_the_top_down_path_meets_a_map_of_odd_side():
    x = np.array([[1.0, 2], [3, 4]]).reshape(1, 2, 2, 1)
    y, cache = upsample.forward(x, size=(3, 4))
    assert_array_equal(y[0, :, :, 0], [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]])
    assert_array_equal(upsample.backward(np.ones(y.shape), cache)[0, :, :, 0], [[4, 4], [2, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(11, 7), (12, 9)])
def test_float32_and_transposed(backend, size):
    x = distinct((2, 3, 4, 1), 0)
    with use(backend) as put:
        y, cache = upsample.forward(put(x.T), 3, size)
        y32, cache32 = upsample.forward(put(x.T.astype(np.float32)), 3, list(size))
        dy = distinct(y.shape[::-1], 1).T
        kept = dy.copy()
        dx, dx32 = to_numpy(upsample.backward(put(dy), cache)), to_numpy(upsample.backward(put(dy.astype(np.float32)), cache32))
    assert_array_equal(to_numpy(y), by_definition(x.T, 3, size))
    assert_array_equal(to_numpy(y32), to_numpy(y).astype(np.float32), strict=True)
    assert_array_equal(dx32, dx.astype(np.float32), strict=True)
    assert_array_equal(dy, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_one_element(backend):
    with use(backend) as put:
        for shape in ((0, 3, 2, 1), (2, 0, 2, 1), (2, 3, 2, 0)):
            y, cache = upsample.forward(put(np.zeros(shape)))
            assert y.shape == (shape[0], 2 * shape[1], 4, shape[3]) and upsample.backward(y, cache).shape == shape
        y, cache = upsample.forward(put(np.full((1, 1, 1, 1), -3.0)), 1)
        assert to_numpy(y).item() == -3 and to_numpy(upsample.backward(y, cache)).item() == -3


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((3, 2, 1))), ValueError, r"x must have shape \(N, H, W, C\), got \(3, 2, 1\)"),
    (dict(x=np.zeros((1, 3, 2, 1), np.uint8)), TypeError, "x must be float32 or float64, got uint8"),
    (dict(factor=0), ValueError, "factor must be at least 1, got 0"),
    (dict(factor=1.5), TypeError, "factor must be an integer, got 1.5"),
    (dict(size=[6, 5]), ValueError, r"size must be \(6, 4\) or up to 1 less in each, got \(6, 5\)"),
    (dict(size=(4, 4)), ValueError, r"size must be \(6, 4\) or up to 1 less in each, got \(4, 4\)"),
    (dict(size=(9, 3), factor=3), ValueError, r"size must be \(9, 6\) or up to 2 less in each, got \(9, 3\)"),
    (dict(size=(3.5, 4)), TypeError, "size must be an integer, got 3.5"),
    (dict(size=(-1, 4)), ValueError, "size must be at least 0, got -1"),
    (dict(size=5), ValueError, r"size must be \(6, 4\) or up to 1 less in each, got \(5,\)"),
    (dict(size=(6, 4, 1)), ValueError, r"size must be \(6, 4\) or up to 1 less in each, got \(6, 4, 1\)"),
])
def test_forward_errors(change, error, message):
    with pytest.raises(error, match=r"^upsample\.forward: " + message):
        upsample.forward(**{**dict(x=np.zeros((1, 3, 2, 1))), **change})


def test_backward_errors():
    y, cache = upsample.forward(np.zeros((1, 3, 2, 1)), 2, (5, 4))
    with pytest.raises(ValueError, match=r"^upsample\.backward: dy must have shape \(1, 5, 4, 1\), got \(1, 6, 4, 1\)"):
        upsample.backward(np.zeros((1, 6, 4, 1)), cache)
    with pytest.raises(TypeError, match=r"^upsample\.backward: dy must be float32 or float64, got int64"):
        upsample.backward(y.astype(int), cache)
