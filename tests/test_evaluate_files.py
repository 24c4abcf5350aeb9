"""python -m tinydet.evaluate: figures from files, what is printed and written, exit status."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from test_evaluate_coco import F11_FOUND, F11_TRUE, as_json, pycocotools, random_set, truth
from tinydet.evaluate import arguments, main, voc_files

F9_XML = {"a": [("x", 1, 1, 10, 10, 0), ("x", 21, 21, 40, 40, 0), ("x", 61, 1, 80, 20, 1)],
          "b": [("x", 11, 11, 30, 30, 0)], "c": []}
F9_FOUND = [("a", .95, 62, 2, 81, 21), ("a", .9, 1, 1, 10, 10), ("a", .8, 2, 1, 11, 10), ("b", .8, 11, 11, 30, 20),
            ("c", .7, 1, 1, 5, 5), ("a", .6, 22, 21, 41, 40), ("b", .5, 12, 12, 31, 31), ("a", .4, 60, 1, 79, 20)]


def voc_folder(folder, sets):
    """sets: {set: {image: [(class, xmin, ymin, xmax, ymax, difficult)]}}, images 100 x 100."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, images in sets.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
        for name, objects in images.items():
            Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(folder / "JPEGImages" / f"{name}.png")
            (folder / "Annotations" / f"{name}.xml").write_text(
                "<annotation><size><width>100</width><height>100</height></size>" + "".join(
                    f"<object><name>{k}</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
                    f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                    for k, x1, y1, x2, y2, hard in objects) + "</annotation>")
    return folder


def record(image, score, x1, y1, x2, y2, name="x"):
    """A detection from VOC's pixel counting."""
    return {"image": image, "class": name, "box": [x1 - 1, y1 - 1, x2, y2], "score": score}


@pytest.fixture
def f9(tmp_path):
    folder = voc_folder(tmp_path, {"test": F9_XML, "train": {"d": [("other", 1, 1, 9, 9, 0), ("hard", 20, 20, 30, 30, 1)]}})
    (folder / "dt.json").write_text(json.dumps([record(*row) for row in F9_FOUND]))
    return folder


@pytest.fixture
def f11(tmp_path):
    (tmp_path / "gt.json").write_text(json.dumps(as_json(truth(F11_TRUE, (1, 2)), range(4))))          # from id 0, which counts
    rows = [dict(zip(("image_id", "category_id", "bbox", "score"), row)) for row in F11_FOUND]
    (tmp_path / "dt.json").write_text(json.dumps(rows))
    return tmp_path


def evaluate(*args, out=None):
    """What --json writes."""
    main(arguments([*map(str, args), *(["--json", str(out)] if out else [])]))
    return json.loads(out.read_text()) if out else None


# VOC

@pytest.mark.parametrize("options, ap", [
    ((), 0.7555555555555555), (("--metric", "all"), 0.7555555555555555), (("--metric", "11"), 0.7636363636363637),
    (("--strict",), 0.6666666666666667), (("--strict", "--metric", "11"), 0.6818181818181817),
    (("--iou", "0.5"), 0.7555555555555555), (("--iou", "1"), 1 / 6), (("--iou", "0.95", "--strict"), 1 / 6),
    (("--loosened",), 0.7555555555555555), (("--loosened", "--strict"), 0.7555555555555555),            # 1/2 is above 400/900
    (("--iou", "0.95", "--loosened", "--metric", "11"), 0.7636363636363637)])
def test_voc_worked_example(f9, capsys, options, ap):
    found = evaluate("--voc", f9, "--set", "test", f9 / "dt.json", *options, out=f9 / "out.json")
    assert list(found) == ["mAP", "AP"] and list(found["AP"]) == ["hard", "other", "x"]
    assert found["AP"]["hard"] is None and found["AP"]["other"] is None                 # none in this set
    assert found["AP"]["x"] == found["mAP"] == pytest.approx(ap, rel=1e-14)
    printed = capsys.readouterr().out.splitlines()
    percent = {"1": "AP100", "0.95": "AP95"}.get(options[1] if "--iou" in options else "", "AP50")
    assert printed[0].split() == ["class", percent, "objects", "precision", "recall", "at", "score"]
    assert [line.split()[:3] for line in printed[1:]] == [["hard", "nan", "0"], ["other", "nan", "0"], ["x", f"{ap:.3f}", "3"],
                                                          ["mean", f"{ap:.3f}"]]


