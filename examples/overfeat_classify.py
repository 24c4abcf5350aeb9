"""Train OverFeat as a classifier and evaluate it densely at several scales (1312.6229, sec. 3; tinydet/models/overfeat.py).

    python examples/overfeat_classify.py                            # embedded shapes on canvases, five to ten minutes on two cores, half of them evaluation
    python examples/overfeat_classify.py --data FOLDER --name clothes       # images of one class each, or IDX files put on canvases
    python examples/overfeat_classify.py --name second --seed 1 --committee runs/overfeat_classify/weights.npz
    python examples/overfeat_classify.py --preset paper --data FOLDER --backend cuda

Each step takes one view (a window at random, half of them mirrored) of each of --batch images. The result is that of all six scales,
fine stride and mirrored images; beside it "also" has VARIANTS, ten views of one scale as Krizhevsky et al. classify ("ten-views"), and
the mean with other nets ("committee"). Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz,
results.json, loss.png, and
wrong.json, wrong_<variant>.json    image by image, 1 if the answer is wrong
curve.json, curve.png               top-1 error while it trained: scale 1, fine stride, not mirrored, of at most MEASURED images
maps.png                            where in some images the finest scale sees the true class, and the likeliest other one
filters.png                         of the first layer in colour; of the second the four strongest input channels of each, in grey
A run that was stopped goes on with --resume.
"""
import argparse
import math
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np

from tinydet import draw, optim, train
from tinydet.backend import to_numpy
from tinydet.evaluate_classification import top_k_error
from tinydet.models import overfeat
from tinydet.ops import softmax_loss
from tinydet.summary import summary

# The paper's settings (sec. 3.1). CHOICE: 90 epochs (the paper only says when the rate falls, last after 80); an epoch is ten
# views of each image (5 crops, each also mirrored), drawn at random and independently; with --steps the rate falls at the same shares of
# them. Weights decay, biases do not (CHOICE).
PRESETS = {"paper": {"table": "accurate", "width": 1.0, "init": 0.01, "dropout": 0.5, "short": 256, "batch": 128, "lr": 5e-2, "momentum": 0.6,
                     "weight_decay": 1e-5, "epochs": 90, "halve_after": [30, 50, 60, 70, 80]}}
FOUR, SIX = (1, 2, 4, 6), range(1, 7)                               # scales of Table 2, numbered from 1 as there
MAIN = "6-fine"
VARIANTS = {"1-coarse": ((1,), False, True), "1-fine": ((1,), True, True), "4-coarse": (FOUR, False, True), "4-fine": (FOUR, True, True),
            "6-coarse": (SIX, False, True), MAIN: (SIX, True, True), "6-fine-logits": (SIX, True, False)}      # scales, fine, probabilities
ERRORS = {"top1_error": 1, "top5_error": 5}
MEASURED = 300                      # images of the evaluation set, evenly from all of it, that points of the curve look at


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "overfeat_classify", common.LABELLED + "painted shapes)")
    common.add_canvas_arguments(parser)
    a("--preset", choices=PRESETS, help="the paper's settings; those given beside it win")
    a("--table", choices=overfeat.TABLES, default="small", help="the net (%(default)s)")
    a("--width", type=float, default=1.0, help="factor on its channels (%(default)s)")
    a("--init", type=float, metavar="STD", help="of all weights at the start; 0: He's rule (small 0, others the paper's 0.01)")
    a("--dropout", type=float, help="of the classifier's hidden layers (small 0, which trains faster; others the paper's 0.5)")
    a("--short", type=common.count, metavar="PIXELS", help="short side of training images (default: 256/221 of the window, the paper's of accurate)")
    a("--batch", type=common.count, default=64, help="images a step (%(default)s)")
    a("--steps", type=common.count, help="training steps (2000; --preset: its epochs)")
    a("--lr", type=float, default=0.05, help="largest learning rate (%(default)s)")
    a("--momentum", type=float, default=0.9, help="(%(default)s)")
    a("--weight-decay", type=float, default=1e-4, help="of weights, not of biases (%(default)s)")
    a("--decay-at", type=common.count, nargs="+", metavar="STEP", help="the rate is halved at these steps (default: along a cosine)")
    a("--measure-every", type=common.count, metavar="STEPS", help="top-1 error (default: a fifth of the steps)")
    a("--committee", nargs="+", default=[], metavar="FILE", help="weights of other nets to evaluate together with this one")
    parser.set_defaults(epochs=None, halve_after=[])
    args = common.parse(parser, argv, PRESETS)
    window = overfeat.TABLES[args.table].window
    args.short = args.short or math.floor(window * 256 / 221 + 0.5)
    args.init = args.init if args.init is not None else 0.0 if args.table == "small" else 0.01
    args.dropout = args.dropout if args.dropout is not None else 0.0 if args.table == "small" else 0.5
    common.check(parser, args)
    if args.short < window:
        parser.error(f"--short must be at least the window of the {args.table} net, {window} pixels, got {args.short}")
    return args


