import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops import focal_loss, logistic_loss


def by_definition(x, labels, alpha=0.25, gamma=2.0, normalizer=None):
    total, positives = 0.0, 0
    for v, t in zip(x.ravel().tolist(), labels.ravel().tolist()):
        if t == 1:
            p, positives = 1 / (1 + math.exp(-v)), positives + 1
            total -= (1 if alpha is None else alpha) * (1 - p) ** gamma * math.log(p)
        elif t == 0:
            p = 1 / (1 + math.exp(v))
            total -= (1 if alpha is None else 1 - alpha) * (1 - p) ** gamma * math.log(p)
    return total / (max(1, positives) if normalizer is None else normalizer)


def run(backend, x, labels, *args, **how):
    """Value and gradient, on the host."""
    with use(backend) as put:
        value, dx = focal_loss.loss(put(x), put(labels), *args, **how)
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    return float(to_numpy(value)), to_numpy(dx)


backends = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def cases(draw):
    """Scores and labels -1, 0, 1 of one to three axes."""
    shape, rng = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)), np.random.default_rng(draw(seeds))
    return 2 * rng.standard_normal(shape), rng.integers(-1, 2, shape)


settings = st.fixed_dictionaries(dict(alpha=st.sampled_from([None, 0, 0.25, 0.9, 1]), gamma=st.sampled_from([0, 0.5, 1, 2.0, 3]),
                                      normalizer=st.sampled_from([None, 1, 0.5, 7])))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), how=settings)
def test_value_is_the_definition(backend, case, how):
    x, labels = case
    assert_allclose(run(backend, x, labels, **how)[0], by_definition(x, labels, **how), rtol=1e-10, atol=1e-12)
    assert_allclose(run(backend, x, labels)[0], by_definition(x, labels), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), how=settings)
def test_gradient(backend, case, how):
    x, labels = case
    kept = labels.copy()
    with use(backend) as put:
        labels = put(labels)
        check_loss(lambda x: focal_loss.loss(x, labels, **how), [x], put=put)
    assert_array_equal(to_numpy(labels), kept)


@given(case=cases())
def test_without_alpha_and_gamma_it_is_the_logistic_loss(case):
    x, labels = case[0].reshape(1, -1), case[1].reshape(1, -1)
    value, dx = focal_loss.loss(x, labels, alpha=None, gamma=0)
    logistic, dlogistic = logistic_loss.loss(x, labels, signed=False)
    positives = max(1, (labels == 1).sum())
    assert_allclose(value, logistic / positives, rtol=1e-12)
    assert_allclose(dx, dlogistic / positives, rtol=1e-12)


@backends
@given(case=cases(), how=settings)
def test_an_ignored_entry_counts_in_nothing_whatever_it_holds(backend, case, how):
    x, labels = case
    value, dx = run(backend, x, labels, **how)
    ignored = labels == -1
    assert_array_equal(dx[ignored], 0)
    for v in (np.nan, np.inf, -np.inf):
        x[ignored] = v
        again, dagain = run(backend, x, labels, **how)
        assert again == value
        assert_array_equal(dagain, dx)


@given(case=cases(), how=settings)
def test_flipping_scores_labels_and_alpha_changes_only_the_sign_of_the_gradient(case, how):
    x, labels = case
    how = {**how, "normalizer": 3}
    value, dx = focal_loss.loss(x, labels, **how)
    flipped = {**how, "alpha": None if how["alpha"] is None else 1 - how["alpha"]}
    other, dother = focal_loss.loss(-x, np.where(labels < 0, -1, 1 - labels), **flipped)
    assert_allclose(other, value, rtol=1e-12)
    assert_allclose(dother, -dx, rtol=1e-12, atol=1e-15)


def test_easy_examples_fade():
    """p_t = 0.9 with gamma 2 counts a hundredth of its cross-entropy, p_t = 0.5 a quarter."""
    for p, share in ((0.9, 0.01), (0.5, 0.25)):
        x = np.array([math.log(p / (1 - p))])
        assert_allclose(focal_loss.loss(x, np.array([1]), alpha=None)[0], share * -math.log(p), rtol=1e-12)
        assert_allclose(focal_loss.loss(-x, np.array([0]), alpha=None)[0], share * -math.log(p), rtol=1e-12)


@backends
@pytest.mark.parametrize("dtype, x", [(np.float32, 20), (np.float32, 80), (np.float64, 40), (np.float64, 600)])
def test_small_losses_keep_their_digits(backend, dtype, x):
    value, dx = run(backend, np.full(1, x, dtype), np.ones(1, int), None, 0)
    assert_allclose([value, -dx.item()], math.exp(-x), rtol=1e-5 if dtype == np.float32 else 1e-12)


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_far_scores(backend, dtype, gamma):
    with np.errstate(all="raise", under="ignore"):
        value, dx = run(backend, np.array([800, -800, 800, -800], dtype), np.array([1, 1, 0, 0]), gamma=gamma, normalizer=1)
    assert_allclose(value, 0.25 * 800 + 0.75 * 800, rtol=1e-6)
    assert_allclose(dx, [0, -0.25, 0.75, 0], rtol=1e-6)


@backends
def test_the_normalizer(backend):
    x = np.array([[0.5, -1, 2], [0, 3, -2]])
    for labels, positives in (([[1, 1, 0], [0, 1, -1]], 3), ([[1, 0, 0], [0, 0, -1]], 1), ([[0, 0, 0], [0, 0, -1]], 1)):
        value, dx = run(backend, x, np.array(labels))
        total, dtotal = run(backend, x, np.array(labels), normalizer=1)
        assert_allclose(value * positives, total, rtol=1e-12)
        assert_allclose(dx * positives, dtotal, rtol=1e-12)


