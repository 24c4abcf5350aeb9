"""Oquab's patches: the tiling, their labels and pixels, and what the scores of all patches say of the image."""
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from conftest import BACKENDS, RUNNING, seeds
from tinydet import data, to_numpy, use
from tinydet.models.oquab_patches import LAMBDAS, cut, heat_map, image_score, label, mirrored_patch, resample, tiles
from tinydet.ops import softmax_loss


def picture(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


# Tiling (notes, 7: 7)

def test_the_lambdas_are_the_nine_of_the_paper():
    assert LAMBDAS == (1, 1.3, 1.6, 2, 2.4, 2.8, 3.2, 3.6, 4)


@pytest.mark.parametrize("width, height, overlap, total, counts", [
    (500, 375, 0.5, 275, (2, 6, 12, 15, 24, 35, 48, 63, 70)), (500, 375, 2 / 3, 512, (2, 8, 15, 24, 48, 70, 88, 117, 140)),
    (500, 333, 0.5, 315, None), (500, 333, 2 / 3, 601, None), (500, 500, 0.5, 198, None), (500, 500, 2 / 3, 360, None)])
def test_counts_of_the_notes(width, height, overlap, total, counts):
    assert len(tiles(width, height, overlap=overlap)) == len(tiles(height, width, overlap=overlap)) == total
    if counts:
        assert tuple(len(tiles(width, height, (v,), overlap)) for v in LAMBDAS) == counts
    if (width, height, overlap) == (500, 375, 2 / 3):
        assert len(tiles(width, height)) == total                               # the default
    assert len(tiles(64, 64, (1, 1.6, 2.4, 3.2, 4), 0.5)) == 111                # the toy of notes, sec. 6


def test_grid_of_the_notes():
    found, s = tiles(500, 375, (1.3,), 0.5), 288.461538
    starts = [(x, y) for y in (0, 86.538462) for x in (0, 105.769231, 211.538462)]              # row by row
    assert_allclose(found, [(x, y, x + s, y + s) for x, y in starts], rtol=0, atol=1e-6)
    assert found.dtype == np.float64
    assert_array_equal(tiles(7, 7, (1,)), [[0, 0, 7, 7]])


def test_a_quotient_that_is_whole_but_for_rounding_adds_no_patch():
    s = 50 / 1.3
    assert math.ceil((250 - s) / (0.5 * s)) == 12                               # 11.000000000000002, hence the formula's 1e-9
    assert len(tiles(250, 50, (1.3,), 0.5)) == 12 * 2


@given(width=st.integers(1, 700), height=st.integers(1, 700), overlap=st.sampled_from([0, 0.3, 0.5, 2 / 3, 0.8]))
def test_every_grid_covers_the_image_to_its_borders(width, height, overlap):
    low = min(width, height)
    if max(width, height) > 20 * low:
        width = height = low
    found = tiles(width, height, overlap=overlap)
    assert (found[:, :2] >= 0).all() and (found[:, 2:] <= (width, height)).all()
    sides = found[:, 2:] - found[:, :2]
    assert_allclose(sides[:, 0], sides[:, 1], rtol=1e-9)
    at = 0
    for v in LAMBDAS:                                                           # nine scales, in order
        s, axes = low / v, []
        for L in (width, height):
            n = 1 if L <= s else 1 + math.ceil((L - s) / ((1 - overlap) * s) - 1e-9)
            axes.append([k * (L - s) / max(1, n - 1) for k in range(n)])
            assert axes[-1][0] == 0 and abs(axes[-1][-1] - (L - s)) <= 1e-6
            assert n == 1 or s - (axes[-1][1] - axes[-1][0]) >= overlap * s - 1e-6
        expected = [(x, y, x + s, y + s) for y in axes[1] for x in axes[0]]
        assert_allclose(found[at:at + len(expected)], expected, rtol=0, atol=1e-9)
        at += len(expected)
    assert at == len(found)


def test_tiny_and_huge_images():
    assert_array_equal(tiles(1, 1, (1, 4), 0)[[0, 1, -1]], [[0, 0, 1, 1], [0, 0, 0.25, 0.25], [0.75, 0.75, 1, 1]])
    assert len(tiles(1, 1)) == 360
    assert len(tiles(50_000, 40_000)) == len(tiles(500, 400))                   # scales do not matter, pixels neither
    assert len(tiles(10**5, 1, (1,))) == 3 * (10**5 - 1) + 1


# Labels (notes, 7: 8 to 10)

PERSON, SHEEP, BACKGROUND = 0, 1, 2
SCENE, NAMES = np.array([[60.0, 40, 180, 300], [180, 100, 270, 190]]), np.array([PERSON, SHEEP])
TABLE = [((0, 40, 260, 300), PERSON), ((0, 20, 230, 250), PERSON), ((150, 80, 300, 230), SHEEP), ((170, 90, 260, 180), SHEEP),
         ((180, 100, 280, 200), SHEEP), ((80, 60, 280, 260), -1), ((120, 0, 400, 280), BACKGROUND),
         ((100, 200, 200, 300), BACKGROUND), ((200, 110, 230, 140), BACKGROUND), ((300, 0, 400, 100), BACKGROUND)]
PATCHES = np.array([patch for patch, _ in TABLE], float)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_of_the_notes(dtype):
    found = label(PATCHES.astype(dtype), SCENE.astype(dtype), NAMES, BACKGROUND)
    assert_array_equal(found, [wanted for _, wanted in TABLE])
    assert found.dtype == np.int64
    assert_array_equal(label(PATCHES, SCENE, NAMES.astype(np.uint8), BACKGROUND), found)


def test_both_borders_are_inclusive():
    patch = np.array([[0.0, 0, 100, 100]])
    for box, wanted in (((0, 0, 40, 50), 0), ((0, 0, 40, 49), 1), ((-40, 0, 60, 50), 0), ((-41, 0, 60, 50), 1)):
        assert label(patch, np.array([box], float), np.array([0]), 1)[0] == wanted, box
    for n in (3, 7, 10, 49, 1000):                                              # 0.2 and 0.6 are no binary fractions
        square = 5.0 * n
        assert label(np.array([[0.0, 0, square, square]]), np.array([[0.0, 0, n, square]]), np.array([0]), 1)[0] == 0
        assert label(np.array([[0.0, 0, 3 * n, 3 * n]]), np.array([[0.0, 0, 5 * n, 3 * n]]), np.array([0]), 1)[0] == 0


@st.composite
def laid_out(draw, most=4):
    """Patches, boxes, labels, difficult: on a grid so coarse that thresholds are met exactly and several objects qualify."""
    rng, R, M = np.random.default_rng(draw(seeds)), draw(st.integers(0, most)), draw(st.integers(0, 8))
    corner, side = rng.integers(0, 6, (M, 2)), rng.integers(1, 10, (M, 1))
    low = rng.integers(-2, 8, (R, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 7, (R, 2))], 1)
    patches = np.concatenate([corner, corner + side], 1)
    return patches.astype(float), boxes.astype(float), rng.integers(0, 2, R), rng.random(R) < 0.3


