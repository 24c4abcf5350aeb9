"""examples/bench_map_loss.py on small problems: what is compared, what makes it fail, and that what is told follows from what was measured."""
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import RUNNING
from tinydet import to_numpy, use
from tinydet.models import fast_rcnn_map
from tinydet.ops import map_loss

FILE = Path(__file__).resolve().parent.parent / "examples" / "bench_map_loss.py"
sys.path.insert(0, str(FILE.parent))
bench, timing = map(importlib.import_module, ("bench_map_loss", "timing"))
SMALL = ["--images", "4", "--candidates", "8", "--classes", "2", "--small", "3", "6", "2", "--sample", "3", "--batches", "2", "3", "--one-pass", "2",
         "--regions", "20", "--short", "64", "--turns", "2"]


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setattr(bench, "CHECK", (2, 6, 2))


@pytest.fixture(scope="module")
def made():
    """Steps of two images, without dropout and with."""
    with use("numba") as put:
        return [bench.Steps(bench.arguments([*SMALL, "--dropout", dropout]), put, 2) for dropout in ("0", "0.5")]


# The problem and the brute force

def test_the_problem_gives_NMS_and_labels_something_to_do():
    given = bench.problem(12, 40, 3, 0)
    assert given["scores"].shape == (480, 3) and given["boxes"].shape == (480, 3, 4) and np.bincount(given["images"]).tolist() == [40] * 12
    sides = given["boxes"][..., 2:] - given["boxes"][..., :2]
    assert sides.min() > 0.28 * 40 and given["gt_boxes"].min() >= 0 and given["gt_boxes"].max() <= 500
    assert set(np.bincount(given["gt_images"])) <= {1, 2, 3, 4, 5} and 0 < given["gt_difficult"].sum() < len(given["gt_difficult"]) / 3
    batch, chosen = bench.looked_at(given, np.asarray, bench.arguments(SMALL))
    assert batch["candidates"] == 1440 and batch["objects"] == (~given["gt_difficult"]).sum() and batch["sample"] == len(chosen) == 3
    assert 0.05 < batch["kept"] < 0.5 and 0.3 < batch["mAP"] < 0.95 and 0.05 < batch["with a pseudo-gradient"] < 0.9
    value, d = map_loss.loss(**given)
    assert batch["mAP"] == pytest.approx(1 - value) and batch["with a pseudo-gradient"] == (d != 0).mean() and all(d[tuple(at)] for at in chosen)
    again, other = bench.problem(12, 40, 3, 0), bench.problem(12, 40, 3, 1)
    assert not any(bench.problem(1, 1, 1, seed)["gt_difficult"].all() for seed in range(300))           # some class counts
    assert all(np.array_equal(given[k], again[k]) for k in given) and not np.array_equal(given["scores"], other["scores"])


def by_hand(windows, objects):
    """A problem of one class from windows (box, score), as many in each image, and objects (image, box, difficult)."""
    boxes, scores = (np.array(a, float) for a in zip(*(w for image in windows for w in image)))
    at, gt, hard = map(np.array, zip(*objects))
    return {"scores": scores[:, None], "boxes": boxes[:, None], "images": np.repeat(np.arange(len(windows)), len(windows[0])),
            "gt_boxes": gt.astype(float), "gt_labels": np.zeros(len(at), int), "gt_images": at, "gt_difficult": hard}


