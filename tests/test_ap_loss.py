import math
import tracemalloc
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, to_numpy, use
from tinydet.ops import ap_loss as op
from tinydet.ops.ap_loss import ap_loss

backends = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("interpolated", [True, False])
deltas = st.sampled_from([0, 0.25, 0.5, 1, 2])
needs_emulator = pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")


def tolerance(backend):
    return 1e-12 if backend in ("numpy", "numba") else 1e-9


def run(backend, scores, labels, *args, **how):
    """Loss and update, on the host."""
    with use(backend) as put:
        value, g = ap_loss(put(scores), put(labels), *args, **how)
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    assert g.dtype == scores.dtype and g.shape == scores.shape
    return float(to_numpy(value)), to_numpy(g)


def pairs(s, t, delta, interpolated, number):
    """Loss, g and the weights C_ij, pair by pair, from the sums of the notes (1.5 to 2.4), in arithmetic of `number`."""
    s, delta = [number(v) for v in s], number(delta)

    def H(x):
        if delta == 0:
            return number(x > 0) if x else number(1) / 2
        return min(max(x / (2 * delta) + number(1) / 2, number(0)), number(1))
    positive, negative = ([i for i, label in enumerate(t) if label == k] for k in (1, 0))
    a = {i: 1 + sum(H(s[k] - s[i]) for k in positive if k != i) for i in positive}
    b = {i: sum((H(s[j] - s[i]) for j in negative), number(0)) for i in positive}
    lost = {i: b[i] / (a[i] + b[i]) for i in positive}
    kept = {i: min(lost[k] for k in positive if s[k] <= s[i]) if interpolated else lost[i] for i in positive}
    C = {(i, j): (kept[i] / lost[i] if lost[i] else 1) * H(s[j] - s[i]) / (a[i] + b[i]) / len(positive) for i in positive for j in negative}
    g = [number(0)] * len(s)
    for (i, j), c in C.items():
        g[i], g[j] = g[i] - c, g[j] + c
    return (sum(kept.values()) / len(positive) if positive else number(0)), g, C


def by_definition(s, t, delta=1.0, interpolated=True):
    value, g, _ = pairs(s.ravel().tolist(), t.ravel().tolist(), delta, interpolated, float)
    return value, np.reshape(g, s.shape)


@st.composite
def cases(draw, max_n=40):
    """Scores in [-20, 20], near a number or far from 0, some on a grid so that they tie and lie at just delta from each other."""
    n, rng = draw(st.integers(0, max_n)), np.random.default_rng(draw(seeds))
    s = draw(st.sampled_from([0.3, 1, 3, 10])) * rng.standard_normal(n).clip(-2, 2) + draw(st.sampled_from([0, -4.6, 100, -1000]))
    grid = draw(st.sampled_from([None, 10, 4, 2, 1]))
    return (s if grid is None else np.round(s * grid) / grid), rng.choice([-1, 0, 1], n, p=draw(st.sampled_from([(0.1, 0.6, 0.3), (0.2, 0.4, 0.4)])))


def agree(found, expected, atol):
    assert abs(found[0] - expected[0]) <= atol
    assert_allclose(found[1], expected[1], rtol=0, atol=atol)


# Definition

@backends
@given(case=cases(), delta=deltas, interpolated=st.booleans())
def test_loss_and_update_are_the_definition(backend, case, delta, interpolated):
    before = [a.copy() for a in case]
    agree(run(backend, *case, delta, interpolated), by_definition(*case, delta, interpolated), tolerance(backend))
    for a, b in zip(case, before):
        assert_array_equal(a, b)


def F(text):
    return [Fraction(v) for v in text.split()]


