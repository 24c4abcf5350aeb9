import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import BACKENDS, random_boxes, seeds
from tinydet import to_numpy, use
from tinydet.ops import boxes


def iou_by_definition(a, b, one):
    """Overlap of two boxes; their sides are x2 - x1 + one; 0 where the union is empty."""
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]) + one)
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]) + one)
    union = sum(max(0, c[2] - c[0] + one) * max(0, c[3] - c[1] + one) for c in (a, b)) - w * h
    return w * h / union if union > 0 else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plus_one", [False, True])
@given(a=random_boxes(), b=random_boxes())
def test_iou_is_the_definition(backend, plus_one, a, b):
    with use(backend) as put:
        found = to_numpy(boxes.iou(put(a), put(b), plus_one))
    assert found.shape == (len(a), len(b))
    for i, j in np.ndindex(found.shape):
        assert_allclose(found[i, j], iou_by_definition(a[i], b[j], int(plus_one)), rtol=1e-14)


def positive_boxes(seed, R=8):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-50, 50, (R, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (R, 2))], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plus_one", [False, True])
@given(seed=seeds)
def test_encode_is_the_definition_and_decode_its_inverse(backend, plus_one, seed):
    anchors, targets = positive_boxes(seed), positive_boxes(seed + 1)
    with use(backend) as put:
        deltas = to_numpy(boxes.encode(put(anchors), put(targets), plus_one))
        back = to_numpy(boxes.decode(put(anchors), put(deltas), plus_one))
    for p, g, d in zip(anchors, targets, deltas):
        (pw, ph), (gw, gh) = ((b[2] - b[0] + plus_one, b[3] - b[1] + plus_one) for b in (p, g))
        shift = (g[0] + gw / 2 - p[0] - pw / 2) / pw, (g[1] + gh / 2 - p[1] - ph / 2) / ph
        assert_allclose(d, [*shift, math.log(gw / pw), math.log(gh / ph)], rtol=1e-12, atol=1e-12)
    assert_allclose(back, targets, rtol=1e-12, atol=1e-12)


def test_fixture_f2():
    p, g = np.array([[10.0, 20, 49, 99]]), np.array([[14.0, 10, 63, 89]])
    d1, d0 = boxes.encode(p, g, plus_one=True), boxes.encode(p, g)
    assert_allclose(d1, [[0.225, -0.125, 0.223143551314, 0]], rtol=1e-11)
    assert_allclose(d0, [[0.230769230769, -0.126582278481, 0.228258651981, 0]], rtol=1e-11)
    assert_allclose(boxes.decode(p, d1, plus_one=True), g, rtol=1e-12)
    assert_allclose(boxes.decode(p, d0), g, rtol=1e-12)


def test_overlaps_of_fixture_f6_and_of_the_field_of_view():
    a = np.array([[0, 0, 9, 9], [0, 0, 9, 4], [0, 5, 9, 9], [20, 20, 29, 29], [21, 20, 30, 29], [20, 20, 29, 29]], float)
    inclusive, continuous = boxes.iou(a, a, plus_one=True), boxes.iou(a, a)
    assert inclusive[0, 1] == inclusive[0, 2] == 0.5 and inclusive[3, 5] == 1
    assert_allclose([inclusive[3, 4], continuous[0, 1], continuous[3, 4]], [9 / 11, 4 / 9, 0.8], rtol=1e-14)
    gt, window = np.array([[60.0, 40, 200, 180]]), np.array([[108.0, 72, 329, 293]])       # overfeat notes 4.2
    assert_allclose(boxes.intersection(gt, window) / boxes.area(gt), [[0.5069]], atol=5e-5)


