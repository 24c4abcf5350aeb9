"""The runner of the papers' claims, on a stand-in program: what runs, goes on, is refused; the statistics by hand."""
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tinydet import data, evaluate, evaluate_classification, scenes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
claims = importlib.import_module("claims")

# Finds a share --gain of the objects of truth.json, which also has their AP. Imports nothing slow
PROGRAM = '''
import json, os, sys, time
resume = "--resume" in sys.argv
words = [w for w in sys.argv[1:] if w != "--resume"]
args = dict(zip(words[::2], words[1::2]))                           # the last of two wins
seed, steps, gain, name = int(args["--seed"]), int(args["--steps"]), float(args["--gain"]), args["--name"]
run = args["--out"] + "/" + name
assert resume == os.path.exists(run + "/config.json"), "resumed without a run, or begun twice"
os.makedirs(run, exist_ok=True)

def write(file, value):
    with open(run + "/" + file, "w") as f:
        json.dump(value, f)

write("config.json", {})
print(f"resume {resume}, threads {os.environ.get('NUMBA_NUM_THREADS')} {os.environ.get('OPENBLAS_NUM_THREADS')}", flush=True)
if os.environ.get("SLOW") and not resume:
    time.sleep(60)
if os.environ.get("FAIL") == name:
    sys.exit("error: the loss must be finite, got nan")
with open(args["--data"] + "/truth.json") as f:
    truth, aps = json.load(f)

def evaluate(file, gain):
    rank = [(i * 7 + seed * 3) % 10 for i in range(len(truth))]
    write(file, [{"image": image, "class": "disc", "box": [v + 500 * (r >= 10 * gain) for v in box], "score": 0.9 - 0.01 * r}
                 for r, (image, box) in zip(rank, truth)])
    return aps[f"{gain:g} {seed}"]

ap, voting = evaluate("detections.json", gain), evaluate("detections_voting.json", min(1, gain + 0.1))
curve = [{"step": s, "mean AP50": ap * s / steps, "all_loss": 1 / s - gain} for s in (1, steps // 2, steps)]
write("results.json", {"set": "val", "AP50": {"disc": ap}, "mean AP50": ap, "seconds": 1, "curve": curve, "also": {"voting": {"mean AP50": voting}}})
'''

TABLE = '''
PROGRAM = "toy.py"
DATA = {"discs": ["--steps", "8"]}
ARMS = {"good": ["--gain", "0.9"], "Bad, N=1": ["--gain", "0.3"], "same": ["--gain", "0.9"]}
ON = {"discs": list(ARMS)}
CURVES = {"all_loss": "mean loss"}
QUICK = ["--steps", "4"]
BENCH = {"cost": ["bench.py"]}
CLAIMS = [dict(text="good is better", paper="2 against 1", data="discs", better="good", worse="Bad, N=1"),
          dict(text="bad is better", paper="-", data="discs", better="Bad, N=1", worse="good"),
          dict(text="they differ", paper="-", data="discs", better="good", worse="same"),
          dict(text="good gains more", paper="-", data="discs", better="good", worse="Bad, N=1", than=("good@voting", "same")),
          dict(text="lower loss", paper="-", data="discs", better="good", worse="Bad, N=1", metric="curve.-1.all_loss", lower=True),
          dict(text="costs less", paper="-", data="cost", better="rows.0.ms", worse="rows.1.ms", lower=True)]
'''

# No detector: tells of each image whether it is wrong. It may take the weights of another run, and repeats what they say
ERRORS = '''
import json, os, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed, every, run = int(args["--seed"]), int(args["--every"]), args["--out"] + "/" + args["--name"]
before = None
if "--weights" in args:
    with open(args["--weights"]) as f:
        before = f.read()
os.makedirs(run, exist_ok=True)

def write(file, value):
    with open(run + "/" + file, "w") as f:
        f.write(value if isinstance(value, str) else json.dumps(value))

def wrong(every):
    return [int((7 * i + seed) % 12 % every == 0) for i in range(12)]

def share(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values)

write("config.json", {})
write("weights.npz", f"{every} {seed}")
top1, top1_all = wrong(every), wrong(every + 1)
place = [None if i % (every + 2) else v for i, v in enumerate(top1)]
write("wrong.json", {"top1_error": top1, "place_error": place})
write("wrong_all.json", {"top1_error": top1_all})
curve = [{"step": s, "loss": 1 / s, "top1_error": share(top1) / s} for s in (4, 2, 1)]
write("results.json", {"set": "val", "top1_error": share(top1), "place_error": share(place), "weights of": before, "parameters": 7, "seconds": 1,
                       "curve": curve, "also": {"all": {"top1_error": share(top1_all)}}})
'''

# Beside the detector of TABLE: errors, and weights of one run for another, which is listed first
ERRORS_TABLE = '''
PROGRAM = "toy.py"
DATA = {"discs": []}
ARMS = {"after": ["errors.py", "--every", "2", "--weights", "@discs/few"], "few": ["errors.py", "--every", "3"],
        "boxes": ["--steps", "8", "--gain", "0.9"]}
ON = {"discs": list(ARMS)}
CURVES = {"place_error": "not in the curve", "top1_error": "top-1 error"}
QUICK = {"toy.py": ["--steps", "4"], "errors.py": ["--every", "5"]}
FEWER = dict(paper="-", data="discs", better="few", worse="after", lower=True)
CLAIMS = [dict(text="fewer errors", metric="top1_error", **FEWER), dict(text="nearer", metric="place_error", **FEWER),
          dict(text="all help", metric="top1_error", **{**FEWER, "better": "few@all", "worse": "few"}),
          dict(text="lower loss", metric="curve.-1.loss", **FEWER)]
'''

# Ranks images by class, through common.py, and finds one point on each: the scores follow the labels with weight --gain
RANKS = '''
import json, sys
from pathlib import Path
from types import SimpleNamespace
import common
import numpy as np
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rng, run = np.random.default_rng(int(args["--seed"])), SimpleNamespace(folder=Path(args["--out"]) / args["--name"], seconds=None)
run.folder.mkdir(parents=True, exist_ok=True)
labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [-1, 1, 0], [0, 0, 0], [0, 0, -1], [0, 0, 0], [0, -1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])

def rank(variant, gain):
    scores = np.floor(3 * (gain * (labels == 1) + rng.random(labels.shape))).astype(np.float32)         # ties abound
    found = common.keep_ranking(run, variant, {"class_ap": (scores, labels == 1, labels),
                                               "location_ap": (scores / 3, rng.random(labels.shape) < 0.3 + gain / 2, labels)}, ("cat", "dog", "emu"))
    return {**found, "arrays": 0}

told, also = rank("", float(args["--gain"])), {"six": rank("six", 1.0)}
curve = [{"step": s, "class_ap": told["class_ap"] * s / 2, "loss": 1 / s} for s in (1, 2)]
common.keep_results(run, SimpleNamespace(eval_set="val", resume=False), {**told, "seconds": 1, "curve": curve, "also": also})
'''

