"""What transfer.py and weak_localization.py share: the net that they start from, figures of whole images, pictures."""
import dataclasses
import math

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np
import pretrain
from PIL import ImageDraw

from tinydet import data, draw, evaluate, evaluate_classification, files, scenes
from tinydet.models import oquab

SCRATCH = {"table": "6144", "init": 0.01, "inverted": False, "std": 1.0}        # the paper's net, for --start random: fields of its Spec
SHOWN = 4                           # images whose maps are kept while a net trains
MOST = 8                            # images on maps.png


def add_arguments(parser):
    a = parser.add_argument
    a("--eval-scenes", type=common.count, default=100, help="embedded scenes to evaluate (%(default)s)")
    a("--weights", metavar="FILE", help="the source net, of examples/pretrain.py (default: <out>/pretrain/weights.npz, trained first if it is not there); "
      "of one with --classical dropout give its --dropout")
    a("--start", choices=("pretrained", "random"), default="pretrained", help="random: no source net (%(default)s)")
    a("--trains", choices=oquab.TRAINS, help="the adaptation layers alone, FC6 too, or all (default: head; with --start random all)")
    a("--table", choices=oquab.TABLES, help="the net of --start random (small); else it is that of the weights")
    a("--width", type=float, help="factor on its channels (1)")
    a("--adapt", type=common.count, metavar="UNITS", help="of FCa (default: that of the net: 2048, small 128)")
    a("--tolerance", type=float, metavar="PIXELS", help="a place counts in a box that is grown by it (18, the paper's, unverified; small 4, half its stride)")
    a("--measure-every", type=common.count, metavar="STEPS", help="average precision, and maps of some images (default: a fifth of the steps)")
    parser.set_defaults(epochs=None, scratch={})                    # of presets: in place of steps; fields of the Spec of --start random


def check(parser, args):
    """Settle what depends on other arguments, and refuse what argparse alone lets pass."""
    common.check(parser, args)
    args.trains = args.trains or ("head" if args.start == "pretrained" else "all")
    if args.start == "random" and args.weights or args.start != "random" and (args.table or args.width is not None):
        parser.error("--weights belong to --start pretrained, --table and --width to --start random")
    if args.name == "pretrain":
        parser.error("--name must not be that of the source net, pretrain")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must lie in [0, 1), got {args.dropout}")
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        parser.error(f"--tolerance must not be negative, got {args.tolerance}")


def read(args):
    """Training and evaluation examples, and the class names."""
    if args.data:
        return common.read(args)
    return scenes.scenes(args.scenes, 0, "train"), scenes.scenes(args.eval_scenes, 0, args.eval_set), scenes.CLASSES


def build(args, put, examples, classes, head, **more):
    """The net: trunk, FC6 and FC7 of the source net, which is trained first if need be, or random ones; `more`: fields of its Spec."""
    rng, own = np.random.default_rng(args.seed), {"classes": tuple(classes), "head": head, "dropout": args.dropout, "adapt": args.adapt, **more}
    if args.start == "random":
        mean, std = data.mean_std(examples)
        given = {k: v for k, v in (("table", args.table), ("width", args.width)) if v is not None}
        net = oquab.Oquab(oquab.Spec(**{"mean": mean, "std": std, **args.scratch, **given, **own}), rng)
    else:
        if not args.weights:
            args.weights = str(common.trained(args, put, pretrain, "pretrain"))
        source = oquab.load(args.weights)[0]
        net = oquab.Oquab(dataclasses.replace(source.spec, **own), rng)
        oquab.take_over(net, source)
    args.tolerance = args.tolerance if args.tolerance is not None else 4.0 if net.spec.table == "small" else 18.0
    oquab.freeze(net.to(put), args.trains)
    return net


# Figures of whole images

def scored(run, variant, examples, classes, tolerance, scores, points=None, confidences=None):
    """class_ap of scores (N, K), and with points (N, K, 2) location_ap by confidences (N, K), default scores. Keeps the rankings.

    An image that has a class as its tag alone does not count for the place of that class. None where nothing counts.
    """
    there = evaluate_classification.presence(examples, len(classes))
    ranked = {} if scores is None else {"class_ap": (scores, there == 1, there)}
    if points is not None:
        hits = evaluate_classification.location_hits(points, examples, tolerance)
        boxed = np.array([np.isin(np.arange(len(classes)), e.labels) for e in examples])
        ranked["location_ap"] = scores if confidences is None else confidences, hits, np.where((there == 1) & ~boxed, -1, there)
    means = common.keep_ranking(run, variant, ranked, classes)
    return {metric: None if math.isnan(mean) else mean for metric, mean in means.items()}       # NaN is no JSON


def eleven_point(scores, examples, classes):
    """class_ap as VOC 2007 has it: the mean at eleven recalls."""
    results = evaluate_classification.classification_ap(scores, evaluate_classification.presence(examples, len(classes)), classes, True)
    mean = evaluate.mean_ap(results)
    return {"class_ap_11point": None if math.isnan(mean) else mean}


