"""Weights files of the models: arrays with the Spec of the net, its dtype, and the settings to use it with. Each model has save and load."""
import dataclasses

from tinydet import layers
from tinydet.backend import to_numpy
from tinydet.files import read_arrays, write_arrays


def save(path, model, net, settings):
    """Write a net with net.spec, a dataclass of JSON values, net.dtype and settings, a JSON dict, to a weights file (.npz)."""
    write_arrays(path, {k: to_numpy(v) for k, v in net.arrays().items()},
                 {"model": model, "dtype": net.dtype.name, "spec": dataclasses.asdict(net.spec), "settings": settings})


def load(path, model, build):
    """Read a weights file: the net, in the dtype that it was saved in, and the settings.

    build(arrays, spec, dtype) makes the net; spec: a dict, its lists as tuples. It raises KeyError, TypeError, ValueError or AttributeError for what
    describes none. Raises FileNotFoundError, or ValueError naming a file that holds no such net and all in which its arrays differ from one.
    """
    arrays, meta = read_arrays(path)
    try:
        kind, dtype, settings = meta["model"], meta.get("dtype", "float32"), meta["settings"]
        if kind != model:
            raise ValueError(f"the weights of {kind!r}")
        if dtype not in ("float32", "float64") or not isinstance(settings, dict):
            raise TypeError(f"dtype {dtype!r}, settings {settings!r}")
        net = build(arrays, {k: _tuples(v) for k, v in meta["spec"].items()}, dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{model}.load: {path} must describe a net of {model}, got: {error!r}") from None
    layers.load(net, arrays, str(path))
    return net, settings


def fits(wanted, arrays):
    """Raise ValueError, for load, if a net of so many parameters is far larger than a file's arrays: it would be built before they are compared."""
    if wanted > max(10**7, sum(a.size for a in arrays.values())):
        raise ValueError(f"a net of {wanted:,} parameters, far larger than the file's arrays")


def model(path):
    """The name of the model whose weights a file holds. Raises as load."""
    meta = read_arrays(path)[1]
    if not isinstance(meta, dict) or not isinstance(meta.get("model"), str):
        raise ValueError(f"weights.model: {path} must hold the weights of a model, got {str(meta)[:80]}")
    return meta["model"]


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