RANKS_TABLE = '''
PROGRAM = "ranks.py"
DATA = {"discs": []}
ARMS = {"good": ["--gain", "0.8"], "bad": ["--gain", "0"]}
ON = {"discs": list(ARMS)}
CURVES = {"class_ap": "classification AP"}
BOTH = dict(paper="-", data="discs", better="good", worse="bad")
CLAIMS = [dict(text="classes", metric="class_ap", **BOTH), dict(text="places", metric="location_ap", **BOTH),
          dict(text="six", metric="location_ap", **{**BOTH, "better": "good@six", "worse": "good"}),
          dict(text="lower loss", metric="curve.-1.loss", lower=True, **BOTH)]
'''

PROGRAMS = {"toy.py": PROGRAM, "errors.py": ERRORS, "ranks.py": RANKS}

BENCH = '''
import json, sys
json.dump({"rows": [{"ms": [1, 2, 3]}, {"ms": [3, 4, 5]}]}, open(sys.argv[sys.argv.index("--json") + 1], "w"))
'''


def object_set(images=12, seed=0):
    """Examples with one to three objects each, and the class."""
    rng, examples = np.random.default_rng(seed), []
    for i in range(images):
        n = 1 + i % 3
        corner = rng.integers(0, 60, (n, 2)) + 100 * np.arange(n)[:, None]
        examples.append(data.Example(f"image{i:02}", None, (400, 400), np.concatenate([corner, corner + 30], 1).astype(float),
                                     np.zeros(n, np.int64), np.zeros(n, bool)))
    return examples


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of example programs (claims.py runs there), with a data set; returns a function that calls claims.main."""
    examples = object_set()
    folder = tmp_path / "sets" / "discs"
    folder.mkdir(parents=True)
    truth = [(e.name, box.tolist()) for e in examples for box in e.boxes]
    aps = {}
    for gain in (0.3, 0.4, 0.9, 1.0):
        for seed in range(3):
            rank = [(i * 7 + seed * 3) % 10 for i in range(len(truth))]
            boxes = [np.array(box) + 500 * (r >= 10 * gain) for (_, box), r in zip(truth, rank)]
            mine = [[i for i, (name, _) in enumerate(truth) if name == e.name] for e in examples]
            found = [(np.array([boxes[i] for i in at]), np.zeros(len(at), int), np.array([0.9 - 0.01 * rank[i] for i in at])) for at in mine]
            aps[f"{gain:g} {seed}"] = evaluate.voc(found, examples, ["disc"])["disc"].ap
    (folder / "truth.json").write_text(json.dumps([truth, aps]))
    for name, text in (*PROGRAMS.items(), ("bench.py", BENCH), ("claims_toy.py", TABLE)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(claims, "HERE", tmp_path)
    monkeypatch.setattr(claims, "RESAMPLES", 200)
    pictures = claims.pictures
    monkeypatch.setattr(claims, "pictures", lambda *_: None)        # matplotlib is slow
    monkeypatch.setattr(claims, "evaluation_set", lambda folder, job: (examples, ["disc"]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "claims_toy", raising=False)

    def call(*options):
        return claims.main(claims.arguments(["toy", "--data", str(tmp_path / "sets"), "--out", str(tmp_path / "out"), *options]))

    def prepare(*options):
        """What these options would run, in this process: no programs are started."""
        args = claims.arguments(["toy", "--data", str(tmp_path / "sets"), "--out", str(tmp_path / "out"), *options])
        args.folder.mkdir(parents=True)
        for job in claims.jobs_of(args, claims.read_table("toy")[0])[0].values():
            job.record.write_text(json.dumps({"arguments": job.shown}))
            monkeypatch.setattr(sys, "argv", job.command[1:])
            exec(PROGRAMS[job.shown[0]], {})
    call.arguments = lambda *options: claims.arguments(["toy", "--data", str(tmp_path / "sets"), "--out", str(tmp_path / "out"), *options])
    call.folder, call.aps, call.prepare, call.pictures = tmp_path / "out" / "toy", aps, prepare, pictures
    return call


def test_a_full_run_its_table_and_files(place, capsys, monkeypatch):
    place.prepare("--full", "--seeds", "1", "2")
    monkeypatch.setattr(claims, "cores", lambda: 6)
    with monkeypatch.context() as m:
        m.setattr(claims, "pictures", place.pictures)
        found = place("--full")
    assert found["missing"] == [] and found["seeds"] == [0, 1, 2]
    good = [place.aps[f"0.9 {s}"] for s in range(3)]
    bad = [place.aps[f"0.3 {s}"] for s in range(3)]
    first, second, third, fourth, loss, cost = found["claims"]
    assert_allclose(first["differences"], np.subtract(good, bad))
    assert first["values"]["good"]["each"] == good and first["values"]["Bad, N=1"]["sd"] == pytest.approx(np.std(bad, ddof=1))
    assert_allclose(first["interval"], -np.array(second["interval"])[::-1])
    assert first["interval"][0] < np.mean(first["differences"]) < first["interval"][1]
    voting = [place.aps[f"1 {s}"] for s in range(3)]
    assert_allclose(fourth["differences"], np.subtract(good, bad) - np.subtract(voting, good))
    assert_allclose(loss["differences"], -0.6)
    assert cost["differences"] == [-2, -2, -2] and cost["interval"] == [-2, -2]
    assert [c["verdict"] for c in found["claims"]] == ["holds", "does not hold", "not resolved", "holds", "holds", "holds"]
    curve = found["arms"]["discs"]["good"]["curve"]
    assert [r["step"] for r in curve] == [1, 4, 8]
    assert_allclose(found["arms"]["discs"]["good"]["last two"], [np.mean(good) / 2, np.mean(good)])
    assert curve[-1]["all_loss"] == pytest.approx(1 / 8 - 0.9)
    assert found["arms"]["discs"]["good"]["also"] == {"voting": voting}

    assert json.loads((place.folder / "claims.json").read_text()) == json.loads(json.dumps(found))
    assert {"curves_discs.png", "all_loss_discs.png", "discs-bad-n-1-0.log"} <= {p.name for p in place.folder.iterdir()}
    assert (place.folder / "discs-good-0.log").read_text() == "resume False, threads 3 3\n"         # six cores, two at a time
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| good is better"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["2 against 1", "discs", f"good: {100 * np.mean(good):.1f} ± {100 * np.std(good, ddof=1):.1f}"] and cells[-1] == "holds"
    assert cells[5].split() == [f"{100 * (g - b):+.1f}" for g, b in zip(good, bad)]
    assert "    python examples/toy.py --data FOLDER/discs --steps 8 --gain 0.9 --backend numba --seed S\n" in out
    assert str(place.folder.parent.parent) not in json.dumps(found)         # no path of this machine

    written = (place.folder / "discs-good-0.log").read_text()
    monkeypatch.setattr(claims, "start", None)
    assert place("--full")["claims"] == found["claims"]                     # nothing runs again
    assert (place.folder / "discs-good-0.log").read_text() == written


def test_a_quick_run_gives_no_verdict(place):
    place.prepare("--quick")
    found = place("--quick", "--report")
    assert [c["verdict"] for c in found["claims"]] == ["quick run, no verdict"] * 5 + ["not measured"] and found["seeds"] == [0]
    assert found["claims"][0]["interval"] is not None and found["claims"][4]["interval"] is None      # one seed, but many images
    assert found["arms"]["discs"]["good"]["curve"][-1]["step"] == 4
    assert not place.folder.exists() and (place.folder.parent / "toy-quick" / "discs-good-0").is_dir()


def test_what_is_missing_is_not_measured(place, capsys):
    place.prepare("--full")
    for seed in range(3):
        shutil.rmtree(place.folder / f"discs-bad-n-1-{seed}")
    found = place("--full", "--only", "good", "same")                       # both are done: nothing is started
    assert [c["verdict"] for c in found["claims"]] == ["not measured"] * 2 + ["not resolved"] + ["not measured"] * 3
    assert found["missing"] == [f"discs-bad-n-1-{s}" for s in range(3)] + ["bench-cost"]
    assert "runs missing: 4\n" in capsys.readouterr().out
    (place.folder / "discs-good-1" / "results.json").unlink()
    found = place("--full", "--report")
    assert found["claims"][2]["seeds"] == [0, 2] and found["claims"][2]["verdict"] == "not resolved"
    assert "discs-good-1" in found["missing"] and not (place.folder / "discs-good-1" / "results.json").exists()


def test_a_run_that_fails_is_named_and_stops_the_rest(place, monkeypatch):
    monkeypatch.setenv("FAIL", "discs-bad-n-1-0")
    with pytest.raises(RuntimeError, match=r"discs-bad-n-1-0\.log \(exit status 1\): error: the loss must be finite, got nan$"):
        place("--full", "--jobs", "1")
    assert (place.folder / "discs-good-0" / "results.json").exists() and not (place.folder / "discs-same-0").exists()
    monkeypatch.delenv("FAIL")
    place("--full", "--only", "Bad, N=1", "--seeds", "0")
    assert (place.folder / "discs-bad-n-1-0.log").read_text().splitlines()[-1].startswith("resume True")


@pytest.mark.parametrize("last, told", [("Path('c/results.json').write_text('{}'); sys.exit('no memory')", r"c.log \(exit status 1\): no memory"),
                                        ("print('fine', end='\\r')", r"c.log \(exit status 0\): fine"), ("", r"c.log \(exit status 0\): nothing")])
def test_after_a_failure_nothing_starts_and_what_runs_ends(tmp_path, last, told):
    """A run that ends badly, or without results; beside it one that ends later, and is kept."""
    def job(name, code):
        code = f"import os, sys, time; from pathlib import Path; os.chdir({str(tmp_path)!r}); {code}"
        return claims.Job(name, [name], [sys.executable, "-S", "-c", code], tmp_path)

    class Bar:
        set_postfix_str = update = staticmethod(lambda *_: None)

    jobs = [job("c", last), job("b", "time.sleep(0.15); Path('b/results.json').write_text('{}')"), job("a", "Path('begun').touch()")]
    with pytest.raises(RuntimeError, match=told):
        claims.run(jobs, 2, Bar)
    assert claims.is_done(jobs[1]) and not (tmp_path / "begun").exists()
    with pytest.raises(RuntimeError, match="a.log"):
        claims.run(jobs[2:], 1, Bar)
    assert (tmp_path / "begun").exists()


@pytest.mark.skipif(claims.fcntl is None, reason="needs SIGTERM and locks")
def test_a_stopped_run_goes_on(place, tmp_path, monkeypatch):
    """SIGTERM ends the children too; the same command resumes what had begun. A child that is still there is not started again."""
    options, locked = ("--full", "--seeds", "0", "--only", "good", "Bad, N=1"), []
    job = claims.Job("discs-good-0", ["x"], [sys.executable, "-c", ""], place.folder)

    def stop():
        logs = [place.folder / f"discs-{arm}-0.log" for arm in ("good", "bad-n-1")]
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.01)
        try:
            with pytest.raises(RuntimeError, match="discs-good-0 must not be running already, got a process that writes .*discs-good-0.log"):
                claims.start(job, 1)
            locked.append(time.monotonic())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("SLOW", "1")
    before, thread = signal.signal(signal.SIGTERM, claims.terminated), threading.Thread(target=stop)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            place(*options)
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
    assert time.monotonic() - locked[0] < 20, "the children were not terminated"
    assert not (place.folder / "discs-good-0" / "results.json").exists()
    found = place(*options)                                         # still SLOW: had they not resumed, they would sleep
    assert found["claims"][0]["seeds"] == [0]
    for arm in ("good", "bad-n-1"):
        assert [line[:12] for line in (place.folder / f"discs-{arm}-0.log").read_text().splitlines()] == ["resume False", "resume True,"]


@pytest.mark.slow
@pytest.mark.skipif(claims.fcntl is None, reason="needs SIGTERM")
def test_the_command_is_stopped_and_given_again(place, tmp_path, monkeypatch):
    for name in ("claims.py", "common.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    command = [sys.executable, str(tmp_path / "claims.py"), "toy", "--data", str(tmp_path / "sets"), "--out", str(tmp_path / "out"), "--quick"]
    process = subprocess.Popen(command, env={**os.environ, "SLOW": "1"}, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out" / "toy-quick"
    while not (folder / "discs-good-0" / "config.json").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and f"stopped; the same command goes on from the last checkpoints in {folder}" in told
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1 and "error: data.read" in again.stderr         # the runs ended; the data set is none that can be read
    assert len(list(folder.glob("discs-*-0/results.json"))) == 3 and (folder / "bench-cost" / "results.json").exists()


def test_other_arguments_than_before_are_refused(place, tmp_path):
    place.prepare("--full", "--seeds", "0")
    table = tmp_path / "claims_toy.py"
    table.write_text(TABLE.replace('"--steps", "8"', '"--steps", "10"'))
    sys.modules.pop("claims_toy")
    os.utime(table, (1, 1))                                         # another time than the compiled file knows
    with pytest.raises(ValueError, match=r"discs-good-0 must hold a run of .*--steps 10 .*got one of .*--steps 8 "):
        place("--full", "--report")
    (place.folder / "discs-good-0.json").unlink()
    with pytest.raises(ValueError, match="discs-good-0 must be a run of this program, got a folder without discs-good-0.json"):
        place("--full")
    assert (place.folder / "discs-good-0" / "results.json").exists()


def test_results_that_do_not_fit_are_refused(place):
    place.prepare("--full", "--seeds", "0", "1")
    path = place.folder / "discs-good-1" / "results.json"
    right = json.loads(path.read_text())
    for change, message in (({"mean AP50": 0.5}, "detections.json must give the mean AP50 in results.json, 0.5, got 0"),
                            ({"mean AP50": None}, "must hold a number at mean AP50, got None"),
                            ({"set": "test"}, r"must be an evaluation of \['val', \['disc'\]\], as the other runs on discs, got \['test'"),
                            ({"curve": []}, "must hold a value at curve.-1.all_loss, got none at -1"),
                            ({"also": {}}, "must hold a value at also.voting.mean AP50, got none at voting")):
        path.write_text(json.dumps({**right, **change}))
        with pytest.raises(ValueError, match=message):
            place("--full", "--report", "--seeds", "0", "1")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"discs-good-1.results.json must hold set, AP50, mean AP50, got no set, AP50"):
        place("--full", "--report", "--seeds", "0", "1")


@pytest.mark.parametrize("change, message", [
    (('better="good"', 'better="goof"'), "an arm on discs must be one of good, Bad, N=1, same, got 'goof'"),
    (('worse="Bad, N=1"', 'worse="good"'), "better, worse and than .none or two. must be different arms"),
    (('data="cost"', 'data="price"'), "data must be one of discs, cost, got 'price'"),
    (('ON = {"discs"', 'ON = {"disks"'), "claims_toy: ON must be one of discs, got 'disks'"),
    (("list(ARMS)", '["worst"]'), "ON.'discs'. must be one of good, Bad, N=1, same, got 'worst'"),
    (('"same": [', '"Good": [], "same": ['), "names of arms must differ in letters and digits, got two of good")])
def test_a_wrong_table_is_told_before_anything_runs(place, tmp_path, change, message):
    (tmp_path / "claims_toy.py").write_text(TABLE.replace(*change))
    with pytest.raises(ValueError, match=message):
        place("--full")
    assert not place.folder.exists()


def test_wrong_options(place, capsys, tmp_path):
    for options, message in ((["--full", "--seeds", "0", "0"], "--seeds must be different"), (["--full", "--jobs", "0"], "--jobs at least 1"),
                             (["--full", "--json", str(tmp_path / "no" / "a.json")], "must exist"), ([], "--quick --full is required")):
        with pytest.raises(SystemExit):
            place(*options)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--only must be one of good, Bad, N=1, same, got 'best'"):
        place("--full", "--only", "best")
    with pytest.raises(FileNotFoundError, match="--report needs runs"):
        place("--full", "--report")
    with pytest.raises(FileNotFoundError, match="--data must hold the data sets discs, got no folder"):
        claims.main(claims.arguments(["toy", "--data", str(tmp_path), "--full"]))


OLD_TABLE = """\
| claim | paper | data | ours | against | paired differences | 95 % interval | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- |
| good is better | 2 against 1 | discs | good: 91.7 ± 0.0 | Bad, N=1: 30.6 ± 2.4 | +58.3 +62.5 +62.5 | +52.5 .. +71.5 | holds |
| bad is better | - | discs | Bad, N=1: 30.6 ± 2.4 | good: 91.7 ± 0.0 | -58.3 -62.5 -62.5 | -71.5 .. -52.5 | does not hold |
| they differ | - | discs | good: 91.7 ± 0.0 | same: 91.7 ± 0.0 | +0.0 +0.0 +0.0 | +0.0 .. +0.0 | not resolved |
| good gains more | - | discs | good: 91.7 ± 0.0 − Bad, N=1: 30.6 ± 2.4 | good@voting: 100.0 ± 0.0 − same: 91.7 ± 0.0 | +50.0 +54.2 +54.2 | +35.1 .. +68.4 | holds |
| lower loss | - | discs | good: -0.775 ± 0 | Bad, N=1: -0.175 ± 0 | -0.6 -0.6 -0.6 | -0.6 .. -0.6 (t) | holds |
| costs less | - | cost | rows.0.ms: - | rows.1.ms: - | - | - | not measured |

