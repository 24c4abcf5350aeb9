"""examples/pretrain.py, transfer.py and weak_localization.py with image_level.py, called in this process on a handful of images."""
import contextlib
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import fake_cupy
from tinydet import data, draw, emulate, evaluate, optim, scenes, train, use
from tinydet import evaluate_classification as ec
from tinydet.models import oquab, oquab_patches, oquab_weak, overfeat
from tinydet.ops import logistic_loss, softmax_loss

from conftest import arrays_in, same_bits
from test_common import write_idx

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import common  # noqa: E402
import image_level  # noqa: E402
import pretrain  # noqa: E402
import transfer  # noqa: E402
import weak_localization as weak  # noqa: E402

STEPS = ["--steps", "4", "--measure-every", "2", "--checkpoint-every", "2"]
KEPT = ("metrics.jsonl", "curve.json", "ranking.json")
TINY = {pretrain: [*STEPS, "--images", "24", "--batch", "6", "--width", "0.5", "--classes", "near"],
        transfer: [*STEPS, "--scenes", "8", "--eval-scenes", "2", "--lambdas", "1", "2", "--batch", "8", "--adapt", "10"],
        weak: [*STEPS, "--scenes", "8", "--eval-scenes", "2", "--frame", "48", "--cached", "2", "--batch", "4", "--adapt", "10"]}
NAMES = {pretrain: "pretrain", transfer: "transfer", weak: "weak_localization"}
KS = (1, 3, 5, 10)
SHARED = {"config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "results.json", "curve.json", "loss.png", "curve.png"}
FEATURES = [f"features.fc{n}.{p}" for n in (6, 7) for p in "wb"]


@pytest.fixture(scope="module", autouse=True)
def scenes_painted_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "scenes", functools.cache(scenes.scenes))
        yield


def start(program, out, *more, pictures=False):
    """What main returns. Without pictures nothing is drawn."""
    args = program.arguments([*TINY[program], "--out", str(out), *map(str, more)])
    with use(args.backend) as put, pytest.MonkeyPatch.context() as patch:
        if not pictures:
            for module, name in ((draw, "save"), (draw, "loss_curves"), (draw, "measurements"), (draw, "precision_recall"), (image_level, "finish")):
                patch.setattr(module, name, lambda *a, **b: None)
        return program.main(args, put)


def read(path):
    return json.loads(path.read_text())


def features_of(folder):
    """What a run of transfer.py keeps of the frozen layers; None without such a file."""
    paths = list(folder.glob("features-????????.npy"))
    assert len(paths) <= 1
    return np.load(paths[0], allow_pickle=False) if paths else None


def files_in(folder):
    return {"features" if p.name.startswith("features-") else p.name for p in folder.iterdir()}


def same_images(change):
    """image_level.read of TINY, with each set of examples changed by change(examples, which)."""
    def read(args):
        return [change(scenes.scenes(8, 0, "train"), "train"), change(scenes.scenes(2, 0, "val"), "val"), scenes.CLASSES]
    return read


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def source(out):
    """The run folder of a tiny source net, where the other programs look for it."""
    start(pretrain, out, pictures=True)
    return out / "pretrain"


POINTS = {}                         # {program: the points of each variant that has some, in order}


def start_noting_points(program, out):
    found, original = POINTS.setdefault(program, []), ec.location_hits

    def location_hits(points, *more):
        found.append(points)
        return original(points, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ec, "location_hits", location_hits)
        start(program, out, pictures=True)
    return out / NAMES[program]


@pytest.fixture(scope="module")
def transferred(out, source):
    return start_noting_points(transfer, out)


@pytest.fixture(scope="module")
def weakly(out, source):
    return start_noting_points(weak, out)


DONE = {pretrain: "source", transfer: "transferred", weak: "weakly"}


# What a run leaves

def check_pictures(folder, least=50):
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= least, path


def check_rankings(folder, there, variants):
    """Every ranking gives its number in results.json, counted anew from its scores and hits. Returns {variant: ranking}."""
    results, found = read(folder / "results.json"), {}
    assert {p.name for p in folder.glob("ranking*.json")} == {f"ranking_{v}.json" if v else "ranking.json" for v in variants}
    assert set(results["also"]) == {*variants} - {""} and results["set"] == "val" and results["images"] == 2
    for name in variants:
        ranking = found[name] = read(folder / (f"ranking_{name}.json" if name else "ranking.json"))
        told = results["also"][name] if name else results
        assert set(ranking) == {metric for metric in told if metric.endswith("_ap")} == set(variants[name])
        for metric, of in ranking.items():
            assert tuple(of) == scenes.CLASSES
            aps = []
            for k, one in enumerate(of.values()):
                assert one["positive"] == (there[:, k] == 1).tolist()
                assert [h is None for h in one["hits"]] == (there[:, k] == -1).tolist()
                counted = [(s, h) for s, h in zip(one["scores"], one["hits"]) if h is not None]
                hits = np.cumsum([h for _, h in sorted(counted, key=lambda c: -c[0])])
                if sum(one["positive"]):
                    aps.append(evaluate.average_precision(hits / sum(one["positive"]), hits / np.arange(1, len(hits) + 1)))
            assert told[metric] == pytest.approx(np.mean(aps), abs=1e-12)
    return found


def check_scores(ranking, metric, scores, points=None, tolerance=4.0, rtol=1e-5):
    """The ranking holds these scores (N, K), and hits of these points."""
    examples, there = scenes.scenes(2, 0, "val"), ec.presence(scenes.scenes(2, 0, "val"), 6)
    of = ranking[metric].values()
    assert_allclose(np.array([one["scores"] for one in of]).T, scores, rtol=rtol, atol=1e-7)
    hits = there == 1 if points is None else ec.location_hits(np.array(points), examples, tolerance) & (there == 1)
    assert [[None if y < 0 else int(h) for y, h in zip(*column)] for column in zip(there.T, hits.T)] == [one["hits"] for one in of]


