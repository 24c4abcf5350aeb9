"""examples/compare.py: the budgets add up, what is judged is what was found, and a report of runs made by hand."""
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tinydet
from tinydet import data, files, scenes
from tinydet.models import oquab, oquab_weak, retinanet

from conftest import real

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))
import claims  # noqa: E402
import common  # noqa: E402
import compare  # noqa: E402
import timing  # noqa: E402


def option(words, name):
    return int(words[words.index(name) + 1])


def sizes_of(name):
    """(height, width) of the training images; the first hundred scenes stand for all four hundred."""
    if name == "scenes":
        examples = 4 * scenes.scenes(100, 0, "train")
    else:
        examples, _, _ = common.read(SimpleNamespace(data=str(real(name)), train_set="train", eval_set="val"))
    return [e.size[::-1] for e in examples]


def scaled(sizes, short):
    """As augment.scale makes them."""
    return [tuple(math.floor(side * short / min(size) + 0.5) for side in size) for size in sizes]


@pytest.mark.filterwarnings("ignore::tinydet.records.DefectWarning")
@pytest.mark.parametrize("name", compare.MEGAPIXELS)
def test_every_method_gets_the_budget_of_its_data_set(name):
    """Pixels as the programs make them of the arguments, image sizes and batches; where sizes differ 3000 batches are drawn."""
    budget, sizes = 1e6 * compare.MEGAPIXELS[name], sizes_of(name)

    def spent(words, sets=name):
        """Pixels of the steps, and of a step."""
        program = importlib.import_module(words[0].removesuffix(".py"))
        args = program.arguments([*words[1:], *([] if sets == "scenes" else ["--data", "folder"])])
        rng = np.random.default_rng(0)
        if words[0] == "overfeat.py":
            a_step = args.batch * (args.crop or 3 * args.window) ** 2
        elif words[0] == "ap_loss.py":
            a_step = args.batch * args.size[0] * args.size[1]
        elif words[0] == "pretrain.py":
            a_step = args.batch * oquab.TABLES["small"].window ** 2
        else:                                                       # ohem.py: filled up to the largest of the batch
            images = np.array(scaled(sizes, *args.short))
            batches = images[np.stack([common.drawn(rng, len(images), args.images) for _ in range(3000)])]
            a_step = args.images * batches.max(1).prod(1).mean()
        return args.steps * a_step, a_step

    for method, options in compare.METHODS.items():
        if name not in options:
            assert method == "weak supervision" and name in ("bccd", "apple-orchard")
            continue
        words = options[name]
        if words[0] == "end_to_end_map.py":                         # maps of all images as they are and mirrored, and the net before
            assert f"@{name}/before mAP" in words
            before = compare.BEFORE["before mAP"][name]
            short = importlib.import_module("ohem").arguments([*before[1:], *([] if name == "scenes" else ["--data", "folder"])]).short
            (steps, a_step), kept = spent(before), 2 * sum(h * w for h, w in scaled(sizes, *short))
        elif words[0] == "weak_localization.py":
            where, arm = next(w for w in words if w.startswith("@"))[1:].split("/")
            args = importlib.import_module("weak_localization").arguments([w for w in words[1:] if w != "--weights" and "@" not in w])
            factors = np.geomspace(*oquab_weak.TRAIN_SCALES, args.cached)
            (steps, a_step), kept = spent(compare.BEFORE[arm][where], where), len(sizes) * sum(np.floor(args.frame * factors + 0.5) ** 2)
        else:
            (steps, a_step), kept = spent(words), 0
        assert abs(steps + kept - budget) <= a_step + 0.03 * budget, (method, (steps + kept) / budget)


def test_the_runs_are_those_of_the_programs_and_share_what_comes_before(tmp_path):
    for name in compare.MEGAPIXELS:
        args = compare.arguments(["--full", "--sets", name, "--data", str(tmp_path)] if name == "scenes" else
                                 ["--full", "--sets", name, "--data", str(folder_of(tmp_path, name))])
        runs, _ = claims.jobs_of(args, compare.table_of(args.sets))
        assert {m for n, m, _ in runs if n == name} >= {m for m, options in compare.METHODS.items() if name in options}
        for (where, arm, seed), job in runs.items():
            program = __import__(job.shown[0].removesuffix(".py"))
            words = [w.replace("FOLDER", str(tmp_path)) for w in job.shown[1:]]
            settings = program.arguments(words)                     # nothing that a program refuses
            assert settings.seed == seed and settings.steps == option(words, "--steps") and ("--data" in words) == (where != "scenes")
            assert settings.measure_every > settings.steps
            assert [need.name for need in job.needs] == ([f"{name}-before-map-{seed}"] if arm == "Fast R-CNN, mAP loss" else
                                                         [f"scenes-{'source' if name == 'scenes' else 'source-for-cards'}-{seed}"]
                                                         if arm == "weak supervision" else [])