AP50 in points. Intervals: bootstrap over images and seeds, or over the turns of a benchmark; (t): Student's, of the seeds alone.

Mean AP50 at the last two points of the curve on the evaluation set, mean of the seeds:

| data | arm | seeds | steps | last but one | last |
| --- | --- | --- | --- | --- | --- |
| discs | good | 3 | 8 | 45.8 | 91.7 |
| discs | Bad, N=1 | 3 | 8 | 15.3 | 30.6 |
| discs | same | 3 | 8 | 45.8 | 91.7 |

Commands, S in 0 1 2:

    python examples/toy.py --data FOLDER/discs --steps 8 --gain 0.9 --backend numba --seed S
    python examples/toy.py --data FOLDER/discs --steps 8 --gain 0.3 --backend numba --seed S
    python examples/toy.py --data FOLDER/discs --steps 8 --gain 0.9 --backend numba --seed S
"""


def test_the_table_of_detectors_to_the_letter(place, capsys):
    """What it was before arms had programs of their own and metrics of images: tables in README are compared with new ones."""
    place.prepare("--full")
    capsys.readouterr()
    place("--full", "--report")
    told = capsys.readouterr().out.partition("\nruns missing")[0]
    assert re.sub(r"± [\d.]+e-17", "± 0", told) == OLD_TABLE           # a spread of roundings


# Arms with programs of their own, weights of other runs, errors of images

@pytest.fixture
def errors(place, tmp_path):
    (tmp_path / "claims_toy.py").write_text(ERRORS_TABLE)
    return place


def test_programs_and_weights_of_other_runs(errors):
    """The run that is needed comes first, of the same seed; what is shown names no folder of this machine, what is started does."""
    def jobs(*options):
        args = errors.arguments(*options)
        return claims.jobs_of(args, claims.read_table("toy")[0])[0], args.folder

    runs, folder = jobs("--full", "--seeds", "3", "4")
    assert [(arm, seed) for _, arm, seed in runs] == [(arm, seed) for seed in (3, 4) for arm in ("few", "after", "boxes")]
    job = runs["discs", "after", 4]
    assert " ".join(job.shown) == "errors.py --data FOLDER/discs --every 2 --weights RUNS/discs-few-4/weights.npz --backend numba --seed 4"
    assert job.command[1] == str(claims.HERE / "errors.py")
    assert job.command[job.command.index("--weights") + 1] == str(folder / "discs-few-4" / "weights.npz")
    assert job.needs == (runs["discs", "few", 4],) and runs["discs", "few", 4].needs == ()
    assert runs["discs", "boxes", 4].shown[0] == "toy.py" and runs["discs", "boxes", 4].command[1] == str(claims.HERE / "toy.py")
    runs, _ = jobs("--quick")
    assert "--every 2 --weights RUNS/discs-few-0/weights.npz --every 5 --backend" in " ".join(runs["discs", "after", 0].shown)
    assert runs["discs", "boxes", 0].shown[-6:-4] == ["--steps", "4"] and "--every" not in runs["discs", "boxes", 0].shown


def test_a_set_that_comes_with_the_package_needs_no_folder(errors, tmp_path):
    """Its programs get no --data, and the command shown has none."""
    table = ERRORS_TABLE.replace('"discs"', '"own"').replace("@discs", "@own") + 'EMBEDDED = ("own",)\nON["own"].remove("boxes")\n'
    (tmp_path / "claims_toy.py").write_text(table)
    assert not (tmp_path / "sets" / "own").exists()
    found = errors("--quick")
    command = found["arms"]["own"]["few"]["command"]
    assert "--data" not in command and "errors.py" in command


def test_a_list_of_quick_options_is_for_all_programs(errors, tmp_path):
    by_program = '{"toy.py": ["--steps", "4"], "errors.py": ["--every", "5"]}'
    assert by_program in ERRORS_TABLE
    (tmp_path / "claims_toy.py").write_text(ERRORS_TABLE.replace(by_program, '["--steps", "1"]'))
    runs, _ = claims.jobs_of(errors.arguments("--quick"), claims.read_table("toy")[0])
    assert all(job.shown[-6:-4] == ["--steps", "1"] for job in runs.values())


class Program:
    """Stands in for claims.start: a program that ends after `turns` looks, with its results and then `status`."""

    def __init__(self, job, turns, events, status=0):
        self.job, self.turns, self.events, self.returncode, self.status = job, turns, events, None, status
        events.append(f"+{job.name}")
        job.folder.mkdir()
        job.log.touch()

    def poll(self):
        self.turns -= 1
        if self.turns == 1:                                         # the results are there, the program still runs
            self.job.result.write_text("{}")
        if self.turns <= 0:
            self.returncode = self.status
            self.events.append(f"-{self.job.name}")
        return self.returncode

    def wait(self, _=None):
        pass
    terminate = wait


@pytest.mark.parametrize("jobs, status, expected", [
    (2, 0, "+first +other -other +last -first +second -last -second +third -third"),    # what is not held up goes ahead
    (1, 0, "+first -first +second -second +third -third +other -other +last -last"),    # the order of the list, where nothing holds up
    (3, 0, "+first +other +last -other -last -first +second -second +third -third"),
    (2, 1, "+first +other -other +last -first -last")])             # its results are there, but it failed: no second
def test_a_run_waits_for_the_weights_it_needs(tmp_path, monkeypatch, jobs, status, expected):
    def job(name, *needs):
        return claims.Job(name, [], [], tmp_path, needs)

    class Bar:
        set_postfix_str = update = staticmethod(lambda *_: None)

    first, other, last = map(job, ("first", "other", "last"))
    second = job("second", first)
    third = job("third", second, first)
    events, turns = [], {"first": 6, "other": 3, "last": 4, "second": 2, "third": 2}
    monkeypatch.setattr(claims, "start", lambda job, _: Program(job, turns[job.name], events, status * (job is first)))
    monkeypatch.setattr(claims.time, "sleep", lambda _: None)
    with pytest.raises(RuntimeError, match="first.log") if status else contextlib.nullcontext():
        claims.run([first, second, third, other, last] if jobs == 1 else [third, second, first, other, last], jobs, Bar)
    assert " ".join(events) == expected


def test_only_what_can_run_is_started(errors, monkeypatch):
    """Weights of a run that is neither done nor to be run, or of other arguments; then for real, with two programs at a time."""
    started = claims.start
    monkeypatch.setattr(claims, "start", None)
    message = "discs-few-0, whose weights discs-after-0 takes, must be done or among the runs to start, got neither: name its arm in --only, too"
    with pytest.raises(ValueError, match=message):
        errors("--full", "--seeds", "0", "--only", "boxes", "after")
    monkeypatch.setattr(claims, "start", started)
    found = errors("--full", "--seeds", "0", "--only", "after", "few")
    assert found["missing"] == ["discs-boxes-0"]
    assert json.loads((errors.folder / "discs-after-0" / "results.json").read_text())["weights of"] == "3 0"
    monkeypatch.setattr(claims, "start", None)
    shutil.rmtree(errors.folder / "discs-after-0")
    (errors.folder / "discs-after-0.json").unlink()
    with pytest.raises(TypeError, match="NoneType"):                # few is done: after would start
        errors("--full", "--seeds", "0", "--only", "after")
    (errors.folder / "discs-few-0.json").write_text('{"arguments": ["errors.py", "--every", "4"]}')
    with pytest.raises(ValueError, match="discs-few-0 must hold a run of the arguments .* got one of `errors.py --every 4`"):
        errors("--full", "--seeds", "0", "--only", "after")


@pytest.mark.parametrize("change, message", [
    (("@discs/few", "@discs/fewer"), "claims_toy: 'after': the arm in '@discs/fewer' must be one of after, few, boxes, got 'fewer'"),
    (("@discs/few", "@few"), "claims_toy: 'after': the data set in '@few' must be one of discs, got 'few'"),
    (("@discs/few", "@discs/after"), "must not need each other's weights in a circle, got discs/after -> discs/after"),
    (('"--every", "3"]', '"--every", "3", "--weights", "@discs/after"]'), "circle, got discs/(after -> discs/few -> discs/after"
                                                                          "|few -> discs/after -> discs/few)$"),
    (('"errors.py": ["--every", "5"]', ''), "claims_toy: QUICK: the program of 'after' must be one of toy.py, got 'errors.py'")])
def test_a_wrong_need_is_told_before_anything_runs(errors, tmp_path, change, message):
    assert change[0] in ERRORS_TABLE
    (tmp_path / "claims_toy.py").write_text(ERRORS_TABLE.replace(*change))
    with pytest.raises(ValueError, match=message):
        errors("--full")
    assert not errors.folder.exists()


def wrong(every, seed):
    """What the program ERRORS says of twelve images."""
    return np.array([(7 * i + seed) % 12 % every == 0 for i in range(12)], float)


def place_wrong(every, seed):
    return np.where(np.arange(12) % (every + 2), np.nan, wrong(every, seed))


def share(w):
    counts = ~np.isnan(w)
    return w[counts].sum() / counts.sum() if counts.any() else np.nan


def test_errors_of_images_are_bootstrapped(errors, capsys):
    errors.prepare("--full")
    found = errors("--full", "--report")
    few, after, all_ = ([wrong(every, s) for s in range(3)] for every in (3, 2, 4))
    places = [[place_wrong(every, s) for s in range(3)] for every in (3, 2)]
    rng = np.random.default_rng(0)
    draws = [rng.integers(12, size=12) for _ in range(claims.RESAMPLES)]            # the same images for all runs
    empty = 0
    for c, (ours, theirs) in zip(found["claims"], ((few, after), places, (all_, few))):
        assert_allclose(c["differences"], [share(a) - share(b) for a, b in zip(ours, theirs)])
        columns = np.array([[share(a[d]) - share(b[d]) for d in draws] for a, b in zip(ours, theirs)])
        empty += np.isnan(columns).sum()
        assert_allclose(c["interval"], claims.interval(columns, np.random.default_rng(1)), err_msg=c["text"])
        assert c["method"] == "images and seeds"
    assert empty, "no set of images without one that counts was drawn"
    assert found["claims"][3]["method"] == "t"

    arms = found["arms"]["discs"]
    assert arms["few"]["figures"] == {"top1_error": [share(w) for w in few], "place_error": [share(w) for w in places[0]], "parameters": [7] * 3}
    assert arms["few"]["also"] == {"all": {"top1_error": [share(w) for w in all_]}} and "mean AP50" not in arms["few"]
    assert arms["few"]["last two of"] == "top1_error"                               # CURVES has another before it
    assert_allclose(arms["few"]["last two"], [1 / 6, 1 / 12])
    assert arms["boxes"].keys() == {"command", "seeds", "mean AP50", "also", "seconds", "curve", "last two"}

    out = capsys.readouterr().out.splitlines()
    row = next(line for line in out if line.startswith("| fewer errors"))
    assert "| few: 33.3 ± 0.0 | after: 50.0 ± 0.0 | -16.7 -16.7 -16.7 |" in row and "(" not in row
    assert any(line.startswith("AP50 and errors in points. ") for line in out)
    assert "Mean AP50, or the figure beside the arm, at the last two points of the curve on the evaluation set, mean of the seeds:" in out
    assert "| discs | few (top1_error) | 3 | 4 | 16.7 | 8.3 |" in out
    ap = np.mean([errors.aps[f"0.9 {s}"] for s in range(3)])
    assert f"| discs | boxes | 3 | 8 | {50 * ap:.1f} | {100 * ap:.1f} |" in out
    assert "Commands, S in 0 1 2; RUNS holds the runs, <data set>-<arm>-S:" in out
    assert "    python examples/errors.py --data FOLDER/discs --every 2 --weights RUNS/discs-few-S/weights.npz --backend numba --seed S" in out


def test_errors_without_lists_and_without_curves(errors, capsys):
    """Where one run has no list the interval is of the seeds; errors are points all the same."""
    errors.prepare("--full")
    (errors.folder / "discs-few-1" / "wrong.json").write_text('{"place_error": [1, 0, 0]}')
    for seed in range(3):
        path = errors.folder / f"discs-few-{seed}" / "results.json"
        path.write_text(json.dumps({"set": "val", "top1_error": [0.25, 0.5, 0.25][seed], "place_error": 1 / 3, "also": {"all": {"top1_error": 0.1}},
                                    "curve": [{"step": 4, "loss": 1}]}))
        for name in ("wrong.json", "wrong_all.json")[seed == 1:]:
            (path.parent / name).unlink()
    for seed in range(3):                                           # lists that differ in length have no claim together, but a data set
        (errors.folder / f"discs-after-{seed}" / "wrong.json").unlink()
    found = errors("--full", "--report")
    assert [c["method"] for c in found["claims"]] == ["t"] * 4
    assert_allclose(found["claims"][0]["interval"], claims.t_interval(np.array([-0.25, 0, -0.25])))
    assert found["arms"]["discs"]["few"]["last two of"] is None
    out = capsys.readouterr().out
    assert "| few: 33.3 ± 14.4 | after: 50.0 ± 0.0 | -25.0 +0.0 -25.0 |" in out and "| discs | few | 3 | 4 | - | - |" in out


def test_errors_that_do_not_fit_are_refused(errors):
    errors.prepare("--full", "--seeds", "0", "1")
    folder = errors.folder / "discs-after-1"
    right = {name: json.loads((folder / name).read_text()) for name in ("wrong.json", "results.json")}
    half = right["wrong.json"]["top1_error"]
    for name, change, message in (
            ("wrong.json", {"top1_error": [1] + [0] * 11}, r"discs-after-1.wrong.json must give the top1_error in results.json, 0.5, got 0.083"),
            ("wrong.json", {"top1_error": [None] * 12}, r"discs-after-1.wrong.json must give the top1_error in results.json, 0.5, got nan"),
            ("wrong.json", {"top1_error": half * 2}, "top1_error of after in .*discs-after-1 must tell of 12 images of val, as the other runs on "
                                                     "discs, got 24 images of val"),
            ("wrong.json", {"top1_error": [*half[:11], 0.5]}, "discs-after-1.wrong.json must hold a list of 0, 1 and null at top1_error, got 0.5"),
            ("wrong.json", {"top1_error": 0.5}, "must hold a list of 0, 1 and null at top1_error, got 0.5"),
            ("results.json", {"set": "test"}, "must tell of 12 images of val, as the other runs on discs, got 12 images of test"),
            ("results.json", {"top1_error": None}, "discs-after-1.results.json must hold a number at top1_error, got None")):
        (folder / name).write_text(json.dumps({**right[name], **change}))
        with pytest.raises(ValueError, match=message):
            errors("--full", "--report", "--seeds", "0", "1")
        (folder / name).write_text(json.dumps(right[name]))
    (folder / "results.json").write_text("{}")
    (folder / "wrong.json").unlink()
    with pytest.raises(ValueError, match="discs-after-1.results.json must hold a value at top1_error|must hold set, got no set"):
        errors("--full", "--report", "--seeds", "0", "1")


# AP of images

@pytest.fixture
def ranks(place, tmp_path):
    (tmp_path / "claims_toy.py").write_text(RANKS_TABLE)
    return place


def ranked_of(folder, metric, variant=""):
    """scores, hits and labels (12, 3) as a run has kept them."""
    classes = json.loads((folder / f"ranking{variant}.json").read_text())[metric].values()
    scores, hits, positive = (np.array([c[key] for c in classes], float).T for key in ("scores", "hits", "positive"))
    return scores, hits == 1, np.where(np.isnan(hits), -1, positive).astype(int)


def ap_of(scores, hits, labels, images):
    return evaluate.mean_ap(evaluate_classification.location_ap(scores[images], hits[images], labels[images], "abc"))


def test_aps_of_images_are_bootstrapped(ranks, capsys):
    """Against the APs of sets that hold the copies: images are drawn, the same for all runs, and seeds."""
    ranks.prepare("--full")
    capsys.readouterr()
    found = ranks("--full", "--report")
    rng = np.random.default_rng(0)
    draws = [np.sort(rng.integers(12, size=12)) for _ in range(claims.RESAMPLES)]
    for c, (metric, ours, theirs) in zip(found["claims"], (("class_ap", "good", "bad"), ("location_ap", "good", "bad"), ("location_ap", "good", "good"))):
        pairs = [(ranked_of(ranks.folder / f"discs-{ours}-{s}", metric, "_six" * (c["text"] == "six")), ranked_of(ranks.folder / f"discs-{theirs}-{s}", metric))
                 for s in range(3)]
        assert_allclose(c["differences"], [ap_of(*a, range(12)) - ap_of(*b, range(12)) for a, b in pairs], atol=1e-12)
        columns = np.array([[ap_of(*a, d) - ap_of(*b, d) for d in draws] for a, b in pairs])
        assert_allclose(c["interval"], claims.interval(columns, np.random.default_rng(1)), err_msg=c["text"], atol=1e-12)
        assert c["method"] == "images and seeds" and np.nanstd(columns) > 0.05 and np.isnan(columns).any()      # a set without positives was drawn
    assert found["claims"][3]["method"] == "t" and found["claims"][0]["verdict"] == "holds"

    good = [json.loads((ranks.folder / f"discs-good-{s}" / "results.json").read_text()) for s in range(3)]
    summary = found["arms"]["discs"]["good"]
    assert summary["figures"]["location_ap"] == [r["location_ap"] for r in good] and summary["last two of"] == "class_ap"
    assert summary["also"]["six"]["class_ap"] == [r["also"]["six"]["class_ap"] for r in good]
    out = capsys.readouterr().out.splitlines()
    values = [100 * r["class_ap"] for r in good]
    row = next(line for line in out if line.startswith("| classes"))
    assert f"| good: {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} |" in row and "(" not in row
    assert any(line.startswith("APs in points. Intervals") for line in out)
    assert f"| discs | good (class_ap) | 3 | 2 | {np.mean(values) / 2:.1f} | {np.mean(values):.1f} |" in out


def test_a_table_of_arms(ranks, tmp_path):
    """Mean and spread of the arms that ROWS names, by the seeds that are done, in points."""
    path = tmp_path / "claims_toy.py"
    path.write_text(path.read_text() + 'ROWS = {"columns": {"images": "class_ap"}, "rows": [("A", "7.0", "discs", "good"), ("B", "-", "discs", "good@six")]}\n')
    ranks.prepare("--full")
    found = ranks("--full", "--report", "--seeds", "0", "2")
    told = "\n".join(claims.markdown(found))
    assert "| row | paper | data | arm | images |" in told
    for row, of in zip(found["rows"]["rows"], (lambda r: r, lambda r: r["also"]["six"])):
        values = [of(json.loads((ranks.folder / f"discs-good-{s}" / "results.json").read_text()))["class_ap"] for s in (0, 2)]
        assert row["values"]["class_ap"] == values and (row["name"] == "B" or values[0] != values[1])
        assert f"| {row['name']} | {row['paper']} | discs | {row['arm']} | {100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} |" in told


def test_aps_without_a_ranking_have_the_interval_of_the_seeds(ranks):
    ranks.prepare("--full")
    (ranks.folder / "discs-bad-2" / "ranking.json").unlink()
    path = ranks.folder / "discs-good-0" / "ranking_six.json"
    path.write_text(json.dumps({"class_ap": json.loads(path.read_text())["class_ap"]}))
    assert [c["method"] for c in ranks("--full", "--report")["claims"]] == ["t"] * 4


@pytest.mark.parametrize("change, message", [
    (lambda c: c["cat"]["scores"].pop(), "bad-1.ranking.json must hold lists of scores, hits and positive of each class at class_ap, an entry an image$"),
    (lambda c: c["dog"].pop("hits"), "ranking.json must hold lists of scores, hits and positive of each class"),
    (lambda c: c.update(dog=0.5), "ranking.json must hold lists of scores, hits and positive of each class"),
    (lambda c: c.clear(), "ranking.json must hold lists of scores, hits and positive of each class"),
    (lambda c: c["dog"]["hits"].__setitem__(0, 1), r"positive 1 1, 0 1, 0 0 or null 0, at class_ap, got \[2.0, 1.0, 0.0\] for image 0 and 'dog'"),
    (lambda c: c["dog"]["hits"].__setitem__(1, None), r"at class_ap, got \[.*, nan, 1.0\] for image 1 and 'dog'"),
    (lambda c: c["cat"]["positive"].__setitem__(3, 0.5), r"at class_ap, got \[.*, 0.0, 0.5\] for image 3 and 'cat'"),
    (lambda c: c["emu"]["scores"].__setitem__(11, float("inf")), r"must hold a finite score.* at class_ap, got \[inf, 0.0, 0.0\] for image 11 and 'emu'"),
    (lambda c: c["cat"]["hits"].__setitem__(2, 0), r"bad-1.ranking.json must give the class_ap in results.json, 0\.\d+, got 0\.\d+$"),
    (lambda c: c.update(fox=c.pop("emu")), "class_ap of bad in .*discs-bad-1 must have the classes and positives of the other runs on discs"),
    (lambda c: [v.append(0) for lists in c.values() for v in lists.values()], "must tell of 12 images of val, as the other runs on discs, got 13 images of val")])
def test_rankings_that_do_not_fit_are_refused(ranks, change, message):
    ranks.prepare("--full", "--seeds", "1")
    path = ranks.folder / "discs-bad-1" / "ranking.json"
    told = json.loads(path.read_text())
    change(told["class_ap"])
    path.write_text(json.dumps(told))
    if "12 images" in message:                                      # the thirteenth must come last, or the AP changes
        for lists in told["class_ap"].values():
            lists["scores"][-1] = -1
        path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        ranks("--full", "--report", "--seeds", "1")


def test_a_ranking_is_kept_as_it_is_read(tmp_path):
    """By hand: hits in images without the class are none, what is left out is null; the mean leaves out the class without positives."""
    scores = np.array([[0.1, 2], [np.float32(0.3), 1], [0.2, 0]], np.float32)
    arrays = scores, np.ones((3, 2), bool), np.array([[1, 0], [0, -1], [-1, 0]])
    told = claims.common.keep_ranking(SimpleNamespace(folder=tmp_path), "a", {"place_ap": arrays}, ("cat", "dog"))
    assert told == {"place_ap": 0.5}
    assert json.loads((tmp_path / "ranking_a.json").read_text()) == {"place_ap": {
        "cat": {"scores": scores[:, 0].tolist(), "hits": [1, 0, None], "positive": [1, 0, 0]},
        "dog": {"scores": [2, 1, 0], "hits": [0, None, 0], "positive": [0, 0, 0]}}}
    claims.common.keep_ranking(SimpleNamespace(folder=tmp_path), "", {"place_ap": arrays}, ("cat", "dog"))
    assert (tmp_path / "ranking.json").read_text() == (tmp_path / "ranking_a.json").read_text()


def test_aps_and_errors_in_points():
    """What a metric's name says of it; the curve of AP-loss's batches is no figure of a claim, and a detector's table does not tell of it."""
    assert [claims.unit(metric) for metric in ("AP50", "curve.-1.train AP50", "class_ap", "top1_error")] == [(100, ".1f")] * 4
    assert [claims.unit(metric) for metric in ("all_loss", "apple", "ap")] == [(1, ".4g")] * 3

    def line(*metrics):
        found = {"claims": [{"text": "", "paper": "", "data": "discs", "better": "a", "worse": "b", "than": (), "metric": metric, "times": 1, "values": {},
                             "differences": [], "interval": None, "method": None, "verdict": ""} for metric in metrics], "seeds": [0],
                 "arms": {"discs": {"a": {"seeds": [0], "curve": [{"step": 1, "mean AP50": 0.5, "ranking_ap": 0.5}], "last two": [0.5], "command": ""}}},
                 "benchmarks": {}}
        return next(words.partition(" in points")[0] for words in claims.markdown(found) if " in points" in words)
    assert [line(*m) for m in (["AP50"], ["AP50", "x_error"], ["AP50", "x_ap"], ["x_ap", "x_error"])] == [
        "AP50", "AP50 and errors", "APs", "APs and errors"]


