import colorsys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from conftest import seeds
from tinydet import augment, data, scenes
from tinydet.ops.boxes import area, iou


def places(W, H):
    """An image whose pixels say where they are: (x, y, 0), for sides up to 256."""
    y, x = np.mgrid[:H, :W]
    return np.stack([x, y, 0 * x], 2).astype(np.uint8)


@st.composite
def samples(draw, max_side=60, max_R=6):
    """image (places, sides from 1), boxes inside it with a positive area on a quarter-pixel grid, labels 10, 11, ..."""
    W, H, R = draw(st.integers(1, max_side)), draw(st.integers(1, max_side)), draw(st.integers(0, max_R))
    rng = np.random.default_rng(draw(seeds))
    corners = [[np.sort(rng.choice(4 * side + 1, 2, replace=False)) / 4 for side in (W, H)] for _ in range(R)]
    return places(W, H), np.array(corners).reshape(R, 2, 2).transpose(0, 2, 1).reshape(R, 4).copy(), np.arange(10, 10 + R)


def one(*box):
    return np.array([box], float)


class Script:
    """Stands for a Generator: random, uniform and integers return what is listed, in order."""

    def __init__(self, random=(), uniform=(), integers=()):
        self.lists = {"random": list(random), "uniform": list(uniform), "integers": list(integers)}
        self.asked = []

    def __getattr__(self, name):
        def draw(*args):
            self.asked.append((name, *args))
            return self.lists[name].pop(0)
        return draw


def inside(boxes, W, H):
    return bool(((boxes >= 0).all(1) & (boxes[:, 2:] <= (W, H)).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)).all())


# Mirror and size

def test_random_flip():
    image, boxes = places(5, 2), np.array([[0, 0, 2, 1], [1.5, 0.25, 5, 2]])
    flipped, moved = augment.random_flip(image, boxes, Script(random=[0.49]))
    assert_array_equal(flipped[1], [[4, 1, 0], [3, 1, 0], [2, 1, 0], [1, 1, 0], [0, 1, 0]])
    assert_array_equal(moved, [[3, 0, 5, 1], [0, 0.25, 3.5, 2]])
    again, back = augment.random_flip(flipped, moved, Script(random=[0.0]))
    assert_array_equal(again, image)
    assert_array_equal(back, boxes)
    same, there = augment.random_flip(image, boxes, Script(random=[0.5]))
    assert same is image and there is boxes
    assert augment.random_flip(image, boxes, Script(random=[0.2]), p=0.2)[0] is image


def test_random_flip_upside_down():
    image, boxes = places(5, 2), np.array([[0, 0, 2, 1], [1.5, 0.25, 5, 2]])
    flipped, moved = augment.random_flip(image, boxes, Script(random=[0.49]), upside_down=True)
    assert_array_equal(flipped, image[::-1])
    assert_array_equal(moved, [[0, 1, 2, 2], [1.5, 0, 5, 1.75]])
    same, there = augment.random_flip(image, boxes, Script(random=[0.5]), upside_down=True)
    assert same is image and there is boxes


@given(samples(), seeds, st.sampled_from([0.01, 0.5, 1]))
def test_random_crop_keeps_the_shape_of_the_image(sample, seed, least):
    image, boxes, _ = sample
    part, moved, kept = augment.random_crop(image, boxes, np.random.default_rng(seed), least)
    (h, w), (H, W) = part.shape[:2], image.shape[:2]
    assert max(1, int(least * W)) <= w <= W and max(1, int(least * H)) <= h <= H and abs(h / H - w / W) <= 1 / min(H, W)
    assert inside(moved, w, h) and len(kept) == len(moved)
    corners = {tuple(c) for c in np.argwhere((image == part[0, 0]).all(2))}
    assert any(np.array_equal(image[y:y + h, x:x + w], part) for y, x in corners)
    if least == 1:
        assert_array_equal(part, image)


