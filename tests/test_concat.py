import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import concat


def by_definition(xs, axis):
    shape = list(xs[0].shape)
    shape[axis] = sum(x.shape[axis] for x in xs)
    y, start = np.empty(shape), 0
    for x in xs:
        for at in np.ndindex(x.shape):
            to = list(at)
            to[axis] += start
            y[tuple(to)] = x[at]
        start += x.shape[axis]
    return y


@st.composite
def cases(draw):
    """One to four arrays that differ in length (0 to 3) along an axis, which counts from the front or from the back."""
    ndim, seed = draw(st.integers(1, 4)), draw(seeds)
    axis, shape = draw(st.integers(-ndim, ndim - 1)), draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    return [distinct([*shape[:axis % ndim], n, *shape[axis % ndim + 1:]], seed + k) for k, n in enumerate(lengths)], axis


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_forward_is_the_definition(backend, case):
    xs, axis = case
    with use(backend) as put:
        y, _ = concat.forward(map(put, xs), axis)
    assert_array_equal(to_numpy(y), by_definition(xs, axis), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, case):
    xs, axis = case
    with use(backend) as put:
        check_grad(lambda *xs: concat.forward(xs, axis), concat.backward, xs, put=put)


@given(case=cases())
def test_backward_of_the_result_gives_the_arrays_back_as_views(case):
    xs, axis = case
    y, cache = concat.forward(xs, axis)
    parts = concat.backward(y, cache)
    assert isinstance(parts, list) and len(parts) == len(xs)
    for x, part in zip(xs, parts):
        assert_array_equal(part, x, strict=True)
        assert not np.shares_memory(x, y) and (part.size == 0 or np.shares_memory(part, y))


def test_the_default_axis_is_the_channels():
    a, b = np.zeros((2, 3, 4, 5)), np.zeros((2, 3, 4, 1))
    assert concat.forward([a, b])[0].shape == (2, 3, 4, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_and_transposed(backend):
    a, b = distinct((3, 5), 0), distinct((2, 5), 1)
    with use(backend) as put:
        y, _ = concat.forward((put(a.T), put(b.T)), 1)
        y32, cache32 = concat.forward((put(a.T.astype(np.float32)), put(b.T.astype(np.float32))), 1)
        assert [part.dtype for part in concat.backward(y32, cache32)] == [np.float32] * 2
    assert_array_equal(to_numpy(y), by_definition((a.T, b.T), 1))
    assert_array_equal(to_numpy(y32), to_numpy(y).astype(np.float32), strict=True)


@pytest.mark.parametrize("xs, axis, error, message", [
    ([], -1, ValueError, "xs must hold at least one array, got none"),
    ([np.ones(1), [1.0]], 0, TypeError, r"xs\[1\] must be an array, got list"),
    ([np.ones(1), np.ones(1, int)], 0, TypeError, r"xs\[1\] must be float32 or float64, got int64"),
    ([np.ones(1), np.ones(1, np.float32)], 0, TypeError, r"dtypes must agree, got xs\[0\] float64, xs\[1\] float32"),
    ([np.ones((2, 3))], 2, ValueError, "axis must be below 2, got 2"),
    ([np.ones((2, 3))], -3, ValueError, "axis must be at least -2, got -3"),
    ([np.ones((2, 3))], 1.0, TypeError, "axis must be an integer, got 1.0"),
    ([np.ones((2, 3)), np.ones((3, 3))], -1, ValueError, r"shapes must agree but on axis 1, got \(2, 3\), \(3, 3\)"),
    ([np.ones((2, 3, 4)), np.ones((2, 3, 5))], 1, ValueError, r"shapes must agree but on axis 1, got \(2, 3, 4\), \(2, 3, 5\)"),
    ([np.ones((2, 3)), np.ones(2)], 1, ValueError, r"shapes must agree but on axis 1, got \(2, 3\), \(2,\)"),
])
def test_forward_errors(xs, axis, error, message):
    with pytest.raises(error, match=r"^concat\.forward: " + message):
        concat.forward(xs, axis)


def test_backward_errors():
    _, cache = concat.forward([np.ones((2, 3)), np.ones((2, 1))])
    for dy in (np.ones((2, 5)), np.ones(4)):
        with pytest.raises(ValueError, match=r"^concat\.backward: dy must have shape \(2, 4\), got \(" + str(dy.shape)[1:-1]):
            concat.backward(dy, cache)
    with pytest.raises(TypeError, match=r"^concat\.backward: dy must be an array, got list"):
        concat.backward([1.0], cache)
