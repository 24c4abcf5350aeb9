import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import max_pool

sizes, strides = st.integers(1, 3), st.sampled_from([None, 1, 2, 3, 4])      # overlapping, touching and with gaps


def by_definition(x, size, stride):
    N, H, W, C = x.shape
    stride = stride or size
    y = np.empty((N, (H - size) // stride + 1, (W - size) // stride + 1, C), x.dtype)
    for n, i, j, c in np.ndindex(y.shape):
        y[n, i, j, c] = max(x[n, i * stride + u, j * stride + v, c] for u in range(size) for v in range(size))
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(min_side=3, max_side=7), size=sizes, stride=strides)
def test_forward_is_the_definition(backend, x, size, stride):
    with use(backend) as put:
        y, _ = max_pool.forward(put(x), size, stride)
    assert_array_equal(to_numpy(y), by_definition(x, size, stride), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(min_side=3, max_side=7), size=sizes, stride=strides)
def test_gradient(backend, x, size, stride):
    with use(backend) as put:
        check_grad(lambda x: max_pool.forward(x, size, stride), max_pool.backward, [x], put=put)


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


@pytest.mark.parametrize("shape, size, stride", [((2, 9, 7, 3), 3, 2), ((1, 5, 5, 1), 5, 1), ((1, 19, 18, 2), 17, 1)])
def test_numba_equals_numpy_exactly(shape, size, stride, all_threads):
    """With ties, transposed, in both dtypes; a window of 17 x 17 has more places than a uint8 holds."""
    for dtype in (np.float64, np.float32)[:1 if size > 16 else 2]:
        x = np.random.default_rng(0).integers(0, 50, shape[::-1]).astype(dtype).T
        x[0, -1, -1, 0] = 99                                # the last place of its window
        results = []
        for backend in ("numpy", "numba"):
            with use(backend):
                y, cache = max_pool.forward(x, size, stride)
                dy = np.random.default_rng(1).integers(-9, 9, y.shape[::-1]).astype(dtype).T
                results.append((y, cache[3], max_pool.backward(dy, cache)))
        for a, b in zip(*results):
            assert_array_equal(a, b, strict=True)
        assert results[0][2].dtype == dtype


@given(x=distinct_NHWC(min_side=3), size=sizes, stride=strides)
def test_gradient_is_conserved_and_stays_on_winners(x, size, stride):
    y, cache = max_pool.forward(x, size, stride)
    dx = max_pool.backward(np.ones(y.shape), cache)
    assert dx.sum() == y.size                               # dropped pixels get nothing, no share is lost
    assert set(x[dx > 0]) == set(y.ravel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_one_element(backend):
    with use(backend) as put:
        y, cache = max_pool.forward(put(np.zeros((0, 4, 5, 2))), 2)
        assert y.shape == (0, 2, 2, 2) and max_pool.backward(y, cache).shape == (0, 4, 5, 2)
        y, cache = max_pool.forward(put(np.full((1, 1, 1, 1), -3.0)), 1)
        assert to_numpy(y).item() == -3 and to_numpy(max_pool.backward(y, cache)).item() == -3


@pytest.mark.parametrize("x, size, stride, error, message", [
    (np.zeros((1, 2, 3, 1)), 3, None, ValueError, r"x \(1, 2, 3, 1\) holds no 3x3 window"),
    (np.zeros((2, 3, 1)), 2, None, ValueError, r"x must have shape \(N, H, W, C\), got \(2, 3, 1\)"),
    (np.zeros((1, 2, 3, 1), int), 2, None, TypeError, "x must be float32 or float64, got int64"),
    (np.zeros((1, 2, 3, 1)), 0, 1, ValueError, "size must be at least 1, got 0"),
    (np.zeros((1, 2, 3, 1)), 2, 0, ValueError, "stride must be at least 1, got 0"),
    (np.zeros((1, 2, 3, 1)), 2.0, 1, TypeError, "size must be an integer, got 2.0"),
])
def test_errors(x, size, stride, error, message):
    with pytest.raises(error, match=r"^max_pool\.forward: " + message):
        max_pool.forward(x, size, stride)


def test_backward_error():
    with pytest.raises(ValueError, match=r"^max_pool\.backward: dy must have shape \(1, 2, 2, 1\), got \(1, 4, 4, 1\)"):
        max_pool.backward(np.zeros((1, 4, 4, 1)), max_pool.forward(distinct((1, 4, 4, 1), 0), 2)[1])
