"""Classify pictures, or extract features from them, with OverFeat's released weights: the release's command line.

    python examples/overfeat_features.py --weights net_weight_0 --names names.txt picture.jpg ...   # best 5: "class probability"
    python examples/overfeat_features.py --weights net_weight_1 -f picture.jpg ...                  # 4096 features a window
    convert *.jpg ppm:- | python examples/overfeat_features.py --weights net_weight_1 -p -L 19      # any layer, of a PPM stream
    python examples/overfeat_features.py --weights net_weight_1 --batch FOLDER OUT                  # OUT/picture.jpg.features

The size of the weight file tells the net: net_weight_0 is the fast one, net_weight_1 the accurate one.
Features are two lines a picture: "n h w", then n * h * w numbers of six digits, channel after channel, each row after row;
read_features reads them. A picture keeps its size for them: it must hold a window of 231x231 pixels (fast) or 221x221 (accurate),
or what the layer of -L needs.
-f is the last convolution but one, before its ReLU. The layers, as -L counts them:
"""
import argparse
import itertools
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np

from tinydet import augment, data, files, images, layers, to_numpy, train
from tinydet.backend import array_module
from tinydet.models import overfeat_weights
from tinydet.models.overfeat import NO_BOXES, TABLES, Spec, rows
from tinydet.ops import conv, max_pool, softmax_loss

import common

CLASSES = 1000
FLOOR = 1e-6                # the release's ReLU sets to 0 what is not above


# The net, module by module

def modules(table):
    """The release's layers of a Table in its numbering, a list of (kind, Row): norm, pad, conv, relu or pool."""
    found = [("norm", None)]
    for r in rows(table, CLASSES):
        found += [("pad", r)] * (r.pad > 0) + [("conv", r)] + [("relu", r)] * r.relu + [("pool", r)] * (r.pool > 1)
    return found


def layer_names(table):
    """The numbers and names of modules(table), as the help has them: "0:norm 1:conv1 2:relu 3:pool2 ..."."""
    told = {"conv": lambda r: r.name.split(".")[1], "pool": lambda r: f"pool{r.pool}"}
    return " ".join(f"{k}:{told[kind](r) if kind in told else kind}" for k, (kind, r) in enumerate(modules(table)))


def feature_layer(table):
    """The number of the layer that -f gives: the last convolution but one (conv, relu, conv end the list)."""
    return len(modules(table)) - 3


class Net(NamedTuple):
    """A released net as far as one layer. name: in TABLES; modules: up to that layer; weights: float32 by name, in our layout."""

    name: str
    modules: list
    weights: dict

    @property
    def least(self):
        """Side in pixels of the smallest image with an output.

        CHOICE: what this layer needs; the release always runs the whole net, which needs table.window.
        """
        side = 1
        for kind, r in reversed(self.modules):
            if kind == "pool":
                side *= r.pool
            elif kind == "conv":
                side = (side - 1) * r.stride + r.size
            elif kind == "pad":
                side = max(1, side - 2 * r.pad)
        return side


def load(path, layer=None, large=False, put=np.asarray):
    """The Net of a released file, as far as `layer`: a number, "features", or None: the scores. Later arrays are not read.

    large=True takes the accurate net's file only. Raises FileNotFoundError, or ValueError naming the file: for its size, another
    net, an array that is not finite; or the layers that there are.
    """
    op, name = "overfeat_features.load", overfeat_weights.recognise(path, CLASSES)
    if large and name != "accurate":
        raise ValueError(f"{op}: with -l, {path} must be the accurate net's file, net_weight_1, got the size of the {name} net's")
    every = modules(TABLES[name])
    last = {None: len(every) - 1, "features": feature_layer(TABLES[name])}.get(layer, layer)
    if not 0 <= last < len(every):
        raise ValueError(f"{op}: the layer must lie in 0..{len(every) - 1} for the {name} net, got {last}")
    arrays, weights = overfeat_weights.read(path, name, CLASSES), {}
    for key in (f"{r.name}.{k}" for kind, r in every[:last + 1] if kind == "conv" for k in "wb"):
        if not np.isfinite(arrays[key]).all():
            raise ValueError(f"{op}: {path}: {key} must be finite, got NaN or infinity")
        weights[key] = put(np.asarray(layers.from_channels_first({key: arrays[key]})[key], np.float32))
    return Net(name, every[:last + 1], weights)


