"""Side by side: the ways to train a detector, on the same data, with one evaluator, from scratch, on the same budget.

    python examples/compare.py --quick                              # a smoke run: a few steps of every method on the embedded scenes
    python examples/compare.py --full                               # the embedded scenes, three seeds: about forty minutes on two cores
    python examples/compare.py --full --data FOLDER --sets scenes bccd apple-orchard playing-cards      # the data sets in FOLDER, too: hours
    python examples/compare.py --full --data FOLDER --sets bccd --test              # once, when all is settled: the test sets, too
    python examples/compare.py --full --data FOLDER --sets bccd --report            # no runs: the tables and pictures of what is there

The budget counts the pixels of training images that pass through the trunk (MEGAPIXELS; a kept map passes once): the same for every method on a
data set, what comes before included, the net that the mAP loss starts from and the source net of weak supervision. Pixels, not seconds, for
seconds differ from run to run; the plot shows the seconds. A pixel is not the same work for every net: "MAC a pixel" are the multiply-adds of its
trunk, forward; RetinaNet's smaller trunk takes a fifth of Fast R-CNN's. The settings below were chosen on validation images (examples/claims_*.py, and seed 0
here), mostly for other numbers of steps; nobody gets more than its budget, so that a method which is not done learning by then shows that, too. How
large images are fed is a setting of each method and changes how many steps it gets: scenes and apples are enlarged for Fast R-CNN and RetinaNet.
Each method detects as its program does by default: Fast R-CNN keeps what scores above 0.05, after the mAP loss all.

Times: "training" is of train.fit and of features that are kept, without evaluation, the median of the seeds and their range, --jobs runs at a time with
an equal share of the cores; "detection" the median of one image after another, on all cores, one net. Memory is the most that the process of a run
has held, evaluation, pictures and (in a first run) compilation included, the median of the seeds. "steps": of what comes before, + its own.

Weak supervision sees image labels, no boxes: it is measured by places (is the middle of the best box of a class on an object of it? AP over the
images), and so is everyone. It needs images that hold a class and images that do not, so that bccd and apple-orchard have no row of it. Its
source net has seen other images: close-ups of shapes, the scenes' among them.

Everything goes to <out>/compare (--quick: compare-quick): the runs (their logs, settings and weights as claims.py keeps them), judged/ (figures and
detections of every net), compare.json, compare.md (the table), time_<data set>.png (AP50 against training time) and sheet_<data set>.jpg (the
same images, detected by every method). A command that was stopped goes on when it is given again.
"""
import argparse
import functools
import json
import math
import re
import sys
import time
import types
import zlib
from pathlib import Path

import claims
import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import detect
import numpy as np
import timing
import tinydet

from tinydet import coco, data, draw, evaluate, evaluate_classification, files, train
from tinydet.summary import summary

# The budget of a net
MEGAPIXELS = {"scenes": 160, "bccd": 160, "apple-orchard": 160, "playing-cards": 320}

# {data set: (pixels of a step, options)}
OVERFEAT = {"scenes": (32 * 72**2, ["--window", "24"]), "bccd": (32 * 96**2, ["--window", "32"]),
            "apple-orchard": (32 * 72**2, ["--window", "24"]), "playing-cards": (12 * 192**2, ["--window", "64", "--batch", "12", "--no-mirror"])}
# Fast R-CNN's images of a batch are filled up to the tallest and the widest: where sizes differ, the mean of many batches, counted
FAST_RCNN = {"scenes": (212_000, []), "bccd": (2 * 240 * 320, ["--nms", "0.4"]),
             "apple-orchard": (2 * 480**2, ["--nms", "0.4", "--share", "0.9", "--short", "480"]),
             "playing-cards": (185_000, ["--batch", "256"])}
RETINANET = {"scenes": (16 * 192**2, []), "bccd": (8 * 288 * 384, ["--upside-down"]),
             "apple-orchard": (8 * 320**2, ["--size", "320", "320", "--upside-down"]), "playing-cards": (8 * 288 * 384, [])}
# The net that the mAP loss starts from gets what is left when every training image has passed once as it is, and once mirrored: those maps are kept
MAP = {"scenes": (15_120_000, []), "bccd": (2 * 205 * 240 * 320, ["--scores", "raw", "--lr", "0.003", "--score-weight", "0.03"]),
       "apple-orchard": (2 * 149 * 480**2, []), "playing-cards": (38_250_000, ["--lr", "0.0001"])}
