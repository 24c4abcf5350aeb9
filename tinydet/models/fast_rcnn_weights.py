"""Published weights for Fast R-CNN's nets (fast_rcnn.TABLES), read by name from .npz and .safetensors files.

The names are those of Caffe, in which the papers' nets were published (1504.08083, 1604.03540), and of torchvision's VGG16. A file
must be complete in one naming, that of which it holds the most names.
"""
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tinydet import safetensors
from tinydet.backend import to_numpy
from tinydet.files import fitting
from tinydet.layers import from_channels_first, load
from tinydet.models.fast_rcnn import TABLES

SPELLINGS = (("{}.weight", "{}.bias"), ("{}_w", "{}_b"), ("{}", "{}.bias"), ("{}", "{}_b"))     # weight and bias of a layer
OUTPUTS = {"classifier": "cls_score", "regressor": "bbox_pred"}                                 # an ImageNet net lacks them


def published_names(table):
    """The namings that load_published reads for a table of fast_rcnn.TABLES: a list of dicts, from the net's names to the file's.

        net                         Caffe, each of SPELLINGS    torchvision (.weight, .bias; tables without LRN)
        trunk.<row>.w, .b           <row>                       features.<n>: a convolution and its ReLU count 2, a pooling 1
        head.fc6.w, head.fc7.w      fc6, fc7                    classifier.0, classifier.3
        imagenet.w, imagenet.b      fc8                         classifier.6
        classifier.w, regressor.w   cls_score, bbox_pred        cls_score, bbox_pred (CHOICE: torchvision has none)

    imagenet.* stands for the last layer of an ImageNet net, which ours has not: it is left out. Raises ValueError for an unknown
    table and one with batch norm.
    """
    if table not in TABLES or TABLES[table].norm:
        known = ", ".join(name for name, t in TABLES.items() if not t.norm)
        raise ValueError(f"fast_rcnn_weights.published_names: table must be one without batch norm ({known}), got {table!r}")
    rows = [name for name, *_ in TABLES[table].trunk]
    caffe = {f"trunk.{name}": name for name in rows if name not in ("max", "lrn")}
    places = np.cumsum([0] + [1 if name == "max" else 2 for name in rows])
    torchvision = {f"trunk.{name}": f"features.{at}" for name, at in zip(rows, places) if name != "max"}
    count = len(TABLES[table].hidden)
    for k, layer in enumerate([*(f"head.fc{6 + k}" for k in range(count)), "imagenet"]):
        caffe[layer], torchvision[layer] = f"fc{6 + k}", f"classifier.{3 * k}"
    namings = [(caffe | OUTPUTS, spelling) for spelling in SPELLINGS]
    if "lrn" not in rows:
        namings.append((torchvision | OUTPUTS, SPELLINGS[0]))
    return [{f"{ours}.{kind}": text.format(theirs) for ours, theirs in layers.items() for kind, text in zip("wb", spelling)}
            for layers, spelling in namings]


