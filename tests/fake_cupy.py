"""A stand-in for CuPy without a GPU: arrays that NumPy refuses, as CuPy's are refused, and kernels that emulate.py runs.

What on a GPU would wait for it and copy to the host is recorded, and refused inside no_copies(): .get(), .item(), float(), bool(), a result
whose shape depends on data. What CuPy does not take is refused, too: NumPy arrays among its own, unconverted numbers as kernel arguments.
Only the functions and methods listed here exist; test_device.py looks for all of them in the real CuPy where that is installed.
"""
import contextlib
import operator
import sys
import types

import numpy as np

FUNCTIONS = """abs add all any arange argmax argsort ascontiguousarray broadcast_to clip concatenate cumsum diff divide empty empty_like equal exp
    expm1 floor full full_like isfinite isinf isnan less log log1p logical_and logical_not logical_or matmul max maximum mean min minimum moveaxis
    multiply nan_to_num negative ones ones_like pad power prod repeat reshape searchsorted sign sqrt square stack subtract sum swapaxes
    take_along_axis tensordot tile transpose tril var where zeros zeros_like""".split()
METHODS = """all any argmax argsort astype clip copy cumsum fill max mean min prod ravel repeat reshape squeeze sum swapaxes transpose var
    view""".split()
CONSTANTS = "float32 float64 int32 int64 uint8 uint16 uint32 uint64 bool_ inf nan newaxis pi".split()
SYNCHRONISE = "argwhere asnumpy flatnonzero nonzero unique".split()     # shapes that depend on data
copies, refused, launches = [], [], []


@contextlib.contextmanager
def no_copies():
    """Inside, a copy to the host raises AssertionError."""
    refused.append(True)
    try:
        yield
    finally:
        refused.pop()


def _copy(what):
    copies.append(what)
    if refused:
        raise AssertionError(f"{what} copies from the GPU to the host")


