"""Published weights: the loaded net against the published one, computed channels-first as in the file; and all that is refused."""
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS
from tinydet import files, safetensors, to_numpy, use
from tinydet.models import fast_rcnn
from tinydet.models.fast_rcnn import FastRCNN, Spec, Table
from tinydet.models.fast_rcnn_weights import OUTPUTS, SPELLINGS, load_published, published_names

# As VGG16 and VGG_CNN_M_1024 are, only small: every axis of an array has a length of its own, where it may
TINY = {"VGG16": Table((("conv1_1", 3, 1, 1, 4), ("conv1_2", 3, 1, 1, 5), ("max", 2, 2), ("conv2_1", 3, 1, 1, 6)), 3, 1 / 2, (10, 8)),
        "VGG_CNN_M_1024": Table((("conv1", 5, 2, 0, 4), ("lrn",), ("max", 3, 2), ("conv2", 3, 1, 1, 6)), 2, 1 / 4, (10, 8))}
TORCHVISION = {"conv1_1": "features.0", "conv1_2": "features.2", "conv2_1": "features.5", "fc6": "classifier.0",
               "fc7": "classifier.3", "fc8": "classifier.6"}
ROIS = np.array([[0, 0, 0, 15, 13], [0, 3, 2, 11, 12.5], [1, 6, 0, 15, 7], [1, 1, 1, 5, 9]], float)
ERROR = r"^fast_rcnn_weights\.load_published: "


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, table in TINY.items():
        monkeypatch.setitem(fast_rcnn.TABLES, name, table)


def make(table="VGG16", dtype=np.float64, seed=0):
    return FastRCNN(Spec(("a", "b"), table, mean=(0.0,) * 3), np.random.default_rng(seed), dtype)


def published(table="VGG16", dtype=np.float64, seed=1):
    """A detector of 2 classes and the background as (weight, bias) by Caffe's names, channels-first, with ImageNet's fc8."""
    rng, found, Cin = np.random.default_rng(seed), {}, 3
    shapes = {}
    for name, *row in TINY[table].trunk:
        if row and len(row) == 4:
            shapes[name] = (row[3], Cin, row[0], row[0])
            Cin = row[3]
    shapes |= {"fc6": (10, Cin * TINY[table].pool ** 2), "fc7": (8, 10), "cls_score": (3, 8), "bbox_pred": (12, 8), "fc8": (7, 8)}
    for name, shape in shapes.items():
        found[name] = (rng.normal(0, 0.3, shape).astype(dtype), rng.normal(0, 0.3, shape[0]).astype(dtype))
    return found


def named(layers, spelling=SPELLINGS[0], names=None):
    return {text.format((names or {}).get(k, k)): a for k, pair in layers.items() for text, a in zip(spelling, pair)}


def write(folder, arrays, suffix=".npz"):
    path = folder / f"published{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.write(path, arrays, {"format": "pt"})
    return path


# The published net, channels-first and in loops

