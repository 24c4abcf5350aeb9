"""What the training programs share: common arguments, reading the data, and what they leave in the run folder."""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import augment, canvases, data, draw, evaluate, evaluate_classification, files, mistakes, scenes


# What published weights want to see: mean and std of RGB pixels in 0..255, and whether the first convolution in the file sees BGR
PIXELS = {"caffe": ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0), True),
          "torchvision": (tuple(255 * v for v in (0.485, 0.456, 0.406)), tuple(255 * v for v in (0.229, 0.224, 0.225)), False)}
LABELLED = "images of one class each (PASCAL VOC, YOLO, COCO or class folders), or IDX files put on clutter (default: "        # help of --data


def count(text):
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def add_arguments(parser, name, data="a PASCAL VOC, YOLO or COCO folder (default: embedded scenes)"):
    """The arguments of every training program; name: that of its runs; data: help of --data."""
    a = parser.add_argument
    a("--data", metavar="FOLDER", help=data)
    a("--scenes", type=count, default=400, help="embedded scenes to train on; a quarter as many are evaluated, unless another option says how many (%(default)s)")
    a("--train-set", default="train", help="image set to train on (%(default)s)")
    a("--eval-set", default="val", help="image set to evaluate; without a val list, a seeded fifth of the training set (%(default)s)")
    a("--seed", type=int, default=0, help="of weights, training images and order (%(default)s)")
    a("--workers", type=int, choices=range(17), default=1, metavar="N", help="threads that prepare images ahead, 0..16 (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="cuda: on a GPU; emulated: its kernels on the CPU, slowly (%(default)s)")
    a("--checkpoint-every", type=count, default=50, metavar="STEPS", help="steps between checkpoints (%(default)s)")
    a("--name", default=name, help="name of the run (%(default)s)")
    a("--out", default="runs", metavar="FOLDER", help="where run folders lie (%(default)s)")
    a("--resume", action="store_true", help="continue the run of this name")


def parse(parser, argv, presets):
    """The arguments; --preset sets those of its dict that are not given beside it. presets: {name: {argument: value}}."""
    chosen = parser.parse_args(argv)
    if chosen.preset:
        parser.set_defaults(**presets[chosen.preset])
    return parser.parse_args(argv)


def check(parser, args):
    """Refuse what argparse alone lets pass."""
    if not (0 < args.lr < math.inf and args.seed >= 0 and args.name and Path(args.name).name == args.name):
        parser.error(f"--lr must be positive, --seed not be negative, --name be the name of a folder; got {args.lr}, {args.seed}, {args.name!r}")


def settle(args, samples, steps):
    """Set the number of steps, if none is given: `steps`, or the epochs of a preset for so many samples; and measure_every."""
    args.steps = args.steps or (math.ceil(args.epochs * samples / args.batch) if args.epochs else steps)
    args.measure_every = args.measure_every or -(-args.steps // 5)


def settings(args, *left_out):
    """The arguments that make a run what it is, as JSON values: a resumed run must have the same."""
    config = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "checkpoint_every", "workers", *left_out)}
    for name in {"data", "weights"} & {*config}:
        config[name] = str(Path(config[name]).resolve()) if config[name] else None
    return config


def read(args):
    """Training and evaluation examples, and the class names."""
    if not args.data:
        return scenes.scenes(args.scenes, 0, "train"), *read_held_out(args)
    examples, classes = data.read(args.data, args.train_set)
    if args.eval_set == "val" and "val" not in data.splits(args.data):
        return *data.hold_out(examples, 0.2), classes
    return examples, data.read(args.data, args.eval_set, classes)[0], classes