def test_random_crop_chooses_evenly_and_names_what_is_wrong():
    image, found = places(6, 4), []
    for seed in range(900):
        part, _, _ = augment.random_crop(image, np.zeros((0, 4)), np.random.default_rng(seed), 0.5)
        found.append((part.shape[:2], tuple(part[0, 0])))
    for shape, count in (((2, 3), 12), ((2, 4), 9), ((3, 4), 6), ((3, 5), 4)):
        corners = [c for s, c in found if s == shape]
        assert len(set(corners)) == count
    shapes = [s for s, _ in found]
    assert all(abs(shapes.count(s) / 900 - p) < 0.06 for s, p in (((2, 3), 1 / 3), ((2, 4), 1 / 6), ((3, 4), 1 / 6), ((3, 5), 1 / 3)))
    for least in (0, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"^augment\.random_crop: least must lie in \(0, 1\], got"):
            augment.random_crop(image, np.zeros((0, 4)), np.random.default_rng(0), least)


@given(samples(), st.integers(1, 90), st.integers(1, 90))
def test_resize_maps_the_image_onto_the_new_one(sample, width, height):
    image, boxes, _ = sample
    H, W = image.shape[:2]
    result, moved = augment.resize(image, np.concatenate([boxes, one(0, 0, W, H)]), width, height)
    assert result.shape == (height, width, 3) and result.dtype == np.uint8 and moved.dtype == np.float64
    assert_array_equal(moved[-1], [0, 0, width, height])            # to the last bit: no box leaves the image
    assert inside(moved, width, height)
    assert_allclose(area(moved[:-1]), area(boxes) * width * height / (W * H), rtol=1e-12)
    assert_allclose(moved[:-1] / np.tile([width, height], 2), boxes / np.tile([W, H], 2), rtol=1e-12)


def test_resize_moves_pixels_and_boxes_alike():
    image, boxes = np.zeros((6, 9, 3), np.uint8), one(2, 1, 5, 4)
    image[1:4, 2:5] = 255
    result, (box,) = augment.resize(image, boxes, 27, 12, Image.Resampling.NEAREST)
    assert_array_equal(result, image.repeat(3, 1).repeat(2, 0))
    assert_array_equal(box, [6, 2, 15, 8])
    assert_array_equal(np.argwhere(result.any(2)).min(0), [2, 6])
    assert_array_equal(np.argwhere(result.any(2)).max(0), [7, 14])
    bilinear, _ = augment.resize(image, boxes, 27, 12)
    assert_array_equal(bilinear, np.asarray(Image.fromarray(image).resize((27, 12), Image.Resampling.BILINEAR)))


def test_scale_rounds_halves_up_and_keeps_a_pixel():
    for (W, H), factor, wanted in (((5, 3), 0.5, (3, 2)), ((7, 2), 0.01, (1, 1)), ((10, 4), 1.26, (13, 5)), ((1, 1), 3, (3, 3))):
        image, boxes = augment.scale(places(W, H), one(0, 0, W, H), factor)
        assert image.shape[1::-1] == wanted
        assert_array_equal(boxes, [[0, 0, *wanted]])
    for factor in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"^augment.scale: factor must be positive and finite, got {factor}$"):
            augment.scale(places(2, 2), one(0, 0, 1, 1), factor)


def test_short_side_factor():
    for size, wanted in (((500, 375), 1.6), ((375, 500), 1.6), ((600, 300), 1000 / 600), ((2000, 1000), 0.5), ((1200, 600), 1000 / 1200)):
        assert augment.short_side_factor(places(*size), 600, 1000) == wanted
    large = np.broadcast_to(np.uint8(0), (6000, 10005, 3))
    assert augment.short_side_factor(large[:, 1:], 600, 1000) == 0.1         # round(1000.4) is not above 1000
    assert augment.short_side_factor(large, 600, 1000) == 1000 / 10005