EXACT = {
    "E1": ([0, 0.5, -2], [1, 0, 0], 1, True, Fraction(3, 7), F("-3/7 3/7 0")),
    "E1 plain": ([0, 0.5, -2], [1, 0, 0], 1, False, Fraction(3, 7), F("-3/7 3/7 0")),
    "E2": ([1, -0.5, 0, 1.5, -1, 2], [1, 1, 0, 0, 0, -1], 1, True, Fraction(13, 28), F("-3/14 -1/4 3/32 19/56 1/32 0")),
    "E3": ([0] * 5, [1, 1, 0, 0, 0], 1, True, Fraction(1, 2), F("-1/4 -1/4 1/6 1/6 1/6")),
    "E4": ([0, 2, 2.5, 2, -2], [1, 1, 0, 0, 0], 0.5, True, Fraction(1, 2), F("-1/4 -1/4 7/24 5/24 0")),
    "E4 plain": ([0, 2, 2.5, 2, -2], [1, 1, 0, 0, 0], 0.5, False, Fraction(11, 20), F("-1/4 -3/10 13/40 9/40 0")),
    "E4b": ([-1, 0, 1, 0.5, -0.25, 2, -3], [1, 1, 1, 0, 0, 0, 0], 1, True, Fraction(23, 47),
            [-0.1631205674] * 3 + [0.1469336671, 0.0784313725, 0.2639966625, 0]),
    "E4b plain": ([-1, 0, 1, 0.5, -0.25, 2, -3], [1, 1, 1, 0, 0, 0, 0], 1, False, Fraction(7259, 13959),
                  [-0.1631205674, -0.1717171717, -0.1851851852, 0.1543806863, 0.0799484204, 0.2856938176, 0]),
    "E5": ([4, 2, 0, -2], [1, 0, 1, 0], 0.5, True, Fraction(1, 6), F("0 1/6 -1/6 0")),
    "E6": ([3, 2, 1, 0, 2], [1, 0, 1, 0, 0], 0, True, Fraction(1, 4), F("0 1/8 -1/4 0 1/8")),
    "E7": ([0.2, -0.3, -0.5, 0.4, 0, 0, -1, 0.1], [1, 0, -1, -1, 0, 1, 0, 0], 1, True, Fraction(34, 75),
           F("-11/50 13/120 0 0 49/300 -7/30 0 109/600")),
}


@backends
@pytest.mark.parametrize("name", EXACT)
def test_fixtures_by_hand(backend, name):
    s, t, delta, interpolated, value, g = EXACT[name]
    found = run(backend, np.array(s, float), np.array(t), delta, interpolated)
    agree(found, (float(value), [float(v) for v in g]), 1e-10 if isinstance(g[0], float) else 1e-14)
    exact = pairs([Fraction(str(v)) for v in s], t, delta, interpolated, Fraction)
    assert exact[0] == value and (isinstance(g[0], float) or exact[1] == g)


E8 = np.array([((23 * k) % 61) / 10 - 3 for k in range(60)]), np.array([1 if k % 7 == 0 else -1 if k % 11 == 5 else 0 for k in range(60)])
E9 = (np.array([((7919 * k) % 1009) / 128 - 4 + (k % 50 == 0) for k in range(5000)]),
      np.array([1 if k % 50 == 0 else -1 if k % 97 == 3 else 0 for k in range(5000)]))


@backends
@pytest.mark.parametrize("delta, interpolated, expected", [
    (1, True, (0.8261272271, 9.8526669115e-2, 4.1428640706, -0.0929516774, 0.0095369563, -0.0929516774)),
    (1, False, (0.8308474320, 9.9635347492e-2, 4.1556556475, -0.0929516774, 0.0096134269, -0.0935185185)),
    (0.5, True, (0.8238025351, 9.9313567439e-2, 4.5195142261, -0.0930279285, 0.0092718209, -0.0925925926)),
    (0.25, True, (0.8232484429, 9.9759603635e-2, 4.6137031027, -0.0931577897, 0.0092816853, -0.0925925926))])
def test_fixture_E8(backend, delta, interpolated, expected):
    value, g = run(backend, *E8, delta, interpolated)
    assert_allclose((value, (g * g).sum(), (np.arange(60) * g).sum(), g[0], g[1], g[49]), expected, rtol=0, atol=1e-10)