def read_held_out(args):
    """The evaluation examples alone, and the class names: no embedded scenes to train on are painted."""
    if not args.data:
        return scenes.scenes(-(-args.scenes // 4), 0, args.eval_set), scenes.CLASSES
    return read(args)[1:]


KEPT = 2**30                        # bytes of training images that stay in memory
CANVAS = {"size": (116, 96), "sides": (40, 80), "fragments": (1, 4)}          # pixels; options of canvases.canvases


def add_canvas_arguments(parser):
    """--canvases and --eval-canvases, for read_labelled; --scenes of add_arguments has no use beside them."""
    a = parser.add_argument
    a("--canvases", type=count, default=8000, help="cluttered canvases to train on, with one item each (%(default)s)")
    a("--eval-canvases", type=count, default=500, help="cluttered canvases to evaluate on (%(default)s)")


def read_labelled(args):
    """Training and evaluation examples of one class each, and the class names: for programs that classify and localize.

    Items of --data in IDX files (such as fashion-mnist), or without --data painted shapes, lie on canvases, the same ones for every --seed; of
    a training set without a val set beside it, a seeded sixth of the items is for "val". Other layouts are taken as they are, without
    the images of several classes. Raises as data.read; ValueError if nothing is left.
    """
    if args.data and not data.layout(args.data).__name__.endswith("idx"):
        *sets, classes = read(args)
        kept = [[e for e in examples if len(e.image_labels()) == 1] for examples in sets]
        for name, some, examples in zip((args.train_set, args.eval_set), kept, sets):
            if len(some) < len(examples):
                print(f"{name}: {len(examples) - len(some)} of {len(examples)} images are left out, for they are not of one class")
            if not some:
                raise ValueError(f"read_labelled: {args.data} must hold images of one class in {name}, got none")
        return *kept, classes
    items, held_out, classes = read_items(args)
    return (canvases.canvases(items, args.canvases, 0, "train", **CANVAS),
            canvases.canvases(held_out, args.eval_canvases, 0, args.eval_set, **CANVAS), classes)


def read_items(args):
    """Training and evaluation items for canvases, and the class names: those of --data in IDX files, else painted shapes.

    Of a training set without a val set beside it, a seeded sixth of the items is for "val".
    """
    if not args.data:
        return scenes.items(1200, 0, "train"), scenes.items(400, 0, args.eval_set), scenes.CLASSES
    items, classes = data.read(args.data, args.train_set)
    if args.eval_set == "val" and "val" not in data.splits(args.data):
        order = np.random.default_rng(0).permutation(len(items))
        return *([items[i] for i in some] for some in (order[len(items) // 6:], order[:len(items) // 6])), classes
    return items, data.read(args.data, args.eval_set, classes)[0], classes


def kept_images(examples, short):
    """image(j): that of example j, uint8 (H, W, 3), of that short side; the first KEPT bytes stay in memory, the others are made each time."""
    kept = {}

    def image(j):
        if j in kept:
            return kept[j]
        found = examples[j].image()
        found = augment.scale(found, np.zeros((0, 4)), short / min(found.shape[:2]))[0]
        if len(kept) * found.nbytes < KEPT:
            kept[j] = found
        return found
    return image


def drawn(rng, count, n):
    """n of so many examples at random, (n,) integers: different ones, unless there are fewer than n."""
    return rng.choice(count, n, replace=count < n)


def seconds(args, start):
    """Whole seconds since start, a time.perf_counter(); None of a run that was resumed."""
    return None if args.resume else round(time.perf_counter() - start)


def records(detections, examples, classes):
    """Detections as the JSON list that examples/detect.py --json gives, for an evaluator."""
    return [{"image": e.name, "class": classes[int(k)], "box": [float(v) for v in box], "score": float(s)}
            for e, found in zip(examples, detections) for box, k, s in zip(*found)]


def figures(detections, examples, classes):
    """Results by class, the scores of best F1, and all figures as JSON values."""
    results, coco = evaluate.voc(detections, examples, classes), evaluate.coco_of_examples(detections, examples, classes)
    cut = {name: evaluate.best_threshold(r) for name, r in results.items()}
    errors = mistakes.errors(detections, examples, classes, cut)
    table = [*evaluate.table(results), "", *coco.table(), "", "errors at the score of best F1", *mistakes.table(errors)]
    return results, cut, {**evaluate.summary(results), **coco.summary(), "errors": errors}, table


def measure(run, step, detections, examples, classes, **more):
    """Keep a point of the curve: "mean AP50" of the detections, and more numbers. Returns all points so far."""
    return keep_point(run, {"step": step, "mean AP50": evaluate.mean_ap(evaluate.voc(detections, examples, classes)), **more})


def keep_point(run, point):
    """Keep a point of the curve, curve.json in the run folder: a dict of "step" and numbers. Returns all points so far.

    NaN, where there is nothing to measure, is kept as null. Points of this step and later are dropped: a resumed run measures them again.
    """
    path = run.folder / "curve.json"
    point = {k: None if math.isnan(v) else v for k, v in point.items()}
    curve = [p for p in (files.read_json(path) if path.exists() else []) if p["step"] < point["step"]] + [point]
    files.write(path, json.dumps(curve, indent=1) + "\n")
    return curve


def keep_wrong(run, variant, wrong):
    """Keep which images are wrong: wrong.json in the run folder, or wrong_<variant>.json, 0 or 1 an image by error.

    wrong: {error: evaluate_classification.ErrorRate}. Returns {error: share of the images}.
    """
    files.write(run.folder / (f"wrong_{variant}.json" if variant else "wrong.json"),
                json.dumps({error: rate.wrong.astype(int).tolist() for error, rate in wrong.items()}) + "\n")
    return {error: rate.error for error, rate in wrong.items()}


def keep_ranking(run, variant, ranked, classes):
    """Keep how the images rank: ranking.json in the run folder, or ranking_<variant>.json, as claims.py describes it.

    ranked: {metric, a name in "_ap": (scores (N, K) float, hits (N, K) bool, labels (N, K) of 1, 0, -1)}, as
    evaluate_classification.location_ap takes them; for classification_ap's hits give labels == 1. Raises as location_ap.
    Returns {metric: mean AP over the classes with positives}.
    """
    kept, means = {}, {}
    for metric, (scores, hits, labels) in ranked.items():
        means[metric] = evaluate.mean_ap(evaluate_classification.location_ap(scores, hits, labels, classes))
        kept[metric] = {name: {"scores": s.tolist(), "hits": [None if y < 0 else int(y == 1 and h) for h, y in zip(hit, label)],
                               "positive": [int(y == 1) for y in label]} for name, s, hit, label in zip(classes, scores.T, hits.T, labels.T)}
    files.write(run.folder / (f"ranking_{variant}.json" if variant else "ranking.json"), json.dumps(kept) + "\n")
    return means


def finish(run, args, detections, examples, classes, losses, save, **more):
    """Evaluate the detections, write weights, detections and figures into the run folder, draw, and print the tables.

    losses: names of the metrics to draw; save(path, cut) writes the weights; more: further entries of results.json.
    """
    results, cut, told, table = figures(detections, examples, classes)
    save(run.folder / "weights.npz", cut)
    files.write(run.folder / "detections.json", json.dumps(records(detections, examples, classes)))
    draw.loss_curves(run.metrics(), losses, run.folder / "loss.png")
    draw.precision_recall(results, run.folder / "precision_recall.png", f"{args.name}: {args.eval_set}, IoU 0.5")
    draw.save(draw.detections_sheet(examples[:8], detections[:8], classes, cut), run.folder / "detections.png")
    draw.false_positives(mistakes.false_positives(detections, examples, classes), classes, run.folder / "false_positives")
    print("\n".join(table))
    keep_results(run, args, {**told, **more})
    return results


def keep_results(run, args, figures):
    """Write results.json into the run folder, the last file of a run: "set", the figures and what training took.

    "training_seconds": in train.fit, and for the features of frozen layers that are kept, without evaluation; null of a run
    that was resumed. "memory_MB": the most that this process has held, evaluation included.
    Says where all lies, returns what it wrote.
    """
    seconds = None if args.resume or run.seconds is None else round(run.seconds, 3)
    found = {"set": args.eval_set, **figures, "training_seconds": seconds, "memory_MB": round(timing.peak())}
    files.write(run.folder / "results.json", json.dumps(found, indent=1) + "\n")
    print(f"\npictures, weights and figures: {run.folder}")
    return found


def trained(args, put, program, name, *options):
    """Weights of <out>/<name>, a run of another program, which is trained, or trained to the end, if they are not there.

    program: its module; options: more words of its command line. One that is there may have another seed, but must have been trained on what
    options say: --data, --scenes, --train-set, --eval-set, --proposals. A run of args.name that may not be there is refused before.
    """
    folder = Path(args.out) / name
    if (folder / "config.json").is_file():
        before, wanted = files.read_json(folder / "config.json"), settings(program.arguments(list(options)))
        for key in ("data", "scenes", "train_set", "eval_set", "proposals"):
            if "--" + key.replace("_", "-") in options and before.get(key) != wanted[key]:
                raise ValueError(f"{folder} must be a run with {key} {wanted[key]}, for that is asked for here, got one with {before.get(key)}: "
                                 "move it away, or give --weights")
        if (folder / "weights.npz").is_file():
            print(f"starts from {folder}, of seed {before.get('seed')}")
    if not (folder / "weights.npz").is_file():
        if (Path(args.out) / args.name / "config.json").exists() and not args.resume:
            raise FileExistsError(f"{Path(args.out) / args.name} holds a run already; resume it, or choose another name")
        print(f"first the source net, into {folder}")
        resume = ["--resume"] if (folder / "config.json").exists() else []
        words = ["--out", args.out, "--name", name, "--backend", args.backend, "--seed", str(args.seed), *options, *resume]
        program.main(program.arguments(words), put)
        args.resume = args.resume and (Path(args.out) / args.name / "config.json").exists()         # what was stopped may have been this
    return folder / "weights.npz"


def start(main, args):
    """Run main(args, put) on its backend; errors end in one line, and Ctrl-C says how to go on."""
    try:
        with tinydet.use(args.backend) as put:
            main(args, put)
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command with --resume goes on from the last checkpoint in {args.out}/{args.name}")
