import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops.ap_loss import ap_loss
from tinydet.ops.smooth_ap import smooth_ap

backends = pytest.mark.parametrize("backend", BACKENDS)
deltas = st.sampled_from([0.3, 0.7, 1.2])


def run(backend, scores, labels, *args):
    """Value and gradient, on the host."""
    with use(backend) as put:
        value, g = smooth_ap(put(scores), put(labels), *args)
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    assert g.dtype == scores.dtype and g.shape == scores.shape
    return float(to_numpy(value)), to_numpy(g)


def by_definition(s, t, delta):
    s, t = s.ravel().tolist(), t.ravel().tolist()
    positive, negative = ([i for i, label in enumerate(t) if label == k] for k in (1, 0))

    def H(x):
        return min(max(x / (2 * delta) + 0.5, 0), 1)
    lost = []
    for i in positive:
        a = 1 + sum(H(s[k] - s[i]) for k in positive if k != i)
        b = sum(H(s[j] - s[i]) for j in negative)
        lost.append(b / (a + b))
    return sum(lost) / len(lost) if lost else 0.0


@st.composite
def cases(draw, max_n=12):
    n, rng = draw(st.integers(0, max_n)), np.random.default_rng(draw(seeds))
    s = 2 * rng.standard_normal(n) + draw(st.sampled_from([0, -4.6, 100]))
    return (np.round(2 * s) / 2 if draw(st.booleans()) else s), rng.integers(-1, 2, n)


@backends
@given(case=cases(), delta=deltas)
def test_value_is_the_definition(backend, case, delta):
    before = [a.copy() for a in case]
    value, g = run(backend, *case, delta)
    assert_allclose(value, by_definition(*case, delta), rtol=1e-11, atol=1e-11)
    assert_allclose(value, ap_loss(*case, delta, False)[0], rtol=1e-11, atol=1e-11)
    assert 0 <= value < 1 and abs(g.sum()) < 1e-12 and (g[case[1] == 0] >= 0).all() and not g[case[1] == -1].any()
    for a, b in zip(case, before):
        assert_array_equal(a, b)


@backends
@given(case=cases(8), delta=deltas)
def test_gradient_by_differences(backend, case, delta):
    """Ties may stay: corners are at +-delta, and halves are far from those."""
    s, t = case
    with use(backend) as put:
        t = put(t)
        check_loss(lambda s: smooth_ap(s, t, delta), [s], put=put, eps=1e-6)


@backends
def test_many_scores_of_both_dtypes_and_any_layout(backend):
    rng = np.random.default_rng(0)
    s, t = 3 * rng.standard_normal((40, 50)) + 100, rng.choice([-1, 0, 0, 0, 1], (40, 50))
    value, g = run(backend, s, t)
    assert_allclose(value, by_definition(s, t, 1), rtol=1e-11)
    again, g_again = run(backend, s.T, t.T.astype(np.int8))
    assert_allclose(again, value, rtol=1e-13)
    assert_allclose(g_again, g.T, atol=1e-15)
    value, g32 = run(backend, s.astype(np.float32), t)
    assert_allclose(g32, g, atol=1e-6)


@backends
def test_a_pair_that_is_wrong_by_more_than_delta_is_left_as_it_is(backend):
    """By hand: the negative at 5 costs the positive half its precision, and only AP-loss's update moves it."""
    s, t = np.array([0.0, 5, 0.5]), np.array([1, 0, 0])
    value, g = run(backend, s, t)
    b = 1 + 0.75
    assert value == pytest.approx(b / (1 + b), rel=1e-14)
    slope = 1 / (1 + b) ** 2 / 2
    assert_allclose(g, [-slope, 0, slope], atol=1e-15)
    loss, update = ap_loss(s, t, 1.0, False)
    assert loss == pytest.approx(value) and update[1] == pytest.approx(1 / (1 + b))
    assert_array_equal(run(backend, np.array([0.0, 1]), np.array([1, 0]))[1], [0, 0])          # at the corner


@backends
@given(case=cases())
def test_ignored_scores_count_in_nothing_whatever_they_hold(backend, case):
    s, t = case
    value, g = run(backend, s, t)
    s = s.copy()
    s[t == -1] = np.nan
    again, g_again = run(backend, s, t)
    assert again == value
    assert_array_equal(g_again, g)


@backends
@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1], [-1], [-1, 0], [1, -1]])
def test_no_positive_or_no_negative_gives_zeros(backend, labels):
    value, g = run(backend, np.arange(len(labels), dtype=np.float32), np.array(labels, int))
    assert value == 0 and not g.any()


@pytest.mark.parametrize("change, error, message", [
    (dict(scores=[0.0]), TypeError, "scores must be an array, got list"),
    (dict(scores=np.zeros(2, int)), TypeError, "scores must be float32 or float64, got int64"),
    (dict(labels=np.zeros((2, 1), int)), ValueError, r"labels must have shape \(2,\), got \(2, 1\)"),
    (dict(labels=np.array([0, 2])), ValueError, r"labels must be -1, 0 or 1, got 0\.\.2"),
    (dict(scores=np.array([0, np.inf])), ValueError, "scores must be finite where labels are 0 or 1, got inf"),
    (dict(delta=0), ValueError, r"delta must lie in \[1e-100, 1e100\], got 0"),
    (dict(delta="1"), TypeError, "delta must be a number, got '1'"),
    (dict(delta=np.inf), ValueError, r"delta must lie in \[1e-100, 1e100\], got inf"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^smooth_ap\.smooth_ap: " + message):
        smooth_ap(**{**dict(scores=np.zeros(2), labels=np.zeros(2, int)), **change})


def test_a_delta_lost_in_rounding_is_refused():
    """1000 scores of spread 20 need 4e-6; above that the value is AP-loss's, and entries that count nowhere do not matter."""
    rng = np.random.default_rng(0)
    scores, labels = rng.uniform(-10, 10, 1000), rng.integers(-1, 2, 1000)
    for delta in (1e-100, 1e-18, 4e-6):
        with pytest.raises(ValueError, match=rf"^smooth_ap\.smooth_ap: delta must be at least 4\.4e-06 for 1000 scores of this spread, got {delta:g}: "):
            smooth_ap(scores, labels, delta)
    assert_allclose(smooth_ap(scores, labels, 5e-6)[0], ap_loss(scores, labels, 5e-6, False)[0], atol=1e-6)
    far = np.where(labels < 0, 1e9, scores)
    assert_allclose(smooth_ap(far, labels, 5e-6)[0], ap_loss(scores, labels, 5e-6, False)[0], atol=1e-6)
    assert smooth_ap(np.full(4, 7.0), np.array([1, 0, 0, 1]), 1e-100)[0] == ap_loss(np.full(4, 7.0), np.array([1, 0, 0, 1]), 0.0, False)[0]
