"""COCO evaluation: the notes' example, each rule by hand, pycocotools on random sets, the NumPy reference against Numba."""
import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import evaluate, use
from tinydet.coco import Annotations, Detections, annotations, results
from tinydet.data import Example
from tinydet.evaluate_coco import MOST, NUMBERS, RECALLS, THRESHOLDS, coco, coco_of_examples


def truth(rows, images=(1,), categories=(1,)):
    """rows: image id, category id, box x y w h, area, crowd."""
    return Annotations([(i, None, None, None) for i in images], [(k, f"c{k}") for k in sorted(categories)], np.arange(len(rows)),
                       *places(rows, images, categories), np.array([r[3] for r in rows], float),
                       np.array([r[4] for r in rows], bool))


def found(rows, images=(1,), categories=(1,)):
    """rows: image id, category id, box x y w h, score."""
    return Detections(*places(rows, images, categories), np.array([r[3] for r in rows], float))


def places(rows, images, categories):
    """image, category, boxes."""
    images, categories = list(images), sorted(categories)
    return (np.array([images.index(r[0]) for r in rows], np.int64), np.array([categories.index(r[1]) for r in rows], np.int64),
            np.array([r[2] for r in rows], float).reshape(-1, 4))


def near(value):
    return pytest.approx(value, abs=1e-12)                          # spacing(1) in the denominator


def one_class(objects, detections, images=(1,)):
    """Evaluate one class; objects: (image, box, area, crowd), area None: w*h; detections: (image, box, score)."""
    return coco(truth([(i, 1, b, b[2] * b[3] if a is None else a, c) for i, b, a, c in objects], images),
                found([(i, 1, b, s) for i, b, s in detections], images))


# Notes F11

F11_TRUE = [(1, 1, [10, 10, 20, 20], 400, False), (1, 1, [50, 50, 40, 40], 1600, False), (1, 1, [0, 100, 200, 100], 20000, True),
            (2, 1, [0, 0, 100, 100], 10000, False)]
