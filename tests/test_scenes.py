import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinydet import scenes as module
from tinydet.scenes import CLASSES, FAR, NEAR, close_ups, scene, scenes, shape


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


def lens(r, R, d):
    """Area that two circles share (the textbook formula), their middles d apart."""
    a, b = (d * d + r * r - R * R) / (2 * d * r), (d * d + R * R - r * r) / (2 * d * R)
    return r * r * math.acos(a) + R * R * math.acos(b) - d * r * math.sqrt(1 - a * a)


# for a side of 2: a square without the doorway; head, shaft; two arms; a known curve, 180 pi in units of 16 by 15; trapezoids
AREAS = {"arch": 1.7**2 - 0.7 * 1.15, "arrow": 0.9 * 1.1 + 0.6, "ell": 0.55 * 2 + 0.95 * 0.55, "heart": 180 * math.pi / (16 * 15),
         "hourglass": 1.9 * (1.6 + 0.4) / 2, "moon": math.pi - lens(1, 0.75, 0.55)}


@pytest.mark.parametrize("angle", [0, 1, 4])
@pytest.mark.parametrize("name", AREAS)
def test_other_shapes_have_their_area_and_size(name, angle):
    cover = module._cover(shape(name, 70, 60, 80, angle), 150, 130)
    assert abs(cover.sum() / 1600 - AREAS[name]) < 0.04
    ys, xs = np.nonzero(cover > 0.5)
    assert 35 < np.hypot(ys + 0.5 - 60, xs + 0.5 - 70).max() < 51     # the side is 80
    if angle == 0:
        assert abs((xs.min() + xs.max() + 1) / 2 - 70) < (8 if name == "moon" else 1) and 64 < np.ptp(ys) < 88


def test_shapes_are_unlike_each_other():
    assert len(NEAR) == len(FAR) == 12 and len(set(NEAR + FAR)) == 24
    assert {c.split()[1] for c in NEAR} == set(CLASSES) and {c.split()[1] for c in FAR} == set(AREAS)
    assert {c.split()[0] for c in NEAR + FAR} == {"solid", "striped"}
    covers = {name: module._cover(shape(name, 16, 16, 24, 0), 32, 32) > 0.5 for name in (*CLASSES, *AREAS, "half", "bar")}
    for a in covers:
        for b in AREAS.keys() - {a}:
            assert (covers[a] & covers[b]).sum() < 0.75 * (covers[a] | covers[b]).sum(), (a, b)


@pytest.fixture(scope="module")
def near_and_far():
    return close_ups(300, 0)


def test_a_close_up_is_one_of_seed_split_number_classes_and_side(near_and_far):
    def alike(a, b):
        return same(a, b) and np.array_equal(a.tags, b.tags)
    assert all(alike(a, b) for a, b in zip(close_ups(8, 0), near_and_far))      # the same bits, whatever the count
    assert [e.name for e in near_and_far[:2]] == ["train00000", "train00001"] and len({e.name for e in near_and_far}) == 300
    others = [*close_ups(8, 1), *close_ups(8, 0, "val"), *close_ups(8, 1, "val"), *close_ups(8, 0, side=33)]
    assert len({e.image().tobytes() for e in [*near_and_far, *others]}) == 332
    assert close_ups(0, 0) == []


def test_close_ups_have_one_tag_and_all_classes(near_and_far):
    for e in near_and_far:
        assert e.size == (32, 32) and e.image().shape == (32, 32, 3) and e.image().dtype == np.uint8 and e.image().std() > 5
        assert e.tags.shape == (1,) and e.tags.dtype == np.int64 and e.image_labels() is e.tags
        assert e.boxes.shape == (0, 4) and len(e.labels) == len(e.difficult) == 0
    count = np.bincount([e.tags[0] for e in near_and_far], minlength=24)
    assert len(count) == 24 and count.min() >= 3 and count.max() <= 26        # 12.5 each, deviation 3.5
    assert set(np.concatenate([e.tags for e in close_ups(60, 0, classes=FAR[:3])])) == {0, 1, 2}


def drawn(monkeypatch, *args, **options):
    """Close-ups with what was drawn for each: (example, arguments of shape, of _background, of _paint)."""
    notes = {name: [] for name in ("shape", "_background", "_paint")}

    def note(name, function):
        def noting(*args):
            notes[name].append([a.copy() if isinstance(a, np.ndarray) else a for a in args])
            return function(*args)
        return noting
    with monkeypatch.context() as patch:
        for name in notes:
            patch.setattr(module, name, note(name, getattr(module, name)))
        examples = close_ups(*args, **options)
    shapes = [a for a in notes["shape"] if a[0] not in ("half", "bar")]          # these are clutter
    assert len(examples) == len(shapes) == len(notes["_background"]) == len(notes["_paint"])
    return zip(examples, shapes, notes["_background"], notes["_paint"])


