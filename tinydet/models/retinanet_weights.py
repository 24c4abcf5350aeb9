"""Published ResNets for RetinaNet's backbone (retinanet.TABLES), read by torchvision's names from .npz and .safetensors files."""
from tinydet.files import fitting
from tinydet.layers import from_channels_first, load
from tinydet.models.fast_rcnn_weights import published_form, read_plain
from tinydet.models.retinanet import TABLES

ENDINGS = {"w": "weight", "gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"         # torch keeps one for each batch norm
CLASSIFIER = ("fc.weight", "fc.bias")


def published_names(net):
    """The names of a RetinaNet's backbone arrays in a published file: a dict, from the net's names (within the backbone) to the
    file's.

        net                                     torchvision
        C1.conv1.w, C1.bn1.gamma                conv1.weight, bn1.weight
        C2.0.sum.branch.conv1.w                 layer1.0.conv1.weight (stage Ck is layer k - 1)
        C2.0.sum.branch.bn1.beta, mean, var     layer1.0.bn1.bias, running_mean, running_var
        C2.0.sum.shortcut.conv.w, bn.gamma      layer1.0.downsample.0.weight, downsample.1.weight

    Raises ValueError for a table that is no ResNet.
    """
    if not net.table.blocks:
        known = ", ".join(name for name, t in TABLES.items() if t.blocks)
        raise ValueError(f"retinanet_weights.published_names: the net's table must be a ResNet ({known}), got {net.spec.table!r}")
    names = {}
    for name in net.parts["backbone"].arrays():
        stage, _, rest = name.partition(".")
        layer, _, ending = rest.rpartition(".")
        for ours, theirs in (("sum.branch.", ""), ("sum.shortcut.conv", "downsample.0"), ("sum.shortcut.bn", "downsample.1")):
            layer = layer.replace(ours, theirs)
        names[name] = ("" if stage == "C1" else f"layer{int(stage[1:]) - 1}.") + f"{layer}.{ENDINGS[ending]}"
    return names


def load_published(net, path, bgr=False):
    """Copy a published ResNet (ImageNet's) into the backbone of a RetinaNet; pyramid and heads stay as they are.

    net: a RetinaNet of a ResNet's table, on any backend. path: an .npz file of plain arrays or a .safetensors file with
    torchvision's names (published_names). fc.weight, fc.bias and each batch norm's num_batches_tracked are left out. The arrays
    are channels-first, of any floating dtype, and are cast to the net's; convolutions (Cout, Cin, kh, kw) become (kh, kw, Cin,
    Cout). bgr=True: conv1 sees BGR in the file, as in nets that come from Caffe (MSRA's); its input channels are reversed, as
    this net sees RGB.
    Returns the names of the net's arrays that stay as they were.

    No file tells what else must fit:
        torchvision's nets see RGB in 0..1, normalised, and halve the map in a block's 3x3: Spec(stride_first=False, mean = 255 *
        (0.485, 0.456, 0.406), std = 255 * (0.229, 0.224, 0.225)). MSRA's, with which the paper trained, see BGR minus the mean
        and halve it in the first 1x1: bgr=True and Spec's own defaults.
        RetinaNet(..., pretrained=True) freezes what the paper freezes.
    Unverified: no published file was at hand, the tests write files by these rules.

    Raises FileNotFoundError, or ValueError naming the file and all that is missing, unknown, misshapen (told in the file's
    layout), no float or not finite in the net's dtype, and variances below 0; the net is unchanged then.
    """
    op, backbone = "retinanet_weights.load_published", net.parts["backbone"]
    names, own = published_names(net), backbone.arrays()
    norms = [name.removesuffix("running_var") for name in names.values() if name.endswith(".running_var")]
    left_out = {*CLASSIFIER, *(name + COUNTER for name in norms)}
    arrays = {name: a for name, a in read_plain(op, path).items() if name not in left_out}
    wanted = {theirs: published_form(own[ours]) for ours, theirs in names.items()}
    arrays = fitting(op, path, arrays, wanted, f"a published {net.spec.table}", cast=True)
    if wrong := [name for name, a in arrays.items() if name.endswith(".running_var") and a.min() < 0]:
        raise ValueError(f"{op}: {path}: {wrong[0]} must be at least 0, got {arrays[wrong[0]].min()}")
    new = from_channels_first({ours: arrays[theirs] for ours, theirs in names.items()})
    if bgr:
        new["C1.conv1.w"] = new["C1.conv1.w"][:, :, ::-1]
    load(backbone, new, path)
    return [name for name in net.arrays() if not name.startswith("backbone.")]