def test_pretrain_leaves_everything_in_its_folder(source):
    assert {p.name for p in source.iterdir()} == {*SHARED, "wrong.json", "sheet.png", "filters.png"}
    check_pictures(source)
    net, settings = oquab.load(source / "weights.npz")
    assert settings == {} and net.spec.classes == tuple(scenes.NEAR) and (net.spec.head, net.spec.width, net.spec.dropout) == ("source", 0.5, 0.1)
    held_out = scenes.close_ups(3, 0, "val", scenes.NEAR, 37)
    p = []
    with use("numba"):
        for e in held_out:
            views = net.normalise(overfeat.ten_views(net.table, e.image(), 37))
            p.append(softmax_loss.softmax(np.asarray(net(views), np.float64)).reshape(10, 12).mean(0))
    results, true = read(source / "results.json"), np.array([e.tags[0] for e in held_out])
    assert results["set"] == "val" and results["images"] == 3 and results["seconds"] >= 0
    for error, k in (("top1_error", 1), ("top5_error", 5)):
        wrong = ec.top_k_error(np.array(p), true, k)
        assert read(source / "wrong.json")[error] == wrong.wrong.astype(int).tolist() and results[error] == wrong.error
    assert results["curve"] == read(source / "curve.json") and [point["step"] for point in results["curve"]] == [2, 4]
    assert results["curve"][-1]["top1_error"] == results["top1_error"]


def test_pretrain_trains_by_its_settings(source):
    """The program's losses and weights are those of its parts put together here."""
    examples = scenes.close_ups(24, 0, "train", scenes.NEAR, 37)
    mean, std = data.mean_std(examples)
    net = oquab.Oquab(oquab.Spec(tuple(scenes.NEAR), width=0.5, dropout=0.1, mean=mean, std=std), np.random.default_rng(0))
    optimizer, rate, losses = optim.SGD(net, 0.9, 5e-4), optim.cosine_schedule(0.03, 4, 0), []
    with use("numba"):
        for i in range(4):
            rng = np.random.default_rng([0, i])
            batch = rng.choice(24, 6, replace=False)
            views = np.stack([overfeat.training_view(net.table, examples[j].image(), rng, 37) for j in batch])
            scores, cache = net.forward(net.normalise(views), True, rng)
            value, d = softmax_loss.loss(scores[:, 0, 0], np.array([examples[j].tags[0] for j in batch]))
            net.backward(d[:, None, None], cache)
            optimizer.step(rate(i))
            losses.append(value)
    assert [json.loads(line)["loss"] for line in (source / "metrics.jsonl").read_text().splitlines()] == losses
    for name, a in oquab.load(source / "weights.npz")[0].arrays().items():
        assert_array_equal(a, net.arrays()[name], err_msg=name)