@backends
@both
@pytest.mark.parametrize("delta, expected", [(1, (0.941761711131, 9.4244307821e-3, 37.30927690)), (0.25, (0.861273211896, 8.6095448796e-3, 43.51353400))])
def test_fixture_E9_of_many_ties_and_blocks(backend, delta, expected, interpolated):
    value, g = run(backend, *E9, delta, interpolated)
    if interpolated or delta == 0.25:
        assert_allclose((value, (g * g).sum(), (np.arange(5000) * g).sum()), expected, rtol=1e-9)
    agree((value, g), run("numpy", *E9, delta, interpolated), tolerance(backend))


def sample(n, positives, seed=0, spread=1.5, gap=5):
    """n scores of which `positives` are of objects, in random order, and a tenth of the rest ignored."""
    rng = np.random.default_rng(seed)
    t = np.zeros(n, int)
    t[:positives] = 1
    t[positives:][rng.random(n - positives) < 0.1] = -1
    t = rng.permutation(t)
    return spread * rng.standard_normal(n) + gap * (t == 1) - 4, t


@backends
@pytest.mark.parametrize("n, positives", [(1, 1), (255, 255), (256, 3), (257, 256), (300, 257), (1023, 30), (1025, 600), (2049, 2)])
def test_block_borders_strided_and_both_dtypes(backend, n, positives):
    for delta, spread in ((1, 1.5), (0, 1.5), (1, 0.05), (0.3, 30))[:2 if n > 1000 else 4]:     # 0.05: all windows hold all, 30: most one
        s, t = sample(n, positives, n, spread)
        s[::3] = s[::3].round(1)
        expected = run("numpy", s, t, delta)
        strided, other = np.repeat(s, 2)[::2], np.repeat(t.astype(np.int8), 2)[::2]
        agree(run(backend, strided, other, delta), expected, tolerance(backend))
        s = s.astype(np.float32)
        agree(run(backend, s, t, delta), run("numpy", s.astype(float), t, delta), 1e-6)


@backends
def test_interpolation_reaches_across_blocks(backend):
    """20 negatives above 600 positives: the lowest has the best precision, 600 / 620, which all others take over."""
    s, t = np.concatenate([np.arange(600.0), np.full(20, 1000.0)]), np.repeat([1, 0], [600, 20])
    value, g = run(backend, s, t)
    assert_allclose(value, 20 / 620, rtol=1e-12)
    assert_allclose(g, np.repeat([-20 / 620 / 600, 1 / 620], [600, 20]), rtol=1e-12)


@backends
@pytest.mark.parametrize("x", [-31 / 32, 31 / 32])
@pytest.mark.parametrize("delta", [1, 1e-10, 1e10])
def test_a_window_full_at_one_end_leaves_no_integer(backend, x, delta):
    """The largest sum that a window can hold, of either sign, among negatives and among positives."""
    for labels in (np.repeat([1, 0], [1, 1023]), np.repeat([1, 1, 0], [1, 1022, 1])):
        s = np.repeat([0, x * delta], [1, 1023])
        agree(run(backend, s, labels, delta), run("numpy", s, labels, delta), 1e-12)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_threads_change_no_bit(parts, monkeypatch, all_threads):
    s, t = sample(3000, 200)
    expected = run("numba", s, t)
    monkeypatch.setattr(op, "get_num_threads", lambda: parts)
    numba.set_num_threads(min(parts, numba.config.NUMBA_NUM_THREADS))
    found = run("numba", s, t)
    assert found[0] == expected[0]
    assert_array_equal(found[1], expected[1])


@needs_emulator
def test_any_order_of_threads_gives_the_same_bits():
    s, t = sample(1100, 300)
    value, g = run("emulated", s, t)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            again, g_again = run("emulated", s, t)
        assert again == value
        assert_array_equal(g_again, g)


# The update is no derivative

