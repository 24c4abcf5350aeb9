import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, random_boxes, seeds
from tinydet import use
from tinydet.ops.soft_nms import soft_nms

LAST_BITS = 1e-14           # 16 decays by an exp that may differ in the last bit: 16 * 2.2e-16, and some room
methods = pytest.mark.parametrize("method", ["linear", "gaussian"])
backends = pytest.mark.parametrize("backend", BACKENDS)


def by_definition(boxes, scores, method="linear", threshold=0.3, sigma=0.5, min_score=0.001, groups=None, plus_one=False):
    """Notes 6: take the highest score (ties: lowest index), put it out, lower the rest; delete what falls below min_score."""
    def area(b):
        return max(0.0, b[2] - b[0] + plus_one) * max(0.0, b[3] - b[1] + plus_one)
    boxes, s, kept = boxes.tolist(), scores.tolist(), []
    left = [i for i in range(len(s)) if s[i] >= min_score]
    while left:
        i = min(left, key=lambda j: (-s[j], j))
        left.remove(i)
        kept.append(i)
        for j in left:
            a, b = boxes[i], boxes[j]
            inter = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
            union = area(a) + area(b) - inter
            overlap = inter / union if union > 0 else 0.0
            if groups is not None and groups[i] != groups[j]:
                continue
            if method == "gaussian":
                s[j] *= math.exp(-overlap * overlap / sigma)
            elif inter > threshold * union:
                s[j] *= 1 - overlap
        left = [j for j in left if s[j] >= min_score]
    return kept, [s[i] for i in kept]


def run(backend, boxes, scores, *args, **options):
    with use(backend):
        kept, decayed = soft_nms(boxes, scores, *args, **options)           # on the host
    assert kept.dtype == np.int64 and decayed.dtype == scores.dtype and kept.shape == decayed.shape == (len(kept),)
    return kept, decayed


