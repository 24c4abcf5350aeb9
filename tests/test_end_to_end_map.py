"""examples/end_to_end_map.py, called in this process on a handful of scenes and a net of few channels."""
import contextlib
import dataclasses
import functools
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

import fake_cupy
from tinydet import augment, data, draw, emulate, evaluate, optim, scenes, train, use
from tinydet.models import fast_rcnn, fast_rcnn_map
from tinydet.ops import map_loss

from conftest import arrays_in, same_bits
from test_examples import voc  # noqa: F401  a fixture

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import common  # noqa: E402
import detect  # noqa: E402
import end_to_end_map as program  # noqa: E402
import ohem  # noqa: E402

KEPT = ("metrics.jsonl", "curve.json", "detections.json")
TINY = ["--scenes", "6", "--steps", "4", "--measure-every", "2", "--checkpoint-every", "2", "--batch", "4", "--windows", "60", "--candidates", "20",
        "--watch", "2", "--lr", "0.002", "--scores", "raw", "--score-weight", "0.0001"]
WINDOWS = {"sizes": [24.0, 48.0], "ratios": [1.0], "step": 0.5}
FILES = {"config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "detections.json", "results.json", "loss.png", "precision_recall.png",
         "detections.png", "false_positives", "curve.json", "curve.png"}
TESTING = fast_rcnn.Testing(short=(48,), longest=96, nms=0.4, near=33.0)


@pytest.fixture(scope="module", autouse=True)
def few_channels_and_scenes_painted_once():
    table = fast_rcnn.Table((("conv1", 4, 2, 1, 4), ("max", 2, 2), ("conv2", 3, 1, 1, 6)), 3, 1 / 4, (16,), norm=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fast_rcnn.TABLES, "small", table)
        patch.setattr(scenes, "scenes", functools.cache(scenes.scenes))
        yield


def a_net(path, classes=scenes.CLASSES, settings=None, steps=0):
    """Weights as examples/ohem.py leaves them, of a net that says something, trained for so many steps."""
    spec = fast_rcnn.Spec(tuple(classes), short=(40, 48), longest=96, dropout=0.0, mean=(118.0,) * 3, std=(60.0,) * 3)
    net, examples = fast_rcnn.FastRCNN(spec, np.random.default_rng(1)), scenes.scenes(6, 0, "train")
    optimizer, windows = optim.SGD(net, 0.9), program.proposals.for_examples(WINDOWS, examples) if steps else None
    for i in range(steps):
        rng = np.random.default_rng(i)
        images, found, boxes, labels, _ = zip(*(fast_rcnn.training_image(spec, e, w, rng, jitter=4) for e, w in zip(examples, windows)))
        regions = [fast_rcnn.label(spec, *one) for one in zip(found, boxes, labels)]
        fast_rcnn.step(net, fast_rcnn.batch(net, images), regions, fast_rcnn.Sampler("random", 192), rng)
        optimizer.step(0.05)
    for name, factor in (("classifier.w", 30), ("regressor.w", 20), ("trunk.conv1_norm.var", 2)) if not steps else ():
        net.arrays()[name][...] *= factor
    fast_rcnn.save(net, path, {"windows": WINDOWS, "testing": dataclasses.asdict(TESTING), "cut": {}} if settings is None else settings)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with use("numba"):
        return a_net(tmp_path_factory.mktemp("weights") / "weights.npz", steps=60)