# The source net, of embedded close-ups, gets what is left when every training image has passed at the scales that are kept
CLOSE_UPS = 64 * 32**2
WEAK = {"scenes": (400 * 96**2 * sum(np.geomspace(0.7, 1.4, 6)**2), "@scenes/source", ["--steps", "2000"]),
        "playing-cards": (237 * 160**2 * sum(np.geomspace(0.7, 1.4, 4)**2), "@scenes/source for cards", ["--steps", "1500", "--frame", "160", "--cached", "4"])}


def steps(name, pixels, spent=0.0):
    """Steps of so many pixels each that the budget allows."""
    return ["--steps", str(round((1e6 * MEGAPIXELS[name] - spent) / pixels))]


def spread(settings, *words):
    """{data set: options} of a method from {data set: (pixels of a step, options)}."""
    return {name: [*words, *options, *steps(name, pixels)] for name, (pixels, options) in settings.items()}


METHODS = {
    "OverFeat": spread(OVERFEAT, "overfeat.py"),
    "Fast R-CNN": spread(FAST_RCNN, "ohem.py", "--sampler", "random"),
    "Fast R-CNN, OHEM": spread(FAST_RCNN, "ohem.py", "--sampler", "ohem"),
    "Fast R-CNN, mAP loss": {name: ["end_to_end_map.py", "--weights", f"@{name}/before mAP", "--steps", "60", "--watch", "20", *options]
                             for name, (_, options) in MAP.items()},
    "RetinaNet, CE + mining": spread(RETINANET, "ap_loss.py", "--loss", "ce"),
    "RetinaNet, focal": spread(RETINANET, "ap_loss.py", "--loss", "focal"),
    "RetinaNet, AP-loss": spread(RETINANET, "ap_loss.py", "--loss", "ap"),
    "weak supervision": {name: ["weak_localization.py", "--weights", source, *options] for name, (_, source, options) in WEAK.items()}}

# What the last two start from: part of their budget and of their training time
BEFORE = {
    "before mAP": {name: ["ohem.py", "--sampler", "random", *options, *steps(name, pixels, MAP[name][0])] for name, (pixels, options) in FAST_RCNN.items()},
    "source": {"scenes": ["pretrain.py", *steps("scenes", CLOSE_UPS, WEAK["scenes"][0])]},
    "source for cards": {"scenes": ["pretrain.py", *steps("playing-cards", CLOSE_UPS, WEAK["playing-cards"][0])]}}

TINY = ["--steps", "2", "--measure-every", "2", "--scenes", "12"]
QUICK = {"overfeat.py": TINY, "ohem.py": TINY, "ap_loss.py": TINY, "pretrain.py": [*TINY, "--images", "40"],
         "end_to_end_map.py": [*TINY, "--batch", "2", "--watch", "2", "--windows", "100"], "weak_localization.py": [*TINY, "--batch", "4", "--eval-scenes", "3"]}
TOLERANCE = 4.0                     # pixels around a box where a place still counts, as examples/weak_localization.py has it for the small net
SHOWN, LOOKED, TURNS = 4, 20, 3     # images of a sheet; images whose detection is timed, so many times each


def table_of(sets):
    """The runs on these data sets, as claims.jobs_of takes them."""
    on = {name: [arm for arm, options in METHODS.items() if name in options] for name in sets}
    return types.SimpleNamespace(__name__="compare", PROGRAM="", DATA={name: ["--workers", "0", "--measure-every", "1000000"] for name in MEGAPIXELS},
                                 ARMS={**METHODS, **BEFORE}, ON=on, EMBEDDED=("scenes",), QUICK=QUICK)


# Judging what the runs found

def places(detections, examples, classes, tolerance=TOLERANCE):
    """Mean over the classes of the AP of places: one point an image and class, the middle of its surest box, right if it lies on such an object.

    detections as evaluate.voc takes them; an image without a box of a class ranks last there. NaN if no class has positives.
    """
    points, scores = np.zeros((len(examples), len(classes), 2)), np.full((len(examples), len(classes)), -np.inf)
    for i, (boxes, labels, found) in enumerate(detections):
        for k in np.unique(labels):
            best = np.flatnonzero(labels == k)[found[labels == k].argmax()]
            points[i, k], scores[i, k] = boxes[best].reshape(2, 2).mean(0), found[best]
    there, boxed = evaluate_classification.presence(examples, len(classes)), scores > -np.inf
    hits = evaluate_classification.location_hits(points, examples, tolerance) & boxed
    scores = np.where(boxed, scores, scores[boxed].min(initial=0.0) - 1)
    return evaluate.mean_ap(evaluate_classification.location_ap(scores, hits, there, classes))


