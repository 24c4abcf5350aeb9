import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops import roi_loss


def by_definition(scores, deltas, labels, targets, beta, box_weight, gamma=0):
    losses = []
    for r, u in enumerate(labels):
        if u < 0:
            losses.append(0.0)
            continue
        p = math.exp(scores[r, u]) / math.fsum(math.exp(v) for v in scores[r])
        value = -(1 - p) ** gamma * math.log(p)
        for i in range(4 if u < scores.shape[1] - 1 else 0):
            d = abs(deltas[r, 4 * u + i] - targets[r, i])
            value += box_weight * (0.5 * d * d / beta if d < beta else d - 0.5 * beta)
        losses.append(value)
    return np.array(losses)


@st.composite
def cases(draw):
    """scores, deltas, labels, targets; no difference of boxes near 0, beta (1 or 1/9) or 0.5."""
    R, K1, rng = draw(st.integers(0, 6)), draw(st.integers(2, 4)), np.random.default_rng(draw(seeds))
    labels, targets = rng.integers(-1, K1, R), rng.integers(-8, 9, (R, 4)) / 2
    deltas = np.repeat(targets[:, None], K1, 1) + rng.choice([-1.7, -0.3, -0.05, 0.06, 0.4, 2.1], (R, K1, 4))
    return 2 * rng.standard_normal((R, K1)), deltas.reshape(R, 4 * K1), labels, targets


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), beta=st.sampled_from([0, 1 / 9, 0.5, 1]), box_weight=st.sampled_from([0, 1, 2.5]), gamma=st.sampled_from([0, 1, 2, 3.5]))
def test_every_loss_is_the_definition(backend, case, beta, box_weight, gamma):
    expected = by_definition(*case, beta, box_weight, gamma)
    with use(backend) as put:
        losses = to_numpy(roi_loss.each(*map(put, case), beta, box_weight, gamma))
        value = float(to_numpy(roi_loss.loss(*map(put, case), None, beta, box_weight, gamma)[0]))
    assert_allclose(losses, expected, rtol=1e-12, atol=1e-12)
    assert_allclose(value, expected.sum() / max(1, (case[2] >= 0).sum()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), weighted=st.booleans(), beta=st.sampled_from([0, 1 / 9, 1]), gamma=st.sampled_from([0, 1, 2]))
def test_gradient(backend, case, weighted, beta, gamma):
    scores, deltas, labels, targets = case
    weights = np.random.default_rng(0).standard_normal(len(labels)) if weighted else None
    with use(backend) as put:
        check_loss(lambda s, d: roi_loss.loss(s, d, put(labels), put(targets), None if weights is None else put(weights), beta, 0.7, gamma),
                   [scores, deltas], put=put)