@given(samples(), seeds)
def test_flip_and_scale(sample, seed):
    image, boxes, labels = sample
    result, moved, kept = augment.flip_and_scale(image, boxes, labels, np.random.default_rng(seed), (40, 50), 70)
    H, W = image.shape[:2]
    height, width = result.shape[:2]
    assert (min(width, height) in (40, 50) and max(width, height) <= 70) or max(width, height) == 70
    assert inside(moved, width, height) and moved.dtype == np.float64
    assert_array_equal(kept, labels)
    ratio = np.array([width / W, height / H])
    assert_allclose(moved[:, 1::2], boxes[:, 1::2] * ratio[1], rtol=1e-12)
    x = boxes[:, ::2] * ratio[0]
    assert np.allclose(moved[:, ::2], x, atol=1e-9) or np.allclose(moved[:, ::2], (width - x)[:, ::-1], atol=1e-9)


def test_flip_and_scale_of_fast_rcnn():
    for size, wanted in (((400, 300), (800, 600)), ((300, 600), (500, 1000))):
        image, _, _ = augment.flip_and_scale(places(*size), np.zeros((0, 4)), np.zeros(0), np.random.default_rng(0))
        assert image.shape[1::-1] == wanted


def test_flip_and_scale_chooses_evenly():
    image, found = places(4, 2), []
    for seed in range(600):
        result, moved, _ = augment.flip_and_scale(image, one(0, 0, 1, 1), np.zeros(1), np.random.default_rng(seed), (2, 4, 6), 100)
        found.append((len(result), moved[0, 0] > 0))
    counts = {k: found.count(k) for k in set(found)}
    assert set(counts) == {(h, m) for h in (2, 4, 6) for m in (False, True)} and min(counts.values()) > 65       # 100 expected, sigma 9


# Colour

COLOURS = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255],
                    [255, 0, 255], [200, 30, 40], [13, 250, 14], [1, 2, 3], [254, 254, 253]], np.float32)


def pixels(seed, n=40):
    return np.concatenate([COLOURS, np.random.default_rng(seed).integers(0, 256, (n, 3)).astype(np.float32)])[None]


@given(seeds, st.floats(0.5, 1.5), st.floats(-32, 32))
def test_brightness_and_contrast(seed, factor, delta):
    x = pixels(seed)
    for result, wanted in ((augment.contrast(x, factor), x.astype(float) * factor), (augment.brightness(x, delta), x.astype(float) + delta)):
        assert result.dtype == np.float32
        assert_allclose(result, np.clip(wanted, 0, 255), atol=1e-4)


@given(seeds, st.floats(0.5, 1.5), st.floats(-180, 180))
def test_saturation_and_hue_are_those_of_hsv(seed, factor, degrees):
    x = pixels(seed)
    hsv = [colorsys.rgb_to_hsv(*(float(v) / 255 for v in p)) for p in x[0]]
    more = [colorsys.hsv_to_rgb(h, min(1.0, s * factor), v) for h, s, v in hsv]
    turned = [colorsys.hsv_to_rgb((h + degrees / 360) % 1.0, s, v) for h, s, v in hsv]
    for result, wanted in ((augment.saturation(x, factor), more), (augment.hue(x, degrees), turned)):
        assert result.dtype == np.float32
        assert_allclose(result[0], 255 * np.array(wanted), atol=2e-3)


def test_colours_that_do_not_change():
    x = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.float32)
    for same in (augment.brightness(x, 0), augment.contrast(x, 1), augment.saturation(x, 1), augment.hue(x, 0), augment.hue(x, 360),
                 augment.lighting(x, np.eye(3), np.zeros(3))):
        assert_allclose(same, x, atol=1e-3)
        assert_array_equal((same + np.float32(0.5)).astype(np.uint8), x)
    grey = x[..., :1].repeat(3, 2)
    assert_array_equal(augment.hue(grey, 77), grey)
    assert_array_equal(augment.saturation(grey, 1.5), grey)


def test_lighting_adds_one_colour():
    x = np.full((1, 2, 3), 100, np.float32)
    axes = np.array([[0.1, 0, 0], [0, 0, 0.2], [0, 0.3, 0]])
    assert_allclose(augment.lighting(x, axes, [1, 0.5, -0.25])[0, 1], [100 + 25.5, 100 - 12.75, 100 + 38.25], rtol=1e-6)
    assert_array_equal(augment.lighting(x, axes, [9, -9, 0])[0, 0], [255, 100, 0])