def by_definition(patches, boxes, labels, difficult, same_class_ok):
    result = []
    for px1, py1, px2, py2 in patches.astype(int).tolist():
        inside = []
        for r, (x1, y1, x2, y2) in enumerate(boxes.astype(int).tolist()):
            both = max(0, min(px2, x2) - max(px1, x1)) * max(0, min(py2, y2) - max(py1, y1))
            area = (x2 - x1) * (y2 - y1)
            if area and Fraction(both, (px2 - px1) * (py2 - py1)) >= Fraction(1, 5) and Fraction(both, area) >= Fraction(3, 5):
                inside.append(r)
        if not inside:
            result.append(BACKGROUND)
        elif any(difficult[r] for r in inside) or len({labels[r] for r in inside} if same_class_ok else inside) > 1:
            result.append(-1)
        else:
            result.append(labels[inside[0]])
    return result


@given(drawn=laid_out(), same_class_ok=st.booleans(), use_difficult=st.booleans())
def test_labels_are_the_definition(drawn, same_class_ok, use_difficult):
    patches, boxes, labels, difficult = drawn
    found = label(patches, boxes, labels, BACKGROUND, difficult if use_difficult else None, same_class_ok)
    assert_array_equal(found, by_definition(patches, boxes, labels, difficult & use_difficult, same_class_ok))
    assert found.shape == (len(patches),) and found.dtype == np.int64