def load_published(net, path, bgr=True, background="first"):
    """Copy published weights into a FastRCNN: those of a whole detector, or of an ImageNet net, which lacks cls_score and bbox_pred.

    net: a FastRCNN of a table without batch norm, on any backend; its classes must stand in the file's order. path: an .npz file of
    plain arrays or a .safetensors file, with the names that published_names tells; ImageNet's last layer (fc8, classifier.6) is
    left out. The file's arrays are channels-first, of any floating dtype (float16, too), and are cast to the net's. On their way
        convolutions (Cout, Cin, kh, kw) become (kh, kw, Cin, Cout), linear layers (Cout, Cin) become (Cin, Cout);
        bgr=True: the first convolution sees BGR in the file, as Caffe's do; its input channels are reversed, as this net sees RGB;
        fc6's inputs, in order (C, PH, PW) in the file, come in order (PH, PW, C), that of ops/roi_pool.py;
        background="first": the first row of cls_score and the first four of bbox_pred become the last, as fast_rcnn has them
        ("last": they stand there in the file already).
    Returns the names of the net's arrays that stay as they were: [] for a detector, classifier.* and regressor.* for an ImageNet net.

    No file tells what else must fit:
        Caffe's VGG16 and VGG_CNN_M_1024 see BGR minus (102.9801, 115.9465, 122.7717), undivided: Spec's mean and std are these, in
        RGB order. torchvision's VGG16 sees RGB in 0..1, normalised: take bgr=False and Spec with mean = 255 * (0.485, 0.456, 0.406)
        and std = 255 * (0.229, 0.224, 0.225). It also pools by floor, this net by ceil, as Caffe does: maps of odd sides differ.
        In detectors that Fast R-CNN's code saved, bbox_pred has the normalisation of the targets folded in (as fast_rcnn.fold_targets does):
        Spec(target_mean=(0.0,) * 4, target_std=(1.0,) * 4).
        To train from ImageNet's weights as the paper does, FastRCNN(..., pretrained=True) freezes its frozen layers.
    Unverified: no published file was at hand, the tests write files by these rules.

    Raises FileNotFoundError, or ValueError naming the file and all that is missing, unknown, misshapen (told in the file's layout),
    no float or not finite in the net's dtype; the net is unchanged then. A weight needs its bias, cls_score needs bbox_pred, and
    the other way round.
    """
    op = "fast_rcnn_weights.load_published"
    if background not in ("first", "last"):
        raise ValueError(f"{op}: background must be 'first' or 'last', got {background!r}")
    namings, own = published_names(net.spec.table), net.arrays()
    arrays = read_plain(op, path)
    names = max(namings, key=lambda names: sum(name in arrays for name in names.values()))      # a tie: the first
    for kind in "wb":
        arrays.pop(names.pop(f"imagenet.{kind}"), None)
    outputs = [f"{layer}.{kind}" for layer in OUTPUTS for kind in "wb"]
    kept = [] if any(names[k] in arrays for k in outputs) else outputs
    names = {ours: theirs for ours, theirs in names.items() if ours not in kept}
    wanted = {theirs: published_form(own[ours]) for ours, theirs in names.items()}
    arrays = fitting(op, path, arrays, wanted, f"a published {net.spec.table}", cast=True)
    new = {ours: arrays.pop(theirs) for ours, theirs in names.items()}
    fc6, pool = new["head.fc6.w"], net.table.pool
    new["head.fc6.w"] = fc6.reshape(len(fc6), -1, pool, pool)
    new = from_channels_first(new)
    new["head.fc6.w"] = new["head.fc6.w"].reshape(-1, len(fc6))
    if bgr:
        first = next(iter(names))                                       # the weight of the trunk's first row
        new[first] = new[first][:, :, ::-1]
    if background == "first" and not kept:
        for layer, rows in (("classifier", 1), ("regressor", 4)):
            for kind in "wb":
                new[f"{layer}.{kind}"] = np.roll(new[f"{layer}.{kind}"], -rows, axis=-1)
    load(net, {**new, **{ours: to_numpy(own[ours]) for ours in kept}}, path)
    return kept


def read_plain(op, path):
    """The arrays of a published .npz or .safetensors file, by name. op: who asks, for the message."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        return safetensors.read(path)[0]
    if suffix != ".npz":
        raise ValueError(f"{op}: the file must be .npz or .safetensors, got {path}")
    try:
        if not zipfile.is_zipfile(path) and Path(path).exists():
            raise ValueError("a file that is no .npz archive")
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            if "meta" in file.files:
                raise ValueError("a file with an entry meta, as tinydet writes its own, which fast_rcnn.load reads")
            if len(set(file.files)) < len(file.files):
                raise ValueError("an archive with two members of one name")
            return {name: np.asarray(file[name]) for name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{op}: there is no file {path}") from None
    except Exception as error:          # a damaged file: zipfile, zlib and NumPy raise a dozen kinds
        raise ValueError(f"{op}: {path} must be an .npz file of plain arrays, got: {str(error)[:300]}") from None


def published_form(a):
    """The channels-first shape and the dtype of an array of the net."""
    shape = (a.shape[3], a.shape[2], *a.shape[:2]) if a.ndim == 4 else a.shape[::-1]
    return SimpleNamespace(shape=shape, dtype=a.dtype)
