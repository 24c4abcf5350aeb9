import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageColor

from tinydet import draw
from tinydet.data import Example
from tinydet.evaluate import ClassResult
from tinydet.ops import map_loss

import test_map_loss

GREY = 100


def grey(W=120, H=90):
    return np.full((H, W, 3), GREY, np.uint8)


def colour(label):
    return ImageColor.getrgb(draw.COLOURS[label % len(draw.COLOURS)])


@pytest.mark.parametrize("label", [0, 3, 12])
@pytest.mark.parametrize("enlarge", [1.0, 2.0])
def test_a_box_has_the_colour_of_its_class_at_its_border_pixels(label, enlarge):
    """Box (x1, y1, x2, y2) covers the pixels x1 .. x2 - 1: the outline lies on the first and last of them."""
    box = np.array([[30.0, 40, 80, 70]])
    picture = np.asarray(draw.boxes(grey(), box, np.array([label]), [f"class {i}" for i in range(13)], enlarge=enlarge))
    assert picture.shape == (90 * enlarge, 120 * enlarge, 3)
    x1, y1, x2, y2 = (box[0] * enlarge).astype(int)
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    for x, y in [(x1, y1), (x2 - 1, y1), (x1, y2 - 1), (x2 - 1, y2 - 1), (x1, y), (x2 - 1, y), (x, y2 - 1)]:
        assert tuple(picture[y, x]) == colour(label)
    assert_array_equal(picture[y1 + 2:y2 - 2, x1 + 2:x2 - 2], GREY)         # nothing inside
    assert_array_equal(picture[y2:], GREY)                                  # below,
    assert_array_equal(picture[y1:, :x1], GREY)                             # left
    assert_array_equal(picture[y1:, x2:], GREY)                             # and right of it
    above = picture[:y1].reshape(-1, 3)
    assert (above == colour(label)).all(1).sum() > 200 and (above > 220).all(1).any()       # the name in white on a plate


def test_each_class_has_its_colour_and_scores_are_written():
    boxes, labels = np.array([[10, 40, 40, 80], [60, 40, 100, 80]]), np.array([1, 0])
    plain = np.asarray(draw.boxes(grey(), boxes, labels, ["cat", "dog"]))
    assert tuple(plain[60, 10]) == colour(1) != colour(0) == tuple(plain[60, 60])
    scored = np.asarray(draw.boxes(grey(), boxes, labels, ["cat", "dog"], np.array([0.5, 0.25])))
    assert (scored != plain).any() and (scored[41:] == plain[41:]).all()
    other = np.asarray(draw.boxes(grey(), boxes, labels, ["cat", "dog"], np.array([0.5, 0.75])))
    assert (other[:, 50:] != scored[:, 50:]).any() and (other[:, :50] == scored[:, :50]).all()


def test_no_boxes_and_boxes_at_and_beyond_the_border():
    image = grey()
    assert_array_equal(np.asarray(draw.boxes(image, np.zeros((0, 4)), np.zeros(0, int), [])), image)
    edge = np.array([[0, 0, 120, 90], [-20, -20, 10, 10], [110, 80, 150, 120], [5, 5, 5, 5], [200, 200, 240, 240.0]])
    picture = np.asarray(draw.boxes(image, edge, np.zeros(5, int), ["a rather long name"]))
    assert picture.shape == image.shape and tuple(picture[89, 50]) == colour(0)
    assert (image == GREY).all()                                            # the input stays whole
    assert draw.boxes(grey(3, 2), np.array([[0, 0, 3, 2]]), np.array([0]), ["x"]).size == (3, 2)


def test_sheet_is_a_grid():
    pictures = [Image.new("RGB", (30, 20), c) for c in ("red", "lime", "blue")]
    out = draw.sheet(pictures, 2, gap=6)
    assert out.size == (2 * (30 + 6) + 6, 2 * 20 + 3 * 6)
    for (x, y), c in {(6, 6): (255, 0, 0), (42, 6): (0, 255, 0), (6, 32): (0, 0, 255), (42, 32): (255, 255, 255)}.items():
        assert_array_equal(np.asarray(out)[y:y + 20, x:x + 30], np.broadcast_to(c, (20, 30, 3)))
    margin = np.asarray(out).copy()
    for x, y in ((6, 6), (42, 6), (6, 32)):
        margin[y:y + 20, x:x + 30] = 255
    assert (margin == 255).all()