@given(drawn=laid_out(), scale=st.sampled_from([0.25, 2.0, 7.0]), shift=st.tuples(*[st.integers(-90, 90)] * 2), seed=seeds)
def test_labels_do_not_depend_on_place_scale_or_order(drawn, scale, shift, seed):
    patches, boxes, labels, difficult = drawn
    found = label(patches, boxes, labels, BACKGROUND, difficult)
    assert_array_equal(label(patches * scale + shift * 2, boxes * scale + shift * 2, labels, BACKGROUND, difficult), found)
    order = np.random.default_rng(seed).permutation(len(boxes))
    assert_array_equal(label(patches, boxes[order], labels[order], BACKGROUND, difficult[order]), found)
    order = np.random.default_rng(seed).permutation(len(patches))
    assert_array_equal(label(patches[order], boxes, labels, BACKGROUND, difficult), found[order])


def test_several_objects_difficult_objects_and_none():
    patch, twins = np.array([[0.0, 0, 10, 10]]), np.array([[0.0, 0, 5, 10], [5, 0, 10, 10]])
    assert label(patch, twins, np.array([1, 1]), 2)[0] == -1                            # "object", not class
    assert label(patch, twins, np.array([1, 1]), 2, same_class_ok=True)[0] == 1
    assert label(patch, twins, np.array([0, 1]), 2, same_class_ok=True)[0] == -1
    for hard in ([True, False], [False, True], [True, True]):                           # neither positive nor background
        assert label(patch, twins, np.array([1, 1]), 2, np.array(hard), same_class_ok=True)[0] == -1
    assert label(patch, twins[:1], np.array([1]), 2, np.array([True]))[0] == -1
    assert label(patch, np.array([[20.0, 0, 30, 10]]), np.array([1]), 2, np.array([True]))[0] == 2      # difficult, but elsewhere
    empty = np.zeros((0, 4))
    assert_array_equal(label(PATCHES, empty, np.zeros(0, int), 5, np.zeros(0, bool), True), np.full(len(PATCHES), 5))
    assert label(empty, twins, np.array([0, 1]), 2).shape == (0,)
    assert label(patch, np.array([[3.0, 3, 3, 9]]), np.array([0]), 1)[0] == 1           # a box without area
    huge = np.array([[0.0, 0, 1e150, 1e150]])
    assert label(huge, huge, np.array([0]), 1)[0] == 0


@given(labels=st.lists(st.integers(-1, 3), max_size=60), share=st.sampled_from([0, 0.1, 0.25, 0.5, 1]), seed=seeds)
def test_resampling_keeps_positives_and_a_share_of_the_background(labels, share, seed):
    labels, background = np.array(labels, np.int64), 3
    kept = resample(labels, background, share, np.random.default_rng(seed))
    assert_array_equal(kept, np.unique(kept))                                   # ascending, none twice
    assert_array_equal(kept, resample(labels, background, share, np.random.default_rng(seed)))
    assert_array_equal(kept[labels[kept] != background], np.flatnonzero((labels >= 0) & (labels < background)))     # none deleted
    assert (labels[kept] == background).sum() == math.floor(share * (labels == background).sum() + 0.5)


def test_every_background_patch_may_be_drawn():
    rng, labels = np.random.default_rng(0), np.repeat([2, 0], [40, 5])
    counts = np.bincount(np.concatenate([resample(labels, 2, 0.1, rng) for _ in range(1000)]), minlength=45)
    assert (counts[40:] == 1000).all() and (abs(counts[:40] - 100) < 50).all()
    assert len(resample(labels[:5], 2, 0.1, rng)) == 1                          # 0.5 rounds up


# Pixels

