"""Train the source net of transfer and weak supervision (Oquab et al., CVPR 2014, sec. 3.1; tinydet/models/oquab.py).

    python examples/pretrain.py                                     # close-ups of shapes in 24 classes, under a minute on two cores
    python examples/pretrain.py --classes far                       # other source classes: near (to those of the scenes), far, all
    python examples/pretrain.py --data FOLDER --name clothes        # images of one class each, or IDX files put on clutter
    python examples/pretrain.py --preset paper --data FOLDER --backend cuda

Its weights.npz is what examples/transfer.py and examples/weak_localization.py start from. Each step takes one view (a window at random, half of
them mirrored) of each of --batch images. Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz,
results.json (top-1 and top-5 error of the mean over ten views), wrong.json, loss.png, curve.png, and
sheet.png      images that it has not seen, with what it says of them
filters.png    of the first layer
A run that was stopped goes on with --resume.
"""
import argparse
import math
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np
from PIL import Image

from tinydet import canvases, data, draw, optim, scenes, train
from tinydet.backend import put as place, to_numpy
from tinydet.evaluate_classification import top_k_error
from tinydet.models import oquab, overfeat
from tinydet.ops import softmax_loss
from tinydet.summary import summary

# CVPR 2014, sec. 4. The rate falls when the training loss no longer does; three rounds. CHOICE: 90 epochs of one
# view an image, in equal parts; batches are drawn anew from all images
PRESETS = {"paper": {"table": "6144", "init": 0.01, "dropout": 0.5, "classical": True, "batch": 128, "lr": 0.01, "momentum": 0.9,
                     "weight_decay": 5e-4, "epochs": 90, "std": 1.0}}