def test_voc_ties_go_by_the_order_of_the_file(tmp_path):
    box = ("x", 11, 11, 30, 30, 0)
    folder = voc_folder(tmp_path, {"test": {"a": [box], "b": [box]}})
    right, wrong = record("b", .5, 11, 11, 30, 30), record("a", .5, 71, 71, 90, 90)
    for rows, precision in (([right, wrong], [1, .5]), ([wrong, right], [0, .5])):
        (folder / "dt.json").write_text(json.dumps(rows))
        assert list(voc_files(folder, "test", folder / "dt.json")["x"].precision) == precision
        (folder / "dt.json").write_text(json.dumps([{**row, "image": "a"} for row in rows]))
        assert list(voc_files(folder, "test", folder / "dt.json")["x"].precision) == precision


def test_voc_images_left_out_do_not_count(tmp_path, capsys):
    box, box2 = ("x", 11, 11, 30, 30, 0), ("x", 51, 11, 70, 30, 0)
    folder = voc_folder(tmp_path, {"test": {"a": [box], "b": [box], "c": [box, box2]}})
    rows = [record("c", .9, 11, 11, 30, 30), record("b", .8, 71, 71, 90, 90), record("a", .7, 11, 11, 30, 30), record("c", .6, 51, 11, 70, 30)]
    (folder / "dt.json").write_text(json.dumps(rows))
    args = "--voc", folder, "--set", "test", folder / "dt.json"
    assert evaluate(*args, out=folder / "out.json")["mAP"] == pytest.approx((1 + 3 / 4 + 3 / 4) / 4)
    assert evaluate(*args, "--leave-out", "b", out=folder / "out.json")["mAP"] == 1
    assert evaluate(*args, "--leave-out", "c", "a", out=folder / "out.json")["mAP"] == 0
    assert voc_files(folder, "test", folder / "dt.json", leave_out=["c"])["x"].positives == 2
    with pytest.raises(ValueError, match="voc_files: leave_out must be images of the set test, got 'd'"):
        evaluate(*args, "--leave-out", "a", "d")


def test_voc_nothing_found_and_nothing_to_find(f9):
    (f9 / "none.json").write_text("[]")
    assert evaluate("--voc", f9, "--set", "test", f9 / "none.json", out=f9 / "out.json") == {
        "mAP": 0, "AP": {"hard": None, "other": None, "x": 0}}
    (f9 / "ImageSets/Main/empty.txt").write_text("c\n")
    assert evaluate("--voc", f9, "--set", "empty", f9 / "none.json", out=f9 / "out.json") == {
        "mAP": None, "AP": {"hard": None, "other": None, "x": None}}


def test_voc_classes_of_other_sets_are_known_and_damage_there_is_no_matter(f9):
    rows = [*json.loads((f9 / "dt.json").read_text()), record("a", .99, 1, 1, 9, 9, "other")]
    (f9 / "dt.json").write_text(json.dumps(rows))
    (f9 / "Annotations/damaged.xml").write_text("<annotation><obj")
    found = voc_files(f9, "test", f9 / "dt.json")
    assert list(found["other"].precision) == [0] and math.isnan(found["other"].ap)
    assert found["x"].ap == pytest.approx(0.7555555555555555)


# COCO

def test_coco_worked_example(f11, capsys):
    found = evaluate("--coco", f11 / "gt.json", f11 / "dt.json", out=f11 / "out.json")
    assert found == {"AP": .8326732673267326, "AP50": 1, "AP75": 1, "APs": .9999999999999998, "APm": .8999999999999999,
                     "APl": .5999999999999999, "AR1": .5333333333333332, "AR10": .8333333333333334, "AR100": .8333333333333334,
                     "ARs": 1, "ARm": .9, "ARl": .6}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:12]] == [[name, f"{v:.3f}"] for name, v in found.items()]