def test_a_claim_on_ap_needs_a_detector(errors, tmp_path):
    errors.prepare("--full", "--seeds", "0")
    (tmp_path / "claims_toy.py").write_text(ERRORS_TABLE.replace('metric="top1_error", **FEWER)', "**FEWER)", 1))
    sys.modules.pop("claims_toy")
    os.utime(tmp_path / "claims_toy.py", (1, 1))
    with pytest.raises(ValueError, match="discs-few-0.results.json must hold set, AP50, mean AP50, got no AP50"):
        errors("--full", "--report", "--seeds", "0")


@pytest.mark.parametrize("paper", [p.stem.removeprefix("claims_") for p in EXAMPLES.glob("claims_*.py")])
def test_the_tables_of_the_papers(paper):
    table, listed = claims.read_table(paper)
    args = claims.arguments([paper, "--data", "x", "--full"])
    runs, benches = claims.jobs_of(args, table)
    assert len(runs) == 3 * sum(map(len, table.ON.values())) and len({job.name for job in runs.values()}) == len(runs)
    assert [job.name[-1] for job in runs.values()] == sorted(job.name[-1] for job in runs.values())         # seed by seed
    assert len({c.text + c.data for c in listed}) == len(listed) and all("|" not in c.text + c.paper for c in listed)
    for arm in table.ARMS:
        weights = any(need.name.startswith(f"{name}-{claims.slug(arm)}-") for job in runs.values() for need in job.needs for name in table.ON)
        assert weights or any(arm in [a.partition("@")[0] for a in c.signs] for c in listed), f"no claim needs {arm}"