def test_brute_force_by_hand():
    box, near, far, third = [0, 0, 10, 10], [1, 0, 11, 10], [40, 0, 50, 10], [80, 0, 90, 10]
    b = bench.Brute(by_hand([[(box, 2), (near, 5), (far, 1)], [(box, 3), (far, 4), (third, 0)]],
                            [(0, box, False), (0, far, False), (1, box, False), (1, far, True)]), 0)
    assert b.P == 3 and b.gt.tolist() == [[0, 0, 1], [2, -2, -1]]
    assert b.average(b.s) == b.average(b.s, "interp") == 1          # ranked: near, image 1's box, far; box is suppressed, one difficult
    assert b.at(5, 4.5) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3) and b.at(5, 9) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert b.at(5, 9, "interp") == pytest.approx(3 / 4)
    assert b.at(4, -9) == 1 and b.at(0, 9) == 1                     # difficult: anywhere; box in place of near
    apart = bench.Brute(by_hand([[(box, 1), ([4, 0, 14, 10], 2)]], [(0, [2, 0, 12, 10], False)]), 0)      # IoU 3/7: one suppresses the other
    twice = bench.Brute(by_hand([[(box, 1), ([0, 6, 10, 16], 2)]], [(0, [0, 2, 10, 14], False)]), 0)      # IoU 1/4: both are kept
    assert apart.at(0, 3) == apart.at(0, 1) == 1 and twice.gt.tolist() == [[0, 0]] and twice.average(twice.s) == 1
    missed = bench.Brute(by_hand([[(third, 1), (box, 2)]], [(0, far, False)]), 0)
    assert missed.average(missed.s) == 0
    delta = b.s.std()
    assert delta == pytest.approx(np.std([2, 5, 1, 3, 4, 0])) and 1 < delta < 2             # third above far, or far below third
    assert -b.slope(5) == b.slope(2) == pytest.approx((1 - (1 + 1 + 3 / 4) / 3) / (2 * delta))