def start(out, *more, pictures=False):
    """What main returns. Without pictures nothing is drawn."""
    args = program.arguments([*TINY, "--out", str(out), *map(str, more)])
    with use(args.backend) as put, pytest.MonkeyPatch.context() as patch:
        if not pictures:
            for name in ("save", "loss_curves", "measurements", "precision_recall", "detections_sheet", "false_positives", "profiles"):
                patch.setattr(draw, name, lambda *a, **b: None)
        return program.main(args, put)


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mapped(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    start(out, "--weights", weights, pictures=True)
    return out / "map"


@pytest.fixture(scope="module")
def soft(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    start(out, "--weights", weights, "--loss", "softmax", "--name", "further")
    return out / "further"


def detected(net, examples, testing):
    with use("numba"):
        windows = program.proposals.for_examples(WINDOWS, examples)
        return [fast_rcnn.detect(net, e.image(), p, testing) for e, p in zip(examples, windows)]


# What a run leaves

@pytest.mark.parametrize("loss", ["map", "softmax"])
def test_a_run_leaves_everything_in_its_folder(loss, weights, request):
    folder = request.getfixturevalue({"map": "mapped", "softmax": "soft"}[loss])
    if loss == "softmax":                                               # not drawn here
        assert {p.name for p in folder.iterdir()} == {name for name in FILES if not name.endswith("png")} - {"false_positives"}
    else:
        assert {p.name for p in folder.iterdir()} == FILES | {"profiles"}
        assert [p.name for p in sorted((folder / "profiles").iterdir())] == ["000000.png", "000002.png", "000004.png"]
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 50, path
    results, config = read(folder / "results.json"), read(folder / "config.json")
    assert config["weights"] == str(weights.resolve()) and (config["loss"], config["batch"]) == (loss, 4)
    assert results["set"] == "val" and results["seconds"] >= 0 and results["training_seconds"] > 0 and results["memory_MB"] > 10
    assert results["curve"] == read(folder / "curve.json")
    assert [p["step"] for p in results["curve"]] == [0, 2, 4] and results["curve"][-1]["mean AP50"] == results["mean AP50"]
    net, settings = fast_rcnn.load(folder / "weights.npz")
    testing = dataclasses.replace(TESTING, short=[48], scores="raw" if loss == "map" else "softmax", min_score=0.0, per_class=20, limit=120)
    assert settings["windows"] == WINDOWS and set(settings["cut"]) == set(scenes.CLASSES)
    assert settings["testing"] == results["testing"] == dataclasses.asdict(testing)
    assert net.spec == fast_rcnn.load(weights)[0].spec
    held_out, watched = scenes.scenes(2, 0, "val"), scenes.scenes(6, 0, "train")[:2]
    found = detected(net, held_out, testing)
    assert read(folder / "detections.json") == common.records(found, held_out, scenes.CLASSES) and sum(len(s) for *_, s in found) > 20
    assert any(s.min() < 0 for *_, s in found) == (loss == "map")
    for at, of in ((0, weights), (-1, folder / "weights.npz")):         # from the start to the end
        net = fast_rcnn.load(of)[0]
        for name, examples in (("mean AP50", held_out), ("train AP50", watched)):
            told = evaluate.mean_ap(evaluate.voc(detected(net, examples, testing), examples, scenes.CLASSES))
            assert results["curve"][at][name] == pytest.approx(told, abs=1e-9)


def pictures_of(net, i, seed=0, batch=4, most=60):
    """What step i looks at: the net's input, windows and objects of each image, written anew; and the random state behind it."""
    examples, rng = scenes.scenes(6, 0, "train"), np.random.default_rng([seed, i])
    for j in rng.choice(6, batch, replace=False):
        mirrored, e = rng.integers(2), examples[j]
        factor = min(48 / min(e.size), 96 / max(e.size))                # the largest of the net's scales
        both = np.concatenate([e.boxes, program.proposals.windows(*e.size, **WINDOWS)])
        image, both = augment.scale(e.image(), both, factor)
        if mirrored:
            image, width = image[:, ::-1], image.shape[1]
            both = np.column_stack([width - both[:, 2], both[:, 1], width - both[:, 0], both[:, 3]])
        boxes, proposals = both[:len(e.boxes)], both[len(e.boxes):]
        if len(proposals) > most:
            proposals = proposals[np.sort(rng.choice(len(proposals), most, replace=False))]
        yield rng, image, proposals, boxes, e


def trained_here(net, step, lr, steps=4):
    optimizer, rate, told = optim.SGD(net, 0.9, 5e-4), optim.cosine_schedule(lr, steps, 0), []
    with use("numba"):
        for i in range(steps):
            told.append(step(i))
            optimizer.step(rate(i))
    return told


def agrees(folder, net, told):
    for line, values in zip(lines(folder), told, strict=True):
        for name, value in values.items():
            assert line[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    for name, a in fast_rcnn.load(folder / "weights.npz")[0].arrays().items():
        assert_allclose(a, net.arrays()[name], rtol=1e-4, atol=1e-6, err_msg=name)


def views_of(net, i, seed=0):
    """What step i trains on, of a trunk that is frozen."""
    return [fast_rcnn_map.view(net.spec, image.shape[:2], windows, boxes, e.labels, e.difficult, maps=net.features(fast_rcnn.batch(net, [image]))[0])
            for _, image, windows, boxes, e in pictures_of(net, i, seed)]


def test_it_trains_for_map_by_its_settings(mapped, weights):
    """The program's losses and weights are those of its parts put together here."""
    net = fast_rcnn_map.freeze(fast_rcnn.load(weights)[0], "head")
    objective = fast_rcnn_map.Objective(most=20, nms=0.4)
    told = trained_here(net, lambda i: fast_rcnn_map.step(net, views_of(net, i), objective, [0, i]), 0.002)
    assert all(0 < values["map_loss"] < 1 and values["box"] > 0 for values in told)
    agrees(mapped, net, told)


def test_dropout_has_new_masks_each_step_and_measuring_is_no_training(weights, tmp_path, monkeypatch):
    """With a clock on which only a step, a measurement and the pictures after it take time."""
    net, settings = fast_rcnn.load(weights)
    net.spec = dataclasses.replace(net.spec, dropout=0.5)
    fast_rcnn.save(net, tmp_path / "dropout.npz", settings)
    net = fast_rcnn_map.freeze(fast_rcnn.load(tmp_path / "dropout.npz")[0], "head")
    objective, clock = fast_rcnn_map.Objective(most=20, nms=0.4), [0.0]
    told = trained_here(net, lambda i: fast_rcnn_map.step(net, views_of(net, i, 3), objective, [3, i]), 0.002, 3)

    def slow(f, seconds):
        def slowly(*a, **b):
            clock[0] += seconds
            return f(*a, **b)
        return slowly
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(fast_rcnn, "detect", slow(fast_rcnn.detect, 1000.0))
    monkeypatch.setattr(fast_rcnn_map, "step", slow(fast_rcnn_map.step, 1.5))
    start(tmp_path, "--weights", tmp_path / "dropout.npz", "--seed", "3", "--steps", "3", "--measure-every", "1")
    agrees(tmp_path / "map", net, told)
    assert read(tmp_path / "map" / "results.json")["training_seconds"] == 4.5 and clock[0] > 15000


def test_a_twentieth_of_the_steps_warms_up(weights, tmp_path, monkeypatch):
    """Of fewer than 20 steps none does: see the others."""
    for steps, warm in ((19, 0), (20, 1), (65, 3)):
        def schedule(lr, *given, wanted=(steps, warm)):
            assert lr == 0.002 and given == wanted
            raise KeyboardInterrupt
        monkeypatch.setattr(optim, "cosine_schedule", schedule)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, "--weights", weights, "--steps", steps)


def test_it_is_tested_as_its_source_but_for_what_its_loss_does_not_see(tmp_path):
    """Never with boxes that go in once more; the candidates are those of the loss, all are kept, and no score is too low."""
    given = fast_rcnn.Testing(short=[40, 48], longest=90, near=30.0, nms=0.45, min_score=0.2, limit=7, iterate=True, again=0.1, vote=0.6, chunk=100)
    path = a_net(tmp_path / "a.npz", settings={"windows": WINDOWS, "testing": dataclasses.asdict(given)})
    for words, scores in ((["--scores", "raw"], "raw"), ([], "softmax"), (["--scores", "raw", "--loss", "softmax"], "softmax")):
        args = program.arguments(["--weights", str(path), "--candidates", "9", *words])
        net, source, testing = program.started(args, np.asarray, scenes.CLASSES)
        assert testing == dataclasses.replace(given, min_score=0.0, limit=54, iterate=False, scores=scores, per_class=9)
        assert source == WINDOWS and net.parts["trunk"].frozen


def test_what_says_where_the_data_lie_goes_on_to_the_source(tmp_path, monkeypatch):
    options = {}

    def trained(args, put, module, name, *words):
        options["found"] = vars(module.arguments(list(words))), name
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "trained", trained)
    for words, name, wanted in (
            (["--scenes", "9"], "softmax", {"scenes": 9, "data": None, "proposals": None}),
            (["--data", "a/cells", "--train-set", "b", "--eval-set", "c"], "softmax-cells", {"data": "a/cells", "train_set": "b", "eval_set": "c"}),
            (["--data", "a/cells", "--proposals", "p.json"], "softmax-cells", {"data": "a/cells", "proposals": "p.json"}),
            (["--proposals", "p.json"], "softmax", {"scenes": 400, "data": None, "proposals": "p.json"})):
        with pytest.raises(KeyboardInterrupt):
            program.started(program.arguments(["--out", str(tmp_path), *words]), np.asarray, scenes.CLASSES)
        found, called = options["found"]
        assert called == name and wanted.items() <= found.items() and found["sampler"] == "random"


def test_it_trains_by_softmax_on_the_same_batches(soft, weights):
    net = fast_rcnn_map.freeze(fast_rcnn.load(weights)[0], "head")

    def step(i):
        maps, regions = [], []
        for rng, image, windows, boxes, e in pictures_of(net, i):
            near = np.concatenate([fast_rcnn.jittered(boxes, 4, image.shape[:2], rng), windows])
            regions.append(fast_rcnn.label(net.spec, near, boxes, e.labels, e.difficult))
            maps.append(net.features(fast_rcnn.batch(net, [image]))[0][0])
        stacked = np.zeros((4, max(len(m) for m in maps), max(m.shape[1] for m in maps), 6), np.float32)
        for m, y in zip(maps, stacked):
            y[:len(m), :m.shape[1]] = m
        values, _, *given = fast_rcnn.head_step(net, stacked, regions, fast_rcnn.Sampler("random", 4 * 64), rng)
        net.backward_head(*given)
        return values
    agrees(soft, net, trained_here(net, step, 0.002))


@pytest.mark.parametrize("words, expected", [
    ([], {}),
    (["--estimator", "env", "--reach", "2.5", "--least", "0.1", "--ap", "interp", "--log", "--scores", "raw", "--candidates", "30"],
     {"estimator": "env", "reach": 2.5, "least": 0.1, "ap": "interp", "log": True, "scores": "raw", "most": 30}),
    (["--delta", "0.5", "--kappa", "2", "--box-weight", "0.25", "--softmax-weight", "0.1", "--score-weight", "0.01", "--clip", "3",
      "--centre"],
     {"delta": 0.5, "kappa": 2.0, "box_weight": 0.25, "softmax_weight": 0.1, "score_weight": 0.01, "clip": 3.0, "centre": True})])
def test_every_setting_reaches_the_objective(words, expected):
    assert program.objective_of(program.arguments(words), 0.45) == fast_rcnn_map.Objective(**{"nms": 0.45, "scores": "log_odds", "score_weight": 0.01, **expected})


def test_defaults_depend_on_loss_and_data():
    given = [], ["--loss", "softmax", "--steps", "11"], ["--data", "d", "--lr", "0.1", "--batch", "5"]
    plain, soft, folder = map(program.arguments, given)
    assert (plain.batch, plain.lr, plain.measure_every, plain.name, plain.trains) == (32, 0.0003, 12, "map", "head")
    assert (soft.batch, soft.lr, soft.measure_every) == (32, 0.005, 3)
    assert (folder.batch, folder.lr) == (5, 0.1)


# Stopped and resumed; what is kept and what stays

def stop_at(monkeypatch, loss, call):
    """Let that step fail."""
    module, name = (fast_rcnn_map, "step") if loss == "map" else (program, "softmax_step")
    calls, original = [], getattr(module, name)

    def step(*a):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*a)
    monkeypatch.setattr(module, name, step)