# Statistics

def detections_of(examples, K, rng, levels):
    """Noisy detections, scores from few levels, so that images tie; those of one class in one image differ."""
    found = []
    for e in examples:
        near = e.boxes[rng.integers(len(e.boxes), size=8)] + rng.normal(0, 4, (8, 4))
        boxes = np.concatenate([near, rng.random((4, 2)).repeat(2, 0).reshape(4, 4) * 60 + (0, 0, 20, 20)])
        found.append((boxes, rng.integers(0, K, len(boxes)), rng.permutation(levels)[:len(boxes)] / levels))
    return found


def test_weighted_ap_is_that_of_a_set_with_copies():
    examples, K = scenes.scenes(12, 3), len(scenes.CLASSES)
    rng = np.random.default_rng(0)
    examples[2].difficult[:] = True
    found = detections_of(examples, K, rng, 14)
    ranked = claims.rankings(found, examples, scenes.CLASSES)
    right = evaluate.voc(found, examples, scenes.CLASSES)
    ones = np.ones(12, np.int64)
    assert [r.ap(ones) for r in ranked] == [right[name].ap for name in scenes.CLASSES]            # to the last bit
    assert claims.mean_ap(ranked, ones) == evaluate.mean_ap(right) and 0.1 < evaluate.mean_ap(right) < 0.9
    for _ in range(20):
        weights = np.bincount(rng.integers(12, size=12), minlength=12)
        copies = np.repeat(np.arange(12), weights)
        right = evaluate.voc([found[i] for i in copies], [examples[i] for i in copies], scenes.CLASSES)
        assert_allclose([r.ap(weights) for r in ranked], [right[name].ap for name in scenes.CLASSES], rtol=1e-12)
        assert_allclose(claims.mean_ap(ranked, weights), evaluate.mean_ap(right), rtol=1e-12)


