import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import fake_cupy
from tinydet import to_numpy, use
from tinydet.ops import boxes as box_ops, ohem

from conftest import BACKENDS, seeds


def by_definition(losses, boxes, labels, batch, threshold, per_label):
    """The released code, read from the notes: NMS for each label, all that is kept by falling loss, the first `batch`."""
    kept = []
    for label in sorted(set(labels[labels >= 0].tolist())) if per_label else [None]:
        left = [r for r in np.argsort(-losses, kind="stable") if labels[r] >= 0 and (label is None or labels[r] == label)]
        while left:
            kept.append(left.pop(0))
            overlap = box_ops.iou(boxes[kept[-1:]], boxes)[0]
            left = [r for r in left if threshold is None or not overlap[r] > threshold]
    return sorted(kept, key=lambda r: (-losses[r], r))[:batch]


@st.composite
def regions(draw, most=24):
    """losses with ties, boxes on a grid, labels with -1."""
    R, rng = draw(st.integers(0, most)), np.random.default_rng(draw(seeds))
    corner = rng.integers(0, 6, (R, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 5, (R, 2))], 1) / 2
    return rng.integers(0, 9, R) / 4, boxes, rng.integers(-1, 3, R)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=regions(), batch=st.integers(1, 12), threshold=st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]), per_label=st.booleans())
def test_select_is_the_definition(backend, case, batch, threshold, per_label):
    with use(backend) as put:
        losses, boxes, labels = map(put, case)
        chosen = to_numpy(ohem.select(losses, boxes, labels, batch, threshold, per_label))
    assert chosen.dtype == np.int64
    assert_array_equal(chosen, np.array(by_definition(*case, batch, threshold, per_label), np.int64))


F5 = (np.array([2.5, 2.4, .9, 1.7, 3.0, 2.9, .1, 1.2]),
      np.array([[0, 0, 99, 99], [5, 0, 104, 99], [0, 0, 99, 89], [50, 50, 149, 149], [200, 200, 259, 259], [202, 200, 261, 259], [300, 0, 339, 79],
                [0, 0, 99, 99]], float), np.array([1, 1, 0, 0, 2, 2, 0, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold, per_label, chosen", [
    (None, True, {3: [4, 5, 0], 4: [4, 5, 0, 1]}), (0.7, False, {3: [4, 0, 3], 4: [4, 0, 3, 6], 8: [4, 0, 3, 6]}),
    (0.7, True, {3: [4, 0, 3], 4: [4, 0, 3, 7], 8: [4, 0, 3, 7, 6]})])
def test_fixture_f5(backend, threshold, per_label, chosen):
    with use(backend) as put:
        for batch, expected in chosen.items():
            for dtype in (np.float32, np.float64):
                found = ohem.select(put(F5[0].astype(dtype)), put(F5[1].astype(dtype)), put(F5[2]), batch, threshold, per_label, plus_one=True)
                assert to_numpy(found).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=regions(), batch=st.integers(1, 8), per_label=st.booleans())
def test_properties(backend, case, batch, per_label):
    """Sorted by loss; whoever is left out is dropped by a harder one kept or no harder than the easiest chosen; an easier region more changes nothing."""
    losses, boxes, labels = case
    with use(backend) as put:
        chosen = to_numpy(ohem.select(*map(put, case), batch, 0.7, per_label))
        easier = losses[chosen].min(initial=9) - 1
        more = (np.append(losses, max(0, easier)), np.append(boxes, [[0, 0, 3, 3]], 0), np.append(labels, 1))
        again = to_numpy(ohem.select(*map(put, more), batch, 0.7, per_label))
    assert len(set(chosen)) == len(chosen) <= batch and (labels[chosen] >= 0).all() and (np.diff(losses[chosen]) <= 0).all()
    if len(chosen) == batch and easier >= 0:
        assert_array_equal(again, chosen)
    overlap = box_ops.iou(boxes, boxes)
    for r in set(range(len(losses))) - set(chosen):
        over = [s for s in chosen if overlap[r, s] > 0.7 and losses[s] >= losses[r] and (not per_label or labels[r] == labels[s])]
        assert labels[r] < 0 or over or (len(chosen) == batch and losses[r] <= losses[chosen].min())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_regions_are_neither_chosen_nor_drop_others_however_hard(backend):
    losses, boxes, labels = np.array([9., 1, 2, 0]), np.array([[0, 0, 4, 4]] * 3 + [[9, 9, 12, 12]], float), np.array([-1, 0, -1, 1])
    with use(backend) as put:
        for per_label in (True, False):
            assert to_numpy(ohem.select(*map(put, (losses, boxes, labels)), 4, 0.7, per_label)).tolist() == [1, 3]
            assert to_numpy(ohem.select(put(losses), put(boxes), put(np.full(4, -1)), 4, 0.7, per_label)).tolist() == []
            assert to_numpy(ohem.select(put(losses), put(boxes), put(labels), 1, None)).tolist() == [1]