def test_coco_undefined_is_minus_1(tmp_path, capsys):
    value = {"images": [{"id": 1}], "categories": [{"id": 4}, {"id": 2}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 40, 40]}]}
    (tmp_path / "gt.json").write_text(json.dumps(value))
    (tmp_path / "dt.json").write_text("[]")
    found = evaluate("--coco", tmp_path / "gt.json", tmp_path / "dt.json", out=tmp_path / "out.json")
    assert {k for k, v in found.items() if v == -1} == {"APs", "APl", "ARs", "ARl"} and set(found.values()) == {0, -1}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-2:]] == [["2", "0.000", "0.000", "1"], ["4", "-1.000", "-1.000", "0"]]


def test_coco_is_pycocotools(tmp_path):
    value, detections = random_set(5, images=30)
    (tmp_path / "gt.json").write_text(json.dumps(value))
    (tmp_path / "dt.json").write_text(json.dumps(detections))
    found = evaluate("--coco", tmp_path / "gt.json", tmp_path / "dt.json", out=tmp_path / "out.json")
    assert list(found.values()) == list(pycocotools(value, detections)[0])


# As a process

def process(*args, code=0, **env):
    command = [sys.executable, "-m", "tinydet.evaluate", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env)
    assert done.returncode == code, done.stderr
    return done


def test_process_writes_and_prints(f9, f11):
    out = f11 / "out.json"
    done = process("--coco", f11 / "gt.json", f11 / "dt.json", "--json", out)
    assert json.loads(out.read_text())["AP"] == .8326732673267326 and done.stderr == ""
    assert done.stdout.startswith("AP      0.833  IoU 0.50:0.95\n")
    assert "python -m tinydet.evaluate --voc FOLDER --set test DT.json" in process("--help").stdout


def test_names_that_the_terminal_cannot_show(f11):
    value = json.loads((f11 / "gt.json").read_text())
    value["categories"][0]["name"] = "häuser"
    (f11 / "gt.json").write_text(json.dumps(value))
    assert "h\\xe4user" in process("--coco", f11 / "gt.json", f11 / "dt.json", PYTHONIOENCODING="ascii").stdout


@pytest.mark.parametrize("name, text, message", [
    ("dt.json", "[{]", "coco.results: {dt} must be JSON, got: Expecting property name enclosed in double quotes"),
    ("gt.json", "[]", "coco.annotations: {gt}: the file must hold an object, got []"),
])
def test_bad_coco_files_are_one_line(f11, name, text, message):
    (f11 / name).write_text(text)
    done = process("--coco", f11 / "gt.json", f11 / "dt.json", "--json", f11 / "out.json", code=1)
    line, = done.stderr.splitlines()
    assert line.startswith("error: " + message.format(gt=f11 / "gt.json", dt=f11 / "dt.json")) and done.stdout == ""
    assert not (f11 / "out.json").exists()


def test_bad_voc_files_are_one_line(f9):
    (f9 / "dt.json").write_text(json.dumps([record("elsewhere", .5, 1, 1, 9, 9)]))
    done = process("--voc", f9, "--set", "test", f9 / "dt.json", code=1)
    assert done.stderr == (f"error: coco.named_results: {f9 / 'dt.json'}: detections[0]: image must be that of one of the 3 "
                           "images, got 'elsewhere'\n")


@pytest.mark.parametrize("change, message", [
    ({"image": "d"}, r"detections\[1\]: image must be that of one of the 3 images, got 'd'"),       # of another set
    ({"class": "unknown"}, r"detections\[1\]: class must be that of one of the 3 classes, got 'unknown'"),
    ({"score": None}, r"detections\[1\]: score must be a finite number, got None"),
    ({"box": [1, 2, 3]}, r"detections\[1\]: box must be four finite numbers up to 1e\+12, got \[1, 2, 3\]"),
])
def test_voc_detections_are_checked(f9, change, message):
    rows = json.loads((f9 / "dt.json").read_text())
    (f9 / "dt.json").write_text(json.dumps([rows[0], {**rows[1], **change}]))
    with pytest.raises(ValueError, match=message):
        evaluate("--voc", f9, "--set", "test", f9 / "dt.json")
    with pytest.raises(FileNotFoundError, match="no_such_set"):
        evaluate("--voc", f9, "--set", "no_such_set", f9 / "dt.json")
    with pytest.raises(FileNotFoundError, match="there is no file .*none.json"):
        evaluate("--voc", f9, "--set", "test", f9 / "none.json")