@backends
def test_float32_transposed_and_small_integers(backend):
    rng = np.random.default_rng(0)
    x, labels = 3 * rng.standard_normal((4, 5)), rng.integers(-1, 2, (4, 5)).astype(np.int8)
    value, dx = run(backend, x.T, labels.T)
    assert_allclose(value, by_definition(x.T, labels.T), rtol=1e-12)
    value32, dx32 = run(backend, x.T.astype(np.float32), labels.T, np.float64(0.25), np.float64(2))      # no promotion
    assert dx32.dtype == np.float32
    assert_allclose(value32, value, rtol=1e-6)
    assert_allclose(dx32, dx, atol=1e-6)
    assert_allclose(run(backend, x, (labels == 1).astype(np.uint8))[0], by_definition(x, (labels == 1) * 1), rtol=1e-12)
    value, dx = run(backend, np.array([np.nan, 1]), np.array([1, 0]))                       # and no warning
    assert math.isnan(value) and np.isnan(dx[0]) and dx[1] > 0


@backends
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_infinite_scores_have_the_limits_of_value_and_gradient(backend, gamma):
    """On the wrong side the gradient is -alpha_t * sign, on the right side nothing is left of it."""
    value, dx = run(backend, np.array([-np.inf, np.inf, np.inf, -np.inf]), np.array([1, 0, 1, 0]), gamma=gamma, normalizer=1)
    assert value == math.inf
    assert_array_equal(dx, [-0.25, 0.75, 0, 0])


@backends
@pytest.mark.parametrize("labels", [-1, 0, 1])
def test_empty_and_one_element(backend, labels):
    value, dx = run(backend, np.zeros((0, 3)), np.full((0, 3), labels))
    assert value == 0.0 and dx.shape == (0, 3)
    value, dx = run(backend, np.zeros(1), np.array([labels]))
    weight = {-1: 0, 0: 0.75, 1: 0.25}[labels]
    assert_allclose(value, weight * 0.25 * math.log(2), rtol=1e-12)
    assert_allclose(dx, [(-1 if labels == 1 else 1) * weight * 0.25 * (math.log(2) + 0.5)], rtol=1e-12)


# The kernel

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]
needs_emulator = pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("gamma", [0, 1.5, 2])
@pytest.mark.parametrize("R, K", [(1, 255), (2, 128), (1, 257), (1, 1023), (4, 256), (5, 205), (3, 1001)])
def test_kernel_agrees_with_float64_at_block_borders_and_strided(backend, gamma, R, K):
    rng = np.random.default_rng(K)
    x, labels = 5 * rng.standard_normal((K, R)).T, rng.integers(-1, 2, (R, 2 * K))[:, ::2].astype(np.int32)
    value, dx = run("numpy", x, labels, gamma=gamma)
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-5)):
        found, dfound = run(backend, x.astype(dtype), labels, gamma=gamma)
        assert dfound.dtype == dtype and abs(found - value) <= bound * value
        assert np.linalg.norm(dfound - dx) <= bound * np.linalg.norm(dx)


@needs_emulator
def test_any_order_of_threads_gives_the_same_bits():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((30, 70)).astype(np.float32), rng.integers(-1, 2, (30, 70))
    value, dx = run("emulated", x, labels)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            again, dagain = run("emulated", x, labels)
        assert again == value
        assert_array_equal(dagain, dx)


@needs_emulator
@pytest.mark.parametrize("label", [-2, 2, 127, -128])
def test_the_kernel_makes_nan_of_other_labels(label):
    """On a GPU nothing looks at the labels before."""
    with use("emulated"):
        value, dx = focal_loss._loss_cuda(np.zeros(2), np.array([label, 1]), 1, 1, 0, None)
    assert math.isnan(value)
    assert_array_equal(dx, [np.nan, -0.5])


@pytest.mark.parametrize("change, error, message", [
    (dict(x=[0.0]), TypeError, "x must be an array, got list"),
    (dict(x=np.zeros(2, int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(labels=np.zeros((2, 1), int)), ValueError, r"labels must have shape \(2,\), got \(2, 1\)"),
    (dict(labels=np.zeros(2)), TypeError, "labels must be integers, got float64"),
    (dict(labels=np.array([0, 2])), ValueError, r"labels must be -1, 0 or 1, got 0\.\.2"),
    (dict(alpha=1.5), ValueError, r"alpha must be None or lie in \[0, 1\], got 1.5"),
    (dict(alpha=-0.5), ValueError, r"alpha must be None or lie in \[0, 1\], got -0.5"),
    (dict(alpha=np.nan), ValueError, r"alpha must be None or lie in \[0, 1\], got nan"),
    (dict(gamma=-1), ValueError, "gamma must be finite and at least 0, got -1"),
    (dict(gamma=np.inf), ValueError, "gamma must be finite and at least 0, got inf"),
    (dict(gamma=np.nan), ValueError, "gamma must be finite and at least 0, got nan"),
    (dict(normalizer=0), ValueError, "normalizer must be finite and above 0, got 0"),
    (dict(normalizer=-2), ValueError, "normalizer must be finite and above 0, got -2"),
    (dict(normalizer=np.inf), ValueError, "normalizer must be finite and above 0, got inf"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^focal_loss\.loss: " + message):
        focal_loss.loss(**{**dict(x=np.zeros(2), labels=np.zeros(2, int)), **change})
