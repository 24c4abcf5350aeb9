import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, distinct, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import add


@st.composite
def pairs(draw):
    """Two arrays of one shape, one to four axes, any of them empty."""
    shape, seed = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)), draw(seeds)
    return [distinct(shape, seed), distinct(shape, seed + 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@given(pair=pairs())
def test_forward_is_the_definition(backend, pair):
    with use(backend) as put:
        y, _ = add.forward(*map(put, pair))
    a, b = pair
    assert y.shape == a.shape and y.dtype == a.dtype
    y = to_numpy(y)
    for i in np.ndindex(a.shape):
        assert y[i] == a[i] + b[i]


@pytest.mark.parametrize("backend", BACKENDS)
@given(pair=pairs())
def test_gradient(backend, pair):
    with use(backend) as put:
        check_grad(add.forward, add.backward, pair, put=put)


@given(pair=pairs())
def test_order_is_indifferent_and_backward_copies_nothing(pair):
    y, cache = add.forward(*pair)
    assert_array_equal(add.forward(*pair[::-1])[0], y)
    da, db = add.backward(y, cache)
    assert da is y and db is y


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_and_transposed(backend):
    a, b = distinct((3, 5), 0), distinct((3, 5), 1)
    with use(backend) as put:
        for dtype in (np.float64, np.float32):
            y, _ = add.forward(put(a.T.astype(dtype)), put(b.T.astype(dtype)))
            assert_array_equal(to_numpy(y), (a + b).T.astype(dtype), strict=True)


@pytest.mark.parametrize("a, b, error, message", [
    ([1.0], np.ones(1), TypeError, "a must be an array, got list"),
    (np.ones(1), [1.0], TypeError, "b must be an array, got list"),
    (np.ones(2, int), np.ones(2, int), TypeError, "a must be float32 or float64, got int64"),
    (np.ones((2, 3)), np.ones((2, 1)), ValueError, r"b must have shape \(2, 3\), got \(2, 1\)"),
    (np.ones((2, 3)), np.ones(3), ValueError, r"b must have shape \(2, 3\), got \(3,\)"),
    (np.ones(2), np.ones(2, np.float32), TypeError, "dtypes must agree, got a float64, b float32"),
])
def test_errors(a, b, error, message):
    with pytest.raises(error, match=r"^add\.forward: " + message):
        add.forward(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (3, 2), (add.PART + 1,), (300, 701)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accumulate_adds_in_place(backend, shape, dtype, all_threads):
    a, b = (np.random.default_rng(seed).standard_normal(shape).astype(dtype) for seed in (0, 1))
    expected, kept = a + b, b.copy()
    with use(backend) as put:
        a, b = put(a), put(b)
        add.accumulate(a, b)
        assert_array_equal(to_numpy(a), expected, strict=True)
        wide = put(np.asfortranarray(np.tile(expected[..., None], 2)))
        add.accumulate(wide[..., 0], b)
    assert_array_equal(to_numpy(wide)[..., 0], expected + kept)
    assert_array_equal(to_numpy(wide)[..., 1], expected)
    assert_array_equal(to_numpy(b), kept)


@pytest.mark.parametrize("x, error, message", [(np.ones(1), ValueError, r"x must have shape \(3,\), got \(1,\)"), ([1.0] * 3, TypeError, "x must be an array, got list")])
def test_accumulate_broadcasts_nothing(x, error, message):
    with pytest.raises(error, match=rf"^add\.accumulate: {message}"):
        add.accumulate(np.zeros(3), x)
