"""The example programs as a user runs them: as processes, on a small VOC folder."""
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import tinydet
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from tinydet import data, evaluate, files, optim, scenes
from tinydet.models import fast_rcnn, overfeat, overfeat_detect, retinanet

import test_retinanet_weights

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--steps", "6", "--batch", "2", "--checkpoint-every", "2", "--window", "24"]


def command(program, *args):
    return [sys.executable, str(EXAMPLES / program), *map(str, args)]


def run(program, *args, cwd, code=0):
    done = subprocess.run(command(program, *args), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def killed_after_a_checkpoint(program, args, cwd, name):
    """Kill a training program for good once its run has passed a checkpoint. Returns the run's folder."""
    process = subprocess.Popen(command(program, *args), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, end = cwd / "runs" / name, time.time() + 200
    while not (folder / "checkpoint.npz").exists():
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "results.json").exists()
    return folder


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A VOC folder of ten scenes: train has eight, val two."""
    folder = tmp_path_factory.mktemp("voc")
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    examples = scenes.scenes(10, seed=1)
    for e in examples:
        Image.fromarray(e.image()).save(folder / "JPEGImages" / f"{e.name}.png")
        objects = "".join(
            f"<object><name>{scenes.CLASSES[label]}</name><difficult>{int(d)}</difficult><bndbox><xmin>{b[0] + 1}</xmin>"
            f"<ymin>{b[1] + 1}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
            for b, label, d in zip(e.boxes, e.labels, e.difficult))
        (folder / "Annotations" / f"{e.name}.xml").write_text(
            f"<annotation><size><width>{e.size[0]}</width><height>{e.size[1]}</height></size>{objects}</annotation>")
    # every class of val must be known from train: the two scenes with the fewest classes are val
    order = sorted(examples, key=lambda e: len(set(e.labels)))
    rest = {k for e in order[2:] for k in e.labels}
    assert {k for e in order[:2] for k in e.labels} <= rest
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(e.name for e in order[2:]) + "\n")
    (folder / "ImageSets/Main/val.txt").write_text("\n".join(e.name for e in order[:2]) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(voc, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    done = run("overfeat.py", "--data", voc, "--name", "a", *TINY, cwd=cwd)
    return cwd, done


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of an untrained net that is sure of itself: it detects something everywhere."""
    net = overfeat.OverFeat(overfeat.Spec(scenes.CLASSES, "small", 1.0, "SCR", 0.0, None, from_window=True, k=3, pool=2, background=True, scales=(1.0, 0.5)), np.random.default_rng(0))
    net.params["classifier.out.w"][...] *= 100
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    overfeat.save(net, path, {"merging": "merge", "threshold": 0.6, "cut": {name: 2.5 for name in scenes.CLASSES}})
    return path


def test_training_leaves_everything_in_the_run_folder(trained):
    cwd, done = trained
    folder = cwd / "runs" / "a"
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "results.json", "false_positives",
                                                  "loss.png", "precision_recall.png", "detections.png", "detections.json", "curve.json", "curve.png"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and all(np.isfinite(r["loss"]) for r in records)
    results = json.loads((folder / "results.json").read_text())
    assert results["set"] == "val" and 0 <= results["mean AP50"] <= 1
    assert "mean" in done.stdout and "loss=" in done.stderr         # the table, and the bar with the loss
    for name in ("loss", "precision_recall", "detections"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize("seed", [0, 1])
def test_the_log_is_that_of_the_settings(voc, trained, tmp_path, seed):
    """The program's losses are those of its parts put together here: offset, decay, schedule and seed reach where they belong."""
    folder = trained[0] / "runs" / "a"
    if seed:
        run("overfeat.py", "--data", voc, "--name", "a", *TINY, "--seed", seed, cwd=tmp_path)
        folder = tmp_path / "runs" / "a"
    examples, classes = data.read_voc(voc, "train")
    spec = overfeat_detect.spec_for(examples, classes, 24)
    net = overfeat.OverFeat(spec, np.random.default_rng(seed))
    optimizer, schedule, losses = optim.SGD(net, 0.9, 1e-4), optim.cosine_schedule(0.07, 6, 0), []
    for i in range(6):
        rng = np.random.default_rng([seed, i])
        views = [overfeat_detect.training_view(spec, examples[j], rng, 72, 0.8) for j in rng.choice(8, 2, replace=False)]
        offset = tuple(rng.integers(2, size=2))
        scores, edges, cache = net.forward(net.normalise(np.stack([v[0] for v in views])), True, rng, offset)
        values, dscores, dedges = overfeat_detect.loss(spec, scores, edges, [v[1] for v in views], rng, 1.0, offset)
        net.backward(dscores, dedges, cache)
        optimizer.step(schedule(i))
        losses.append(values["loss"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert_allclose([r["loss"] for r in records], losses, rtol=1e-5)
    trained_net, settings = overfeat.load(folder / "weights.npz")
    for name, w in net.arrays().items():
        assert_allclose(trained_net.arrays()[name], w, rtol=1e-3, atol=1e-6, err_msg=name)
    held_out, _ = data.read_voc(voc, "val", classes)
    found = [overfeat_detect.detect(trained_net, e.image(), merging="merge", threshold=0.6) for e in held_out]
    results = evaluate.voc(found, held_out, classes)
    assert settings == {"merging": "merge", "threshold": 0.6, "mode": "count", "cut": {k: evaluate.best_threshold(r) for k, r in results.items()}}
    told = json.loads((folder / "results.json").read_text())
    assert told["mean AP50"] == pytest.approx(evaluate.mean_ap(results), abs=1e-3)


def test_a_killed_run_resumes_to_the_same_bits(voc, trained, tmp_path):
    """Kill the process for good once it has passed a checkpoint; --resume must end with the weights of the undisturbed run."""
    args = ["--data", voc, "--name", "a", *TINY]
    folder = killed_after_a_checkpoint("overfeat.py", args, tmp_path, "a")
    run("overfeat.py", *args, "--resume", cwd=tmp_path)
    whole = trained[0] / "runs" / "a"
    for name in ("weights.npz", "checkpoint.npz"):
        (a, meta_a), (b, meta_b) = files.read_arrays(whole / name), files.read_arrays(folder / name)
        assert meta_a == meta_b and a.keys() == b.keys()
        for key in a:
            assert_array_equal(a[key], b[key], err_msg=key)
    assert (whole / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


TINY_OHEM = ["--steps", "6", "--short", "64", "--batch", "128", "--min-score", "0.01", "--checkpoint-every", "2", "--measure-every", "2", "--draw-every", "3", "--jitter", "2", "--most", "300", "--name", "o"]


@pytest.fixture(scope="module")
def trained_ohem(voc, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("ohem")
    return cwd, run("ohem.py", "--data", voc, "--also-iterate", *TINY_OHEM, cwd=cwd)


def test_ohem_leaves_everything_in_the_run_folder(voc, trained_ohem):
    cwd, done = trained_ohem
    folder = cwd / "runs" / "o"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "results.json", "false_positives", "loss.png", "precision_recall.png", "detections.png",
        "detections.json", "detections_iterate.json", "curve.json", "curve.png", "regions"}
    assert [p.name for p in sorted((folder / "regions").iterdir())] == ["000000.png", "000003.png"]
    results = json.loads((folder / "results.json").read_text())
    assert [p["step"] for p in results["curve"]] == [2, 4, 6] and results["curve"] == json.loads((folder / "curve.json").read_text())
    assert results["curve"][-1]["mean AP50"] == results["mean AP50"] and results["all_loss"] == results["curve"][-1]["all_loss"] > 0
    assert results["also"]["iterate"].keys() >= {"AP50", "mean AP50", "COCO"} and "with every object in range" in done.stdout
    held_out, classes = data.read_voc(voc, "val", data.read_voc(voc, "train")[1])
    records = json.loads((folder / "detections.json").read_text())
    found = [[(r["box"], classes.index(r["class"]), r["score"]) for r in records if r["image"] == e.name] for e in held_out]
    found = [tuple(np.array([r[k] for r in rows]).reshape(len(rows), *[4] * (k == 0)) for k in range(3)) for rows in found]
    assert evaluate.mean_ap(evaluate.voc(found, held_out, classes)) == results["mean AP50"]
    assert json.loads((folder / "config.json").read_text())["sampler"] == "ohem"


def call(program, *args):
    """What an example program's main gives, in this process."""
    program = module(program)
    args = program.arguments(list(map(str, args)))
    with tinydet.use(args.backend) as put:
        return program.main(args, put)


def test_ohem_without_any_region_to_watch_or_object_to_find(tmp_path, monkeypatch):
    """Training images whose proposals are of no use, evaluation images without objects: nothing to measure is null, not NaN."""
    program, empty = module("ohem"), np.zeros((0, 4))
    bare = [dataclasses.replace(e, boxes=empty, labels=np.zeros(0, int), difficult=np.zeros(0, bool)) for e in scenes.scenes(3, seed=2)]
    monkeypatch.setattr(program.common, "read", lambda args: (bare, bare[:1], scenes.CLASSES))
    (tmp_path / "p.json").write_text(json.dumps({bare[0].name: [[3, 3, 4, 4]]}))
    args = program.arguments(["--steps", "2", "--short", "64", "--images", "2", "--proposals", str(tmp_path / "p.json"), "--out", str(tmp_path)])
    with warnings.catch_warnings(), tinydet.use("numba") as put:
        warnings.simplefilter("ignore", data.DefectWarning)
        program.main(args, put)
    curve = json.loads((tmp_path / "ohem" / "curve.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert curve[-1] == {"step": 2, "mean AP50": None, "all_loss": None}


def test_a_killed_ohem_run_resumes_to_the_same_bits(voc, trained_ohem, tmp_path):
    """Killed between two measurements; the curve and the weights are those of the undisturbed run."""
    args = ["--data", voc, *TINY_OHEM]
    folder = killed_after_a_checkpoint("ohem.py", args, tmp_path, "o")
    run("ohem.py", *args, "--also-iterate", "--resume", cwd=tmp_path)           # how it is evaluated may change
    whole = trained_ohem[0] / "runs" / "o"
    for name in ("metrics.jsonl", "curve.json", "detections.json", "detections_iterate.json"):
        assert (whole / name).read_text() == (folder / name).read_text(), name
    a, b = (files.read_arrays(f / "weights.npz") for f in (whole, folder))
    assert a[1] == b[1]
    for key in a[0]:
        assert_array_equal(a[0][key], b[0][key], err_msg=key)


def test_detect_with_weights_of_ohem(voc, trained_ohem, tmp_path, monkeypatch):
    cwd, _ = trained_ohem
    weights, pictures = cwd / "runs" / "o" / "weights.npz", sorted((voc / "JPEGImages").iterdir())
    records = json.loads((cwd / "runs" / "o" / "detections.json").read_text())
    names = {r["image"] for r in records}
    assert names
    told = call("detect", "--weights", weights, "--json", *[p for p in pictures if p.stem in names])
    assert sorted(told, key=str) == sorted(records, key=str)                    # the same windows, the same settings
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({pictures[0].stem: [[0, 0, 60, 60], [5, 5, 5, 5]]}))
    call("detect", "--weights", weights, "--proposals", boxes, "--min-score", "0.01", "--json", pictures[0])
    with pytest.raises(ValueError, match=f"are missing: '?{pictures[1].stem}"):
        call("detect", "--weights", weights, "--proposals", boxes, "--json", *pictures[:2])
    seen = []
    monkeypatch.setattr(fast_rcnn, "detect", lambda net, image, regions, testing: seen.append(regions.tolist()) or (np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)))
    boxes.write_text(json.dumps({pictures[0].stem: [[0, 0, 60, 60], [5, 5, 5, 5], [0, 0, 60, 60], [900, 900, 950, 950]]}))
    call("detect", "--weights", weights, "--proposals", boxes, "--json", pictures[0])
    assert seen == [[[0, 0, 60, 60]]]                               # what no net can use is left out


@pytest.mark.parametrize("args, message", [
    (["--preset", "voc"], "--preset voc needs --data, --pretrained and --proposals"), (["--jitter", "-1"], "--jitter must not be negative"),
    (["--sampler", "hard"], "invalid choice: 'hard'")])
def test_bad_settings_of_ohem_are_said_before_anything_is_done(tmp_path, args, message):
    assert message in " ".join(run("ohem.py", *args, cwd=tmp_path, code=2).stderr.split())
    assert not list(tmp_path.iterdir())


def module(program):
    """An example program as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{program}", EXAMPLES / f"{program}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_ap_loss_leaves_everything_in_the_run_folder_and_detects_again(voc, tmp_path):
    tiny = ["--data", voc, "--steps", "4", "--size", "64", "64", "--batch", "2", "--checkpoint-every", "2", "--measure-every", "2", "--name", "p"]
    call("ap_loss", *tiny, "--out", tmp_path / "runs")
    folder = tmp_path / "runs" / "p"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "results.json", "false_positives", "loss.png", "precision_recall.png", "detections.png",
        "detections.json", "curve.json", "curve.png", "ranking.png", "pull.png"}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        r = json.loads(line)
        assert 0 <= r["ranking_ap"] <= 1 and r["pull_positive"] == pytest.approx(r["class_loss"], rel=1e-4) == pytest.approx(r["pull_negative"], rel=1e-4)
    result, steps = json.loads((folder / "results.json").read_text()), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert result["imbalance"] < 1e-4 and [p["step"] for p in result["curve"]] == [2, 4]
    for p, of in zip(result["curve"], (steps[:2], steps[2:])):
        assert p["pull_ratio"] == pytest.approx(1, rel=1e-4) and p["ranking_ap"] == pytest.approx(np.mean([r["ranking_ap"] for r in of]))
    records = json.loads((folder / "detections.json").read_text())
    pictures = [p for p in sorted((voc / "JPEGImages").iterdir()) if p.stem in {r["image"] for r in records}]
    told = call("detect", "--weights", folder / "weights.npz", "--json", *pictures)
    assert records and sorted(told, key=str) == sorted(records, key=str)


@pytest.mark.parametrize("args, message", [
    (["--preset", "voc", "--data", "d"], "--preset voc needs --data and --pretrained"),
    (["--clip", "-1"], "--clip must be finite and not negative, got -1.0"),
    (["--steps", "10", "--warmup", "10"], "--warmup must be less than --steps 10, got 10"),
    (["--loss", "focal", "--delta", "0.5"], "--delta is a setting of --loss ap, auc, smooth_ap, --plain of --loss ap, got --loss focal"),
    (["--delta", "-1"], "--delta: delta must be 0 or lie in"), (["--loss", "smooth_ap", "--delta", "0"], "--delta: delta must lie in"),
    (["--loss", "auc", "--plain"], "--plain of --loss ap, got --loss auc"), (["--box-weight", "nan"], "--box-weight must be finite"),
    (["--steps", "100", "--decay-at", "70", "100"], "--decay-at must lie below --steps 100, got 100"), (["--nms", "2"], "--nms must lie in"), (["--size", "64"], "expected 2")])
def test_bad_settings_of_ap_loss_are_said(tmp_path, args, message, capsys):
    with pytest.raises(SystemExit):
        module("ap_loss").arguments(args)
    assert message in capsys.readouterr().err


def test_every_setting_of_ap_loss_arrives(voc, tmp_path, monkeypatch):
    asked, views, tested, ap = [], [], [], []

    def loss(scores, deltas, targets, *how, real=retinanet.loss, **options):
        asked.append((*how, options))
        labels = np.stack([t.labels for t in targets])[..., None]
        true = np.where(labels < 0, -1, labels == np.arange(scores.shape[2])).ravel()
        s, true = scores.ravel()[true >= 0], true[true >= 0]
        order = np.argsort(-s, kind="stable")                       # scores of a new net differ, nearly all
        precision = np.cumsum(true[order]) / np.arange(1, len(s) + 1)
        ap.append(np.mean(np.maximum.accumulate(precision[::-1])[::-1][true[order] == 1]))
        return real(scores, deltas, targets, *how, **options)

    def training_view(*args, real=retinanet.training_view, **more):
        views.append((args[3:], {k: v is not None for k, v in more.items()}))
        return real(*args, **more)

    monkeypatch.setattr(retinanet, "loss", loss)
    monkeypatch.setattr(retinanet, "training_view", training_view)
    monkeypatch.setattr(retinanet, "detect", lambda net, image, testing, real=retinanet.detect: tested.append(testing) or real(net, image, testing))
    program = module("ap_loss")
    words = ["--data", voc, "--steps", 1, "--batch", 2, "--size", 64, 96, "--delta", 0.5, "--plain", "--per-image", "--upside-down", "--views", "mirror",
             "--box-weight", 0.25, "--short", 60, "--longest", 80, "--nms", 0.3, "--limit", 7, "--out", tmp_path]
    with tinydet.use("numba") as put:
        program.main(program.arguments([str(w) for w in words]), put)
    assert asked == [("ap", True, 0.25, {"delta": 0.5, "interpolated": False})]
    assert views == [((64, 96, "mirror", True), {"axes": False})] * 2
    assert {dataclasses.astuple(t) for t in tested} == {(60, 80, 32, 1000, 0.01, 0.3, 7)}
    record = json.loads((tmp_path / "ap_loss" / "metrics.jsonl").read_text())
    assert record["ranking_ap"] == pytest.approx(ap[0], rel=0.02)   # ties of untrained scores


def test_ap_loss_trains_without_any_object(tmp_path, monkeypatch):
    program = module("ap_loss")
    examples = [dataclasses.replace(e, difficult=np.ones(len(e.boxes), bool)) for e in scenes.scenes(3, seed=0)]
    monkeypatch.setattr(program.common, "read", lambda args: (examples, examples[:1], scenes.CLASSES))
    with tinydet.use("numba") as put:
        program.main(program.arguments(["--steps", "2", "--batch", "2", "--size", "48", "48", "--measure-every", "1", "--out", str(tmp_path)]), put)
    result = json.loads((tmp_path / "ap_loss" / "results.json").read_text())
    assert [p["ranking_ap"] for p in result["curve"]] == [None, None] and result["imbalance"] is None
    assert all("ranking_ap" not in json.loads(line) for line in (tmp_path / "ap_loss" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("pixels", ["caffe", "torchvision"])
def test_ap_loss_takes_published_weights_of_either_kind(voc, tmp_path, monkeypatch, pixels):
    """Colours, their order and the strides fit the file; what the paper freezes stays."""
    monkeypatch.setitem(retinanet.TABLES, "resnet50", test_retinanet_weights.TINY)
    arrays = test_retinanet_weights.published(np.float32)
    np.savez(tmp_path / "resnet.npz", **arrays)
    program = module("ap_loss")
    args = program.arguments([str(v) for v in (
        "--preset", "voc", "--data", voc, "--pretrained", tmp_path / "resnet.npz", "--pixels", pixels, "--out", tmp_path, "--train-set", "train", "--eval-set",
        "val", "--steps", 3, "--warmup", 2, "--decay-at", 2, "--batch", 2, "--size", 64, 64, "--lr", 3e-5)])
    assert args.longest == 833
    assert (args.short, args.weight_decay, args.nms, args.limit, args.loss, args.side, args.clip, args.views) == (
        500, 1e-4, 0.5, 100, "ap", 4, 0, "ssd")
    args.short = 64
    with tinydet.use("numba") as put:
        program.main(args, put)
    net, _ = retinanet.load(tmp_path / "ap_loss" / "weights.npz")
    first, mean = arrays["conv1.weight"].transpose(2, 3, 1, 0), retinanet.Spec.mean
    assert net.spec.stride_first is (pixels == "caffe") and net.spec.std == pytest.approx((1, 1, 1) if pixels == "caffe" else (58.395, 57.12, 57.375))
    assert net.spec.mean == pytest.approx(mean if pixels == "caffe" else (123.675, 116.28, 103.53))
    assert_array_equal(net.params["backbone.C1.conv1.w"], first[:, :, ::-1] if pixels == "caffe" else first)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "ap_loss" / "metrics.jsonl").read_text().splitlines()]
    assert_allclose(rates, [1e-5, 2e-5, 3e-6])
    assert_array_equal(net.parts["backbone"].arrays()["C2.0.sum.branch.bn1.mean"], arrays["layer1.0.bn1.running_mean"])


@pytest.mark.parametrize("wrong, message", [
    (["--weight-decay", "nan"], "weight_decay must be finite"), (["--min-score", "nan"], "min_score must be a number"), (["--bias-rate", "-3"], "the rate of"),
    (["--table", "VGG_CNN_M_1024", "--pretrained", "none.npz"], "there is no file none.npz"), (["--near", "nan"], "near must be a number")])
def test_ohem_refuses_before_a_run_begins(tmp_path, monkeypatch, wrong, message):
    program = module("ohem")
    monkeypatch.setitem(fast_rcnn.TABLES, "VGG_CNN_M_1024", fast_rcnn.Table((("conv1", 7, 8, 0, 4),), 2, 1 / 8, (4,)))
    args = program.arguments(["--scenes", "4", "--out", str(tmp_path), *wrong])
    with pytest.raises((ValueError, FileNotFoundError), match=message), tinydet.use("numba") as put:
        program.main(args, put)
    assert not list(tmp_path.iterdir())


def test_the_paper_s_recipe_from_published_weights_and_proposals(voc, tmp_path, monkeypatch):
    """--preset voc on a net of few channels: every setting of the notes (sec. 1 and 2.4), frozen layers, normalised targets, proposals from a file."""
    program = module("ohem")
    table = fast_rcnn.Table((("conv1_1", 3, 1, 1, 4), ("max", 2, 2), ("conv2_1", 3, 1, 1, 5), ("max", 2, 2), ("conv3_1", 3, 1, 1, 6)), 3, 1 / 4, (10, 8), ("conv1_1", "conv2_1"))
    monkeypatch.setitem(fast_rcnn.TABLES, "VGG16", table)
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in {"conv1_1": (4, 3, 3, 3), "conv2_1": (5, 4, 3, 3), "conv3_1": (6, 5, 3, 3), "fc6": (10, 54), "fc7": (8, 10), "fc8": (3, 8)}.items():
        arrays |= {f"{name}.weight": rng.normal(0, 0.2, shape).astype(np.float32), f"{name}.bias": np.zeros(shape[0], np.float32)}
    np.savez(tmp_path / "vgg.npz", **arrays)
    examples, _ = data.read_voc(voc, "all")
    boxes = {e.name: np.concatenate([e.boxes + 3, e.boxes - 2, rng.random((20, 4)) * 50 + [0, 0, 60, 60]]).tolist() for e in examples}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    args = program.arguments(["--preset", "voc", "--data", str(voc), "--pretrained", str(tmp_path / "vgg.npz"), "--proposals", str(tmp_path / "boxes.json"),
                              "--out", str(tmp_path), "--steps", "3", "--decay-at", "2", "--short", "80", "--lr", "1e-5", "--train-set", "train", "--eval-set", "val"])
    paper = program.arguments(["--preset", "voc", "--data", "d", "--pretrained", "w", "--proposals", "p"])
    assert (paper.table, paper.short, paper.longest, paper.steps, paper.lr, paper.decay_at, paper.weight_decay, paper.images, paper.batch, paper.bias_rate) == (
        "VGG16", [600], 1000, 80000, 0.001, [30000, 60000], 5e-4, 2, 128, 2.0)
    assert (paper.dropout, paper.nms, paper.limit, paper.targets, paper.jitter, paper.sampler) == (0.5, 0.3, 2000, "classes", 0, "ohem")
    assert (paper.train_set, paper.eval_set, paper.near, paper.test_short) == ("trainval", "test", 224, [600])
    many = program.arguments(["--preset", "voc-multiscale", "--data", "d", "--pretrained", "w", "--proposals", "p"])
    assert (many.short, many.test_short, many.near, many.longest, many.iterate) == (
        [480, 576, 688, 864, 900], [480, 576, 688, 864, 1000], 224, 2000, True)
    built = []
    monkeypatch.setattr(fast_rcnn, "FastRCNN", lambda *a, net=fast_rcnn.FastRCNN, **k: built.append(net(*a, **k)) or built[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", data.DefectWarning)             # boxes cut at the border
        with tinydet.use("numba") as put:
            program.main(args, put)
    assert sorted(built[0].trained) == sorted(k for k in built[0].params if not k.startswith(("trunk.conv1_1", "trunk.conv2_1")))
    net, settings = fast_rcnn.load(tmp_path / "ohem" / "weights.npz")
    assert_array_equal(net.params["trunk.conv1_1.w"], arrays["conv1_1.weight"].transpose(2, 3, 1, 0)[:, :, ::-1])       # BGR in the file, frozen
    assert not np.array_equal(net.params["trunk.conv3_1.w"], arrays["conv3_1.weight"].transpose(2, 3, 1, 0))
    assert np.shape(net.spec.target_mean) == (6, 4) and net.spec.float_bins and net.spec.std == (1, 1, 1) and settings["windows"] is None
    rates = [json.loads(line)["lr"] for line in (tmp_path / "ohem" / "metrics.jsonl").read_text().splitlines()]
    assert_allclose(rates, [1e-5, 1e-5, 1e-6])
    detect = module("detect")
    with pytest.raises(ValueError, match="was trained on proposals from a file: give those"):
        detect.load(detect.arguments(["--weights", str(tmp_path / "ohem" / "weights.npz"), "picture.jpg"]), np.asarray)


def test_runs_are_not_overwritten_and_resume_keeps_the_settings(voc, trained):
    cwd, _ = trained
    assert "holds a run already" in run("overfeat.py", "--data", voc, "--name", "a", *TINY, cwd=cwd, code=1).stderr
    other = run("overfeat.py", "--data", voc, "--name", "a", *TINY, "--lr", "0.5", "--resume", cwd=cwd, code=1)
    assert "lr was 0.07, is 0.5" in other.stderr
    assert "no run to resume" in run("overfeat.py", "--name", "none", "--resume", cwd=cwd, code=1).stderr


@pytest.mark.parametrize("args, message", [
    (["--merging", "nms", "--threshold", "1.5"], "--threshold must not be negative"), (["--lr", "nan"], "--lr must be positive"),
    (["--seed", "-1"], "--seed not be negative"), (["--batch", "0"], "whole number of at least 1, got 0"),
    (["--name", "../x"], "--name be the name of a folder")])
def test_bad_settings_are_said_before_anything_is_done(tmp_path, args, message):
    assert message in " ".join(run("overfeat.py", *args, cwd=tmp_path, code=2).stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_finished_run_can_be_evaluated_with_nms(voc, trained):
    cwd, _ = trained
    run("overfeat.py", "--data", voc, "--name", "a", *TINY, "--resume", "--merging", "nms", cwd=cwd)
    folder = cwd / "runs" / "a"
    assert overfeat.load(folder / "weights.npz")[1]["merging"] == "nms"
    results = json.loads((folder / "results.json").read_text())
    assert results["seconds"] is None and (results["merging"], results["threshold"]) == ("nms", 0.45)
    shutil.copytree(folder, cwd / "runs" / "b")
    run("overfeat.py", "--data", voc, "--name", "a", *TINY, "--resume", cwd=cwd)
    assert "got another merging, threshold in runs/b" in run("table.py", "runs/a", "runs/b", cwd=cwd, code=1).stderr


def test_wrong_folders_are_named(tmp_path):
    done = run("overfeat.py", "--data", tmp_path, cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: ") and "Annotations" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_detect_draws_and_prints(voc, weights, tmp_path):
    pictures = sorted((voc / "JPEGImages").iterdir())[:2]
    done = run("detect.py", "--weights", weights, *pictures, cwd=tmp_path)
    for picture in pictures:
        assert str(picture) in done.stdout
        _, _, scores = overfeat_detect.detect(overfeat.load(weights)[0], data.read_image(picture), merging="merge", threshold=0.6)
        assert f"{picture}: {(scores >= 2.5).sum()} objects" in done.stdout and (scores < 2.5).any()
        with Image.open(tmp_path / "detections" / f"{picture.stem}.png") as drawn, Image.open(picture) as original:
            assert drawn.size == original.size and np.any(np.asarray(drawn) != np.asarray(original))


def test_detect_gives_json(voc, weights, tmp_path):
    pictures = sorted((voc / "JPEGImages").iterdir())[:2]
    records = json.loads(run("detect.py", "--weights", weights, "--json", *pictures, cwd=tmp_path).stdout)
    assert {r["image"] for r in records} == {p.stem for p in pictures}
    for r in records:
        assert set(r) == {"image", "class", "box", "score"} and r["class"] in scenes.CLASSES
        x1, y1, x2, y2 = r["box"]
        assert 0 <= x1 < x2 <= 192 and 0 <= y1 < y2 <= 192
    net, _ = overfeat.load(weights)
    boxes, labels, scores = overfeat_detect.detect(net, data.read_image(pictures[0]), merging="merge", threshold=0.6)
    first = [r for r in records if r["image"] == pictures[0].stem]
    assert_allclose([r["box"] for r in first], boxes)
    assert [r["class"] for r in first] == [scenes.CLASSES[k] for k in labels]
    run("detect.py", "--weights", weights, "--json", "out.json", *pictures, cwd=tmp_path)
    assert json.loads((tmp_path / "out.json").read_text()) == records
    middle = float(np.median([r["score"] for r in records]))
    last = run("detect.py", "--weights", weights, *pictures, "--json", "--min-score", middle, cwd=tmp_path)
    assert json.loads(last.stdout) == [r for r in records if r["score"] >= middle] != records
    assert not (tmp_path / "detections").exists()


def test_detect_combines_boxes_as_the_run_did(voc, weights, tmp_path):
    picture = sorted((voc / "JPEGImages").iterdir())[0]
    net, settings = overfeat.load(weights)
    found = {}
    for mode in ("count", "mean"):
        overfeat.save(net, tmp_path / "w.npz", {**settings, "mode": mode})
        found[mode] = [r["box"] for r in call("detect", "--weights", tmp_path / "w.npz", "--json", picture)]
        assert_allclose(found[mode], overfeat_detect.detect(net, data.read_image(picture), merging="merge", threshold=0.6, mode=mode)[0])
    assert found["count"] != found["mean"]


def test_detect_names_what_is_wrong(weights, tmp_path, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for args, message in ((["--weights", weights, text], "text.jpg must be a readable image"),
                          (["--weights", weights, tmp_path / "none.jpg"], "there is no file"),
                          (["--weights", text, text], "text.jpg must be a weights or checkpoint file"),
                          (["--weights", tmp_path / "none.npz", text], "there is no file")):
        done = run("detect.py", *args, cwd=tmp_path, code=1)
        assert message in done.stderr and "Traceback" not in done.stderr
    assert "name at least one image" in run("detect.py", "--weights", weights, cwd=tmp_path, code=2).stderr
    with pytest.raises(ValueError, match=r"--proposals are for nets of examples/ohem\.py, got .*weights\.npz, which needs none"):
        call("detect", "--weights", weights, "--proposals", text, text)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(SystemExit):
        module("detect").arguments(["--weights", str(weights), "--json", str(tmp_path / "folder.json"), "x.png"])
    assert "folder.json must be a file, got a folder" in capsys.readouterr().err
    net, settings = overfeat.load(weights)
    for cut in ([1], {"disk": "x"}):
        overfeat.save(net, tmp_path / "cut.npz", {**settings, "cut": cut})
        with pytest.raises(ValueError, match=r"cut\.npz must hold a score for each class in its setting cut, got"):
            call("detect", "--weights", tmp_path / "cut.npz", text)
    assert "more than once" in run("detect.py", "--weights", weights, "a/x.jpg", "b/x.png", cwd=tmp_path, code=2).stderr


def test_table_of_runs(trained, tmp_path):
    cwd, _ = trained
    done = run("table.py", "runs/a", "runs/a", "--json", "t.json", cwd=cwd)
    table, results = json.loads((cwd / "t.json").read_text()), json.loads((cwd / "runs" / "a" / "results.json").read_text())
    assert table["AP50"]["mean"] == [results["mean AP50"]] * 2 and table["seeds"] == [0, 0]
    assert table["COCO"] == {name: [value] * 2 for name, value in results["COCO"].items()} and len(table["COCO"]) == 12
    assert "COCO's numbers" in done.stdout and results["COCO AP"].keys() == results["AP50"].keys()
    assert "2 runs, set val" in done.stdout
    shutil.copytree(cwd / "runs" / "a", tmp_path / "b")
    for name, content, message in (("results.json", "[]", "must hold set, AP50, mean AP50, errors, seconds, got no JSON object"), ("config.json", "{}", "got no seed")):
        before = (tmp_path / "b" / name).read_text()
        (tmp_path / "b" / name).write_text(content)
        told = run("table.py", tmp_path / "b", cwd=cwd, code=1).stderr
        assert told.startswith("error: ") and f"{name} must hold" in told and message in told
        (tmp_path / "b" / name).write_text(before)
