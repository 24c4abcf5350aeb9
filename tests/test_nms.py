import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, RUNNING, random_boxes, seeds
from tinydet import emulate, to_numpy, use
from tinydet.ops import nms as nms_op
from tinydet.ops.boxes import iou
from tinydet.ops.nms import nms

thresholds = st.sampled_from([0, 0.25, 0.3, 0.5, 0.7, 1])


def by_definition(boxes, scores, threshold, inclusive=False, plus_one=False, groups=None):
    """Notes 6: by descending score, ties by lower index; keep the best, drop every later one of its group that overlaps it."""
    def sides(a, b):
        return [max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + plus_one) for k in (0, 1)]
    boxes, kept = boxes.tolist(), []
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    while left:
        i = left.pop(0)
        kept.append(i)
        survivors = []
        for j in left:
            inter = math.prod(sides(boxes[i], boxes[j]))
            union = math.prod(sides(boxes[i], boxes[i])) + math.prod(sides(boxes[j], boxes[j])) - inter
            over = inter >= threshold * union if inclusive else inter > threshold * union
            if not (union > 0 and over and (groups is None or groups[i] == groups[j])):
                survivors.append(j)
        left = survivors
    return kept


def run(backend, boxes, scores, *args, **options):
    with use(backend) as put:
        if options.get("groups") is not None:
            options["groups"] = put(options["groups"])
        return to_numpy(nms(put(boxes), put(scores), *args, **options))


@st.composite
def cases(draw):
    """Boxes on a half-pixel grid, scores with ties, groups: IoU falls on the thresholds too."""
    boxes, rng = draw(random_boxes(max_R=16, extent=8)), np.random.default_rng(draw(seeds))
    return boxes, rng.integers(0, 6, len(boxes)) / 4, rng.integers(-1, 2, len(boxes))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), threshold=thresholds, inclusive=st.booleans(), plus_one=st.booleans(), grouped=st.booleans())
def test_kept_boxes_are_the_definition(backend, case, threshold, inclusive, plus_one, grouped):
    boxes, scores, groups = case
    groups = groups if grouped else None
    kept = run(backend, boxes, scores, threshold, inclusive, plus_one, groups=groups)
    assert_array_equal(kept, np.array(by_definition(boxes, scores, threshold, inclusive, plus_one, groups), np.int64), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), threshold=thresholds, limit=st.integers(0, 8))
def test_groups_are_the_same_as_one_run_for_each_merged_by_score(backend, case, threshold, limit):
    boxes, scores, groups = case
    own = [np.flatnonzero(groups == g) for g in (-1, 0, 1)]
    kept = np.concatenate([rows[run(backend, boxes[rows], scores[rows], threshold)] for rows in own])
    merged = kept[np.lexsort((kept, -scores[kept]))]
    assert_array_equal(run(backend, boxes, scores, threshold, groups=groups), merged)
    assert_array_equal(run(backend, boxes, scores, threshold, groups=groups, limit=limit), merged[:limit])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold, inclusive, plus_one, kept", [
    (0.5, False, True, [0, 2, 1, 3]), (0.5, True, True, [0, 3]), (0.3, False, True, [0, 3]), (0.3, True, True, [0, 3]),
    (0.5, False, False, [0, 2, 1, 3]), (0.5, True, False, [0, 2, 1, 3]), (0.3, False, False, [0, 3])])
def test_fixture_f6(backend, threshold, inclusive, plus_one, kept):
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 4], [0, 5, 9, 9], [20, 20, 29, 29], [21, 20, 30, 29], [20, 20, 29, 29]], float)
    scores = np.array([0.9, 0.8, 0.9, 0.7, 0.7, 0.6])
    assert run(backend, boxes, scores, threshold, inclusive, plus_one).tolist() == kept
    assert run(backend, boxes, scores, threshold, inclusive, plus_one, groups=np.full(6, 7)).tolist() == kept
    if not inclusive:
        assert run(backend, boxes, scores, threshold, plus_one=plus_one).tolist() == kept                   # the default
    alone = run(backend, boxes, scores, threshold, inclusive, plus_one, groups=np.arange(6))
    assert alone.tolist() == [0, 2, 1, 3, 4, 5]                             # each its own group: nothing is dropped


