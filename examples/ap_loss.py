"""Train a RetinaNet by ranking (AP-loss) or with what it is compared with, evaluate it, and draw what it found
(1904.06373, 2008.07294; tinydet/models/retinanet.py, tinydet/ops/ap_loss.py).

    python examples/ap_loss.py                                      # embedded scenes, 3 minutes on two cores: mean AP50 0.772
    python examples/ap_loss.py --loss focal                         # the same net and schedule, another loss
    python examples/ap_loss.py --data FOLDER --name cells           # train on its split "train", evaluate on "val"
    python examples/ap_loss.py --preset voc --data VOC --pretrained resnet50.npz --backend cuda

What --loss ap puts in the gradient's place is the paper's update, no derivative of the loss. Everything goes to runs/<name>/: config.json,
metrics.jsonl, checkpoint.npz, weights.npz (for examples/detect.py), detections.json, results.json, loss.png, precision_recall.png,
detections.png, false_positives/, and
curve.json, curve.png   while it trained: average precision; ranking_ap, that of the training batches' ranking (1 - AP-loss with delta 0,
                        interpolated), mean of the steps since the last point; pull_ratio, the gradient of the scores on negatives divided by
                        that on positives (their sizes, summed), geometric mean of those steps
ranking.png, pull.png   ranking_ap, and the two sums of which pull_ratio is the quotient, running means of the last 25 steps
results.json            "imbalance": the mean over all steps of |ln(pull on negatives / pull on positives)|; 0 is balance
A run that was stopped goes on with --resume.
"""
import argparse
import dataclasses
import math
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np

from tinydet import augment, backend, checks, data, draw, optim, train
from tinydet.backend import array_module
from tinydet.models import retinanet, retinanet_weights
from tinydet.ops import ap_loss
from tinydet.summary import summary


# The papers' settings (1904.06373's released code); steps are their epochs: of 16,551 images (07+12 trainval) and of COCO's 117,266 with objects.
# Other than there (CHOICE): the 16 images of a step are ranked in one list, not 8 on each of two GPUs; they are drawn anew for each step, not
# by epochs, also such without objects; anchors on difficult and crowd objects are ignored, not background. VOC07's figure is the 11-point one:
# python -m tinydet.evaluate --metric 11
VOC = {"table": "resnet50", "size": [512, 512], "short": 500, "longest": 833, "batch": 16, "lr": 0.001, "steps": 165510,
       "decay_at": [113788, 144821], "warmup": 500, "clip": 0, "views": "ssd", "side": 4.0, "weight_decay": 1e-4, "nms": 0.5, "limit": 100,
       "train_set": "trainval", "eval_set": "test"}
