import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, random_boxes, seeds
from tinydet import use
from tinydet.ops.merge import MATCHES, MODES, merge


def match_score(a, b, match):
    """Notes 4.3. Boxes without area match only where they coincide (CHOICE of the op)."""
    distance = math.dist([(a[0] + a[2]) / 2, (a[1] + a[3]) / 2], [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2])
    inter = math.prod(max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    if match == "literal":
        return distance + inter
    if areas == 0:
        return 0 if distance == 0 else math.inf
    side = math.sqrt(areas / 2)
    return distance - inter / side if match == "diff" else distance / side + 1 - inter / (areas - inter)


def by_definition(boxes, scores, t, mode, match):
    B = [(b, s, [b]) for b, s in zip(boxes.tolist(), scores.tolist())]      # box, confidence, members
    while len(B) > 1:
        best, i, j = min((match_score(B[i][0], B[j][0], match), i, j) for j in range(len(B)) for i in range(j))
        if best > t:
            break
        members = B[i][2] + B[j][2]
        parts = members if mode == "count" else [B[i][0], B[j][0]]
        box = [sum(p[k] for p in parts) / len(parts) for k in range(4)]
        merged = box, B[i][1] + B[j][1], members
        B = [b for k, b in enumerate(B) if k not in (i, j)] + [merged]
    return np.reshape([b for b, _, _ in B], (-1, 4)), np.array([s for _, s, _ in B]), [len(m) for _, _, m in B]


def run(backend, boxes, scores, *args, **options):
    with use(backend):
        return merge(boxes, scores, *args, **options)                       # on the host


def cluster(seed, n=14, groups=3):
    """Boxes in loose groups, of generic position: no two pairs match equally well."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0, 60, (groups, 2))[rng.integers(0, groups, n)] + rng.normal(0, 3, (n, 2))
    half = rng.uniform(8, 12, (n, 2))
    return np.concatenate([centre - half, centre + half], 1), rng.uniform(0.1, 1, n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("match", MATCHES)
@given(seed=seeds, n=st.integers(0, 10), t=st.sampled_from([-5, 0.1, 0.5, 1, 20, np.inf]))
def test_merge_is_the_definition(backend, mode, match, seed, n, t):
    boxes, scores = cluster(seed, n)
    found = run(backend, boxes, scores, t, mode, match)
    for a, b in zip(found, by_definition(boxes, scores, t, mode, match)):
        assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("match", MATCHES)
@given(boxes=random_boxes(extent=4), t=st.sampled_from([0, 0.5, 2, np.inf]))
def test_numba_equals_numpy_exactly_also_with_ties_and_without_area(mode, match, boxes, t):
    scores = np.arange(len(boxes)) / 8
    for a, b in zip(run("numpy", boxes, scores, t, mode, match), run("numba", boxes, scores, t, mode, match)):
        assert_array_equal(a, b, strict=True)


WORKED = np.array([[10.0, 10, 50, 50], [14, 10, 54, 50], [12, 14, 52, 54], [100, 100, 140, 140]]), np.array([0.5, 0.4, 0.6, 0.3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode, merged, next_best", [("mean", [12, 12, 52, 52], 4.11127), ("count", [12, 34 / 3, 52, 154 / 3], 4.123077)])
def test_worked_example(backend, mode, merged, next_best):
    boxes, scores = WORKED
    for t in (0.5, next_best - 1e-5):
        found = run(backend, boxes, scores, t, mode)
        assert_allclose(found[0], [boxes[3], merged], rtol=1e-12)
        assert_allclose(found[1], [0.3, 1.5], rtol=1e-12)
        assert_array_equal(found[2], [1, 3])
    assert len(run(backend, boxes, scores, next_best + 1e-5, mode)[0]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a, b, value", [(0, 1, 0.281818), (0, 2, 0.365079), (1, 2, 0.365079),
                                         (0, 3, 4.181981), (1, 3, 4.112073), (2, 3, 4.076118)])
def test_match_scores_of_the_worked_example(backend, a, b, value):
    boxes, scores = WORKED[0][[a, b]], WORKED[1][[a, b]]
    assert len(run(backend, boxes, scores, value - 1e-6)[0]) == 2
    assert len(run(backend, boxes, scores, value + 1e-6)[0]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_goes_to_the_lowest_pair(backend):
    boxes = np.array([[0.0, 0, 4, 4], [40, 0, 44, 4], [1, 0, 5, 4], [41, 0, 45, 4]])
    found, _, members = run(backend, boxes, np.ones(4), 0.65)           # pairs (0, 2) and (1, 3) match with 0.65
    assert_array_equal(found, [[0.5, 0, 4.5, 4], [40.5, 0, 44.5, 4]])   # the order in which they were appended
    assert_array_equal(members, [2, 2])
    line = np.array([[0.0, 0, 4, 4], [1, 0, 5, 4], [2, 0, 6, 4]])       # (0, 1) and (1, 2) match equally: (0, 1) merges
    assert_array_equal(run(backend, line, np.ones(3), 0.65)[0], [[2, 0, 6, 4], [0.5, 0, 4.5, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds, t=st.sampled_from([0.3, 0.5, 1.0]))
def test_properties(backend, mode, seed, t):
    boxes, scores = cluster(seed)
    found, confidence, members = run(backend, boxes, scores, t, mode)
    assert_allclose(confidence.sum(), scores.sum(), rtol=1e-12)             # conserved
    assert len(found) <= len(boxes) and members.sum() == len(boxes)
    assert (found >= boxes.min(0)).all() and (found <= boxes.max(0)).all()
    moved = run(backend, 3 * boxes + 7, scores, t, mode)                    # translation and scale
    assert_allclose(moved[0], 3 * found + 7, rtol=1e-12)
    assert_array_equal(moved[2], members)
    order = np.random.default_rng(seed).permutation(len(boxes))             # any order of input: the same set
    shuffled = run(backend, boxes[order], scores[order], t, mode)
    a, b = np.lexsort(found.T), np.lexsort(shuffled[0].T)
    assert_allclose(shuffled[0][b], found[a], rtol=1e-12)
    assert_allclose(shuffled[1][b], confidence[a], rtol=1e-12)
    assert_allclose(merge(found, confidence, -1)[0], found)                 # t < 0: the input


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds)
def test_extreme_thresholds(backend, mode, seed):
    boxes, scores = cluster(seed)
    for a, b in zip(run(backend, boxes, scores, -1e-9, mode), (boxes, scores, np.ones(14, int))):
        assert_array_equal(a, b)
    one, confidence, members = run(backend, boxes, scores, np.inf, mode)
    assert one.shape == (1, 4) and members.tolist() == [14]
    assert_allclose(confidence, [scores.sum()], rtol=1e-12)
    if mode == "count":
        assert_allclose(one[0], boxes.mean(0), rtol=1e-12)                  # the mean of all members


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_boxes_merge_at_zero_and_boxes_without_area_where_they_coincide(backend):
    assert_array_equal(run(backend, WORKED[0][[0, 3, 0]], np.ones(3), 0)[0], WORKED[0][[3, 0]])
    point = np.array([[1.0, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1]])
    assert_array_equal(run(backend, point, np.ones(3), 1e9)[0], [[2, 2, 2, 2], [1, 1, 1, 1]])
    assert_array_equal(run(backend, point, np.ones(3), np.inf, "count")[2], [3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_threshold_is_the_half_of_the_notes(backend):
    """Two boxes of side 10, d apart: match score d/10 + 1 - IoU, 0.41 at d = 1.5 and 0.76 at d = 3."""
    for d, count in ((1.5, 1), (3, 2)):
        assert len(run(backend, np.array([[0.0, 0, 10, 10], [d, 0, 10 + d, 10]]), np.ones(2))[0]) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_one_float32_and_transposed(backend):
    boxes, scores = cluster(0)
    for R in (0, 1):
        found = run(backend, boxes[:R], scores[:R], np.inf)
        for a, b in zip(found, (boxes[:R], scores[:R], np.ones(R, np.int64))):
            assert_array_equal(a, b, strict=True)
    small = run(backend, boxes.astype(np.float32), scores.astype(np.float32))
    turned = run(backend, np.ascontiguousarray(boxes.T).T, scores)
    for a, b, c in zip(run(backend, boxes, scores), small, turned):
        assert_array_equal(a, c)
        assert_allclose(b, a, rtol=1e-5)
    assert small[0].dtype == small[1].dtype == np.float32
    assert_array_equal(boxes, cluster(0)[0])                                # the input stays whole


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cuda"])
def test_arrays_on_a_gpu_are_refused(backend):
    with use(backend) as put, pytest.raises(TypeError, match="merge: this op works on the host"):
        merge(put(np.zeros((2, 4))), put(np.zeros(2)))


@pytest.mark.parametrize("change, error, message", [
    (dict(boxes=np.zeros((2, 5))), ValueError, r"boxes must have shape \(R, 4\), got \(2, 5\)"),
    (dict(scores=np.zeros(3)), ValueError, r"scores must have shape \(2,\), got \(3,\)"),
    (dict(scores=np.zeros(2, np.float32)), TypeError, "dtypes must agree, got boxes float64, scores float32"),
    (dict(boxes=np.full((2, 4), np.nan)), ValueError, "boxes must be finite, got NaN or infinity"),
    (dict(threshold=np.nan), ValueError, "threshold must be a number, got NaN"),
    (dict(mode="median"), ValueError, "mode must be one of .* and match one of .*, got 'median', 'dissimilarity'"),
    (dict(match="iou"), ValueError, "mode must be one of .* and match one of .*, got 'mean', 'iou'"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^merge\.merge: " + message):
        merge(**{**dict(boxes=np.zeros((2, 4)), scores=np.zeros(2)), **change})
