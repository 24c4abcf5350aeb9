import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import seeds
from tinydet import evaluate
from tinydet.data import Example
from tinydet.evaluate_classification import (ErrorRate, classification_ap, classification_error, localization_error, location_ap, location_hits,
                                             presence, top_k_error)


def example(boxes, labels, difficult=None, name="picture", tags=None):
    difficult = [False] * len(boxes) if difficult is None else difficult
    return Example(name, None, (99, 99), np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64), np.array(difficult, bool), tags)


# The definitions

def top_k_by_definition(scores, labels, k):
    """Take the best class k times over, the lower one of equals."""
    wrong = []
    for row, label in zip(scores.tolist(), labels):
        left, taken = list(range(len(row))), []
        while left and len(taken) < k:
            best = left[0]
            for c in left:
                if row[c] > row[best]:
                    best = c
            left.remove(best)
            taken.append(best)
        wrong.append(label not in taken)
    return wrong


def overlap(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def guesses_by_definition(guesses, examples, iou, k):
    """Notes 4.4: (wrong in class, wrong in class or place), image by image."""
    classes, places = [], []
    for (boxes, labels), e in zip(guesses, examples):
        named = placed = False
        for g in range(min(k, len(boxes))):
            for r in range(len(e.boxes)):
                if labels[g] == e.labels[r] and not e.difficult[r]:
                    named = True
                    placed = placed or overlap(boxes[g], e.boxes[r]) >= iou
        classes.append(not named)
        places.append(not placed)
    return classes, places


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, k=st.integers(1, 7))
def test_top_k_is_the_definition(dtype, seed, k):
    rng = np.random.default_rng(seed)
    N, K = rng.integers(1, 30), rng.integers(1, 7)
    scores, labels = rng.choice([-np.inf, -1, 0, 0.5, 2], (N, K)).astype(dtype), rng.integers(0, K, N)     # ties abound
    result = top_k_error(scores, labels, k)
    assert_array_equal(result.wrong, top_k_by_definition(scores, labels, k))
    assert result.wrong.dtype == bool and result.error == sum(result.wrong) / N
    assert k < K or result.error == 0


