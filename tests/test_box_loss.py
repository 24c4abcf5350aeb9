import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct, seeds
from tinydet import use
from tinydet.gradcheck import check_loss
from tinydet.ops.box_loss import l2, smooth_l1

LOSSES = [(l2, {}), (smooth_l1, {}), (smooth_l1, dict(beta=0.25)), (smooth_l1, dict(beta=0))]


def curve(d, beta):
    """One number's share: half its square (beta None), or smooth L1 (notes 1.4, beta = 1/sigma^2)."""
    if beta is None:
        return 0.5 * d * d
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


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
    with use(backend) as put:
        value, _ = loss(put(x), put(target), mask if mask is None else put(mask), **how)
    assert isinstance(value, float)
    assert_allclose(value, by_definition(x, target, mask, None if loss is l2 else how.get("beta", 1)), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss, how", LOSSES)
@given(case=cases())
def test_gradient(backend, loss, how, case):
    x, target, mask = case
    with use(backend) as put:
        check_loss(lambda x: loss(x, put(target), mask if mask is None else put(mask), **how), [x], put=put)


@pytest.mark.parametrize("sigma, d, value, slope", [
    (1, -2, 1.5, -1), (1, -0.5, 0.125, -0.5), (1, 1, 0.5, 1), (1, 3, 2.5, 1), (1, 0, 0, 0),
    (3, 0.05, 0.01125, 0.45), (3, 0.5, 4 / 9, 1), (3, -2, 35 / 18, -1)])
def test_fixture_f3(sigma, d, value, slope):
    found, dx = smooth_l1(np.array([[d + 7.0]]), np.array([[7.0]]), beta=1 / sigma ** 2)
    assert_allclose([found, dx.item()], [value, slope], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss, how", LOSSES)
@given(case=cases())
def test_masked_rows_count_in_nothing_not_even_nan(loss, how, case):
    x, target, mask = case
    mask = np.arange(len(x)) % 2 == 0 if mask is None else mask
    value, dx = loss(x, target, mask, **how)
    assert value == loss(x[mask], target[mask], **how)[0]
    x[~mask] = target[~mask] = [np.nan, np.inf, 0, np.inf]             # inf - inf would warn, and so fail
    spoiled, dspoiled = loss(x, target, mask, **how)
    assert spoiled == value
    assert_array_equal(dspoiled, dx)
    assert_array_equal(dx[~mask], 0)


@pytest.mark.parametrize("loss, how", LOSSES)
def test_float32_transposed_zero_difference_and_nan(loss, how):
    x, target = np.random.default_rng(0).standard_normal((2, 4, 6))
    value, dx = loss(x.T, target.T, **how)
    value32, dx32 = loss(x.T.astype(np.float32), target.T.astype(np.float32), **how)
    assert dx32.dtype == np.float32
    assert_allclose(value32, value, rtol=1e-6)
    assert_allclose(dx32, dx, atol=1e-6)
    value, dx = loss(x, x, **how)
    assert value == 0 and not dx.any()
    x[0, 0] = np.nan
    assert np.isnan(loss(x, target, **how)[0])


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