def test_sheet_scales_to_one_width_and_has_captions():
    pictures = [Image.new("RGB", (15, 20), "red"), Image.new("RGB", (30, 20), "lime")]
    assert draw.sheet(pictures, 2, gap=6).size == (78, 40 + 12)             # the first becomes 30 x 40
    assert draw.sheet(pictures, 1, gap=0).size == (30, 60)
    captioned = draw.sheet(pictures, 2, ["a", ""], gap=6)
    assert captioned.size == (78, 72)
    line = np.asarray(captioned)[6:26]
    assert (line[:, 6:36] < 128).any() and (line[:, 42:] == 255).all()      # black text above the first only
    assert_array_equal(np.asarray(captioned)[26:66, 6:36], np.broadcast_to((255, 0, 0), (40, 30, 3)))


def test_sheet_error():
    with pytest.raises(ValueError, match=r"^draw\.sheet: pictures must hold at least one image, got none"):
        draw.sheet([], 2)


def test_detections_sheet_shows_what_reaches_the_cut():
    image = grey(320, 320)
    example = Example("one", image, (320, 320), np.array([[40.0, 60, 100, 120]]), np.array([0]), np.array([True]))
    low, high = [150.0, 60, 200, 120], [220.0, 60, 280, 120]
    found = np.array([low, high, low]), np.array([0, 0, 1]), np.array([0.4, 0.5, 0.4])
    out = np.asarray(draw.detections_sheet([example], [found], ["cat", "dog"], {"cat": 0.5, "dog": float("inf")}))
    assert out.shape == (20 + 320 + 12, 4 * 326 + 6, 3)
    true, shown = out[26:346, 6:326], out[26:346, 332:652]
    assert (true[90, 40] != GREY).any() and (true[90, 150:] == GREY).all()
    assert tuple(shown[90, 220]) == colour(0) and (shown[90, :220] == GREY).all()
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    assert draw.detections_sheet([example] * 3, [none] * 3, ["cat"], {"cat": 0.5}, columns=1).height == 3 * 346 + 6
    small = Example("two", grey(60, 48), (60, 48), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    assert draw.detections_sheet([small], [none], ["cat"], {}).width == 4 * 486 + 6         # enlarged to 480


@pytest.mark.parametrize("ending, format", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_save_leaves_the_picture_and_nothing_else(tmp_path, ending, format):
    path = tmp_path / f"a.b.{ending}"
    path.write_bytes(b"old")
    draw.save(Image.new("RGB", (9, 7), "red"), path)
    with Image.open(path) as image:
        assert (image.format, image.size) == (format, (9, 7))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("of, method", [(Image.Image, "save"), (Figure, "savefig")])
@pytest.mark.parametrize("old", [None, b"old"])
def test_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, of, method, old):
    path = tmp_path / "a.png"
    if old:
        path.write_bytes(old)

    def half(self, target, *args, **options):
        with open(target, "wb") as f:
            f.write(b"half a pic")
        raise OSError("no space left on device")
    monkeypatch.setattr(of, method, half)
    with pytest.raises(OSError, match="no space left"):
        draw.save(Image.new("RGB", (9, 7)) if of is Image.Image else Figure(), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"a.png": old} if old else {})


def test_save_refuses_an_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match="unknown file extension"):
        draw.save(Image.new("RGB", (9, 7)), tmp_path / "a.nonsense")
    assert list(tmp_path.iterdir()) == []