def features(net, image, source="the image", put=np.asarray):
    """The output of the net's last layer, channels first: (n, h, w) float32 on the host.

    image: uint8 (H, W, 3) RGB, taken as it is. source: what an error calls it. Raises ValueError for one that is too small.
    """
    if min(image.shape[:2]) < net.least:
        raise ValueError(f"overfeat_features.features: {source} must have at least {net.least}x{net.least} pixels for layer "
                         f"{len(net.modules) - 1} of the {net.name} net, got {image.shape[1]}x{image.shape[0]}")
    x = put(np.asarray(image[None], np.float32))
    xp, number = array_module(x), x.dtype.type
    for kind, r in net.modules:
        if kind == "norm":
            x = (x - number(Spec.mean)) / number(Spec.std)
        elif kind == "pad":
            x = xp.pad(x, ((0, 0), (r.pad, r.pad), (r.pad, r.pad), (0, 0)))
        elif kind == "conv":
            x = conv.forward(x, net.weights[f"{r.name}.w"], net.weights[f"{r.name}.b"], r.stride)[0]
        elif kind == "relu":
            x = xp.where(x > FLOOR, x, number(0))
        else:
            x = max_pool.forward(x, r.pool)[0]
    return to_numpy(x)[0].transpose(2, 0, 1)


def view(image):
    """What is classified: the centre square of the image whose smaller side is 231, the fast net's window, for both nets.

    On 231 pixels the accurate net has one output, too, which leaves out the last ten rows and columns. CHOICE: bilinear, and also
    for PPM, which the release crops without resizing it.
    """
    side = TABLES["fast"].window
    image = augment.scale(image, NO_BOXES, side / min(image.shape[:2]))[0]
    y, x = ((n - side) // 2 for n in image.shape[:2])
    return image[y:y + side, x:x + side]


def classify(net, image, put=np.asarray):
    """Softmax of the scores on view(image): (1000,) float64. The release has the same within its polynomial for exp."""
    scores = features(net, view(image), put=put)[:, 0, 0]               # 1x1 for both nets
    return softmax_loss.softmax(scores.astype(np.float64))


# Text and pictures

def answer(probabilities, names, n):
    """The n best classes, a line each: name, space, probability of six digits. Ties go to the lower class."""
    best = np.argsort(-probabilities, kind="stable")[:n]
    return "".join(f"{names[k]} {probabilities[k]:.6g}\n" for k in best)


def feature_text(a):
    """An array (n, h, w) in the release's format: a line "n h w", then a line of all numbers, a space behind each."""
    return " ".join(map(str, a.shape)) + "\n" + "".join(f"{v:.6g} " for v in a.ravel().tolist()) + "\n"


def read_features(path):
    """The arrays (n, h, w), float32, of a file of the release's features, one a picture: what feature_text wrote.

    feature_text of them gives the same text again. Raises ValueError naming the file, and the line of what is no such text.
    """
    op, found = f"overfeat_features.read_features: {path}", []
    lines = Path(path).read_bytes().split(b"\n")
    if lines.pop() or len(lines) % 2:
        raise ValueError(f"{op} must consist of pairs of whole lines, got {len(lines)} whole lines, or one without an end")
    for k, (head, numbers) in enumerate(zip(lines[::2], lines[1::2])):
        shape, numbers = re.fullmatch(rb"([1-9]\d*) ([1-9]\d*) ([1-9]\d*)", head.strip()), numbers.split()
        if shape is None:
            raise ValueError(f"{op}: line {2 * k + 1} must be three counts, n h w, got {head[:60]!r}")
        n, h, w = map(int, shape.groups())
        if len(numbers) != n * h * w:
            raise ValueError(f"{op}: line {2 * k + 2} must have {n} * {h} * {w} numbers, got {len(numbers)}")
        try:
            with np.errstate(over="ignore"):
                found.append(np.array(numbers, np.float64).astype(np.float32).reshape(n, h, w))
        except ValueError as error:
            raise ValueError(f"{op}: line {2 * k + 2} must be numbers, got: {error}") from None
    return found


def pictures(file, source="standard input"):
    """Yield the pictures of a binary PPM stream, back to back, each as uint8 (H, W, 3).

    P6, comments (# to the end of the line) in the header, 8 bits a colour. A stream may end behind a picture, or be empty.
    Raises ValueError naming the picture and what is wrong with it; what came before has been yielded then.
    """
    for k in itertools.count(1):
        op, magic = f"overfeat_features.pictures: picture {k} of {source}", file.read(2)
        if not magic:
            return
        if magic != b"P6" or not file.read(1).isspace():
            raise ValueError(f"{op} must begin with P6 and white space, got {magic!r}")
        W, H, most = (_number(op, file, name) for name in ("width", "height", "largest value"))
        if most != 255 or not (0 < W <= images.LONGEST_SIDE and 0 < H <= images.LONGEST_SIDE and W * H <= images.MOST_PIXELS):
            limits = f"1 to {images.MOST_PIXELS} pixels, {images.LONGEST_SIDE} a side"
            raise ValueError(f"{op} must have values up to 255 and {limits}, got values up to {most}, {W}x{H} pixels")
        content = file.read(W * H * 3)
        if len(content) < W * H * 3:
            raise ValueError(f"{op} must have {W * H * 3} bytes of pixels, got {len(content)}")
        yield np.frombuffer(content, np.uint8).reshape(H, W, 3)


def _number(op, file, name):
    """A number of a PPM header, white space and comments before it, and the one white space or comment behind it."""
    digits, byte = b"", file.read(1)
    while byte.isspace() or byte == b"#":
        if byte == b"#":
            file.readline()
        byte = file.read(1)
    while byte.isdigit() and len(digits) < 10:
        digits, byte = digits + byte, file.read(1)
    if not digits or not (byte.isspace() or byte == b"#"):
        raise ValueError(f"{op} must have a {name} in its header, got {digits + byte!r}{', and the end' * (not byte)}")
    if byte == b"#":
        file.readline()
    return int(digits)


def class_names(path):
    """The names of the classes, one a line, in the order of the weights; without a file their numbers, from 0."""
    if path is None:
        return [str(k) for k in range(CLASSES)]
    try:
        names = Path(path).read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"overfeat_features.class_names: {path} must be UTF-8, got: {error}") from None
    if len(names) != CLASSES:
        raise ValueError(f"overfeat_features.class_names: {path} must have {CLASSES} lines, got {len(names)}")
    return names