def _bare(x):
    """The NumPy array behind an argument; lists and tuples of them likewise. What CuPy does not take is refused."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(x, (list, tuple)):
        return type(x)(_bare(v) for v in x)
    return x


def _wrapped(y):
    if isinstance(y, tuple):
        return tuple(map(_wrapped, y))
    return ndarray(np.asarray(y)) if isinstance(y, (np.ndarray, np.generic)) else y


def _index(at, value=None):
    """An index for NumPy; a mask selects as many elements as it holds, which only the GPU knows."""
    parts = at if isinstance(at, tuple) else (at,)
    if any(isinstance(p, ndarray) and p.dtype == bool for p in parts) and not (value is not None and np.ndim(_bare(value)) == 0):
        _copy("indexing with a mask")
    return tuple(map(_bare, at)) if isinstance(at, tuple) else _bare(at)


class ndarray:
    """One array "on the GPU"."""

    def __init__(self, a):
        self._a = a

    shape, dtype, ndim, size, itemsize, nbytes, strides, flags = (
        property(operator.attrgetter(f"_a.{name}")) for name in "shape dtype ndim size itemsize nbytes strides flags".split())
    T = property(lambda self: ndarray(self._a.T))
    data = property(lambda self: types.SimpleNamespace(ptr=self._a.ctypes.data))
    device = types.SimpleNamespace(id=0)

    def __array__(self, *args, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __array_function__(self, function, types, args, options):
        raise TypeError(f"numpy.{function.__name__} was given an array on the GPU: take array_module(x)")

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if method != "__call__" or not any(isinstance(x, np.generic) or np.isscalar(x) for x in inputs if not isinstance(x, ndarray)):
            raise TypeError(f"numpy.{ufunc.__name__} was given an array on the GPU: take array_module(x)")
        return _wrapped(ufunc(*map(_bare, inputs), **options))         # a NumPy number and an array

    def __len__(self):
        return len(self._a)

    def __repr__(self):
        return f"<on the GPU: {self.dtype} {self.shape}>"

    def __getitem__(self, at):
        return _wrapped(self._a[_index(at)])

    def __setitem__(self, at, value):
        self._a[_index(at, value)] = _bare(value)

    def get(self):
        _copy(".get()")
        return self._a.copy()

    def item(self):
        _copy(".item()")
        return self._a.item()

    def tolist(self):
        _copy(".tolist()")
        return self._a.tolist()

    def __bool__(self):
        _copy("bool()")
        return bool(self._a)

    def __float__(self):
        _copy("float()")
        return float(self._a)

    def __int__(self):
        _copy("int()")
        return int(self._a)

    def __index__(self):
        _copy("an index")
        return operator.index(self._a)


def _binary(name):
    def run(self, other):
        if isinstance(other, (list, tuple)):
            raise TypeError(f"Unsupported type {type(other)}")
        return _wrapped(getattr(operator, name)(self._a, _bare(other)))

    def swapped(self, other):
        return _wrapped(getattr(operator, name)(_bare(other), self._a))
    return run, swapped


def _in_place(name):
    def run(self, other):
        self._a = getattr(operator, name)(self._a, _bare(other))
        return self
    return run


def _options(name, options):
    if wrong := {"initial", "where"} & options.keys():
        raise TypeError(f"cupy.{name} takes no {wrong}")
    return {k: _bare(v) for k, v in options.items()}


def _method(name):
    return lambda self, *args, **options: _wrapped(getattr(self._a, name)(*map(_bare, args), **_options(name, options)))


def _function(name):
    function = getattr(np, name)

    def run(*args, **options):
        if name in SYNCHRONISE:
            _copy(f"cupy.{name}")
        return _wrapped(function(*map(_bare, args), **_options(name, options)))
    return run


for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _operator = {"and": "and_", "or": "or_"}.get(_name, _name)
    setattr(ndarray, f"__{_name}__", _binary(_operator)[0])
    setattr(ndarray, f"__r{_name}__", _binary(_operator)[1])
    setattr(ndarray, f"__i{_name}__", _in_place(f"i{_name}"))
for _name in "lt le eq ne gt ge".split():
    setattr(ndarray, f"__{_name}__", _binary(_name)[0])
for _name in "neg abs invert".split():
    setattr(ndarray, f"__{_name}__", lambda self, _f=getattr(operator, _name): _wrapped(_f(self._a)))
for _name in METHODS:
    setattr(ndarray, _name, _method(_name))
ndarray.__hash__ = None


class RawModule:
    """Splits the text as cuda.py joins it, and lets emulate.py run it. A kernel takes arrays and NumPy numbers, nothing else."""

    def __init__(self, *, code, options=()):
        self.prelude, rest = code.split('#line 1 "')
        self.file, self.text = rest.split('"\n', 1)
        self.macros = dict(o[2:].split("=") for o in options if o.startswith("-D"))

    def get_function(self, name):
        return Kernel(self, name)


class Kernel:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, grid, block, args, *, shared_mem=0):
        from tinydet import emulate
        assert len(grid) == len(block) == 3 and all(type(n) is int and n > 0 for n in grid + block)
        assert all(isinstance(a, (ndarray, np.generic)) for a in args), [type(a) for a in args]
        assert all(a.flags.c_contiguous for a in args if isinstance(a, ndarray)) and shared_mem <= self.max_dynamic_shared_size_bytes
        launches.append(self.name)
        m = self.module
        emulate.module(m.file, m.text, m.macros, prelude=m.prelude).launch(self.name, grid, block, [_bare(a) for a in args], shared_mem)


def module():
    """The module that stands for cupy in sys.modules."""
    cupy = types.ModuleType("cupy")
    for name in FUNCTIONS + SYNCHRONISE:
        setattr(cupy, name, _function("asarray" if name == "asnumpy" else name))
    for name in CONSTANTS:
        setattr(cupy, name, getattr(np, name))
    cupy.array = lambda x, dtype=None, copy=True: ndarray(np.array(x._a if isinstance(x, ndarray) else x, dtype))
    cupy.asarray = lambda x, dtype=None: x if isinstance(x, ndarray) and dtype in (None, x.dtype) else cupy.array(x, dtype)
    cupy.ndarray, cupy.RawModule = ndarray, RawModule
    runtime = types.SimpleNamespace(getDevice=lambda: 0, deviceSynchronize=lambda: None)
    cupy.cuda = types.SimpleNamespace(is_available=lambda: True, runtime=runtime, Device=lambda id=0: types.SimpleNamespace(
        id=id, attributes={"MultiProcessorCount": 132}))
    return cupy


@contextlib.contextmanager
def installed():
    """Inside, `import cupy` finds the stand-in, and use("cuda") can run. Yields the module."""
    from tinydet import backend, cuda
    from tinydet.ops import conv
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = cupy = module()
    copies.clear()
    launches.clear()
    for cache in (backend.missing, cuda._compiled, conv._multiprocessors):
        cache.cache_clear()
    try:
        yield cupy
    finally:
        sys.modules.pop("cupy", None)
        if before is not None:
            sys.modules["cupy"] = before
        for cache in (backend.missing, cuda._compiled, conv._multiprocessors):
            cache.cache_clear()