def conv_relu(x, w, b, stride, pad):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    k = w.shape[2]
    h, v = ((n - k) // stride + 1 for n in x.shape[2:])
    y = np.empty((len(x), len(w), h, v))
    for i, j in np.ndindex(h, v):
        y[:, :, i, j] = np.einsum("nchw,dchw->nd", x[:, :, i * stride:i * stride + k, j * stride:j * stride + k], w) + b
    return np.maximum(y, 0)


def max_pool(x, size, stride):
    h, v = (-(-(n - size) // stride) + 1 for n in x.shape[2:])
    return np.array([[x[:, :, i * stride:i * stride + size, j * stride:j * stride + size].max((2, 3)) for j in range(v)]
                     for i in range(h)]).transpose(2, 3, 0, 1)


def lrn(x):
    near = [(x[:, max(0, c - 2):c + 3] ** 2).sum(1) for c in range(x.shape[1])]
    return x / (2 + 5e-4 / 5 * np.stack(near, 1)) ** 0.75


def roi_pool(x, rois, size, scale):
    y = np.zeros((len(rois), x.shape[1], size, size))
    for r, (n, *box) in enumerate(rois):
        x1, y1, x2, y2 = (int(np.floor(v * scale + 0.5)) for v in box)
        rw, rh = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        for i, j in np.ndindex(size, size):
            rows, columns = (slice(at + k * s // size, at + -(-(k + 1) * s // size)) for at, k, s in ((y1, i, rh), (x1, j, rw)))
            bin = x[int(n), :, rows, columns]
            y[r, :, i, j] = bin.max((1, 2)) if bin.size else 0
    return y


def caffe(table, layers, x, rois):
    """cls_score and bbox_pred, background first, of images (N, C, H, W) and inclusive rois."""
    layers = {name: [np.asarray(a, float) for a in pair] for name, pair in layers.items()}
    for name, *row in TINY[table].trunk:
        x = max_pool(x, *row) if name == "max" else lrn(x) if name == "lrn" else conv_relu(x, *layers[name], *row[1:3])
    x = roi_pool(x, rois, TINY[table].pool, TINY[table].scale)
    x = x.reshape(len(x), -1)
    for name in ("fc6", "fc7"):
        x = np.maximum(x @ layers[name][0].T + layers[name][1], 0)
    return [x @ w.T + b for w, b in (layers["cls_score"], layers["bbox_pred"])]


def assert_is_published(net, table, layers, bgr=True, background="first", put=np.asarray, least=0.01):
    images = np.random.default_rng(2).normal(0, 1, (2, 13, 15, 3)).astype(net.dtype)        # odd sides: the last row pools alone
    scores, deltas, _ = net.forward(put(images), put(ROIS.astype(net.dtype)))
    theirs = images[..., ::-1] if bgr else images
    cls, box = caffe(table, layers, theirs.transpose(0, 3, 1, 2).astype(float), ROIS - [0, 0, 0, 1, 1])
    order = [1, 2, 0] if background == "first" else [0, 1, 2]
    tolerance = {"rtol": 0, "atol": 1e-11 if net.dtype == np.float64 else 2e-4}
    assert np.ptp(cls, 0).min() > least and np.ptp(box, 0).min() > least                                # it depends on the regions
    assert_allclose(to_numpy(scores), cls[:, order], **tolerance)
    assert_allclose(to_numpy(deltas).reshape(-1, 3, 4), box.reshape(-1, 3, 4)[:, order], **tolerance)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("table", TINY)
def test_a_detector_answers_as_the_published_one(tmp_path, table, suffix):
    net, layers = make(table), published(table)
    assert load_published(net, write(tmp_path, named(layers), suffix)) == []
    assert_is_published(net, table, layers)


@pytest.mark.parametrize("bgr", [True, False])
@pytest.mark.parametrize("background", ["first", "last"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_option(tmp_path, spelling, background, bgr):
    net, layers = make(), published()
    load_published(net, str(write(tmp_path, named(layers, spelling))), bgr, background)
    assert_is_published(net, "VGG16", layers, bgr, background)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(tmp_path, backend):
    layers = published()
    path = write(tmp_path, named(layers))
    with use(backend) as put:
        net = make().to(put)
        load_published(net, path)
        assert_is_published(net, "VGG16", layers, put=put)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("own", [np.float32, np.float64])
def test_dtypes_become_the_nets(tmp_path, own, dtype, suffix):
    net, layers = make(dtype=own), published(dtype=dtype)
    load_published(net, write(tmp_path, named(layers), suffix))
    assert {a.dtype for a in net.arrays().values()} == {np.dtype(own)}
    assert_array_equal(net.params["trunk.conv2_1.w"], layers["conv2_1"][0].astype(own).transpose(2, 3, 1, 0))
    assert_is_published(net, "VGG16", layers)


def test_arrays_of_any_strides_and_byte_order(tmp_path):
    net, layers = make(), published()
    arrays = {k: np.asfortranarray(a.astype(">f8")) for k, a in named(layers).items()}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    load_published(net, tmp_path / "a.npz")
    assert_is_published(net, "VGG16", layers)
    assert all(a.dtype.isnative and a.flags.c_contiguous for a in net.arrays().values())


def test_torchvisions_names_and_what_an_imagenet_net_leaves_as_it_was(tmp_path):
    net, layers = make(), published()
    arrays = named(layers, names=TORCHVISION)
    assert {"features.0.weight", "features.5.bias", "classifier.6.weight", "cls_score.bias"} <= set(arrays)
    load_published(net, write(tmp_path, arrays), bgr=False)
    assert_is_published(net, "VGG16", layers, bgr=False)
    for names in ({}, TORCHVISION):
        net, fresh = make(), make()
        imagenet = {k: pair for k, pair in layers.items() if k not in ("cls_score", "bbox_pred")}
        left = load_published(net, write(tmp_path, named(imagenet, names=names)))
        assert left == ["classifier.w", "classifier.b", "regressor.w", "regressor.b"]
        for name in left:
            assert_array_equal(net.params[name], fresh.params[name])
        assert_array_equal(net.params["head.fc7.w"], layers["fc7"][0].T)
        own = {theirs: (net.params[f"{ours}.w"].T, net.params[f"{ours}.b"]) for ours, theirs in OUTPUTS.items()}
        assert_is_published(net, "VGG16", imagenet | own, background="last", least=1e-4)      # what stayed stands as ours does


def test_fc6_by_hand(tmp_path):
    """Column c * 9 + i * 3 + j of the file's fc6 sees channel c of cell (i, j), which stands at (i * 3 + j) * 6 + c in ours."""
    net, layers = make(), published()
    load_published(net, write(tmp_path, named(layers)))
    w = layers["fc6"][0]
    for c, i, j in ((0, 0, 1), (5, 2, 0), (3, 1, 2)):
        assert_array_equal(net.params["head.fc6.w"][(i * 3 + j) * 6 + c], w[:, c * 9 + i * 3 + j])


def test_the_namings_of_the_published_tables(monkeypatch):
    monkeypatch.undo()
    spelt = published_names("VGG16")
    assert len(spelt) == len(SPELLINGS) + 1
    convs = [f"conv{b}_{i}" for b, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
    assert list(spelt[0].values())[::2] == [f"{k}.weight" for k in [*convs, "fc6", "fc7", "fc8", "cls_score", "bbox_pred"]]
    assert [k for k in spelt[1].values() if "fc" in k] == ["fc6_w", "fc6_b", "fc7_w", "fc7_b", "fc8_w", "fc8_b"]
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]    # as torchvision's configuration D has them
    assert [spelt[-1][f"trunk.{k}.w"] for k in convs] == [f"features.{k}.weight" for k in places]
    assert [spelt[-1][f"{k}.b"] for k in ("head.fc6", "head.fc7", "imagenet")] == [f"classifier.{k}.bias" for k in (0, 3, 6)]
    medium = published_names("VGG_CNN_M_1024")
    assert len(medium) == len(SPELLINGS)        # torchvision has no such net
    assert list(medium[2].values())[::2] == [*(f"conv{k}" for k in range(1, 6)), "fc6", "fc7", "fc8", "cls_score", "bbox_pred"]
    for table in ("small", "resnet"):
        with pytest.raises(ValueError, match=rf"published_names: table must be .* \(VGG_CNN_M_1024, VGG16\), got '{table}'"):
            published_names(table)


# What is refused, and leaves the net as it was

def renamed(arrays, old, new):
    return {new if k == old else k: a for k, a in arrays.items()}


def without(arrays, *names):
    return {k: a for k, a in arrays.items() if k not in names}


def spoilt(arrays, name, value):
    a = arrays[name].copy()
    a.flat[-1] = value
    return arrays | {name: a}


CHANGES = [
    (lambda a: without(a, "conv1_2.bias"), r"lacks the array conv1_2\.bias$"),
    (lambda a: without(a, "fc7.weight", "conv2_1.weight"), r"lacks the arrays conv2_1\.weight, fc7\.weight$"),
    (lambda a: without(a, "cls_score.weight", "cls_score.bias"), r"lacks the arrays cls_score\.weight, cls_score\.bias$"),
    (lambda a: without(a, "bbox_pred.weight", "bbox_pred.bias"), r"lacks the arrays bbox_pred\.weight, bbox_pred\.bias$"),
    (lambda a: without(a, "bbox_pred.weight", "bbox_pred.bias", "cls_score.bias"),
     r"lacks the arrays cls_score\.bias, bbox_pred\.weight, bbox_pred\.bias$"),
    (lambda a: a | {"rpn_conv.weight": np.zeros(2)}, r"holds arrays that a published VGG16 lacks: rpn_conv\.weight$"),
    (lambda a: a | {"conv1_1_w": a["conv1_1.weight"]}, r"holds arrays that a published VGG16 lacks: conv1_1_w$"),
    (lambda a: renamed(a, "fc6.bias", "fc6_b"),
     r"lacks the array fc6\.bias; .* holds arrays that a published VGG16 lacks: fc6_b$"),
    (lambda a: a | {"conv1_1.weight": a["conv1_1.weight"].transpose(2, 3, 1, 0)},
     r"conv1_1\.weight must have shape \(4, 3, 3, 3\), got \(3, 3, 3, 4\)$"),
    (lambda a: a | {"fc6.weight": a["fc6.weight"].T}, r"fc6\.weight must have shape \(10, 54\), got \(54, 10\)$"),
    (lambda a: a | {"fc6.weight": a["fc6.weight"].reshape(10, 6, 3, 3)},
     r"fc6\.weight must have shape \(10, 54\), got \(10, 6, 3, 3\)$"),
    (lambda a: a | {"conv1_2.bias": a["conv1_2.bias"][None]}, r"conv1_2\.bias must have shape \(5,\), got \(1, 5\)$"),
    (lambda a: a | {"cls_score.weight": np.zeros((21, 8)), "cls_score.bias": np.zeros(21)},
     r"cls_score\.weight must have shape \(3, 8\), got \(21, 8\); cls_score\.bias must have shape \(3,\), got \(21,\)$"),
    (lambda a: a | {"fc7.bias": np.arange(8)}, r"fc7\.bias must be float64, got int64$"),
    (lambda a: spoilt(a, "conv2_1.weight", np.nan), r"conv2_1\.weight must be finite, got NaN or infinity$"),
    (lambda a: spoilt(a, "bbox_pred.bias", -np.inf), r"bbox_pred\.bias must be finite, got NaN or infinity$"),
    (lambda a: {"conv1_1/kernel": np.zeros(2)}, r"lacks the arrays conv1_1\.weight, .* and 2 more; .* lacks: conv1_1/kernel$"),
    (lambda a: {}, r"lacks the arrays conv1_1\.weight, conv1_1\.bias, conv1_2\.weight, .* and 2 more$"),
]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("change, message", CHANGES, ids=range(len(CHANGES)))
def test_an_unfit_file_is_refused_and_changes_nothing(tmp_path, change, message, suffix):
    net, fresh = make(), make()
    path = write(tmp_path, change(named(published())), suffix)
    with pytest.raises(ValueError, match=ERROR + rf"{path}:? {message}"):
        load_published(net, path)
    for name, a in net.arrays().items():
        assert_array_equal(a, fresh.arrays()[name], err_msg=name)


def test_what_float32_cannot_hold_is_refused(tmp_path):
    net = make(dtype=np.float32)
    with pytest.raises(ValueError, match=ERROR + r".*fc7\.bias must be finite"):
        load_published(net, write(tmp_path, spoilt(named(published()), "fc7.bias", 1e300)))


def test_a_torchvision_file_is_told_in_its_own_names(tmp_path):
    arrays = without(named(published(), names=TORCHVISION), "features.5.bias")
    with pytest.raises(ValueError, match=r"lacks the array features\.5\.bias$"):
        load_published(make(), write(tmp_path, arrays))
    with pytest.raises(ValueError, match=r"lacks the arrays conv1\.weight.*lacks: classifier\.0\.bias"):     # no net of theirs
        load_published(make("VGG_CNN_M_1024"), write(tmp_path, arrays))


def test_the_last_layer_of_imagenet_is_not_looked_at(tmp_path):
    net, layers = make(), published()
    layers["fc8"] = (np.array([np.nan]), np.array(["any"]))
    assert load_published(net, write(tmp_path, named(layers))) == []
    assert_is_published(net, "VGG16", layers | {"fc8": ()})


def test_other_files_and_arguments_are_refused(tmp_path):
    net, fresh = make(), make()
    arrays = named(published())
    files.write_arrays(tmp_path / "own.npz", dict(net.arrays()), {})
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no tensors")
    np.savez(tmp_path / "objects.npz", **arrays | {"conv1_1.weight": np.array([{}], object)})
    cut = write(tmp_path, arrays).read_bytes()
    (tmp_path / "cut.npz").write_bytes(cut[:len(cut) // 2])
    middle = len(cut) // 3
    (tmp_path / "bits.npz").write_bytes(cut[:middle] + bytes(64) + cut[middle + 64:])
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(write(tmp_path, arrays), "a") as file:
        file.writestr("fc6.bias.npy", file.read("fc6.bias.npy"))
    (tmp_path / "published.npz").rename(tmp_path / "twice.npz")
    for name, error, message in (
            ("twice.npz", ValueError, r".*twice\.npz must be .*two members of one name"),
            ("own.npz", ValueError, r".*own\.npz must be an \.npz file of plain arrays, got: a file with an entry meta, as tinydet"),
            ("text.npz", ValueError, r".*text\.npz must be an \.npz file of plain arrays, got: a file that is no \.npz archive"),
            ("objects.npz", ValueError, r".*objects\.npz must be .*allow_pickle=False"),
            ("cut.npz", ValueError, r".*cut\.npz must be an \.npz file of plain arrays, got: "),
            ("bits.npz", ValueError, r".*bits\.npz must be an \.npz file of plain arrays, got: "),
            ("none.npz", FileNotFoundError, r"there is no file .*none\.npz"),
            ("vgg.caffemodel", ValueError, r"the file must be \.npz or \.safetensors, got .*vgg\.caffemodel")):
        with pytest.raises(error, match=ERROR + message):
            load_published(net, tmp_path / name)
    with pytest.raises(ValueError, match=r"^safetensors\.read: .*text\.safetensors must be a safetensors file"):
        load_published(net, tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_published(net, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=ERROR + r"background must be 'first' or 'last', got 0"):
        load_published(net, write(tmp_path, arrays), background=0)
    with pytest.raises(ValueError, match=r"published_names: table must be one without batch norm \(.*\), got 'small'"):
        load_published(make("small"), write(tmp_path, arrays))
    for name, a in net.arrays().items():
        assert_array_equal(a, fresh.arrays()[name], err_msg=name)


@pytest.mark.slow
def test_a_whole_VGG_CNN_M_1024_of_ImageNet(tmp_path, monkeypatch):
    monkeypatch.undo()
    shapes = {"conv1": (96, 3, 7, 7), "conv2": (256, 96, 5, 5), "conv3": (512, 256, 3, 3), "conv4": (512, 512, 3, 3),
              "conv5": (512, 512, 3, 3), "fc6": (4096, 18432), "fc7": (1024, 4096), "fc8": (1000, 1024)}
    layers = {k: [np.zeros(shape, np.float16), np.zeros(shape[0], np.float16)] for k, shape in shapes.items()}
    layers["fc6"][0][7, 3 * 36 + 2 * 6 + 5] = 2             # channel 3, cell (2, 5)
    net = FastRCNN(Spec(("a",), "VGG_CNN_M_1024"), np.random.default_rng(0))
    assert len(load_published(net, write(tmp_path, named(layers), ".safetensors"))) == 4
    w = net.params["head.fc6.w"]
    assert w[(2 * 6 + 5) * 512 + 3, 7] == 2 and np.count_nonzero(w) == 1