F11_FOUND = [(1, 1, [10, 10, 20, 20], .9), (1, 1, [52, 50, 40, 40], .8), (1, 1, [20, 110, 30, 30], .7),
             (1, 1, [120, 110, 30, 30], .65), (2, 1, [0, 0, 100, 75], .8), (2, 1, [0, 0, 100, 50], .6),
             (2, 1, [150, 150, 10, 10], .5)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    with use(backend):
        r = coco(truth(F11_TRUE, (1, 2)), found(F11_FOUND, (1, 2)))
    assert r.numbers() == {
        "AP": .8326732673267326, "AP50": 1, "AP75": 1,
        "APs": .9999999999999998, "APm": .8999999999999999, "APl": .5999999999999999,
        "AR1": .5333333333333332, "AR10": .8333333333333334, "AR100": .8333333333333334, "ARs": 1, "ARm": .9, "ARl": .6}
    assert_array_equal(r.precision[..., 0, 0].mean(1)[[0, 5]], 1)
    assert_allclose(r.precision[..., 0, 0].mean(1), [1] * 6 + [.6633663366336634] * 3 + [.33663366336633654], rtol=1e-15)
    assert r.classes == ("c1",) and list(r.objects) == [3]


def test_the_grids_are_those_of_linspace():
    assert THRESHOLDS[8] == 0.8999999999999999 != 0.9 and RECALLS[35] != 0.35 and RECALLS[70] != 0.70
    assert list(MOST) == [1, 10, 100] and list(NUMBERS) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


# The rules, one by one

@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield


SQUARE = [0, 0, 40, 40]


def test_an_equal_later_object_replaces_an_earlier_one(backend):
    objects = [(1, [0, 0, 40, 40], None, False), (1, [20, 0, 40, 40], None, False)]      # the first detection between them
    r = one_class(objects, [(1, [10, 0, 40, 40], .9), (1, [0, 0, 40, 40], .8)])
    assert r.recall[0, 0, 0, 2] == 1                                # the first took the later object, the second finds its own
    r = one_class(objects, [(1, [10, 0, 40, 40], .9), (1, [20, 0, 40, 40], .8)])
    assert r.recall[0, 0, 0, 2] == .5


def test_an_iou_of_exactly_the_threshold_matches(backend):
    r = one_class([(1, SQUARE, None, False)], [(1, [0, 0, 40, 20], .9)])
    assert list(r.recall[:, 0, 0, 2]) == [1] + 9 * [0]
    r = one_class([(1, [0, 0, 100, 75], None, False)], [(1, [0, 0, 100, 100], .9)])
    assert list(r.recall[:, 0, 0, 2]) == 6 * [1] + 4 * [0]


def test_a_taken_object_is_free_no_more_but_a_crowd_is(backend):
    r = one_class([(1, SQUARE, None, False)], [(1, SQUARE, .9), (1, SQUARE, .8)])
    assert list(r.precision[0, [0, 100], 0, 0]) == near([1, 1])
    far = (1, [500, 0, 40, 40], .1)
    objects = [(1, [500, 0, 40, 40], None, False), (1, [0, 0, 200, 200], None, True)]
    crowded = [(1, [10, 10, 20, 20], .9), (1, [20, 20, 20, 20], .8), (1, [30, 30, 20, 20], .7), far]
    assert one_class(objects, crowded).numbers()["AP"] == near(1)   # three in the crowd count as nothing
    objects[1] = (1, [0, 0, 200, 200], None, False)
    assert one_class(objects, crowded).precision[0, 0, 0, 0] == near(1 / 4)
    half = [(1, [100, 0, 200, 200], .9), far]                       # half of the detection lies in the crowd
    objects[1] = (1, [0, 0, 200, 200], None, True)
    assert list(one_class(objects, half).precision[:2, 0, 0, 0]) == near([1, .5])


def test_objects_that_count_come_before_ignored_ones_of_larger_iou(backend):
    crowd, true = (1, [0, 0, 400, 400], None, True), (1, [0, 0, 40, 60], None, False)
    for objects in ([crowd, true], [true, crowd]):
        assert one_class(objects, [(1, SQUARE, .9)]).recall[0, 0, 0, 2] == 1        # IoU 2/3, with the crowd 1
        r = one_class(objects, [(1, SQUARE, .9), (1, SQUARE, .8)])  # the second goes to the crowd
        assert r.precision[0, 100, 0, 0] == near(1)


def test_area_ranges_are_closed_and_use_the_annotation(backend):
    for area, defined in ((1024, "sm"), (1024.5, "m"), (9216, "ml"), (9217, "l"), (1e10, "l"), (1.1e10, ""), (0, "s"), (-1, "")):
        n = one_class([(1, SQUARE, area, False)], [(1, SQUARE, .9)]).numbers()
        assert "".join(c for c in "sml" if n[f"AP{c}"] == near(1)) == defined
        assert "".join(c for c in "sml" if n[f"AR{c}"] == -1) == "".join(c for c in "sml" if c not in defined)
        assert n["AP"] == near(1 if defined else -1)


def test_unmatched_detections_out_of_the_area_range_do_not_count(backend):
    small, large = [300, 300, 8, 8], [100, 100, 100, 100]           # both wrong, before the right one of 40x40, medium
    objects = [(1, SQUARE, None, False), (1, [900, 0, 9, 9], None, False)]
    n = one_class(objects, [(1, small, .9), (1, large, .9), (1, SQUARE, .8)])
    assert list(n.precision[0, 0, 0]) == near([1 / 3, 0, 1, -1])
    border = [300, 300, 32, 32]                                     # 1024 is in the range
    assert one_class([(1, SQUARE, None, False)], [(1, border, .9), (1, SQUARE, .8)]).numbers()["APm"] == pytest.approx(.5)


def test_only_the_best_100_of_an_image_and_class_are_matched(backend):
    wrong = [(1, [500 + i, 0, 5, 5], .5) for i in range(99)]
    for at, recall in ((.4, [0, 0, 1]), (.6, [1, 1, 1])):
        assert list(one_class([(1, SQUARE, None, False)], [*wrong, (1, SQUARE, at)]).recall[0, 0, 0]) == recall
    wrong.append((1, [700, 0, 5, 5], .5))
    for detections, recall in (([*wrong, (1, SQUARE, .4)], 0), ([*wrong, (1, SQUARE, .5)], 0), ([(1, SQUARE, .5), *wrong], 1)):
        r = one_class([(1, SQUARE, None, False)], detections)       # ties: file order
        assert list(r.recall[0, 0, 0]) == 3 * [recall] and r.precision[0, 100, 0, 0] == near(recall)
    two = coco(truth([(1, 1, SQUARE, 1600, False), (1, 2, SQUARE, 1600, False), (2, 1, SQUARE, 1600, False)], (1, 2), (1, 2)),
               found([*((1, 1, b, s) for _, b, s in wrong), (1, 2, SQUARE, .1), (2, 1, SQUARE, .1)], (1, 2), (1, 2)))
    assert_array_equal(two.recall[0, :, 0, 2], [.5, 1])             # other images and classes have a hundred of their own


def test_ties_go_by_image_id_not_by_file_order(backend):
    objects = [(1, SQUARE, None, False)]
    for images in ((1, 2), (2, 1)):
        detections = [(2, SQUARE, .5), (1, SQUARE, .5)]
        assert one_class(objects, detections, images).precision[0, 0, 0, 0] == near(1)
        assert one_class([(2, *objects[0][1:])], detections, images).precision[0, 0, 0, 0] == near(.5)


def test_boxes_without_extent_match_nothing(backend):
    for box in ([0, 0, 0, 40], [0, 0, 40, 0], [40, 40, -40, -40], [0, 0, -40, 40]):
        n = one_class([(1, box, 1600, False)], [(1, box, .9), (1, SQUARE, .8)]).numbers()
        assert n["AP"] == n["AR100"] == n["APm"] == 0               # the object counts, by its area, and is never found
        n = one_class([(1, SQUARE, None, False)], [(1, box, .9), (1, SQUARE, .8)])
        assert n.recall[9, 0, 0, 2] == 1


def test_an_annotation_id_of_0_is_an_id(tmp_path):
    """pycocotools takes it for unmatched: AP 0."""
    value = as_json(truth([(1, 1, SQUARE, 1600, False)]), [0])
    (tmp_path / "gt.json").write_text(json.dumps(value))
    assert coco(annotations(tmp_path / "gt.json", complete=False), found([(1, 1, SQUARE, .9)])).numbers()["AP"] == near(1)
    assert pycocotools(value, [{"image_id": 1, "category_id": 1, "bbox": SQUARE, "score": .9}])[0][0] == 0


def test_nothing_to_find_and_nothing_found(backend):
    n = one_class([], [(1, SQUARE, .9)])
    assert set(n.numbers().values()) == {-1}
    assert set(one_class([], [], ()).numbers().values()) == {-1}
    assert set(coco(truth([], (), ()), found([], (), ())).numbers().values()) == {-1}
    n = one_class([(1, SQUARE, None, False)], []).numbers()
    assert {k: v for k, v in n.items() if v != -1} == dict.fromkeys("AP AP50 AP75 APm AR1 AR10 AR100 ARm".split(), 0)
    assert set(one_class([(1, SQUARE, None, True)], [(1, SQUARE, .9)]).numbers().values()) == {-1}      # a crowd alone


# pycocotools

def as_json(t, ids):
    return {"images": [{"id": row[0]} for row in t.images], "categories": [{"id": k, "name": name} for k, name in t.categories],
            "annotations": [{"id": int(i), "image_id": t.images[im][0], "category_id": t.categories[k][0], "bbox": box.tolist(),
                             "area": float(area), "iscrowd": int(crowd)}
                            for i, im, k, box, area, crowd in zip(ids, t.image, t.category, t.boxes, t.area, t.crowd)]}


def pycocotools(value, detections):
    """The 12 numbers, and the arrays precision (T, R, K, A) at 100 detections, recall (T, K, A, M)."""
    peer = pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = copy.deepcopy(value)
        true.createIndex()
        e = peer.COCOeval(true, true.loadRes(copy.deepcopy(detections)), "bbox")
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e.stats, e.eval["precision"][..., -1], e.eval["recall"]


SIDES = (4, 8, 16, 31, 32, 33, 50, 95, 96, 97, 120)


def random_set(seed, images=6, categories=4, most=14, crowded=False):
    """A COCO file and its detections: few places, sizes and scores, so that ties, equal IoUs and areas at the borders abound."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        box = np.concatenate([rng.integers(0, 4, (n, 2)) * 8, rng.choice(SIDES, (n, 2))], 1).astype(float)
        square = rng.random(n) < .5
        box[square, 3] = box[square, 2]
        box[rng.random(n) < .1] += rng.normal(0, 2, 4)
        box[rng.random(n) < .05, rng.integers(2, 4)] *= rng.choice([0, -1])
        return box.tolist()

    image_ids = rng.choice(1000, images, replace=False).tolist()
    category_ids = rng.choice(200, categories, replace=False).tolist()
    with_objects, with_detections = (rng.random((2, images, categories)) < .7) & (rng.random((2, images, 1)) < .8)
    objects, detections = [], []
    for i, image in enumerate(image_ids):
        for k, category in enumerate(category_ids):
            n = rng.integers(0, most // 2) if with_objects[i, k] and k else 0              # the first category has no objects
            for box in boxes(n):
                area = box[2] * box[3] if rng.random() < .6 else rng.choice([1023.5, 1024, 1024.5, 9215, 9216, 9217, 2e10])
                objects.append({"image_id": image, "category_id": category, "bbox": box, "area": float(area),
                                "iscrowd": int(rng.random() < .15)})
            n = rng.integers(0, most) if with_detections[i, k] else 0
            n += 95 + rng.integers(20) if crowded and rng.random() < .2 else 0
            detections += [{"image_id": image, "category_id": category, "bbox": box, "score": float(s)}
                           for box, s in zip(boxes(n), rng.integers(0, 6, n) / 7)]
            close = [o for o in objects if (o["image_id"], o["category_id"]) == (image, category) and with_detections[i, k]]
            detections += [{"image_id": image, "category_id": category, "score": float(rng.integers(-1, 9) / 7),
                            "bbox": (np.array(o["bbox"]) + rng.integers(-2, 3, 4)).tolist()} for o in close if rng.random() < .7]
    ids = rng.choice(10**6, len(objects), replace=False) + 1
    objects = [{"id": int(i), **objects[j]} for i, j in zip(ids, rng.permutation(len(objects)))]
    detections = [detections[j] for j in rng.permutation(len(detections))]
    value = {"images": [{"id": i} for i in image_ids], "categories": [{"id": k, "name": f"class {k}"} for k in category_ids],
             "annotations": objects}
    return value, detections


def read_back(folder, value, detections):
    (folder / "gt.json").write_text(json.dumps(value))
    (folder / "dt.json").write_text(json.dumps(detections))
    true = annotations(folder / "gt.json", complete=False)
    return true, results(folder / "dt.json", true)


@pytest.mark.parametrize("settings", [{}, {"images": 40, "categories": 2}, {"images": 3, "categories": 9},
                                      {"images": 4, "crowded": True}, {"images": 2, "categories": 2, "most": 60}], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_pycocotools_to_the_last_bit(tmp_path, seed, settings):
    value, detections = random_set(seed, **settings)
    if not detections:
        return                                                      # loadRes of pycocotools fails on an empty list
    stats, precision, recall = pycocotools(value, detections)
    r = coco(*read_back(tmp_path, value, detections))
    assert list(r.numbers().values()) == list(stats)
    assert_array_equal(r.precision, precision)
    assert_array_equal(r.recall, recall)
    assert r.classes == tuple(f"class {k}" for k in sorted(c["id"] for c in value["categories"]))


@pytest.mark.parametrize("seed", range(3))
def test_pycocotools_with_continuous_values(tmp_path, seed):
    rng = np.random.default_rng(seed)
    value, detections = random_set(seed, images=30)
    for o in value["annotations"]:
        o["bbox"] = (np.array(o["bbox"]) + rng.random(4)).tolist()
    for d in detections:
        d["bbox"], d["score"] = (np.array(d["bbox"]) + rng.random(4)).tolist(), float(rng.normal())         # scores below 0, too
    stats, precision, recall = pycocotools(value, detections)
    r = coco(*read_back(tmp_path, value, detections))
    assert list(r.numbers().values()) == list(stats)
    assert_array_equal(r.precision, precision)


def test_random_sets_hold_what_they_promise():
    """All that the comparison is about occurs: else it would show nothing."""
    seen = dict.fromkeys(("crowd", "no extent", "over 100", "no objects", "no detections", "empty", "area", "tie"), 0)
    for seed in range(16):
        value, detections = random_set(seed, images=12, crowded=True)
        count = {}
        for d in detections:
            count[d["image_id"], d["category_id"]] = count.get((d["image_id"], d["category_id"]), 0) + 1
        objects, ids = value["annotations"], {i["id"] for i in value["images"]}
        true, shown = ({o["image_id"] for o in of} for of in (objects, detections))
        for what, n in (("crowd", sum(o["iscrowd"] for o in objects)), ("over 100", sum(n > 100 for n in count.values())),
                        ("no extent", sum(min(o["bbox"][2:]) <= 0 for o in [*objects, *detections])),
                        ("no objects", len(shown - true)), ("no detections", len(true - shown)),
                        ("empty", len(ids - true - shown)),
                        ("area", sum(o["area"] != o["bbox"][2] * o["bbox"][3] for o in objects)),
                        ("tie", len(detections) - len({d["score"] for d in detections}))):
            seen[what] += n
    assert min(seen.values()) > 1, seen.values()


@given(seed=seeds)
def test_numba_is_the_reference(tmp_path_factory, seed):
    true, shown = read_back(tmp_path_factory.mktemp("set"), *random_set(seed, images=4, categories=2))
    with use("numpy"):
        expected = coco(true, shown)
    with use("numba"):
        r = coco(true, shown)
    assert_array_equal(r.precision, expected.precision)
    assert_array_equal(r.recall, expected.recall)


# Properties

def arrays(seed, **settings):
    value, detections = random_set(seed, **settings)
    images, categories = [i["id"] for i in value["images"]], [k["id"] for k in value["categories"]]
    rows = [(o["image_id"], o["category_id"], o["bbox"], o["area"], o["iscrowd"]) for o in value["annotations"]]
    shown = [(d["image_id"], d["category_id"], d["bbox"], d["score"]) for d in detections]
    return rows, shown, images, categories


@given(seed=seeds)
def test_perfect_detections_have_1(seed):
    rng = np.random.default_rng(seed)
    rows = [(int(i), int(k), [200 * j, 0, *rng.integers(4, 150, 2).tolist()], 0, False)
            for j, (i, k) in enumerate(zip(rng.integers(1, 4, 30), rng.integers(1, 4, 30)))]
    rows, shown = [(*r[:3], r[2][2] * r[2][3], False) for r in rows], [(*r[:3], s) for r, s in zip(rows, rng.random(30))]
    n = coco(truth(rows, (1, 2, 3), (1, 2, 3)), found(shown, (1, 2, 3), (1, 2, 3))).numbers()
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR10", "AR100", "ARs", "ARm", "ARl"):
        assert n[name] == -1 or math.isclose(n[name], 1, abs_tol=1e-12)


@given(seed=seeds)
def test_a_lowest_false_positive_changes_no_ap(seed):
    rows, shown, images, categories = arrays(seed)
    t = truth(rows, images, categories)
    worse = [*shown, *((i, k, [5000, 5000, 50, 50], -1.0) for i in images for k in categories)]
    assert coco(t, found(worse, images, categories)).numbers() == coco(t, found(shown, images, categories)).numbers()


@given(seed=seeds)
def test_orders_do_not_matter_where_scores_are_distinct(seed):
    rows, shown, images, categories = arrays(seed)
    rng = np.random.default_rng(seed)
    shown = [(*d[:3], float(s)) for d, s in zip(shown, rng.permutation(len(shown)))]
    before = coco(truth(rows, images, categories), found(shown, images, categories))
    shown, images = [shown[i] for i in rng.permutation(len(shown))], [images[i] for i in rng.permutation(len(images))]
    after = coco(truth(rows, images, categories), found([(*d[:3], np.exp(d[3] / 100)) for d in shown], images, categories))
    assert_array_equal(after.precision, before.precision)
    assert_array_equal(after.recall, before.recall)


@given(seed=seeds)
def test_numbers_are_in_0_to_1_and_recall_grows_with_detections(seed):
    rows, shown, images, categories = arrays(seed)
    n = coco(truth(rows, images, categories), found(shown, images, categories)).numbers()
    assert all(v == -1 or 0 <= v <= 1 for v in n.values())
    assert n["AR1"] <= n["AR10"] <= n["AR100"] and n["AP75"] <= n["AP50"]


# Of examples

def test_of_examples_is_the_evaluation_of_their_file():
    rng = np.random.default_rng(0)
    examples, detections, rows, shown = [], [], [], []
    for i in range(12):
        R, D = rng.integers(0, 6, 2)
        corner, side = rng.integers(0, 40, (2, R, 2)) * 4
        boxes = np.concatenate([corner, corner + side], 1).astype(float)
        examples.append(Example(f"e{i}", None, (300, 200), boxes, rng.integers(0, 2, R), rng.random(R) < .3))
        close = boxes[rng.integers(0, R, D)] + rng.integers(0, 9, (D, 4)) if R else np.zeros((D, 4))
        detections.append((close, rng.integers(0, 3, D), rng.integers(0, 5, D) / 5))
        rows += [(i, int(k), [b[0], b[1], b[2] - b[0], b[3] - b[1]], (b[2] - b[0]) * (b[3] - b[1]), bool(hard))
                 for b, k, hard in zip(examples[-1].boxes, examples[-1].labels, examples[-1].difficult)]
        shown += [(i, int(k), [b[0], b[1], b[2] - b[0], b[3] - b[1]], s) for b, k, s in zip(*detections[-1]) if k < 2]
    expected = coco(truth(rows, range(12), (0, 1)), found(shown, range(12), (0, 1)))
    r = coco_of_examples(detections, examples, ["a", "b"])
    assert r.classes == ("a", "b") and 0 < r.numbers()["AP50"] < 1
    assert_array_equal(r.precision, expected.precision)
    assert_array_equal(r.recall, expected.recall)
    assert_array_equal(r.objects, [sum(row[1] == k and not row[4] for row in rows) for k in (0, 1)])
    assert evaluate.coco_of_examples is coco_of_examples and evaluate.coco is coco


def test_of_examples_difficult_objects_do_not_count():
    e = Example("", None, (99, 99), np.array([[0, 0, 40, 40], [50, 50, 90, 90.]]), np.array([0, 0]), np.array([False, True]))
    box, hard = [0, 0, 40, 40], [50, 50, 90, 90]
    r = coco_of_examples([([hard, box, hard], [0, 0, 0], [.9, .8, .7])], [e], ["a", "none"])
    assert [row[2] for row in r.by_class()] == near([1, -1]) and list(r.objects) == [1, 0]
    assert coco_of_examples([([], [], [])], [e], ["a"]).numbers()["AP"] == 0
    assert coco_of_examples([], [], ["a"]).numbers()["AP"] == -1


# For people

def test_tables_and_summary():
    r = coco(truth([*F11_TRUE, (2, 3, [0, 0, 9, 9], 81, True)], (1, 2), (1, 3)), found(F11_FOUND, (1, 2), (1, 3)))
    lines = r.table()
    assert lines[0] == "AP      0.833  IoU 0.50:0.95" and lines[8] == "AR100   0.833  100 detections"
    assert lines[11:] == ["ARl     0.600  large objects", "", "class      AP    AP50  objects",
                          "c1      0.833   1.000        3", "c3     -1.000  -1.000        0"]
    assert r.by_class() == [("c1", r.numbers()["AP"], 1.0, 3), ("c3", -1.0, -1.0, 0)]
    value = json.loads(json.dumps(r.summary(), allow_nan=False))
    assert value["COCO"] == r.numbers()
    assert value["COCO AP50"] == {"c1": 1, "c3": None} and value["COCO AP"] == {"c1": r.numbers()["AP"], "c3": None}
    assert coco(truth([]), found([])).summary()["COCO"]["AP"] is None
    assert coco(truth([]), found([])).table()[0] == "AP     -1.000  IoU 0.50:0.95"


# Errors

@pytest.mark.parametrize("which, column, value, error, message", [
    ("found", "boxes", np.zeros((1, 3)), ValueError, r"evaluate\.coco: boxes must have shape \(R, 4\), got \(1, 3\)"),
    ("found", "boxes", np.zeros((1, 4), int), TypeError, r"evaluate\.coco: boxes must be float32 or float64, got int64"),
    ("found", "boxes", np.full((1, 4), np.nan), ValueError, r"evaluate\.coco: boxes must be finite"),
    ("found", "scores", np.array([np.nan]), ValueError, r"evaluate\.coco: scores must be finite"),
    ("found", "scores", np.zeros(2), ValueError, r"evaluate\.coco: scores must have shape \(1,\), got \(2,\)"),
    ("found", "image", np.array([1]), ValueError, r"evaluate\.coco: image must lie in 0\.\.0, got 1\.\.1"),
    ("found", "image", np.array([-1]), ValueError, r"evaluate\.coco: image must lie in 0\.\.0, got -1\.\.-1"),
    ("found", "image", np.zeros(1), TypeError, r"evaluate\.coco: image must be integers, got float64"),
    ("found", "category", np.array([1]), ValueError, r"evaluate\.coco: category must lie in 0\.\.0, got 1\.\.1"),
    ("truth", "area", np.array([np.inf]), ValueError, r"evaluate\.coco: area must be finite"),
    ("truth", "crowd", np.zeros(2, bool), ValueError, r"evaluate\.coco: crowd must have shape \(1,\), got \(2,\)"),
    ("truth", "category", np.zeros(2, int), ValueError, r"evaluate\.coco: category must have shape \(1,\), got \(2,\)"),
])
def test_errors(which, column, value, error, message):
    t, f = truth([(1, 1, SQUARE, 1600, False)]), found([(1, 1, SQUARE, .9)])
    object.__setattr__(t if which == "truth" else f, column, value)
    with pytest.raises(error, match="^" + message):
        coco(t, f)


def test_of_examples_needs_detections_for_each():
    with pytest.raises(ValueError, match=r"^evaluate\.coco_of_examples: there must be detections for each image, got 1 for 0"):
        coco_of_examples([([], [], [])], [], ["a"])


@pytest.mark.parametrize("seed", range(3))
def test_other_dtypes(seed):
    rows, shown, images, categories = arrays(seed, images=100, most=4)
    t, f = truth(rows, images, categories), found(shown, images, categories)
    narrow = Detections(f.image.astype(np.int32), f.category.astype(np.uint8), f.boxes, f.scores)
    assert_array_equal(coco(t, narrow).precision, coco(t, f).precision)
    one = found([(1, 1, [2**24, 0, 1, 40], .5)])                    # x + w needs more bits than float32 has
    narrow = Detections(one.image, one.category, one.boxes.astype(np.float32), one.scores.astype(np.float32))
    assert coco(truth([(1, 1, [2**24, 0, 1, 40], 40, False)]), narrow).recall[0, 0, 0, 2] == 1