@given(a=random_boxes(), b=random_boxes(), shift=st.integers(-8, 8), scale=st.sampled_from([0.5, 2, 4]))
def test_iou_properties(a, b, shift, scale):
    found = boxes.iou(a, b)
    assert ((0 <= found) & (found <= 1)).all()
    assert_array_equal(found, boxes.iou(b, a).T)
    assert_array_equal(found, boxes.iou(a + shift, b + shift))          # exact: half pixels and powers of two
    assert_array_equal(found, boxes.iou(a * scale, b * scale))
    assert_array_equal(np.diag(boxes.iou(a, a)), boxes.area(a) > 0)
    end = np.array([0, 0, 1, 1])
    assert_array_equal(boxes.iou(a, b, plus_one=True), boxes.iou(a + end, b + end))
    assert_array_equal(boxes.area(a, plus_one=True), boxes.area(a + end))


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_boxes_and_nan(backend):
    with use(backend) as put:
        a = put(np.array([[0.0, 0, 4, 4], [2, 2, 2, 2], [3, 3, 1, 1], [np.nan, 0, 1, 1]]))
        area, iou = to_numpy(boxes.area(a)), to_numpy(boxes.iou(a, a))
    assert_array_equal(area, [16, 0, 0, np.nan])
    assert_array_equal(iou[:3, :3], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert np.isnan(iou[3]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_cuts_the_growth(backend):
    with use(backend) as put:
        box = boxes.decode(put(np.array([[0.0, 0, 16, 16]])), put(np.array([[0.0, 0, 100, math.log(1000 / 16)]])))
    assert_allclose(to_numpy(box), [[-492, -492, 508, 508]], rtol=1e-12)


def test_on_a_gpu_nothing_is_copied_to_the_host_and_a_side_of_zero_gives_no_finite_delta():
    with fake_cupy.installed(), use("cuda") as put:
        a, b = put(np.array([[0.0, 0, 4, 0], [1, 1, 3, 4]])), put(np.array([[1.0, 1, 3, 5], [1, 1, 3, 4]]))
        with fake_cupy.no_copies(), np.errstate(all="ignore"):
            deltas, overlap = boxes.encode(a, b), boxes.iou(a, b)
            back, cut = boxes.decode(b, b), boxes.clip(a, 3, 2)
        deltas, results = to_numpy(deltas), [to_numpy(r) for r in (overlap, back, cut)]
    assert_array_equal(np.isfinite(deltas), [[1, 0, 1, 0], [1, 1, 1, 1]])
    a, b = np.array([[0.0, 0, 4, 0], [1, 1, 3, 4]]), np.array([[1.0, 1, 3, 5], [1, 1, 3, 4]])
    for found, expected in zip(results, (boxes.iou(a, b), boxes.decode(b, b), boxes.clip(a, 3, 2))):
        assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(a=random_boxes())
def test_clip(backend, a):
    with use(backend) as put:
        found = to_numpy(boxes.clip(put(a), height=3, width=5))
    for row, box in zip(found, a):
        assert_array_equal(row, [min(max(v, 0), side) for v, side in zip(box, (5, 3, 5, 3))])
    assert_array_equal(boxes.clip(found, 3, 5), found)
    assert (boxes.area(found) <= boxes.area(a)).all()


def test_float32_empty_and_transposed():
    a, none = positive_boxes(0).astype(np.float32), np.zeros((0, 4), np.float32)
    t = np.ascontiguousarray(a.T).T
    for f in (boxes.iou, boxes.intersection):
        assert f(a, none).shape == (8, 0) and f(none, a).shape == (0, 8)
    for plus_one in (False, True):
        d = boxes.encode(a, a[::-1], plus_one)
        for f, args in ((boxes.iou, (a, t)), (boxes.encode, (t, a)), (boxes.decode, (t, d)), (boxes.encode, (none, none)),
                        (boxes.area, (t,))):
            assert f(*args, plus_one).dtype == np.float32
            assert_array_equal(f(*args, plus_one), f(*map(np.ascontiguousarray, args), plus_one))
        assert_allclose(boxes.decode(t, d, plus_one), a[::-1], atol=1e-4)
    assert boxes.clip(a, 3, 5).dtype == np.float32


def test_sides_below_one_are_coded_too():
    p, g = np.array([[0, 0, 0.5, 0.25]]), np.array([[0.1, 0.1, 0.3, 0.6]])
    assert_allclose(boxes.decode(p, boxes.encode(p, g)), g, rtol=1e-12)


@pytest.mark.parametrize("call, error, message", [
    (lambda a: boxes.area(a[0]), ValueError, r"area: boxes must have shape \(R, 4\), got \(4,\)"),
    (lambda a: boxes.iou(a.astype(int), a), TypeError, "intersection: a must be float32 or float64, got int64"),
    (lambda a: boxes.iou(a, a[:, :3]), ValueError, r"intersection: b must have shape \(B, 4\), got \(2, 3\)"),
    (lambda a: boxes.iou(a, a.astype(np.float32)), TypeError, "intersection: dtypes must agree, got a float64, b float32"),
    (lambda a: boxes.encode(a, a[:1]), ValueError, r"encode: boxes must have shape \(2, 4\), got \(1, 4\)"),
    (lambda a: boxes.encode(a, [[0, 0, 1, 1]] * 2), TypeError, "encode: boxes must be an array, got list"),
    (lambda a: boxes.encode(a * 0, a), ValueError, "encode: every side of anchors and boxes must be positive"),
    (lambda a: boxes.encode(a, a * 0), ValueError, "encode: every side of anchors and boxes must be positive"),
    (lambda a: boxes.encode(a * np.nan, a), ValueError, "encode: every side of anchors and boxes must be positive"),
    (lambda a: boxes.decode(a, a[:1]), ValueError, r"decode: deltas must have shape \(2, 4\), got \(1, 4\)"),
    (lambda a: boxes.clip([1.0], 3, 3), TypeError, "clip: boxes must be an array, got list"),
])
def test_errors(call, error, message):
    with pytest.raises(error, match=r"^boxes\." + message):
        call(np.array([[0.0, 0, 2, 2], [1, 1, 3, 4]]))
