import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import seeds
from tinydet.data import Example
from tinydet.evaluate import ClassResult, average_precision, best_threshold, loosened_iou, mean_ap, summary, table, voc


def example(boxes, labels=None, difficult=None):
    R = len(boxes)
    labels, difficult = [0] * R if labels is None else labels, [False] * R if difficult is None else difficult
    return Example("", None, (99, 99), np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64), np.array(difficult, bool))


def found(boxes, scores, labels=None):
    labels = [0] * len(boxes) if labels is None else labels
    return np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(scores, float)


def continuous(x1, y1, x2, y2):
    """From VOC's pixel counting."""
    return [x1 - 1, y1 - 1, x2, y2]


# Notes F9: all of it is worked by hand
F9_TRUE = [example([continuous(1, 1, 10, 10), continuous(21, 21, 40, 40), continuous(61, 1, 80, 20)], difficult=[False, False, True]),
           example([continuous(11, 11, 30, 30)]), example([])]
F9_FOUND = [found([continuous(*b) for b in [(62, 2, 81, 21), (1, 1, 10, 10), (2, 1, 11, 10), (22, 21, 41, 40), (60, 1, 79, 20)]],
                  [0.95, 0.9, 0.8, 0.6, 0.4]),
            found([continuous(*b) for b in [(11, 11, 30, 20), (12, 12, 31, 31)]], [0.8, 0.5]),
            found([continuous(1, 1, 5, 5)], [0.7])]


@pytest.mark.parametrize("strict, recall, precision, ap07, ap10", [
    (False, [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1], [0, 1, 1 / 2, 2 / 3, 1 / 2, 3 / 5, 1 / 2, 1 / 2], 0.7636363636363637,
     0.7555555555555555),
    (True, [0, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 1, 1], [0, 1, 1 / 2, 1 / 3, 1 / 4, 2 / 5, 1 / 2, 1 / 2], 0.6818181818181817,
     0.6666666666666667),
])
def test_worked_example(strict, recall, precision, ap07, ap10):
    """Difficult match first (0/0), a duplicate, an IoU of exactly 0.5, a tie of scores across images, an image without objects."""
    for eleven_point, ap in ((True, ap07), (False, ap10)):
        r = voc(F9_FOUND, F9_TRUE, ["x"], eleven_point=eleven_point, strict=strict)["x"]
        assert_array_equal(r.recall, recall)
        assert_array_equal(r.precision, precision)
        assert_allclose(r.ap, ap, rtol=1e-15)
        assert r.positives == 3
        assert_array_equal(r.scores, [0.95, 0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4])


def test_worked_example_of_the_ranking():
    tp = np.array([1, 1, 0, 1, 0, 0, 1, 0])                         # notes F10
    recall, precision = np.cumsum(tp) / 5, np.cumsum(tp) / np.arange(1, 9)
    assert_allclose(average_precision(recall, precision, True), 0.6785714285714286, rtol=1e-15)
    assert_allclose(average_precision(recall, precision), 0.6642857142857144, rtol=1e-15)


def test_the_grid_of_eleven_points_has_the_bits_of_arange():
    recall = np.array([1, 2, 3]) / 10                               # notes 5.1: 0.3 < np.arange(0, 1.1, 0.1)[3]
    assert_allclose(average_precision(recall, np.ones(3), True), 3 / 11, rtol=1e-15)
    recall = np.arange(1, 11) / 10                                  # precision falls: each point has its own
    precision = 1 - recall / 2
    points = [precision[0], *(precision[k if k in (3, 6, 7) else k - 1] for k in range(1, 11))]
    assert_allclose(average_precision(recall, precision, True), sum(points) / 11, rtol=1e-14)


def test_no_detections():
    assert average_precision([], []) == average_precision([], [], True) == 0
    true = [example([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], [0, 1, 3], [False, False, True])]
    results = voc([found([], [])], true, ["a", "b", "none", "difficult"])
    assert [r.positives for r in results.values()] == [1, 1, 0, 0]
    assert results["a"].ap == results["b"].ap == 0
    assert math.isnan(results["none"].ap) and math.isnan(results["difficult"].ap)
    assert all(len(a) == 0 for r in results.values() for a in (r.precision, r.recall, r.scores))
    assert mean_ap(results) == 0


