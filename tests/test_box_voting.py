import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, random_boxes, seeds
from tinydet import use
from tinydet.ops.box_voting import box_voting
from tinydet.ops.boxes import iou

backends = pytest.mark.parametrize("backend", BACKENDS)
thresholds = st.sampled_from([0, 0.25, 0.5, 0.7, 1])


def by_definition(kept, boxes, scores, threshold=0.5, kept_groups=None, groups=None, plus_one=False):
    """Notes 1.9: the mean of the pool's boxes of IoU >= threshold and the same group, weighted by their scores."""
    def area(b):
        return max(0.0, b[2] - b[0] + plus_one) * max(0.0, b[3] - b[1] + plus_one)
    voted = []
    for i, a in enumerate(kept.tolist()):
        total, sums = 0.0, [0.0] * 4
        for j, b in enumerate(boxes.tolist()):
            inter = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
            union = area(a) + area(b) - inter
            if union > 0 and inter >= threshold * union and (groups is None or kept_groups[i] == groups[j]):
                total += scores[j]
                sums = [s + scores[j] * v for s, v in zip(sums, b)]
        voted.append([s / total for s in sums] if total > 0 else a)
    return np.array(voted).reshape(-1, 4)


def run(backend, *arrays, **options):
    with use(backend):
        voted = box_voting(*arrays, **options)                              # on the host
    assert voted.dtype == arrays[0].dtype and voted.shape == arrays[0].shape
    return voted


def crowd(R, P, seed=0, dtype=np.float64):
    """R kept boxes, P boxes of the pool with scores, and groups of both."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 60, (R + P, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 40, (R + P, 2))], 1).astype(dtype)
    groups = dict(kept_groups=rng.integers(-1, 2, R), groups=rng.integers(-1, 2, P))
    return (boxes[:R], boxes[R:], rng.uniform(0.1, 1, P).astype(dtype)), groups


@backends
@given(kept=random_boxes(max_R=8, extent=8), boxes=random_boxes(max_R=12, extent=8), seed=seeds, threshold=thresholds,
       plus_one=st.booleans(), grouped=st.booleans())
def test_votes_are_the_definition_to_the_last_bit(backend, kept, boxes, seed, threshold, plus_one, grouped):
    """On a half-pixel grid, where IoU falls on the thresholds; some scores are 0. The order of adding up is that of the pool."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, len(boxes)) / 7
    groups = dict(kept_groups=rng.integers(0, 3, len(kept)), groups=rng.integers(0, 3, len(boxes))) if grouped else {}
    options = dict(threshold=threshold, plus_one=plus_one, **groups)
    assert_array_equal(run(backend, kept, boxes, scores, **options), by_definition(kept, boxes, scores, **options))