def test_colour_axes():
    colours = np.array([[10, 20, 30], [50, 20, 30], [30, 20, 20], [30, 20, 40]], np.uint8)      # R varies most, then B, G not at all
    image = colours.reshape(1, 4, 1, 3).repeat(4, 2).reshape(1, 16, 3)                          # every fourth pixel is looked at
    image[:, 1::4] = 255
    axes = augment.colour_axes([data.Example("", image, (16, 1), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))])
    assert_allclose(axes, [[0, 0, 200 / 255**2], [0, 0, 0], [0, 50 / 255**2, 0]], atol=1e-12)
    axes = augment.colour_axes(scenes.scenes(3, 0))
    assert (np.linalg.norm(axes, axis=0)[1:] >= np.linalg.norm(axes, axis=0)[:-1]).all()
    assert (axes[abs(axes).argmax(0), range(3)] > 0).all()
    assert_allclose(axes.T @ axes, np.diag(np.diag(axes.T @ axes)), atol=1e-12)
    assert_array_equal(augment.colour_axes(scenes.scenes(3, 0)[:2]), augment.colour_axes(scenes.scenes(3, 0), most=2))


def test_photometric_order_and_rounding(monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(augment, name, lambda x, v, name=name: calls.append((name, v)) or x)
    image = places(3, 2)
    # coins: brightness, contrast first?, contrast, saturation, hue
    rng = Script([0.4, 0.4, 0.4, 0.4, 0.4], [5, 1.2, 0.8, 9])
    assert_array_equal(augment.photometric(image, rng), image)
    assert calls == [("brightness", 5), ("contrast", 1.2), ("saturation", 0.8), ("hue", 9)]
    ranges = [(-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 18)]
    assert [asked[1:] for asked in rng.asked if asked[0] == "uniform"] == ranges
    calls.clear()
    augment.photometric(image, rng := Script([0.5, 0.5, 0.4, 0.4, 0.4], [0.8, 9, 1.2]))
    assert calls == [("saturation", 0.8), ("hue", 9), ("contrast", 1.2)]
    assert [asked[1:] for asked in rng.asked if asked[0] == "uniform"] == [*ranges[2:], ranges[1]]
    calls.clear()
    augment.photometric(image, Script([0.5, 0.4, 0.5, 0.5, 0.5]))
    assert calls == []
    monkeypatch.undo()
    result = augment.photometric(np.array([[[10, 11, 255]]], np.uint8), Script([0.4, 0.5, 0.5, 0.5, 0.4], [0.25, 1.5]))
    assert_array_equal(result, [[[15, 17, 255]]])                   # 10.25 * 1.5 = 15.375, 11.25 * 1.5 = 16.875
    assert result.dtype == np.uint8


def test_photometric_probabilities_and_ranges(monkeypatch):
    found = {name: [] for name in ("brightness", "contrast", "saturation", "hue", "lighting")}
    first, now = [], []
    for name in found:
        monkeypatch.setattr(augment, name, lambda x, *v, name=name: found[name].append(v[-1]) or now.append(name) or x)
    n = 2000
    for seed in range(n):
        now.clear()
        augment.photometric(places(1, 1), np.random.default_rng(seed), np.eye(3))
        if "contrast" in now and ("saturation" in now or "hue" in now):
            first.append(now.index("contrast") < max(now.index(k) for k in ("saturation", "hue") if k in now))
    for name, values in found.items():
        assert abs(len(values) / n - 0.5) < 0.045, name             # 4 sigma
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -18, 18)):
        values = np.array(found[name])
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.04 * (high - low)
    assert abs(np.mean(first) - 0.5) < 0.08
    amounts = np.array(found["lighting"])
    assert abs(amounts.mean()) < 0.01 and abs(amounts.std() - 0.1) < 0.006 and amounts.shape[1:] == (3,)


