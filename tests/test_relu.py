import numpy as np
import pytest
from hypothesis import given
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import relu


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC())
def test_forward_is_the_definition(backend, x):
    with use(backend) as put:
        y, _ = relu.forward(put(x))
    assert_array_equal(to_numpy(y), np.reshape([v if v > 0 else 0 for v in x.ravel()], x.shape))


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC())
def test_gradient(backend, x):
    with use(backend) as put:
        check_grad(relu.forward, relu.backward, [x], put=put)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kink_nan_and_dtype(backend):
    x = np.array([-2, -0.0, 0, 3, np.nan, np.inf], np.float32)
    with use(backend) as put:
        y, cache = relu.forward(put(x))
        dx = relu.backward(put(np.ones(6, np.float32)), cache)
    assert_array_equal(to_numpy(y), np.array([0, 0, 0, 3, np.nan, np.inf], np.float32), strict=True)
    assert_array_equal(to_numpy(dx), np.array([0, 0, 0, 1, 0, 1], np.float32), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (1,), (2, 3), (2, 3, 4, 5)])
def test_any_shape_empty_and_transposed(backend, shape):
    x = distinct(shape, 0).T
    with use(backend) as put:
        y, cache = relu.forward(put(x))
        dx = relu.backward(put(x), cache)
    assert_array_equal(to_numpy(y), np.where(x > 0, x, 0))
    assert_array_equal(to_numpy(dx), to_numpy(y))


def test_errors():
    with pytest.raises(TypeError, match=r"^relu\.forward: x must be an array, got list"):
        relu.forward([1.0])
    with pytest.raises(TypeError, match=r"^relu\.forward: x must be float32 or float64, got int64"):
        relu.forward(np.arange(3))
    with pytest.raises(ValueError, match=r"^relu\.backward: dy must have shape \(2,\), got \(1,\)"):
        relu.backward(np.ones(1), relu.forward(np.ones(2))[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient_stops_at_the_kink(backend):
    with use(backend) as put:
        _, cache = relu.forward(put(np.array([-1.0, 0, 2, np.nan])))
        assert_array_equal(to_numpy(relu.backward(put(np.array([np.inf, -np.inf, np.inf, np.nan])), cache)), [0, 0, np.inf, 0])