def test_cut_takes_whole_pixels_as_they_are():
    image = picture(9, 12)
    found = cut(image, np.array([[0.0, 0, 4, 4], [8, 5, 12, 9], [3, 2, 7, 6]], np.float32), 4)
    assert_array_equal(found, [image[:4, :4], image[5:9, 8:12], image[2:6, 3:7]])
    assert found.dtype == np.uint8
    assert cut(image, np.zeros((0, 4)), 32).shape == (0, 32, 32, 3)


def test_cut_looks_where_the_tiles_are():
    y, x = np.mgrid[:60, :80]
    ramp = np.stack([3 * x, 4 * y, 0 * x], 2).astype(np.uint8)          # linear: an enlarged pixel is the value at its middle
    for box in tiles(80, 60, (2, 3.6), 0.5):
        patch, s = cut(ramp, box[None], 40)[0].astype(float), box[2] - box[0]
        middles = (np.arange(40) + 0.5) * s / 40 - 0.5
        inner = slice(2, 38)                                                   # off the image's border
        assert_allclose(patch[:, inner, 0], np.tile(3 * (box[0] + middles[inner]), (40, 1)), rtol=0, atol=0.51)
        assert_allclose(patch[inner, :, 1], np.tile(4 * (box[1] + middles[inner])[:, None], (1, 40)), rtol=0, atol=0.51)


@pytest.mark.parametrize("W, H, side", [(50, 37, 16), (37, 50, 50), (3, 2, 9), (1, 1, 4)])
def test_cut_is_a_view_of_the_image(W, H, side):
    image, boxes = picture(H, W), tiles(W, H, (1, 1.3, 4), 0.5)
    for box, patch in zip(boxes, cut(image, boxes, side)):
        expected = data.view(image, box[0], box[1], side / (box[2] - box[0]), side, side, 0)
        assert_allclose(patch.astype(int), expected.astype(int), rtol=0, atol=1)
    assert_array_equal(cut(image, np.array([[0.0, 0, W, H]]), side)[0],          # no square: warped
                       np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)))


def test_a_mirrored_patch_inside_the_image_is_the_square_around_the_box():
    image = picture(40, 60)
    assert_array_equal(mirrored_patch(image, np.array([20.0, 10, 30, 26]), 16), image[10:26, 17:33])
    assert_array_equal(mirrored_patch(image, (22, 10, 30, 20), 20, 2), image[5:25, 16:36])
    box = (10.25, 12.0, 22.75, 20.5)
    assert_array_equal(mirrored_patch(image, box, 7), cut(image, np.array([[10.25, 10, 22.75, 22.5]]), 7)[0])


@pytest.mark.parametrize("H, W, box, context", [
    (12, 20, (0, 0, 6, 12), 1.0), (12, 20, (0, 0, 6, 12), 2.5), (12, 20, (15.5, 2.25, 23.5, 9.75), 1.5),
    (12, 20, (-3, -5, 2, 1), 1.0), (5, 3, (0.5, 1.0, 2.5, 3.5), 9.0), (1, 1, (0, 0, 1, 1), 6.0), (1, 9, (0, 0, 9, 1), 1.0)])
@pytest.mark.parametrize("side", [4, 32])
def test_beyond_the_borders_the_image_is_mirrored(H, W, box, context, side):
    image, s = picture(H, W), context * max(box[2] - box[0], box[3] - box[1])
    far = 64
    wide = np.pad(image, ((far, far), (far, far), (0, 0)), mode="symmetric")
    x, y = far + (box[0] + box[2] - s) / 2, far + (box[1] + box[3] - s) / 2
    expected = Image.fromarray(wide).resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + s, y + s))
    assert_array_equal(mirrored_patch(image, box, side, context), np.asarray(expected))


def test_a_mirrored_patch_repeats_the_border_pixel():
    row = np.repeat(np.array([[10, 20, 30]], np.uint8)[..., None], 3, 2)
    found = mirrored_patch(row, (0, 0, 3, 1), 9, 3.0)                           # pixels -3..5 of every mirrored row
    assert_array_equal(found[:, :, 0], np.tile([30, 20, 10, 10, 20, 30, 30, 20, 10], (9, 1)))


# Scores of an image (notes, 7: 11 and 12)