@functools.cache
def examples_of(folder, count, which):
    """The images of a set of a data set, or of so many embedded scenes to train on, and the class names."""
    examples, classes = common.read_held_out(argparse.Namespace(data=folder, scenes=count, train_set="train", eval_set=which))
    return examples, list(classes)


def judged(path, config, which):
    """What a file of detections gives on an image set of a run's data, and AP50 by class; None where there is nothing to measure."""
    examples, classes = examples_of(config["data"], config["scenes"], which)
    detections, _ = coco.named_results(path, [e.name for e in examples], classes)
    results = evaluate.voc(detections, examples, classes)
    found = {"AP50": evaluate.mean_ap(results), "AP": evaluate.coco_of_examples(detections, examples, classes).summary()["COCO"]["AP"],
             "places": places(detections, examples, classes), **{f"AP50 of {name}": r.ap for name, r in results.items()}}
    return {k: None if v is None or math.isnan(v) else v for k, v in found.items()}


def probe(asked, put):
    """What a net does, in a process of its own: writes its detections on an image set (at most `most` images), returns ms an image (the median of
    images, each the shortest of `turns`; the first image, which compiles, runs once more before), the parameters, the trunk's multiply-adds for a
    pixel, and the scores from which a box is shown.

    asked: what looked() asks.
    """
    given = argparse.Namespace(**asked)
    examples = examples_of(given.data, given.scenes, given.eval_set)[0][:given.most]
    net, settings, find = detect.load(argparse.Namespace(weights=given.weights, proposals=None, images=[]), put)
    find(examples[0].image(), examples[0].name)
    found, seconds = [], []
    for example in examples:
        image, took = example.image(), []
        for _ in range(given.turns):
            start = time.perf_counter()
            detections = find(image, example.name)
            took.append(time.perf_counter() - start)
        found.append(detections)
        seconds.append(min(took))
    files.write(given.detections, json.dumps(common.records(found, examples, net.spec.classes)))
    return {"ms": 1000 * float(np.median(seconds)), "images": len(examples), "parameters": sum(p.size for p in net.params.values()),
            "trunk_multiply_adds": trunk_multiply_adds(net), "cut": {name: v for name, v in settings.get("cut", {}).items() if math.isfinite(v)}}


def trunk_multiply_adds(net, side=192):
    """Of the net's trunk for a pixel of a large image: what a pixel of the budget costs, forward."""
    trunk = net.parts["backbone" if "backbone" in net.parts else "trunk"]
    return summary(trunk, (1, side, side, 3)).multiply_adds / side**2


def looked(job, args, which, most=None):
    """probe() of a run's net, made once for its weights: its answer, and the path of its detections."""
    path, detections = judged_files(job, args, which)
    if not is_judged(job, args, which):
        path.parent.mkdir(exist_ok=True)
        asked = {**config_of(job), "eval_set": which, "most": most, "turns": TURNS if most else 1, "backend": args.backend,
                 "weights": str(job.folder / "weights.npz"), "detections": str(detections)}
        told = timing.fresh(__file__, ["--probe", json.dumps(asked)])
        files.write(path, json.dumps({**told, "weights": checksum(job)}) + "\n")
    return files.read_json(path), detections


def judged_files(job, args, which):
    """Where looked() keeps its answer, and the detections."""
    return [args.folder / "judged" / f"{job.name}-{which}{ending}.json" for ending in ("", "-detections")]


def is_judged(job, args, which):
    """Whether looked() has its answer, of the weights that the run has now."""
    path, detections = judged_files(job, args, which)
    return path.exists() and detections.exists() and files.read_json(path, "weights", "ms")["weights"] == checksum(job)


def config_of(job):
    return files.read_json(job.folder / "config.json", "data", "scenes", "steps")


def checksum(job):
    return zlib.crc32((job.folder / "weights.npz").read_bytes())