@backends
@given(case=cases(12), delta=deltas, interpolated=st.booleans())
def test_update_is_the_derivative_of_the_surrogate_with_frozen_weights(backend, case, delta, interpolated):
    """S(s) = sum C_ij (s_j - s_i); differences of S, which is linear, against g (notes, T9)."""
    s, t = case
    _, g = run(backend, s, t, delta, interpolated)
    _, _, C = pairs(s.tolist(), t.tolist(), delta, interpolated, float)

    def surrogate(s):
        return sum(c * (s[j] - s[i]) for (i, j), c in C.items())
    for k in range(len(s)):
        moved = s.copy()
        moved[k] += 0.5
        assert_allclose(2 * (surrogate(moved) - surrogate(s)), g[k], atol=max(1e-10, tolerance(backend)))


@backends
def test_update_is_not_the_derivative_of_the_loss(backend):
    """Two negatives far above a positive: no small step changes the loss, the update asks for one (notes, 2.2)."""
    s, t = np.array([0.0, 5, 5]), np.array([1, 0, 0])
    value, g = run(backend, s, t)
    assert_allclose(g, [-2 / 3, 1 / 3, 1 / 3], rtol=1e-12)
    for k in range(3):
        moved = s.copy()
        moved[k] += 0.01
        assert run(backend, moved, t)[0] == value


@backends
def test_through_a_linear_net_the_parameters_follow_the_surrogate(backend):
    rng = np.random.default_rng(0)
    X, w, t = rng.standard_normal((30, 4)), rng.standard_normal(4), rng.integers(-1, 2, 30)
    _, g = run(backend, X @ w, t)
    _, _, C = pairs((X @ w).tolist(), t.tolist(), 1.0, True, float)
    assert_allclose(X.T @ g, sum(c * (X[j] - X[i]) for (i, j), c in C.items()), atol=1e-9)


# Properties

@backends
@settings(max_examples=12)
@given(case=cases(), delta=deltas, interpolated=st.booleans())
def test_signs_balance_range_and_order_of_the_update(backend, case, delta, interpolated):
    """T2, T3, T4, T7 of the notes; |g| adds up to twice the loss."""
    (s, t), atol = case, tolerance(backend)
    value, g = run(backend, s, t, delta, interpolated)
    p, n = g[t == 1], g[t == 0]
    assert (p <= 0).all() and (n >= 0).all() and (g[t == -1] == 0).all()
    assert abs(p.sum() + value) <= atol and abs(n.sum() - value) <= atol and 0 <= value < 1
    if len(p):
        lowest = s[t == 1].min()
        assert (n[s[t == 0] - lowest < -delta] == 0).all()
        assert (value > 0) == bool((s[t == 0] - lowest > -delta).any() if delta else (s[t == 0] >= lowest).any())
    assert (np.diff(n[np.argsort(s[t == 0])]) >= -atol).all()
    if interpolated:
        assert (np.diff(p[np.argsort(s[t == 1])]) >= 0).all()                   # towards 0
    for label in (0, 1):
        for v in np.unique(s[t == label]):
            assert len(np.unique(g[(t == label) & (s == v)])) == 1              # to the bit
    assert run(backend, s, t, delta, True)[0] <= run(backend, s, t, delta, False)[0] + atol


@backends
@settings(max_examples=12)
@given(case=cases(), delta=deltas, interpolated=st.booleans(), seed=seeds)
def test_invariances(backend, case, delta, interpolated, seed):
    """T6 of the notes: order of entries, a shift, a scale, ignored scores, negatives out of reach."""
    (s, t), atol, rng = case, tolerance(backend), np.random.default_rng(seed)
    value, g = run(backend, s, t, delta, interpolated)
    order = rng.permutation(len(s))
    agree(run(backend, s[order], t[order], delta, interpolated), (value, g[order]), atol)
    agree(run(backend, np.round(s * 2) / 2 + 8, t, delta, interpolated), run(backend, np.round(s * 2) / 2, t, delta, interpolated), atol)
    agree(run(backend, 4 * s, t, 4 * delta, interpolated), (value, g), atol)
    changed = s.copy()
    for v in (np.nan, np.inf, -np.inf, 1e300, 0):
        changed[t == -1] = v
        found = run(backend, changed, t, delta, interpolated)
        assert found[0] == value
        assert_array_equal(found[1], g)
    if (t == 1).any():
        far = s[t == 1].min() - delta - np.array([0.25, 1, 1e6])
        found = run(backend, np.concatenate([s, far]), np.concatenate([t, [0, 0, 0]]), delta, interpolated)
        agree((found[0], found[1][:len(s)]), (value, g), atol)
        assert_array_equal(found[1][len(s):], 0)


