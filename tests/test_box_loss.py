import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, distinct, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops.box_loss import l2, smooth_l1

LOSSES = [(l2, {}), (smooth_l1, {}), (smooth_l1, dict(beta=0.25)), (smooth_l1, dict(beta=0))]


def curve(d, beta):
    """One number's share: half its square (beta None), or smooth L1 (notes 1.4, beta = 1/sigma^2)."""
    if beta is None:
        return 0.5 * d * d
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


def run(backend, loss, x, target, mask=None, **how):
    """Value and gradient, on the host."""
    with use(backend) as put:
        value, dx = loss(put(x), put(target), mask if mask is None else put(mask), **how)
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    return float(to_numpy(value)), to_numpy(dx)


backends = pytest.mark.parametrize("backend", BACKENDS)


def by_definition(x, target, mask, beta):
    kept = [r for r in range(len(x)) if mask is None or mask[r]]
    return sum(curve(x[r, k] - target[r, k], beta) for r in kept for k in range(x.shape[1])) / max(1, len(kept))


@st.composite
def cases(draw):
    """x, target and mask; x - target stays 0.125 off the kinks at 0 and at beta."""
    R, seed = draw(st.integers(0, 5)), draw(seeds)
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((R, 4))
    return target + distinct((R, 4), seed), target, draw(st.sampled_from([None, rng.random(R) < 0.5, np.zeros(R, bool)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss, how", LOSSES)
@given(case=cases())
def test_value_is_the_definition(backend, loss, how, case):
    x, target, mask = case
    value, _ = run(backend, loss, x, target, mask, **how)
    assert_allclose(value, by_definition(x, target, mask, None if loss is l2 else how.get("beta", 1)), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss, how", LOSSES)
@given(case=cases())
def test_gradient(backend, loss, how, case):
    x, target, mask = case
    with use(backend) as put:
        check_loss(lambda x: loss(x, put(target), mask if mask is None else put(mask), **how), [x], put=put)


@backends
@pytest.mark.parametrize("sigma, d, value, slope", [
    (1, -2, 1.5, -1), (1, -0.5, 0.125, -0.5), (1, 1, 0.5, 1), (1, 3, 2.5, 1), (1, 0, 0, 0),
    (3, 0.05, 0.01125, 0.45), (3, 0.5, 4 / 9, 1), (3, -2, 35 / 18, -1)])
def test_fixture_f3(backend, sigma, d, value, slope):
    found, dx = run(backend, smooth_l1, np.array([[d + 7.0]]), np.array([[7.0]]), beta=1 / sigma ** 2)
    assert_allclose([found, dx.item()], [value, slope], rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("loss, how", LOSSES)
@given(case=cases())
def test_masked_rows_count_in_nothing_not_even_nan(backend, loss, how, case):
    x, target, mask = case
    mask = np.arange(len(x)) % 2 == 0 if mask is None else mask
    value, dx = run(backend, loss, x, target, mask, **how)
    alone, dalone = run(backend, loss, x[mask], target[mask], **how)
    if backend in ("numpy", "numba"):
        assert value == alone
    assert_allclose(value, alone, rtol=1e-14)                           # a kernel adds in an order that follows from the places
    assert_array_equal(dx[mask], dalone)
    x[~mask] = target[~mask] = [np.nan, np.inf, 0, np.inf]             # inf - inf would warn, and so fail
    spoiled, dspoiled = run(backend, loss, x, target, mask, **how)
    assert spoiled == value
    assert_array_equal(dspoiled, dx)
    assert_array_equal(dx[~mask], 0)


@backends
@pytest.mark.parametrize("loss, how", LOSSES)
def test_float32_transposed_zero_difference_and_nan(backend, loss, how):
    x, target = np.random.default_rng(0).standard_normal((2, 4, 6))
    value, dx = run(backend, loss, x.T, target.T, **how)
    value32, dx32 = run(backend, loss, x.T.astype(np.float32), target.T.astype(np.float32), **how)
    assert dx32.dtype == np.float32
    assert_allclose(value32, value, rtol=1e-6)
    assert_allclose(dx32, dx, atol=1e-6)
    value, dx = run(backend, loss, x, x, **how)
    assert value == 0 and not dx.any()
    x[0, 0] = np.nan
    value, dx = run(backend, loss, x, target, **how)
    assert np.isnan(value) and np.isnan(dx[0, 0]) and np.isfinite(dx.ravel()[1:]).all()


# The kernels

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("loss, how", LOSSES)
@pytest.mark.parametrize("R, D", [(0, 4), (1, 255), (64, 4), (1, 257), (1, 1023), (256, 4), (205, 5), (700, 3)])
def test_kernels_agree_with_float64_at_block_borders_and_strided(backend, loss, how, R, D):
    rng = np.random.default_rng(D)
    x, target, mask = rng.standard_normal((D, R)).T, rng.standard_normal((R, 2 * D))[:, ::2], np.repeat(rng.random(R) < 0.7, 2)[::2]
    mask[:1] = True
    value, dx = run("numpy", loss, x, target, mask, **how)
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-5)):
        found, dfound = run(backend, loss, x.astype(dtype), target.astype(dtype), mask, **how)
        assert dfound.dtype == dtype and abs(found - value) <= bound * value
        assert np.linalg.norm(dfound - dx) <= bound * np.linalg.norm(dx)


@pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")
@pytest.mark.parametrize("loss", [l2, smooth_l1])
def test_any_order_of_threads_gives_the_same_bits(loss):
    x, target = np.random.default_rng(0).standard_normal((2, 500, 4)).astype(np.float32)
    value, dx = run("emulated", loss, x, target)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            again, dagain = run("emulated", loss, x, target)
        assert again == value
        assert_array_equal(dagain, dx)


@pytest.mark.parametrize("loss", [l2, smooth_l1])
@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros(4)), ValueError, r"x must have shape \(R, D\), got \(4,\)"),
    (dict(target=np.zeros((2, 4))), ValueError, r"target must have shape \(3, 4\), got \(2, 4\)"),
    (dict(target=np.zeros((3, 4), np.float32)), TypeError, "dtypes must agree, got x float64, target float32"),
    (dict(mask=np.ones(3)), TypeError, "mask must be bool, got float64"),
    (dict(mask=[True] * 3), TypeError, "mask must be an array, got list"),
    (dict(mask=np.ones(2, bool)), ValueError, r"mask must have shape \(3,\), got \(2,\)"),
])
def test_errors(loss, change, error, message):
    with pytest.raises(error, match=rf"^box_loss\.{loss.__name__}: " + message):
        loss(**{**dict(x=np.zeros((3, 4)), target=np.zeros((3, 4))), **change})


@pytest.mark.parametrize("beta", [-1, np.nan, np.inf])
def test_beta_error(beta):
    with pytest.raises(ValueError, match=rf"^box_loss\.smooth_l1: beta must be a finite number >= 0, got {beta}"):
        smooth_l1(np.zeros((1, 4)), np.zeros((1, 4)), beta=beta)