def test_subtract_mean():
    image = places(2, 2)
    assert_array_equal(augment.subtract_mean(image, (0.5, 1, 2))[1, 1], [0.5, 0, -2])
    assert augment.subtract_mean(image, 7).dtype == np.float32 and augment.subtract_mean(image, 7)[0, 0, 0] == -7


# Place

def test_expand_by_hand():
    image = places(4, 3) + np.uint8(100)
    canvas, boxes = augment.expand(image, one(1, 0.5, 4, 3), Script([0.49], [2.3], [5, 1]), (1.4, 2.5, 255))
    assert canvas.shape == (6, 9, 3) and canvas.dtype == np.uint8   # floor(6.9), floor(9.2)
    assert_array_equal(canvas[1:4, 5:9], image)
    canvas[1:4, 5:9] = (1, 3, 255)
    assert_array_equal(canvas, np.broadcast_to(np.uint8([1, 3, 255]), (6, 9, 3)))
    assert_array_equal(boxes, [[6, 1.5, 9, 4]])
    assert augment.expand(image, boxes, Script([0.5]), 0) == (image, boxes)
    rng = Script([0.0], [4.0], [0, 0])
    assert augment.expand(image, boxes, rng, 9)[0][11, 15, 1] == 9
    assert rng.asked[1:] == [("uniform", 1, 4.0), ("integers", 13), ("integers", 10)]     # the last place is W' - W


@given(samples(max_side=20), seeds)
def test_expand_moves_boxes_with_their_pixels(sample, seed):
    image, boxes, _ = sample
    canvas, moved = augment.expand(image, boxes, np.random.default_rng(seed), 255, p=1)
    H, W = image.shape[:2]
    assert W <= canvas.shape[1] <= 4 * W and H <= canvas.shape[0] <= 4 * H
    top, left = np.argwhere(canvas[..., 2] == 0).min(0)
    assert_array_equal(canvas[top:top + H, left:left + W], image)
    assert (canvas[..., 2] == 0).sum() == H * W
    assert_array_equal(moved, boxes + [left, top, left, top])
    assert moved.dtype == np.float64 and inside(moved, *canvas.shape[1::-1])


def test_expand_probability_and_ratio():
    ratios = []
    for seed in range(1000):
        canvas, _ = augment.expand(places(100, 50), np.zeros((0, 4)), np.random.default_rng(seed), 0)
        ratios.append(canvas.shape[1] / 100)
        assert abs(canvas.shape[0] / 50 - ratios[-1]) < 0.021       # one factor for both sides
    changed = np.array(ratios)[np.array(ratios) > 1]
    assert abs(len(changed) / 1000 - 0.5) < 0.065 and abs(changed.mean() - 2.5) < 0.16 and changed.max() > 3.97 and changed.min() < 1.03


def crop_by_definition(boxes, box):
    x1, y1, x2, y2 = box
    kept, cut = [], []
    for i, b in enumerate(boxes):
        cx, cy = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
        if x1 < cx < x2 and y1 < cy < y2:
            kept.append(i)
            cut.append((max(b[0], x1) - x1, max(b[1], y1) - y1, min(b[2], x2) - x1, min(b[3], y2) - y1))
    return np.array(cut).reshape(-1, 4), kept


@given(samples(), st.data())
def test_crop_is_the_definition(sample, draw):
    image, boxes, _ = sample
    H, W = image.shape[:2]
    x1, y1 = draw.draw(st.integers(0, W - 1)), draw.draw(st.integers(0, H - 1))
    x2, y2 = draw.draw(st.integers(x1 + 1, W)), draw.draw(st.integers(y1 + 1, H))
    result, cut, kept = augment.crop(image, boxes, (x1, y1, x2, y2))
    wanted, indices = crop_by_definition(boxes, (x1, y1, x2, y2))
    assert_array_equal(result, image[y1:y2, x1:x2])
    assert_array_equal(cut, wanted)
    assert_array_equal(kept, indices)
    assert cut.dtype == np.float64 and inside(cut, x2 - x1, y2 - y1)