PRESETS = {"voc": VOC, "coco": {**VOC, "steps": 732912, "decay_at": [439748, 586330], "train_set": "train2017", "eval_set": "val2017"}}
DELTA = ("ap", "auc", "smooth_ap")                                  # losses with a step


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "ap_loss")
    a("--preset", choices=PRESETS, help="the papers' settings; those given beside it win")
    a("--loss", choices=retinanet.LOSSES, default="ap", help="of the classes (%(default)s)")
    a("--delta", type=float, default=1.0, help="half width of the step of ap, auc and smooth_ap (%(default)s)")
    a("--plain", action="store_true", help="AP-loss without interpolation")
    a("--per-image", action="store_true", help="rank each image alone, not the batch")
    a("--box-weight", type=float, default=1.0, help="of the box loss (%(default)s)")
    a("--table", choices=retinanet.TABLES, default="small", help="the net (%(default)s)")
    a("--pretrained", metavar="FILE", help="a ResNet's published weights, .npz or .safetensors, by name; its first layers and batch norms stay")
    a("--pixels", choices=common.PIXELS, default="caffe",
      help="whose those weights are: caffe (MSRA's; strides in a block's first convolution), torchvision (%(default)s)")
    a("--side", type=float, default=2.5, help="of the smallest anchors of a level, in strides (%(default)s; the papers: 4)")
    a("--size", type=common.count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="training images in pixels (scenes 192 192, folders 288 384)")
    a("--short", type=common.count, help="short side of a tested image (default: the smaller of --size)")
    a("--longest", type=common.count, help="limit of its long side (default: twice the short one)")
    a("--views", choices=retinanet.VIEWS, default="crop", help="of training images: SSD's colours, expansion and crops; crops and mirrored; mirrored (%(default)s)")
    a("--upside-down", action="store_true", help="also mirrored top to bottom: for images without an up, such as a microscope's")
    a("--steps", type=common.count, default=800, help="training steps (%(default)s)")
    a("--batch", type=common.count, help="images a step (scenes 16, folders 8)")
    a("--lr", type=float, default=0.2, help="largest learning rate (%(default)s)")
    a("--decay-at", type=common.count, nargs="+", metavar="STEP", help="the rate falls to a tenth at these steps (default: along a cosine)")
    a("--warmup", type=common.count, metavar="STEPS", help="in which the rate rises (default: a twentieth of the steps)")
    a("--clip", type=float, default=1.0, help="limit of the norm of all gradients together; 0: none (%(default)s, CHOICE; the papers: none)")
    a("--weight-decay", type=float, default=1e-4, help="(%(default)s)")
    a("--nms", type=float, default=0.5, help="IoU of a class's detections above which the weaker goes (%(default)s)")
    a("--limit", type=common.count, default=300, help="detections of an image (%(default)s)")
    a("--measure-every", type=common.count, metavar="STEPS", help="average precision (default: a fifth of the steps)")
    args = common.parse(parser, argv, PRESETS)
    args.size = args.size or ([288, 384] if args.data else [192, 192])
    args.batch = args.batch or (8 if args.data else 16)
    args.short = args.short or min(args.size)
    args.longest = args.longest or 2 * args.short
    args.warmup = args.warmup or args.steps // 20
    args.measure_every = args.measure_every or -(-args.steps // 5)
    common.check(parser, args)
    if not 0 <= args.nms <= 1:
        parser.error(f"--nms must lie in [0, 1], got {args.nms}")
    if args.preset and not (args.data and args.pretrained):
        parser.error(f"--preset {args.preset} needs --data and --pretrained")
    if not 0 <= args.clip < math.inf:
        parser.error(f"--clip must be finite and not negative, got {args.clip}")
    if not 0 <= args.box_weight < math.inf:
        parser.error(f"--box-weight must be finite and not negative, got {args.box_weight}")
    if args.decay_at and max(args.decay_at) >= args.steps:
        parser.error(f"--decay-at must lie below --steps {args.steps}, got {max(args.decay_at)}")
    if args.warmup >= args.steps:
        parser.error(f"--warmup must be less than --steps {args.steps}, got {args.warmup}")
    if args.delta != 1 and args.loss not in DELTA or args.plain and args.loss != "ap":
        parser.error(f"--delta is a setting of --loss {', '.join(DELTA)}, --plain of --loss ap, got --loss {args.loss}")
    try:
        checks.half_width("--delta", args.delta, args.loss != "smooth_ap")
    except ValueError as error:
        parser.error(str(error))
    return args


def pull_ratios(records):
    """ln(pull on negatives / pull on positives) of the steps that have both: 0 is balance. A list of floats; the mean size is `imbalance`."""
    return [math.log(r["pull_negative"] / r["pull_positive"]) for r in records if min(r["pull_negative"], r["pull_positive"]) > 0]


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = common.read(args)
    mean, std = common.PIXELS[args.pixels][:2] if args.pretrained else ((v,) * 3 for v in data.mean_std(examples))
    spec = retinanet.Spec(tuple(classes), args.table, args.pixels == "caffe", mean, std, args.side)
    testing = retinanet.Testing(args.short, args.longest, nms=args.nms, limit=args.limit)
    net = retinanet.RetinaNet(spec, np.random.default_rng(args.seed), pretrained=bool(args.pretrained))
    if args.pretrained:
        retinanet_weights.load_published(net, args.pretrained, common.PIXELS[args.pixels][2])
    net.to(put)
    optimizer = optim.SGD(net, 0.9, args.weight_decay, clip=args.clip or None)
    run = train.Run(Path(args.out) / args.name, common.settings(args, "nms", "limit", "short", "longest"), args.resume)
    height, width = args.size
    boxes = retinanet.anchors(spec, height, width)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, {len(boxes)} anchors an image")
    print(summary(net.parts["backbone"], (1, height, width, 3)), flush=True)
    axes = augment.colour_axes(examples) if args.views == "ssd" else None
    options = {"delta": args.delta} if args.loss in DELTA else {}
    options |= {"interpolated": not args.plain} if args.loss == "ap" else {}

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        views = [retinanet.training_view(spec, examples[j], rng, height, width, args.views, args.upside_down, axes=axes)
                 for j in common.drawn(rng, len(examples), args.batch)]
        return net.normalise(np.stack([v[0] for v in views])), [retinanet.label(spec, boxes, *v[1:]) for v in views]

    def step(i, prepared):
        if i and i % args.measure_every == 0:
            measure(i)
        images, targets = prepared
        scores, deltas, cache = net.forward(put(images), train=True)
        values, dscores, ddeltas = retinanet.loss(scores, deltas, targets, args.loss, args.per_image, args.box_weight, **options)
        net.backward(dscores, ddeltas, cache)
        xp = array_module(scores)
        answers = retinanet.entries(xp.asarray(np.stack([t.labels for t in targets])), len(classes))
        pull = [backend.scalar((abs(dscores) * (answers == k)).sum(dtype=np.float64)) for k in (1, 0)]
        ranking = {"ranking_ap": 1 - ap_loss.ap_loss(scores, answers, 0.0)[0]} if values["positives"] else {}
        return {**values, **ranking, "pull_positive": pull[0], "pull_negative": pull[1]}

    @run.aside
    def measure(i):
        detections = [retinanet.detect(net, e.image(), testing) for e in held_out]
        since = [r for r in run.metrics() if (i - 1) // args.measure_every * args.measure_every < r["step"] <= i]
        ranked, ratios = [r["ranking_ap"] for r in since if "ranking_ap" in r], pull_ratios(since)
        return detections, common.measure(run, i, detections, held_out, classes, ranking_ap=float(np.mean(ranked)) if ranked else float("nan"),
                                          pull_ratio=math.exp(np.mean(ratios)) if ratios else float("nan"))

    schedule = (optim.step_schedule(args.lr, args.decay_at, 0.1, args.warmup) if args.decay_at
                else optim.cosine_schedule(args.lr, args.steps, args.warmup))
    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)

    detections, curve = measure(args.steps)
    draw.measurements(curve, ("mean AP50", "ranking_ap", "pull_ratio"), run.folder / "curve.png")
    draw.loss_curves([r for r in run.metrics() if "ranking_ap" in r], ("ranking_ap",), run.folder / "ranking.png", "ranking of the training batch", "average precision")
    draw.loss_curves(run.metrics(), ("pull_positive", "pull_negative"), run.folder / "pull.png", "gradient of the scores, summed by label", "sum of sizes")
    ratios = pull_ratios(run.metrics())
    return common.finish(run, args, detections, held_out, classes, ("loss", "class_loss", "box_loss"),
                         lambda path, cut: retinanet.save(net, path, {"testing": dataclasses.asdict(testing), "cut": cut}),
                         testing=dataclasses.asdict(testing), curve=curve,
                         imbalance=float(np.mean(np.abs(ratios))) if ratios else None, seconds=common.seconds(args, start))


if __name__ == "__main__":
    common.start(main, arguments())