@pytest.mark.parametrize("args, message", [
    (["dt.json"], "give one of --coco GT.json and --voc FOLDER"),
    (["--coco", "gt.json", "--voc", "folder", "dt.json"], "give one of --coco GT.json and --voc FOLDER"),
    (["--coco", "gt.json"], "the following arguments are required: DT.json"),
    (["--voc", "folder", "dt.json"], "--voc needs --set"),
    (["--coco", "gt.json", "dt.json", "--set", "test"], "belong to --voc"),
    (["--coco", "gt.json", "dt.json", "--metric", "all"], "belong to --voc"),
    (["--coco", "gt.json", "dt.json", "--iou", "0.5"], "belong to --voc"),
    (["--coco", "gt.json", "dt.json", "--strict"], "belong to --voc"),
    (["--coco", "gt.json", "dt.json", "--loosened"], "belong to --voc"),
    (["--coco", "gt.json", "dt.json", "--leave-out", "a"], "belong to --voc"),
    (["--voc", "folder", "--set", "test", "dt.json", "--metric", "12"], "invalid choice"),
    (["--voc", "folder", "--set", "test", "dt.json", "--iou", "half"], "invalid float"),
    *((["--voc", "folder", "--set", "test", "dt.json", "--iou", iou], "--iou must lie in 0..1, above 0")
      for iou in ("0", "-1", "1.1", "nan")),
    (["--coco", "gt.json", "dt.json", "--json", "no/such/folder/out.json"], "--json no/such/folder/"),
])
def test_usage(capsys, args, message):
    with pytest.raises(SystemExit) as caught:
        arguments(args)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("objects, boxes, npos, ap", [
    ([("x", 1, 1, 9, 9, 0)] * 2, [(1, 1, 9, 9)], 2, 0.5),                                   # the same object twice counts twice
    ([("x", 1, 1, 9, 9, 1), ("x", 1, 1, 9, 9, 0)], [(1, 1, 9, 9)], 1, 0.0),                 # the first of equals is difficult: nothing counts
    ([("x", 1, 1, 9, 9, 0), ("x", 20, 5, 20, 9, 0)], [(1, 1, 9, 9), (20, 5, 20, 9)], 2, 1.0),           # one pixel wide
    ([("x", 0, 0, 9, 9, 0)], [(0, 0, 9, 5)], 1, 1.0),                                       # corners from 0: IoU 60/100, not cut to 54/81
    ([("x", 0, 0, 9, 9, 0)], [(0, 0, 9, 3)], 1, 0.0),                                       # 40/100 (cut: 36/81)
    ([("x", 81, 1, 120, 10, 0)], [(81, 1, 100, 10)], 1, 1.0),                               # beyond the border: IoU 20/40
    ([("x", 81, 1, 121, 10, 0)], [(81, 1, 100, 10)], 1, 0.0),                               # 20/41, though all of it that the image holds
])
def test_voc_counts_the_objects_of_the_files_as_they_stand(tmp_path, objects, boxes, npos, ap):
    """As the devkit does; the reader for training drops and cuts."""
    folder = voc_folder(tmp_path, {"test": {"a": objects}})
    for picture in (folder / "JPEGImages").iterdir():
        picture.unlink()                                            # nobody needs them
    (folder / "dt.json").write_text(json.dumps([record("a", 0.9 - k / 10, *box) for k, box in enumerate(boxes)]))
    result = voc_files(folder, "test", folder / "dt.json")["x"]
    assert (result.positives, result.ap) == (npos, ap)


def test_an_entity_bomb_in_another_set_is_not_read(f9):
    (f9 / "Annotations" / "bomb.xml").write_text(
        '<!DOCTYPE a [<!ENTITY b "bbbb">]><annotation><object><name>&b;</name></object></annotation>')
    assert "bbbb" not in voc_files(f9, "test", f9 / "dt.json")
