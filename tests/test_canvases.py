import dataclasses
import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from conftest import real
from tinydet import canvases as module
from tinydet import data
from tinydet.canvases import canvases
from tinydet.data import Example
from tinydet.ops import boxes as box_ops

NONE = np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool)


def tagged(name, image, *labels):
    return Example(name, image, image.shape[1::-1], *NONE, np.array(labels, np.int64))


def items(count, classes=4, seed=0):
    """Grey 20x28 images, class k a bright disk with k dark bars on black, dust below the threshold; later classes are rarer."""
    rng, made = np.random.default_rng(seed), []
    y, x = np.mgrid[:20, :28]
    for i in range(count):
        k = min(int(rng.exponential(1)), classes - 1)
        disk = (x - 14)**2 / rng.uniform(30, 120) + (y - 10)**2 / rng.uniform(20, 60) < 1
        image = disk * rng.integers(90, 256, (20, 28))
        for bar in range(k):
            image[:, 8 + 4 * bar] //= 3
        image[0, 0] = 20
        made.append(tagged(f"item{i}", image.astype(np.uint8), k))
    return made


SOURCE = items(300)


@pytest.fixture(scope="module")
def many():
    return canvases(SOURCE, 150, 0)


def same(a, b):
    return (a.name == b.name and a.size == b.size and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels)
            and a.image().tobytes() == b.image().tobytes())


def test_a_canvas_is_one_of_seed_split_and_number(many):
    assert all(same(a, b) for a, b in zip(canvases(SOURCE, 8, 0), many))        # the same bits, whatever the count
    assert same(many[3], many[3]) and same(many[3], pickle.loads(pickle.dumps(many[3])))    # and at every call
    assert [e.name for e in many[:2]] == ["train00000", "train00001"] and len({e.name for e in many}) == 150
    others = [*canvases(SOURCE, 8, 1), *canvases(SOURCE, 8, 0, "val"), *canvases(SOURCE, 8, 0, "test")]
    assert len({e.image().tobytes() for e in [*many[:8], *others]}) == 32
    assert len({tuple(e.boxes[0]) for e in [*many, *others]}) > 170
    assert canvases(SOURCE, 0, 0) == []


def test_types_and_ranges(many):
    for e in many[:30] + canvases(SOURCE, 10, 0, size=(80, 128), sides=(10, 40), objects=(2, 4)):
        W, H = e.size
        assert (W, H) in ((96, 96), (80, 128)) and e.image().shape == (H, W, 3) and e.image().dtype == np.uint8
        assert e.boxes.shape == (len(e.labels), 4) and e.boxes.dtype == np.float64 and not e.difficult.any()
        assert e.labels.dtype == np.int64 and e.difficult.dtype == bool and len(e.difficult) == len(e.labels)
        assert (e.boxes[:, :2] >= 0).all() and (e.boxes[:, 2:] <= [W, H]).all()
        assert_array_equal(e.image_labels(), np.unique(e.labels))
    assert all(len(e.labels) == 1 for e in many)


def test_sides_reach_over_the_range_and_places_over_the_canvas(many):
    boxes = np.concatenate([e.boxes for e in many])
    side = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert side.min() >= 28 and side.max() <= 80
    assert 0.2 < (side < 40).mean() < 0.5 and 0.15 < (side > 60).mean() < 0.4          # log-uniform: 0.34, 0.27
    assert boxes[:, :2].min() == 0 and boxes[:, 2:].max() == 96
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (abs(centre.mean(0) - 48) < 4).all() and (np.ptp(centre, 0) > 55).all()


def test_labels_are_those_of_the_source_and_even(many):
    wanted = [[e for e in SOURCE if e.tags[0] == k] for k in range(4)]
    assert len(wanted[0]) > 4 * len(wanted[3]) > 0                  # a skewed source
    count = np.bincount(np.concatenate([e.labels for e in canvases(SOURCE, 1000, 0)]), minlength=4)
    assert count.sum() == 1000 and count.min() > 200 and count.max() < 300
    for k in range(4):                                              # one class alone: whatever is pasted has its label
        assert {int(e.labels[0]) for e in canvases(wanted[k][:2], 5, 0)} == {k}
    high = [dataclasses.replace(e, tags=e.tags + 7) for e in SOURCE]
    assert all(same(dataclasses.replace(a, labels=a.labels + 7), b) for a, b in zip(many[:9], canvases(high, 9, 0)))