def random_guesses(seed, K=4, images=6):
    """Few places and sizes: equal boxes and IoUs of exactly 1/2 abound. Each image has an object that counts."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.integers(0, 3, (n, 2)) * 2
        return np.concatenate([corner, corner + rng.choice([2, 4], (n, 2))], 1).astype(float)

    examples = [example(boxes(n + 1), rng.integers(0, K, n + 1), np.append(rng.random(n) < 0.4, False))
                for n in rng.integers(0, 4, images)]
    return [(boxes(n), rng.integers(0, K + 1, n)) for n in rng.integers(0, 8, images)], examples


@given(seed=seeds, iou=st.sampled_from([0.25, 0.5, 1.0]), k=st.integers(1, 8))
def test_guesses_are_the_definition(seed, iou, k):
    guesses, examples = random_guesses(seed)
    classes, places = guesses_by_definition(guesses, examples, iou, k)
    assert_array_equal(classification_error(guesses, examples, k).wrong, classes)
    result = localization_error(guesses, examples, iou, k)
    assert_array_equal(result.wrong, places)
    assert result.wrong.dtype == bool and result.error == sum(places) / len(places)


# By hand

def test_vote_of_the_notes():
    scores = np.array([[0.65, 0.55, 0.30]] * 3)                     # notes 3.3
    for k, wrong in ((1, [False, True, True]), (2, [False, False, True]), (3, [False] * 3), (4, [False] * 3)):
        result = top_k_error(scores, np.arange(3), k)
        assert_array_equal(result.wrong, wrong)
        assert result.error == pytest.approx(sum(wrong) / 3)


def test_ties_go_to_the_lower_class():
    scores, labels = np.array([[1, 2, 2, 2, 0]] * 5, float), np.arange(5)
    assert_array_equal(top_k_error(scores, labels, 1).wrong, [True, False, True, True, True])
    assert_array_equal(top_k_error(scores, labels, 2).wrong, [True, False, False, True, True])
    assert_array_equal(top_k_error(scores, labels, 4).wrong, [False, False, False, False, True])
    assert_array_equal(top_k_error(np.zeros((7, 7)), np.arange(7)).wrong, [False] * 5 + [True] * 2)        # k is 5


def test_localization_by_hand():
    e = example([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], [0, 0, 1, 2], [False, False, False, True])
    cases = [  # boxes, labels, wrong in class, wrong in class or place
        ([[0, 0, 10, 5]], [0], False, False),                       # IoU of exactly 1/2
        ([[0, 0, 10, 4.999]], [0], False, True),
        ([[20, 0, 30, 10]], [0], False, False),                     # any object of the class
        ([[0, 0, 10, 10]], [1], False, True),                       # right class and right box, but not of that class
        ([[0, 0, 10, 10], [40, 0, 50, 10]], [1, 0], False, True),   # the guesses do not help each other
        ([[0, 0, 10, 10]], [3], True, True),
        ([[60, 0, 70, 10]], [2], True, True),                       # difficult
        ([], [], True, True),
        ([[80, 0, 90, 10]] * 4 + [[40, 0, 50, 10]], [3] * 4 + [1], False, False),       # the fifth guess
        ([[80, 0, 90, 10]] * 5 + [[40, 0, 50, 10]], [3] * 5 + [1], True, True),         # the sixth comes too late
    ]
    guesses, examples = [case[:2] for case in cases], [e] * len(cases)
    assert_array_equal(classification_error(guesses, examples).wrong, [case[2] for case in cases])
    result = localization_error(guesses, examples)
    assert_array_equal(result.wrong, [case[3] for case in cases])
    assert result.error == 0.7
    assert localization_error(guesses, examples, k=6).error == 0.6
    assert localization_error(guesses[:1], examples[:1], iou=0.51).error == 1


def test_a_difficult_object_beside_one_that_counts():
    e = example([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0], [True, False])
    assert localization_error([([[0, 0, 10, 10]], [0])], [e]).error == 1
    assert classification_error([([[0, 0, 10, 10]], [0])], [e]).error == 0


# Properties

@given(seed=seeds)
def test_more_guesses_and_less_overlap_never_hurt(seed):
    guesses, examples = random_guesses(seed)
    classes = [classification_error(guesses, examples, k).wrong for k in range(1, 8)]
    places = [localization_error(guesses, examples, 0.5, k).wrong for k in range(1, 8)]
    for rows in (classes, places, [localization_error(guesses, examples, iou).wrong for iou in (1, 0.75, 0.5, 0.25, 0)]):
        assert all((b <= a).all() for a, b in zip(rows, rows[1:]))
    assert all((a <= b).all() for a, b in zip(classes, places))
    assert_array_equal(localization_error(guesses, examples, 0).wrong, classification_error(guesses, examples).wrong)


def test_no_images():
    for result in (top_k_error(np.zeros((0, 3)), np.zeros(0, int)), top_k_error(np.zeros((0, 0)), np.zeros(0, int), 1),
                   classification_error([], []), localization_error([], [])):
        assert isinstance(result, ErrorRate) and result.wrong.shape == (0,) and result.wrong.dtype == bool and math.isnan(result.error)


# Errors

@pytest.mark.parametrize("scores, labels, k, error, message", [
    (np.zeros((2, 3)), np.zeros(3, int), 1, ValueError, r"labels must have shape \(2,\), got \(3,\)"),
    (np.zeros(3), np.zeros(3, int), 1, ValueError, r"scores must have shape \(N, K\), got \(3,\)"),
    (np.zeros((2, 3), int), np.zeros(2, int), 1, TypeError, "scores must be float32 or float64, got int64"),
    (np.zeros((2, 3)), np.zeros(2), 1, TypeError, "labels must be integers, got float64"),
    (np.zeros((2, 3)), np.array([0, 3]), 1, ValueError, r"labels must lie in 0\.\.2, got 0\.\.3"),
    (np.zeros((2, 3)), np.array([-1, 2]), 1, ValueError, r"labels must lie in 0\.\.2, got -1\.\.2"),
    (np.array([[0, np.nan]]), np.zeros(1, int), 1, ValueError, "scores must be numbers, got NaN"),
    (np.zeros((2, 3)), np.zeros(2, int), 0, ValueError, "k must be at least 1, got 0"),
    (np.zeros((2, 3)), np.zeros(2, int), 1.0, TypeError, "k must be an integer, got 1.0"),
])
def test_errors_of_top_k(scores, labels, k, error, message):
    with pytest.raises(error, match=r"^evaluate_classification\.top_k_error: " + message):
        top_k_error(scores, labels, k)


@pytest.mark.parametrize("function", [classification_error, localization_error])
@pytest.mark.parametrize("guesses, change, message", [
    ([], {}, "there must be guesses for each image, got 0 for 1 images"),
    ([([[0, 0, 9, 9]], [0, 1])], {}, r"labels of image 0 must have shape \(1,\), one a box, got \(2,\)"),
    ([([[0, 0, np.nan, 9]], [0])], {}, "boxes must be finite, got NaN or infinity"),
    ([([], [])], {"difficult": [True]}, "each image must have an object that is not difficult, got none in image 0, 'picture'"),
    ([([], [])], {"boxes": [], "labels": []}, "each image must have an object that is not difficult, got none in image 0, 'picture'"),
    ([([], [])], {"k": 0}, "k must be at least 1, got 0"),
])
def test_errors_of_guesses(function, guesses, change, message):
    given = {"boxes": [[0, 0, 9, 9]], "labels": [0], "difficult": None, "k": 5} | change
    with pytest.raises(ValueError, match=rf"^evaluate_classification\.{function.__name__}: {message}"):
        function(guesses, [example(given["boxes"], given["labels"], given["difficult"])], k=given["k"])


@pytest.mark.parametrize("iou", [-0.1, 1.1, math.nan])
def test_errors_of_iou(iou):
    with pytest.raises(ValueError, match=r"^evaluate_classification\.localization_error: iou must lie in 0\.\.1, got"):
        localization_error([], [], iou)


# AP of images: the definitions

def ap_by_definition(scores, right, labels, eleven_point):
    """Notes 4.6, one class: (AP, recall, precision). Precision at a level is the best at that recall or beyond; levels: all that there are."""
    left, ranked = [i for i in range(len(scores)) if labels[i] != -1], []
    while left:
        best = left[0]
        for i in left:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        ranked.append(best)
    n, found, curve = sum(y == 1 for y in labels), 0, []
    for seen, i in enumerate(ranked, 1):
        found += bool(right[i])
        curve.append((found, found / seen))
    levels = [n * t for t in np.arange(0, 1.1, 0.1)] if eleven_point else range(1, n + 1)
    best = [max((p for f, p in curve if f >= level), default=0) for level in levels]
    return sum(best) / len(best) if n else math.nan, [f / n if n else 0 for f, _ in curve], [p for _, p in curve]


def random_ranking(seed, dtype=np.float64, N=None, K=3):
    """scores with ties, hits also where the class is not, labels 1, 0, -1; the last class has no positives."""
    rng = np.random.default_rng(seed)
    N = rng.integers(0, 20) if N is None else N
    labels = rng.choice([1, 1, 0, 0, -1], (N, K))
    labels[:, -1] = rng.choice([0, -1], N)
    return rng.choice([-3, 0, 0.25, 0.5, 7], (N, K)).astype(dtype), rng.random((N, K)) < 0.6, labels


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds)
def test_ap_of_images_is_the_definition(dtype, eleven_point, seed):
    scores, hits, labels = random_ranking(seed, dtype)
    for results, right in ((classification_ap(scores, labels, "abc", eleven_point), labels == 1),
                           (location_ap(scores, hits, labels, "abc", eleven_point), (labels == 1) & hits)):
        assert list(results) == ["a", "b", "c"]
        for k, r in enumerate(results.values()):
            ap, recall, precision = ap_by_definition(scores[:, k].tolist(), right[:, k], labels[:, k].tolist(), eleven_point)
            if not (eleven_point and r.positives in (5, 10, 15)):   # its grid has rounded tenths: see average_precision
                assert r.ap == pytest.approx(ap, abs=1e-12, nan_ok=True)
            assert_array_equal(r.recall, recall)
            assert_array_equal(r.precision, precision)
            assert r.positives == (labels[:, k] == 1).sum() and (np.diff(r.scores) <= 0).all() and len(r.scores) == len(precision)
        assert math.isnan(results["c"].ap)


@given(seed=seeds, tolerance=st.sampled_from([0, 1, 2.5]))
def test_hits_are_the_definition(seed, tolerance):
    """Whole and half pixels: points on the border abound."""
    rng = np.random.default_rng(seed)
    examples = []
    for n in rng.integers(0, 4, 5):
        corner = rng.integers(0, 12, (n, 2))
        examples.append(example(np.concatenate([corner, corner + rng.integers(1, 6, (n, 2))], 1), rng.integers(0, 3, n), rng.random(n) < 0.3))
    points = rng.integers(-4, 40, (5, 3, 2)) / 2
    hits = location_hits(points, examples, tolerance)
    assert hits.dtype == bool
    for i, e in enumerate(examples):
        for k in range(3):
            x, y = points[i, k]
            assert hits[i, k] == any(x1 - tolerance <= x <= x2 + tolerance and y1 - tolerance <= y <= y2 + tolerance
                                     for (x1, y1, x2, y2), label in zip(e.boxes.tolist(), e.labels) if label == k)


# By hand

def test_presence_by_hand():
    boxes = [[0, 0, 9, 9]] * 3
    examples = [example(boxes, [2, 0, 2], [True, False, False]), example(boxes[:2], [1, 3], [True, True]), example([], []),
                example([], [], tags=np.array([3, 1])), example(boxes[:2], [0, 1], [True, True], tags=np.array([1]))]
    found = presence(examples, 4)
    assert_array_equal(found, [[1, 0, 1, 0], [0, -1, 0, -1], [0, 0, 0, 0], [0, 1, 0, 1], [-1, 1, 0, 0]])
    assert found.dtype == np.int64


def test_tolerance_of_the_notes():
    e = example([[100, 90, 200, 210]], [0])                         # notes 7.21
    points = [(111, 111), (82, 100), (81, 100), (218, 228), (218, 228.5), (150, 72), (150, 71)]
    hits = location_hits(np.array(points, float)[:, None], [e] * len(points))
    assert_array_equal(hits[:, 0], [True, True, False, True, False, True, False])
    for i, s, x in ((0, 1, 111), (8, 1, 367), (0, 2.8, 39.642857), (36, 2.8, 451.071429)):         # centres of cells
        centre = (32 * i + 111) / s
        assert centre == pytest.approx(x, abs=5e-7)
        at = np.array([[[centre, 20]]])
        assert location_hits(at, [example([[centre + 18, 0, 600, 40]], [0])]) and not location_hits(at, [example([[centre + 18.01, 0, 600, 40]], [0])])
        assert not location_hits(at, [example([[centre - 5, 0, 600, 40]], [1])])        # of another class


def test_a_difficult_object_is_a_place_but_not_a_presence():
    e = example([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], [True, False])
    assert location_hits(np.array([[[5.0, 5]]]), [e]) and presence([e], 1) == 1
    assert location_hits(np.array([[[5.0, 5]]]), [example([[0, 0, 10, 10]], [0], [True])])


def test_ap_of_the_notes():
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.2], [0.1]])   # notes 7.22
    labels, hits = np.array([[1], [1], [0], [1], [1], [0]]), np.array([[1], [0], [1], [1], [1], [0]], bool)     # a hit without the class is none
    found = location_ap(scores, hits, labels, ["bird"])["bird"]
    assert_array_equal(found.recall[:5], [0.25, 0.25, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(found.precision[:5], [1, 0.5, 1 / 3, 0.5, 0.6])
    assert found.positives == 4 and found.ap == pytest.approx(0.55)
    assert location_ap(scores, hits, labels, ["bird"], eleven_point=True)["bird"].ap == pytest.approx(0.545455, abs=5e-7)
    assert classification_ap(scores, labels, ["bird"])["bird"].ap == pytest.approx(0.9)
    assert classification_ap(scores, labels, ["bird"], eleven_point=True)["bird"].ap == pytest.approx(0.909091, abs=5e-7)


def test_equal_scores_go_by_the_order_of_the_images():
    labels = np.array([[0, 1]] * 20 + [[1, 0]])
    found = classification_ap(np.zeros((21, 2)), labels, "ab")
    assert found["a"].ap == 1 / 21 and found["b"].ap == 1
    assert classification_ap(np.zeros((21, 2)), labels[::-1], "ab")["a"].ap == 1
    assert evaluate.mean_ap(classification_ap(np.zeros((21, 3)), np.pad(labels, ((0, 0), (0, 1))), "abc")) == pytest.approx(11 / 21)


# Properties

@given(seed=seeds)
def test_a_place_never_helps_and_left_out_images_do_not_matter(seed):
    scores, hits, labels = random_ranking(seed, N=15)
    labels[3, :2] = 1                                               # or AP is NaN
    for eleven_point in (False, True):
        plain, placed = classification_ap(scores, labels, "abc", eleven_point), location_ap(scores, hits, labels, "abc", eleven_point)
        assert all(0 <= placed[k].ap <= plain[k].ap <= 1 for k in "ab")
        everywhere = location_ap(scores, np.ones_like(hits), labels, "abc", eleven_point)
        assert all(everywhere[k].ap == plain[k].ap and placed[k].positives == plain[k].positives for k in "ab")
    kept = labels[:, 0] >= 0
    assert location_ap(scores[kept, :1], hits[kept, :1], labels[kept, :1], "a")["a"].ap == location_ap(scores, hits, labels, "abc")["a"].ap
    order = np.random.default_rng(seed).permutation(15)
    apart = scores + np.arange(15)[:, None] / 1000                  # without ties the order of the images does not matter
    first, second = location_ap(apart, hits, labels, "abc"), location_ap(5 * apart[order] - 3, hits[order], labels[order], "abc")
    assert all(first[k].ap == second[k].ap for k in "ab")


def test_ap_without_images_and_without_classes():
    for results in (classification_ap(np.zeros((0, 2)), np.zeros((0, 2), int), "ab"),
                    location_ap(np.zeros((0, 2)), np.zeros((0, 2), bool), np.zeros((0, 2), int), "ab")):
        assert all(math.isnan(r.ap) and r.positives == len(r.precision) == len(r.recall) == 0 for r in results.values()) and len(results) == 2
    assert classification_ap(np.zeros((3, 0)), np.zeros((3, 0), int), ()) == {}
    assert presence([], 3).shape == (0, 3) and location_hits(np.zeros((0, 3, 2)), []).shape == (0, 3)
    assert not location_hits(np.zeros((1, 3, 2)), [example([], [])]).any()


# Errors

@pytest.mark.parametrize("change, error, message", [
    ({"scores": np.zeros((2, 3), int)}, TypeError, "scores must be float32 or float64, got int64"),
    ({"scores": np.zeros(2)}, ValueError, r"scores must have shape \(N, K\), got \(2,\)"),
    ({"scores": np.full((2, 2), np.nan)}, ValueError, "scores must be finite, got NaN or infinity"),
    ({"scores": np.array([[0, 1], [-np.inf, 0]])}, ValueError, "scores must be finite, got NaN or infinity"),
    ({"labels": np.zeros((2, 2))}, TypeError, "labels must be integers, got float64"),
    ({"labels": np.full((2, 2), 2)}, ValueError, r"labels must be -1, 0 or 1, got 2\.\.2"),
    ({"labels": np.zeros((2, 1), int)}, ValueError, r"labels must have shape \(2, 2\), got \(2, 1\)"),
    ({"classes": "abc"}, ValueError, "there must be a class for each of the 2 columns of scores, got 3"),
    ({"hits": np.zeros((2, 2), int)}, TypeError, "hits must be bool, got int64"),
    ({"hits": np.zeros((1, 2), bool)}, ValueError, r"hits must have shape \(2, 2\), got \(1, 2\)"),
])
def test_errors_of_ap(change, error, message):
    given = {"scores": np.zeros((2, 2)), "hits": np.zeros((2, 2), bool), "labels": np.zeros((2, 2), int), "classes": "ab"} | change
    with pytest.raises(error, match=rf"^evaluate_classification\.location_ap: {message}"):
        location_ap(*given.values())
    if "hits" not in change:
        del given["hits"]
        with pytest.raises(error, match=rf"^evaluate_classification\.classification_ap: {message}"):
            classification_ap(*given.values())


@pytest.mark.parametrize("points, images, tolerance, error, message", [
    (np.zeros((1, 2, 2), int), 1, 18, TypeError, "points must be float32 or float64, got int64"),
    (np.zeros((1, 2, 3)), 1, 18, ValueError, r"points must have shape \(N, K, 2\), got \(1, 2, 3\)"),
    (np.zeros((2, 2, 2)), 1, 18, ValueError, "there must be points for each image, got 2 for 1 images"),
    (np.full((1, 2, 2), np.nan), 1, 18, ValueError, "points must be finite, got NaN or infinity"),
    (np.zeros((1, 2, 2)), 1, -1, ValueError, "tolerance must be a number of pixels, at least 0, got -1"),
    (np.zeros((1, 2, 2)), 1, math.nan, ValueError, "tolerance must be a number of pixels, at least 0, got nan"),
    (np.zeros((1, 2, 2)), 1, math.inf, ValueError, "tolerance must be a number of pixels, at least 0, got inf"),
])
def test_errors_of_hits(points, images, tolerance, error, message):
    with pytest.raises(error, match=r"^evaluate_classification\.location_hits: " + message):
        location_hits(points, [example([[0, 0, 9, 9]], [0])] * images, tolerance)


@pytest.mark.parametrize("change, K, error, message", [
    ({}, 0, ValueError, "K must be at least 1, got 0"), ({}, 3.0, TypeError, "K must be an integer, got 3.0"),
    ({"labels": [3]}, 3, ValueError, r"labels of 'picture' must lie in 0\.\.2, got 3\.\.3"),
    ({"tags": np.array([-1, 1])}, 3, ValueError, r"labels of 'picture' must lie in 0\.\.2, got -1\.\.2"),
])
def test_errors_of_presence(change, K, error, message):
    with pytest.raises(error, match=r"^evaluate_classification\.presence: " + message):
        presence([example(**{"boxes": [[0, 0, 9, 9]], "labels": [2], **change})], K)