def crowd(n, seed=0, dtype=np.float64):
    """n overlapping boxes with distinct scores in (0, 1], and 4 groups."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 40, (n, 2))], 1)
    return boxes.astype(dtype), ((rng.permutation(n) + 1) / max(n, 1)).astype(dtype), rng.integers(-2, 2, n)


@backends
@given(boxes=random_boxes(max_R=16, extent=8), seed=seeds, threshold=st.sampled_from([0, 0.25, 0.3, 0.5, 1]),
       min_score=st.sampled_from([0, 0.001, 0.25, 0.5]), plus_one=st.booleans(), grouped=st.booleans())
def test_linear_is_the_definition_to_the_last_bit(backend, boxes, seed, threshold, plus_one, min_score, grouped):
    """On a half-pixel grid with tied scores: IoU falls on the thresholds, scores on min_score."""
    rng = np.random.default_rng(seed)
    scores, groups = rng.integers(0, 6, len(boxes)) / 4, rng.integers(0, 3, len(boxes)) if grouped else None
    options = dict(threshold=threshold, plus_one=plus_one, min_score=min_score, groups=groups)
    kept, decayed = run(backend, boxes, scores, "linear", **options)
    expected = by_definition(boxes, scores, "linear", **options)
    assert (kept.tolist(), decayed.tolist()) == expected


@backends
@given(seed=seeds, n=st.integers(0, 16), sigma=st.sampled_from([0.1, 0.5, 2]), plus_one=st.booleans(), grouped=st.booleans())
def test_gaussian_is_the_definition(backend, seed, n, sigma, plus_one, grouped):
    boxes, scores, groups = crowd(n, seed)
    options = dict(sigma=sigma, plus_one=plus_one, groups=groups if grouped else None)
    kept, decayed = run(backend, boxes, scores, "gaussian", **options)
    expected = by_definition(boxes, scores, "gaussian", **options)
    assert kept.tolist() == expected[0]
    assert_allclose(decayed, expected[1], rtol=LAST_BITS)


@backends
@pytest.mark.parametrize("method, kept, decayed", [("linear", [0, 3, 2, 1], [0.95, 0.5, 0.4, 0.163636363636]),
                                                   ("gaussian", [0, 3, 2, 1], [0.95, 0.5, 0.480442441750, 0.199333118287])])
def test_fixture_f7(backend, method, kept, decayed):
    boxes = np.array([[0, 0, 99, 99], [10, 0, 109, 99], [0, 50, 99, 149], [300, 300, 399, 399]], float)
    scores = np.array([0.95, 0.9, 0.6, 0.5])
    for dtype in (np.float64, np.float32):
        found = run(backend, boxes.astype(dtype), scores.astype(dtype), method, plus_one=True)      # the defaults: 0.3, 0.5
        assert found[0].tolist() == kept
        assert_allclose(found[1], decayed, atol=1e-12 if dtype == np.float64 else 1e-7)


@methods
@pytest.mark.parametrize("n", [0, 1, 2, 65, 300])
def test_backends_agree_contiguous_or_not(method, n):
    """Linear: the same bits, in float32 too, as the work is done in float64."""
    for dtype in (np.float64, np.float32):
        boxes, scores, groups = crowd(n, dtype=dtype)
        boxes[n // 2:] = boxes[:n - n // 2].round()                         # some of IoU near 1, and ties among the overlaps
        strided = np.ascontiguousarray(boxes.T).T, np.repeat(scores, 2)[::2], np.repeat(groups, 2)[::2]
        for grouped in (False, True):
            reference = run("numpy", boxes, scores, method, groups=groups if grouped else None)
            for b, s, g in ((boxes, scores, groups), strided):
                for backend in RUNNING:
                    kept, decayed = run(backend, b, s, method, groups=g if grouped else None)
                    assert_array_equal(kept, reference[0])
                    tolerance = 0 if method == "linear" else 1e-13 if dtype == np.float64 else 2e-7
                    assert_allclose(decayed, reference[1], rtol=tolerance)


@methods
@backends
@given(seed=seeds, n=st.integers(1, 30))
def test_properties(backend, method, seed, n):
    boxes, scores, groups = crowd(n, seed)
    kept, decayed = run(backend, boxes, scores, method)
    assert (np.diff(decayed) <= 0).all() and (decayed <= scores[kept]).all() and (decayed >= 0.001).all()
    assert kept[0] == np.argmax(scores) and decayed[0] == scores.max()      # the best is put out first, as it is
    assert len(set(kept.tolist())) == len(kept)
    order = np.random.default_rng(seed).permutation(n)
    again = run(backend, boxes[order], scores[order], method)
    assert_array_equal(order[again[0]], kept)                               # any order of input
    assert_array_equal(again[1], decayed)
    for limit in (0, 1, 3):
        few = run(backend, boxes, scores, method, groups=groups, limit=limit)
        for a, b in zip(few, run(backend, boxes, scores, method, groups=groups), strict=True):
            assert_array_equal(a, b[:limit])


@methods
@backends
@given(seed=seeds, n=st.integers(0, 30))
def test_groups_are_the_same_as_one_run_for_each_merged_by_score(backend, method, seed, n):
    boxes, scores, groups = crowd(n, seed)
    scores = np.ceil(scores * 4) / 4                                        # ties, within and across groups
    kept, decayed = [np.zeros(0, int)], [np.zeros(0)]
    for g in range(-2, 2):
        rows = np.flatnonzero(groups == g)
        i, s = run(backend, boxes[rows], scores[rows], method)
        kept.append(rows[i])
        decayed.append(s)
    kept, decayed = np.concatenate(kept), np.concatenate(decayed)
    order = np.lexsort((kept, -decayed))
    found = run(backend, boxes, scores, method, groups=groups)
    assert_array_equal(found[0], kept[order])
    assert_array_equal(found[1], decayed[order])


@methods
@backends
@given(seed=seeds, n=st.integers(0, 12))
def test_disjoint_boxes_are_sorted_by_score(backend, method, seed, n):
    rng = np.random.default_rng(seed)
    corner = np.stack([np.arange(n) * 10.0 - 30, rng.uniform(-5, 5, n)], 1)
    scores = rng.integers(1, 5, n) / 4
    kept, decayed = run(backend, np.concatenate([corner, corner + 10], 1), scores, method)          # neighbours touch
    assert_array_equal(kept, np.argsort(-scores, kind="stable"))
    assert_array_equal(decayed, scores[kept])


@backends
def test_an_overlap_at_the_threshold_and_a_score_at_the_minimum(backend):
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 4], [50, 50, 59, 59]], float)             # IoU of the first two: exactly 0.5, +1
    scores = np.array([1, 0.5, 0.25])
    assert run(backend, boxes, scores, threshold=0.5, plus_one=True)[1].tolist() == [1, 0.5, 0.25]
    assert run(backend, boxes, scores, threshold=np.nextafter(0.5, 0), plus_one=True)[1].tolist() == [1, 0.25, 0.25]
    assert run(backend, boxes, scores, plus_one=True, min_score=0.25)[0].tolist() == [0, 1, 2]
    assert run(backend, boxes, scores, plus_one=True, min_score=0.26)[0].tolist() == [0]
    assert run(backend, boxes, scores, min_score=1)[0].tolist() == [0]
    assert run(backend, boxes, scores, min_score=1.5)[0].tolist() == []                 # not even the first
    same = np.array([[0.0, 0, 8, 8]] * 3)
    assert run(backend, same, scores)[0].tolist() == [0]                                # 1 - 1 = 0 is below 0.001
    assert [a.tolist() for a in run(backend, same, scores, min_score=0)] == [[0, 1, 2], [1, 0, 0]]


@methods
@backends
def test_ties_go_to_the_lowest_index(backend, method):
    """Three times the same box, tied from the start; a pair that is tied once the best is out; a tie that only a decay makes."""
    boxes = np.array([[0.0, 0, 8, 8]] * 3 + [[50, 0, 58, 8], [52, 0, 60, 8], [50, 20, 58, 28]])
    scores = np.array([0.5, 0.5, 0.5, 0.75, 0.75, 1])
    for n, order in ((3, [0, 1, 2]), (6, [5, 3, 0, 4, 1, 2])):
        assert run(backend, boxes[:n], scores[:n], method, min_score=0)[0].tolist() == order
    halves = np.array([[0.0, 0, 8, 4], [0, 0, 8, 8], [20, 0, 28, 8]])        # 1 takes 0 from 0.5 to 0.25, where 2 is
    assert run(backend, halves, np.array([0.5, 1, 0.25]), "linear")[0].tolist() == [1, 0, 2]


@methods
@backends
def test_empty_one_and_boxes_without_area(backend, method):
    for dtype in (np.float64, np.float32):
        for groups in (None, np.zeros(0, int)):
            assert len(run(backend, np.zeros((0, 4), dtype), np.zeros(0, dtype), method, groups=groups)[0]) == 0
    assert [a.tolist() for a in run(backend, np.array([[0.0, 0, 2, 2]]), np.array([0.5]), method)] == [[0], [0.5]]
    points = np.array([[2.0, 2, 2, 2], [2, 2, 2, 2], [3, 3, 1, 1]])
    assert [a.tolist() for a in run(backend, points, np.array([0.25, 0.5, 1]), method)] == [[2, 1, 0], [1, 0.5, 0.25]]


@methods
@backends
def test_float32_is_the_float64_work_rounded_and_arguments_stay_whole(backend, method):
    boxes, scores, groups = crowd(40, dtype=np.float32)
    before = boxes.copy(), scores.copy(), groups.copy()
    kept, decayed = run(backend, boxes, scores, method, groups=groups)
    wide = run(backend, boxes.astype(np.float64), scores.astype(np.float64), method, groups=groups)
    assert_array_equal(kept, wide[0])
    assert_array_equal(decayed, wide[1].astype(np.float32))
    run(backend, *crowd(40)[:2], method)
    for now, then in zip((boxes, scores, groups), before, strict=True):
        assert_array_equal(now, then)
    wide = crowd(40)
    before = [a.copy() for a in wide]
    run(backend, *wide[:2], method, groups=wide[2])
    for now, then in zip(wide, before, strict=True):
        assert_array_equal(now, then)


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cuda"])
def test_arrays_on_a_gpu_are_refused(backend):
    with use(backend) as put, pytest.raises(TypeError, match="soft_nms: this op works on the host"):
        soft_nms(put(np.zeros((2, 4))), put(np.zeros(2)))


@pytest.mark.parametrize("change, error, message", [
    (dict(boxes=np.zeros((2, 5))), ValueError, r"boxes must have shape \(R, 4\), got \(2, 5\)"),
    (dict(boxes=np.zeros((2, 4), int)), TypeError, "boxes must be float32 or float64, got int64"),
    (dict(scores=np.zeros(3)), ValueError, r"scores must have shape \(2,\), got \(3,\)"),
    (dict(scores=np.zeros(2, np.float32)), TypeError, "dtypes must agree, got boxes float64, scores float32"),
    (dict(boxes=np.full((2, 4), np.nan)), ValueError, "boxes must be finite, got NaN or infinity"),
    (dict(scores=np.array([0, np.nan])), ValueError, "scores must be finite, got NaN or infinity"),
    (dict(scores=np.array([0, -0.5])), ValueError, "scores must be at least 0, got -0.5"),
    (dict(method="hard"), ValueError, "method must be one of linear, gaussian, got 'hard'"),
    (dict(threshold=1.5), ValueError, r"threshold must lie in \[0, 1\], got 1.5"),
    (dict(threshold=-0.1), ValueError, r"threshold must lie in \[0, 1\], got -0.1"),
    (dict(threshold=np.nan), ValueError, r"threshold must lie in \[0, 1\], got nan"),
    (dict(sigma=0), ValueError, "sigma must be finite and > 0, got 0"),
    (dict(sigma=np.inf), ValueError, "sigma must be finite and > 0, got inf"),
    (dict(sigma=np.nan), ValueError, "sigma must be finite and > 0, got nan"),
    (dict(min_score=-1), ValueError, "min_score must be finite and >= 0, got -1"),
    (dict(min_score=np.inf), ValueError, "min_score must be finite and >= 0, got inf"),
    (dict(limit=-1), ValueError, "limit must be at least 0, got -1"),
    (dict(limit=2.0), TypeError, "limit must be an integer, got 2.0"),
    (dict(groups=np.zeros(3, int)), ValueError, r"groups must have shape \(2,\), got \(3,\)"),
    (dict(groups=np.zeros(2, bool)), TypeError, "groups must be integers, got bool"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^soft_nms\.soft_nms: " + message):
        soft_nms(**{**dict(boxes=np.zeros((2, 4)), scores=np.zeros(2)), **change})
    for bound in (0, 1):
        soft_nms(np.zeros((2, 4)), np.zeros(2), threshold=bound, sigma=1e-3, min_score=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["linear", "gaussian"])
@given(boxes=random_boxes(max_R=16, extent=8), seed=seeds)
def test_size_does_not_matter(backend, method, boxes, seed):
    """Boxes far smaller than a pixel decay as their enlargements do."""
    scores = np.random.default_rng(seed).random(len(boxes))
    expected = run(backend, boxes, scores, method)
    for scale in (1 / 64, 64):
        for a, b in zip(run(backend, boxes * scale, scores, method), expected):
            assert_array_equal(a, b)


def test_areas_that_the_dtype_does_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"^soft_nms\.soft_nms: boxes must have areas that float64 holds, got a box of 1e\+160"):
        soft_nms(np.array([[0, 0, 1e160, 1e160]]), np.ones(1))