@backends
@pytest.mark.parametrize("dtype, atol", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_fixture_f8(backend, dtype, atol):
    kept = np.array([[0, 0, 99, 99]], dtype)
    boxes = np.array([[0, 0, 99, 99], [10, 0, 109, 99], [0, 50, 99, 149], [4, 4, 95, 103]], dtype)
    voted = run(backend, kept, boxes, np.array([0.9, 0.6, 0.8, 0.3], dtype), plus_one=True)         # the default: 0.5
    assert_allclose(voted, [[4, 2 / 3, 305 / 3, 299 / 3]], atol=atol)


@backends
def test_an_overlap_at_the_threshold_votes(backend):
    kept, boxes = np.array([[0.0, 0, 8, 8]]), np.array([[0.0, 0, 8, 4]])                            # IoU exactly 0.5
    assert_array_equal(run(backend, kept, boxes, np.array([0.5]), threshold=0.5), boxes)
    assert_array_equal(run(backend, kept, boxes, np.array([0.5]), threshold=np.nextafter(0.5, 1)), kept)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_backends_agree_to_the_last_bit_contiguous_or_not(n, dtype):
    (kept, boxes, scores), groups = crowd(n // 3 + 1, n, dtype=dtype)
    before = [a.copy() for a in (kept, boxes, scores, *groups.values())]
    strided = [np.ascontiguousarray(kept.T).T, np.ascontiguousarray(boxes.T).T, np.repeat(scores, 2)[::2]]
    for options in ({}, groups):
        reference = run("numpy", kept, boxes, scores, threshold=0.3, **options)
        exact = by_definition(kept, boxes, scores.astype(np.float64), 0.3, **options)
        assert_array_equal(reference, exact.astype(dtype))                                          # float32: float64 work, rounded
        for backend in RUNNING:
            for arrays in ((kept, boxes, scores), strided):
                assert_array_equal(run(backend, *arrays, threshold=0.3, **options), reference)
    for now, then in zip((kept, boxes, scores, *groups.values()), before, strict=True):
        assert_array_equal(now, then)


@backends
@given(seed=seeds, threshold=st.sampled_from([0.1, 0.3, 0.5]))
def test_properties(backend, seed, threshold):
    (kept, boxes, scores), groups = crowd(6, 20, seed)
    voted = run(backend, kept, boxes, scores, threshold=threshold, **groups)
    votes = (iou(kept, boxes) >= threshold) & (groups["kept_groups"][:, None] == groups["groups"])
    for i in range(len(kept)):                                              # within the hull of its voters
        among = boxes[votes[i]] if votes[i].any() else kept[i:i + 1]
        assert (voted[i] >= among.min(0) - 1e-9).all() and (voted[i] <= among.max(0) + 1e-9).all()
    assert_array_equal(run(backend, kept, boxes, scores * 8, threshold=threshold, **groups), voted)         # only ratios count
    order = np.random.default_rng(seed).permutation(20)
    again = run(backend, kept, boxes[order], scores[order], threshold=threshold, **{**groups, "groups": groups["groups"][order]})
    assert_allclose(again, voted, rtol=1e-12, atol=1e-12)
    for g in (-1, 0, 1):                                                    # each group is its own run
        own, pool = groups["kept_groups"] == g, groups["groups"] == g
        assert_array_equal(run(backend, kept[own], boxes[pool], scores[pool], threshold=threshold), voted[own])


@backends
def test_without_a_vote_a_box_stays_as_it_is(backend):
    (kept, boxes, scores), groups = crowd(5, 7)
    for dtype in (np.float64, np.float32):
        k, b, s = kept.astype(dtype), boxes.astype(dtype), scores.astype(dtype)
        assert_array_equal(run(backend, k, b[:0], s[:0]), k)                # no pool
        assert_array_equal(run(backend, k[:0], b, s), k[:0])                # nothing kept
        assert_array_equal(run(backend, k[:0], b[:0], s[:0], kept_groups=np.zeros(0, int), groups=np.zeros(0, int)), k[:0])
        assert_array_equal(run(backend, k, b + 500, s), k)                  # none overlaps
        assert_array_equal(run(backend, k, k, 0 * s[:5]), k)                # the voters weigh nothing
        assert_array_equal(run(backend, k, b, s, kept_groups=np.full(5, 3), groups=np.arange(7) + 4), k)
    points = np.array([[2.0, 2, 2, 2], [3, 3, 1, 1]])
    assert_array_equal(run(backend, points, points + 0.0, np.ones(2), threshold=0), points)         # empty unions do not vote


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cuda"])
def test_arrays_on_a_gpu_are_refused(backend):
    with use(backend) as put, pytest.raises(TypeError, match="box_voting: this op works on the host"):
        box_voting(put(np.zeros((2, 4))), put(np.zeros((2, 4))), put(np.zeros(2)))


@pytest.mark.parametrize("change, error, message", [
    (dict(kept_boxes=np.zeros((3, 5))), ValueError, r"kept_boxes must have shape \(R, 4\), got \(3, 5\)"),
    (dict(boxes=np.zeros((2, 5))), ValueError, r"boxes must have shape \(P, 4\), got \(2, 5\)"),
    (dict(boxes=np.zeros((2, 4), int)), TypeError, "boxes must be float32 or float64, got int64"),
    (dict(scores=np.zeros(3)), ValueError, r"scores must have shape \(2,\), got \(3,\)"),
    (dict(scores=np.zeros(2, np.float32)), TypeError, "dtypes must agree, got kept_boxes float64, boxes float64, scores float32"),
    (dict(kept_boxes=np.full((3, 4), np.nan)), ValueError, "kept_boxes must be finite, got NaN or infinity"),
    (dict(boxes=np.full((2, 4), np.inf)), ValueError, "boxes must be finite, got NaN or infinity"),
    (dict(scores=np.array([0, np.nan])), ValueError, "scores must be finite, got NaN or infinity"),
    (dict(scores=np.array([0, -0.5])), ValueError, "scores must be at least 0, got -0.5"),
    (dict(threshold=1.5), ValueError, r"threshold must lie in \[0, 1\], got 1.5"),
    (dict(threshold=-0.5), ValueError, r"threshold must lie in \[0, 1\], got -0.5"),
    (dict(threshold=np.nan), ValueError, r"threshold must lie in \[0, 1\], got nan"),
    (dict(groups=np.zeros(2, int)), ValueError, "kept_groups and groups must be given together, got only groups"),
    (dict(kept_groups=np.zeros(3, int)), ValueError, "kept_groups and groups must be given together, got only kept_groups"),
    (dict(kept_groups=np.zeros(2, int), groups=np.zeros(2, int)), ValueError, r"kept_groups must have shape \(3,\), got \(2,\)"),
    (dict(kept_groups=np.zeros(3, int), groups=np.zeros(3, int)), ValueError, r"groups must have shape \(2,\), got \(3,\)"),
    (dict(kept_groups=np.zeros(3, bool), groups=np.zeros(2, int)), TypeError, "kept_groups must be integers, got bool"),
    (dict(kept_groups=np.zeros(3, int), groups=np.zeros(2)), TypeError, "groups must be integers, got float64"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=r"^box_voting\.box_voting: " + message):
        box_voting(**{**dict(kept_boxes=np.zeros((3, 4)), boxes=np.zeros((2, 4)), scores=np.zeros(2)), **change})


@backends
@given(kept=random_boxes(extent=6), boxes=random_boxes(extent=6), seed=seeds, threshold=thresholds)
def test_size_does_not_matter(backend, kept, boxes, seed, threshold):
    """Boxes far smaller than a pixel vote as their enlargements do: to the bit, as 1/64 and 64 are powers of two."""
    scores = np.random.default_rng(seed).random(len(boxes))
    expected = run(backend, kept, boxes, scores, threshold=threshold)
    for scale in (1 / 64, 64):
        assert_array_equal(run(backend, kept * scale, boxes * scale, scores, threshold=threshold), expected * scale)


def test_areas_and_sums_that_overflow_are_refused():
    box, one = np.array([[0.0, 0, 10, 10]]), np.ones(1)
    with pytest.raises(ValueError, match=r"^box_voting\.box_voting: boxes must have areas that float64 holds"):
        box_voting(box, box * 1e160, one)
    with pytest.raises(ValueError, match=r"^box_voting\.box_voting: kept_boxes must have areas that float64 holds"):
        box_voting(box * 1e160, box, one)
    with pytest.raises(ValueError, match=r"^box_voting\.box_voting: scores must have a sum that times a coordinate stays finite"):
        box_voting(box, box, one * 1e308)