def test_transfer_leaves_everything_and_its_figures_are_those_of_the_net(transferred, source):
    examples = scenes.scenes(2, 0, "val")
    there = ec.presence(examples, 6)
    assert {name for name in files_in(transferred) if not name.startswith("ranking")} == {
        *SHARED, "features", "precision_recall.png", "maps.png", "maps_training.png", "maps", "false_positives"}
    check_pictures(transferred)
    without = [k for k in range(6) if any(k not in e.image_labels() for e in examples)]
    assert {p.name for p in (transferred / "false_positives").iterdir()} == {f"{k}_{scenes.CLASSES[k]}.png" for k in without}
    variants = {"": ["class_ap", "location_ap"], **{f"k{k}": ["class_ap"] for k in KS}, "mean": ["location_ap"], "sum": ["location_ap"],
                "whole": ["class_ap"], "middle": ["location_ap"]}
    rankings = check_rankings(transferred, there, variants)
    net, settings = oquab.load(transferred / "weights.npz")
    assert settings == {"lambdas": [1, 2], "overlap": 0.5, "k": 5} and net.spec.classes == scenes.CLASSES and net.spec.head == "strong"
    scores, whole, points, maps = {k: [] for k in KS}, [], {"mean": [], "sum": []}, []
    with use("numba"):
        for e in examples:
            def said(tiles):
                return softmax_loss.softmax(net(net.normalise(oquab_patches.cut(e.image(), tiles, 32)))[:, 0, 0].astype(float))[:, :6]
            tiles = oquab_patches.tiles(*e.size, (1, 2), 0.5)
            y = said(tiles)
            for k in KS:
                scores[k].append((y ** k).mean(0))
            whole.append(said(np.array([[0.0, 0, *e.size]]))[0])
            for reduce in points:
                heat = oquab_patches.heat_map(tiles, y, *e.size, reduce)
                first = heat.reshape(-1, 6).argmax(0)
                points[reduce].append(np.stack([first % e.size[0] + 0.5, first // e.size[0] + 0.5], 1))
            maps.append(oquab_patches.heat_map(tiles, y, *e.size))
    for k in KS:
        check_scores(rankings[f"k{k}"], "class_ap", scores[k])
    check_scores(rankings[""], "class_ap", scores[5])
    check_scores(rankings["whole"], "class_ap", whole)
    check_scores(rankings[""], "location_ap", scores[5], points["mean"])
    for reduce in points:
        check_scores(rankings[reduce], "location_ap", scores[5], points[reduce])
    middles = np.array([np.tile(np.array(e.size) / 2, (6, 1)) for e in examples])
    check_scores(rankings["middle"], "location_ap", scores[5], middles)
    assert_array_equal(POINTS[transfer], [points["mean"], points["mean"], points["sum"], middles])
    assert (np.array(points["mean"]) != points["sum"]).any()
    results = read(transferred / "results.json")
    assert results["curve"] == read(transferred / "curve.json") and [p["step"] for p in results["curve"]] == [0, 2, 4]
    assert results["curve"][-1]["class_ap"] == results["class_ap"]
    assert sorted(p.name for p in (transferred / "maps").iterdir()) == ["0.npz", "2.npz", "4.npz"]
    last = arrays_in(transferred / "maps" / "4.npz")
    for i, e in enumerate(examples):
        assert_allclose(last[str(i)], maps[i][..., e.labels.min()], rtol=1e-4)


def test_transfer_trains_on_resampled_patches_by_its_settings(transferred, source):
    examples, place = scenes.scenes(8, 0, "train"), []
    net = oquab.load(transferred / "weights.npz")[0]
    fresh = oquab.Oquab(net.spec, np.random.default_rng(0))
    oquab.take_over(fresh, oquab.load(source / "weights.npz")[0])
    for i, e in enumerate(examples):
        tiles = oquab_patches.tiles(*e.size, (1, 2), 0.5)
        place += [(i, tile, label) for tile, label in zip(tiles, oquab_patches.label(tiles, e.boxes, e.labels, 6, e.difficult))]
    kept = oquab_patches.resample(np.array([label for *_, label in place]), 6, 0.1, np.random.default_rng(0))
    assert read(transferred / "results.json")["patches"] == len(kept)
    optimizer, losses = optim.SGD(oquab.freeze(fresh, "head"), 0.9, 5e-4), []
    with use("numba"):
        y = np.concatenate([fresh.features(fresh.normalise(oquab_patches.cut(examples[i].image(), tile[None], 32))) for i, tile, _ in
                            (place[j] for j in kept)])
        assert_allclose(features_of(transferred), y, rtol=1e-4, atol=1e-5)
        y = features_of(transferred)                       # to the bit: as the program put them together
        labels = np.array([place[j][2] for j in kept])
        for i, lr in enumerate((0.05, 0.05 * 0.1, 0.05 * 0.1 ** 2, 0.05 * 0.1 ** 2)):           # a third of four steps is one
            rng = np.random.default_rng([0, i])
            batch = rng.choice(len(kept), 8, replace=False)
            scores, cache = fresh.parts["head"].forward(y[batch], True, rng)
            value, d = softmax_loss.loss(scores[:, 0, 0], labels[batch])
            fresh.parts["head"].backward(d[:, None, None], cache)
            optimizer.step(lr)
            losses.append(value)
    assert_allclose([json.loads(line)["loss"] for line in (transferred / "metrics.jsonl").read_text().splitlines()], losses, rtol=1e-6)
    for name, a in net.arrays().items():
        assert_allclose(a, fresh.arrays()[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_weak_localization_leaves_everything_and_its_figures_are_those_of_the_net(weakly):
    examples = scenes.scenes(2, 0, "val")
    there, scales = ec.presence(examples, 6), (0.5, 0.7, 1, 1.4, 2, 2.8)
    assert {p.name for p in weakly.iterdir() if not p.name.startswith("ranking")} == {
        *SHARED, "detections.json", "precision_recall.png", "maps.png", "maps_training.png", "maps", "false_positives"}
    check_pictures(weakly)
    variants = {"": ["class_ap", "location_ap"], **{f"scale-{s}": ["class_ap"] for s in scales}, "by-score": ["location_ap"],
                "stretch": ["location_ap"], "middle": ["location_ap"]}
    rankings = check_rankings(weakly, there, variants)
    net, settings = oquab.load(weakly / "weights.npz")
    assert (settings["frame"], settings["scales"], settings["align"]) == (48, [*scales], "centres")
    assert (net.spec.head, net.spec.outputs) == ("weak", 6)
    single, found, maps_of = [], {"centres": [], "stretch": []}, []
    with use("numba"):
        for e in examples:
            x, factor, size = oquab_weak.frame(net, e.image(), 48)
            maps = oquab_weak.look(net, x, scales)
            single.append([m.max((0, 1)) for m in maps])
            for align in found:
                found[align].append(oquab_weak.locate(oquab_weak.combined(net, maps, scales, 48, size, align), factor))
            maps_of.append(logistic_loss.sigmoid(oquab_weak.combined(net, maps, scales, 48, size)))
    single = np.array(single)
    points, surest = (np.array(column) for column in zip(*found["centres"]))
    check_scores(rankings[""], "class_ap", single.mean(1), rtol=1e-4)
    check_scores(rankings[""], "location_ap", surest, points, rtol=1e-4)
    check_scores(rankings["by-score"], "location_ap", single.mean(1), points, rtol=1e-4)
    stretched, surest = (np.array(column) for column in zip(*found["stretch"]))
    check_scores(rankings["stretch"], "location_ap", surest, stretched, rtol=1e-4)
    middles = np.array([np.tile(np.array(e.size) / 2, (6, 1)) for e in examples])
    check_scores(rankings["middle"], "location_ap", single.mean(1), middles, rtol=1e-4)
    assert_allclose(POINTS[weak], [points, points, stretched, middles])
    for n, s in enumerate(scales):
        check_scores(rankings[f"scale-{s}"], "class_ap", single[:, n], rtol=1e-4)
    results, detections = read(weakly / "results.json"), read(weakly / "detections.json")
    by_image = [[d for d in detections if d["image"] == e.name] for e in examples]
    assert len(detections) == sum(map(len, by_image)) > 0
    boxes = [(np.array([d["box"] for d in ds]).reshape(-1, 4), np.array([scenes.CLASSES.index(d["class"]) for d in ds], int),
              np.array([d["score"] for d in ds])) for ds in by_image]
    for iou in (0.5, 0.3, 0.1):
        by_class = evaluate.voc(boxes, examples, scenes.CLASSES, iou)
        assert results[f"box_ap_{iou}"] == pytest.approx(evaluate.mean_ap(by_class))
    assert settings["cut"] == pytest.approx({name: evaluate.best_threshold(r) for name, r in by_class.items()})
    assert results["box_ap_0.1"] >= results["box_ap_0.3"] >= results["box_ap_0.5"]
    assert results["curve"] == read(weakly / "curve.json") and [p["step"] for p in results["curve"]] == [0, 2, 4]
    assert results["curve"][-1]["class_ap"] == results["class_ap"]
    last = arrays_in(weakly / "maps" / "4.npz")
    for i, e in enumerate(examples):
        assert_allclose(last[str(i)], maps_of[i][..., e.labels.min()], rtol=1e-4)


def test_weak_localization_trains_by_its_settings(weakly, source):
    examples = scenes.scenes(8, 0, "train")
    net = oquab.load(weakly / "weights.npz")[0]
    fresh = oquab.Oquab(net.spec, np.random.default_rng(0))
    oquab.take_over(fresh, oquab.load(source / "weights.npz")[0])
    signs, losses = np.where(ec.presence(examples, 6) == 1, 1, -1) * (ec.presence(examples, 6) >= 0), []
    optimizer, head = optim.AdaGrad(oquab.freeze(fresh, "head"), 5e-4), fresh.parts["head"]
    with use("numba"):
        x = np.stack([oquab_weak.frame(fresh, e.image(), 48)[0] for e in examples])
        kept = [fresh.features(oquab_weak.rescaled(x, factor, 32)) for factor in (0.7, 1.4)]
        for i in range(4):
            rng = np.random.default_rng([0, i])
            batch = rng.choice(8, 4, replace=False)
            maps, cache = head.forward(kept[rng.integers(2)][batch], True, rng)
            value, d, _ = oquab_weak.loss(maps, signs[batch])
            head.backward(d, cache)
            optimizer.step(0.03)
            losses.append(value)
    assert_allclose([json.loads(line)["loss"] for line in (weakly / "metrics.jsonl").read_text().splitlines()], losses, rtol=1e-5)
    for name, a in net.arrays().items():
        assert_allclose(a, fresh.arrays()[name], rtol=1e-3, atol=1e-4, err_msg=name)


# Stopped and resumed; what stays

def stop_at(monkeypatch, program, call):
    """Let the loss fail at that call."""
    op = logistic_loss if program is weak else softmax_loss
    calls, original = [], op.loss

    def loss(*a, **b):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*a, **b)
    monkeypatch.setattr(op, "loss", loss)


@pytest.mark.parametrize("program, trains", [(pretrain, None), *((p, t) for p in (transfer, weak) for t in oquab.TRAINS)],
                         ids=lambda v: NAMES.get(v, v) if not isinstance(v, (str, type(None))) else str(v))
def test_a_stopped_run_goes_on_to_the_same_bits_and_what_is_frozen_stays(program, trains, request, source, tmp_path, monkeypatch):
    """Stopped in the fourth step, after the checkpoint of the second."""
    more = [] if trains is None else ["--weights", source / "weights.npz", "--trains", trains]
    name = NAMES[program]
    if trains in (None, "head"):
        whole = request.getfixturevalue(DONE[program])
    else:
        start(program, tmp_path / "whole", *more)
        whole = tmp_path / "whole" / name
    folder = tmp_path / "part" / name
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, program, 4)
        start(program, tmp_path / "part", *more, "--workers", "0")
    assert (folder / "checkpoint.npz").exists() and not (folder / "weights.npz").exists()
    assert (features_of(folder) is not None) == (program is transfer and trains != "all")
    with monkeypatch.context() as patch:
        if features_of(folder) is not None:                              # read, not made again
            patch.setattr(oquab, "frozen_part", lambda *a: pytest.fail("features are there"))
        assert start(program, tmp_path / "part", *more, "--resume", "--workers", "2")["seconds"] is None
    same_bits(folder, whole, ("metrics.jsonl", "curve.json", "wrong.json" if program is pretrain else "ranking.json"))
    if trains is None:
        return
    before, after = (oquab.load(path / "weights.npz")[0].params for path in (source, folder))
    stays = {name for name, w in after.items() if name in before and not name.startswith("head.") and (w == before[name]).all()}
    trunk = {name for name in before if name.startswith("trunk.")}
    assert stays == {"head": trunk | {*FEATURES}, "fc6": trunk | {*FEATURES[2:]}, "all": set()}[trains]
    fresh = oquab.Oquab(oquab.load(folder / "weights.npz")[0].spec, np.random.default_rng(0)).params
    assert all((w != fresh[name]).any() for name, w in after.items() if name.startswith("head."))


# The source net

def test_the_source_net_is_trained_first_gone_on_with_and_taken(tmp_path, monkeypatch, capsys):
    original, calls = pretrain.arguments, []

    def arguments(argv):
        calls.extend([argv] * ("--out" in argv))                        # else only looked at
        return original([*TINY[pretrain], *argv])
    monkeypatch.setattr(pretrain, "arguments", arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, pretrain, 4)
        start(transfer, tmp_path, "--seed", "5")
    assert {p.name for p in tmp_path.iterdir()} == {"pretrain"} and not (tmp_path / "pretrain" / "weights.npz").exists()
    start(transfer, tmp_path, "--seed", "5")
    assert ["--resume" in argv for argv in calls] == [False, True] and capsys.readouterr().out.count("first the source net, into") == 2
    assert read(tmp_path / "pretrain" / "config.json")["seed"] == 5
    start(weak, tmp_path, "--seed", "5")
    start(transfer, tmp_path, "--seed", "6", "--name", "b")
    assert len(calls) == 2 and "first the source net" not in capsys.readouterr().out            # it is there
    start(pretrain, tmp_path / "alone", "--seed", "5")
    before = oquab.load(tmp_path / "alone" / "pretrain" / "weights.npz")[0]
    for name in ("pretrain", "transfer", "weak_localization", "b"):
        after = oquab.load(tmp_path / name / "weights.npz")[0]
        assert (after.spec.mean, after.spec.std, after.spec.width) == (before.spec.mean, before.spec.std, 0.5)
        for key, w in before.params.items():
            if not key.startswith("head."):
                assert_array_equal(after.params[key], w)
        if name != "pretrain":
            assert read(tmp_path / name / "config.json")["weights"] == str((tmp_path / "pretrain" / "weights.npz").resolve())


@pytest.mark.parametrize("program", [transfer, weak], ids=["transfer", "weak"])
def test_start_random_takes_nothing_and_trains_all(program, tmp_path):
    start(program, tmp_path, "--start", "random", "--width", "0.3", "--seed", "2")
    folder, (mean, std) = tmp_path / NAMES[program], data.mean_std(scenes.scenes(8, 0, "train"))
    assert {p.name for p in tmp_path.iterdir()} == {folder.name} and features_of(folder) is None
    net, config = oquab.load(folder / "weights.npz")[0], read(folder / "config.json")
    assert (net.spec.mean, net.spec.std, net.spec.width, net.spec.table) == (mean, std, 0.3, "small")
    assert config["trains"] == "all" and config["weights"] is None
    fresh = oquab.Oquab(net.spec, np.random.default_rng(2)).params
    assert all((w != fresh[name]).any() for name, w in net.params.items() if name.endswith(".w"))


# Variants

def steps_of(monkeypatch):
    """What each step of weak training hands to the loss: maps, labels, mask."""
    seen, original = [], oquab_weak.loss

    def loss(maps, labels, mask=None):
        seen.append((maps, labels, mask))
        return original(maps, labels, mask)
    monkeypatch.setattr(oquab_weak, "loss", loss)
    return seen


def test_masked_training_looks_in_boxes_alone(out, weakly, tmp_path, monkeypatch):
    weights, examples = out / "pretrain" / "weights.npz", scenes.scenes(8, 0, "train")
    seen = steps_of(monkeypatch)
    start(weak, tmp_path, "--weights", weights, "--name", "not")
    assert len(seen) == 4 and all(mask is None for *_, mask in seen)
    same_bits(tmp_path / "not", weakly, KEPT)
    seen.clear()
    start(weak, tmp_path, "--weights", weights, "--masked")
    for i, (maps, labels, mask) in enumerate(seen):
        rng = np.random.default_rng([0, i])
        batch, factor = rng.choice(8, 4, replace=False), (0.7, 1.4)[rng.integers(2)]
        assert mask.shape == maps.shape
        centres = (8 * np.arange(maps.shape[1]) + 16) * 48 / {0.7: 34, 1.4: 67}[factor]         # pixels of the frame
        for of, own, j in zip(mask, labels, batch):
            boxes, classes = examples[j].usable()
            boxes = boxes * 48 / max(examples[j].size)
            for k in range(6):
                inside = np.zeros(maps.shape[1:3], bool)
                for x1, y1, x2, y2 in boxes[classes == k]:
                    inside |= ((y1 <= centres) & (centres <= y2))[:, None] & ((x1 <= centres) & (centres <= x2))
                assert_array_equal(of[..., k], inside if inside.any() else True)
                assert own[k] == (1 if k in classes else 0 if k in examples[j].labels else -1)
    assert any(not mask.all() for *_, mask in seen)


def test_whole_images_are_one_window(out, source, tmp_path, monkeypatch):
    seen = steps_of(monkeypatch)
    results = start(weak, tmp_path, "--weights", source / "weights.npz", "--whole")
    folder = tmp_path / "weak_localization"
    assert [maps.shape for maps, *_ in seen] == [(4, 1, 1, 6)] * 4
    assert {p.name for p in folder.glob("ranking*")} == {"ranking.json", "ranking_middle.json"}
    assert "location_ap" not in results and list(read(folder / "ranking.json")) == ["class_ap"]     # its one cell is nowhere
    assert set(results["also"]) == {"middle"} and read(folder / "config.json")["frame"] == 32
    net, settings = oquab.load(folder / "weights.npz")
    assert (settings["frame"], settings["scales"], settings["align"]) == (32, [1], "centres")
    with use("numba"):
        scores = np.array([net(oquab_weak.frame(net, e.image(), 32)[0][None])[0, 0, 0] for e in scenes.scenes(2, 0, "val")])
    check_scores(read(folder / "ranking.json"), "class_ap", scores, rtol=1e-4)


@pytest.mark.parametrize("program", (transfer, weak), ids=lambda program: program.__name__)
def test_features_that_are_kept_count_as_training(program, source, tmp_path, monkeypatch):
    clock, original = [0.0], program.features

    def slowly(*more):
        clock[0] += 7.0
        return original(*more)
    monkeypatch.setattr(program, "features", slowly)
    for module in (program, train):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    start(program, tmp_path, "--weights", source / "weights.npz")
    assert read(tmp_path / NAMES[program] / "results.json")["training_seconds"] == 7.0


def test_adaptation_layers_of_3x3(source, tmp_path):
    start(weak, tmp_path, "--weights", source / "weights.npz", "--adapt-kernel", "3", "--masked", "--align", "stretch", "--optimizer", "sgd")
    net, settings = oquab.load(tmp_path / "weak_localization" / "weights.npz")
    assert net.params["head.fca.w"].shape == (3, 3, 48, 10) and net.params["head.fcb.w"].shape == (3, 3, 10, 6)
    assert settings["align"] == "stretch" and net.spec.adapt_kernel == 3
    rankings = [read(tmp_path / "weak_localization" / f"ranking{name}.json")["location_ap"] for name in ("", "_stretch")]
    assert rankings[0] == rankings[1]
    rates = [json.loads(line)["lr"] for line in (tmp_path / "weak_localization" / "metrics.jsonl").read_text().splitlines()]
    assert rates == [optim.cosine_schedule(0.03, 4, 0)(i) for i in range(4)]


def test_uncached_training_sees_any_scale(source, tmp_path, monkeypatch):
    seen, factors, original = steps_of(monkeypatch), [], oquab_weak.rescaled

    def rescaled(x, factor, least):
        if len(x) == 4:                                                     # a batch, not an image to look at
            factors.append(factor)
        return original(x, factor, least)
    monkeypatch.setattr(oquab_weak, "rescaled", rescaled)
    start(weak, tmp_path, "--weights", source / "weights.npz", "--cached", "0", "--frame", "72")
    wanted = []
    for i in range(4):
        rng = np.random.default_rng([0, i])
        rng.choice(8, 4, replace=False)
        wanted.append(rng.uniform(0.7, 1.4))
    assert factors[-4:] == wanted
    sides = [oquab.map_side(oquab.TABLES["small"], math.floor(72 * f + 0.5)) for f in wanted]
    assert [maps.shape[1] for maps, *_ in seen] == sides and len(set(sides)) > 1


def of_several_classes(examples, which):
    """The first box of each image has a second class as well."""
    def two(e):
        return dataclasses.replace(e, boxes=np.concatenate([e.boxes, e.boxes[:1]]), labels=np.append(e.labels, (e.labels[0] + 1) % 6),
                                   difficult=np.append(e.difficult, e.difficult[0]))
    return [two(e) for e in examples]


def test_actions_are_told_box_by_box(source, tmp_path, monkeypatch):
    monkeypatch.setattr(image_level, "read", same_images(of_several_classes))
    examples, held_out, _ = image_level.read(None)
    results = start(transfer, tmp_path, "--preset", "action", "--weights", source / "weights.npz")
    folder = tmp_path / "transfer"
    assert files_in(folder) == {"config.json", "metrics.jsonl", "checkpoint.npz", "weights.npz", "results.json", "features", "ranking.json", "curve.json"}
    config = read(folder / "config.json")
    assert config["patches"] == "boxes" and config["trains"] == "fc6" and results["also"] == {} and results["curve"][-1]["class_ap"] == results["class_ap"]
    # the first box of each image has two classes: it does not train
    assert results["patches"] == sum((~e.difficult[1:-1]).sum() for e in examples) == len(features_of(folder))
    assert features_of(folder).shape[1:] == (4, 4, 16)     # the trunk's map, for FC6 trains
    net, scores, there = oquab.load(folder / "weights.npz")[0], [], []
    with use("numba"):
        for e in held_out:
            for box in np.unique(e.boxes[~e.difficult], axis=0):
                patch = oquab_patches.mirrored_patch(e.image(), box, 32)
                scores.append(softmax_loss.softmax(net(net.normalise(patch[None]))[:, 0, 0].astype(float))[0, :6])
                there.append([int(((e.boxes == box).all(1) & (e.labels == k)).any()) for k in range(6)])
    scores, there = np.array(scores), np.array(there)
    assert set(there.sum(1)) == {1, 2}
    ranking = read(folder / "ranking.json")["class_ap"]
    assert_allclose(np.array([one["scores"] for one in ranking.values()]).T, scores, rtol=1e-5)
    assert np.array([one["hits"] for one in ranking.values()]).T.tolist() == there.tolist()
    assert results["class_ap"] == pytest.approx(evaluate.mean_ap(ec.classification_ap(scores, there, scenes.CLASSES)))


def test_the_paper_s_settings(capsys):
    args = pretrain.arguments(["--preset", "paper"])
    assert (args.table, args.width, args.init, args.dropout, args.classical, args.batch) == ("6144", 1.0, 0.01, 0.5, True, 128) and args.std == 1
    assert (args.lr, args.momentum, args.weight_decay, args.epochs, args.steps) == (0.01, 0.9, 5e-4, 90, None)
    args = pretrain.arguments(["--preset", "paper", "--table", "4096", "--steps", "9", "--dropout", "0.4"])
    assert (args.table, args.steps, args.dropout, args.batch) == ("4096", 9, 0.4, 128)
    args = transfer.arguments(["--preset", "paper"])
    assert (args.lambdas, args.overlap, args.background, args.k, args.reduce) == ([1, 1.3, 1.6, 2, 2.4, 2.8, 3.2, 3.6, 4], 2 / 3, 0.1, 5, "mean")
    assert (args.lr, args.momentum, args.weight_decay, args.dropout, args.trains, args.patches) == (0.01, 0.9, 5e-4, 0.5, "head", "tiles")
    assert (args.batch, args.epochs, args.steps) == (128, 30, None)
    args = transfer.arguments(["--preset", "action", "--k", "2"])
    assert (args.patches, args.trains, args.k, args.lr, args.dropout, args.batch) == ("boxes", "fc6", 2, 0.01, 0.5, 128)
    assert transfer.arguments(["--preset", "action", "--trains", "head"]).trains == "head"
    args = weak.arguments(["--preset", "paper"])
    assert (args.frame, args.cached, args.batch, args.optimizer, args.lr, args.weight_decay) == (500, 0, 16, "adagrad", 1e-3, 5e-4)
    assert (args.dropout, args.steps, args.epochs, args.adapt_kernel, args.trains, args.tolerance) == (0.5, None, 20, 1, "head", None)
    assert weak.arguments(["--preset", "paper", "--lr", "0.01"]).lr == 0.01
    for program in (transfer, weak):                                # epochs of all samples, the last batch of one perhaps part of the next
        args = program.arguments(["--preset", "paper", "--batch", "10"])
        common.settle(args, 101, 7)
        assert (args.steps, args.measure_every) == (303, 61) if program is transfer else (202, 41)
        args = program.arguments(["--preset", "paper", "--start", "random", "--width", "0.01"])
        with use("numba") as put:                                   # the net of NO PRETRAIN: the paper's, narrower
            spec = image_level.build(args, put, scenes.scenes(2, 0), scenes.CLASSES, "weak").spec
        assert (spec.table, spec.init, spec.inverted, spec.std, spec.dropout, args.tolerance) == ("6144", 0.01, False, 1.0, 0.5, 18.0)
        assert program.arguments([]).trains == "head" and program.arguments(["--start", "random"]).trains == "all"


# Data

def test_weak_training_uses_the_labels_of_images_alone(source, weakly, tmp_path, monkeypatch):
    """With every box of the training set elsewhere the same bits come out, unless the max looks into boxes."""
    def moved(examples, which):
        return examples if which == "val" else [dataclasses.replace(e, boxes=np.tile([1.0, 2, 9, 8], (len(e.boxes), 1))) for e in examples]
    weights = source / "weights.npz"
    start(weak, tmp_path, "--weights", weights, "--masked", "--name", "masked")
    monkeypatch.setattr(image_level, "read", same_images(moved))
    start(weak, tmp_path, "--weights", weights)
    same_bits(tmp_path / "weak_localization", weakly, KEPT)
    start(weak, tmp_path, "--weights", weights, "--masked", "--name", "masked-moved")
    assert (tmp_path / "masked" / "metrics.jsonl").read_text() != (tmp_path / "masked-moved" / "metrics.jsonl").read_text()


def odd(examples, which):
    """The first image has no object, the second difficult ones of class 0 alone beside its own; no image has an object of class 5."""
    found = []
    for i, e in enumerate(examples):
        kept = (e.labels != 5) & (i != 0) & ((i != 1) | (e.labels != 0))
        boxes, labels, difficult = e.boxes[kept], e.labels[kept], e.difficult[kept]
        if i == 1:
            boxes, labels, difficult = np.concatenate([boxes, [[5.0, 5, 60, 50]]]), np.append(labels, 0), np.append(difficult, True)
        found.append(dataclasses.replace(e, boxes=boxes, labels=labels, difficult=difficult))
    return found


@pytest.mark.parametrize("program", [transfer, weak], ids=["transfer", "weak"])
def test_missing_classes_empty_images_and_difficult_objects(program, source, tmp_path, monkeypatch):
    monkeypatch.setattr(image_level, "read", same_images(odd))
    seen, told, sheet = steps_of(monkeypatch), [], draw.sheet

    def noted(pictures, columns, captions):
        told.append(captions)
        return sheet(pictures, columns, captions)
    monkeypatch.setattr(draw, "sheet", noted)
    results = start(program, tmp_path, "--weights", source / "weights.npz", "--batch", "8", pictures=True)
    folder = tmp_path / NAMES[program]
    ranking = read(folder / "ranking.json")
    for metric in ("class_ap", "location_ap"):
        of = ranking[metric]
        assert of["cross"]["hits"] == [0, None] and of["cross"]["positive"] == [0, 0] and of["triangle"]["positive"] == [0, 0]
    assert 0 <= results["location_ap"] <= results["class_ap"] <= 1 if program is transfer else 0 <= results["class_ap"] <= 1
    maps, first, *others, training = told                                   # maps.png, false positives by class, maps_training.png
    scores = np.array([one["scores"] for one in ranking["class_ap"].values()]).T
    assert maps[0] == "val00000" and maps[1].startswith("none there: ") and maps[4].startswith("there: ")
    k = scores[0].argmax()
    assert maps[2] == f"not there: {scenes.CLASSES[k]} {scores[0, k]:.2f}"
    assert first == [f"{scores[0, 0]:.2f}: "] and len(others) == 5          # the difficult cross of the other image is no false positive
    name = scenes.CLASSES[odd(scenes.scenes(2, 0, "val"), "val")[1].labels.min()]
    assert training == [f"step {i}: {name}" for i in (0, 2, 4)]
    if program is weak:
        rows = [row for _, labels, _ in seen for row in labels.tolist()]
        assert [-1] * 6 in rows and any(row[0] == 0 for row in rows) and all(row[5] == -1 for row in rows)


def test_no_object_at_all(source, tmp_path, monkeypatch):
    """Nothing to measure: null in what is kept, as elsewhere; nothing to train on: an error before anything is written."""
    def empty(examples, which):
        none = np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool)
        return [dataclasses.replace(e, boxes=none[0], labels=none[1], difficult=none[2]) for e in examples]
    for program, message in ((transfer, "must give at least one patch with an object, got none of 8 images"),
                             (weak, "must hold a class, got none in 8 images")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(image_level, "read", same_images(empty))
            start(program, tmp_path, "--weights", source / "weights.npz")
        assert not (tmp_path / NAMES[program]).exists()
    monkeypatch.setattr(image_level, "read", same_images(lambda examples, which: empty(examples, which) if which == "val" else examples))
    for program in (transfer, weak):
        start(program, tmp_path, "--weights", source / "weights.npz", "--steps", "1", pictures=True)
        text = (tmp_path / NAMES[program] / "results.json").read_text()
        results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert results["class_ap"] is None and results["location_ap"] is None and results["curve"][-1]["class_ap"] is None
    action = ["--weights", source / "weights.npz", "--preset", "action", "--name", "action"]
    with pytest.raises(ValueError, match="--patches boxes needs boxes to evaluate, not difficult, got none in 2 images"):
        start(transfer, tmp_path, *action)
    assert not (tmp_path / "action").exists()
    monkeypatch.setattr(image_level, "read", same_images(lambda examples, which: examples if which == "val" else empty(examples, which)))
    with pytest.raises(ValueError, match="must give at least one patch with an object, got none of 8 images"):
        start(transfer, tmp_path, *action)


def test_pretrain_takes_idx_files_and_class_folders(tmp_path, monkeypatch):
    write_idx(tmp_path / "idx", "train", 30, 100)
    made, canvases = [], pretrain.canvases.canvases

    def noted(items, count, seed, split, **options):
        made.append(({int(e.source[0, 0]) for e in items}, count, split, options["size"]))
        return canvases(items, count, seed, split, **options)
    monkeypatch.setattr(pretrain.canvases, "canvases", noted)
    results = start(pretrain, tmp_path, "--data", tmp_path / "idx", "--name", "idx")
    (seen, *train), (held_out, *val) = made
    assert (train, val) == ([24, "train", 37], [3, "val", 37]) and (len(seen), len(held_out)) == (25, 5) and not seen & held_out
    net = oquab.load(tmp_path / "idx" / "weights.npz")[0]
    assert net.spec.classes == tuple("0123456789") and results["images"] == 3
    for split, count in (("train", 5), ("val", 2)):
        for k, name in enumerate(("dark", "light")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((14 + 40 * i, 9, 3), 200 * k + i, np.uint8)).save(folder / f"{name}{i}.png")
    results = start(pretrain, tmp_path, "--data", tmp_path / "set", "--name", "folders", "--batch", "64", "--preset", "paper", "--table", "small",
                    "--init", "0", "--dropout", "0", "--std", "0", pictures=True)
    net = oquab.load(tmp_path / "folders" / "weights.npz")[0]
    assert net.spec.classes == ("dark", "light") and results["images"] == 4 and results["top5_error"] == 0 and not net.spec.inverted
    rates = [json.loads(line)["lr"] for line in (tmp_path / "folders" / "metrics.jsonl").read_text().splitlines()]
    assert_allclose(rates, [0.01, 0.001, 1e-4, 1e-4])


def test_boxes_and_tags_are_used_as_they_are_meant(source, weakly, tmp_path, monkeypatch):
    """Weak boxes are those of oquab_weak.detect; difficult objects and --same-class-ok reach the labels of patches; a class that is a tag alone
    has no place to judge, and no patch."""
    net, settings = oquab.load(weakly / "weights.npz")
    kept = read(weakly / "detections.json")
    for e in scenes.scenes(2, 0, "val"):
        with use("numba"):
            boxes, labels, scores = oquab_weak.detect(net, e.image(), settings["frame"], tuple(settings["scales"]), settings["align"])
        mine = [d for d in kept if d["image"] == e.name]
        assert [d["class"] for d in mine] == [scenes.CLASSES[k] for k in labels]
        assert_allclose([d["box"] for d in mine], boxes)
        assert_allclose([d["score"] for d in mine], scores)
    seen, label = [], oquab_patches.label
    monkeypatch.setattr(oquab_patches, "label", lambda *a: (seen.append(a), label(*a))[1])
    args = transfer.arguments(["--lambdas", "1", "--same-class-ok"])
    examples = [dataclasses.replace(e, difficult=np.arange(len(e.boxes)) % 2 == 1) for e in scenes.scenes(8, 0, "train")]
    transfer.training_patches(args, examples, 6)
    assert all((a[4] == e.difficult).all() and a[5] is True for a, e in zip(seen, examples)) and any(e.difficult.any() for e in examples)
    none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "difficult": np.zeros(0, bool)}
    tagged = same_images(lambda examples, which: [dataclasses.replace(e, tags=np.unique(e.labels), **none) for e in examples])
    monkeypatch.setattr(image_level, "read", tagged)
    results = start(weak, tmp_path, "--weights", source / "weights.npz")
    assert results["class_ap"] > 0 and results["location_ap"] is None and results["also"]["middle"]["location_ap"] is None
    with pytest.raises(ValueError, match="must have boxes, got labels of whole images, as train00000: weak_localization.py"):
        start(transfer, tmp_path, "--weights", source / "weights.npz")


def test_a_run_whose_source_net_was_stopped_goes_on(tmp_path, monkeypatch):
    """What common.start says after Ctrl-C, --resume, holds also where the run itself had not begun."""
    (tmp_path / "pretrain").mkdir()
    calls = []

    def finished(args, put):
        calls.append(args.resume)
        net = oquab.Oquab(oquab.Spec(("a", "b"), width=0.2), np.random.default_rng(0))
        oquab.save(net, tmp_path / "pretrain" / "weights.npz", {})
    (tmp_path / "pretrain" / "config.json").write_text("{}")
    monkeypatch.setattr(pretrain, "main", finished)
    assert start(weak, tmp_path, "--resume")["images"] == 2 and calls == [True]


# What cannot be

def test_what_cannot_be_is_said_before_a_run_begins(source, tmp_path, capsys):
    for program, wrong, message in (
            (pretrain, ["--lr", "0"], "--lr must be positive"), (pretrain, ["--images", "0"], "whole number of at least 1"),
            (transfer, ["--lambdas", "0.5"], "--lambdas must be at least 1"), (transfer, ["--overlap", "1"], "--overlap lie in"),
            (transfer, ["--background", "2"], "--background in"), (transfer, ["--k", "nan"], "--k be at least 1"),
            (transfer, ["--trains", "fc7"], "invalid choice: 'fc7'"), (weak, ["--cached", "101"], "--cached must lie in 0..100, got 101"),
            (weak, ["--tolerance", "-1"], "--tolerance must not be negative"), (weak, ["--adapt-kernel", "2"], "invalid choice: 2"),
            (weak, ["--dropout", "1"], "--dropout must lie in"), (weak, ["--frame", "31"], "--frame must hold a window of the net, got 31"),
            (weak, ["--name", "pretrain"], "--name must not be that of the source net"),
            (transfer, ["--start", "random", "--weights", "x.npz"], "--weights belong to --start pretrained"),
            (transfer, ["--width", "2"], "--width to --start random"), (weak, ["--align", "corners"], "invalid choice: 'corners'")):
        with pytest.raises(SystemExit):
            program.arguments(wrong)
        assert message in capsys.readouterr().err
    detector = overfeat.OverFeat(overfeat.Spec(scenes.CLASSES, "small", 0.1, background=True), np.random.default_rng(0))
    overfeat.save(detector, tmp_path / "detector.npz", {})
    full = oquab.Oquab(oquab.Spec(("a",), "4096", width=0.01), np.random.default_rng(0))
    oquab.save(full, tmp_path / "full.npz", {})
    classical = oquab.Oquab(oquab.Spec(("a",), inverted=False, width=0.1), np.random.default_rng(0))
    oquab.save(classical, tmp_path / "classical.npz", {})
    (tmp_path / "text.npz").write_text("no archive")
    given = ["--weights", source / "weights.npz"]
    for program, wrong, error, message in (
            (pretrain, ["--data", tmp_path / "nowhere"], FileNotFoundError, "nowhere"),
            (pretrain, ["--momentum", "1"], ValueError, "momentum must lie in"),
            (pretrain, ["--init", "-1"], ValueError, "init must be None, or above 0"),
            (pretrain, ["--dropout", "1"], ValueError, "dropout must lie in"), (pretrain, ["--width", "0"], ValueError, "width above 0"),
            *((program, ["--weights", tmp_path / name], error, message) for program in (transfer, weak) for name, error, message in (
                ("none.npz", FileNotFoundError, "there is no file .*none.npz"), ("text.npz", ValueError, "text.npz must be a weights or checkpoint"),
                ("detector.npz", ValueError, "detector.npz must describe a net of oquab, got: .*'overfeat'"),
                ("classical.npz", ValueError, r"both nets must have one dropout, got \[0.2\] and \[0.5\]"))),
            (weak, ["--weights", tmp_path / "full.npz"], ValueError, "--frame must hold a window of 224 pixels, got 48"),
            (weak, [*given, "--weight-decay", "-1"], ValueError, "weight_decay must be finite"),
            (transfer, [*given, "--momentum", "1"], ValueError, "momentum must lie in"),
            (transfer, [*given, "--lambdas", "2000"], ValueError, "oquab_patches.tiles: "),
            (transfer, [*given, "--data", tmp_path / "nowhere"], FileNotFoundError, "nowhere"),
            (weak, ["--start", "random", "--width", "0"], ValueError, "width above 0")):
        with pytest.raises(error, match=message):
            start(program, tmp_path / "out", *wrong)
    assert not (tmp_path / "out").exists()


# On a GPU

@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_the_programs_run_on_the_gpu_and_give_the_numbers_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(weak, "SCALES", (0.7, 1))
    fake_cupy.launches.clear()
    few = ["--steps", "2", "--scenes", "2", "--eval-scenes", "1", "--batch", "2", "--seed", "1"]
    runs = ((pretrain, ["--steps", "2", "--images", "4", "--batch", "3", "--seed", "1"]), (transfer, [*few, "--lambdas", "1"]),
            (weak, [*few, "--masked"]), (weak, [*few, "--trains", "fc6", "--optimizer", "sgd", "--name", "fc6"]))
    for backend in ("numba", "cuda"):
        with fake_cupy.installed() if backend == "cuda" else contextlib.nullcontext():
            for program, more in runs:
                start(program, tmp_path / backend, *more, "--backend", backend)
    assert {"conv_forward", "conv_dw", "sgd_step", "global_max_pool_forward", "global_max_pool_backward"} <= {*fake_cupy.launches}
    for name in ("pretrain", "transfer", "weak_localization", "fc6"):
        a, b = tmp_path / "numba" / name, tmp_path / "cuda" / name
        losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (a, b)]
        assert_allclose(*losses, rtol=1e-4)
        for key, w in arrays_in(a / "weights.npz").items():
            if key != "meta":
                assert_allclose(arrays_in(b / "weights.npz")[key], w, rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}")
        if name != "pretrain":
            first, second = (read(folder / "ranking.json")["class_ap"] for folder in (a, b))
            for k in first:
                assert_allclose(first[k]["scores"], second[k]["scores"], rtol=1e-2, atol=1e-4)