@pytest.mark.parametrize("trains", ["head", "all"])
@pytest.mark.parametrize("loss", ["map", "softmax"])
def test_a_stopped_run_goes_on_to_the_same_bits_and_what_is_frozen_stays(loss, trains, weights, tmp_path, request, monkeypatch):
    """Stopped in the fourth step, after the checkpoint of the second."""
    name = {"map": "map", "softmax": "further"}[loss]
    more = ["--weights", weights, "--loss", loss, "--name", name, "--trains", trains]
    if trains == "head":
        whole = request.getfixturevalue({"map": "mapped", "softmax": "soft"}[loss])
    else:
        start(tmp_path / "whole", *more)
        whole = tmp_path / "whole" / name
    folder = tmp_path / "part" / name
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, loss, 4)
        start(tmp_path / "part", *more, "--workers", "0")
    assert (folder / "checkpoint.npz").exists() and not (folder / "weights.npz").exists()
    start(tmp_path / "part", *more, "--resume", "--workers", "2")
    results = read(folder / "results.json")
    assert results["seconds"] is results["training_seconds"] is None and results["memory_MB"] > 10
    same_bits(folder, whole, KEPT)
    before, after = (fast_rcnn.load(path / "weights.npz")[0].arrays() for path in (weights.parent, folder))
    stays = {name for name, w in after.items() if (w == before[name]).all()}
    trunk, norm = {name for name in before if name.startswith("trunk.")}, {name for name in before if "_norm." in name}
    assert len(norm) == 8 and stays == {"head": trunk, "all": norm}[trains]