def row_of(name, method, jobs, args):
    """A method on a data set, with the figures of every seed. jobs: {seed: Job}, all done. The test set is told if args.test says so, or if it was
    looked at before with every seed's net; else "test" is None."""
    first = next(iter(jobs.values()))
    told, _ = looked(first, args, "val", LOOKED)
    test, found = args.test or all(is_judged(job, args, "test") for job in jobs.values()), {"val": [], "test": []}
    for job in jobs.values():
        config = config_of(job)
        found["val"].append(judged(job.folder / "detections.json", config, "val"))
        if test:
            found["test"].append(judged(looked(job, args, "test")[1], config, "test"))
    parts = [[files.read_json(part.result, "set", "memory_MB") for part in (*job.needs, job)] for job in jobs.values()]
    seconds = [[r.get("training_seconds") for r in results] for results in parts]
    return {"data": name, "method": method, "seeds": list(jobs), "steps": config["steps"],
            **{k: told[k] for k in ("parameters", "ms", "trunk_multiply_adds")},
            "commands": [claims.command_of(part) for part in (*first.needs, first)],
            "training_seconds": [None if None in s else sum(s) for s in seconds],                   # of a run that was stopped it is not known
            "memory_MB": [max(r["memory_MB"] for r in results) for results in parts],
            **{which: {k: [figures[k] for figures in some] for k in some[0]} if some else None for which, some in found.items()}}


def report(args, table, runs):
    """All rows whose runs are done: a JSON value."""
    done = {key: job for key, job in runs.items() if claims.is_done(job)}
    there = {(name, method): {s: done[name, method, s] for s in args.seeds if (name, method, s) in done} for name in args.sets for method in table.ON[name]}
    there = {key: jobs for key, jobs in there.items() if jobs}
    rows = [row_of(*key, jobs, args) for key, jobs in train.progress(list(there.items()), desc="judge", unit="row")]
    return {"quick": args.quick, "seeds": args.seeds, "megapixels": {name: MEGAPIXELS[name] for name in args.sets}, "machine": timing.settings(),
            "missing": [job.name for key, job in runs.items() if key not in done], "rows": rows}


# What a reader sees

