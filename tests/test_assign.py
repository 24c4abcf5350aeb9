import tracemalloc

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, random_boxes, seeds
from tinydet import use
from tinydet.ops import assign
from tinydet.ops.boxes import iou


def by_definition(anchors, boxes, one):
    """All overlaps, one by one; the best of each row and column, first on a tie."""
    def sides(a, b):
        return [max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + one) for k in (0, 1)]

    def overlap(a, b):
        inter = sides(a, b)[0] * sides(a, b)[1]
        union = sides(a, a)[0] * sides(a, a)[1] + sides(b, b)[0] * sides(b, b)[1] - inter
        return inter / union if union > 0 else 0.0

    def firsts(rows):
        values = [max(row, default=0.0) for row in rows]
        return np.array([row.index(v) if row else -1 for row, v in zip(rows, values)], np.int64), np.array(values, float)
    table = [[overlap(a, b) for b in boxes.tolist()] for a in anchors.tolist()]
    return (*firsts(table), *firsts([[row[r] for row in table] for r in range(len(boxes))]))


def run(backend, anchors, boxes, **options):
    with use(backend):
        return assign.best(anchors, boxes, **options)                   # on the host


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_array_equal(a, b, strict=True)


def grid(n, seed=0, dtype=np.float64):
    """n boxes on a coarse grid: many are equal, many IoUs too."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 12, (n, 2))
    return np.concatenate([corner, corner + rng.integers(0, 5, (n, 2))], 1).astype(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(anchors=random_boxes(), boxes=random_boxes(), plus_one=st.booleans(), seed=seeds)
def test_best_is_the_definition(backend, anchors, boxes, plus_one, seed):
    """Also where sides are negative, and off the half pixels, where a rounding shows."""
    for scale in (1, 0.1):
        a, b = anchors * scale, boxes * scale
        expected = by_definition(a, b, int(plus_one))
        assert_same(run(backend, a, b, plus_one=plus_one), expected)
    inverted = np.random.default_rng(seed).permuted(anchors, axis=1)
    assert_same(run(backend, inverted, boxes, plus_one=plus_one), by_definition(inverted, boxes, int(plus_one)))
    if not plus_one:
        assert_same(run(backend, anchors, boxes), by_definition(anchors, boxes, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 2, assign.PART - 1, assign.PART, assign.PART + 1, 2 * assign.PART + 1, 5 * assign.PART])
def test_part_borders_and_bits_of_iou(backend, M, all_threads):
    """Random boxes in float32 and float64; and boxes of a grid, whose best anchor is found in many parts: the first wins."""
    rng = np.random.default_rng(M)
    corner, side = rng.uniform(0, 200, (M + 9, 2)), rng.uniform(5, 80, (M + 9, 2))
    for whole in (np.concatenate([corner, corner + side], 1), grid(M + 9), grid(M + 9)[np.arange(M + 9) % 7]):
        for dtype in (np.float32, np.float64):
            anchors, boxes = whole[:M].astype(dtype), whole[M:].astype(dtype)
            for plus_one in (False, True):
                overlap = iou(anchors, boxes, plus_one)
                expected = overlap.argmax(1), overlap.max(1), overlap.argmax(0), overlap.max(0)
                assert_same(run(backend, anchors, boxes, plus_one=plus_one), expected)


@pytest.mark.parametrize("R", [1, 2, 50])
def test_any_number_of_threads_gives_the_same(R, all_threads):
    anchors, boxes = grid(9 * assign.PART + 5), grid(R, 1)
    expected = run("numpy", anchors, boxes)
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        for _ in range(3):
            assert_same(run("numba", anchors, boxes), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_of_each_is_nowhere_passed(backend):
    """An anchor on a box finds it, with IoU 1, and is found by it; every IoU told is that of the pair told, and no other is larger."""
    boxes = np.array([[0.0, 0, 10, 20], [5, 5, 30, 9], [40, 40, 44, 48], [1, 1, 11, 21]])
    anchors = np.concatenate([boxes[::-1], boxes + 3, boxes[:1]])
    box, overlap, anchor, anchor_overlap = run(backend, anchors, boxes)
    assert box[:4].tolist() == [3, 2, 1, 0] and box[-1] == 0 and anchor.tolist() == [3, 2, 1, 0]
    assert (overlap[:4] == 1).all() and (anchor_overlap == 1).all()
    table = iou(anchors, boxes)
    assert_array_equal(table[np.arange(len(anchors)), box], overlap)
    assert (table <= overlap[:, None]).all() and (table <= anchor_overlap).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_boxes_that_nothing_meets(backend):
    box = np.array([[0.0, 0, 4, 4]])
    assert [a.tolist() for a in run(backend, box.repeat(3, 0), box.repeat(2, 0))] == [[0, 0, 0], [1, 1, 1], [0, 0], [1, 1]]
    far = np.array([[90.0, 90, 99, 99], [50, 50, 50, 50], [60, 60, 55, 55]])            # apart, a point, inverted
    assert [a.tolist() for a in run(backend, box.repeat(2, 0), far)] == [[0, 0], [0, 0], [0, 0, 0], [0, 0, 0]]
    assert [a.tolist() for a in run(backend, far, far[1:])] == [[0, 0, 0], [0, 0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_empty(backend, dtype):
    none, two = np.zeros((0, 4), dtype), np.array([[0, 0, 2, 2], [1, 1, 3, 3]], dtype)
    least, zero = np.array([-1, -1]), np.zeros(2, dtype)
    assert_same(run(backend, two, none), (least, zero, least[:0], zero[:0]))
    assert_same(run(backend, none, two), (least[:0], zero[:0], least, zero))
    assert_same(run(backend, none, none), (least[:0], zero[:0], least[:0], zero[:0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_arguments_stay_whole(backend):
    anchors, boxes = grid(40), grid(5, 1)
    expected, before = run(backend, anchors, boxes), (anchors.copy(), boxes.copy())
    for view in (np.asfortranarray, lambda x: np.flip(np.flip(x).copy()), lambda x: x.repeat(2, 0).repeat(2, 1)[::2, ::2]):
        assert_same(run(backend, view(anchors), view(boxes)), expected)
    assert_same((anchors, boxes), before)


def test_numba_never_holds_the_matrix():
    anchors, boxes = grid(50_000, dtype=np.float32), grid(100, 1, np.float32)
    assign.best(anchors, boxes)                                     # compiles
    tracemalloc.start()
    try:
        assign.best(anchors, boxes)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4 * anchors.nbytes                                # 3 MB; the matrix would take 20


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cuda"])
def test_arrays_on_a_gpu_are_refused(backend):
    with use(backend) as put, pytest.raises(TypeError, match="assign: this op works on the host"):
        assign.best(put(np.zeros((2, 4))), put(np.zeros((2, 4))))


@pytest.mark.parametrize("change, error, message", [
    (dict(anchors=np.zeros((2, 5))), ValueError, r"anchors must have shape \(M, 4\), got \(2, 5\)"),
    (dict(boxes=np.zeros(4)), ValueError, r"boxes must have shape \(R, 4\), got \(4,\)"),
    (dict(boxes=[[0, 0, 1, 1]]), TypeError, "boxes must be an array, got list"),
    (dict(anchors=np.zeros((2, 4), int)), TypeError, "anchors must be float32 or float64, got int64"),
    (dict(boxes=np.zeros((2, 4), np.float32)), TypeError, "dtypes must agree, got anchors float64, boxes float32"),
    (dict(anchors=np.full((2, 4), np.nan)), ValueError, "anchors must be finite, got NaN or infinity"),
    (dict(boxes=np.array([[0, 0, np.inf, 1]])), ValueError, "boxes must be finite, got NaN or infinity"),
    (dict(boxes=np.full((1, 4), np.nan), anchors=np.zeros((0, 4))), ValueError, "boxes must be finite, got NaN or infinity"),
    (dict(anchors=np.array([[0, 0, 1e200, 1e200]])), ValueError, r"anchors must have areas that float64 holds, got a box of 1e\+200 pixels"),
    (dict(boxes=np.array([[0, 0, 1e200, 1e200]])), ValueError, r"boxes must have areas that float64 holds, got a box of 1e\+200 pixels"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^assign\.best: " + message):
        assign.best(**{**dict(anchors=np.zeros((2, 4)), boxes=np.zeros((1, 4))), **change})
