"""Published ResNets: the loaded backbone against the published one, computed channels-first as in the file; and all that is refused."""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import files, safetensors, to_numpy, use
from tinydet.models import retinanet
from tinydet.models.retinanet import RetinaNet, Spec, Table
from tinydet.models.retinanet_weights import load_published, published_names

# As ResNets are, only small: every axis of an array has a length of its own, where it may
TINY = Table((5, 3, 2, 4, 6), (2, 1, 2, 1), 7, 1, 7)
ERROR = r"^retinanet_weights\.load_published: "


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(retinanet.TABLES, "resnet50", TINY)


def make(dtype=np.float64, stride_first=False, pretrained=True, table="resnet50"):
    spec = Spec(("a", "b"), table, stride_first, mean=(0.0,) * 3)
    return RetinaNet(spec, np.random.default_rng(0), dtype, pretrained)


def published(dtype=np.float64, seed=1):
    """A ResNet with torchvision's names and arrays, its last layer and counters among them."""
    rng, found, C = np.random.default_rng(seed), {}, TINY.widths[0]

    def conv(name, out, Cin, size):
        found[f"{name}.weight"] = rng.normal(0, 1 / size / np.sqrt(Cin), (out, Cin, size, size)).astype(dtype)

    def norm(name, C):
        for ending in ("weight", "bias", "running_mean"):
            found[f"{name}.{ending}"] = rng.normal(0, 1, C).astype(dtype)
        found[f"{name}.running_var"] = rng.uniform(0.3, 2, C).astype(dtype)
        found[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", C, 3, 7)
    norm("bn1", C)
    for k, (width, count) in enumerate(zip(TINY.widths[1:], TINY.blocks), 1):
        for b in range(count):
            at = f"layer{k}.{b}"
            for i, (out, Cin, size) in enumerate(((width, C, 1), (width, width, 3), (4 * width, width, 1)), 1):
                conv(f"{at}.conv{i}", out, Cin, size)
                norm(f"{at}.bn{i}", out)
            if b == 0:
                conv(f"{at}.downsample.0", 4 * width, C, 1)
                norm(f"{at}.downsample.1", 4 * width)
            C = 4 * width
    return found | {"fc.weight": np.zeros((7, C), dtype), "fc.bias": np.full(7, np.nan, dtype)}


def write(folder, arrays, suffix=".npz"):
    path = folder / f"resnet{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.write(path, arrays, {"format": "pt"})
    return path


# The published net, channels-first and in loops

def conv(x, w, stride, pad):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    k = w.shape[2]
    h, v = ((n - k) // stride + 1 for n in x.shape[2:])
    y = np.empty((len(x), len(w), h, v))
    for i, j in np.ndindex(h, v):
        y[:, :, i, j] = np.einsum("nchw,dchw->nd", x[:, :, i * stride:i * stride + k, j * stride:j * stride + k], w)
    return y


def pool(x):
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    h, v = ((n - 3) // 2 + 1 for n in x.shape[2:])
    return np.array([[x[:, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3].max((2, 3)) for j in range(v)] for i in range(h)]).transpose(2, 3, 0, 1)


def resnet(arrays, x, stride_first):
    """C3, C4, C5 of images (N, C, H, W)."""
    a = {k: v.astype(float)[:, None, None] if v.ndim == 1 else v.astype(float) for k, v in arrays.items()}

    def norm(x, name):
        return (x - a[f"{name}.running_mean"]) / np.sqrt(a[f"{name}.running_var"] + 1e-5) * a[f"{name}.weight"] + a[f"{name}.bias"]

    x, maps = pool(np.maximum(norm(conv(x, a["conv1.weight"], 2, 3), "bn1"), 0)), []
    for k, count in enumerate(TINY.blocks, 1):
        for b in range(count):
            at, stride = f"layer{k}.{b}", 2 if k > 1 and b == 0 else 1
            y = np.maximum(norm(conv(x, a[f"{at}.conv1.weight"], stride if stride_first else 1, 0), f"{at}.bn1"), 0)
            y = np.maximum(norm(conv(y, a[f"{at}.conv2.weight"], 1 if stride_first else stride, 1), f"{at}.bn2"), 0)
            y = norm(conv(y, a[f"{at}.conv3.weight"], 1, 0), f"{at}.bn3")
            if b == 0:
                x = norm(conv(x, a[f"{at}.downsample.0.weight"], stride, 0), f"{at}.downsample.1")
            x = np.maximum(x + y, 0)
        maps.append(x)
    return maps[1:]


def assert_is_published(net, arrays, bgr=False, stride_first=False, put=np.asarray):
    images = np.random.default_rng(2).normal(0, 1, (2, 37, 50, 3)).astype(net.dtype)
    found = net.parts["backbone"](put(images))[2:]
    theirs = images[..., ::-1] if bgr else images
    for ours, wanted in zip(found, resnet(arrays, theirs.transpose(0, 3, 1, 2).astype(float), stride_first), strict=True):
        assert wanted.std() > 0.01
        assert_allclose(to_numpy(ours), wanted.transpose(0, 2, 3, 1), rtol=0, atol=1e-10 if net.dtype == np.float64 else 1e-3)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("stride_first, bgr", [(False, False), (True, True)])
def test_the_backbone_answers_as_the_published_one(tmp_path, suffix, stride_first, bgr):
    net, arrays = make(stride_first=stride_first), published()
    before = {k: v.copy() for k, v in net.arrays().items()}
    left = load_published(net, write(tmp_path, arrays, suffix), bgr)
    assert_is_published(net, arrays, bgr, stride_first)
    assert left and all(k.split(".")[0] in ("pyramid", "classifier", "regressor") for k in left)
    for k, v in net.arrays().items():
        assert np.array_equal(v, before[k]) == (k in left), k


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_become_the_nets_and_counters_and_fc_may_be_missing(tmp_path, dtype):
    arrays = {k: a for k, a in published(dtype).items() if "tracked" not in k and not k.startswith("fc.")}
    net = make(np.float32)
    load_published(net, str(write(tmp_path, arrays)))
    assert {a.dtype for a in net.arrays().values()} == {np.dtype(np.float32)}
    assert_is_published(net, arrays)


def test_a_net_on_the_numpy_backend_and_one_that_trains(tmp_path):
    arrays = published()
    with use("numpy") as put:
        net = make(pretrained=False).to(put)
        load_published(net, write(tmp_path, arrays))
        assert_is_published(net, arrays, put=put)


def test_names_by_hand():
    names = published_names(make())
    assert names["C1.conv1.w"] == "conv1.weight" and names["C1.bn1.var"] == "bn1.running_var"
    assert names["C2.1.sum.branch.bn3.beta"] == "layer1.1.bn3.bias"
    assert names["C5.0.sum.shortcut.bn.mean"] == "layer4.0.downsample.1.running_mean"
    assert names["C4.0.sum.shortcut.conv.w"] == "layer3.0.downsample.0.weight"
    assert sorted(names.values()) == sorted(k for k in published() if "tracked" not in k and not k.startswith("fc."))
    with pytest.raises(ValueError, match=r"published_names: the net's table must be a ResNet \(resnet50, resnet101\), got 'small'"):
        published_names(make(table="small"))


# What is refused, and leaves the net as it was

CHANGES = [
    (lambda a: {k: v for k, v in a.items() if k != "layer2.0.downsample.0.weight"}, r"lacks the array layer2\.0\.downsample\.0\.weight$"),
    (lambda a: {k: v for k, v in a.items() if not k.startswith("bn1.running")}, r"lacks the arrays bn1\.running_mean, bn1\.running_var$"),
    (lambda a: a | {"layer1.2.conv1.weight": np.zeros(2)}, r"holds arrays that a published resnet50 lacks: layer1\.2\.conv1\.weight$"),
    (lambda a: a | {"layer9.num_batches_tracked": np.array(1)}, r"holds arrays that a published resnet50 lacks: layer9\.num_batches_tracked$"),
    (lambda a: a | {"conv1.bias": np.zeros(5)}, r"holds arrays that a published resnet50 lacks: conv1\.bias$"),
    (lambda a: a | {"conv1.weight": a["conv1.weight"].transpose(2, 3, 1, 0)}, r"conv1\.weight must have shape \(5, 3, 7, 7\), got \(7, 7, 3, 5\)$"),
    (lambda a: a | {"layer3.1.bn2.bias": np.zeros((4, 1))}, r"layer3\.1\.bn2\.bias must have shape \(4,\), got \(4, 1\)$"),
    (lambda a: a | {"bn1.weight": np.arange(5)}, r"bn1\.weight must be float64, got int64$"),
    (lambda a: a | {"bn1.weight": np.full(5, np.nan)}, r"bn1\.weight must be finite, got NaN or infinity$"),
    (lambda a: a | {"bn1.running_var": np.full(5, -0.5)}, r"bn1\.running_var must be at least 0, got -0\.5$"),
    (lambda a: {}, r"lacks the arrays conv1\.weight, .* more$")]


@pytest.mark.parametrize("change, message", CHANGES, ids=range(len(CHANGES)))
def test_an_unfit_file_is_refused_and_changes_nothing(tmp_path, change, message):
    net, fresh, path = make(), make(), write(tmp_path, change(published()))
    with pytest.raises(ValueError, match=ERROR + rf"{path}:? {message}"):
        load_published(net, path)
    for name, a in net.arrays().items():
        assert_array_equal(a, fresh.arrays()[name], err_msg=name)


def test_other_files_are_refused(tmp_path):
    net = make()
    files.write_arrays(tmp_path / "own.npz", {}, {})
    (tmp_path / "text.npz").write_text("no archive")
    for name, error, message in (("own.npz", ValueError, "a file with an entry meta"),
                                 ("text.npz", ValueError, "a file that is no .npz archive"),
                                 ("none.npz", FileNotFoundError, "there is no file"),
                                 ("resnet50.pth", ValueError, "must be .npz or .safetensors")):
        with pytest.raises(error, match=ERROR + f".*{message}"):
            load_published(net, tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("table, blocks, size", [("resnet50", (3, 4, 6, 3), 23_508_032), ("resnet101", (3, 4, 23, 3), 42_500_160)])
def test_a_whole_resnet(tmp_path, monkeypatch, table, blocks, size):
    monkeypatch.undo()
    net = make(np.float32, table=table)
    assert retinanet.TABLES[table].blocks == blocks and sum(v.size for v in net.parts["backbone"].params.values()) == size
    names, own = published_names(net), net.parts["backbone"].arrays()
    shapes = {theirs: (a.shape[3], a.shape[2], *a.shape[:2]) if (a := own[ours]).ndim == 4 else a.shape for ours, theirs in names.items()}
    assert shapes["layer3.5.conv2.weight"] == (256, 256, 3, 3) and shapes["layer4.0.downsample.0.weight"] == (2048, 1024, 1, 1)
    arrays = {k: np.zeros(shape, np.float16) for k, shape in shapes.items()}
    arrays["layer4.2.conv3.weight"][7, 5] = 2
    load_published(net, write(tmp_path, arrays, ".safetensors"))
    w = net.params["backbone.C5.2.sum.branch.conv3.w"]
    assert w[0, 0, 5, 7] == 2 and np.count_nonzero(w) == 1