def test_crop_keeps_a_box_by_its_centre():
    boxes = np.array([[0, 0, 8, 8], [0, 0, 8.5, 8.5], [9, 9, 10, 10], [5, 5, 5, 9], [12, 4, 20, 20], [4, 12, 20, 20.0], [3, 3, 13, 13]])
    _, cut, kept = augment.crop(places(20, 20), boxes, (4, 4, 12, 16))
    assert_array_equal(kept, [1, 2, 6])                             # 0: its centre is on the corner; 3: no area; 4, 5: centre outside
    assert_array_equal(cut, [[0, 0, 4.5, 4.5], [5, 5, 6, 6], [0, 0, 8, 9]])


def test_iou_crop_asks_for_the_best_overlap_not_the_worst():
    boxes = np.array([[0, 0, 60, 60], [90, 90, 95, 95.0], [58, 0, 100, 10]])
    index = augment.CROPS.index(0.9)
    shape, place = np.array([0.6, 0.6]), np.array([0.0, 0.0])
    image, cut, kept = augment.iou_crop(places(100, 100), boxes, Script(uniform=[shape, place], integers=[index]))
    assert image.shape == (60, 60, 3)
    assert_array_equal(kept, [0])
    assert_array_equal(cut, [[0, 0, 60, 60]])
    shifted = np.array([0.1, 0.1])                                  # 4 pixels away: IoU 56^2 / (2 * 3600 - 56^2) = 0.77
    rng = Script(uniform=[shape, shifted] * 50, integers=[index, 0])
    same, there, kept = augment.iou_crop(image := places(100, 100), boxes, rng)
    assert same is image and there is boxes and list(kept) == [0, 1, 2]
    assert augment.TRIES == 50 and len(rng.asked) == 102 and not rng.lists["uniform"]       # 50 tries, then another choice
    rng = Script(uniform=[shape, shifted], integers=[augment.CROPS.index(0.7)])
    assert augment.iou_crop(image, boxes, rng)[0][0, 0].tolist() == [4, 4, 0]


def test_iou_crop_rejects():
    image, boxes = places(100, 100), one(0, 0, 20, 20)
    take = [np.array([0.5, 0.5]), np.array([0.0, 0.0])]
    for shape, place in (((0.9, 0.44), (0, 0)), ((0.44, 0.9), (0, 0)), ((0.5, 0.5), (1, 1))):      # flat, tall, no centre inside
        rng = Script(uniform=[np.array(shape), np.array(place), *take], integers=[augment.CROPS.index("any")])
        assert augment.iou_crop(image, boxes, rng)[0].shape == (50, 50, 3)
    for shape in ((0.9, 0.45), (0.45, 0.9)):                        # exactly 1 to 2 is allowed
        rng = Script(uniform=[np.array(shape), np.array([0.0, 0.0])], integers=[augment.CROPS.index("any")])
        assert augment.iou_crop(image, boxes, rng)[0].shape == (round(100 * shape[1]), round(100 * shape[0]), 3)
    rng = Script(uniform=[np.array([0.5, 0.5]), np.array([1, 1])], integers=[augment.CROPS.index(0.9)])
    assert augment.iou_crop(image, np.zeros((0, 4)), rng)[0].shape == (50, 50, 3)           # without boxes nothing can be missed


@pytest.mark.parametrize("choice", [0.1, 0.3, 0.7, 0.9, "any"])
@given(sample=samples(), seed=seeds)
def test_iou_crop_keeps_its_promise(choice, sample, seed):
    image, boxes, _ = sample
    H, W = image.shape[:2]
    before, augment.CROPS = augment.CROPS, (choice, choice, choice, "none")
    try:
        result, cut, kept = augment.iou_crop(image, boxes, np.random.default_rng(seed))
    finally:
        augment.CROPS = before
    if result is image:
        assert cut is boxes
        assert_array_equal(kept, np.arange(len(boxes)))
        return
    h, w = result.shape[:2]
    x, y = (int(v) for v in result[0, 0, :2])
    assert_array_equal(result, image[y:y + h, x:x + w])
    assert 0.3 * W - 1 <= w <= W and 0.3 * H - 1 <= h <= H and h - 1 <= 2 * (w + 1) and w - 1 <= 2 * (h + 1)
    assert not len(boxes) or choice == "any" or iou(boxes, one(x, y, x + w, y + h)).max() >= choice
    wanted, indices = crop_by_definition(boxes, (x, y, x + w, y + h))
    assert len(kept) or not len(boxes)
    assert_array_equal(kept, indices)
    assert_array_equal(cut, wanted)
    assert inside(cut, w, h)


