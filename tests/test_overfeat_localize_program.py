"""examples/overfeat_localize.py in one process: what a run leaves, resuming, the variants, what trains, errors."""
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import scenes, use
from tinydet.models import overfeat, overfeat_localize

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--canvases", "8", "--eval-canvases", "3", "--steps", "4", "--batch", "2", "--checkpoint-every", "1", "--measure-every", "2",
        "--least-probability", "0.6"]
ERRORS = {"localization_error", "localization1_error", "top1_error", "top5_error"}


@pytest.fixture(scope="module")
def program():
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))                                      # programs import what they share from there, as if called
    spec = importlib.util.spec_from_file_location("example_overfeat_localize", EXAMPLES / "overfeat_localize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classifier(classes=scenes.CLASSES, **spec):
    """A small net with random outputs that differ from window to window."""
    net = overfeat.OverFeat(overfeat.Spec(tuple(classes), "small", 0.25, init=None, **spec), np.random.default_rng(0))
    net.params["classifier.out.w"][...] *= 100
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "weights.npz"
    overfeat.save(classifier(), path, {})
    return path


def start(program, out, weights, *more):
    args = program.arguments([*TINY, "--weights", str(weights), "--out", str(out), *more])
    with use(args.backend) as put:
        return program.main(args, put)


@pytest.fixture(scope="module")
def done(program, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out / "overfeat_localize", start(program, out, weights)


def test_a_run_leaves_figures_pictures_and_which_images_are_wrong(program, done, capsys):
    folder, results = done
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results["also"]) == set(program.VARIANTS) and results["set"] == "val" and results["seconds"] >= 0
    assert [p["step"] for p in results["curve"]] == [2, 4] and all(0 <= p["localization_error"] <= 1 for p in results["curve"])
    for name, figures in {"": results, **results["also"]}.items():
        wrong = json.loads((folder / (f"wrong_{name}.json" if name else "wrong.json")).read_text())
        assert set(wrong) == ERRORS and figures["milliseconds"] > 0
        for error, images in wrong.items():
            assert len(images) == 3 and set(images) <= {0, 1} and np.mean(images) == figures[error]
        assert figures["localization_error"] <= figures["localization1_error"] and figures["top5_error"] <= figures["top1_error"]
        assert figures["localization_error"] >= figures["top5_error"]
    assert all((folder / f"{name}.png").is_file() for name in ("loss", "curve", "boxes"))


def test_the_classifier_is_kept_to_the_bit_and_the_regressor_learns(program, done, weights):
    before, after = overfeat.load(weights)[0], overfeat.load(done[0] / "weights.npz")[0]
    assert after.spec == dataclasses.replace(before.spec, regressor="SCR", from_window=True)
    for name, array in before.arrays().items():
        assert_array_equal(after.arrays()[name], array)
    image = scenes.items(1, 0, "train")[0].image()
    assert_array_equal(overfeat.classify(after, image), overfeat.classify(before, image))
    start = overfeat.OverFeat(after.spec, np.random.default_rng(0)).params
    assert all((after.params[name] != w).any() for name, w in start.items() if name.startswith("regressor.") and name.endswith(".w"))


def test_a_stopped_run_goes_on_to_the_same_bits(program, done, weights, tmp_path, monkeypatch):
    steps, original = [], overfeat_localize.regress_step

    def stop(*args):
        steps.append(len(steps))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(*args)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(overfeat_localize, "regress_step", stop)
        start(program, tmp_path, weights)
    results = start(program, tmp_path, weights, "--resume")
    for name in ("metrics.jsonl", "wrong.json", "wrong_centre.json", "curve.json"):
        assert (tmp_path / "overfeat_localize" / name).read_text() == (done[0] / name).read_text()
    for file in ("checkpoint.npz", "weights.npz"):
        a, b = (np.load(folder / file) for folder in (tmp_path / "overfeat_localize", done[0]))
        assert a.files == b.files
        for name in a.files:
            assert_array_equal(a[name], b[name])
    assert results["seconds"] is None and len(steps) == 4


@pytest.mark.parametrize("flip, regressor", [(False, "PCR"), (True, "SCR")])
def test_variants_are_what_localize_answers(program, flip, regressor):
    net = overfeat.OverFeat(dataclasses.replace(classifier().spec, regressor=regressor, from_window=True), np.random.default_rng(1))
    net.params["classifier.out.w"][...] *= 100
    args = program.arguments(["--canvases", "1", "--eval-canvases", "2"])
    examples, sizes, merging = program.common.read_labelled(args)[1], net.table.sizes, {"mode": "count", "least": 0.6, "threshold": 0.4}
    found, milliseconds = program.evaluate(net, examples, flip, merging)
    chosen = {"": {}, "centre": {"sizes": sizes[:1], "centre_only": True}, "1": {"sizes": sizes[:1]}, "2": {"sizes": [sizes[0], sizes[3]]},
              "3": {"sizes": [sizes[0], sizes[1], sizes[3]]}, "4": {"sizes": [sizes[i] for i in (0, 1, 3, 5)]}, "coarse": {"fine": False},
              "mean": {"mode": "mean"}, "none": {"merging": "none"}}
    assert set(found) == set(milliseconds) == {*chosen, "true-class"}
    for i, e in enumerate(examples):
        for name, how in chosen.items():
            for a, b in zip(found[name][i], overfeat_localize.localize(net, e.image(), flip=flip, **{**merging, **how}), strict=True):
                assert_allclose(a, b, rtol=1e-6)
        whole = overfeat_localize.localize(net, e.image(), flip=flip, k=6, **merging)       # all six classes
        boxes, labels, scores = found["true-class"][i]
        assert_array_equal(labels, e.labels)
        assert_allclose(boxes[0], whole[0][whole[1] == e.labels[0]][0], rtol=1e-6)
        assert_allclose(scores[0], whole[2][whole[1] == e.labels[0]][0], rtol=1e-6)


def seen_by(program, out, weights, monkeypatch, *more):
    """What each step hands to the regressor: maps of the trunk, targets, offset. Nothing trains."""
    steps = []

    def note(net, maps, targets, offset):
        steps.append((maps, targets, offset))
        return 0.0
    monkeypatch.setattr(overfeat_localize, "regress_step", note)
    monkeypatch.setattr(program, "evaluate", lambda *args: ({}, {}))
    monkeypatch.setattr(program, "wrong", lambda *args: {})
    monkeypatch.setattr(program, "picture", lambda *args: ([program.Image.new("RGB", (2, 2))], [""]))
    with pytest.raises(KeyError, match="''"):                               # no figures of the main variant
        start(program, out, weights, "--steps", "24", "--measure-every", "24", *more)
    return steps


def test_batches_share_a_scale_and_an_offset_and_targets_follow_mirrored_images(program, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(program.overfeat_localize, "targets", lambda table, h, w, boxes, labels, rule, least, offset:
                        (table, (h, w), boxes, labels, rule, least, offset))
    examples, table = program.common.read_labelled(program.arguments(TINY))[0], overfeat.TABLES["small"]
    steps = seen_by(program, tmp_path, weights, monkeypatch, "--train-scales", "1", "4", "--rule", "iou", "--least", "0.4", "--seed", "3")
    of_map = {overfeat.outputs(table, *table.sizes[s]).trunk: (s, overfeat.outputs(table, *table.sizes[s]).coarse) for s in (0, 3)}
    scales, mirrored, offsets = set(), set(), set()
    for maps, targets, offset in steps:
        scale, size = of_map[maps.shape[1:3]]
        scales.add(scale)
        offsets.add(offset)
        for told, (h, w), boxes, labels, *how in targets:
            assert (told, h, w) == (table, *size) and how == ["iou", 0.4, offset]
            H, W = table.sizes[scale]
            box = boxes[0] * (116 / W, 96 / H, 116 / W, 96 / H)
            turned = box[[2, 1, 0, 3]] * (-1, 1, -1, 1) + (116, 0, 116, 0)
            found = [[np.allclose(b, e.boxes[0]) and e.labels[0] == labels[0] for e in examples] for b in (box, turned)]
            assert np.any(found)
            mirrored.add(bool(np.any(found[1])))
    assert len(steps) == 24 and scales == {0, 3} and mirrored == {False, True} and len(offsets) > 4
    assert all(len(o) == 2 and 0 <= min(o) <= max(o) < 3 for o in offsets)


def test_landscape_and_portrait_images_train_with_all_of_a_pcr(program, weights, tmp_path, monkeypatch):
    original = program.common.read_labelled

    def both(args):
        *sets, classes = original(args)
        sets = [[dataclasses.replace(e, source=np.ascontiguousarray(e.image().transpose(1, 0, 2)), size=e.size[::-1],
                                     boxes=e.boxes[:, [1, 0, 3, 2]]) if i % 2 else e for i, e in enumerate(some)] for some in sets]
        return *sets, classes
    monkeypatch.setattr(program.common, "read_labelled", both)
    start(program, tmp_path, weights, "--train-all", "--regressor", "PCR", "--fine-training", "--flip", "--lr", "0.01", "--name", "all")
    before, after = overfeat.load(weights)[0], overfeat.load(tmp_path / "all" / "weights.npz")[0]
    assert all((after.params[name] != w).any() for name, w in before.params.items() if name.endswith(".w"))
    assert after.params["regressor.out.b"].shape == (24,)
    log = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["box_loss"] + line["class_loss"]) for line in log)


