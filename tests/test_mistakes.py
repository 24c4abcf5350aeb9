import numpy as np
import pytest
from PIL import Image

from tinydet import draw
from tinydet.data import Example
from tinydet.mistakes import KINDS, errors, false_positives, kinds, table

TRUE = [[0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 90, 10], [0, 80, 10, 90]]
FOUND = [[0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 54], [80, 0, 90, 10], [30, 30, 40, 40], [0, 80, 10, 90], [50, 50, 60, 60]]
SCORES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1]


def scene(name="a"):
    """Two objects of class 0, one of class 1, one difficult of class 0."""
    image = np.random.default_rng(0).integers(0, 255, (99, 120, 3)).astype(np.uint8)
    return Example(name, image, (120, 99), np.array(TRUE, float), np.array([0, 0, 1, 0]), np.array([False, False, False, True]))


def test_every_detection_has_one_kind():
    assert kinds(np.array(FOUND, float), 0, scene()) == ["found", "double", "inexact", "other class", "background", "", "found"]
    assert kinds(np.array(FOUND, float), 1, scene()) == ["other class", "other class", "background", "found", "background", "other class", "other class"]
    assert kinds(np.zeros((0, 4)), 0, scene()) == []


def test_errors_count_each_kind_and_what_was_missed():
    counts = errors([(FOUND, [0] * 7, SCORES)], [scene()], ["a", "b"], {"a": 0.3, "b": 0.3})
    assert counts["a"] == {"found": 1, "missed": 1, "double": 1, "inexact": 1, "other class": 1, "background": 1}
    assert counts["b"] == {"found": 0, "missed": 1, "double": 0, "inexact": 0, "other class": 0, "background": 0}
    assert errors([(FOUND, [0] * 7, SCORES)], [scene()], ["a"], {"a": 0.0})["a"]["found"] == 2


def test_a_class_that_is_never_found_shows_all_its_mistakes():
    """Two objects, found with their classes exchanged: no cut is best for them, and nothing is hidden by that."""
    swapped = (TRUE[:3:2], [1, 0], [0.9, 0.8])
    example = Example("a", None, (120, 99), np.array(TRUE[:3:2], float), np.array([0, 1]), np.zeros(2, bool))
    counts = errors([swapped], [example], ["a", "b"], {"a": np.inf, "b": np.inf})
    assert [counts[c]["other class"] for c in "ab"] == [1, 1] and [counts[c]["missed"] for c in "ab"] == [1, 1]


def test_a_detection_at_the_cut_counts_and_an_overlap_at_near_is_inexact():
    assert errors([(FOUND, [0] * 7, SCORES)], [scene()], ["a"], {"a": 0.9})["a"]["found"] == 1
    assert kinds(np.array([[50.0, 50, 60, 51]]), 0, scene()) == ["inexact"]             # IoU 0.1
    assert kinds(np.array([[50.0, 50, 60, 50.99]]), 0, scene()) == ["background"]


def test_table_of_errors():
    counts = errors([(FOUND, [0] * 7, SCORES)], [scene()], ["a", "long"], {"a": 0.3, "long": 0.3})
    assert table(counts) == ["class  found  missed  double  inexact  other class  background",
                             "a          1       1       1        1            1           1",
                             "long       0       1       0        0            0           0"]


def test_false_positives_are_those_of_highest_score_over_all_images():
    order = [3, 0, 6, 2, 5, 1, 4]                                       # given in any order
    image = [np.array(FOUND, float)[order], np.zeros(7, int), np.array(SCORES)[order]]
    better = (np.array([[30.0, 30, 40, 40]]), np.array([0]), np.array([0.75]))
    found = false_positives([image, better], [scene(), scene("b")], ["a", "b"], most=3)
    assert found["b"] == []
    assert [(m.kind, m.score, m.example.name) for m in found["a"]] == [("double", 0.8, "a"), ("background", 0.75, "b"), ("inexact", 0.7, "a")]
    assert found["a"][0].iou == 1 and found["a"][2].iou == 0.4 and found["a"][2].box.tolist() == [50, 50, 60, 54]
    assert {m.kind for m in false_positives([image], [scene()], ["a"])["a"]} == set(KINDS)
    assert false_positives([], [], ["a"]) == {"a": []}


def test_sheets_of_false_positives(tmp_path):
    found = false_positives([(FOUND, [0] * 7, SCORES)], [scene()], ["a/..", "b"])
    draw.false_positives(found, ["a/..", "b"], tmp_path / "wrong")
    path, = (tmp_path / "wrong").iterdir()
    assert path.name == "0_a___.png"
    with Image.open(path) as picture:
        assert picture.width > 4 * 190 and picture.height > 190
    draw.false_positives({"a/..": [], "b": []}, ["a/..", "b"], tmp_path / "wrong")
    assert not list((tmp_path / "wrong").iterdir())                     # a sheet of an earlier evaluation does not stay


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (119, 98, 120, 99), (0, 0, 120, 99), (50, 40, 70, 60), (-50, -50, -40, -40), (10, 10, 40, 40)])
def test_a_close_up_holds_the_box_and_lies_in_the_image(box):
    image = scene().image()
    part, (x, y) = draw.close_up(image, box)
    assert part.shape[0] >= 1 and part.shape[1] >= 1
    assert (part == image[y:y + part.shape[0], x:x + part.shape[1]]).all()
    x1, y1, x2, y2 = np.clip(box, 0, [120, 99, 120, 99])
    assert x <= x1 and y <= y1 and x + part.shape[1] >= x2 and y + part.shape[0] >= y2