@pytest.mark.parametrize("backend", BACKENDS)
def test_adding_an_offset_per_group_would_leak_left_of_0(backend):
    """Notes 6, trap 2: boxes + group * (largest coordinate + 1) lays the second box on the first, IoU 0.671862."""
    boxes, scores, groups = np.array([[80.0, 80, 141, 141], [-60, -60, -10, -10]]), np.array([0.9, 0.8]), np.array([0, 1])
    shifted = boxes + groups[:, None] * (boxes.max() + 1)
    assert iou(shifted, shifted)[0, 1] == pytest.approx(0.671862, abs=1e-6)
    assert run(backend, shifted, scores, 0.5).tolist() == [0]
    assert run(backend, boxes, scores, 0.5, groups=groups).tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adding_an_offset_per_group_would_move_the_overlap_in_float32(backend):
    """Notes 6, trap 1: at 80 * 1334 one unit in the last place is 1/128 px, and the IoU of small boxes moves by up to 1e-3."""
    rng, offset = np.random.default_rng(0), np.float32(80 * 1334)
    corner, side = rng.uniform(0, 1300, (500, 2)), rng.uniform(4, 30, (500, 2))
    a = np.concatenate([corner, corner + side], 1).astype(np.float32)
    b = (a + rng.uniform(-2, 2, a.shape)).astype(np.float32)
    before, after = (np.diag(iou(p.astype(np.float64), q.astype(np.float64))) for p, q in ((a, b), (a + offset, b + offset)))
    most = np.argsort(-np.abs(after - before))[:20]
    assert np.abs(after - before)[most].min() > 2e-4
    for i in most:
        pair, threshold = np.stack([a[i], b[i]]), (before[i] + after[i]) / 2
        scores, groups = np.array([0.9, 0.8], np.float32), np.array([80, 80])
        assert run(backend, pair, scores, threshold, groups=groups).tolist() == ([0] if before[i] > threshold else [0, 1])
        assert run(backend, pair + offset, scores, threshold).tolist() == ([0] if after[i] > threshold else [0, 1])     # the other


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_groups_of_any_integer_dtype_and_stride(backend, dtype):
    boxes, scores = crowd(60)
    names = np.array([np.iinfo(dtype).min, 3, np.iinfo(dtype).max], dtype)
    spread = np.repeat(names[np.arange(60) % 3], 2)[::2]
    assert not spread.flags["C_CONTIGUOUS"]
    assert run(backend, boxes, scores, 0.3, groups=spread).tolist() == by_definition(boxes, scores, 0.3, groups=np.arange(60) % 3)