@pytest.mark.parametrize("backend", BACKENDS)
def test_f4_of_the_notes(backend):
    """Fixture F4. The notes have the background first, label 0; here it is the last, so the first column stands behind the others."""
    scores = np.array([[.5, -1, 2], [1.5, .3, .2], [.1, 2.2, -.4], [1, 1, 1.]])
    labels, targets = np.array([2, 0, 1, 0]), np.zeros((4, 4))
    deltas = np.full((4, 3, 4), 9.0)
    deltas[1, 0], deltas[2, 1], deltas[3, 0] = (.2, -.1, .3, 1.5), (.5, .5, -2, 0), (0, 0, .9, -.2)
    targets[1], targets[3] = .1, (1, -1, 0, 0)
    with use(backend) as put:
        args = [put(a) for a in (scores, deltas.reshape(4, 12), labels, targets)]
        cls = to_numpy(roi_loss.each(*args, 1.0, 0.0))
        losses = to_numpy(roi_loss.each(*args))
        _, dscores, ddeltas = roi_loss.loss(*args, put(np.array([0, 0, .5, .5])))
    assert_allclose(cls, [.241311296657, .453446059205, .179592842627, 1.098612288668], atol=1e-11)
    assert_allclose(losses, [.241311296657, 1.398446059205, 1.929592842627, 2.523612288668], atol=1e-11)
    assert_allclose(to_numpy(dscores), [[0] * 3, [0] * 3, [.051162930482, -.08219481646, .031031885978], [-1 / 3, 1 / 6, 1 / 6]], atol=1e-11)
    expected = np.zeros((4, 3, 4))
    expected[2, 1], expected[3, 0] = (.25, .25, -.5, 0), (-.5, .5, .45, -.1)
    assert_allclose(to_numpy(ddeltas).reshape(4, 3, 4), expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ignored_and_background_rows_may_hold_anything_and_far_scores_do_not_overflow(backend, dtype):
    scores = np.array([[1000, -1000, 0], [1, 2, 3], [0, 0, 800]], dtype)
    deltas, targets = np.zeros((3, 12), dtype), np.zeros((3, 4), dtype)
    deltas[1:], targets[1:] = np.nan, np.nan
    with use(backend) as put:
        args = [put(a) for a in (scores, deltas, np.array([1, -1, 2]), targets)]
        losses = to_numpy(roi_loss.each(*args))
        value, dscores, ddeltas = roi_loss.loss(*args)
    assert_array_equal(losses, np.array([2000, 0, 0], dtype), strict=True)
    assert float(to_numpy(value)) == 1000
    assert_array_equal(to_numpy(ddeltas), np.zeros((3, 12), dtype), strict=True)
    assert_allclose(to_numpy(dscores), [[0.5, -0.5, 0], [0] * 3, [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weights_are_the_loss_of_the_others_alone(backend):
    """The form by zeroing and the form by two networks give one gradient (sec. 2.3)."""
    rng = np.random.default_rng(0)
    scores, deltas, labels, targets = rng.standard_normal((9, 4)), rng.standard_normal((9, 16)), rng.integers(0, 4, 9), rng.standard_normal((9, 4))
    chosen = np.array([7, 2, 5])
    mask = np.isin(np.arange(9), chosen) / 3
    with use(backend) as put:
        whole = [to_numpy(a) for a in roi_loss.loss(*map(put, (scores, deltas, labels, targets)), put(mask))]
        alone = [to_numpy(a) for a in roi_loss.loss(*(put(a[chosen]) for a in (scores, deltas, labels, targets)))]
    assert_allclose(whole[0], alone[0], rtol=1e-14)
    for a, b in zip(whole[1:], alone[1:]):
        assert_allclose(a[chosen], b, rtol=1e-14, atol=1e-16)
        assert not np.delete(a, chosen, 0).any()


def test_errors():
    good = np.zeros((2, 3)), np.zeros((2, 12)), np.zeros(2, int), np.zeros((2, 4))

    def call(f=roi_loss.each, at=None, value=None, **options):
        return f(*(value if k == at else a for k, a in enumerate(good)), **options)
    for f in (roi_loss.each, roi_loss.loss):
        name = f"roi_loss.{f.__name__}"
        for at, value, error, message in (
                (0, np.zeros(3), ValueError, r"scores must have shape \(R, K\)"), (1, np.zeros((2, 9)), ValueError, r"deltas must have shape \(2, 12\)"),
                (3, np.zeros((2, 3)), ValueError, r"targets must have shape \(2, 4\)"), (2, np.array([0, 3]), ValueError, r"labels must lie in -1\.\.2, got 0\.\.3"),
                (2, np.zeros(2), TypeError, "labels must be integers"), (1, np.zeros((2, 12), np.float32), TypeError, "dtypes must agree")):
            with pytest.raises(error, match=rf"^{name}: {message}"):
                call(f, at, value)
        for option in ("beta", "box_weight"):
            for wrong in (-1, math.nan, math.inf):
                with pytest.raises(ValueError, match=rf"^{name}: {option} must be finite and at least 0, got {wrong}"):
                    call(f, **{option: wrong})
        for wrong in (-1, 0.5, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^{name}: gamma must be 0, or finite and at least 1, got {wrong}"):
                call(f, gamma=wrong)
    with pytest.raises(ValueError, match=r"^roi_loss\.loss: weights must have shape \(2,\)"):
        call(roi_loss.loss, weights=np.ones(3))
