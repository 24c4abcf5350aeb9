import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops.auc_loss import auc_loss

backends = pytest.mark.parametrize("backend", BACKENDS)
deltas = st.sampled_from([0, 0.25, 0.5, 1, 2])


def run(backend, scores, labels, *args):
    """Value and gradient, on the host."""
    with use(backend) as put:
        value, g = auc_loss(put(scores), put(labels), *args)
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    assert g.dtype == scores.dtype and g.shape == scores.shape
    return float(to_numpy(value)), to_numpy(g)


def by_definition(s, t, delta):
    s, t = s.ravel().tolist(), t.ravel().tolist()
    positive, negative = ([i for i, label in enumerate(t) if label == k] for k in (1, 0))
    value, g, pairs = 0.0, [0.0] * len(s), max(1, len(positive) * len(negative))
    for i in positive:
        for j in negative:
            x = s[j] - s[i]
            if x > delta or delta == 0:
                f, H = max(x, 0), 1 if x > 0 else 0.5 if x == 0 else 0
            else:
                f, H = ((x + delta) ** 2 / (4 * delta), x / (2 * delta) + 0.5) if x > -delta else (0, 0)
            value += f / pairs
            g[i] -= H / pairs
            g[j] += H / pairs
    return value, g


@st.composite
def cases(draw, max_n=30):
    n, rng = draw(st.integers(0, max_n)), np.random.default_rng(draw(seeds))
    s = draw(st.sampled_from([0.3, 1, 3])) * rng.standard_normal(n) + draw(st.sampled_from([0, -4.6, 100]))
    grid = draw(st.sampled_from([None, 4, 2, 1]))
    return (s if grid is None else np.round(s * grid) / grid), rng.integers(-1, 2, n)


@backends
@given(case=cases(), delta=deltas)
def test_value_and_gradient_are_the_definition(backend, case, delta):
    before = [a.copy() for a in case]
    value, g = run(backend, *case, delta)
    expected, g_expected = by_definition(*case, delta)
    assert_allclose(value, expected, rtol=1e-11, atol=1e-11)
    assert_allclose(g, g_expected, atol=1e-12)
    assert abs(g.sum()) < 1e-12 and (g[case[1] == 1] <= 0).all() and (g[case[1] == 0] >= 0).all()
    for a, b in zip(case, before):
        assert_array_equal(a, b)


@backends
@given(case=cases(8), delta=st.sampled_from([0.25, 1, 2]))
def test_gradient_by_differences(backend, case, delta):
    """f has a slope without jumps, so ties and borders may stay."""
    s, t = case
    with use(backend) as put:
        t = put(t)
        check_loss(lambda s: auc_loss(s, t, delta), [s], put=put, eps=1e-6)


@backends
def test_pairs_count_alike_wherever_they_stand(backend):
    """Far pairs: the share of wrongly ordered ones, half for a tie; AP-loss would weigh those at the top more."""
    s, t = np.array([3.0, 2, 2, 1, 0, 9]), np.array([0, 1, 0, 1, 0, -1])
    value, g = run(backend, s, t, 0)
    assert_allclose(g, np.array([2, -1.5, 1.5, -2, 0, 0]) / 6, atol=1e-15)
    assert_allclose(value, (1 + 0 + 2 + 1) / 6, rtol=1e-14)


@backends
@given(case=cases(), delta=deltas)
def test_ignored_scores_a_shift_and_a_scale(backend, case, delta):
    s, t = case
    value, g = run(backend, s, t, delta)
    changed = np.round(s * 4) / 4
    assert_allclose(run(backend, changed + 8, t, delta)[1], run(backend, changed, t, delta)[1], atol=1e-12)
    assert_allclose(run(backend, 4 * s, t, 4 * delta)[1], g, atol=1e-12)
    changed = s.copy()
    changed[t == -1] = np.nan
    found = run(backend, changed, t, delta)
    assert_allclose(found[0], value, rtol=1e-11, atol=1e-11)
    assert_allclose(found[1], g, atol=1e-12)
    assert_array_equal(g[t == -1], 0)


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_strides_float32_and_many(backend, dtype):
    rng = np.random.default_rng(0)
    s, t = (3 * rng.standard_normal((50, 30))).astype(dtype), rng.choice([-1, 0, 1], (50, 30), p=[0.1, 0.8, 0.1])
    expected, g_expected = by_definition(s.T, t.T, 1.0)
    value, g = run(backend, s.T, t.astype(np.int8).T)
    assert_allclose(value, expected, rtol=1e-11)
    assert_allclose(g.ravel(), g_expected, atol=1e-9 if dtype == np.float32 else 1e-14)


@backends
@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1], [-1], [-1, 0], [1, -1]])
def test_no_positive_or_no_negative_gives_zeros(backend, labels):
    for delta in (0, 1):
        value, g = run(backend, np.arange(len(labels), dtype=np.float32), np.array(labels, int), delta)
        assert value == 0 and not g.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_array_code_makes_nan_of_scores_that_are_not_finite(value):
    """On a GPU nothing looks at the scores before."""
    from tinydet.ops.auc_loss import _auc_loss
    for at in (0, 1):
        s = np.zeros(4)
        s[at] = value
        assert math.isnan(_auc_loss(s, np.array([0, 1, 1, 0]), 1.0)[0])


@pytest.mark.parametrize("change, error, message", [
    (dict(scores=[0.0]), TypeError, "scores must be an array, got list"),
    (dict(scores=np.zeros(2, int)), TypeError, "scores must be float32 or float64, got int64"),
    (dict(labels=np.zeros((2, 1), int)), ValueError, r"labels must have shape \(2,\), got \(2, 1\)"),
    (dict(labels=np.array([0, 2])), ValueError, r"labels must be -1, 0 or 1, got 0\.\.2"),
    (dict(scores=np.array([0, np.inf])), ValueError, "scores must be finite where labels are 0 or 1, got inf"),
    (dict(scores=np.array([0, -1e101])), ValueError, r"scores must lie in \[-1e\+100, 1e\+100\] where labels are 0 or 1, got 1e\+101"),
    (dict(delta=5e-324), ValueError, "delta must be 0 or lie in"), (dict(delta=None), TypeError, "delta must be a number, got None"),
    (dict(delta=-1), ValueError, r"delta must be 0 or lie in \[1e-100, 1e100\], got -1"),
    (dict(delta=np.nan), ValueError, r"delta must be 0 or lie in \[1e-100, 1e100\], got nan"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^auc_loss\.auc_loss: " + message):
        auc_loss(**{**dict(scores=np.zeros(2), labels=np.zeros(2, int)), **change})