def settle(args, images):
    """Set steps, decay_at and measure_every of args for so many training images. Raises ValueError."""
    args.steps = args.steps or (args.epochs * math.ceil(10 * images / args.batch) if args.epochs else 2000)
    args.decay_at = args.decay_at or [args.steps * epoch // args.epochs for epoch in args.halve_after]
    args.measure_every = args.measure_every or -(-args.steps // 5)
    if max(args.decay_at, default=0) >= args.steps:
        raise ValueError(f"--decay-at must lie below --steps {args.steps}, got {max(args.decay_at)}")


def committee_of(args, classes):
    """The nets of --committee. Raises ValueError for a file whose net has other classes."""
    nets = [overfeat.load(path)[0] for path in args.committee]
    for path, net in zip(args.committee, nets):
        if tuple(net.spec.classes) != tuple(classes) or net.spec.detector:
            raise ValueError(f"--committee: {path} must be a classifier of {', '.join(classes)}, got {', '.join(net.spec.classes)}"
                             + ", as a detector" * net.spec.detector)
    return nets


def answers(net, image, short):
    """(K,) numbers for each of VARIANTS and "ten-views": those of overfeat.classify and classify_ten, but each map is made once."""
    views = [overfeat.resize_to(net.table, image, size) for size in net.table.sizes]
    scores = [overfeat.class_maps(net, view[None], probabilities=False)[0] for view in views + [view[:, ::-1] for view in views]]
    both, found = {False: scores, True: [softmax_loss.softmax(F) for F in scores]}, {}
    for name, (scales, fine, probabilities) in VARIANTS.items():
        stride = 1 if fine else net.table.pool                      # coarse: what offset (0, 0) has
        found[name] = overfeat.vote([both[probabilities][s - 1 + mirrored][::stride, ::stride] for mirrored in (0, len(views)) for s in scales])
    return {**found, "ten-views": overfeat.classify_ten(net, image, short)}


def evaluate(net, examples, short, others=()):
    """For each variant the numbers of all images, (N, K)."""
    rows = []
    for e in train.progress(examples, desc="evaluate", unit="image"):
        image = e.image()
        rows.append(answers(net, image, short))
        if others:
            rows[-1]["committee"] = np.mean([rows[-1][MAIN], *(overfeat.classify(other, image) for other in others)], 0)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def maps_sheet(net, examples, labels, p, classes, most=8):
    """Images, half of them with a wrong answer if there are so many, and for two classes where the finest scale sees them.

    p: (N, K), what the net says of each. The classes: the true one, and of the others that which p has for the likeliest.
    """
    right, size, pictures, captions = p.argmax(1) == labels, net.table.sizes[-1], [], []
    shown = np.concatenate([np.flatnonzero(~right)[:most // 2], np.flatnonzero(right)])[:most]
    for i in shown:
        image, jump, first = examples[i].image(), net.table.jump, (net.table.window - net.table.jump) / 2
        view = overfeat.resize_to(net.table, image, size)
        down, across = np.divide(image.shape[:2], view.shape[:2])
        F = overfeat.class_maps(net, view[None])[0]
        h, w = F.shape[:2]
        box = first * across, first * down, (first + jump * w) * across, (first + jump * h) * down     # around the windows' centres
        other = int(np.argsort(-np.where(np.arange(len(classes)) == labels[i], -np.inf, p[i]), kind="stable")[0])
        enlarge = 280 / image.shape[1]
        pictures.append(draw.boxes(image, np.zeros((0, 4)), [], classes, enlarge=enlarge))
        captions.append(f"{examples[i].name}: {classes[labels[i]]}"[:36])
        for k in (labels[i], other):
            pictures.append(draw.heat_map(image, F[..., k], box, enlarge=enlarge))
            captions.append(f"{'answer' if k == p[i].argmax() else 'not'}: {classes[k]}"[:28] + f" {p[i, k]:.2f}")
    return draw.sheet(pictures, 6, captions)


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = common.read_labelled(args)
    labels, true = (np.array([e.image_labels()[0] for e in some]) for some in (examples, held_out))
    settle(args, len(examples))
    others = [other.to(put) for other in committee_of(args, classes)]
    spec = overfeat.Spec(tuple(classes), args.table, args.width, dropout=args.dropout, init=args.init or None)
    net = overfeat.OverFeat(spec, np.random.default_rng(args.seed)).to(put)
    optimizer = optim.SGD(net, args.momentum, args.weight_decay)
    run = train.Run(Path(args.out) / args.name, common.settings(args, "measure_every", "committee"), args.resume)
    side, measured = net.table.window, slice(None, None, -(-len(held_out) // MEASURED))
    image_of = common.kept_images(examples, args.short)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, window {side}, {args.steps} steps")
    print(summary(net, (1, side, side, 3)), flush=True)

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = common.drawn(rng, len(examples), args.batch)
        views = [overfeat.training_view(net.table, image_of(j), rng, args.short) for j in batch]
        return net.normalise(np.stack(views)), labels[batch], rng

    def step(i, prepared):
        if i and i % args.measure_every == 0:
            measure(i)
        images, answer, rng = prepared
        scores, _, cache = net.forward(put(images), True, rng, heads=("classifier",))
        loss, dscores = softmax_loss.loss(scores.reshape(len(answer), -1), put(answer))
        net.backward(dscores.reshape(scores.shape), None, cache)
        return {"loss": loss}

    @run.aside
    def measure(i):
        seen = [overfeat.classify(net, e.image(), net.table.sizes[:1], flip=False) for e in held_out[measured]]
        return common.keep_point(run, {"step": i, "top1_error": top_k_error(np.array(seen), true[measured], 1).error})

    schedule = (optim.step_schedule(args.lr, args.decay_at, 0.5) if args.decay_at else
                optim.cosine_schedule(args.lr, args.steps, args.steps // 20))
    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)
    overfeat.save(net, run.folder / "weights.npz", {"short": args.short})
    curve = measure(args.steps)
    draw.measurements(curve, ("top1_error",), run.folder / "curve.png")
    draw.loss_curves(run.metrics(), ("loss",), run.folder / "loss.png")

    said, also = evaluate(net, held_out, args.short, others), {}
    for name, numbers in said.items():
        also[name] = common.keep_wrong(run, "" if name == MAIN else name, {error: top_k_error(numbers, true, k) for error, k in ERRORS.items()})
        print(f"{name:14}", "   ".join(f"{error} {100 * value:5.1f} %" for error, value in also[name].items()))
    draw.save(maps_sheet(net, held_out, true, said[MAIN], classes), run.folder / "maps.png")
    first, second = [to_numpy(w) for name, w in net.parts["trunk"].params.items() if name.endswith(".w")][:2]
    pictures = draw.filters(first), draw.filters(second)
    captions = [f"{kind} layer, filters {w.shape}" for kind, w in (("first", first), ("second", second))]
    draw.save(draw.sheet(pictures, 1, captions), run.folder / "filters.png")
    return common.keep_results(run, args, {"images": len(held_out), **also.pop(MAIN), "also": also, "curve": curve,
                                           "seconds": common.seconds(args, start)})


if __name__ == "__main__":
    common.start(main, arguments())