def test_ties_within_an_image_and_nothing_found():
    """Unweighted, ties of any kind keep the bits; no detection is AP 0; no object is NaN."""
    examples, K = scenes.scenes(9, 5), len(scenes.CLASSES)
    found = [(b, k, np.round(s * 3) / 3) for b, k, s in detections_of(examples, K, np.random.default_rng(1), 14)]
    found[4] = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    ones, right = np.ones(9, np.int64), evaluate.voc(found, examples, scenes.CLASSES)
    assert [r.ap(ones) for r in claims.rankings(found, examples, scenes.CLASSES)] == [right[name].ap for name in scenes.CLASSES]
    nothing = [found[4]] * 9
    ranked = claims.rankings(nothing, examples, scenes.CLASSES)
    assert claims.mean_ap(ranked, ones) == 0 and np.isnan(claims.mean_ap(ranked, 0 * ones))


def test_weighted_ap_by_hand():
    """One object found at rank 1 (image 0), a false positive (image 1), an object found at rank 3 (image 1).

    Weights (1, 2): recall 1/3 at precision 1, then 2 wrong, then 2 found: 3/5 at recall 1. AP = 1/3 + 2/3 * 3/5.
    """
    r = claims.Ranking(np.array([0, 1]), np.array([1]), np.array([0, 1]), np.array([1, 1]))
    assert r.ap(np.array([1, 2])) == pytest.approx(1 / 3 + 2 / 3 * 3 / 5)
    assert r.ap(np.array([1, 0])) == 1 and r.ap(np.array([0, 1])) == 0.5