def test_iou_crop_ends_where_no_crop_can_be_found():
    image = places(250, 20)                                         # 0.3 * 250 is more than twice 20
    for seed in range(20):
        assert augment.iou_crop(image, one(0, 0, 9, 9), np.random.default_rng(seed))[0] is image


def test_iou_crop_chooses_evenly():
    assert augment.CROPS == ("none", 0.1, 0.3, 0.7, 0.9, "any")
    results = [augment.iou_crop(places(100, 100), np.zeros((0, 4)), np.random.default_rng(seed))[0] for seed in range(1200)]
    assert abs(np.mean([r.shape == (100, 100, 3) for r in results]) - 1 / 6) < 0.045
    cut = [r for r in results if r.shape != (100, 100, 3)]
    assert min(r.shape[1] for r in cut) < 33 and max(r.shape[1] for r in cut) > 97
    assert {r.shape[0] > r.shape[1] for r in cut} == {False, True}
    free = [(r[0, 0, 0] / (100 - r.shape[1]), r[0, 0, 1] / (100 - r.shape[0])) for r in cut if max(r.shape) < 90]
    assert_allclose(np.mean(free, 0), [0.5, 0.5], atol=0.06)        # anywhere, evenly


# The chain

@given(samples(), seeds)
def test_ssd_keeps_boxes_inside_and_aligned(sample, seed):
    image, boxes, labels = sample
    rows = np.stack([labels, labels % 2], 1)
    copies = image.copy(), boxes.copy(), rows.copy()
    result, moved, kept = augment.ssd(image, boxes, rows, np.random.default_rng(seed), 33, 128)
    assert result.shape == (33, 33, 3) and result.dtype == np.uint8 and moved.dtype == np.float64 and kept.dtype == rows.dtype
    assert moved.shape == (len(kept), 4) and inside(moved, 33, 33)
    assert len(kept) > 0 or not len(boxes)
    assert (np.diff(kept[:, 0]) > 0).all() and set(map(tuple, kept)) <= set(map(tuple, rows))
    for a, b in zip((image, boxes, rows), copies):
        assert_array_equal(a, b)
    again = augment.ssd(image, boxes, rows, np.random.default_rng(seed), 33, 128)
    for a, b in zip((result, moved, kept), again):
        assert_array_equal(a, b)


def test_ssd_is_its_steps_in_order():
    image, boxes, labels = scenes.scenes(1, 5)[0].image(), one(3, 4, 100, 90).repeat(2, 0) * [[1, 1, 1, 1], [2, 3, 1, 1]], np.array([7, 8])
    axes = np.eye(3) / 50
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a = augment.photometric(image, rng, axes)
        a, b = augment.expand(a, boxes, rng, (9, 99, 199))
        a, b, kept = augment.iou_crop(a, b, rng)
        a, b = augment.random_flip(a, b, rng)
        a, b = augment.resize(a, b, 50, 50, augment.INTERPOLATIONS[rng.integers(5)])
        for x, y in zip((a, b, labels[kept]), augment.ssd(image, boxes, labels, np.random.default_rng(seed), 50, (9, 99, 199), axes)):
            assert_array_equal(x, y)


