import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import dropout

rng = np.random.default_rng


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(), p=st.sampled_from([0, 0.25, 0.5, 0.75]), seed=seeds)
def test_every_element_is_dropped_or_scaled_and_the_mask_serves_backward(backend, x, p, seed):
    with use(backend) as put:
        y, cache = dropout.forward(put(x), p, rng(seed))
        dx = to_numpy(dropout.backward(put(x), cache))
    y = to_numpy(y)
    assert_allclose(y, np.where(y == 0, 0, x / (1 - p)), rtol=1e-15)        # x itself is never 0
    assert_array_equal(dx, y)
    assert p > 0 or (y != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(), seed=seeds)
def test_gradient(backend, x, seed):
    with use(backend) as put:
        check_grad(lambda x: dropout.forward(x, 0.3, rng(seed)), dropout.backward, [x], put=put)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p_and_the_mean_stays(p):
    y, _ = dropout.forward(np.ones(100_000), p, rng(0))
    sigma = (p * (1 - p) / y.size) ** 0.5
    assert abs((y == 0).mean() - p) < 4 * sigma and abs(y.mean() - 1) < 4 * sigma / (1 - p)


def test_the_seed_decides_and_the_dtype_does_not():
    x = distinct((3, 40), 0)
    y, _ = dropout.forward(x, 0.5, rng(1))
    assert_array_equal(y, dropout.forward(x, 0.5, rng(1))[0])
    assert (y != dropout.forward(x, 0.5, rng(2))[0]).any()
    assert_array_equal(dropout.forward(x.astype(np.float32), 0.5, rng(1))[0], y.astype(np.float32), strict=True)
    y, cache = dropout.forward(x.astype(np.float32), 0.3, rng(1))
    assert y.dtype == dropout.backward(y, cache).dtype == np.float32
    assert_allclose(y, dropout.forward(x, 0.3, rng(1))[0], rtol=1e-6)


def test_empty_transposed_and_nan():
    assert dropout.forward(np.zeros((0, 3)), 0.5, rng(0))[0].shape == (0, 3)
    x = distinct((4, 5), 0)
    assert_array_equal(dropout.forward(x.T, 0.5, rng(0))[0], dropout.forward(np.ascontiguousarray(x.T), 0.5, rng(0))[0])
    assert np.isnan(dropout.forward(np.full(5, np.nan), 0.5, rng(0))[0]).all()


def test_errors():
    for p in (1, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"^dropout\.forward: p must lie in \[0, 1\), got " + str(p)):
            dropout.forward(np.ones(3), p, rng(0))
    with pytest.raises(TypeError, match=r"^dropout\.forward: x must be an array, got list"):
        dropout.forward([1.0], 0.5, rng(0))
    with pytest.raises(ValueError, match=r"^dropout\.backward: dy must have shape \(3,\), got \(2,\)"):
        dropout.backward(np.ones(2), dropout.forward(np.ones(3), 0.5, rng(0))[1])
