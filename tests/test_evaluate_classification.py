import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import seeds
from tinydet.data import Example
from tinydet.evaluate_classification import ErrorRate, classification_error, localization_error, top_k_error


def example(boxes, labels, difficult=None, name="picture"):
    difficult = [False] * len(boxes) if difficult is None else difficult
    return Example(name, None, (99, 99), np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64), np.array(difficult, bool))


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