def test_sampled_windows_are_drawn_from_those_with_a_pseudo_gradient():
    given = bench.problem(4, 8, 2, 0)
    every, chosen = (bench.looked_at(given, np.asarray, bench.arguments([*SMALL, "--sample", n]))[1] for n in ("1000", "5"))
    d = map_loss.loss(**given, most=8)[1]
    assert every == np.argwhere(d).tolist() and len(chosen) == 5 and all(at in every for at in chosen)
    assert_allclose(bench.brute_force(bench.brutes(given), every), d[d != 0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="bench_map_loss: some candidate must have a pseudo-gradient, got none of 1$"):
        bench.looked_at(bench.problem(1, 1, 1, 0), np.asarray, bench.arguments(SMALL))


def test_classes_without_objects_are_no_candidates():
    given = bench.problem(4, 8, 2, 0)
    given["gt_difficult"] = given["gt_difficult"] | (given["gt_labels"] == 1)
    batch, chosen = bench.looked_at(given, np.asarray, bench.arguments([*SMALL, "--sample", "50"]))
    assert batch["candidates"] == 32 and {c for _, c in chosen} == {0} and list(bench.brutes(given)) == [0]


def test_more_windows_than_the_default_are_all_candidates():
    given = bench.problem(1, 130, 1, 0)
    assert bench.ours(given, np.asarray).keywords["most"] == 130
    value, d = bench.ours(given, np.asarray)()
    expected, g = bench.reference(given)()
    assert abs(value - expected) < 1e-12 and d[100:].any()
    assert_allclose(d, g, rtol=0, atol=1e-12)


# What makes it fail

def test_all_forms_agree_and_the_reference_is_NumPys(monkeypatch):
    used = []
    monkeypatch.setattr(map_loss, "_run_numpy", lambda *a, run=map_loss._run_numpy: used.append(len(a)) or run(*a))
    with use("numba") as put:
        far = bench.agree(bench.arguments(SMALL), put)
    assert set(far) == {"brute force", "NumPy"} and max(far.values()) < 1e-12 and len(used) == 3 * 4


def test_forms_that_differ_are_not_timed(monkeypatch):
    args, given = bench.arguments(SMALL), bench.problem(4, 8, 2, 0)
    average, slope, run = bench.Brute.average, bench.Brute.slope, map_loss._run_numpy
    with use("numba") as put:
        with monkeypatch.context() as m:
            m.setattr(bench.Brute, "average", lambda self, s, ap="prec": average(self, s, ap) + 2e-12)
            with pytest.raises(ValueError, match="all forms must agree to 1e-12, got 2e-12 between the loss, sde prec, and the brute force's"):
                bench.agree(args, put)
        for wrong in (1 + 1e-6, np.nan):
            with monkeypatch.context() as m:
                m.setattr(bench.Brute, "slope", lambda self, row, ap="prec": slope(self, row, ap) * wrong)
                with pytest.raises(ValueError, match="between dscores, sde prec, and the brute force's"):
                    bench.agree(args, put)
                with pytest.raises(ValueError, match="between sampled dscores, sde prec, and the brute force's"):
                    bench.looked_at(given, put, args)
        for at, what in ((0, "the loss"), (3, "dscores")):
            with monkeypatch.context() as m:
                m.setattr(map_loss, "_run_numpy", lambda *a: tuple(v + 1e-11 * (k == at) for k, v in enumerate(run(*a))))
                with pytest.raises(ValueError, match=f"between {what}, sde prec, and NumPy's"):
                    bench.agree(args, put)


def test_both_forms_of_the_step_agree(made):
    for steps in made:
        told = steps.agree(2)
        assert told["gradients apart"] < 1e-4 and told["losses apart"] < 1e-6
        assert told["regions"] == told["backward"]["one pass"] == 40 and all(len(v.regions.boxes) == 20 for v in steps.views)
        assert steps.agree(1, ("two passes",)) == {"regions": 20, "backward": {"two passes": steps.side("two passes", 1)()["rows"]}}
    with pytest.MonkeyPatch.context() as m:
        for steps, fewer in zip(made, (True, False)):               # without dropout those alone that have a gradient
            m.setattr(steps, "objective", fast_rcnn_map.Objective(most=1, chunk=20))
            told = steps.agree(2)
            assert told["gradients apart"] < 1e-4 and 0 < told["backward"]["two passes"] <= 40 == told["backward"]["one pass"]
            assert (told["backward"]["two passes"] < 40) is fewer
    made[0].side("one pass", 1)()
    trunk = made[0].net.grads["trunk.conv1.w"].copy()
    assert trunk.any() and not any(made[0].net.grads[k].any() for k in made[0].net.grads if "norm" in k)
    made[0].side("two passes", 1)()
    assert_allclose(made[0].net.grads["trunk.conv1.w"], trunk, rtol=0, atol=1e-4 * abs(trunk).max())         # cleared before each step


@pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")
def test_all_agree_on_a_gpu():
    """On the stand-in for CuPy."""
    args = bench.arguments(SMALL)
    with fake_cupy.installed(), use("cuda") as put:
        assert max(bench.agree(args, put, 1).values()) < 1e-12
        assert bench.looked_at(bench.problem(4, 8, 2, 0), put, args)[0]["sampled apart"] < 1e-12
        steps = bench.Steps(args, put, 2)
        assert type(steps.views[0].x) is not np.ndarray and steps.agree(2)["gradients apart"] < 1e-4
        bench.waiting(put)()


def other_seed(net, views, objective, seed, one_pass=bench.one_pass):
    return one_pass(net, views, objective, (1,))


def other_images(net, views, objective, seed, one_pass=bench.one_pass):
    return one_pass(net, views[::-1], objective, seed)


def scaled(net, views, objective, seed, one_pass=bench.one_pass):
    result = one_pass(net, views, objective, seed)
    net.grads["trunk.conv2.w"][...] *= 1.001
    return result


def fewer(net, views, objective, seed, one_pass=bench.one_pass):
    return one_pass(net, views[:1], objective, seed)


@pytest.mark.parametrize("broken, message", [
    (scaled, "gradients to 0.0001, got 0.001 for trunk.conv2.w"), (other_seed, "(loss|gradients)"), (other_images, "(loss|gradients)"),
    (fewer, "loss, got .* from two passes and .* from one")])
def test_steps_that_differ_are_not_timed(made, monkeypatch, broken, message):
    monkeypatch.setattr(bench, "one_pass", broken)
    with pytest.raises(ValueError, match=f"bench_map_loss: both forms of the step must have the same {message}"):
        made[1].agree(2)                                            # with dropout, whose masks belong to the image


def test_steps_see_what_the_arguments_say(made, monkeypatch):
    net, objective = made[1].net, made[1].objective
    assert net.spec.dropout == 0.5 and net.spec.short == (64,) and objective == fast_rcnn_map.Objective(chunk=20) and not net.parts["trunk"].frozen
    assert not np.array_equal(made[0].views[0].x, made[0].views[1].x) and min(made[0].views[0].size) == 64
    with use("numba") as put:
        other = bench.Steps(bench.arguments([*SMALL, "--seed", "1"]), put, 1)
        assert not np.array_equal(to_numpy(other.net.params["trunk.conv1.w"]), made[0].net.params["trunk.conv1.w"])
        assert other.views[0].x.shape != made[0].views[0].x.shape or not np.array_equal(other.views[0].x, made[0].views[0].x)
        monkeypatch.setattr(bench, "DENSITIES", (0.5,))
        with pytest.raises(ValueError, match=r"bench_map_loss: --regions must be at most the windows of every image, \d+, got 10000000"):
            bench.Steps(bench.arguments([*SMALL, "--regions", "10000000"]), put, 2)


# What is told

def test_a_run_tells_and_writes_all(tmp_path, capsys, probes):
    asked, path = probes(FILE), tmp_path / "a.json"
    with use("numba") as put:
        result = bench.main(bench.arguments([*SMALL, "--seed", "3", "--json", str(path)]), put)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert set(result) == {"settings", "date", "agreement", "batches", "steps", "turns", "time", "memory", "weights and gradients MB"}
    assert [a["form"] for a in asked] == [["sde", "prec"], ["sde", "interp"], ["env", "prec"], ["two passes", 2], ["one pass", 2], ["two passes", 3]]
    assert all(a["seed"] == 3 and a["regions"] == 20 for a in asked)
    given = {"images": 4, "candidates": 8, "classes": 2, "small": [3, 6, 2], "sample": 3, "batches": [2, 3], "one_pass": 2, "regions": 20,
             "short": 64, "dropout": 0.0, "turns": 2, "seed": 3, "backend": "numba"}
    assert given.items() <= result["settings"].items()
    turns, times, batches = result["turns"], result["time"], result["batches"]
    assert set(turns) == set(times) == {"large", "small", "2 images", "3 images"}
    assert list(turns["large"]) == ["sde prec", "sde interp", "env prec", "brute force"]
    assert list(turns["small"]) == ["sde prec", "sde interp", "env prec", "env interp", "NumPy", "brute force"]
    assert list(turns["2 images"]) == ["two passes", "one pass"] and list(turns["3 images"]) == ["two passes"]
    assert all(len(t) == 2 and min(t) > 0 for row in turns.values() for t in row.values())
    for row, size, candidates in (("large", [4, 8, 2], 64), ("small", [3, 6, 2], 36)):
        batch, seconds = batches[row], times[row]["seconds"]
        assert (batch["size"], batch["candidates"], batch["sample"], batch["extrapolated"]) == (size, candidates, 3, ["brute force"])
        assert batch["sampled apart"] < 1e-12 and 0 < batch["kept"] < 1
        assert seconds["brute force"] == pytest.approx(np.median(turns[row]["brute force"]) * candidates / 3)
        assert seconds["sde prec"] == np.median(turns[row]["sde prec"])
        assert times[row]["ratio"]["brute force / sde prec"] == pytest.approx(seconds["brute force"] / seconds["sde prec"])
    both = turns["2 images"]
    quartiles = np.quantile(np.divide(both["one pass"], both["two passes"]), (0.25, 0.75))
    assert times["2 images"]["quartiles"]["one pass / two passes"] == pytest.approx(quartiles)
    assert max(result["agreement"].values()) < 1e-12 and result["steps"]["2 images"]["gradients apart"] < 1e-4
    assert result["steps"]["3 images"]["regions"] == 60 and set(result["steps"]["3 images"]["backward"]) == {"two passes"}
    assert {row: {form: MB["traced"] for form, MB in used.items()} for row, used in result["memory"].items()} == {
        "loss": {"sde prec": 10.0, "sde interp": 20.0, "env prec": 30.0}, "2 images": {"two passes": 40.0, "one pass": 50.0},
        "3 images": {"two passes": 60.0}}
    out = capsys.readouterr().out
    assert "EXTRAPOLATED from 6 of 128 evaluations" in out and "EXTRAPOLATED from 6 of 72 evaluations" in out and "not for quoting" in out
    assert "2 images, 40 regions: go backward" in out and "40 in one pass; gradients agree to" in out and "traced 60.0 MB" in out


def test_parts_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(timing, "probe_of", lambda *a: {"traced": 1.0, "resident": 1.0})
    with use("numba") as put:
        found = [bench.main(bench.arguments([*SMALL, "--only", part, "--batches", "1", "--turns", "1"]), put) for part in bench.PARTS]
    assert set(found[0]["time"]) == {"large", "small"} and set(found[1]["time"]) == {"1 images"}
    assert "agreement" not in found[1] and "steps" not in found[0]


def test_a_side_of_the_loss_calls_that_form(monkeypatch):
    called = []
    monkeypatch.setattr(timing, "probe_of", lambda *a: {"traced": 1.0})
    monkeypatch.setattr(timing, "measure", lambda sides, *a: called.append({k: run() for k, run in sides.items()}) or {k: [1.0] for k in sides})
    with use("numba") as put:
        bench.loss_part(bench.arguments(SMALL), put)
    given = bench.problem(3, 6, 2, 0)
    for estimator, ap in bench.FORMS:
        value, d = map_loss.loss(**given, estimator=estimator, ap=ap)
        assert called[1][f"{estimator} {ap}"][0] == value
        assert_array_equal(called[1][f"{estimator} {ap}"][1], d)
    assert_allclose(called[1]["NumPy"][1], map_loss.loss(**given)[1], rtol=0, atol=1e-12)
    assert len(called[1]["brute force"]) == 3 and called[0]["sde prec"][1].shape == (32, 2)


def test_memory_of_a_call(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "ours", lambda given, put, ours=bench.ours, **form: asked.append(form) or ours(given, put, **form))
    args = bench.arguments([*SMALL, "--regions", "60"])
    with use("numba") as put:
        one, two = (bench.probe([form, 4], args, put) for form in bench.STEPS[::-1])
        pooled = 60 * 25 * 64 * 4 / 2**20                           # the pooled regions of an image, which one pass keeps for backward
        assert one["traced"] > two["traced"] + 2 * pooled and one["resident"] >= 0
        wide = bench.probe(["sde", "prec"], bench.arguments([*SMALL, "--images", "2", "--candidates", "300", "--classes", "1"]), put)
        assert 2 * 300 * 300 / 2**20 < wide["traced"] < 1           # which windows overlap, a byte a pair
        bench.probe(["env", "interp"], args, put)
    assert asked == [{"estimator": "sde", "ap": "prec"}] * 2 + [{"estimator": "env", "ap": "interp"}] * 2


@pytest.mark.parametrize("args, message", [
    (["--turns", "0"], "--turns must be at least 1, got 0"), (["--images", "0"], "--images must be at least 1"),
    (["--candidates", "0"], "--candidates must"), (["--classes", "0"], "--classes must"), (["--small", "3", "0", "2"], "--small must"),
    (["--sample", "0"], "--sample must"), (["--batches", "8", "0"], "--batches must be at least 1"),
    (["--batches", "8", "8"], "must name nothing twice"),
    (["--one-pass", "-1"], "--one-pass must be at least 0, got -1"), (["--only", "loss", "loss"], "must name nothing twice"),
    (["--only", "x"], "--only"), (["--regions", "0"], "--regions must"), (["--short", "8"], "--short must be at least 16"),
    (["--seed", "-1"], "--seed must"), (["--dropout", "1"], "--dropout must lie in [0, 1), got 1.0"), (["--dropout", "nan"], "--dropout must lie"),
    (["--json", "none/a.json"], "folder of --json none/a.json must exist"), (["--backend", "x"], "--backend")])
def test_wrong_arguments_are_named_before_measuring(args, message, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(args)
    assert message in capsys.readouterr().err
