import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, to_numpy, use
from tinydet.ops import scan

backends = pytest.mark.parametrize("backend", BACKENDS)
SIZES = [0, 1, 31, 32, 33, 255, 256, 257, 2047, 2048, 2049, 5000]


def run(backend, f, x):
    with use(backend) as put:
        return to_numpy(f(put(x)))


def draw(n, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(-9, 9, n) if np.dtype(dtype).kind == "i" else rng.standard_normal(n)).astype(dtype)


@backends
@given(seed=seeds, n=st.integers(0, 70), dtype=st.sampled_from(scan.DTYPES))
def test_scan_is_the_definition(backend, seed, n, dtype):
    """Small integers, which floats add up exactly."""
    x = np.random.default_rng(seed).integers(-50, 50, n).astype(dtype)
    assert_array_equal(run(backend, scan.inclusive, x), np.array([sum(x[:i + 1].tolist()) for i in range(n)], dtype), strict=True)
    assert_array_equal(run(backend, scan.exclusive, x), np.array([sum(x[:i].tolist()) for i in range(n)], dtype), strict=True)


@backends
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_block_borders_strides_and_wrapping(backend, n, dtype):
    top = np.iinfo(dtype).max
    for x in (draw(n, dtype), draw(n, dtype) + np.array(top // 2, dtype), np.repeat(draw(n, dtype), 2)[::2], draw(n, dtype)[::-1]):
        with np.errstate(over="ignore"):
            expected = np.cumsum(x, dtype=dtype)
        before = x.copy()
        assert_array_equal(run(backend, scan.inclusive, x), expected, strict=True)
        assert_array_equal(run(backend, scan.exclusive, x), np.concatenate([[0], expected]).astype(dtype)[:n], strict=True)
        assert_array_equal(x, before)


@backends
@pytest.mark.parametrize("n", [1, 2049, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_keep_the_bound_of_the_docstring(backend, n, dtype):
    x = draw(n, dtype)
    x[::7] *= 1000
    exact = [math.fsum(x[:i].tolist()) for i in range(0, n + 1, 50)] + [math.fsum(x.tolist())]
    size = np.concatenate([[0], np.cumsum(abs(x.astype(float)))])
    y = np.concatenate([run(backend, scan.exclusive, x), run(backend, scan.inclusive, x)[-1:]])
    for at, value in zip([*range(0, n + 1, 50), n], exact):
        assert abs(y[at] - value) <= n * 2.0**-53 * size[at] + (np.spacing(abs(y[at])) / 2 if dtype == "float32" else 0)


@backends
def test_infinity_and_nan_spoil_only_what_comes_after(backend):
    x = np.ones(300)
    x[100], x[200] = np.inf, np.nan
    y = run(backend, scan.inclusive, x)
    assert_array_equal(y[:100], np.arange(1, 101))
    assert (y[100:200] == np.inf).all() and np.isnan(y[200:]).all()
    assert run(backend, scan.exclusive, x)[100] == 100


@pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")
@pytest.mark.parametrize("dtype", scan.DTYPES)
@pytest.mark.parametrize("n", [300, 5000])
def test_any_order_of_threads_gives_the_same_bits(dtype, n):
    x = draw(n, dtype)
    expected = run("emulated", scan.exclusive, x)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=n):
            assert_array_equal(run("emulated", scan.exclusive, x), expected, strict=True)


@backends
@pytest.mark.parametrize("f", [scan.inclusive, scan.exclusive])
@pytest.mark.parametrize("x, error, message", [
    ([1, 2], TypeError, "x must be an array, got list"),
    (np.zeros(3, np.int16), TypeError, "x must be int32, int64, float32 or float64, got int16"),
    (np.zeros((2, 3)), ValueError, r"x must have shape \(n,\), n < 2\^31, got \(2, 3\)"),
])
def test_errors(backend, f, x, error, message):
    with use(backend) as put, pytest.raises(error, match=rf"^scan\.{f.__name__}: " + message):
        f(x if isinstance(x, list) else put(x))