def test_boxes_lie_in_the_picture(program):
    corners = program._corners(np.array([[10.0, 20, -5, 30], [-3, 5, 60, 70]]), 2, (100, 80))
    assert corners == [[0, 40, 20, 60], [0, 10, 99, 79]]
    e = program.common.read_labelled(program.arguments(["--canvases", "1", "--eval-canvases", "1"]))[0][0]
    views = [(np.array([[[8.0, 8, 40, 40]], [[70, 50, 100, 80]]]), np.array([[0.9, 0.1], [0.8, 0.2]]))]
    merging = {"mode": "count", "match": "dissimilarity", "threshold": 0.5, "least": 0.0}
    pictures, told = program.picture(e, views, merging, scenes.CLASSES)
    assert [p.size for p in pictures] == [(360, 298)] * 2
    assert told == [f"{scenes.CLASSES[e.labels[0]]}: 2 windows, cross", "2 boxes, the best adds up to 0.9"]
    assert pictures[0].getpixel((round(8 * 360 / 116), 60)) == program.RED != pictures[0].getpixel((60, 60))    # an edge, no filling
    assert len(program.picture(e, views, {**merging, "least": 1.0}, scenes.CLASSES)[0]) == 2                   # nothing to draw


def test_errors(program, weights, tmp_path, monkeypatch, capsys):
    def refused(told, *more, error=ValueError, weights=weights):
        with pytest.raises(error, match=told):
            start(program, tmp_path, weights, *more)
        assert not (tmp_path / "overfeat_localize").exists()                # no run has begun
    refused("no weights .*first run `python examples/overfeat_classify.py`", weights=tmp_path / "none.npz", error=FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="overfeat_classify/weights.npz; first run"):
        program.read(program.arguments(["--out", str(tmp_path)]))           # the default
    for told, net in (("classes of .* must be those of the data, cross, .*got a, b", classifier("ab")),
                      ("must hold a classifier, got a detector", classifier(background=True))):
        overfeat.save(net, tmp_path / "w.npz", {})
        refused(told, weights=tmp_path / "w.npz")
    original = program.common.read_labelled

    def without(args):
        *sets, classes = original(args)
        sets[1][2] = dataclasses.replace(sets[1][2], difficult=np.ones(1, bool))
        return *sets, classes
    with monkeypatch.context() as patched:
        patched.setattr(program.common, "read_labelled", without)
        refused("every image must have a box that is not difficult, got none in val00002")
    for args, told in ((["--train-scales", "1", "7"], "argument --train-scales: invalid choice: 7"), (["--least", "1.5"], "--least must lie in"),
                       (["--least-probability", "-1"], "--least-probability must lie in"), (["--threshold", "nan"], "--threshold must be a number")):
        with pytest.raises(SystemExit):
            program.arguments(args)
        assert told in capsys.readouterr().err