@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_the_notes(backend):
    y = np.array([[0.9, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.8, 0.6, 0.4, 0.2]]).T
    expected = {1: (0.225, 0.5, 0.5), 2: (0.2025, 0.25, 0.3), 5: (0.1476225, 0.03125, 0.104)}
    with use(backend) as put:
        for k, scores in expected.items():
            assert_allclose(to_numpy(image_score(put(y.copy()), k)), scores, rtol=1e-12)
        assert_allclose(to_numpy(image_score(put(y.copy()))), expected[5], rtol=1e-12)
        small = image_score(put(y.astype(np.float32)), np.float64(5))
        assert small.dtype == np.float32 and small.shape == (3,)
        assert_allclose(to_numpy(small), expected[5], rtol=1e-6)
    first, second = expected[1][:2], expected[5][:2]
    assert first[0] < first[1] and second[0] > second[1]                        # the ranking flips


@pytest.mark.parametrize("backend", BACKENDS)
@given(M=st.integers(1, 20), K=st.integers(1, 4), seed=seeds)
def test_the_score_is_a_power_mean(backend, M, K, seed):
    rng = np.random.default_rng(seed)
    y = rng.uniform(0.5, 1, (M, K))                                             # 0.5^500 is no subnormal
    with use(backend) as put:
        def score(y, k):
            return to_numpy(image_score(put(y), k))
        for k in (1, 2.5, 5):
            assert_allclose(score(y, k), [sum(v ** k for v in column) / M for column in y.T.tolist()], rtol=1e-12)
            assert_allclose(score(np.ascontiguousarray(y[rng.permutation(M)]), k), score(y, k), rtol=1e-12)
            more = y.copy()
            more[rng.integers(M)] += 0.1
            assert (score(more, k) > score(y, k)).all()
        roots = np.array([score(y, k) ** (1 / k) for k in (1, 2, 5, 20, 500)])
    assert (np.diff(roots, axis=0) >= -1e-12).all() and (roots[-1] <= y.max(0) * (1 + 1e-12)).all()
    assert (roots[-1] >= 0.99 * y.max(0)).all()                                 # 20^(-1 / 500) = 0.994