@pytest.mark.parametrize("loss", ["map", "softmax"])
def test_maps_that_do_not_fit_are_made_anew_to_the_same_bits(loss, weights, tmp_path, request, monkeypatch):
    whole = request.getfixturevalue({"map": "mapped", "softmax": "soft"}[loss])
    trunks, features = [], fast_rcnn.FastRCNN.features

    def counted(net, x, *more):
        trunks.append(x.shape)
        return features(net, x, *more)
    monkeypatch.setattr(fast_rcnn.FastRCNN, "features", counted)
    runs = []
    for kept in (common.KEPT, 0):
        monkeypatch.setattr(common, "KEPT", kept)
        trunks.clear()
        start(tmp_path / str(kept), "--weights", weights, "--loss", loss, "--name", whole.name, "--workers", "0")
        runs.append(len(trunks))
        same_bits(tmp_path / str(kept) / whole.name, whole, KEPT)
    looked, ends = 3 * 4, 4 if loss == "map" else 0                     # three measurements of four images; in the end a profile of the first batch
    assert runs[1] == looked + 4 * 4 + ends and looked < runs[0] < runs[1] - ends


# The source net

def test_the_source_net_is_trained_first_gone_on_with_and_taken(tmp_path, monkeypatch, capsys):
    original, calls, steps = ohem.arguments, [], fast_rcnn.step

    def arguments(argv):
        calls.extend([argv] * ("--out" in argv))                        # else only looked at
        return original(["--steps", "3", "--images", "2", "--short", "48", "--checkpoint-every", "1", "--measure-every", "3", "--draw-every", "3",
                         "--most", "60", "--min-score", "0.2", "--least", "0.3", "--share", "0.3", *argv])
    monkeypatch.setattr(ohem, "arguments", arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count = []

        def stopped(*a):
            count.append(0)
            if len(count) == 3:
                raise KeyboardInterrupt
            return steps(*a)
        patch.setattr(fast_rcnn, "step", stopped)
        start(tmp_path, "--seed", "5", "--scenes", "4")
    assert {p.name for p in tmp_path.iterdir()} == {"softmax"} and not (tmp_path / "softmax" / "weights.npz").exists()
    start(tmp_path, "--seed", "5", "--scenes", "4", "--steps", "1", "--resume")          # as common.start says after Ctrl-C
    assert ["--resume" in argv for argv in calls] == [False, True] and capsys.readouterr().out.count("first the source net, into") == 2
    config = read(tmp_path / "softmax" / "config.json")
    assert (config["seed"], config["sampler"], config["scenes"]) == (5, "random", 4)
    start(tmp_path, "--seed", "6", "--scenes", "4", "--steps", "1", "--loss", "softmax", "--name", "further")
    told = capsys.readouterr().out
    assert len(calls) == 2 and "first the source net" not in told and f"starts from {tmp_path / 'softmax'}, of seed 5" in told     # it is there
    source = fast_rcnn.load(tmp_path / "softmax" / "weights.npz")
    for name in ("map", "further"):
        net, settings = fast_rcnn.load(tmp_path / name / "weights.npz")
        assert net.spec == source[0].spec and settings["windows"] == source[1]["windows"]
        assert read(tmp_path / name / "config.json")["weights"] == str((tmp_path / "softmax" / "weights.npz").resolve())
        for key, w in source[0].arrays().items():
            assert (w == net.arrays()[key]).all() == key.startswith("trunk."), key


def test_the_name_of_the_source_net_is_refused(capsys):
    for words, name in ((["--loss", "softmax", "--name", "softmax"], "softmax"), (["--data", "a/cells", "--name", "softmax-cells"], "softmax-cells")):
        with pytest.raises(SystemExit):
            program.arguments(words)
        assert f"--name must not be that of the softmax-trained net, {name}" in " ".join(capsys.readouterr().err.split())


# Variants

def test_the_other_estimator_and_scores(weights, mapped, tmp_path):
    start(tmp_path, "--weights", weights, "--estimator", "env", "--name", "env")
    start(tmp_path, "--weights", weights, "--scores", "log_softmax", "--log", "--softmax-weight", "0.5", "--name", "p")
    for name in ("env", "p"):
        told, first = lines(tmp_path / name), lines(mapped)
        assert all(np.isfinite(v) for line in told for v in line.values())
        assert told[0]["loss"] != first[0]["loss"] or told[1]["loss"] != first[1]["loss"]
    assert lines(tmp_path / "env")[0]["map_loss"] == first[0]["map_loss"] and "softmax" not in first[0]     # before the first update all is the same
    assert read(tmp_path / "p" / "results.json")["testing"]["scores"] == "softmax" and told[0]["softmax"] > 0


def test_all_trains_and_no_map_is_kept(weights, tmp_path, monkeypatch):
    frozen, seen, step = [], [], fast_rcnn_map.step

    def noted(net, views, *more):
        frozen.append(net.parts["trunk"].frozen)
        seen.append([(v.x is None, v.maps is None) for v in views])
        return step(net, views, *more)
    monkeypatch.setattr(fast_rcnn_map, "step", noted)
    for trains in ("all", "head"):
        start(tmp_path, "--weights", weights, "--trains", trains, "--name", trains, "--steps", "2")
    assert frozen == [False] * 2 + [True] * 2 and seen == [[(False, True)] * 4] * 2 + [[(True, False)] * 4] * 2
    first, second = lines(tmp_path / "all"), lines(tmp_path / "head")
    assert first[0]["map_loss"] == pytest.approx(second[0]["map_loss"], abs=1e-6) and first[1]["loss"] != second[1]["loss"]


# Folders, and detection with the weights

def test_a_folder_is_trained_on_and_detect_gives_its_detections(voc, tmp_path):  # noqa: F811
    classes = data.read_voc(voc, "train")[1]
    weights = a_net(tmp_path / "weights.npz", classes)
    start(tmp_path, "--data", voc, "--weights", weights, "--name", "cells", "--steps", "2")
    folder = tmp_path / "cells"
    records = read(folder / "detections.json")
    held_out, _ = data.read_voc(voc, "val", classes)
    assert {r["image"] for r in records} == {e.name for e in held_out} and {r["class"] for r in records} <= set(classes)
    args = detect.arguments(["--weights", str(folder / "weights.npz"), "--json", *(str(voc / "JPEGImages" / f"{e.name}.png") for e in held_out)])
    with use(args.backend) as put:
        told = detect.main(args, put)
    assert sorted(told, key=str) == sorted(records, key=str) and not all(0 <= r["score"] <= 1 for r in told)
    args = detect.arguments(["--weights", str(folder / "weights.npz"), "--out", str(tmp_path / "drawn"),
                             str(voc / "JPEGImages" / f"{held_out[0].name}.png")])
    with use(args.backend) as put:
        detect.main(args, put)
    assert (tmp_path / "drawn" / f"{held_out[0].name}.png").is_file()


def test_proposals_from_a_file(voc, tmp_path):  # noqa: F811
    """A net that was trained on such needs them, and its run keeps no windows."""
    examples, classes = data.read_voc(voc, "all")
    rng = np.random.default_rng(0)
    boxes = {e.name: np.concatenate([e.boxes, rng.random((30, 4)) * 40 + [0, 0, 60, 60]]).tolist() for e in examples}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    weights = a_net(tmp_path / "weights.npz", data.read_voc(voc, "train")[1], {"windows": None, "testing": dataclasses.asdict(TESTING)})
    given = ["--data", voc, "--weights", weights, "--steps", "1"]
    with pytest.raises(ValueError, match=r"^end_to_end_map: .*weights\.npz was trained on proposals from a file: give those of these images by"):
        start(tmp_path, *given)
    assert not (tmp_path / "map").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", data.DefectWarning)             # boxes cut at the border
        start(tmp_path, *given, "--proposals", tmp_path / "boxes.json")
    assert fast_rcnn.load(tmp_path / "map" / "weights.npz")[1]["windows"] is None


# What cannot be

def test_what_cannot_be_is_said_before_a_run_begins(weights, tmp_path, capsys):
    for wrong, message in (
            (["--lr", "0"], "--lr must be positive"), (["--windows", "0"], "whole number of at least 1"), (["--ap", "voc"], "invalid choice: 'voc'"),
            (["--estimator", "fd"], "invalid choice: 'fd'"), (["--scores", "softmax"], "invalid choice: 'softmax'"),
            (["--name", "a/b"], "--name be the name of a folder"), (["--trains", "trunk"], "invalid choice: 'trunk'"),
            (["--jitter", "-1"], "whole number of at least 1"), (["--seed", "-1"], "--seed not be negative")):
        with pytest.raises(SystemExit):
            program.arguments(wrong)
        assert message in capsys.readouterr().err
    others = a_net(tmp_path / "others.npz", ("a", "b"))
    order = a_net(tmp_path / "order.npz", scenes.CLASSES[::-1])
    none = a_net(tmp_path / "none.npz", settings={})
    strange = a_net(tmp_path / "strange.npz", settings={"windows": WINDOWS, "testing": {"colour": 1}})
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    given = ["--weights", weights]
    for wrong, error, message in (
            (["--weights", others], ValueError, r"^end_to_end_map: .*others\.npz must have the classes of the data, cross, .*triangle, got a, b$"),
            (["--weights", order], ValueError, r"order\.npz must have the classes of the data, .*, got triangle, star"),
            (["--weights", none], ValueError, r"none\.npz was trained on proposals from a file: give those of these images by --proposals"),
            (["--weights", strange], ValueError, r"^end_to_end_map: .*strange\.npz must hold settings of examples/ohem\.py, got: .*colour"),
            (["--weights", text], ValueError, "text.npz must be a weights or checkpoint"),
            (["--weights", tmp_path / "no.npz"], FileNotFoundError, "there is no file .*no.npz"),
            ([*given, "--data", tmp_path / "nowhere"], FileNotFoundError, "nowhere"),
            ([*given, "--data", tmp_path], (ValueError, FileNotFoundError), tmp_path.name),
            ([*given, "--proposals", tmp_path / "no.json"], FileNotFoundError, "no.json"),
            ([*given, "--delta", "-1"], ValueError, "delta must be a number above 0"),
            ([*given, "--kappa", "nan"], ValueError, "kappa must be a number above 0"),
            ([*given, "--box-weight", "-1"], ValueError, "box_weight must be finite"),
            ([*given, "--clip", "0"], ValueError, "clip must be None or a number above 0"),
            ([*given, "--momentum", "1"], ValueError, "momentum must lie in"),
            ([*given, "--weight-decay", "nan"], ValueError, "weight_decay must be finite")):
        with pytest.raises(error, match=message):
            start(tmp_path / "out", *wrong)
    for words, refused in ((["emulated", "257"], True), (["cuda", "257"], True), (["emulated", "256"], False), (["numba", "257"], False),
                           (["emulated", "257", "--loss", "softmax"], False)):
        backend, most, *more = words
        args = [*TINY, "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "no.npz"), "--backend", backend, "--candidates", most, *more]
        message = rf"^end_to_end_map: --candidates must be at most 256 on --backend {backend}, got 257$" if refused else "there is no file .*no.npz"
        with pytest.raises(ValueError if refused else FileNotFoundError, match=message):
            program.main(program.arguments(args), np.asarray)
    assert not (tmp_path / "out").exists()


def test_runs_are_not_overwritten_and_resume_keeps_the_settings(mapped, weights):
    given = ["--weights", weights]
    with pytest.raises(FileExistsError, match="holds a run already"):
        start(mapped.parent, *given)
    with pytest.raises(ValueError, match="kappa was 1.0, is 2.0"):
        start(mapped.parent, *given, "--resume", "--kappa", "2")
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        start(mapped.parent, *given, "--resume", "--name", "none")


# Profiles

@pytest.mark.parametrize("change", [{}, {"estimator": "env", "log": True, "reach": 2.5, "ap": "11pt"},
                                    {"estimator": "env", "least": 0.3, "scores": "raw"}, {"delta": 0.4, "kappa": 7.0},
                                    {"kappa": 0.3, "nms": 0.5, "match": 0.4, "most": 9}],
                         ids=lambda change: " ".join(change) or "plain")
@pytest.mark.parametrize("difficult", [None, 1])
def test_profiles_show_the_windows_of_the_largest_pseudo_gradients(change, difficult, weights, tmp_path, monkeypatch):
    """Of each kind, told apart here one by one; all that is drawn is of AP of the class, of how many classes there are or how the loss is written."""
    net, drawn = fast_rcnn_map.freeze(fast_rcnn.load(weights)[0], "head"), {}
    monkeypatch.setattr(draw, "profiles", lambda d, path: drawn.update({"drawn": d, "path": path}))
    objective = fast_rcnn_map.Objective(**{"most": 20, "nms": 0.4, **change})
    with use("numba"):
        views = [v._replace(difficult=v.difficult | (v.labels == difficult)) for i in range(4) for v in views_of(net, i)]
        program.profiles(net, views, objective, scenes.CLASSES, [0, 0], tmp_path / "profiles" / "a.png")
        scores, deltas = fast_rcnn_map.outputs(net, views, objective, [0, 0])
        given = fast_rcnn_map.ranked(net, fast_rcnn_map.ranking_scores(scores, objective.scores), deltas, views)
        widths = {name: getattr(objective, name) for name in ("delta", "kappa", "reach", "least")}
        shared = {name: getattr(objective, name) for name in ("nms", "match", "most", "ap")}
        slopes = {name: -map_loss.loss(*given, estimator=name, **widths, **shared)[1] for name in ("sde", "env")}
        aps, kept, flags = map_loss.average_precisions(*given, **shared)
    assert drawn["path"] == tmp_path / "profiles" / "a.png" and drawn["path"].parent.is_dir()
    held = {k for v in views for k in v.labels.tolist()}
    present = {k for v in views for k in v.labels[~v.difficult].tolist()}
    assert held - present == ({difficult} if difficult is not None else set()) and len(present) > 2
    largest = {}
    for i, k in np.ndindex(*kept.shape):
        size = abs(slopes[objective.estimator][i, k])
        kind = "suppressed" if not kept[i, k] else {1: "kept, a true positive", 0: "kept, a false positive", -1: None}[int(flags[i, k])]
        if kind and size > 0 and size > largest.get(kind, (0.0,))[0]:
            largest[kind] = size, i, k
    assert {"kept, a true positive", "kept, a false positive"} <= {*largest}
    order = [kind for kind in ("kept, a true positive", "kept, a false positive", "suppressed") if kind in largest]
    assert list(drawn["drawn"]) == [f"{scenes.CLASSES[largest[kind][2]]}, {kind}" for kind in order]
    for kind, p in zip(order, drawn["drawn"].values()):
        _, i, k = largest[kind]
        assert p.score == given[0][i, k] and p.now == pytest.approx(aps[k], abs=1e-12)
        for name, slope in (("sde", p.step), ("env", sum(p.lines) / 2)):
            assert slope == pytest.approx(slopes[name][i, k] * len(present), rel=1e-5, abs=1e-9)
        assert p.score <= p.blocker if kind == "suppressed" else not p.score < p.blocker           # tied where windows are alike
        assert all(getattr(p, name) == change[name] for name in ("delta", "reach", "least") if name in change)


def test_no_profile_where_nothing_has_a_pseudo_gradient(weights, tmp_path, monkeypatch):
    net = fast_rcnn_map.freeze(fast_rcnn.load(weights)[0], "head")
    monkeypatch.setattr(draw, "profiles", lambda *a: pytest.fail("drawn"))
    with use("numba"):
        bare = [v._replace(boxes=v.boxes[:0], labels=v.labels[:0], difficult=v.difficult[:0]) for v in views_of(net, 0)]
        program.profiles(net, bare, fast_rcnn_map.Objective(most=20), scenes.CLASSES, [0, 0], tmp_path / "none" / "a.png")
    assert not (tmp_path / "none").exists()


def test_a_run_without_any_object_to_find(weights, tmp_path, monkeypatch):
    """Nothing to measure: null in what is kept; no profile; the net trains on, if only its scores shrink."""
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "difficult": np.zeros(0, bool)}
    bare = [dataclasses.replace(e, **empty) for e in scenes.scenes(6, 0, "train")]
    monkeypatch.setattr(common, "read", lambda args: (bare, bare[:1], scenes.CLASSES))
    for loss in ("map", "softmax"):
        start(tmp_path, "--weights", weights, "--steps", "2", "--loss", loss, "--name", f"{loss}-bare")
        folder = tmp_path / f"{loss}-bare"
        assert not (folder / "profiles").exists()
        assert read(folder / "curve.json")[-1] == {"step": 2, "mean AP50": None, "train AP50": None}
    told = lines(tmp_path / "map-bare")
    assert all(line["map_loss"] == line["box"] == line["norm"] == 0 and line["rows"] > 0 for line in told)
    assert all(line["loss"] == pytest.approx(1e-4 * line["scores"]) for line in told)


# On a GPU

@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_it_runs_on_the_gpu_and_gives_the_numbers_of_the_cpu(weights, tmp_path):
    few = ["--weights", weights, "--scenes", "3", "--steps", "2", "--batch", "2", "--windows", "20", "--watch", "1"]
    for backend in ("numba", "cuda"):
        with fake_cupy.installed() if backend == "cuda" else contextlib.nullcontext():
            for loss in ("map", "softmax"):
                start(tmp_path / backend, *few, "--backend", backend, "--loss", loss, "--name", f"{loss}-x", "--trains", "all")
            if backend == "cuda":
                assert {"map_loss_gradients", "roi_pool_backward", "sgd_step", "conv_dw"} <= {*fake_cupy.launches}
    for name in (p.name for p in (tmp_path / "numba").iterdir()):
        a, b = tmp_path / "numba" / name, tmp_path / "cuda" / name
        for first, second in zip(lines(a), lines(b), strict=True):
            assert first == pytest.approx(second, rel=1e-3, abs=1e-5)
        for key, w in arrays_in(a / "weights.npz").items():
            if key != "meta":
                assert_allclose(arrays_in(b / "weights.npz")[key], w, rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}")