def middles(examples, K):
    """(N, K, 2): the middle of each image, the place that a blind guess names."""
    return np.repeat(np.array([e.size for e in examples], float)[:, None] / 2, K, 1)


def finish(run, args, examples, classes, scores, maps, points, found):
    """Tables and pictures. maps(i): (K, h, w), not negative, over the whole of image i; found: {variant: {metric: value}}.

    All maps have one scale of colours, from 0 to the largest value on maps.png.
    """
    first = [maps(i) for i in range(min(MOST, len(examples)))]
    low, high = 0.0, max(float(of.max()) for of in first)
    results = evaluate_classification.classification_ap(scores, evaluate_classification.presence(examples, len(classes)), classes)
    draw.precision_recall(results, run.folder / "precision_recall.png", f"{args.name}: {args.eval_set}, images of the class")
    draw.save(maps_sheet(examples, classes, scores, first, points, low, high), run.folder / "maps.png")
    folder = run.folder / "false_positives"
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(classes):
        wrong = first_wrong(examples, scores, k)
        if len(wrong):
            shown = [map_picture(examples[i], k, maps(i)[k], points[i, k], low, high) for i in wrong]
            captions = [f"{scores[i, k]:.2f}: {', '.join(classes[c] for c in examples[i].image_labels())}"[:34] for i in wrong]
            draw.save(draw.sheet(shown, 5, captions), draw.class_file(folder, k, name))
    shown = sorted((run.folder / "maps").glob("*.npz"), key=lambda path: int(path.stem))
    if shown:
        draw.save(training_sheet(examples, classes, shown, low, high), run.folder / "maps_training.png")
    print(f"{'class':14} AP by image")
    for name, r in results.items():
        print(f"{name:14} {r.ap:6.3f}")
    for name, values in found.items():
        print(f"{name or 'as set':14}", "   ".join(f"{metric} {value:.3f}" for metric, value in values.items() if value is not None))


def first_wrong(examples, scores, k, most=10):
    """The first false positives of class k: images without it, highest score first."""
    without = np.flatnonzero([k not in e.image_labels() for e in examples])
    return without[np.argsort(-scores[without, k], kind="stable")[:most]]


# Pictures

def map_picture(example, k, values, point, low, high, side=220):
    """A class's map over an image, its boxes of that class in white, and a cross where the map says it is."""
    enlarge = side / max(example.size)
    picture = draw.heat_map(example.image(), values, (0, 0, *example.size), low, high, enlarge)
    pen = ImageDraw.Draw(picture)
    for box in example.boxes[example.labels == k] * enlarge:
        pen.rectangle(tuple(box), outline="white", width=2)
    if point is not None:
        x, y = point * enlarge
        for colour, width in (("black", 4), ("white", 2)):
            pen.line((x - 7, y, x + 7, y), fill=colour, width=width)
            pen.line((x, y - 7, x, y + 7), fill=colour, width=width)
    return picture


def maps_sheet(examples, classes, scores, maps, points, low, high):
    """The first images, each with the maps of the class that is there and scores highest, and of the highest one that is not there.

    maps: (K, h, w) of each image to show.
    """
    pictures, captions = [], []
    for i, (e, of) in enumerate(zip(examples, maps)):
        there = np.isin(np.arange(len(classes)), e.image_labels())
        pictures.append(draw.boxes(e.image(), e.boxes, e.labels, classes, enlarge=220 / max(e.size), bracket=e.difficult))
        captions.append(e.name[:30])
        for kind, kept in (("there", there), ("not there", ~there)):
            k = int(np.where(kept, scores[i], -np.inf).argmax())
            pictures.append(map_picture(e, k, of[k], points[i, k], low, high))
            captions.append(f"{'none ' * (not kept.any())}{kind}: {classes[k]} {scores[i, k]:.2f}"[:34])
    return draw.sheet(pictures, 6, captions)


def keep_maps(run, step, maps):
    """Keep what the maps of a few images look like at a step: a list of (h, w), or of None where an image shows none."""
    if all(m is None for m in maps):
        return
    folder = run.folder / "maps"
    folder.mkdir(exist_ok=True)
    files.write_arrays(folder / f"{step}.npz", {str(i): np.asarray(m, np.float32) for i, m in enumerate(maps) if m is not None}, {"step": step})


def training_sheet(examples, classes, paths, low, high):
    """How maps came about: an image a row, a step a column; the class is the first that is there."""
    kept = [(path.stem, files.read_arrays(path)[0]) for path in paths]
    pictures, captions = [], []
    for i, e in enumerate(examples[:SHOWN]):
        for step, arrays in kept:
            if str(i) in arrays:
                k = first_class(e)
                pictures.append(map_picture(e, k, arrays[str(i)], None, low, high, 180))
                captions.append(f"step {step}: {classes[k]}"[:28])
    return draw.sheet(pictures, len(kept), captions)


def first_class(example):
    """The class whose maps are kept while a net trains; None for an image of none."""
    labels = example.image_labels()
    return int(labels[0]) if len(labels) else None