CORNERS = np.array([[0.0, 0, 4, 4], [2, 0, 6, 4], [0, 2, 4, 6], [2, 2, 6, 6]])
SUM = np.repeat([[.5, .5, .75, .75, .25, .25], [.6, .6, 1.85, 1.85, 1.25, 1.25], [.1, .1, 1.1, 1.1, 1, 1]], 2, 0)
MEAN = np.repeat([[.5, .5, .375, .375, .25, .25], [.3, .3, .4625, .4625, .625, .625], [.1, .1, .55, .55, 1, 1]], 2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heat_maps_of_the_notes(backend):
    y = np.array([[.5, 1], [.25, 1], [.1, 1], [1.0, 1]])
    with use(backend) as put:
        for dtype, atol in ((np.float64, 1e-12), (np.float32, 1e-6)):
            for reduce, expected in (("sum", SUM), ("mean", MEAN)):
                for boxes in (CORNERS, put(CORNERS.copy()), CORNERS.astype(np.float32)):
                    found = heat_map(boxes, put(y.astype(dtype)), 6, 6, reduce)
                    assert found.shape == (6, 6, 2) and found.dtype == dtype
                    assert_allclose(to_numpy(found)[..., 0], expected, rtol=0, atol=atol)
            by_default = to_numpy(heat_map(CORNERS, put(y.astype(dtype)), 6, 6))
            assert_array_equal(by_default[..., 1], np.ones((6, 6)))             # the mean
        around = to_numpy(heat_map(CORNERS, put(y), 9, 7, "mean"))
        assert_allclose(around[:6, :6, 0], MEAN, rtol=0, atol=1e-12)
        assert (around[6:] == 0).all() and (around[:, 6:] == 0).all()           # no patch covers these
        none = heat_map(CORNERS[:0], put(y[:0].copy()), 3, 2)
        assert none.shape == (2, 3, 2) and (to_numpy(none) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(M=st.integers(0, 6), K=st.integers(0, 3), size=st.tuples(*[st.integers(1, 7)] * 2), reduce=st.sampled_from(["mean", "sum"]),
       seed=seeds)
def test_heat_map_is_the_definition(backend, M, K, size, reduce, seed):
    (width, height), rng = size, np.random.default_rng(seed)
    low = rng.integers(-4, 14, (M, 2)) / 2                                      # half pixels: some borders meet pixels' middles
    boxes, y = np.concatenate([low, low + rng.integers(0, 10, (M, 2)) / 2], 1), rng.random((M, K))
    with use(backend) as put:
        found = to_numpy(heat_map(boxes, put(y), width, height, reduce))
    assert found.shape == (height, width, K)
    for i, j in np.ndindex(height, width):
        covers = [m for m, (x1, y1, x2, y2) in enumerate(boxes) if x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2]
        for c in range(K):
            value = sum(y[m, c] for m in covers) / (max(1, len(covers)) if reduce == "mean" else 1)
            assert found[i, j, c] == pytest.approx(value, rel=1e-12, abs=1e-12) and (covers or found[i, j, c] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_cover_every_pixel_and_a_hot_patch_is_found(backend):
    boxes = tiles(40, 30)
    y = np.zeros((len(boxes), 2))
    y[:, 0], y[len(boxes) - 3, 1] = 1, 1
    with use(backend) as put:
        ones, hot = np.moveaxis(to_numpy(heat_map(boxes, put(y), 40, 30)), 2, 0)
    assert_allclose(ones, 1, rtol=1e-12)
    i, j = np.unravel_index(hot.argmax(), hot.shape)
    x1, y1, x2, y2 = boxes[len(boxes) - 3]
    assert x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_the_notes_over_classes_and_background(backend):
    z, p = np.array([[1, 2, 0.5]]), np.array([[0.231224, 0.628532, 0.140244]])
    with use(backend) as put:
        value, dz = softmax_loss.loss(put(z), put(np.array([1])))
        assert float(value) == pytest.approx(0.464369, abs=5e-7)
        assert_allclose(to_numpy(dz), [[0.231224, -0.371468, 0.140244]], rtol=0, atol=6e-7)
        assert_allclose(to_numpy(softmax_loss.softmax(put(z))), p, rtol=0, atol=5e-7)


# An image from tiles to scores

def test_the_class_of_a_painted_square_comes_back():
    """Scores that say what the labels say: the image holds its class and no other, and the heat lies on the object."""
    boxes, names = np.array([[10.0, 20, 34, 44]]), np.array([1])
    patches = tiles(64, 64, (1, 1.6, 2.4, 3.2, 4), 0.5)
    labels = label(patches, boxes, names, 2)
    assert set(labels) == {1, 2} and 2 < (labels == 1).sum() < 40
    kept = resample(labels, 2, 0.1, np.random.default_rng(0))
    assert len(kept) == (labels == 1).sum() + math.floor(0.1 * (labels == 2).sum() + 0.5)
    y = np.eye(3)[labels]
    score = image_score(y[:, :2])
    assert score[1] == (labels == 1).mean() and score[0] == 0
    i, j = np.unravel_index(heat_map(patches, y, 64, 64, "sum")[..., 1].argmax(), (64, 64))
    assert 10 <= j < 34 and 20 <= i < 44


# Errors

def refused(run, good, *rows):
    """Each row: the kind of error, the argument that is changed, its value, what is told."""
    run(**good)
    for kind, name, value, told in rows:
        with pytest.raises(kind, match=rf"^oquab_patches\.{run.__name__}: {told}"):
            run(**{**good, name: value})


def test_errors_of_the_tiling():
    refused(tiles, dict(width=500, height=375),
            (ValueError, "width", 0, "width must be a finite number of at least 1, got 0"),
            (ValueError, "height", math.nan, "height must be a finite number"),
            (ValueError, "width", math.inf, "width must be a finite number"),
            (ValueError, "width", True, "width must be a finite number"),
            (ValueError, "width", "9", "width must be a finite number"),
            (ValueError, "lambdas", (), "lambdas must hold at least one number, got none"),
            (ValueError, "lambdas", (1, 0.9), r"lambdas\[1\] must be a finite number of at least 1, got 0\.9"),
            (ValueError, "overlap", 1, "overlap must lie below 1, got 1"),
            (ValueError, "overlap", -0.1, r"overlap must be a finite number of at least 0, got -0\.1"),
            (ValueError, "width", 10**9, "an image must have at most 4194304 patches, got "),
            (ValueError, "lambdas", (1e300,), "an image must have at most 4194304 patches, got "))
    refused(tiles, dict(width=1e300, height=1e300, overlap=1 - 1e-16, lambdas=(1,)),
            (ValueError, "lambdas", (1e200,), "an image must have at most 4194304 patches, got inf"))


def test_errors_of_the_labels():
    refused(label, dict(tiles=PATCHES, boxes=SCENE, labels=NAMES, background=2),
            (ValueError, "tiles", PATCHES[:, :3], r"tiles must have shape \(M, 4\), got \(10, 3\)"),
            (ValueError, "boxes", SCENE[0], r"boxes must have shape \(R, 4\), got \(4,\)"),
            (TypeError, "tiles", PATCHES.astype(int), "tiles must be float32 or float64, got int64"),
            (TypeError, "boxes", SCENE.tolist(), "boxes must be an array, got list"),
            (ValueError, "tiles", PATCHES * np.nan, "tiles must be finite, got NaN or infinity"),
            (ValueError, "boxes", np.full((2, 4), np.inf), "boxes must be finite, got NaN or infinity"),
            (ValueError, "boxes", np.array([[0, 0, 1e200, 1e200]] * 2), "boxes must have areas that float64 holds"),
            (ValueError, "tiles", PATCHES[:, [2, 1, 0, 3]], r"every tile must have an area, got \(260\.0, 40\.0, 0\.0, 300\.0\)"),
            (ValueError, "labels", NAMES[:1], r"labels must have shape \(2,\), got \(1,\)"),
            (TypeError, "labels", NAMES * 1.0, "labels must be integers, got float64"),
            (ValueError, "labels", NAMES + 1, r"labels must lie in 0\.\.1, got 1\.\.2"),
            (ValueError, "labels", NAMES - 1, r"labels must lie in 0\.\.1, got -1\.\.0"),
            (ValueError, "background", -1, "background must be at least 0, got -1"),
            (TypeError, "background", 2.0, r"background must be an integer, got 2\.0"),
            (ValueError, "difficult", np.zeros(3, bool), r"difficult must have shape \(2,\), got \(3,\)"),
            (TypeError, "difficult", NAMES, "difficult must be bool, got int64"))
    refused(resample, dict(labels=np.array([0, 2, -1]), background=2, share=0.1, rng=np.random.default_rng(0)),
            (ValueError, "labels", np.array([3]), r"labels must lie in -1\.\.2, got 3\.\.3"),
            (ValueError, "labels", np.array([-2]), r"labels must lie in -1\.\.2, got -2\.\.-2"),
            (TypeError, "labels", np.array([0.0]), "labels must be integers, got float64"),
            (TypeError, "labels", [0], "labels must be an array, got list"),
            (ValueError, "labels", np.zeros((2, 2), int), r"labels must have shape \(4,\), got \(2, 2\)"),
            (TypeError, "background", None, "background must be an integer, got None"),
            (ValueError, "share", 1.1, r"share must lie in \[0, 1\], got 1\.1"),
            (ValueError, "share", -0.1, r"share must be a finite number of at least 0, got -0\.1"),
            (ValueError, "share", math.nan, "share must be a finite number"))


def test_errors_of_the_pixels():
    image, boxes = picture(10, 20), np.array([[0.0, 0, 5, 5]])
    no_image = ((TypeError, "image", image * 1.0, "image must be uint8, got float64"),
                (ValueError, "image", image[..., 0], r"image must have shape \(H, W, 3\) and hold a pixel, got \(10, 20\)"),
                (ValueError, "image", image[:0], r"image must have shape \(H, W, 3\) and hold a pixel, got \(0, 20, 3\)"),
                (TypeError, "image", image.tolist(), "image must be an array, got list"),
                (ValueError, "side", 0, "side must be at least 1, got 0"),
                (TypeError, "side", 4.0, r"side must be an integer, got 4\.0"))
    refused(cut, dict(image=image, tiles=boxes, side=4), *no_image,
            (ValueError, "tiles", boxes[0], r"tiles must have shape \(M, 4\), got \(4,\)"),
            (ValueError, "tiles", boxes + [0, 0, 20, 0], r"tiles must lie in the image of 20x10, got \(0\.0, 0\.0, 25\.0, 5\.0\)"),
            (ValueError, "tiles", boxes - 0.1, "tiles must lie in the image of 20x10"),
            (ValueError, "tiles", boxes * np.nan, "tiles must lie in the image of 20x10"),
            (ValueError, "tiles", np.array([[2.0, 2, 2, 4]]), r"every tile must have an area, got \(2\.0, 2\.0, 2\.0, 4\.0\)"),
            (ValueError, "tiles", np.array([[5, 5, 5 + 1e-9, 6]]), "every tile must have an area"))         # none in float32
    assert_array_equal(cut(image, boxes - 1e-7, 5)[0], image[:5, :5])                                       # rounding is no error
    refused(mirrored_patch, dict(image=image, box=boxes[0], side=4), *no_image,
            (ValueError, "box", (1, 2, 3), r"box must have shape \(4,\), got \(3,\)"),
            (ValueError, "box", (3, 0, 3, 5), r"box must have an area and touch the image of 20x10, got \(3\.0, 0\.0, 3\.0, 5\.0\)"),
            (ValueError, "box", (3, 5, 4, 5), "box must have an area and touch the image of 20x10"),
            (ValueError, "box", (20, 0, 25, 5), "box must have an area and touch the image of 20x10"),
            (ValueError, "box", (-5, 0, 0, 5), "box must have an area and touch the image of 20x10"),
            (ValueError, "box", (0, 10, 5, 15), "box must have an area and touch the image of 20x10"),
            (ValueError, "box", (0, -5, 5, 0), "box must have an area and touch the image of 20x10"),
            (ValueError, "box", (0, math.nan, 5, 15), "box must have an area and touch the image of 20x10"),
            (ValueError, "box", (0, 0, math.inf, 5), r"the square must be 0\.01 to 8192 pixels wide, got inf"),
            (ValueError, "context", 1e6, r"the square must be 0\.01 to 8192 pixels wide, got 5e\+06"),
            (ValueError, "context", 0, "the square must be"),
            (ValueError, "context", -1, "context must be a finite number of at least 0, got -1"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_the_scores(backend):
    y = np.ones((4, 2))
    with use(backend) as put:
        no_scores = ((ValueError, "y", put(y[0]), r"y must have shape \(\w, K\), got \(2,\)"),
                     (TypeError, "y", put(y.astype(int)), "y must be float32 or float64, got int64"),
                     *[(ValueError, "y", y * np.nan, "y must be finite, got NaN or infinity")] * (backend in RUNNING))
        refused(image_score, dict(y=put(y)), *no_scores,                        # on a GPU values are not looked at
                (ValueError, "y", put(y[:0]), r"y must hold at least one patch, got \(0, 2\)"),
                (ValueError, "k", 0.5, r"k must be a finite number of at least 1, got 0\.5"),
                (ValueError, "k", math.inf, "k must be a finite number"))
        refused(heat_map, dict(tiles=CORNERS, y=put(y), width=6, height=6), *no_scores,
                (ValueError, "tiles", CORNERS[:3], r"y must have shape \(3, K\), got \(4, 2\)"),
                (ValueError, "tiles", CORNERS[0], r"tiles must have shape \(M, 4\), got \(4,\)"),
                (ValueError, "tiles", CORNERS * np.nan, "tiles must be finite, got NaN or infinity"),
                (ValueError, "reduce", "max", "reduce must be one of mean, sum, got 'max'"),
                (ValueError, "width", 0, "width must be at least 1, got 0"),
                (TypeError, "height", 6.0, r"height must be an integer, got 6\.0"))
