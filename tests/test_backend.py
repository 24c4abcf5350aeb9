import subprocess
import sys
import types

import numpy as np
import pytest

import fake_cupy
from conftest import BACKENDS, RUNNING
from tinydet import array_module, backend as backend_module, pick, to_numpy, use
from tinydet.backend import BACKENDS as KNOWN, put as module_put, scalar


def chosen():
    return pick(np.zeros(1), numpy="numpy", numba="numba")


def test_every_backend_is_tested():
    assert KNOWN == tuple(p.values[0] for p in BACKENDS)


def test_use_chooses_nests_and_restores():
    assert chosen() == "numba"                              # outside any block
    with use("numpy"):
        assert chosen() == "numpy"
        with use("numba"):
            assert chosen() == "numba"
        assert chosen() == "numpy"
    assert chosen() == "numba"


def test_an_exception_restores_the_earlier_backend():
    with use("numpy"):
        with pytest.raises(KeyError):
            with use("numba"):
                raise KeyError
        assert chosen() == "numpy"
    assert chosen() == "numba"


@pytest.mark.parametrize("name", ["torch", "", None])
def test_an_unknown_name_is_refused_at_once(name):
    with pytest.raises(ValueError, match=rf"^backend\.use: name must be one of numpy, numba, emulated, cuda, got {name!r}"):
        use(name)
    assert chosen() == "numba"


@pytest.mark.parametrize("backend", RUNNING)
def test_put_and_what_each_backend_picks_on_the_host(backend):
    with use(backend) as put:
        x = put(np.arange(3.0))
        assert pick(x, numpy="array code") == "array code"
        assert pick(x, numpy="numpy", numba="numba") == ("numpy" if backend == "numpy" else "numba")
        assert pick(x, numpy="numpy", numba="numba", cuda="cuda") == {"emulated": "cuda"}.get(backend, backend)
        assert module_put(x) is x
    assert array_module(x) is np and array_module([1]) is np
    np.testing.assert_array_equal(to_numpy(x), [0, 1, 2])
    assert type(scalar(np.float64(2))) is float and scalar(np.ones(())) == 1.0


def test_a_backend_that_cannot_run_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(backend_module, "missing", lambda name: "a thing is not there" if name == "cuda" else None)
    with pytest.raises(RuntimeError, match=r"^backend\.use: cuda cannot run here: a thing is not there$"):
        use("cuda")
    assert chosen() == "numba" and backend_module.available() == ("numpy", "numba", "emulated")


@pytest.mark.parametrize("cupy, told", [(None, "CuPy is not installed"), (types.SimpleNamespace(is_available=lambda: False), "finds no GPU"),
                                        (types.SimpleNamespace(is_available=lambda: True), None)])
def test_cuda_needs_cupy_and_a_gpu(monkeypatch, cupy, told):
    monkeypatch.setitem(sys.modules, "cupy", cupy and types.SimpleNamespace(cuda=cupy))
    lacks = backend_module.missing.__wrapped__("cuda")
    assert lacks is None if told is None else told in lacks


def test_the_emulated_backend_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "g++" in backend_module.missing.__wrapped__("emulated")
    assert backend_module.missing("numpy") is None


def test_on_the_gpu_a_result_stays_there_and_host_arrays_go_the_way_of_numba():
    with fake_cupy.installed() as cupy, use("cuda") as put:
        x = put(np.arange(3.0))
        assert isinstance(x, cupy.ndarray) and put(x) is x and isinstance(scalar(x.sum()), cupy.ndarray)
        assert pick(x, numpy="numpy", numba="numba", cuda="cuda") == "cuda"
        assert pick(np.ones(1), numpy="numpy", numba="numba", cuda="cuda") == "numba"
        np.testing.assert_array_equal(to_numpy(x), [0, 1, 2])


def test_an_array_of_the_gpu_goes_to_the_cuda_version(monkeypatch):
    class ndarray:                                          # stands for cupy.ndarray
        def get(self):
            return np.arange(2)

    def forward():
        pass
    cupy = types.SimpleNamespace(ndarray=ndarray)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = ndarray()
    assert array_module(x) is cupy and array_module(np.zeros(1)) is np
    assert pick(x, numpy=forward, numba="numba", cuda="cuda") == "cuda"
    assert pick(np.zeros(1), numpy=forward, numba="numba", cuda="cuda") == "numba"
    np.testing.assert_array_equal(to_numpy(x), [0, 1])
    with pytest.raises(TypeError, match="test_backend: this op works on the host, got a ndarray on the GPU: copy it with to_numpy"):
        pick(x, numpy=forward)


def test_import_never_imports_cupy():
    """A stand-in that raises is first on the path, so that this also holds where CuPy is not installed."""
    code = ("import sys\n"
            "class Find:\n"
            "    def find_spec(self, name, *_):\n"
            "        assert name.split('.')[0] != 'cupy', 'cupy imported'\n"
            "sys.meta_path.insert(0, Find())\n"
            "import tinydet, tinydet.layers, tinydet.optim, tinydet.gradcheck, numpy as np\n"
            "from tinydet.ops import batch_norm, box_loss, boxes, conv, dropout, max_pool, merge, nms, offset_pool, relu, softmax_loss\n"
            "relu.forward(np.ones(1))\n"
            "assert 'cupy' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