def lines(path_to_figure, monkeypatch):
    """What a function of draw plots: name -> (x, y), and the picture that it saves."""
    figures = []
    save = draw.save
    monkeypatch.setattr(draw, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    path_to_figure()
    (axes,) = figures[0].axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [line.get_label() for line in axes.lines]
    return {line.get_label(): line.get_data() for line in axes.lines}


def readable(path):
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300
        return len(np.unique(np.asarray(image.convert("L")))) > 10          # not one blank sheet


def test_loss_curves_draw_the_mean_of_the_last_25(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    records = [{"step": i + 1, "lr": 0.1, "loss": float(a), "box": float(b)} for i, (a, b) in enumerate(rng.random((60, 2)))]
    found = lines(lambda: draw.loss_curves(records, ("loss", "box"), tmp_path / "a.png"), monkeypatch)
    assert set(found) == {"loss", "box"} and readable(tmp_path / "a.png")
    for name, (x, y) in found.items():
        assert_array_equal(x, np.arange(1, 61))
        expected = [np.mean([r[name] for r in records[max(0, i - 24):i + 1]]) for i in range(60)]
        np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_loss_curves_of_hardly_any_steps(tmp_path, count):
    draw.loss_curves([{"step": 1, "loss": 2.0}] * count, ("loss",), tmp_path / "a.png", "a title")
    assert readable(tmp_path / "a.png") and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_precision_recall_also_without_detections_or_objects(tmp_path, monkeypatch):
    empty = np.zeros(0)
    results = {"a": ClassResult(0.75, 2, np.array([1, 1, 2 / 3]), np.array([0.5, 1, 1]), np.array([0.9, 0.7, 0.2])),
               "no detections": ClassResult(0.0, 3, empty, empty, empty),
               "no objects": ClassResult(float("nan"), 0, np.zeros(1), np.zeros(1), np.ones(1)),
               "neither": ClassResult(float("nan"), 0, empty, empty, empty)}
    found = lines(lambda: draw.precision_recall(results, tmp_path / "a.png"), monkeypatch)
    assert list(found) == ["a (AP 0.750)", "no detections (AP 0.000)", "no objects (AP nan)", "neither (AP nan)"]
    assert_array_equal(found["a (AP 0.750)"], [[0, 0.5, 1, 1], [1, 1, 1, 2 / 3]])           # from recall 0 on
    assert len(found["no detections (AP 0.000)"][0]) == len(found["neither (AP nan)"][0]) == 0
    assert readable(tmp_path / "a.png") and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_regions_by_hand():
    """Background grey, below the classes' colours; objects white, below all."""
    image, boxes = np.zeros((40, 60, 3), np.uint8), np.array([[5, 5, 20, 20], [5, 5, 30, 30], [40, 10, 50, 20.]])
    picture = np.asarray(draw.regions(image, boxes, np.array([1, 2, 2]), 2, np.array([[39, 30, 59, 39.]])))
    green, grey = [int(draw.COLOURS[1][k:k + 2], 16) for k in (1, 3, 5)], [0x9a] * 3
    assert picture[5, 10].tolist() == green and picture[5, 25].tolist() == grey and picture[19, 45].tolist() == grey and picture[30, 45].tolist() == [255] * 3
    assert not picture[12, 45].any() and not picture[21, 45].any()                  # hollow; x2, y2 are the ends of the last pixels
    assert draw.regions(image, boxes[:0], np.zeros(0, int), 2, enlarge=2.0).size == (120, 80)


def test_measurements_show_no_roundings(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(draw, "save", lambda figure, path: drawn.extend(a.get_ylim() for a in figure.axes))
    draw.measurements([{"step": s, "a": 1 + 1e-10 * s, "b": -2.0 * s, "c": None, "d": 0.0} for s in (1, 2)], "abcd", tmp_path / "m.png")
    assert drawn[0] == pytest.approx((0.9, 1.1)) and -4.5 < drawn[1][0] < -4 and -2 < drawn[1][1] < -1.5


def test_measurements_are_drawn(tmp_path):
    draw.measurements([{"step": 1, "a": 0.5, "b": None}, {"step": 2, "a": 0.6, "b": 3.0}], ("a", "b"), tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.size[1] > picture.size[0] * 0.7


def profiles_of(drawn, monkeypatch):
    """What draw.profiles draws of each window, read off the figure, by title."""
    figures, found = [], {}
    monkeypatch.setattr(draw, "save", lambda figure, path: figures.append((figure, path)))
    draw.profiles(drawn, "a path")
    ((figure, path),) = figures
    assert path == "a path" and len(figure.axes) == len(drawn)
    kinds = {(":", "None"): "dotted", ("-", "o"): "step", ("--", "None"): "lines", ("None", "D"): "now"}
    for axes in figure.axes:
        (stairs,), told = axes.patches, {kind: [] for kind in kinds.values()}
        values, edges, baseline = stairs.get_data()
        for line in axes.lines:
            told[kinds[line.get_linestyle(), line.get_marker()]].append((line.get_label(), *map(np.asarray, line.get_data())))
        assert baseline is None and (axes.get_xlabel(), axes.get_ylabel()) == ("score of the window", "AP")
        found[axes.get_title()] = SimpleNamespace(values=values, edges=edges, xlim=axes.get_xlim(), ylim=axes.get_ylim(),
                                                  legend=[t.get_text() for t in axes.get_legend().get_texts()], **told)
    return found


BY_HAND = map_loss.Profile(np.array([1.0, 2, 4, 9]), np.array([0.1, 0.4, 0.3, 0.7, 0.65]), 2.0, 2.5, 0.3, 1.0, 2.0, 0.5, (0.3 - 0.4) / 2,
                           (0.4 / 1.5, 0.0, 0.2 / 1.5, -0.2))


def test_a_profile_by_hand(monkeypatch):
    """AP is 0.3, and 0.4 one step below and 0.3 one above; 0.7 from 4 on, 0.4 below 2, 0.1 below 1. NMS suppresses the window below 2."""
    drawn = {"a, kept": BY_HAND, "b": BY_HAND._replace(blocker=math.nan), "c": BY_HAND._replace(blocker=5.2), "d": BY_HAND._replace(reach=math.inf),
             "e": BY_HAND._replace(reach=0.5)}
    found = profiles_of(drawn, monkeypatch)
    assert list(found) == [*drawn]
    a = found["a, kept"]
    assert_allclose(a.xlim, (-0.1, 5.1))
    assert_allclose(a.ylim, (-0.2, 1.0))
    assert_allclose(a.edges, (-0.1, 1, 2, 4, 5.1))
    assert_allclose(a.values, (0.1, 0.4, 0.3, 0.7))
    assert_allclose(a.step[0][1:], [(1.5, 3.5), (0.4, 0.3)])
    assert_allclose(a.now[0][1:], [[2.5], [0.3]])
    assert_allclose([one[1:] for one in a.lines], [[(2.5, 4.5), (0.3, 0.3 + 0.8 / 1.5)], [(2.5, 4.5), (0.3, 0.3)],
                                                   [(2.5, 0.5), (0.3, 0.3 - 0.4 / 1.5)], [(2.5, 0.5), (0.3, 0.7)]])
    assert [(label, *x) for label, x, _ in a.dotted] == [("NMS: suppressed below", 2.0, 2.0)]
    slopes = ["finite step: slope -0.0500", "envelope: slope +0.1000", "now"]
    assert a.legend == ["AP of the class", "NMS: suppressed below", *slopes]
    for name in "bc":                                                   # no blocker, or one beyond what is drawn
        assert not found[name].dotted and found[name].legend == ["AP of the class", *slopes] and found[name].xlim == a.xlim
    assert_allclose(found["d"].xlim, (2.5 - 7.8, 2.5 + 7.8))            # six steps of an envelope that looks everywhere
    assert_allclose(found["d"].values, BY_HAND.values)
    assert_allclose(found["d"].lines[0][1], (2.5, 8.5))
    assert_allclose(found["e"].edges, (1.2, 2, 3.8))                    # one step at least
    assert_allclose(found["e"].values, (0.4, 0.3))
    assert_allclose(found["e"].lines[3][1:], [(2.5, 1.5), (0.3, 0.5)])


def test_profiles_drawn_are_the_brute_force(monkeypatch):
    """Staircase, ends of the finite step, lines and diamond of random cases' windows, against AP computed anew at each score."""
    dotted, sloped = 0, 0
    for seed in range(1, 9):
        case, options = test_map_loss.draw(seed), {"ap": map_loss.MODES[seed % 3], "most": (4, 100)[seed % 2]}
        for c in {*case.gt_labels[~case.gt_difficult].tolist()}:
            b = test_map_loss.Brute(case, c, **options)
            drawn = {i: map_loss.profile(*test_map_loss.arguments(case, np.asarray), window=i, label=c, kappa=0.8, **options) for i in b.rows[:3]}
            delta, reach, least = b.widths(kappa=0.8)
            for (i, p), a in zip(drawn.items(), profiles_of(drawn, monkeypatch).values(), strict=True):
                s = b.s[i]
                assert_allclose(a.edges[[0, -1]], [s - 1.3 * reach, s + 1.3 * reach])
                assert_allclose(a.values, [b.at(i, v) for v in (a.edges[1:] + a.edges[:-1]) / 2], rtol=0, atol=1e-12)
                for edge in a.edges[1:-1]:                              # each an edge of f_i
                    assert abs(b.at(i, edge - 1e-9) - b.at(i, edge + 1e-9)) > 1e-12
                assert_allclose(a.step[0][1:], [(s - delta, s + delta), (b.at(i, s - delta), b.at(i, s + delta))], atol=1e-12)
                assert_allclose(a.now[0][1:], [[s], [b.at(i, s)]], atol=1e-12)
                slopes = b.lines(i, reach, least)
                for (_, x, y), slope, side in zip(a.lines, slopes, (1, 1, -1, -1), strict=True):
                    assert_allclose([x, y], [(s, s + side * reach), (b.at(i, s), b.at(i, s) + side * reach * slope)], atol=1e-12)
                told = [float(text.split()[-1]) for text in a.legend if "slope" in text]
                assert_allclose(told, [b.sde(i, delta), sum(slopes) / 2], rtol=0, atol=0.51e-4)
                shown = a.edges[0] < p.blocker < a.edges[-1]
                assert [x.tolist() for _, x, _ in a.dotted] == [[p.blocker] * 2] * int(shown)
                dotted, sloped = dotted + shown, sloped + (abs(p.step) > 1e-6)
    assert dotted > 5 and sloped > 10


def test_profiles_are_saved(tmp_path):
    draw.profiles({"a": BY_HAND, "b": BY_HAND}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (770, 704)
    assert readable(tmp_path / "a.png") and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_heat_map_has_its_colours_in_the_middle_of_each_cell():
    """Three by two cells of 21 x 31 pixels that tile (10, 20, 73, 82) of a grey image: half image, half colour, and nothing outside."""
    picture = np.asarray(draw.heat_map(grey(), np.array([[0.0, 0.25, 0.5], [0.75, 1, 2]]), (10, 20, 73, 82))).astype(int)
    assert picture.shape == (90, 120, 3)
    for (x, y), value in {(20, 35): 0, (41, 35): 1, (62, 35): 2, (20, 66): 3, (41, 66): 4, (62, 66): 4}.items():
        assert abs(picture[y, x] - (GREY + np.array(draw.HEAT[value])) / 2).max() <= 0.5, (x, y)
    assert (picture != GREY).any(2)[20:82, 10:73].all() and (picture != GREY).any(2).sum() == 62 * 63
    assert_array_equal(picture[66:82, 10:21], np.broadcast_to(picture[66, 20], (16, 11, 3)))     # from the middles outwards they stay


@pytest.mark.parametrize("enlarge", [1, 2.5])
def test_the_largest_value_is_the_hottest_pixel(enlarge):
    rng = np.random.default_rng(0)
    for _ in range(10):
        h, w = rng.integers(1, 6, 2)
        values = rng.random((h, w)) * 0.8
        r, c = rng.integers(h), rng.integers(w)
        values[r, c] = 1
        box = np.array([7.5, -10, 110, 83])                                 # partly beyond the image
        picture = np.asarray(draw.heat_map(grey(), values, box, enlarge=enlarge)).astype(int)
        share = picture[..., 0] - picture[..., 2]                           # the last of HEAT has more red above blue than any before
        y, x = np.unravel_index(share.argmax(), share.shape)
        down, across = (83 + 10) / h, (110 - 7.5) / w
        top, left = -10 + r * down, 7.5 + c * across
        if -10 + (r + 0.5) * down > 1 or r == h - 1:
            assert top <= (y + 0.5) / enlarge <= top + down and left <= (x + 0.5) / enlarge <= left + across


def test_heat_map_of_one_value_its_scale_and_its_errors():
    one = np.asarray(draw.heat_map(grey(), [[7]], (0, 0, 120, 90), 5, 9))
    assert_array_equal(one, np.broadcast_to((GREY + np.array(draw.HEAT[2]) + 1) // 2, one.shape))
    assert_array_equal(draw.heat_map(grey(), [[7]], (200, 0, 220, 90)), grey())
    for values, box, low in (([1], (0, 0, 1, 1), 0), (np.zeros((0, 2)), (0, 0, 1, 1), 0), ([[np.nan]], (0, 0, 1, 1), 0), ([[1]], (5, 0, 5, 1), 0),
                             ([[1]], (0, 0, 1, 1), 1)):
        with pytest.raises(ValueError, match=r"^draw\.heat_map: values must be \(h, w\), .*, low be below high, got"):
            draw.heat_map(grey(), values, box, low)


def test_filters_of_three_channels_are_coloured_tiles():
    w = np.zeros((2, 3, 3, 5))
    w[0, 1, :, 0], w[1, 2, :, 0], w[..., 2] = (4, -4, 0), (0, 2, 0), 1e-9
    picture = np.asarray(draw.filters(w, enlarge=10, width=100))
    assert picture.shape == (3 * 28 + 6, 100, 3)                            # two columns of 32 + 6, three rows of 22 + 6
    picture = np.asarray(draw.filters(w, enlarge=10, width=120))
    first, third = picture[7:27, 7:37], picture[7:27, 83:113]
    assert first[5, 15].tolist() == [255, 0, 128] and first[15, 25].tolist() == [128, 191, 128] and first[15, 5].tolist() == [128] * 3
    assert (third == 255).all() and (picture[:6] == 255).all()
    assert (picture[35:55, 7:37] == 128).all() and (picture[34:, 83:] == 255).all()            # the fourth, zeros; none below the third


def test_filters_show_the_strongest_channels_surest_first():
    w = np.zeros((2, 2, 6, 1))
    w[0, 0, :, 0] = 0, 1, -3, 2, 0.5, 1
    picture = np.asarray(draw.filters(w, 4, 5, 10))
    assert picture.shape == (12 + 12, 4 * 11 + 1 + 12, 3)                   # wider than 10: one tile must fit
    strip = picture[7:17, 7:-6]
    assert [strip[0, 11 * n, 0] for n in range(4)] == [0, 213, 170, 170] and (strip[5:, :10] == 128).all()
    assert np.asarray(draw.filters(w[:, :, :2], 4, 5, 10)).shape[1] == 2 * 11 + 1 + 12
    assert draw.filters(w[:, :, :1]).size == (1000, 42 + 12)                # 40 pixels a square


@pytest.mark.parametrize("w", [np.zeros((2, 2, 3)), np.zeros((2, 2, 3, 0)), np.full((1, 1, 1, 1), np.inf)])
def test_filters_error(w):
    with pytest.raises(ValueError, match=r"^draw\.filters: w must be \(kh, kw, Cin, Cout\), finite, not empty, got"):
        draw.filters(w)
    with pytest.raises(ValueError, match="strongest must be at least 1"):
        draw.filters(np.zeros((1, 1, 1, 1)), 0)