@backends
@settings(max_examples=12)
@given(seed=seeds, hard=st.booleans())
def test_scores_apart_give_average_precision(backend, seed, hard):
    """T8: 1 - mean precision at the positives; interpolated, 1 - area under the precision that no longer rises (VOC 2010)."""
    rng = np.random.default_rng(seed)
    s, t = rng.permutation(30).astype(float), rng.choice([0, 1], 30, p=[0.7, 0.3])
    t[0] = 1
    hit = t[np.argsort(-s)]
    precision = (np.cumsum(hit) / np.arange(1, 31))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    for interpolated, p in ((False, precision), (True, envelope)):
        assert_allclose(run(backend, s, t, 0 if hard else 1.0, interpolated)[0], 1 - p[hit == 1].mean(), atol=1e-12)


@backends
@pytest.mark.parametrize("P, N", [(1, 1), (3, 5), (300, 700)])
def test_all_tied(backend, P, N):
    value, g = run(backend, np.full(P + N, -4.6), np.repeat([1, 0], [P, N]))
    assert_allclose(value, N / (N + P + 1), rtol=1e-12)
    assert_allclose(g, np.repeat([-N / (P * (N + P + 1)), 1 / (N + P + 1)], [P, N]), rtol=1e-12)


@backends
def test_score_shift_between_images_counts_only_when_pooled(backend):
    """E5 and T12: each image is in order alone, both together are not, so a mean over images is another loss."""
    s, t = np.array([[4.0, 2], [0, -2]]), np.array([[1, 0], [1, 0]])
    for image in range(2):
        value, g = run(backend, s[image], t[image], 0.5)
        assert value == 0 and not g.any()
    assert_allclose(run(backend, s, t, 0.5)[0], 1 / 6, rtol=1e-12)


@pytest.mark.parametrize("delta", [np.float32(0.5), np.int64(1), np.float64(0)])
def test_delta_of_any_number_and_no_minus_zero(delta):
    s, t = np.array([1.0, -9]), np.array([1, 0])
    for backend in ("numpy", "numba"):
        value, g = run(backend, s, t, delta)
        assert math.copysign(1, value) == 1 and value == 0 and not np.signbit(g).any()
        assert run(backend, s, t[::-1], delta)[0] == run(backend, s, t[::-1], float(delta))[0]


@backends
def test_shape_is_kept(backend):
    s, t = np.array(EXACT["E7"][0]).reshape(2, 2, 2), np.array(EXACT["E7"][1]).reshape(2, 2, 2)
    value, g = run(backend, s, t)
    agree((value, g.ravel()), (34 / 75, [float(v) for v in EXACT["E7"][5]]), 1e-14)
    value, g = run(backend, np.ascontiguousarray(s.T).T, np.ascontiguousarray(t.T).T)
    agree((value, g.ravel()), (34 / 75, [float(v) for v in EXACT["E7"][5]]), 1e-14)


@backends
@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1], [-1], [-1, 0], [1, -1], [1], [0]])
def test_no_positive_or_no_negative_gives_zeros(backend, labels):
    for delta, interpolated, dtype in ((0, True, np.float32), (1, False, np.float64), (1, True, np.float32)):
        value, g = run(backend, np.arange(len(labels), dtype=dtype), np.array(labels, int), delta, interpolated)
        assert value == 0 and not g.any()