@pytest.mark.parametrize("side, painted", [(32, 64), (100, 100)])
def test_a_close_up_shows_its_class_as_described(monkeypatch, side, painted):
    lengths, shifts, classes = [], [], FAR + NEAR
    for e, drawing, (W, H, _), (image, cover, colour, _) in drawn(monkeypatch, 50, 3, classes=classes, side=side):
        name, cx, cy, length, angle = drawing
        texture, wanted = classes[e.tags[0]].split()
        assert name == wanted and W == H == painted and abs(angle) <= module.TURN
        lengths.append(length / side)
        shifts.append((cx / side - 0.5, cy / side - 0.5))
        assert_array_equal(cover, module._cover(shape(*drawing), side, side))
        under, ends = image[cover > 0.5].mean(0), colour.reshape(-1, 3)
        assert (len(ends) > 1) == (texture == "striped")
        first = ends[np.abs(ends - 127.5).sum(1).argmax()]
        for unlike in (first - under, 255 - first - under, 255 - 2 * first):
            assert np.abs(unlike).sum() >= 180
        inside = np.abs(e.image().astype(float) - image).sum(2)[cover == 1]      # it is there, in spite of noise and light
        assert np.median(inside) > 60
    assert 0.5 <= min(lengths) < 0.55 and 0.85 < max(lengths) <= 0.9
    assert np.abs(shifts).max() <= 0.1 and np.ptp(shifts, 0).min() > 0.17


def test_textures_differ_by_their_stripes(monkeypatch):
    for name in (*CLASSES, *AREAS):
        solid = drawn(monkeypatch, 6, 1, classes=[f"solid {name}"])
        for (a, *_, one), (b, *_, other) in zip(solid, drawn(monkeypatch, 6, 1, classes=[f"striped {name}"])):
            _, cover, colour, _ = one
            assert_array_equal(cover, other[1])
            difference = np.abs(a.image().astype(int) - b.image()).sum(2)
            assert not difference[cover == 0].any()                              # all else is the same
            assert 0.25 < (difference[cover == 1] > 90).mean() < 0.75            # both colours, well apart
            share = (other[2] - colour)[..., 0] / (255 - 2 * colour[0])
            assert_array_equal(np.round((other[2] - colour) / (255 - 2 * colour) - share[..., None], 6), 0)
            assert share.min() > -1e-9 and share.max() < 1 + 1e-9                # from the colour to the mirrored one


def test_stripes_have_their_width_and_any_angle(monkeypatch):
    steps = []
    for *_, (_, _, colour, _) in drawn(monkeypatch, 40, 2, classes=["striped disk"], side=100):
        bright = colour[..., 0] > 127.5
        assert 0.4 < bright.mean() < 0.6
        steps.append([(bright[1:] != bright[:-1]).sum() / 100, (bright[:, 1:] != bright[:, :-1]).sum() / 100])  # a column, a row
    width = 1 / np.hypot(*np.transpose(steps))       # of the side: a step a stripe
    assert 0.058 < width.min() < 0.065 and 0.095 < width.max() < 0.103
    angle = np.arctan2(*np.transpose(steps))
    assert angle.min() < 0.2 and angle.max() > math.pi / 2 - 0.2


def test_small_close_ups():
    assert {e.image().shape for e in close_ups(60, 0, side=16)} == {(16, 16, 3)}


@pytest.mark.parametrize("options, error, message", [
    (dict(classes=("solid star", "solid cube")), ValueError, "classes must be different names out of NEAR and FAR, .*, got .*cube"),
    (dict(classes=()), ValueError, "classes must be different names out of NEAR and FAR, at least one"),
    (dict(classes=("solid star",) * 2), ValueError, "classes must be different names"),
    (dict(classes="solid star"), ValueError, "classes must be different names"),
    (dict(side=15), ValueError, "side must be at least 16, got 15"),
    (dict(side=32.0), TypeError, "side must be an integer"),
    (dict(side=2**31), ValueError, "side must be below"),
    (dict(count=-1), ValueError, "count must be at least 0, got -1"),
    (dict(count=1.5), TypeError, "count must be an integer"),
    (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
    (dict(split=3), TypeError, "split must be a name, got 3"),
])
def test_close_ups_errors(options, error, message):
    with pytest.raises(error, match=f"^scenes.close_ups: {message}"):
        close_ups(**{"count": 1, "seed": 0, **options})
