import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, random_boxes, seeds
from tinydet import to_numpy, use
from tinydet.ops.boxes import iou
from tinydet.ops.nms import nms

thresholds = st.sampled_from([0, 0.25, 0.3, 0.5, 0.7, 1])


def by_definition(boxes, scores, threshold, inclusive=False, plus_one=False):
    """Notes 6: by descending score, ties by lower index; keep the best, drop every later one that overlaps it."""
    def sides(a, b):
        return [max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + plus_one) for k in (0, 1)]
    boxes, kept = boxes.tolist(), []
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    while left:
        i = left.pop(0)
        kept.append(i)
        survivors = []
        for j in left:
            inter = np.prod(sides(boxes[i], boxes[j]))
            union = np.prod(sides(boxes[i], boxes[i])) + np.prod(sides(boxes[j], boxes[j])) - inter
            over = inter >= threshold * union if inclusive else inter > threshold * union
            if not (union > 0 and over):
                survivors.append(j)
        left = survivors
    return kept


def run(backend, boxes, scores, *args, **options):
    with use(backend) as put:
        return to_numpy(nms(put(boxes), put(scores), *args, **options))


@st.composite
def cases(draw):
    """Boxes on a half-pixel grid and scores with ties: IoU falls on the thresholds too."""
    boxes = draw(random_boxes(max_R=16, extent=8))
    return boxes, np.random.default_rng(draw(seeds)).integers(0, 6, len(boxes)) / 4


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), threshold=thresholds, inclusive=st.booleans(), plus_one=st.booleans())
def test_kept_boxes_are_the_definition(backend, case, threshold, inclusive, plus_one):
    kept = run(backend, *case, threshold, inclusive, plus_one)
    assert_array_equal(kept, np.array(by_definition(*case, threshold, inclusive, plus_one), np.int64), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold, inclusive, plus_one, kept", [
    (0.5, False, True, [0, 2, 1, 3]), (0.5, True, True, [0, 3]), (0.3, False, True, [0, 3]), (0.3, True, True, [0, 3]),
    (0.5, False, False, [0, 2, 1, 3]), (0.5, True, False, [0, 2, 1, 3]), (0.3, False, False, [0, 3])])
def test_fixture_f6(backend, threshold, inclusive, plus_one, kept):
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 4], [0, 5, 9, 9], [20, 20, 29, 29], [21, 20, 30, 29], [20, 20, 29, 29]], float)
    scores = np.array([0.9, 0.8, 0.9, 0.7, 0.7, 0.6])
    assert run(backend, boxes, scores, threshold, inclusive, plus_one).tolist() == kept


def crowd(n, seed=0, dtype=np.float64):
    """n overlapping boxes of 32 px with scores that repeat."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 40, (n, 2))], 1).astype(dtype), rng.integers(0, n + 1, n).astype(dtype)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
def test_block_borders(n):
    boxes, scores = crowd(n)
    expected = by_definition(boxes, scores, 0.5)
    for backend in BACKENDS:
        assert run(backend, boxes, scores, 0.5).tolist() == expected


def test_numba_equals_numpy_in_float32_at_the_threshold_and_transposed():
    boxes, scores = crowd(300, dtype=np.float32)
    boxes = np.concatenate([boxes, boxes + np.float32(0.1)]).round(1)   # many IoU within float32 rounding of a threshold
    scores, t = np.concatenate([scores, scores]), np.ascontiguousarray(boxes.T).T
    for threshold in np.unique(iou(boxes[:40], boxes[:40]))[1:]:
        for inclusive in (False, True):
            kept = run("numpy", boxes, scores, float(threshold), inclusive)
            assert_array_equal(kept, run("numba", t, scores, float(threshold), inclusive))
            assert_array_equal(kept, run("numpy", t, scores, float(threshold), inclusive))


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_properties(backend, seed, threshold):
    """Notes 7 (c). Distinct scores, IoU off the threshold."""
    rng = np.random.default_rng(seed)
    boxes, _ = crowd(40, seed)
    scores = rng.permutation(40) * 1.0
    kept = run(backend, boxes, scores, threshold)
    overlap = iou(boxes, boxes)
    among = overlap[np.ix_(kept, kept)] - np.eye(len(kept))
    assert (among <= threshold).all()                                       # kept pairs
    for j in set(range(40)) - set(kept.tolist()):                           # each dropped box: a better kept one
        assert any(overlap[i, j] > threshold and scores[i] > scores[j] for i in kept)
    assert (np.diff(scores[kept]) < 0).all()
    assert_array_equal(run(backend, boxes[kept], scores[kept], threshold), np.arange(len(kept)))        # idempotent
    order = rng.permutation(40)
    assert_array_equal(order[run(backend, boxes[order], scores[order], threshold)], kept)               # any order of input
    assert_array_equal(run(backend, boxes, scores, threshold, limit=3), kept[:3])
    assert_array_equal(run(backend, boxes, scores, 1), np.argsort(-scores))                             # 1 keeps all


@pytest.mark.parametrize("backend", BACKENDS)
def test_limit_empty_one_and_boxes_without_area(backend):
    boxes, scores = crowd(5)
    assert run(backend, boxes, scores, 0.5, limit=0).tolist() == []
    for dtype in (np.float64, np.float32):
        kept = run(backend, np.zeros((0, 4), dtype), np.zeros(0, dtype), 0.5)
        assert kept.shape == (0,) and kept.dtype == np.int64
    assert run(backend, boxes[:1], scores[:1], 0).tolist() == [0]
    point = np.array([[2.0, 2, 2, 2], [2, 2, 2, 2], [3, 3, 1, 1]])
    assert run(backend, point, np.array([1.0, 2, 3]), 0, inclusive=True).tolist() == [2, 1, 0]


def test_arguments_stay_whole():
    boxes, scores = crowd(20)
    before = boxes.copy(), scores.copy()
    for backend in BACKENDS:
        run(backend, boxes, scores, 0.5)
    assert_array_equal(boxes, before[0])
    assert_array_equal(scores, before[1])


@pytest.mark.parametrize("change, error, message", [
    (dict(boxes=np.zeros((2, 5))), ValueError, r"boxes must have shape \(R, 4\), got \(2, 5\)"),
    (dict(boxes=np.zeros((2, 4), int)), TypeError, "boxes must be float32 or float64, got int64"),
    (dict(scores=np.zeros(3)), ValueError, r"scores must have shape \(2,\), got \(3,\)"),
    (dict(scores=np.zeros(2, np.float32)), TypeError, "dtypes must agree, got boxes float64, scores float32"),
    (dict(boxes=np.full((2, 4), np.nan)), ValueError, "boxes must be finite, got NaN or infinity"),
    (dict(scores=np.array([0, np.inf])), ValueError, "scores must be finite, got NaN or infinity"),
    (dict(threshold=1.5), ValueError, r"threshold must lie in \[0, 1\], got 1.5"),
    (dict(threshold=np.nan), ValueError, r"threshold must lie in \[0, 1\], got nan"),
    (dict(limit=-1), ValueError, "limit must be at least 0, got -1"),
    (dict(limit=2.0), TypeError, "limit must be an integer, got 2.0"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^nms\.nms: " + message):
        nms(**{**dict(boxes=np.zeros((2, 4)), scores=np.zeros(2), threshold=0.5), **change})