def test_the_interval_is_hierarchical():
    """Equal columns: three seeds alone, least to largest. Equal rows: the images' percentiles alone, whatever the seeds."""
    rng = np.random.default_rng(0)
    assert_allclose(claims.interval(np.repeat([[0.1], [0.2], [0.4]], 2000, 1), rng), [0.1, 0.4])
    columns = np.random.default_rng(1).normal(0.3, 1, 2000)
    assert_allclose(claims.interval(np.repeat(columns[None], 3, 0), rng), np.percentile(columns, [2.5, 97.5]))
    both = columns + np.array([[-4.0], [0], [4]])
    low, high = claims.interval(both, rng)
    assert low < -3 and high > 4                                    # wider than either
    assert claims.interval(np.full((3, 10), np.nan), rng) is None


def test_t_interval_by_hand():
    low, high = claims.t_interval(np.array([0.1, 0.2, 0.3]))
    assert (low + high) / 2 == pytest.approx(0.2) and (high - low) / 2 == pytest.approx(4.302652729911275 * 0.1 / 3 ** 0.5)
    assert claims.t_interval(np.array([0.1])) is None


def test_claims_on_a_benchmark(place):
    """Twice a number, over turns; and a single number, which needs no spread."""
    args = place.arguments("--full")
    bench = claims.Job("bench-cost", ["bench.py"], [], args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    bench.folder.mkdir()
    claims.files.write(bench.record, json.dumps({"arguments": bench.shown}))
    claims.files.write(bench.result, json.dumps({"turns": {"a": [3, 4, 5], "b": [2, 2, 2]}, "MB": {"a": 5, "b": 4}}))

    def judged(**more):
        return claims.judge(claims.Claim("x", "-", "cost", **more), args, {}, set(), {"cost": bench}, {})
    found = judged(better="turns.a", worse="turns.b", times=1.4, lower=True)
    np.testing.assert_allclose(found["differences"], [0.2, 1.2, 2.2])
    assert found["verdict"] == "does not hold" and found["method"] == "turns"
    assert judged(better="turns.a", worse="turns.b", times=3, lower=True)["verdict"] == "holds"
    found = judged(better="MB.a", worse="MB.b", times=1.3, lower=True)
    assert found["verdict"] == "holds" and found["method"] == "one measurement" and found["interval"] is None
    assert judged(better="MB.a", worse="MB.b", times=1.2, lower=True)["verdict"] == "does not hold"


@pytest.mark.parametrize("interval, pairs, lower, quick, expected", [
    ([0.1, 0.2], 3, False, False, "holds"), ([-0.2, -0.1], 3, False, False, "does not hold"), ([-0.1, 0.2], 3, False, False, "not resolved"),
    ([0.1, 0.2], 3, True, False, "does not hold"), ([-0.2, -0.1], 3, True, False, "holds"), ([0.0, 0.2], 3, False, False, "not resolved"),
    ([0.1, 0.2], 2, False, False, "not resolved"), (None, 3, False, False, "not resolved"), ([0.1, 0.2], 3, False, True, "quick run, no verdict")])
def test_verdict(interval, pairs, lower, quick, expected):
    assert claims.verdict(interval, pairs, lower, quick) == expected


def test_the_evaluation_set_is_that_of_the_run(tmp_path, monkeypatch):
    """A split of its own, or a fifth of the training set that the run's settings name."""
    job = claims.Job("a", [], [], tmp_path)
    job.folder.mkdir()
    (job.folder / "config.json").write_text('{"train_set": "trainval"}')
    everything = scenes.scenes(10, 2)
    monkeypatch.setattr(data, "read", lambda folder, split, classes=None: (everything[:8] if split == "trainval" else everything[8:], ("a", "b")))
    for split, splits, expected in (("test", ["test", "trainval"], everything[8:]), ("val", ["trainval"], data.hold_out(everything[:8], 0.2)[1]),
                                    ("val", ["trainval", "val"], everything[8:])):
        monkeypatch.setattr(data, "splits", lambda folder: splits)
        job.result.write_text(json.dumps({"set": split, "AP50": {"a": 0, "b": 0}, "mean AP50": 0}))
        found, classes = claims.evaluation_set(tmp_path, job)
        assert [e.name for e in found] == [e.name for e in expected] and classes == ["a", "b"]