# The program

def batch(net, folder, out, put):
    """Write out/<file name>.features for every image of a folder, whole or not at all; what was there is replaced.

    CHOICE: an image that is damaged or too small is named on standard error and the rest goes on; in the end ValueError says how
    many they were.
    """
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in images.ENDINGS and not p.name.startswith("."))
    if not paths:
        raise ValueError(f"overfeat_features.batch: {folder} must hold images, got none")
    Path(out).mkdir(parents=True, exist_ok=True)
    left_out, bar = 0, train.progress(paths, desc="features", unit="image")
    for path in bar:
        try:
            found = features(net, data.read_image(path), path, put)
        except (ValueError, OSError) as error:
            left_out += 1
            bar.write(f"left out: {error}", file=sys.stderr)
        else:
            files.write(Path(out) / f"{path.name}.features", feature_text(found))
    if left_out:
        raise ValueError(f"overfeat_features.batch: {left_out} of {len(paths)} images of {folder} are left out, named above")


def arguments(argv=None):
    listed = "\n".join(textwrap.fill(f"{name}, -f {feature_layer(table)}: {layer_names(table)}", 120, subsequent_indent="    ")
                       for name, table in TABLES.items() if not table.norm)         # no net with batch norm was released
    parser = argparse.ArgumentParser(description=__doc__ + listed, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("images", nargs="*", metavar="image", help="picture files")
    a("--weights", metavar="FILE", help="net_weight_0 or net_weight_1 of the release")
    a("-n", type=common.count, default=5, metavar="N", help="how many classes to print (%(default)s)")
    a("-l", action="store_true", help="insist on the accurate net (the file alone tells which it is)")
    a("-f", action="store_true", help="print features")
    a("-L", type=int, metavar="LAYER", help="print the output of any layer (overrides -f)")
    a("-p", action="store_true", help="read pictures from standard input, PPM, one after the other")
    a("--names", metavar="FILE", help="names of the classes, one a line (default: their numbers)")
    a("--batch", nargs=2, metavar=("IN", "OUT"), help="write the features of every image of a folder into files of another")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="cuda: on a GPU (%(default)s)")
    args = parser.parse_args(argv)
    sources = bool(args.images) + args.p + bool(args.batch)
    missing = ["--weights FILE, net_weight_0 or net_weight_1 of OverFeat's release"] * (not args.weights)
    missing += ["at least one image, or -p for pictures on standard input, or --batch IN OUT for a folder"] * (not sources)
    if missing:
        parser.error("give " + "; and ".join(missing))
    if sources > 1:
        parser.error("images, -p and --batch exclude each other")
    return args


def main(args, put):
    train.announce_compilation()
    names = class_names(args.names)
    wanted = args.L if args.L is not None else "features" if args.f or args.batch else None
    net = load(args.weights, wanted, args.l, put)
    if args.batch:
        return batch(net, *args.batch, put)
    named = ((f"picture {k}", image) for k, image in enumerate(pictures(sys.stdin.buffer), 1)) if args.p else (
        (path, data.read_image(path)) for path in args.images)
    for source, image in named:
        if wanted is None:
            text = answer(classify(net, image, put), names, args.n)
        else:
            text = feature_text(features(net, image, source, put))
        print(text, end="", flush=True)


if __name__ == "__main__":
    args = arguments()
    try:
        with tinydet.use(args.backend) as put:
            main(args, put)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
