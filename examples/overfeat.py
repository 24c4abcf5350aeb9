"""Train OverFeat as a detector, evaluate it, and draw what it found (1312.6229; tinydet/models/overfeat.py).

    python examples/overfeat.py                                     # embedded scenes, about 3 minutes on two cores
    python examples/overfeat.py --data FOLDER --name cells      # train on its split "train", evaluate on "val"

Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz (for examples/detect.py),
loss.png, precision_recall.png, detections.png, results.json. A run that was stopped goes on with --resume.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np

from tinydet import data, draw, evaluate, files, mistakes, optim, scenes, train
from tinydet.models import overfeat
from tinydet.summary import summary


def count(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--data", metavar="FOLDER", help="a PASCAL VOC, YOLO or COCO folder (default: embedded scenes)")
    a("--scenes", type=count, default=400, help="embedded scenes to train on; a quarter as many are evaluated (%(default)s)")
    a("--train-set", default="train", help="image set to train on (%(default)s)")
    a("--eval-set", default="val", help="image set to evaluate; without a val list, a seeded fifth of the training set (%(default)s)")
    a("--steps", type=count, help="training steps (scenes 750, folders 800)")
    a("--batch", type=count, default=32, help="crops a step (%(default)s)")
    a("--crop", type=count, metavar="PIXELS", help="side of a crop (default: three windows)")
    a("--window", type=count, metavar="PIXELS", help="side of the window, a multiple of 8 (default: from the training boxes)")
    a("--near-object", type=float, default=0.8, help="share of the crops that hold a fitting object (%(default)s)")
    a("--lr", type=float, default=0.07, help="largest learning rate (%(default)s)")
    a("--merging", choices=("merge", "nms"), default="merge", help="how boxes are combined (%(default)s)")
    a("--threshold", type=float, help="of the match score (merge, 0.6) or of IoU (nms, 0.45)")
    a("--seed", type=int, default=0, help="of weights, crops and order (%(default)s)")
    a("--workers", type=int, choices=range(17), default=1, metavar="N", help="threads that prepare crops ahead, 0..16 (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="cuda: on a GPU; emulated: its kernels on the CPU, slowly (%(default)s)")
    a("--checkpoint-every", type=count, default=50, metavar="STEPS", help="(%(default)s)")
    a("--name", default="overfeat", help="name of the run (%(default)s)")
    a("--out", default="runs", metavar="FOLDER", help="where run folders lie (%(default)s)")
    a("--resume", action="store_true", help="continue the run of this name")
    args = parser.parse_args(argv)
    args.steps = args.steps or (800 if args.data else 750)
    if not (0 < args.lr < np.inf and 0 <= args.near_object <= 1 and args.seed >= 0 and args.name and Path(args.name).name == args.name):
        parser.error(f"--lr must be positive, --near-object lie in [0, 1], --seed not be negative, --name be the name of a folder; got "
                     f"{args.lr}, {args.near_object}, {args.seed}, {args.name!r}")
    args.threshold = args.threshold if args.threshold is not None else {"merge": 0.6, "nms": 0.45}[args.merging]
    if not 0 <= args.threshold <= (1 if args.merging == "nms" else np.inf):
        parser.error(f"--threshold must not be negative, and at most 1 for nms, got {args.threshold}")
    return args


def read(args):
    """Training and evaluation examples, and the class names."""
    if not args.data:
        return scenes.scenes(args.scenes, 0, "train"), scenes.scenes(-(-args.scenes // 4), 0, args.eval_set), scenes.CLASSES
    examples, classes = data.read(args.data, args.train_set)
    if args.eval_set == "val" and "val" not in data.splits(args.data):
        return *data.hold_out(examples, 0.2), classes
    return examples, data.read(args.data, args.eval_set, classes)[0], classes


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = read(args)
    spec = overfeat.spec_for(examples, classes, args.window)
    side = args.crop or 3 * spec.window
    overfeat.training_view(spec, examples[0], np.random.default_rng(0), side)       # a crop too small is said before a run begins
    config = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "checkpoint_every", "merging", "threshold", "workers")}
    config["data"] = str(Path(args.data).resolve()) if args.data else None
    run = train.Run(Path(args.out) / args.name, config, args.resume)
    net = overfeat.OverFeat(spec, np.random.default_rng(args.seed)).to(put)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, window {spec.window}, scales "
          + " ".join(f"{s:.2f}" for s in spec.scales))
    print(summary(net, (1, side, side, 3)), flush=True)             # a training crop

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = rng.choice(len(examples), args.batch, replace=len(examples) < args.batch)
        images, targets = zip(*(overfeat.training_view(spec, examples[j], rng, side, args.near_object) for j in batch))
        offset = tuple(rng.integers(spec.pool, size=2))             # one offset of the last pooling a step: coarse stride
        return net.normalise(np.stack(images)), targets, offset, rng

    def step(i, prepared):
        images, targets, offset, rng = prepared
        scores, edges, cache = net.forward(put(images), train=True, rng=rng, offset=offset)
        values, dscores, dedges = overfeat.loss(spec, scores, edges, targets, rng, offset=offset)
        net.backward(dscores, dedges, cache)
        return values

    optimizer = optim.SGD(net, momentum=0.9, weight_decay=1e-4)
    train.fit(run, net, optimizer, optim.cosine_schedule(args.lr, args.steps, args.steps // 20), args.steps, step,
              args.checkpoint_every, prepare, args.workers)

    combining = {"merging": args.merging, "threshold": args.threshold}
    detections = [overfeat.detect(net, e.image(), **combining) for e in train.progress(held_out, desc="evaluate", unit="image")]
    results, coco = evaluate.voc(detections, held_out, classes), evaluate.coco_of_examples(detections, held_out, classes)
    cut = {name: evaluate.best_threshold(r) for name, r in results.items()}
    errors = mistakes.errors(detections, held_out, classes, cut)
    overfeat.save(net, run.folder / "weights.npz", {**combining, "cut": cut})
    files.write(run.folder / "results.json", json.dumps(
        {"set": args.eval_set, **combining, **evaluate.summary(results), **coco.summary(), "errors": errors,
         "seconds": None if args.resume else round(time.perf_counter() - start)}, indent=1) + "\n")
    draw.loss_curves(run.metrics(), ("loss", "class_loss", "box_loss"), run.folder / "loss.png")
    draw.precision_recall(results, run.folder / "precision_recall.png", f"{args.name}: {args.eval_set}, IoU 0.5")
    draw.save(draw.detections_sheet(held_out[:8], detections[:8], classes, cut), run.folder / "detections.png")
    draw.false_positives(mistakes.false_positives(detections, held_out, classes), classes, run.folder / "false_positives")
    print("\n".join([*evaluate.table(results), "", *coco.table(), "", "errors at the score of best F1", *mistakes.table(errors)]),
          f"\npictures, weights and figures: {run.folder}")
    return results


if __name__ == "__main__":
    args = arguments()
    try:
        with tinydet.use(args.backend) as put:
            main(args, put)
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command with --resume goes on from the last checkpoint in {args.out}/{args.name}")