@backends
@pytest.mark.parametrize("delta", [0, 1e-100, 1, 1e10, 1e100])
def test_scores_of_any_size(backend, delta):
    """Sums of scores leave what 64 bits hold, what is left in a window does not."""
    for s in ([1e300, -1e300, 1.7e308, -1.7e308, 0], [1e17, 1e17, 1e17 + 16, -1e17, 1e17 - 16], [5e-324, 0, -5e-324, 0, 1e-300],
              [1e-30, 0, -1e-30, 2e-30, 5e-31], [1e10, 0, -1e10, 5e9, 3e10], [1e16, 1e16 + 2, 1e16 - 2, 1e16 + 4, 1e16]):
        for t in ([1, 0, 1, 0, 0], [0, 1, 0, 1, 1]):
            agree(run(backend, np.array(s), np.array(t), delta), by_definition(np.array(s), np.array(t), delta), 1e-12)


MAX = np.finfo(float).max


@pytest.mark.parametrize("reach", [5e-324, 1e-100, 1.0, 1e100])
def test_edges_of_windows_are_rounded_up_from_exact_sums(reach):
    """v >= edge is v > p - reach, or v >= p + reach, for every float64 v: so the place of a score tells its windows, whatever the scores."""
    tie = [-1 + 2**-53, 1 - 2**-53, 1 + 2**-52, 1e16, 1e16 + 2, -1e17, 0, 1, -1, 1e100, -1e100, 5e-324, -5e-324, MAX, -MAX]
    p = np.sort(np.concatenate([np.random.default_rng(0).standard_normal(100) * max(reach, 1e-300), tie]))
    edges, enter, leave = op._edges(p, reach)
    assert (np.diff(edges) >= 0).all()
    assert_array_equal(np.sort(np.concatenate([enter, leave])), np.arange(2 * len(p)))

    def exact(v):
        return Fraction(v) if math.isfinite(v) else Fraction(10)**400 * (1 if v > 0 else -1)
    for q, start, end in zip(p, edges[enter], edges[leave]):
        assert exact(math.nextafter(start, -math.inf)) <= Fraction(q) - Fraction(reach) < exact(start)
        assert exact(math.nextafter(end, -math.inf)) < Fraction(q) + Fraction(reach) <= exact(end)


@pytest.mark.parametrize("delta", [0, 1e-100, 1, 1e100])
def test_outliers_that_crowd_the_table_of_searches(delta):
    """The largest floats, and all other scores in one cell; by Numba, which alone has the table."""
    s, t = sample(300, 40)
    for outliers in ([1e9, -1e9], [1e300, 0], [MAX, -MAX, MAX]):
        for labels in np.ndindex((2,) * len(outliers)):
            case = np.concatenate([s, outliers]), np.concatenate([t, labels])
            agree(run("numba", *case, delta), run("numpy", *case, delta), 1e-12)
    case = np.array([-MAX, MAX]), np.array([1, 0])
    agree(run("numba", *case, delta), run("numpy", *case, delta), 1e-12)


# Training

@backends
def test_free_scores_become_ranked(backend):
    """T13: s <- s - P g; the gap between positives and negatives nears delta from below."""
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal(300), (rng.random(300) < 0.05).astype(int)
    values = []
    for _ in range(45):
        value, g = run(backend, s, t)
        values.append(value)
        s -= t.sum() * g
    assert values[0] > 0.8 and values[-1] < 1e-6
    assert 0.99 < s[t == 1].min() - s[t == 0].max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_scorer_reaches_zero_in_few_steps_with_the_hard_step(seed):
    """T13: separable data, perceptron-style; the theorem asks for finitely many steps."""
    rng = np.random.default_rng(seed)
    w, X = rng.standard_normal(10), rng.standard_normal((1500, 10))
    margin = X @ (w / np.linalg.norm(w)) - 1.75
    X, t = X[abs(margin) > 0.2], (margin > 0)[abs(margin) > 0.2].astype(int)
    found = np.zeros(10)
    for _ in range(200):
        value, g = ap_loss(X @ found, t, delta=0)
        if value == 0:
            break
        found -= X.T @ g
    assert value == 0


# Size