def test_classes_without_objects_are_left_out_of_the_mean():
    true = [example([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], [0, 1, 3], [False, False, True])]
    detections = [found([[0, 0, 9, 9], [0, 0, 9, 9], [40, 0, 49, 9]], [0.5, 0.6, 0.7], [0, 2, 3])]
    results = voc(detections, true, ["a", "b", "none", "difficult"])
    assert [r.ap for r in results.values()][:2] == [1, 0]
    assert math.isnan(results["none"].ap) and math.isnan(results["difficult"].ap)
    assert_array_equal(results["none"].precision, [0])              # a false positive
    assert_array_equal(results["none"].recall, [0])
    assert mean_ap(results) == 0.5
    assert math.isnan(mean_ap(voc(detections, true, [])))
    assert math.isnan(mean_ap({"none": results["none"]}))
    assert math.isnan(voc([], [], ["a"])["a"].ap)


# The definition

def overlap(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union else 0


def by_definition(detections, examples, k, iou, eleven_point, strict, loosened=False):
    """Notes 5.1, one detection after the other over the whole set; loosened: the OverFeat notes, 5."""
    positives = sum(int(label == k and not difficult) for e in examples for label, difficult in zip(e.labels, e.difficult))
    ranked = [(-score, image, d) for image, (_, labels, scores) in enumerate(detections)
              for d, (label, score) in enumerate(zip(labels, scores)) if label == k]
    taken, tp, fp, precision, recall = set(), 0, 0, [], []
    for _, image, d in sorted(ranked):
        e, best, match = examples[image], -1, None
        for g in range(len(e.boxes)):
            if e.labels[g] == k and overlap(detections[image][0][d], e.boxes[g]) > best:
                best, match = overlap(detections[image][0][d], e.boxes[g]), g
        least = iou
        if loosened and match is not None:
            (x1, y1, x2, y2) = e.boxes[match]
            least = min(iou, (x2 - x1) * (y2 - y1) / ((x2 - x1 + 10) * (y2 - y1 + 10)))
        if match is None or not (best > least if strict else best >= least):
            fp += 1
        elif e.difficult[match]:
            pass
        elif (image, match) in taken:
            fp += 1
        else:
            taken.add((image, match))
            tp += 1
        precision.append(tp / (tp + fp) if tp + fp else 0)
        recall.append(tp / positives if positives else 0)
    if not positives:
        return math.nan, 0, precision, recall
    if eleven_point:
        ap = sum(max([p for p, r in zip(precision, recall) if r >= t], default=0) for t in np.arange(0, 1.1, 0.1)) / 11
    else:
        levels = sorted({0, *recall})
        ap = sum((b - a) * max(p for p, r in zip(precision, recall) if r >= b) for a, b in zip(levels, levels[1:]))
    return ap, positives, precision, recall


def random_case(seed, K=3, images=4):
    """Few places, sizes and scores: ties, duplicates, equal IoUs and difficult objects abound."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.integers(0, 4, (n, 2)) * 2
        return np.concatenate([corner, corner + rng.choice([2, 4, 6], (n, 2))], 1).astype(float)

    examples = [example(boxes(n), rng.integers(0, K, n), rng.random(n) < 0.3) for n in rng.integers(0, 6, images)]
    detections = [found(boxes(n), rng.integers(0, 5, n) / 4, rng.integers(0, K, n)) for n in rng.integers(0, 12, images)]
    return detections, examples


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@given(seed=seeds, iou=st.sampled_from([0.25, 0.5, 0.75]))
def test_voc_is_the_definition(eleven_point, strict, seed, iou):
    detections, examples = random_case(seed)
    results = voc(detections, examples, ["a", "b", "c"], iou, eleven_point, strict)
    aps = []
    for k, r in enumerate(results.values()):
        ap, positives, precision, recall = by_definition(detections, examples, k, iou, eleven_point, strict)
        assert_allclose(r.ap, ap, rtol=1e-12, atol=1e-15)
        assert r.positives == positives
        assert_array_equal(r.precision, precision)
        assert_array_equal(r.recall, recall)
        assert_array_equal(r.scores, sorted((s for _, labels, scores in detections for s in scores[labels == k]), reverse=True))
        aps += [ap] if positives else []
    assert_allclose(mean_ap(results), np.mean(aps) if aps else np.nan, rtol=1e-12, atol=1e-15)


# Small objects: overfeat notes 5

@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@given(seed=seeds, iou=st.sampled_from([0.25, 0.5, 0.75]))
def test_loosened_voc_is_the_definition(eleven_point, strict, seed, iou):
    detections, examples = random_case(seed)                        # four times as large, sides of 8, 16 and 24: from 0.198 to 0.498
    examples = [dataclasses.replace(e, boxes=4 * e.boxes) for e in examples]
    detections = [(4 * boxes, labels, scores) for boxes, labels, scores in detections]
    for k, r in enumerate(voc(detections, examples, ["a", "b", "c"], iou, eleven_point, strict, loosened=True).values()):
        ap, positives, precision, recall = by_definition(detections, examples, k, iou, eleven_point, strict, loosened=True)
        assert_allclose(r.ap, ap, rtol=1e-12, atol=1e-15)
        assert r.positives == positives
        assert_array_equal(r.precision, precision)
        assert_array_equal(r.recall, recall)


def test_loosened_iou_by_hand():
    objects = np.array([[0, 0, 10, 10], [2, 3, 12, 23], [0, 0, 30, 30], [3, 0, 3, 9], [5, 5, 2, 2]], float)
    assert_array_equal(loosened_iou(objects), [1 / 4, 1 / 3, 1 / 2, 1 / 2, 1 / 2])       # the last two: no area
    assert_array_equal(loosened_iou(objects, 0.3), [1 / 4, 0.3, 0.3, 0.3, 0.3])
    assert_array_equal(loosened_iou(objects, 1), [1 / 4, 1 / 3, 900 / 1600, 1, 1])
    assert loosened_iou(np.zeros((0, 4))).shape == (0,)


@given(w=st.integers(1, 60), h=st.integers(1, 60))
def test_a_box_five_pixels_larger_on_each_side_just_matches(w, h):
    true, larger, more = [example([[7, 7, 7 + w, 7 + h]])], [2, 2, 12 + w, 12 + h], [2, 2, 12 + w, 12.001 + h]
    ap = [voc([found([box], [0.5])], true, "a", 0.99, strict=strict, loosened=True)["a"].ap
          for box, strict in ((larger, False), (larger, True), (more, False))]
    assert ap == [1, 0, 0]


def test_loosened_by_hand():
    def precision(true, boxes, loosened=True, **options):
        return list(voc([found(boxes, -np.arange(len(boxes)))], [true], "a", loosened=loosened, **options)["a"].precision)

    small, wide = [5, 5, 15, 15], [0, 0, 20, 20]                    # IoU 1/4
    assert precision(example([small]), [wide, small]) == [1, 1 / 2]                     # the second is a duplicate
    assert precision(example([small]), [wide, small], loosened=False) == [0, 1 / 2]
    assert precision(example([small]), [wide, small], strict=True) == [0, 1 / 2]
    assert precision(example([small, [40, 0, 80, 40]], difficult=[True, False]), [wide, [40, 0, 80, 40]]) == [0, 1]     # 0/0, 1/1
    tall = [0, 0, 10, 36]                                           # IoU 0.28 with the first, which asks for 0.25; 0.4 with the second
    assert precision(example([[0, 0, 10, 10], [0, 0, 25, 36]]), [tall]) == [0]          # the one that it overlaps most decides
    assert precision(example([[0, 0, 10, 10]]), [tall]) == [1]
    assert precision(example([[3, 3, 3, 9]]), [[50, 50, 60, 60], [3, 3, 3, 9]]) == [0, 0]       # nothing matches a box without area


@given(seed=seeds, eleven_point=st.booleans(), strict=st.booleans())
def test_loosening_is_nothing_to_large_objects(seed, eleven_point, strict):
    detections, examples = random_case(seed)
    examples = [dataclasses.replace(e, boxes=13 * e.boxes) for e in examples]           # sides from 26 on: 676/1296 > 0.5
    detections = [(13 * boxes, labels, scores) for boxes, labels, scores in detections]
    for a, b in zip(voc(detections, examples, "abc", 0.5, eleven_point, strict).values(),
                    voc(detections, examples, "abc", 0.5, eleven_point, strict, loosened=True).values()):
        assert_array_equal(a.ap, b.ap)
        assert_array_equal(a.precision, b.precision)


# Properties (notes 7e)

@given(seed=seeds, eleven_point=st.booleans())
def test_ap_is_between_0_and_1_and_perfect_detections_have_1(seed, eleven_point):
    detections, examples = random_case(seed)
    for r in voc(detections, examples, ["a", "b", "c"], eleven_point=eleven_point).values():
        assert 0 <= r.ap <= 1 + 1e-12 or not r.positives
    rng = np.random.default_rng(seed)
    examples = [example([[20 * i, 0, 20 * i + rng.integers(1, 20), 9] for i in range(n)], rng.integers(0, 3, n), rng.random(n) < 0.2)
                for n in rng.integers(0, 7, 3)]
    perfect = [(e.boxes, e.labels, rng.random(len(e.boxes))) for e in examples]
    for r in voc(perfect, examples, ["a", "b", "c"], eleven_point=eleven_point).values():
        assert not r.positives or abs(r.ap - 1) < 1e-12


@given(seed=seeds)
def test_ap_depends_on_ranks_only(seed):
    detections, examples = random_case(seed)
    order = iter(np.random.default_rng(seed).permutation(sum(len(s) for _, _, s in detections)))
    distinct = [(b, k, np.array([next(order) for _ in s], float)) for b, k, s in detections]
    moved = [(b, k, np.exp(s / 7) - 50) for b, k, s in distinct]
    for a, b in zip(voc(distinct, examples, "abc").values(), voc(moved, examples, "abc").values()):
        assert_array_equal(a.ap, b.ap)
        assert_array_equal(a.precision, b.precision)
    shuffled = np.random.default_rng(seed).permutation(len(examples))               # distinct scores: the order of images is nothing
    for a, b in zip(voc(distinct, examples, "abc").values(),
                    voc([distinct[i] for i in shuffled], [examples[i] for i in shuffled], "abc").values()):
        assert_array_equal(a.ap, b.ap)


@given(seed=seeds)
def test_a_false_positive_at_the_end_changes_nothing_and_duplicates_never_help(seed):
    detections, examples = random_case(seed)
    before = [r.ap for r in voc(detections, examples, "abc").values()]
    worse = [(np.concatenate([b, [[90, 90, 95, 95]]]), np.append(k, 1), np.append(s, -1)) for b, k, s in detections]
    assert_array_equal([r.ap for r in voc(worse, examples, "abc").values()], before)
    doubled = [(np.concatenate([b, b]), np.concatenate([k, k]), np.concatenate([s, s])) for b, k, s in detections]
    after = [r.ap for r in voc(doubled, examples, "abc").values()]
    assert all(math.isnan(a) or b <= a + 1e-12 for a, b in zip(before, after))


def test_a_duplicate_is_not_tried_on_the_second_object():
    true = [example([[0, 0, 10, 10], [0, 2, 10, 12]])]
    r = voc([found([[0, 0, 10, 10], [0, 0.5, 10, 10.5]], [0.9, 0.8])], true, "a")["a"]      # IoU with the second object: 0.74
    assert_array_equal(r.precision, [1, 1 / 2])


@pytest.mark.parametrize("order, precision", [((0, 1), [1, 1 / 2]), ((1, 0), [0, 1 / 2])])
def test_ties_keep_the_order_of_images_then_of_detections(order, precision):
    box, miss = [0, 0, 9, 9], [50, 50, 59, 59]
    examples, detections = [example([box]), example([])], [found([box], [0.5]), found([miss], [0.5])]
    assert_array_equal(voc([detections[i] for i in order], [examples[i] for i in order], "a")["a"].precision, precision)
    one = found([[box, miss][i] for i in order], [0.5, 0.5])
    assert_array_equal(voc([one], [example([box])], "a")["a"].precision, precision)


def test_labels_as_lists_and_float32_and_unknown_labels():
    true = [example([[0, 0, 9, 9]])]
    r = voc([([[0, 0, 9, 9], [1, 1, 3, 3]], [0, 7], np.array([0.5, 0.6], np.float32))], true, ["a"])["a"]
    assert r.ap == 1 and r.scores.dtype == np.float64


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_errors(bad):
    true = [example([[0, 0, 9, 9]])]
    with pytest.raises(ValueError, match=r"^evaluate\.voc: there must be detections for each image, got 2 for 1 images"):
        voc([found([], [])] * 2, true, "a")
    with pytest.raises(ValueError, match=r"^evaluate\.voc: scores must be finite, got NaN or infinity"):
        voc([found([[0, 0, 9, 9]], [bad])], true, "a")
    with pytest.raises(ValueError, match=r"^evaluate\.voc: boxes must be finite, got NaN or infinity"):
        voc([found([[0, bad, 9, 9]], [0.5])], true, "a")


# For people

@given(seed=seeds)
def test_best_threshold_is_the_definition(seed):
    """Of all thresholds, the one whose detections (score >= threshold) have the largest F1; ties go to the higher one."""
    detections, examples = random_case(seed)
    for r in voc(detections, examples, "abc").values():
        best, at = 0, math.inf
        for t in sorted(set(r.scores), reverse=True):
            last = sum(r.scores >= t) - 1
            p, q = r.precision[last], r.recall[last]
            f1 = 2 * p * q / (p + q) if p + q else 0
            if f1 > best + 1e-12:
                best, at = f1, t
        assume(best == 0 or sum(abs(2 * p * q / max(p + q, 1e-12) - best) < 1e-9 for p, q in zip(r.precision, r.recall)) == 1)
        assert best_threshold(r) == at


def result(ap, positives, precision, recall, scores):
    return ClassResult(ap, positives, *(np.array(a, float) for a in (precision, recall, scores)))


def test_best_threshold_by_hand():
    assert best_threshold(result(1, 2, [1, 1, 2 / 3], [0.5, 1, 1], [0.9, 0.7, 0.2])) == 0.7
    assert best_threshold(result(0, 2, [0, 0], [0, 0], [0.9, 0.7])) == math.inf
    assert best_threshold(result(0, 2, [], [], [])) == math.inf
    assert best_threshold(result(math.nan, 0, [0], [0], [0.9])) == math.inf
    tied = result(0, 2, [1, 1 / 2, 1 / 3, 2 / 4, 2 / 5], [0.5, 0.5, 0.5, 1, 1], [0.9, 0.9, 0.9, 0.8, 0.8])
    assert best_threshold(tied) == 0.8                              # 0.9 keeps three, of which one is right


def test_summary_is_json():
    results = {"a": result(0.75, 2, [], [], []), "none": result(math.nan, 0, [], [], [])}
    assert summary(results) == {"mean AP50": 0.75, "AP50": {"a": 0.75, "none": None}}
    assert summary({"none": results["none"]}) == {"mean AP50": None, "AP50": {"none": None}}
    json.dumps(summary(voc(F9_FOUND, F9_TRUE, ["x", "y"])), allow_nan=False)


def test_table():
    lines = table({"a long name": result(0.75, 2, [1, 1, 2 / 3], [0.5, 1, 1], [0.9, 0.7, 0.2]),
                   "none": result(math.nan, 0, [0], [0], [0.9]), "b": result(0, 31, [], [], [])})
    assert lines == ["class          AP50  objects  precision  recall  at score",
                     "a long name   0.750        2      1.000   1.000     0.700",
                     "none            nan        0      0.000   0.000       inf",
                     "b             0.000       31      0.000   0.000       inf",
                     "mean          0.375"]
    assert table({})[-1] == "mean      nan"


def test_an_overlap_a_hair_below_the_threshold_is_no_match():
    truth = [example([[0, 0, 1, 1]])]
    assert voc([found([[0, 0, 1, 0.5]], [0.9])], truth, ["x"])["x"].ap == 1
    assert voc([found([[0, 0, 1, 0.5 - 1e-10]], [0.9])], truth, ["x"])["x"].ap == 0
