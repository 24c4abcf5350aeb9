import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinydet import scenes as module
from tinydet.scenes import CLASSES, scene, scenes, shape


@pytest.fixture(scope="module")
def many():
    return scenes(200, 0)


def same(a, b):
    return (a.name == b.name and a.size == b.size and a.image().shape == b.image().shape and (a.image() == b.image()).all()
            and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels) and np.array_equal(a.difficult, b.difficult))


def test_a_scene_is_one_of_seed_split_and_number(many):
    assert all(same(a, b) for a, b in zip(scenes(8, 0), many))      # the same bits, whatever the count
    assert [e.name for e in many[:2]] == ["train00000", "train00001"] and len({e.name for e in many}) == 200
    others = [*scenes(8, 1), *scenes(8, 0, "val"), *scenes(8, 1, "val"), *scenes(8, 0, "test")]
    pixels = {e.image().tobytes() for e in [*many, *others]}
    assert len(pixels) == 232                                       # no two alike, in no split and for no seed
    assert scenes(0, 0) == []


def test_types_and_ranges(many):
    for e in many:
        W, H = e.size
        assert 128 <= W <= 192 and 128 <= H <= 192
        assert e.image().shape == (H, W, 3) and e.image().dtype == np.uint8
        assert e.boxes.shape == (len(e.labels), 4) and e.boxes.dtype == np.float64
        assert e.labels.dtype == np.int64 and e.difficult.dtype == bool and len(e.difficult) == len(e.labels) <= 6
        assert ((e.labels >= 0) & (e.labels < len(CLASSES))).all()
        assert (e.boxes[:, :2] >= 0).all() and (e.boxes[:, 2:] <= [W, H]).all()
        assert (e.boxes[:, 2:] - e.boxes[:, :2] >= 6).all()
        assert e.image().std() > 5                                  # something to see


def test_the_set_has_what_a_detector_needs(many):
    assert len(CLASSES) >= 5 and list(CLASSES) == sorted(set(CLASSES))
    count = np.bincount(np.concatenate([e.labels for e in many]), minlength=len(CLASSES))
    assert (count > 50).all()                                       # every class, none rare
    side = np.sqrt(np.concatenate([(e.boxes[:, 2:] - e.boxes[:, :2]).prod(1) for e in many]))
    assert side.max() / side.min() > 5
    assert np.percentile(side, 95) / np.percentile(side, 5) > 3     # and not by two outliers
    difficult = np.concatenate([e.difficult for e in many])
    assert 0.005 < difficult.mean() < 0.3
    assert len({e.size for e in many}) > 150
    boxes = [len(e.boxes) for e in many]
    assert max(boxes) >= 5 and np.mean(boxes) > 2


def test_boxes_enclose_what_is_visible(many, monkeypatch):
    """Painted again with a pen that notes what it covers: the last shape on top, the box its first and last visible pixel."""
    painted, last = [], []
    paint, draw = module._paint, module.shape

    def noting_shape(name, *args):
        last[:] = [name]
        return draw(name, *args)

    def noting_paint(image, cover, colour, rng):
        painted.append((last[0], cover > 0.5))
        return paint(image, cover, colour, rng)
    monkeypatch.setattr(module, "shape", noting_shape)
    monkeypatch.setattr(module, "_paint", noting_paint)
    dropped = 0
    for i in range(60):
        painted.clear()
        e = scene(f"train{i:05d}", np.random.default_rng([0, *b"train", i]))
        assert same(e, many[i])
        expected = []
        for n, (name, mask) in enumerate(painted):
            visible = mask & ~np.any([m for _, m in painted[n + 1:]] or [np.zeros_like(mask)], 0)
            share = visible.sum() / mask.sum()
            rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
            if share < 0.3 or min(np.ptp(rows), np.ptp(columns)) < 5:
                dropped += 1
                continue
            expected.append((CLASSES.index(name), share < 0.6, [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]))
        assert [k for k, _, _ in expected] == e.labels.tolist()
        assert [d for _, d, _ in expected] == e.difficult.tolist()
        assert_array_equal(np.reshape([b for _, _, b in expected], (-1, 4)), e.boxes)
    assert dropped < 20                                             # what is painted and has no box is rare


@pytest.mark.parametrize("name, area", [("disk", math.pi / 4), ("ring", math.pi / 4 * (1 - 0.58**2)), ("square", 0.64),
                                        ("triangle", 3 * math.sqrt(3) / 4 * 0.55**2), ("cross", 5 / 9),
                                        ("star", 5 * 0.55 * 0.225 * math.sin(math.pi / 5))])
@pytest.mark.parametrize("angle", [0, 1, 4])
def test_shapes_have_their_area_and_place(name, area, angle):
    cover = module._cover(shape(name, 60, 50, 80, angle), 130, 110)
    assert abs(cover.sum() / 6400 - area) < 0.03
    x, y = (cover.sum(0) * (np.arange(130) + 0.5)).sum() / cover.sum(), (cover.sum(1) * (np.arange(110) + 0.5)).sum() / cover.sum()
    assert math.dist((x, y), (60, 50)) < 0.6


def test_every_class_has_a_shape():
    assert {"disk", "ring", "square", "triangle", "cross", "star"} == set(CLASSES)
    with pytest.raises(KeyError):
        shape("no such shape", 0, 0, 1, 0)
