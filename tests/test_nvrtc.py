"""Every kernel, in every variant, compiles for three GPU generations without a warning, and keeps to its budget. No GPU is needed."""
import pytest

from tinydet import cuda, nvrtc

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

# What a kernel may need of a GPU, the most of all variants and generations: registers a thread (15 % above what NVRTC 12.9 gives, as versions
# differ), bytes of static shared memory. Nothing may spill.
BUDGETS = {
    "batch_norm_backward": (68, 0),
    "batch_norm_totals": (38, 1024),
    "batch_norm_sums": (68, 4096),
    "batch_norm_forward": (46, 0),
    "ap_loss_gradients": (34, 0),
    "ap_loss_negatives": (36, 128),
    "ap_loss_positives": (32, 0),
    "ap_loss_start": (28, 0),
    "ap_loss_weights": (66, 192),
    "batch_norm_statistics": (52, 1024),
    "batch_norm_moments": (46, 4096),
    "box_loss_smooth_l1": (48, 64),
    "box_loss_l2": (40, 64),
    "conv_sum": (60, 0),
    "conv_db": (36, 2048),
    "conv_dw": (194, 16896),
    "conv_forward": (178, 16896),
    "conv_im2col_fold": (30, 0),
    "conv_im2col_unroll": (20, 0),
    "focal_loss_entries": (50, 80),
    "global_max_pool_backward": (14, 0),
    "global_max_pool_forward": (36, 6144),
    "logistic_loss_entries": (44, 64),
    "lrn_backward": (54, 0),
    "lrn_forward": (52, 0),
    "map_loss_gradients": (136, 0),
    "map_loss_keep": (74, 0),
    "map_loss_overlaps": (74, 0),
    "map_loss_values": (42, 0),
    "max_pool_backward": (50, 0),
    "max_pool_forward": (42, 0),
    "nms_reduce": (60, 528),
    "nms_mask": (56, 3072),
    "offset_pool_backward": (76, 0),
    "offset_pool_forward": (56, 0),
    "roi_pool_backward": (40, 0),
    "roi_pool_bins": (36, 0),
    "roi_pool_forward": (40, 0),
    "scan_write": (74, 64),
    "scan_totals": (36, 64),
    "sgd_step": (24, 0),
    "sgd_check": (10, 0),
    "softmax_loss_rows": (64, 64),
    "sort_scatter": (28, 8192),
    "sort_count": (18, 1024),
    "sort_words": (12, 0),
    "sort_block": (70, 32800),
}
SETS = [(file, k) for file in cuda.files() for k in range(len(cuda.variants(cuda.source(file))))]


@pytest.mark.parametrize("arch", [pytest.param(a, marks=[] if a == "sm_80" else pytest.mark.slow) for a in nvrtc.ARCHS])
@pytest.mark.parametrize("file, k", SETS, ids=[f"{f} {', '.join(cuda.variants(cuda.source(f))[k].values())}" for f, k in SETS])
def test_compiles_in_silence_within_its_budget(file, k, arch):
    text = cuda.source(file)
    ok, log = nvrtc.compile(file, cuda.variants(text)[k], arch)
    assert ok and not nvrtc.complaints(log), log
    found = nvrtc.resources(log)
    assert found.keys() == cuda.signatures(text).keys()
    for kernel, (registers, spilled, shared) in found.items():
        assert spilled == 0, f"{kernel} spills {spilled} bytes on {arch}"
        assert registers <= BUDGETS[kernel][0] and shared <= BUDGETS[kernel][1], f"{kernel} on {arch}: {registers} registers, {shared} bytes"


def test_every_budget_belongs_to_a_kernel():
    assert BUDGETS.keys() == {name for file in cuda.files() for name in cuda.signatures(cuda.source(file))}


def test_what_is_wrong_is_seen():
    text = 'extern "C" __global__ void wrong(int* x) { %s }'
    ok, log = nvrtc.compile("wrong.cu", {}, "sm_80", text % "int unused; x[0] = y;")
    assert not ok and any("wrong.cu(1)" in line and "error" in line for line in nvrtc.complaints(log))
    ok, log = nvrtc.compile("wrong.cu", {}, "sm_80", text % "int unused; x[0] = 1;")
    assert ok and any("unused" in line for line in nvrtc.complaints(log))
    ok, log = nvrtc.compile("wrong.cu", {}, "sm_80", text % "__shared__ int s[256]; s[threadIdx.x] = x[1]; __syncthreads(); x[0] = s[5];")
    assert ok and nvrtc.complaints(log) == [] and nvrtc.resources(log)["wrong"][1:] == (0, 1024)


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "files", lambda: ["max_pool.cu"])
    assert nvrtc.main() == 0
    out = capsys.readouterr().out
    assert out.count("max_pool_forward") == 6 * len(nvrtc.ARCHS) and "no warnings or errors" in out
    assert nvrtc.version()[0] >= 12


@pytest.mark.parametrize("argv, status", [(["--help"], 0), (["--bogus"], 2)])
def test_the_program_compiles_nothing_for_help(argv, status, monkeypatch, capsys):
    monkeypatch.setattr(nvrtc, "compile", None)
    with pytest.raises(SystemExit) as end:
        nvrtc.main(argv)
    assert end.value.code == status and "python -m tinydet.nvrtc" in "".join(capsys.readouterr())
