"""Everything that needs a GPU, in one go: tests, sanitizers, benchmark, an example at full size. Each step has its own time limit.

    python examples/gpu_check.py --out gpu                          # at most nine and a half minutes
    python examples/gpu_check.py --out gpu --only tests bench       # some steps
    python examples/gpu_check.py --out gpu --dry-run                # the same steps without a GPU, on the emulated kernels, cut short

Needs a GPU with CuPy, and numba, scipy, pillow, tqdm, matplotlib, pytest, hypothesis; nothing is downloaded or installed; run it from a clone. The
folder --out gets, while the steps run, steps.json (command, exit status, seconds and last lines of each), a log a step, bench_gpu.json and the
example's run folder: what a time limit cuts off keeps what it had. compute-sanitizer (memcheck, racecheck, initcheck, synccheck) is taken from the
PATH, and the step skipped where it is not found. It sees the tests marked "kernels" (tests/conftest.py), every kernel on both sides of a block's
border, with CuPy's memory pool off, which would hide what is read outside an array. It comes last: it is slow, and the limit may cut it.
A dry run takes the GPU tests through the stand-in for CuPy (tests/fake_cupy.py), the CPU's AddressSanitizer, and everything else emulated.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tinydet import files

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def steps(args):
    """Name: (command, seconds, environment). A command of None is skipped, with the reason in place of the seconds."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    stand_in = {"TINYDET_FAKE_GPU": "1"} if args.dry_run else {}
    example = ["--backend", "emulated", "--scenes", "4", "--steps", "2", "--batch", "1"] if args.dry_run else ["--backend", "cuda"]
    found = {"versions": (["nvidia-smi"] if shutil.which("nvidia-smi") else [*python, "-V"], 10, {}),
             "tests, kernels": ([*pytest, "tests", "-m", "gpu and kernels"], 60, stand_in),
             "tests": ([*pytest, "tests", "-m", "gpu and not kernels"], 130, stand_in),
             "bench": ([*python, "examples/bench_gpu.py", "--json", str(args.out / "bench_gpu.json"), *["--dry-run"] * args.dry_run,
                        *["--quick"] * args.quick], 120, {}),
             "example": ([*python, "examples/overfeat.py", "--out", str(args.out / "runs"), "--name", "overfeat-gpu", *example], 90, {})}
    if args.dry_run:
        return {**found, "sanitizer, address": ([*pytest, "tests/test_sanitize.py", "-m", "sanitize", "-k", "address"], 160, {})}
    there = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        found[f"sanitizer, {tool}"] = ([there, "--tool", tool, "--error-exitcode", "9", *pytest, "tests", "-m", "gpu and kernels"], 40,
                                       {"TINYDET_GPU_POOL": "0"}) if there else (None, "compute-sanitizer is not on the PATH", {})
    return found


def run(name, command, limit, environment, out):
    """Run one step; its output goes to the terminal's log file as it comes. Returns the record."""
    path = out / f"{name.replace(', ', '-')}.log"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    start = time.perf_counter()
    with path.open("w") as log:
        try:
            status = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        except OSError as error:
            status = str(error)
    tail = path.read_text(errors="replace").replace("\r", "\n").splitlines()[-12:]
    return {"command": " ".join(map(str, command)), "status": status, "seconds": round(time.perf_counter() - start, 1), "tail": tail}


def main(args):
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"date": time.strftime("%Y-%m-%d %H:%M"), "dry_run": args.dry_run, "steps": {}}
    for name, (command, limit, environment) in steps(args).items():
        if args.only and name.split(",")[0] not in args.only:
            continue
        print(f"{name} ...", flush=True)
        report["steps"][name] = run(name, command, limit, environment, args.out) if command else {"status": "skipped", "reason": limit}
        record = report["steps"][name]
        print(f"{name}: status {record['status']}, {record.get('seconds', 0)} s; {(record.get('tail') or [''])[-1]}", flush=True)
        files.write(args.out / "steps.json", json.dumps(report, indent=1) + "\n")
    wrong = [name for name, record in report["steps"].items() if record["status"] not in (0, "skipped")]
    print(f"{len(report['steps'])} steps, " + (f"failed: {', '.join(wrong)}" if wrong else "none failed") + f"; logs in {args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="where everything is written (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=("versions", "tests", "sanitizer", "bench", "example"), help="these steps (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer turns of the benchmark")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on the emulated kernels")
    raise SystemExit(main(parser.parse_args()))