@pytest.mark.parametrize("shape, sides", [((20, 28), (28, 80)), ((20, 28), (28, 28)), ((90, 40), (20, 60))])
def test_boxes_are_tight(monkeypatch, shape, sides):
    """Painted with a pen that notes where: on the canvas, an item's pixels lie in its box and touch all its edges."""
    painted, paint, resized, source = [], module._paint, [], module._resized

    def noting_paint(canvas, box, item, rng):
        before = canvas.copy()
        paint(canvas, box, item, rng)
        painted.append((box, (before != canvas).any(2), item))

    def noting_resized(item, factor):
        resized.append(item.size)
        return source(item, factor)
    rng, given = np.random.default_rng(1), []
    for i in range(30):
        image = np.zeros(shape, np.uint8)
        x1, y1 = rng.integers(0, shape[1] // 2), rng.integers(0, shape[0] // 2)
        x2, y2 = rng.integers(x1 + 3, shape[1] + 1), rng.integers(y1 + 3, shape[0] + 1)
        image[y1:y2, x1:x2] = rng.integers(0, 255, (y2 - y1, x2 - x1)) * (rng.random((y2 - y1, x2 - x1)) < 0.9)
        image[(y1 + y2) // 2, x1:x2] = image[y1:y2, (x1 + x2) // 2] = 21    # a cross: its ends are all that is certain to touch
        given.append(tagged(str(i), image, 0))
    given[0].source[:] = 200                                        # to every edge of its image
    made = canvases(given, 40, 0, sides=sides)
    monkeypatch.setattr(module, "_paint", noting_paint)
    monkeypatch.setattr(module, "_resized", noting_resized)
    for e in made:
        painted.clear()
        resized.clear()
        e.image()
        (x1, y1, x2, y2), where, item = painted[-1]                 # the item comes last
        assert_array_equal(e.boxes, [[x1, y1, x2, y2]])
        ys, xs = np.nonzero(where)
        assert x1 <= xs.min() and xs.max() < x2 and y1 <= ys.min() and ys.max() < y2
        ys, xs = np.nonzero(item[..., 3] >= 128 / 255)
        assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == (0, x2 - x1, 0, y2 - y1)
        w, h = resized[0]                                           # of the source's tight box
        if sides[0] >= max(shape):                                  # enlarged: nothing is lost at the edges
            assert abs((x2 - x1) / (y2 - y1) * h / w - 1) < 0.2 and sides[0] <= max(x2 - x1, y2 - y1) <= sides[1]


def test_the_tight_box_of_a_source_is_cut_and_mirrored():
    """By hand: an L of 4 x 6 pixels, scaled to 48 pixels, has a box of 32 x 48; its foot points left or right."""
    image = np.zeros((20, 28, 3), np.uint8)
    image[5:11, 7:9], image[9:11, 7:11] = (200, 0, 0), (0, 0, 21)
    image[0, 0] = image[19, 27] = 20                                # at the threshold, not above: no item
    made = canvases([tagged("L", image, 3)], 40, 0, sides=(48, 48), fragments=(0, 0))
    boxes = np.concatenate([e.boxes for e in made])
    assert_array_equal(boxes[:, 2:] - boxes[:, :2], [[32, 48]] * 40)
    right = 0
    for e in made:
        x1, y1, x2, y2 = e.boxes[0].astype(int)
        top = e.image()[y1:y1 + 28, x1:x2].astype(float)
        left, other = (top[:, half].std((0, 1)).max() for half in (np.s_[2:12], np.s_[20:30]))
        right += left < other                                       # the leg is plain, beside it is background
    assert 8 < right < 32
    whole = canvases([tagged("L", image, 3)], 5, 0, sides=(28, 56), threshold=-1)
    assert all(abs((b[2] - b[0]) / (b[3] - b[1]) - 28 / 20) < 0.05 for e in whole for b in e.boxes)


def test_clutter_is_there(many):
    """Outside the box a canvas varies, with edges, and no two have one background."""
    levels = []
    for e in many[:30]:
        x1, y1, x2, y2 = e.boxes[0].astype(int)
        outside = e.image().astype(float)
        inside = outside[y1:y2, x1:x2].copy()
        outside[y1:y2, x1:x2] = np.nan
        assert np.nanstd(outside, (0, 1)).max() > 10 and inside.std() > 2
        step = np.abs(np.diff(outside, axis=1)).max(2)
        assert np.nanmax(step) > 40                                 # edges, not shades alone
        levels.append(np.nanmean(outside, (0, 1)))
    assert np.std(levels, 0).min() > 25                             # no common background
    bare, full = canvases(SOURCE, 5, 0, fragments=(0, 0)), canvases(SOURCE, 5, 0, fragments=(9, 9))
    assert all(np.array_equal(a.boxes, b.boxes) and not np.array_equal(a.image(), b.image()) for a, b in zip(bare, full))


def test_fragments_are_small_and_items_are_seen(monkeypatch):
    painted, paint = [], module._paint

    def noting(canvas, box, item, rng):
        before = canvas[box[1]:box[3], box[0]:box[2]].copy()
        paint(canvas, box, item, rng)
        solid = item[..., 3] > 0.9
        changed = np.abs(canvas[box[1]:box[3], box[0]:box[2]] - before)[solid].mean(0).max() if solid.any() else 0
        painted.append((max(box[2] - box[0], box[3] - box[1]), changed))
    monkeypatch.setattr(module, "_paint", noting)
    counts, seen = set(), []
    for e in canvases(SOURCE, 40, 0, fragments=(2, 5)):
        painted.clear()
        e.image()
        counts.add(len(painted) - 1)
        assert all(side <= 41 for side, _ in painted[:-1])          # at most half of 80 pixels
        seen.append(painted[-1][1])
    assert 5 in counts and max(counts) == 5 and min(seen) > 20 and np.mean(seen) > 60


def test_several_items_hardly_overlap():
    made = canvases(SOURCE, 60, 0, size=(160, 128), sides=(20, 70), objects=(2, 6))
    count = [len(e.labels) for e in made]
    assert set(count) >= {2, 3, 4, 5} and max(count) <= 6 and min(count) >= 1
    most = 0
    for e in made:
        inter = box_ops.intersection(e.boxes, e.boxes)
        smaller = np.minimum.outer(box_ops.area(e.boxes), box_ops.area(e.boxes))
        pairs = np.triu_indices(len(inter), 1)
        shared = (inter / smaller)[pairs]
        assert (shared <= module.OVERLAP).all() and (box_ops.iou(e.boxes, e.boxes)[pairs] <= 1 / 9).all()
        most = max([most, *shared])
    assert most > 0.05                                              # but they may
    crowded = canvases(SOURCE, 5, 0, size=64, sides=(60, 64), objects=(5, 5))
    assert all(len(e.labels) == 1 for e in crowded)                 # no room for a second one: left out


def test_labels_may_be_those_of_boxes():
    image = np.full((10, 20, 3), 90, np.uint8)
    e = Example("b", image, (20, 10), np.array([[0, 0, 5, 5.], [5, 5, 9, 9]]), np.array([2, 2]), np.array([False, False]))
    made = canvases([e], 3, 0)
    assert all(c.labels.tolist() == [2] for c in made)
    replaced = dataclasses.replace(made[0], source=image)
    assert_array_equal(replaced.image(), image)                     # a canvas with pixels of its own is an Example as any


BLANK, TWO = tagged("blank", np.full((8, 8), 20, np.uint8), 0), tagged("two", np.ones((4, 4), np.uint8), 0, 1)


@pytest.mark.parametrize("change, error, message", [
    ({"examples": []}, ValueError, r"examples must hold at least one image, got none"),
    ({"examples": [TWO]}, ValueError, r"examples must have one label each, got 2 of two"),
    ({"examples": [tagged("no", np.ones((4, 4), np.uint8))]}, ValueError, r"examples must have one label each, got 0 of no"),
    ({"examples": [BLANK]}, ValueError, r"examples must have a pixel above threshold 20, got none in blank"),
    ({"count": -1}, ValueError, r"count must be at least 0, got -1"),
    ({"count": 1.0}, TypeError, r"count must be an integer, got 1.0"),
    ({"seed": -1}, ValueError, r"seed must be at least 0, got -1"),
    ({"split": 3}, TypeError, r"split must be a name, got 3"),
    ({"size": 15}, ValueError, r"width must be at least 16, got 15"),
    ({"size": (96, 15)}, ValueError, r"height must be at least 16, got 15"),
    ({"size": (96, 96, 3)}, ValueError, r"size must be \(width, height\), got \(96, 96, 3\)"),
    ({"size": 96.0}, TypeError, r"width must be an integer, got 96.0"),
    ({"size": 79}, ValueError, r"sides must be \(low, high\), low <= high <= 79, got \(28, 80\)"),
    ({"sides": 30}, ValueError, r"sides must be \(low, high\), got 30"),
    ({"sides": (40, 30)}, ValueError, r"sides must be \(low, high\), low <= high <= 96, got \(40, 30\)"),
    ({"sides": (3, 30)}, ValueError, r"sides \(low\) must be at least 4, got 3"),
    ({"sides": (28, 80.5)}, TypeError, r"sides \(high\) must be an integer, got 80.5"),
    ({"objects": (0, 1)}, ValueError, r"objects \(low\) must be at least 1, got 0"),
    ({"objects": (2, 1)}, ValueError, r"objects must be \(low, high\), low <= high <= 100, got \(2, 1\)"),
    ({"fragments": (-1, 1)}, ValueError, r"fragments \(low\) must be at least 0, got -1"),
    ({"threshold": -2}, ValueError, r"threshold must be at least -1, got -2")])
def test_errors_by_message(change, error, message):
    with pytest.raises(error, match=rf"^canvases\.canvases: {message}$"):
        canvases(**{"examples": SOURCE, "count": 2, "seed": 0, **change})


# Real data: TINYDET_DATA names the folder that holds fashion-mnist/

def test_fashion_items_on_canvases():
    examples, classes = data.read(real("fashion-mnist"), "test")
    made = canvases(examples, 400, 0, "test")
    count = np.bincount([int(e.labels[0]) for e in made], minlength=len(classes))
    assert len(count) == 10 and count.min() > 20 and count.max() < 65
    ratio = np.concatenate([e.boxes[:, 2:] - e.boxes[:, :2] for e in made])
    ratio, labels = ratio[:, 0] / ratio[:, 1], np.concatenate([e.labels for e in made])
    assert np.median(ratio[labels == 1]) < 0.6 and np.median(ratio[labels == 7]) > 1.7     # trousers stand, sneakers lie
    assert all(e.image().std() > 15 for e in made[:20])