def folder_of(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path


def an_example(name, boxes, labels, difficult=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return data.Example(name, None, (100, 100), boxes, np.array(labels, int), np.zeros(len(boxes), bool) if difficult is None else np.array(difficult))


def test_places_are_the_middle_of_the_surest_box():
    examples = [an_example("a", [[10, 10, 30, 30]], [0]), an_example("b", [[50, 50, 90, 90]], [0]), an_example("c", [[0, 0, 9, 9]], [1])]
    of = np.array

    def found(a, b, c):
        return [(of(boxes, float).reshape(-1, 4), of(labels, int), of(scores, float)) for boxes, labels, scores in (a, b, c)]
    nothing = ([], [], [])
    hit = ([[15, 15, 25, 25], [60, 60, 99, 99]], [0, 0], [0.9, 0.1])                        # the surest lies on the object, the other does not
    right = found(hit, ([[55, 55, 85, 85]], [0], [0.8]), ([[2, 2, 6, 6]], [1], [0.5]))
    assert compare.places(right, examples, ["x", "y"]) == 1.0
    missed = found(([[15, 15, 25, 25], [60, 60, 99, 99]], [0, 0], [0.1, 0.9]), right[1], right[2])      # now it does not
    assert compare.places(missed, examples, ["x", "y"]) == pytest.approx((0.5 * 0.5 + 1) / 2)           # one of two, behind a wrong one
    none = found(nothing, right[1], right[2])
    assert compare.places(none, examples, ["x", "y"]) == pytest.approx((0.5 + 1) / 2)
    silent = found(nothing, nothing, nothing)
    assert compare.places(silent, examples, ["x", "y"]) == 0.0
    lower = found(([[15, 15, 25, 25]], [0], [-3.0]), nothing, ([[50, 50, 60, 60]], [0], [-4.0]))        # raw outputs; b, without a box, ranks last
    assert compare.places(lower, examples, ["x", "y"]) == pytest.approx(0.5 / 2)
    edge = found(([[31, 31, 37, 37]], [0], [0.9]), right[1], right[2])                      # middle 34: 4 pixels off counts
    assert compare.places(edge, examples, ["x", "y"]) == 1.0 and compare.places(edge, examples, ["x", "y"], 3.9) < 1
    assert math.isnan(compare.places([], [], ["x"]))


@pytest.fixture
def done(tmp_path, monkeypatch):
    """Two seeds of two methods on six scenes, as the runner leaves them: RetinaNets at the start, detections of the truth."""
    monkeypatch.setattr(timing, "fresh", lambda program, words: here(json.loads(words[1])))
    args = compare.arguments(["--full", "--seeds", "0", "1", "--out", str(tmp_path), "--report"])
    runs, _ = claims.jobs_of(args, compare.table_of(args.sets))
    examples = scenes.scenes(2, 0, "val")
    net = retinanet.RetinaNet(retinanet.Spec(tuple(scenes.CLASSES)), np.random.default_rng(0))
    for (_, method, seed), job in runs.items():
        if method in ("RetinaNet, focal", "Fast R-CNN, mAP loss", "before mAP"):
            job.folder.mkdir(parents=True)
            job.record.write_text(json.dumps({"arguments": job.shown}))
            config = {"data": None, "scenes": 6, "train_set": "train", "eval_set": "val", "steps": option(job.shown, "--steps")}
            (job.folder / "config.json").write_text(json.dumps(config))
            retinanet.save(net, job.folder / "weights.npz", {"testing": {"short": 64, "longest": 128}, "cut": {"disk": 0.2, "ring": math.inf}})
            truth = [(e.boxes * (1 if seed else [1, 1, 1, 1.05]), e.labels, np.full(len(e.labels), 0.9)) for e in examples]
            (job.folder / "detections.json").write_text(json.dumps(common.records(truth, examples, scenes.CLASSES)))
            (job.folder / "results.json").write_text(json.dumps({"set": "val", "AP50": {}, "mean AP50": 1.0, "training_seconds": 10.0 + seed,
                                                                 "memory_MB": 200 if method == "before mAP" else 100 + 20 * seed}))
    return args, runs


def cells_of(lines, method):
    return next(line for line in lines if method in line).strip("| ").split(" | ")


def here(asked):
    with tinydet.use(asked["backend"]) as put:
        return json.loads(json.dumps(compare.probe(asked, put)))


def test_a_report_tells_what_was_found(done, capsys):
    args, runs = done
    found = compare.main(args)
    assert [(r["data"], r["method"]) for r in found["rows"]] == [("scenes", "Fast R-CNN, mAP loss"), ("scenes", "RetinaNet, focal")]
    of_map, focal = found["rows"]
    assert focal["val"]["AP50"][1] == focal["val"]["AP"][1] == focal["val"]["places"][1] == 1
    assert focal["val"]["AP50"][0] == focal["val"][f"AP50 of {scenes.CLASSES[0]}"][0] == 1 and 0.2 < focal["val"]["AP"][0] < 0.95
    assert focal["training_seconds"] == [10, 11] and of_map["training_seconds"] == [20, 22] and of_map["memory_MB"] == [200, 200]
    assert 1000 < focal["trunk_multiply_adds"] < 1500 and cells_of(compare.markdown(found), "focal")[-1] == f"{focal['trunk_multiply_adds']:,.0f}"
    assert focal["test"] is None and focal["ms"] > 0 and focal["parameters"] > 1e5 and len(of_map["commands"]) == 2
    assert focal["commands"] == [f"python examples/ap_loss.py --workers 0 --measure-every 1000000 --loss focal --steps {focal['steps']} "
                                 "--backend numba --seed S"]
    assert "--weights RUNS/scenes-before-map-S/weights.npz" in of_map["commands"][1] and of_map["commands"][1].endswith("--seed S")
    assert json.loads(args.json.read_text()) == found and "scenes-overfeat-0" in found["missing"]
    table = (args.folder / "compare.md").read_text()
    assert "AP50, test" not in table and "| places, val |" in table and table.strip() in capsys.readouterr().out
    cells = cells_of(table.splitlines(), "focal")
    assert cells[:2] + cells[3:6] == ["RetinaNet, focal", "100.0 ± 0.0", "100.0 ± 0.0", str(focal["steps"]), "10 (10 .. 11)"]         # 10.5, to even
    assert cells[7] == "110" and f" | {option(runs['scenes', 'before mAP', 0].shown, '--steps')} + {of_map['steps']} | " in table
    with Image.open(args.folder / "sheet_scenes.jpg") as sheet, Image.open(args.folder / "time_scenes.png"):
        assert sheet.width > 2 * 320 and sheet.height > 3 * 200


def test_the_test_set_is_looked_at_once_and_other_images_are(done, monkeypatch):
    args, runs = done
    args.test, asked = True, []
    monkeypatch.setattr(timing, "fresh", lambda program, words: asked.append(json.loads(words[1])) or here(asked[-1]))
    found = compare.main(args)
    tests = [a for a in asked if a["eval_set"] == "test"]
    assert len(tests) == 4 and len({a["weights"] for a in tests}) == 4 and found["rows"][1]["test"]["AP50"] is not None
    names = {r["image"] for r in json.loads(Path(tests[0]["detections"]).read_text())}
    assert names <= {e.name for e in scenes.scenes(2, 0, "test")}
    asked.clear()
    again = compare.main(args)
    assert not asked and again["rows"] == found["rows"]
    assert "| AP50, test | AP, test | places, test |" in (args.folder / "compare.md").read_text()
    args.test = False                                               # what is there is shown
    assert compare.main(args)["rows"] == found["rows"] and not asked
    net = runs["scenes", "RetinaNet, focal", 1].folder / "weights.npz"
    other, _ = retinanet.load(net)
    other.arrays()["scores.out.b" if "scores.out.b" in other.arrays() else next(iter(other.arrays()))][...] += 1
    retinanet.save(other, net, {"testing": {"short": 64, "longest": 128}, "cut": {}})
    alone = compare.main(args)["rows"]                              # other weights: one seed of the test set is not that of the method
    assert alone[1]["test"] is None and alone[0]["test"] and not asked
    assert "AP50, test" not in (args.folder / "compare.md").read_text()
    args.test = True
    assert compare.main(args)["rows"][1]["test"] and [(a["eval_set"], a["weights"]) for a in asked] == [("test", str(net))]


def test_the_sheet_shows_boxes_above_the_cut_of_their_class(done, monkeypatch):
    args, runs = done
    drawn, boxes = [], compare.draw.boxes
    monkeypatch.setattr(compare.draw, "boxes", lambda image, some, labels, classes, *more, **options: drawn.append((labels, more)) or boxes(
        image, some, labels, classes, *more, **options))
    job = runs["scenes", "RetinaNet, focal", 0]
    compare.main(args)
    drawn.clear()
    path = args.folder / "judged" / f"{job.name}-val-detections.json"
    for record in (records := json.loads(path.read_text())):
        record["class"], record["score"] = [("disk", 0.2), ("disk", 0.19), ("ring", 9.0), ("star", 9.0)][records.index(record) % 4]
    files.write(path, json.dumps(records))
    compare.main(args)
    of_focal = [(labels, more[0]) for labels, more in drawn if more]
    shown = [(scenes.CLASSES[k], s) for labels, scores in of_focal[-2:] for k, s in zip(labels, scores)]
    assert len(drawn) == 2 * 3 and shown and set(shown) == {("disk", 0.2)}          # no cut, or none that is finite: not shown


def test_the_time_is_that_of_the_median_image_at_its_best_turn(done, monkeypatch, tmp_path):
    args, runs = done
    job, clock, looks = runs["scenes", "RetinaNet, focal", 0], [0.0], []
    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])

    def find(image, stem):
        clock[0] += 100 if not looks else {0: 0.002, 1: 0.004, 2: 0.009}[(len(looks) - 1) // 3] + 0.5 * (len(looks) % 3 != 2)
        looks.append(stem)
        return np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    load = compare.detect.load
    monkeypatch.setattr(compare.detect, "load", lambda given, put: (*load(given, put)[:2], find))
    asked = {**compare.config_of(job), "eval_set": "val", "most": 3, "turns": 3, "weights": str(job.folder / "weights.npz"),
             "detections": str(tmp_path / "d.json")}
    asked["scenes"] = 30
    told = compare.probe(asked, np.asarray)
    assert told["ms"] == pytest.approx(4) and told["images"] == 3 and len(looks) == 1 + 3 * 3 and looks[0] == looks[1]


@pytest.mark.parametrize("damage, told", [
    (lambda job, judged: job.result.write_text('{"set": "val"}'), r"results.json must hold set, memory_MB, got no memory_MB"),
    (lambda job, judged: (job.folder / "config.json").write_text("[]"), r"config.json must hold data, scenes, steps, got no JSON object"),
    (lambda job, judged: job.record.write_text("[1]"), r"focal-0.json must hold arguments, got no JSON object"),
    (lambda job, judged: judged.write_text("{}"), r"focal-0-val.json must hold weights, ms, got no weights, ms"),
    (lambda job, judged: (job.folder / "weights.npz").write_bytes(b"PK"), r"weights.npz must be")])
def test_damaged_files_are_named(done, damage, told):
    args, runs = done
    job = runs["scenes", "RetinaNet, focal", 0]
    compare.main(args)
    damage(job, args.folder / "judged" / f"{job.name}-val.json")
    before = args.json.read_bytes()
    with pytest.raises(ValueError, match=told) as refused:
        compare.main(args)
    assert "\n" not in str(refused.value) and args.json.read_bytes() == before


def test_detections_that_are_gone_are_made_again(done):
    args, runs = done
    found = compare.main(args)
    (args.folder / "judged" / f"{runs['scenes', 'RetinaNet, focal', 0].name}-val-detections.json").unlink()
    assert compare.main(args)["rows"][1]["val"] == found["rows"][1]["val"]


def test_a_process_that_fails_tells_its_error_in_one_line(tmp_path):
    asked = {"data": None, "scenes": 6, "eval_set": "val", "most": 1, "turns": 1, "backend": "numpy", "weights": str(tmp_path / "no.npz"), "detections": "x"}
    with pytest.raises(ValueError) as refused:
        timing.fresh(compare.__file__, ["--probe", json.dumps(asked)])
    assert "no.npz" in str(refused.value) and "\n" not in str(refused.value) and "--probe" not in str(refused.value)
    with pytest.raises(ValueError, match=r"--probe \[\] must end well, got: (.|\n)*Traceback"):
        timing.fresh(compare.__file__, ["--probe", "[]"])


def test_a_report_without_runs_leaves_the_figures_alone(done):
    args, runs = done
    compare.main(args)
    before, args.seeds = args.json.read_bytes(), [7]
    with pytest.raises(ValueError, match=r"there must be a run of scenes that is done, got none in .*compare"):
        compare.main(args)
    assert args.json.read_bytes() == before


def test_a_run_that_was_stopped_has_no_training_time(done):
    args, runs = done
    job = runs["scenes", "RetinaNet, focal", 1]
    job.result.write_text(json.dumps({**json.loads(job.result.read_text()), "training_seconds": None}))
    found = compare.main(args)
    assert found["rows"][1]["training_seconds"] == [10, None]
    assert [line.split(" | ")[5] for line in compare.markdown(found) if "focal" in line] == ["10 (10 .. 10)"]
    job.result.unlink()
    found = compare.main(args)
    assert any("| RetinaNet, focal (seeds 0) |" in line for line in compare.markdown(found)) and job.name in found["missing"]


def test_only_runs_the_methods_named_and_what_they_start_from(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(claims, "run_all", lambda args, runs, benches: started.extend(job.name for job in runs.values()))
    for method, names in (("OverFeat", ["scenes-overfeat"]), ("Fast R-CNN, mAP loss", ["scenes-before-map", "scenes-fast-r-cnn-map-loss"])):
        started.clear()
        args = compare.arguments(["--full", "--out", str(tmp_path), "--only", method])
        args.folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="there must be a run"):
            compare.main(args)
        assert sorted(started) == sorted(f"{name}-{s}" for name in names for s in range(3)) and args.only == [method]


@pytest.mark.parametrize("words, told", [
    ([], "--quick"), (["--full", "--seeds", "1", "1"], "--seeds must be different"), (["--full", "--jobs", "0"], "--jobs at least 1"),
    (["--full", "--sets", "bccd"], "--sets bccd needs --data"), (["--full", "--sets", "bccd", "--data", "."], "got no folder bccd"),
    (["--full", "--sets", "cells"], "invalid choice: 'cells'"), (["--full", "--json", "nowhere/x.json"], "nowhere/x.json must exist")])
def test_what_cannot_be_is_said_at_once(words, told, capsys):
    with pytest.raises(SystemExit):
        compare.arguments(words)
    assert told in capsys.readouterr().err


def test_a_data_set_without_a_test_set_is_said_before_anything_runs(tmp_path):
    folder = tmp_path / "bccd"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    (folder / "JPEGImages").mkdir()
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    args = compare.arguments(["--full", "--sets", "bccd", "--data", str(tmp_path), "--test", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--test needs a test set in .*bccd, got train"):
        compare.main(args)
    assert not args.folder.exists()


@pytest.mark.slow
def test_the_smoke_run_runs_every_method(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLES / "compare.py"), "--quick", "--test", "--out", str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads((tmp_path / "compare-quick" / "compare.json").read_text())
    assert [r["method"] for r in found["rows"]] == list(compare.METHODS) and not found["missing"]
    assert all(r["test"] and r["memory_MB"][0] > 50 for r in found["rows"])


def test_readme_shows_the_figures_that_are_kept():
    found = json.loads((EXAMPLES / "results" / "compare.json").read_text())
    shown = (EXAMPLES.parent / "README.md").read_text().split("<!-- compare -->\n")[1].split("\n<!-- end of compare -->")[0]
    assert shown == "\n".join(compare.markdown(found)) and not found["missing"] and found["seeds"] == [0, 1, 2]
    assert all(r["test"] for r in found["rows"]) and found["megapixels"].items() <= compare.MEGAPIXELS.items()