CLASSES = {"near": scenes.NEAR, "far": scenes.FAR, "all": scenes.NEAR + scenes.FAR}
ERRORS = {"top1_error": 1, "top5_error": 5}
MEASURED = 300                      # images of the evaluation set that points of the curve look at
SHORT = 256 / 224                   # short side of training images, of the window


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "pretrain", common.LABELLED + "embedded close-ups)")
    a("--preset", choices=PRESETS, help="the paper's settings; those given beside it win")
    a("--classes", choices=CLASSES, default="all", help="of the close-ups: the scenes' shapes, others, or both (%(default)s)")
    a("--images", type=common.count, default=6000, help="close-ups, or items of IDX files on clutter, to train on; a tenth as many are evaluated (%(default)s)")
    a("--table", choices=oquab.TABLES, default="small", help="the net (%(default)s)")
    a("--width", type=float, default=1.0, help="factor on its channels (%(default)s)")
    a("--init", type=float, metavar="STD", default=0.0, help="of all weights at the start; 0: He's rule (%(default)s)")
    a("--dropout", type=float, default=0.1, help="of FC6 and FC7 (%(default)s)")
    a("--std", type=float, default=0.0, help="what pixels are divided by, their mean subtracted; 0: their standard deviation (%(default)s; the paper divides by nothing: 1)")
    a("--classical", action="store_true", help="dropout that scales at test time, as the paper's, not in training")
    a("--batch", type=common.count, default=64, help="images a step (%(default)s)")
    a("--steps", type=common.count, help="training steps (1500; --preset: its epochs)")
    a("--lr", type=float, default=0.03, help="first learning rate (%(default)s); --preset: a tenth after each third of the steps, else along a cosine")
    a("--momentum", type=float, default=0.9, help="(%(default)s)")
    a("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    a("--measure-every", type=common.count, metavar="STEPS", help="top-1 error (default: a fifth of the steps)")
    parser.set_defaults(epochs=None)
    args = common.parse(parser, argv, PRESETS)
    common.check(parser, args)
    return args


def read(args):
    """Training and evaluation examples of one class each, and the class names.

    Close-ups without --data; items of IDX files each on a small cluttered canvas; of other layouts the images that are of one class.
    """
    side = math.ceil(SHORT * oquab.TABLES[args.table].window)
    counts = args.images, -(-args.images // 10)
    if not args.data:
        classes = CLASSES[args.classes]
        return *(scenes.close_ups(n, 0, split, classes, side) for n, split in zip(counts, ("train", args.eval_set))), classes
    if not data.layout(args.data).__name__.endswith("idx"):
        *sets, classes = common.read_labelled(args)
        return *([some[i] for i in np.random.default_rng(0).permutation(len(some))] for some in sets), classes      # folders come class by class
    items, held_out, classes = common.read_items(args)
    clutter = {"size": side, "sides": (side * 5 // 8, side), "fragments": (0, 2)}
    return *(canvases.canvases(some, n, 0, split, **clutter) for some, n, split in
             zip((items, held_out), counts, ("train", args.eval_set))), classes


def sheet(examples, true, p, classes, most=40):
    """Evaluation images with the class that they have and, where it differs, the one that the net gives them. p: (N, classes)."""
    pictures = [Image.fromarray(e.image()).resize((112, 112), Image.Resampling.BICUBIC) for e in examples[:most]]
    captions = [classes[t] if t == k else f"{classes[k]}?" for t, k in zip(true, p[:most].argmax(1))]
    return draw.sheet(pictures, 10, [c[:18] for c in captions])


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = read(args)
    labels, true = (np.array([e.image_labels()[0] for e in some]) for some in (examples, held_out))
    common.settle(args, len(examples), 1500)
    mean, std = data.mean_std(examples)
    spec = oquab.Spec(tuple(classes), args.table, width=args.width, dropout=args.dropout, inverted=not args.classical, init=args.init or None,
                      mean=mean, std=args.std or std)
    net = oquab.Oquab(spec, np.random.default_rng(args.seed)).to(put)
    optimizer = optim.SGD(net, args.momentum, args.weight_decay)
    run = train.Run(Path(args.out) / args.name, common.settings(args, "measure_every"), args.resume)
    side, short = net.table.window, math.ceil(SHORT * net.table.window)
    image_of = common.kept_images(examples, short)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, window {side}, {args.steps} steps")
    print(summary(net, (1, side, side, 3)), flush=True)

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = common.drawn(rng, len(examples), args.batch)
        return np.stack([overfeat.training_view(net.table, image_of(j), rng, short) for j in batch]), labels[batch], rng

    def step(i, prepared):
        if i and i % args.measure_every == 0:
            measure(i)
        views, answer, rng = prepared
        scores, cache = net.forward(put(net.normalise(views)), True, rng)
        loss, dscores = softmax_loss.loss(scores.reshape(len(answer), -1), put(answer))
        net.backward(dscores.reshape(scores.shape), cache)
        return {"loss": loss}

    def say(e):
        """(classes,): the mean of the probabilities of ten views."""
        scores = to_numpy(net(place(net.normalise(overfeat.ten_views(net.table, e.image(), short))))).astype(np.float64)
        return softmax_loss.softmax(scores)[:, 0, 0].mean(0)

    @run.aside
    def measure(i):
        seen = np.array([say(e) for e in held_out[:MEASURED]])
        return common.keep_point(run, {"step": i, "top1_error": top_k_error(seen, true[:MEASURED], 1).error})

    if args.preset:
        schedule = optim.step_schedule(args.lr, [args.steps // 3, 2 * args.steps // 3], 0.1)
    else:
        schedule = optim.cosine_schedule(args.lr, args.steps, args.steps // 20)
    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)
    oquab.save(net, run.folder / "weights.npz", {})
    curve = measure(args.steps)
    draw.measurements(curve, ("top1_error",), run.folder / "curve.png")
    draw.loss_curves(run.metrics(), ("loss",), run.folder / "loss.png")
    p = np.array([say(e) for e in train.progress(held_out, desc="evaluate", unit="image")])
    errors = common.keep_wrong(run, "", {name: top_k_error(p, true, k) for name, k in ERRORS.items()})
    print("   ".join(f"{name} {100 * value:.1f} %" for name, value in errors.items()))
    draw.save(sheet(held_out, true, p, classes), run.folder / "sheet.png")
    draw.save(draw.filters(to_numpy(next(iter(net.params.values())))), run.folder / "filters.png")
    return common.keep_results(run, args, {"images": len(held_out), **errors, "curve": curve,
                                           "seconds": common.seconds(args, start)})


if __name__ == "__main__":
    common.start(main, arguments())