def crowd(n, seed=0, dtype=np.float64):
    """n overlapping boxes of 32 px with scores that repeat."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 40, (n, 2))], 1).astype(dtype), rng.integers(0, n + 1, n).astype(dtype)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
def test_block_borders(n):
    boxes, scores = crowd(n)
    groups = np.random.default_rng(1).integers(-2, 3, n)
    expected, grouped = by_definition(boxes, scores, 0.5), by_definition(boxes, scores, 0.5, groups=groups)
    for backend in RUNNING:
        assert run(backend, boxes, scores, 0.5).tolist() == expected, backend
        assert run(backend, boxes, scores, 0.5, groups=groups).tolist() == grouped, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 300])
def test_a_box_meets_every_kept_box_of_its_group(backend, n):
    """n places apart, each with two boxes of either group on it: of these the better stays, wherever the other kept ones lie."""
    place, groups = np.tile(np.arange(n), 4), np.repeat([5, -3, 5, -3], n)
    boxes = place[:, None] * 10 + np.array([0.0, 0, 8, 8])
    for seed in range(3):
        scores = np.random.default_rng(seed).permutation(4 * n) / 4
        order = np.argsort(-scores)
        better = np.unique(np.stack([place, groups], 1)[order], axis=0, return_index=True)[1]
        expected = order[np.sort(better)]
        assert_array_equal(run(backend, boxes, scores, 0.5, groups=groups), expected)
        assert_array_equal(run(backend, boxes, scores, 0.5, groups=groups, limit=n), expected[:n])
        alone = order[np.sort(np.unique(place[order], return_index=True)[1])]
        assert_array_equal(run(backend, boxes, scores, 0.5), alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_numba_equals_numpy_where_hundreds_are_kept(dtype, inclusive, plus_one):
    """Coordinates in tenths of a pixel, thresholds that are IoUs of pairs: the last bit decides."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 4000, (800, 2))
    boxes = (np.concatenate([corner, corner + rng.integers(100, 400, (800, 2))], 1) / 10).astype(dtype)
    boxes, scores, groups = np.concatenate([boxes, boxes + dtype(0.7)]), rng.integers(0, 500, 1600).astype(dtype), rng.integers(0, 3, 1600)
    overlap = np.unique(iou(boxes[:800], boxes[800:], plus_one))
    for threshold in (0, *overlap[len(overlap) // 2::len(overlap) // 8]):
        for names in (None, groups):
            expected = run("numpy", boxes, scores, float(threshold), inclusive, plus_one, groups=names)
            assert_array_equal(run("numba", boxes, scores, float(threshold), inclusive, plus_one, groups=names), expected, strict=True)
            assert_array_equal(run("numba", boxes, scores, float(threshold), inclusive, plus_one, 70, names), expected[:70])
    assert len(expected) > 500


def test_numba_equals_numpy_in_float32_at_the_threshold_and_transposed():
    boxes, scores = crowd(300, dtype=np.float32)
    boxes = np.concatenate([boxes, boxes + np.float32(0.1)]).round(1)   # many IoU within float32 rounding of a threshold
    scores, t = np.concatenate([scores, scores]), np.ascontiguousarray(boxes.T).T
    for threshold in np.unique(iou(boxes[:40], boxes[:40]))[1:]:
        for inclusive in (False, True):
            kept = run("numpy", boxes, scores, float(threshold), inclusive)
            assert_array_equal(kept, run("numba", t, scores, float(threshold), inclusive))
            assert_array_equal(kept, run("numpy", t, scores, float(threshold), inclusive))
        groups = np.arange(len(boxes)) // 7 % 5
        assert_array_equal(run("numpy", boxes, scores, float(threshold), groups=groups),
                           run("numba", t, scores, float(threshold), groups=groups))


# The kernels

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]
needs_emulator = pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_equal_numpy_where_the_last_bit_decides(backend, dtype):
    """Coordinates in tenths of a pixel, thresholds that are IoUs of pairs, also transposed."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 2000, (200, 2))
    boxes = (np.concatenate([corner, corner + rng.integers(100, 400, (200, 2))], 1) / 10).astype(dtype)
    boxes, scores, groups = np.concatenate([boxes, boxes + dtype(0.7)]), rng.integers(0, 150, 400).astype(dtype), rng.integers(0, 2, 400)
    turned = np.ascontiguousarray(boxes.T).T
    for plus_one in (False, True):
        overlap = np.unique(iou(boxes[:200], boxes[200:], plus_one))
        for threshold in (0, *overlap[len(overlap) // 2::len(overlap) // 8]):
            for inclusive, names in ((False, None), (True, groups)):
                expected = run("numpy", boxes, scores, float(threshold), inclusive, plus_one, groups=names)
                assert_array_equal(run(backend, turned, scores, float(threshold), inclusive, plus_one, groups=names), expected, strict=True)
                assert_array_equal(run(backend, boxes, scores, float(threshold), inclusive, plus_one, 70, groups=names), expected[:70])


@pytest.mark.parametrize("backend", KERNELS)
def test_more_words_than_a_small_block_reduces(backend):
    boxes, scores = crowd(4200)
    boxes *= 8                                                              # over 2000 stay
    boxes = boxes[:, [0, 1, 0, 1]] + np.array([0, 0, 30, 30])
    expected = run("numba", boxes, scores, 0.5)
    assert len(expected) > 1000
    assert_array_equal(run(backend, boxes, scores, 0.5), expected)
    assert_array_equal(run(backend, boxes, scores, 0.5, limit=900), expected[:900])


@needs_emulator
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_any_order_of_threads_gives_the_same(order):
    (boxes, scores), groups = crowd(200), np.arange(200) % 2
    with emulate.options(order=order, seed=3):
        assert_array_equal(run("emulated", boxes, scores, 0.3, groups=groups), run("numpy", boxes, scores, 0.3, groups=groups))


@needs_emulator
@pytest.mark.parametrize("at", [0, 62, 65, 99])
@pytest.mark.parametrize("what, value, message", [
    ("boxes", np.nan, "boxes must be finite"), ("boxes", -np.inf, "boxes must be finite"),
    ("scores", np.nan, "scores must be finite"), ("scores", np.inf, "scores must be finite"),
    ("area", (1.1e19, 1.1e19), r"boxes must have areas that float32 holds, got a box of 1\.1e\+19"),
    ("area", (6e37, 0.1), r"boxes must have areas that float32 holds, got a box of 6e\+37")])
def test_the_kernel_finds_values_that_are_not_allowed(at, what, value, message):
    """On a GPU the checks before the launch skip them. Areas that may be, just, are passed."""
    boxes, scores = crowd(100, dtype=np.float32)
    boxes[1] = [0, 0, 1e18, 1e18]
    arguments = np.zeros(100, np.int64), np.float32(0.5), False, np.float32(0), 100
    with use("emulated"):
        assert_array_equal(nms_op._nms_cuda(boxes, scores, *arguments), run("numpy", boxes, scores, 0.5))
        if what == "area":
            boxes[at] = 0, 0, *value
        else:
            dict(boxes=boxes[:, at % 4], scores=scores)[what][at] = value
        with pytest.raises(ValueError, match=r"^nms\.nms: " + message):
            nms_op._nms_cuda(boxes, scores, *arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_boxes_than_a_mask_may_have_are_refused(backend, monkeypatch):
    monkeypatch.setattr(nms_op, "MOST", 100)
    assert len(run(backend, *crowd(100), 1)) == 100
    with pytest.raises(ValueError, match=r"^nms\.nms: on a GPU there must be at most 100 boxes, got 101: keep the best by score before"):
        run(backend, *crowd(101), 1)


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
        for groups in (None, np.zeros(0, int)):
            kept = run(backend, np.zeros((0, 4), dtype), np.zeros(0, dtype), 0.5, groups=groups)
            assert kept.shape == (0,) and kept.dtype == np.int64
    assert run(backend, boxes[:1], scores[:1], 0).tolist() == [0]
    point = np.array([[2.0, 2, 2, 2], [2, 2, 2, 2], [3, 3, 1, 1]])
    assert run(backend, point, np.array([1.0, 2, 3]), 0, inclusive=True).tolist() == [2, 1, 0]


def test_arguments_stay_whole():
    (boxes, scores), groups = crowd(20), np.arange(20) % 3
    before = boxes.copy(), scores.copy(), groups.copy()
    for backend in RUNNING:
        run(backend, boxes, scores, 0.5, groups=groups)
    for now, then in zip((boxes, scores, groups), before, strict=True):
        assert_array_equal(now, then)


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
    (dict(groups=np.zeros(3, int)), ValueError, r"groups must have shape \(2,\), got \(3,\)"),
    (dict(groups=np.zeros((2, 1), int)), ValueError, r"groups must have shape \(2,\), got \(2, 1\)"),
    (dict(groups=np.zeros(2)), TypeError, "groups must be integers, got float64"),
    (dict(groups=np.zeros(2, bool)), TypeError, "groups must be integers, got bool"),
    (dict(groups=[0, 1]), TypeError, "groups must be an array, got list"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^nms\.nms: " + message):
        nms(**{**dict(boxes=np.zeros((2, 4)), scores=np.zeros(2), threshold=0.5), **change})


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), threshold=thresholds, inclusive=st.booleans())
def test_size_does_not_matter(backend, case, threshold, inclusive):
    """Boxes far smaller than a pixel are chosen as their enlargements are."""
    boxes, scores = case[:2]
    expected = run(backend, boxes, scores, threshold, inclusive)
    for scale in (1 / 64, 64):
        assert_array_equal(run(backend, boxes * scale, scores, threshold, inclusive), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_told_apart_by_all_their_bits(backend):
    boxes = np.array([[0.0, 0, 10, 10]] * 3)
    assert_array_equal(run(backend, boxes, np.array([3.0, 2, 1]), 0.5, groups=np.array([0, 2**40, 0])), [0, 1])


@pytest.mark.parametrize("dtype, side", [(np.float32, 1e20), (np.float64, 1e160)])
def test_areas_that_the_dtype_does_not_hold_are_refused(dtype, side):
    boxes, one = np.array([[0, 0, side, side]] * 2, dtype), np.ones(2, dtype)
    with pytest.raises(ValueError, match=rf"^nms\.nms: boxes must have areas that {np.dtype(dtype)} holds, got a box of 1e\+"):
        nms(boxes, one, 0.5)
    assert len(nms(boxes * dtype(1e-10 if dtype == np.float32 else 1e-80), one, 0.5)) == 1