def markdown(found):
    """Lines of markdown: a table a data set."""
    lines = []
    for name, rows in by_set(found):
        figures = [("val", "AP50"), *((set_of(rows), k) for k in ("AP50", "AP", "places"))][set_of(rows) == "val":]
        columns = [f"{k}, {which}" for which, k in figures] + ["steps", "training, s", "detection, ms", "memory, MB", "parameters", "MAC a pixel"]
        lines += [f"**{name}**, {budget_of(found, name)}:", "", f"| method | {' | '.join(columns)} |", "| --- " + "| ---: " * len(columns) + "|"]
        for r in rows:
            known = [s for s in r["training_seconds"] if s is not None]
            cells = [*(claims.shown(claims.spread(r[which][k]), 100, ".1f") for which, k in figures),
                     " + ".join(re.findall(r"--steps (\d+)", command)[-1] for command in r["commands"]),
                     f"{np.median(known):.0f} ({min(known):.0f} .. {max(known):.0f})" if known else "-",
                     f"{r['ms']:.0f}", f"{np.median(r['memory_MB']):.0f}", f"{r['parameters']:,}", f"{r['trunk_multiply_adds']:,.0f}"]
            seeds = "" if r["seeds"] == found["seeds"] else f" (seeds {' '.join(map(str, r['seeds']))})"
            lines.append(f"| {r['method']}{seeds} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def by_set(found):
    """(data set, its rows) for those that have rows."""
    pairs = ((name, [r for r in found["rows"] if r["data"] == name]) for name in found["megapixels"])
    return [(name, rows) for name, rows in pairs if rows]


def set_of(rows):
    """The image set that is shown: "test" if all rows have looked at it."""
    return "test" if all(r["test"] for r in rows) else "val"


def budget_of(found, name):
    return "two steps" if found["quick"] else f"{found['megapixels'][name]} megapixels a net"


def pictures(found, runs, args):
    """Draw, for each data set, AP50 against training time, and the same images as every method sees them."""
    for name, rows in by_set(found):
        which = set_of(rows)
        figure, axes = draw.plot("training, seconds", f"mean AP50, {which}", f"{name}: {budget_of(found, name)}, seeds {' '.join(map(str, found['seeds']))}")
        for r in rows:
            points = [(t, ap) for t, ap in zip(r["training_seconds"], r[which]["AP50"]) if None not in (t, ap)]
            if points:
                axes.plot(*zip(*points), linestyle="", marker="o", color=draw.COLOURS[list(METHODS).index(r["method"])], label=r["method"])
        axes.set_xlim(left=0)
        if axes.lines:
            axes.legend(fontsize="small")
        draw.save(figure, args.folder / f"time_{name}.png")
        draw.save(sheet(name, rows, which, runs, args), args.folder / f"sheet_{name}.jpg")


def sheet(name, rows, which, runs, args):
    """A row of pictures for the ground truth and one for each method: the first images of the set, boxes above the score of best F1 on val."""
    made, captions = [], []
    for r in [None, *rows]:
        job = runs[name, (r or rows[0])["method"], (r or rows[0])["seeds"][0]]
        told, path = looked(job, args, which, LOOKED if which == "val" else None)
        config = config_of(job)
        examples, classes = examples_of(config["data"], config["scenes"], which)
        examples = examples[:told["images"]]
        detections, _ = coco.named_results(path, [e.name for e in examples], classes)
        for example, (boxes, labels, scores) in list(zip(examples, detections))[:SHOWN]:
            image, cuts = example.image(), np.array([told["cut"].get(classes[k], np.inf) for k in labels])
            enlarge, some = 320 / image.shape[1], scores >= cuts
            if r is None:
                made.append(draw.boxes(image, example.boxes, example.labels, classes, enlarge=enlarge, bracket=example.difficult))
            else:
                made.append(draw.boxes(image, boxes[some], labels[some], classes, scores[some], enlarge))
            captions.append(r["method"] if r else f"ground truth, {example.name}"[:44])
    return draw.sheet(made, SHOWN, captions)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--data", type=Path, metavar="FOLDER", help="holds the data sets in folders by their names")
    a("--sets", nargs="+", choices=MEGAPIXELS, default=["scenes"], metavar="SET", help=f"of {', '.join(MEGAPIXELS)} (scenes)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smoke run: two steps of everything, one seed")
    size.add_argument("--full", action="store_true", help="what README shows")
    a("--test", action="store_true", help="look at the test sets, too: once, when nothing is chosen any more")
    a("--report", action="store_true", help="run nothing: only the tables and pictures of the runs that are done")
    a("--only", nargs="+", choices=METHODS, metavar="METHOD", help="run these methods alone")
    a("--seeds", nargs="+", type=int, metavar="S", help="(0 1 2; --quick: 0)")
    a("--jobs", type=int, default=2, metavar="N", help="runs at a time, which share the cores (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="of the runs; cuda: on a GPU (%(default)s)")
    a("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where the folder compare lies (%(default)s)")
    a("--json", type=Path, metavar="FILE", help="where the figures go (<out>/compare/compare.json)")
    a("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.probe:
        return args
    if not args.quick and not args.full:
        parser.error("name --quick, a smoke run, or --full, what README shows")
    claims.settle_seeds(parser, args)
    if folders := [name for name in args.sets if name != "scenes"]:
        if not args.data:
            parser.error(f"--sets {' '.join(folders)} needs --data, a folder that holds them")
        if missing := [name for name in folders if not (args.data / name).is_dir()]:
            parser.error(f"--data must hold the data sets {', '.join(folders)}, got no folder {args.data / missing[0]}")
    timing.check_json(parser, args.json)
    args.paper, args.folder = "compare", (args.out / ("compare" + "-quick" * args.quick)).resolve()
    args.json = args.json or args.folder / "compare.json"
    return args


def main(args):
    draw.require()
    table = table_of(args.sets)
    runs, _ = claims.jobs_of(args, table)
    for folder in (args.data / name for name in args.sets if name != "scenes"):
        splits = data.splits(folder)
        if args.test and "test" not in splits:
            raise ValueError(f"compare: --test needs a test set in {folder}, got {', '.join(splits)}")
    if not args.report:
        wanted = {key: job for key, job in runs.items() if not args.only or key[1] in args.only}
        needed = [need.name for job in wanted.values() for need in job.needs]
        chosen = {key: job for key, job in runs.items() if key in wanted or job.name in needed}
        claims.run_all(argparse.Namespace(**{**vars(args), "only": None}), chosen, {})
    elif not args.folder.is_dir():
        raise FileNotFoundError(f"compare: --report needs runs, got no folder {args.folder}")
    found = report(args, table, runs)
    if not found["rows"]:
        raise ValueError(f"compare: there must be a run of {', '.join(args.sets)} that is done, got none in {args.folder}")
    files.write(args.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    lines = markdown(found)
    files.write(args.folder / "compare.md", "\n".join(lines) + "\n")
    pictures(found, runs, args)
    print("\n".join(lines))
    print(f"\nruns missing: {len(found['missing'])}" * bool(found["missing"]) + f"\nfigures: {args.json}; pictures: {args.folder}")
    return found


if __name__ == "__main__":
    args = arguments()
    if args.probe:
        asked = json.loads(args.probe)
        try:
            with tinydet.use(asked["backend"]) as put:
                print(json.dumps(probe(asked, put)))
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            sys.exit(f"error: {error}")
        sys.exit()
    claims.as_command(main, args)