def test_wrong_arguments():
    losses, boxes, labels = F5
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match=rf"^ohem\.select: losses must be finite, got {bad}: lower the learning rate"):
            ohem.select(np.where(np.arange(8) == 3, bad, losses), boxes, labels, 4)
    for args, error, message in (((losses, boxes[:3], labels, 4), ValueError, r"boxes must have shape \(8, 4\)"), ((losses, boxes, labels, 0), ValueError, "batch must be at least 1"),
                                 ((losses, boxes.astype(np.float32), labels, 4), TypeError, "dtypes must agree"),
                                 ((losses, boxes, labels.astype(float), 4), TypeError, "labels must be integers")):
        with pytest.raises(error, match=rf"^ohem\.select: {message}"):
            ohem.select(*args)
    for options, message in (({"fraction": 2}, "fraction must lie"), ({"low": 0.6}, "low <= high"), ({"batch": 0}, "batch must be at least 1")):
        with pytest.raises(ValueError, match=rf"^ohem\.random: {message}|^ohem\.random: .*{message}"):
            ohem.random(labels, losses / 3, **{"batch": 4, "rng": np.random.default_rng(0), **options})
    with pytest.raises(ValueError, match=r"^ohem\.ssd: losses must be finite"):
        ohem.ssd(losses * np.nan, labels, losses / 3)


def test_a_loss_that_is_not_finite_is_seen_on_a_gpu_too():
    losses, boxes, labels = F5
    with fake_cupy.installed(), use("cuda") as put:
        for bad in (np.nan, np.inf):
            with pytest.raises(FloatingPointError, match=rf"^ohem\.select: losses must be finite, got {bad}"):
                ohem.select(put(np.where(np.arange(8) == 3, bad, losses)), put(boxes), put(labels), 2, None)


# What it is compared with

@given(seed=seeds, R=st.integers(0, 60), batch=st.integers(1, 16), low=st.sampled_from([0, 0.1]))
def test_random_keeps_the_quotas(seed, R, batch, low):
    rng = np.random.default_rng(seed)
    overlaps, labels = rng.random(R), rng.integers(-1, 4, R)
    chosen = ohem.random(labels, overlaps, batch, rng, low=low)
    positive, negative = (labels >= 0) & (overlaps >= 0.5), (labels >= 0) & (overlaps < 0.5) & (overlaps >= low)
    assert len(set(chosen)) == len(chosen) and (positive | negative)[chosen].all()
    n = min(int(0.25 * batch + 0.5), positive.sum())
    assert positive[chosen].sum() == n and positive[chosen[:n]].all()
    assert len(chosen) - n == min(batch - n, negative.sum())


def test_random_fills_up_with_background_where_positives_are_few():
    overlaps = np.r_[0.9, np.full(30, 0.3)]
    assert len(ohem.random(np.zeros(31, int), overlaps, 16, np.random.default_rng(0))) == 16            # 1 and 15, not 1 and 12 (notes, sec. 1.6)


def test_random_takes_low_itself_and_not_high():
    overlaps, rng = np.array([0.1, 0.0999, 0.5, 0.4999]), np.random.default_rng(0)
    assert ohem.random(np.zeros(4, int), overlaps, 8, rng, fraction=0.5).tolist() == [2, 0, 3]


def test_ssd_without_a_positive_trains_nothing():
    assert ohem.ssd(np.arange(4.0), np.full(4, 2), np.zeros(4)).tolist() == []
    assert ohem.ssd(np.arange(5.0), np.zeros(5, int), np.array([0.9, 0, 0, 0, 0]), ratio=2).tolist() == [0, 4, 3]


def test_random_draws_evenly():
    overlaps, labels = np.r_[np.full(4, 0.9), np.full(8, 0.2), np.full(8, 0.05)], np.zeros(20, int)
    counts = np.zeros(20)
    for seed in range(600):
        counts[ohem.random(labels, overlaps, 8, np.random.default_rng(seed))] += 1
    assert (abs(counts[:4] / 600 - 0.5) < 0.1).all() and (abs(counts[4:12] / 600 - 0.75) < 0.1).all() and not counts[12:].any()


@given(case=regions(), seed=seeds)
def test_ssd_takes_three_of_the_hardest_for_each_positive(case, seed):
    losses, _, labels = case
    overlaps = np.random.default_rng(seed).random(len(losses))
    chosen = ohem.ssd(losses, labels, overlaps)
    positive, negative = (labels >= 0) & (overlaps >= 0.5), np.flatnonzero((labels >= 0) & (overlaps < 0.5))
    n = int(positive.sum())
    assert_array_equal(chosen[:n], np.flatnonzero(positive))
    assert chosen[n:].tolist() == sorted(negative, key=lambda r: (-losses[r], r))[:3 * n]


@pytest.mark.parametrize("ratio, error, message", [(-1, ValueError, "at least 0, got -1"), (1.5, TypeError, "an integer, got 1.5")])
def test_ssd_refuses_a_ratio(ratio, error, message):
    with pytest.raises(error, match=rf"^ohem\.ssd: ratio must be {message}"):
        ohem.ssd(np.ones(3), np.zeros(3, int), np.ones(3), ratio)


def test_ssd_without_regions():
    assert ohem.ssd(np.zeros(0), np.zeros(0, int), np.zeros(0)).tolist() == []