def test_ssd_boxes_stay_on_their_object(monkeypatch):
    monkeypatch.setattr(augment, "photometric", lambda image, rng, axes: image)
    cuts = 0
    for seed in range(150):
        rng = np.random.default_rng([seed, 1])
        x, y, w, h = rng.integers(5, 40, 4)
        image = np.zeros((90, 100, 3), np.uint8)
        image[y:y + h, x:x + w] = 255
        result, boxes, _ = augment.ssd(image, one(x, y, x + w, y + h), np.zeros(1), rng, 200, 0)
        seen = np.argwhere(result[..., 0] > 127)
        found = [*seen.min(0)[::-1], *(seen.max(0)[::-1] + 1)]
        assert_allclose(boxes[0], found, atol=0.51 + 0.51 * 200 / 27, err_msg=str(seed))       # half a pixel before and after
        cuts += bool((boxes[0] == 0).any() or (boxes[0] == 200).any())
    assert cuts > 20


def test_seeds_differ():
    image, boxes, labels = scenes.scenes(1, 5)[0].image(), one(3, 4, 100, 90), np.array([7])
    results = [augment.ssd(image, boxes, labels, np.random.default_rng(seed), 40, 128) for seed in range(20)]
    assert len({r[0].tobytes() for r in results}) == 20
    assert len({r[1].tobytes() for r in results}) > 12              # without expansion, crop and mirror the box is that of another seed


def test_interpolations_are_all_used(monkeypatch):
    used = []
    monkeypatch.setattr(augment, "resize", lambda image, boxes, w, h, how: used.append(how) or (image, boxes))
    for seed in range(300):
        augment.ssd(places(3, 3), np.zeros((0, 4)), np.zeros(0), np.random.default_rng(seed), 5, 0)
    counts = [used.count(how) for how in augment.INTERPOLATIONS]
    assert len(counts) == 5 and sum(counts) == 300 and min(counts) > 32      # 60 expected, sigma 7


@given(samples(max_side=2), seeds)
def test_smallest_images(sample, seed):
    result, boxes, _ = augment.ssd(*sample, np.random.default_rng(seed), 1, 0, np.eye(3))
    assert result.shape == (1, 1, 3) and inside(boxes, 1, 1)


# Errors

def test_errors():
    image, boxes = places(4, 3), one(0, 0, 1, 1)
    rng = np.random.default_rng(0)
    calls = {"random_flip": lambda i, b: augment.random_flip(i, b, rng), "resize": lambda i, b: augment.resize(i, b, 2, 2),
             "expand": lambda i, b: augment.expand(i, b, rng, 0), "iou_crop": lambda i, b: augment.iou_crop(i, b, rng),
             "crop": lambda i, b: augment.crop(i, b, (0, 0, 1, 1))}
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^augment.{name}: image must be uint8, got float64$"):
            call(image / 255, boxes)
        with pytest.raises(ValueError, match=rf"^augment.{name}: image must have shape \(H, W, 3\) and hold a pixel, got \(4, 3\)$"):
            call(image[..., 0].T, boxes)
        with pytest.raises(ValueError, match=rf"^augment.{name}: image must have .*, got \(0, 4, 3\)$"):
            call(image[:0], boxes)
        with pytest.raises(ValueError, match=rf"^augment.{name}: image must have .*, got \(3, 4, 2\)$"):
            call(image[..., :2], boxes)
        with pytest.raises(TypeError, match=f"^augment.{name}: boxes must be an array, got list$"):
            call(image, boxes.tolist())
        with pytest.raises(ValueError, match=rf"^augment.{name}: boxes must have shape \(R, 4\), got \(4,\)$"):
            call(image, boxes[0])
        with pytest.raises(TypeError, match=f"^augment.{name}: boxes must be float32 or float64, got int64$"):
            call(image, boxes.astype(np.int64))
    with pytest.raises(TypeError, match="^augment.photometric: image must be an array, got list$"):
        augment.photometric(image.tolist(), rng)
    with pytest.raises(ValueError, match="^augment.resize: width must be at least 1, got 0$"):
        augment.resize(image, boxes, 0, 4)
    for box in ((-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 5, 2), (0, 0, 2, 4), (2, 0, 2, 2), (0, 2, 2, 1)):
        with pytest.raises(ValueError, match=r"^augment.crop: box must hold a pixel and lie in the image of 4x3, got \("):
            augment.crop(image, boxes, box)