def test_as_many_positives_as_negatives_take_no_pairs():
    """T15: 10^10 pairs would take minutes; and float32 in, no float64 copy of all entries."""
    s, t = sample(200_000, 90_000)
    s, t = s.astype(np.float32), t.astype(np.int8)
    value, g = run("numba", s, t)
    assert_allclose((-g[t == 1].sum(dtype=float), g[t == 0].sum(dtype=float)), value, rtol=1e-6)


def test_memory_is_that_of_the_result_and_little_more():
    s, t = sample(1_000_000, 500)
    s, t = s.astype(np.float32), t.astype(np.int8)
    run("numba", s[:1000], t[:1000])
    tracemalloc.start()
    run("numba", s, t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * s.nbytes


# Arguments

@needs_emulator
@pytest.mark.parametrize("at", [0, 1, 2, 3, 8, 2000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_kernels_make_nan_of_scores_that_are_not_finite(at, value):
    """On a GPU nothing looks at the scores before. Entries 0, 3, 6, ... are positive."""
    s, t = np.random.default_rng(0).standard_normal(2100 if at > 8 else 9), np.tile([1, 0, 0], 700)
    t = t[:len(s)]
    with use("emulated"):
        assert np.isfinite(op._ap_loss_cuda(s, t, 1.0, True)[0])
        s[at] = value
        loss, g = op._ap_loss_cuda(s, t, 1.0, True)
        assert math.isnan(loss) and np.isnan(g).all()
        t[at] = -1
        loss, g = op._ap_loss_cuda(s, t, 1.0, True)
    assert np.isfinite(loss) and np.isfinite(g).all()


@needs_emulator
@pytest.mark.parametrize("label", [-2, 2, 127, 257, -2**40])
def test_the_kernels_make_nan_of_other_labels(label):
    with use("emulated"):
        loss, g = op._ap_loss_cuda(np.zeros(4), np.array([label, 1, 0, -1]), 1.0, True)
    assert math.isnan(loss) and np.isnan(g).all()


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")])
def test_more_positives_than_a_gpu_takes_give_nan(backend, monkeypatch):
    monkeypatch.setattr(op, "MOST", 10)
    s, t = sample(40, 10)
    agree(run(backend, s, t), by_definition(s, t), 1e-9)
    loss, g = run(backend, s, np.where(np.cumsum(t == 0) == 1, 1, t))
    assert math.isnan(loss) and np.isnan(g).all()


@pytest.mark.parametrize("change, error, message", [
    (dict(scores=[0.0]), TypeError, "scores must be an array, got list"),
    (dict(scores=np.zeros(2, int)), TypeError, "scores must be float32 or float64, got int64"),
    (dict(labels=np.zeros((2, 1), int)), ValueError, r"labels must have shape \(2,\), got \(2, 1\)"),
    (dict(labels=np.zeros(2)), TypeError, "labels must be integers, got float64"),
    (dict(labels=np.array([0, 2])), ValueError, r"labels must be -1, 0 or 1, got 0\.\.2"),
    (dict(scores=np.array([0, np.nan])), ValueError, "scores must be finite where labels are 0 or 1, got nan"),
    (dict(scores=np.array([-np.inf, 0])), ValueError, "scores must be finite where labels are 0 or 1, got -inf"),
    (dict(delta=-1), ValueError, r"delta must be 0 or lie in \[1e-100, 1e100\], got -1"),
    (dict(delta=np.nan), ValueError, r"delta must be 0 or lie in \[1e-100, 1e100\], got nan"),
    (dict(delta=np.inf), ValueError, r"delta must be 0 or lie in \[1e-100, 1e100\], got inf"),
    (dict(delta=1e-101), ValueError, r"delta must be 0 or lie in \[1e-100, 1e100\], got 1e-101"),
    (dict(delta=None), TypeError, "delta must be a number, got None"),
    (dict(interpolated=1), TypeError, "interpolated must be True or False, got 1"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^ap_loss\.ap_loss: " + message):
        ap_loss(**{**dict(scores=np.zeros(2), labels=np.zeros(2, int)), **change})
