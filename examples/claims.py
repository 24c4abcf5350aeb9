"""Measure what a paper claims: run the arms of a small table of settings, compare them, print the table of README.

    python examples/claims.py ohem --data FOLDER --quick            # a smoke run: few steps, one seed, no verdicts
    python examples/claims.py ohem --data FOLDER --full             # three seeds; in the background: hours
    python examples/claims.py ohem --data FOLDER --full --report    # no runs: the tables of what is there

FOLDER holds the data sets by name. An arm is a command line of an example program; claims_<paper>.py beside this file lists them:
PROGRAM   the example program, such as "ohem.py"
DATA      {data set: options that all its arms share}
ARMS      {arm: its options, or {data set: its options there}}; they come after those of the data set, and win; a first word in ".py" is a
          program to run for PROGRAM
ON        {data set: the arms that run on it}
ROWS      optional: {"columns": {heading: metric}, "rows": [(name, paper's figures, data set, arm)]}, a table of arms beside that of claims
EMBEDDED  optional: those data sets that come with the package and are no folders: their programs get no --data
CLAIMS    a list of dicts, the fields of Claim below
QUICK     options that --quick appends, or {program: such options}
CURVES    optional {key of a point of "curve": label}, drawn beside AP50's
BENCH     optional {name: [program, options]}, run alone after all others; QUICK_BENCH: options that --quick appends

The program takes --data, --seed, --name, --out, --resume and --backend, keeps its run in <out>/<name> (train.Run), and writes there
detections.json (all detections on the evaluation set, as examples/detect.py gives them) and, last, results.json: "set", "AP50" by
class, "mean AP50", "curve" (a list of {"step", "mean AP50", ...}), "seconds". A second evaluation of the same net lies under
results["also"][variant] and in detections_<variant>.json; claims call it "arm@variant". A program of BENCH takes --json and
--backend. A command that was stopped goes on when it is given again.

An option "@DATA/ARM" stands for weights.npz in the folder of that arm's run on that data set with the same seed, shown as
RUNS/<run>/weights.npz. A run starts when those that it needs are done.

A run without detections has no AP50, but shares of wrong images such as results["top1_error"] and results["also"][variant]["top1_error"];
their names end in "_error". wrong.json and wrong_<variant>.json may hold what each image adds: {"top1_error": [1, 0, null, ...]}, 1 if
it is wrong, null if it does not count; the images are the same in all runs on a data set. Average precision of its images, with a name
in "_ap" such as results["class_ap"], is told by ranking.json and ranking_<variant>.json: {"class_ap": {class: {"scores": [0.9, ...],
"hits": [1, 0, null, ...], "positive": [1, 0, ...]}}}, an entry an image. positive: 1 if the image holds the class; hits: 1 if it does
and is found, 0 if the image is a false positive, null if it does not count for the class. results.json holds the mean over the classes
with positives. Equal scores rank in the order of the images.

Everything goes to <out>/<paper> (--quick: <paper>-quick): <run>/, <run>.json (its arguments), <run>.log, claims.json,
curves_<data set>.png, and <key>_<data set>.png for each of CURVES.
"""
import argparse
import dataclasses
import graphlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np
import timing
import tinydet
from scipy import stats

from tinydet import coco, data, draw, evaluate, files, train

try:
    import fcntl
except ImportError:                                                 # Windows: nothing keeps a run from being started twice
    fcntl = None

HERE = Path(__file__).resolve().parent
RESAMPLES, LEAST_SEEDS = 2000, 3


@dataclasses.dataclass(frozen=True)
class Claim:
    """better - times * worse > 0 (lower: < 0); with than=(a, b): (better - worse) - (a - b) > 0, better gains more on worse than a on b.

    text, paper: what is claimed, and the paper's figures, as the table shows them. better, worse, a, b: "arm" or "arm@variant".
    metric: "AP50", the mean over the classes, or a path into results.json such as "curve.-1.all_loss" or "top1_error". The interval:
    bootstrap over images and seeds for AP50 and for what wrong.json or ranking.json of every run in the claim holds, else Student's t.
    Where data names a benchmark of BENCH in place of a data set, better and worse are paths into its JSON, to a number or to a list,
    one a turn.
    That something has no effect is claimed against something that has one, with `than`.
    """

    text: str
    paper: str
    data: str
    better: str
    worse: str
    than: tuple = ()
    metric: str = "AP50"
    lower: bool = False
    times: float = 1.0

    @property
    def signs(self):
        return dict(zip((self.better, self.worse, *self.than), (1, -self.times, -1, 1)))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a program.

    shown: its arguments, with FOLDER for the place of the data and RUNS for that of the runs; command: what is started; needs: the
    jobs whose weights it takes.
    """

    name: str
    shown: list
    command: list
    out: Path
    needs: tuple = ()

    @property
    def folder(self):
        return self.out / self.name

    @property
    def result(self):
        return self.folder / "results.json"

    @property
    def record(self):
        return self.out / f"{self.name}.json"

    @property
    def log(self):
        return self.out / f"{self.name}.log"


# The table of a paper

def papers():
    return sorted(path.stem.removeprefix("claims_") for path in HERE.glob("claims_*.py"))


def read_table(paper):
    """The module claims_<paper>, its CLAIMS as Claim. Raises ValueError for a name that the table does not explain, and for a circle."""
    table = importlib.import_module(f"claims_{paper}")
    op, bench = f"claims_{paper}", getattr(table, "BENCH", {})
    claims = [Claim(**c) for c in table.CLAIMS]
    for name, arms in table.ON.items():
        known(op, "ON", name, table.DATA)
        for arm in arms:
            known(op, f"ON[{name!r}]", arm, table.ARMS)
    needs = {(name, arm): needed(program_of(table, name, arm, quick=True)[1]) for name, arms in table.ON.items() for arm in arms}
    for (_, arm), words in needs.items():
        for word, (name, other) in words.items():
            known(op, f"{arm!r}: the data set in {word!r}", name, table.ON)
            known(op, f"{arm!r}: the arm in {word!r}", other, table.ON[name])
    try:
        graphlib.TopologicalSorter({key: words.values() for key, words in needs.items()}).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join("/".join(key) for key in error.args[1])
        raise ValueError(f"{op}: arms must not need each other's weights in a circle, got {circle}") from None
    for c in claims:
        known(op, f"{c.text!r}: data", c.data, [*table.ON, *bench])
        if len(c.than) not in (0, 2) or len(c.signs) != 2 + len(c.than):
            raise ValueError(f"{op}: {c.text!r}: better, worse and than (none or two) must be different arms, got {list(c.signs)}")
        for arm in c.signs if c.data in table.ON else ():
            known(op, f"{c.text!r}: an arm on {c.data}", arm.partition("@")[0], table.ON[c.data])
    slugs = [slug(arm) for arm in table.ARMS]
    if twice := next((s for s in slugs if slugs.count(s) > 1), None):
        raise ValueError(f"{op}: names of arms must differ in letters and digits, got two of {twice}")
    return table, claims


def known(op, where, name, names):
    if name not in names:
        raise ValueError(f"{op}: {where} must be one of {', '.join(names)}, got {name!r}")


def slug(arm):
    """The arm's name as part of a file's."""
    return re.sub("[^a-z0-9.]+", "-", arm.lower()).strip("-")


def program_of(table, name, arm, quick):
    """The program of an arm on a data set, and its options."""
    own, more = table.ARMS[arm], getattr(table, "QUICK", [])
    own = own[name] if isinstance(own, dict) else own
    program, own = (own[0], own[1:]) if own and own[0].endswith(".py") else (table.PROGRAM, own)
    if quick and isinstance(more, dict):
        known(table.__name__, f"QUICK: the program of {arm!r}", program, more)
        more = more[program]
    return program, [*table.DATA[name], *own, *(more if quick else [])]


def needed(options):
    """{option: (data set, arm)} of those that stand for the weights of another run."""
    return {word: tuple(word[1:].partition("/")[::2]) for word in options if word.startswith("@")}


def weights_of(run):
    """The weights of a run, as shown."""
    return f"RUNS/{run}/weights.npz"


def jobs_of(args, table):
    """Jobs of the arms by (data set, arm, seed), seed by seed, after those that they need, and those of the benchmarks by name."""
    runs, benches, python = {}, {}, sys.executable
    shared = ["--backend", args.backend]

    def add(name, arm, seed):
        if (name, arm, seed) not in runs:
            program, options = program_of(table, name, arm, args.quick)
            needs = {word: add(*key, seed) for word, key in needed(options).items()}
            run, options = f"{name}-{slug(arm)}-{seed}", [*options, *shared, "--seed", str(seed)]
            there = [weights_of(needs[word].name) if word in needs else word for word in options]
            here = [str(needs[word].folder / "weights.npz") if word in needs else word for word in options]
            embedded = name in getattr(table, "EMBEDDED", ())
            place = [] if embedded else ["--data", str(args.data.resolve() / name)]
            runs[name, arm, seed] = Job(run, [program, *([] if embedded else ["--data", f"FOLDER/{name}"]), *there], [
                python, str(HERE / program), *place, *here, "--name", run, "--out", str(args.folder)], args.folder, tuple(needs.values()))
        return runs[name, arm, seed]

    for seed in args.seeds:
        for name, arms in table.ON.items():
            for arm in arms:
                add(name, arm, seed)
    for name, (program, *settings) in getattr(table, "BENCH", {}).items():
        settings = [*settings, *getattr(table, "QUICK_BENCH", []) * args.quick, *shared]
        job = Job(f"bench-{slug(name)}", [program, *settings], [], args.folder)
        benches[name] = dataclasses.replace(job, command=[python, str(HERE / program), *settings, "--json", str(job.result)])
    return runs, benches


# Running

def is_done(job):
    """Whether the job's results are there. Raises ValueError if its folder holds a run of other arguments."""
    if not job.record.exists():
        if job.folder.exists():
            raise ValueError(f"claims: {job.folder} must be a run of this program, got a folder without {job.record.name}: "
                             "move it away")
        return False
    before = files.read_json(job.record, "arguments")["arguments"]
    if before != job.shown:
        raise ValueError(f"claims: {job.folder} must hold a run of the arguments `{' '.join(job.shown)}`, got one of "
                         f"`{' '.join(map(str, before or []))}`: move it away, or take another --out")
    return job.result.exists()


def start(job, threads):
    """Start a job, or go on with it; its output goes to the end of its log. Raises RuntimeError if it is running already."""
    resume = ["--resume"] * (job.folder / "config.json").exists()
    with job.log.open("a") as log:
        if fcntl:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)     # the child inherits the lock, and holds it until it ends
            except OSError:
                raise RuntimeError(f"claims: {job.name} must not be running already, got a process that writes {job.log}: "
                                   "wait for it, or end it") from None
        files.write(job.record, json.dumps({"arguments": job.shown}) + "\n")
        job.folder.mkdir(exist_ok=True)
        more = {"NUMBA_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(job.command + resume, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **more})


def run(jobs, at_a_time, bar):
    """Run jobs, `at_a_time` beside each other, each with its share of the cores, in order, but none before those that it needs.

    After one that fails no other is started; those running end, and RuntimeError names its log. If this is interrupted, they are
    terminated: they go on from their last checkpoints. Raises ValueError, before any starts, if one that is needed is neither done
    nor among the jobs.
    """
    for job in jobs:
        for need in job.needs:
            if need not in jobs and not is_done(need):
                raise ValueError(f"claims: {need.name}, whose weights {job.name} takes, must be done or among the runs to start, "
                                 "got neither: name its arm in --only, too")
    waiting, running, failed = list(jobs), {}, []
    threads = max(1, cores() // at_a_time)

    def ready(job):
        return all(need.result.exists() and need.name not in running for need in job.needs)

    try:
        while running or (waiting and not failed):
            while not failed and len(running) < at_a_time and (job := next(filter(ready, waiting), None)):
                waiting.remove(job)
                running[job.name] = job, start(job, threads)
                bar.set_postfix_str(", ".join(running))
            for job, process in list(running.values()):
                if process.poll() is not None:
                    del running[job.name]
                    bar.update()
                    bar.set_postfix_str(", ".join(running))
                    if process.returncode or not job.result.exists():
                        failed.append(f"{job.log} (exit status {process.returncode}): {last_line(job.log)}")
            time.sleep(0.05)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if failed:
        raise RuntimeError(f"claims: every run must end well and write results.json, got a failure in {'; '.join(failed)}")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_line(path):
    lines = path.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was written")


def run_all(args, runs, benches):
    """Run what is not done: the arms, --jobs at a time, then the benchmarks, each alone."""
    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = [job for (_, arm, _), job in runs.items() if not args.only or arm in args.only]
    alone = [] if args.only else list(benches.values())
    done = [job for job in wanted + alone if is_done(job)]
    with train.progress(None, total=len(wanted + alone), initial=len(done), desc=f"claims {args.paper}", unit="run") as bar:
        run([job for job in wanted if job not in done], args.jobs, bar)
        run([job for job in alone if job not in done], 1, bar)


# AP of an image set in which an image may occur several times

@dataclasses.dataclass(frozen=True)
class Ranking:
    """The detections of one class down to the last true positive, best first, as evaluate.voc ranks them.

    found: image of each true positive; wrong: image of each false positive; before: how many false positives precede each true
    positive; objects: (images,) objects that count. Where images are ranked, and not detections, an image is one detection, and one object
    if it holds the class.
    """

    found: np.ndarray
    wrong: np.ndarray
    before: np.ndarray
    objects: np.ndarray

    def ap(self, weights):
        """AP (all points, IoU 0.5) of the set in which image i occurs weights[i] times (int64); NaN if that holds no object.

        Copies of a detection rank side by side (CHOICE), also where two detections of an image and class have one score. With weights
        1 it has the bits of evaluate.voc: precision falls at a false positive, so that the area depends on no other points of the
        curve than those at true positives.
        """
        positives = weights @ self.objects
        if not positives:
            return float("nan")
        tp = np.cumsum(weights[self.found])
        fp = np.concatenate([[0], np.cumsum(weights[self.wrong])])[self.before]
        return evaluate.average_precision(tp / positives, tp / np.maximum(tp + fp, 1))


def rankings(detections, examples, classes):
    """A Ranking for each class. Arguments as in evaluate.voc, whose matching (IoU >= 0.5) and order of ties this keeps."""
    found = []
    for k in range(len(classes)):
        hits, scores, images, objects = [np.zeros(0, int)], [np.zeros(0)], [np.zeros(0, int)], []
        for i, ((boxes, labels, s), example) in enumerate(zip(detections, examples)):
            mine, true = np.flatnonzero(labels == k), example.labels == k
            mine = mine[np.argsort(-s[mine], kind="stable")]
            hits.append(evaluate.match(boxes[mine], example.boxes[true], example.difficult[true], 0.5, False))
            scores.append(s[mine])
            images.append(np.full(len(mine), i))
            objects.append(int((true & ~example.difficult).sum()))
        found.append(ranking(*map(np.concatenate, (hits, scores, images)), np.array(objects, np.int64)))
    return found


def ranking(hits, scores, images, objects):
    """The Ranking of detections in the order in which ties go: hits 1 right, 0 wrong, any other does not count; images: where each is."""
    order = np.argsort(-scores, kind="stable")
    hits, images = hits[order], images[order]
    at = np.flatnonzero(hits == 1)
    before = np.cumsum(hits == 0)[at]
    return Ranking(images[at], images[hits == 0][:before.max(initial=0)], before, objects)


def mean_ap(ranked, weights):
    """Mean over the classes with objects, as evaluate.mean_ap; NaN if none has."""
    aps = [ap for ap in (r.ap(weights) for r in ranked) if not math.isnan(ap)]
    return float(np.mean(aps)) if aps else float("nan")


def results_of(job, detector=False):
    """A run's results.json. Raises ValueError naming the file if a key is missing, of a detector also one of AP50."""
    return files.read_json(job.result, "set", *["AP50", "mean AP50"] * detector)


def evaluation_set(folder, job):
    """The examples that a run was evaluated on, and the classes, read as the run did."""
    config = files.read_json(job.folder / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", data.DefectWarning)         # the runs have told them
        _, examples, classes = common.read(argparse.Namespace(
            data=folder, train_set=config.get("train_set", "train"), eval_set=results_of(job)["set"]))
    return examples, list(classes)


def draws_of(N):
    """RESAMPLES sets of N of N images, drawn with replacement, the same at each call: how often each image occurs, (N,) int64."""
    rng = np.random.default_rng(0)
    return (np.bincount(rng.integers(N, size=N), minlength=N) for _ in range(RESAMPLES))


def resampled(args, claims, runs, done):
    """Mean AP50 of every run that a claim on it needs, on RESAMPLES sets of as many images, drawn with replacement.

    The draws are the same for all runs on a data set. Returns {(data set, metric, "arm" or "arm@variant", seed): (RESAMPLES,) float64}.
    Raises ValueError if detections do not give the AP50 of results.json, or the runs were evaluated on different sets.
    """
    wanted = list(dict.fromkeys((c.data, arm, seed) for c in claims if c.metric == "AP50" for seed in args.seeds for arm in c.signs
                                if (c.data, arm.partition("@")[0], seed) in done))
    found, sets = {}, {}
    for name, arm, seed in train.progress(wanted, desc="bootstrap", unit="run", disable=not wanted):
        arm_, _, variant = arm.partition("@")
        job = runs[name, arm_, seed]
        results = results_of(job, detector=True)
        if name not in sets:
            examples, classes = evaluation_set(args.data / name, job)
            sets[name] = examples, [results["set"], classes], list(draws_of(len(examples)))
        examples, which, draws = sets[name]
        if [results["set"], list(results["AP50"])] != which:
            raise ValueError(f"claims: {job.result} must be an evaluation of {which}, as the other runs on {name}, got "
                             f"{[results['set'], list(results['AP50'])]}")
        path = job.folder / (f"detections_{variant}.json" if variant else "detections.json")
        detections, _ = coco.named_results(path, [e.name for e in examples], which[1])
        ranked = rankings(detections, examples, which[1])
        told, got = number(job, arm, "AP50"), mean_ap(ranked, np.ones(len(examples), np.int64))
        if not abs(told - got) < 1e-9:
            raise ValueError(f"claims: {path} must give the mean AP50 in results.json, {told}, got {got}")
        found[name, "AP50", arm, seed] = np.array([mean_ap(ranked, w) for w in draws])
    return found


# Errors of an image set in which an image may occur several times, and AP of its images

def wrong_of(job, arm, metric):
    """What each image adds to a metric, (images,) float64: 1, 0, or NaN where it does not count. None if the run does not tell.

    Raises ValueError naming the file if the mean of those that count is not the number in results.json.
    """
    variant = arm.partition("@")[2]
    path = job.folder / (f"wrong_{variant}.json" if variant else "wrong.json")
    lists = files.read_json(path) if path.exists() else {}
    if not isinstance(lists, dict) or metric not in lists:
        return None
    odd = [v for v in lists[metric] if v not in (0, 1, None)] if isinstance(lists[metric], list) else [lists[metric]]
    if odd:
        raise ValueError(f"claims: {path} must hold a list of 0, 1 and null at {metric}, got {odd[0]!r}")
    wrong = np.array(lists[metric], float)                          # None becomes NaN
    told, counted = number(job, arm, metric), wrong[~np.isnan(wrong)]
    got = float(counted.mean()) if len(counted) else float("nan")
    if not abs(told - got) < 1e-9:
        raise ValueError(f"claims: {path} must give the {metric} in results.json, {told}, got {got}")
    return wrong


def rankings_of(job, arm, metric):
    """The Ranking of the images for each class, {class: Ranking}. None if the run does not tell.

    Raises ValueError naming the file if it is not as described above, or does not give the number in results.json.
    """
    variant = arm.partition("@")[2]
    path = job.folder / (f"ranking_{variant}.json" if variant else "ranking.json")
    classes = files.read_json(path) if path.exists() else {}
    if not isinstance(classes, dict) or metric not in classes:
        return None
    classes = classes[metric]
    try:
        columns = np.array([[lists[key] for key in ("scores", "hits", "positive")] for lists in classes.values()], float)       # None: NaN
        scores, hits, positive = columns.transpose(1, 0, 2)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"claims: {path} must hold lists of scores, hits and positive of each class at {metric}, an entry an image") from None
    fits = np.isfinite(scores) & ((positive == 1) & np.isin(hits, (0, 1)) | (positive == 0) & ((hits == 0) | np.isnan(hits)))
    for k, i in np.argwhere(~fits)[:1]:
        raise ValueError(f"claims: {path} must hold a finite score, and hits and positive 1 1, 0 1, 0 0 or null 0, at {metric}, got "
                         f"{columns[k, :, i].tolist()} for image {i} and {list(classes)[k]!r}")
    found = {name: ranking(h, s, np.arange(len(s)), p.astype(np.int64)) for name, s, h, p in zip(classes, scores, hits, positive)}
    told, got = number(job, arm, metric), mean_ap(found.values(), np.ones(scores.shape[1], np.int64))
    if not abs(told - got) < 1e-9:
        raise ValueError(f"claims: {path} must give the {metric} in results.json, {told}, got {got}")
    return found


def resampled_images(args, claims, runs, done):
    """As resampled, for the other metrics of claims, of the runs that tell of each image: means over the images that count, and AP ("_ap").

    NaN where none of a set counts, or none is positive. Raises ValueError if the runs tell of different numbers of images, of different
    sets or, by one AP, of different classes or positives.
    """
    wanted = dict.fromkeys((c.data, c.metric, arm, seed) for c in claims if c.metric != "AP50" for seed in args.seeds
                           for arm in c.signs if (c.data, arm.partition("@")[0], seed) in done)
    lists, ranked, first, truths, found = {}, {}, {}, {}, {}
    for name, metric, arm, seed in wanted:
        job = runs[name, arm.partition("@")[0], seed]
        told = (rankings_of if is_ap(metric) else wrong_of)(job, arm, metric)
        if told is None:
            continue
        which = f"{len(next(iter(told.values())).objects if is_ap(metric) else told)} images of {results_of(job)['set']}"
        if which != first.setdefault(name, which):
            raise ValueError(f"claims: {metric} of {arm} in {job.folder} must tell of {first[name]}, as the other runs on {name}, "
                             f"got {which}")
        if not is_ap(metric):
            lists.setdefault(name, {})[metric, arm, seed] = told
            continue
        ranked[name, metric, arm, seed] = told
        truth = [(k, r.objects.tolist()) for k, r in told.items()]
        if truth != truths.setdefault((name, metric), truth):
            raise ValueError(f"claims: {metric} of {arm} in {job.folder} must have the classes and positives of the other runs on {name}")
    for name, of in lists.items():
        wrong = np.stack(list(of.values()))
        counted = ~np.isnan(wrong)
        both = np.concatenate([np.where(counted, wrong, 0), counted])
        sums, numbers = np.split(np.array([both @ times for times in draws_of(wrong.shape[1])]).T, 2)
        means = np.divide(sums, numbers, out=np.full_like(sums, np.nan), where=numbers > 0)
        found.update({(name, *key): mean for key, mean in zip(of, means)})
    for key, of in train.progress(list(ranked.items()), desc="bootstrap", unit="run", disable=not ranked):
        images = len(next(iter(of.values())).objects)
        found[key] = np.array([mean_ap(of.values(), times) for times in draws_of(images)])
    return found


# Claims

def number(job, arm, metric):
    """A number of a run's results.json. Raises ValueError naming file and place if there is none."""
    variant = arm.partition("@")[2]
    path = [*["also", variant] * bool(variant), *(["mean AP50"] if metric == "AP50" else metric.split("."))]
    value = at(job.result, path)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"claims: {job.result} must hold a number at {'.'.join(path)}, got {value!r}")
    return value


def at(file, path):
    """The value at a path in a JSON file: keys of objects, and places in lists (-1: the last)."""
    value = files.read_json(file)
    for key in path:
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"claims: {file} must hold a value at {'.'.join(path)}, got none at {key}") from None
    return value


def interval(differences, rng):
    """95 % percentile bootstrap interval (low, high) of the mean over seeds, or over turns. differences: (seeds, RESAMPLES) float64.

    Resample b draws seeds with replacement and takes their differences in column b, in which the images were drawn (hierarchical).
    Where nothing but a few seeds is drawn it would say too much (of three it runs from the least difference to the largest, and excludes 0
    in one case of four without any effect): see t_interval. None if no resample has a value.
    """
    S, B = differences.shape
    drawn = rng.integers(S, size=(B, S))
    means = differences[drawn, np.arange(B)[:, None]].mean(1)
    means = means[np.isfinite(means)]                               # NaN: a set of images without an object
    return [float(v) for v in np.percentile(means, [2.5, 97.5])] if len(means) else None


def t_interval(differences):
    """95 % interval (low, high) of the mean of a few differences by Student's t: mean +- t * sd / sqrt(n). None of fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    middle, half = np.mean(differences), stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / np.sqrt(n)
    return [float(middle - half), float(middle + half)]


def verdict(interval, pairs, lower=False, quick=False):
    """"holds": the interval lies wholly on the claimed side of 0; "does not hold": wholly on the other; else "not resolved".

    Also "not resolved": fewer than LEAST_SEEDS pairs (seeds; turns of a benchmark), or no interval.
    """
    if quick:
        return "quick run, no verdict"
    if interval is None or pairs < LEAST_SEEDS:
        return "not resolved"
    low, high = (-interval[1], -interval[0]) if lower else interval
    return "holds" if low > 0 else "does not hold" if high < 0 else "not resolved"


def judge(claim, args, runs, done, benches, resamples):
    """The claim's fields, values of its arms with the same seed, differences, interval and verdict: a JSON value."""
    found = {**dataclasses.asdict(claim), "seeds": [], "values": {}, "differences": [], "interval": None, "method": None, "verdict": "not measured"}
    if claim.data in benches:
        if not is_done(benches[claim.data]):
            return found
        values = {path: np.atleast_1d(np.array(at(benches[claim.data].result, path.split(".")), float)) for path in claim.signs}
        if len({len(v) for v in values.values()}) > 1:
            raise ValueError(f"claims: {claim.text!r}: the lists must be as long as each other, got "
                             + ", ".join(f"{len(v)} at {path}" for path, v in values.items()))
        seeds = list(range(len(values[claim.better])))              # turns, in truth
    else:
        of = {arm: (claim.data, arm.partition("@")[0]) for arm in claim.signs}
        seeds = [s for s in args.seeds if all((*key, s) in done for key in of.values())]
        values = {arm: np.array([number(runs[(*key, s)], arm, claim.metric) for s in seeds]) for arm, key in of.items()}
    if not seeds:
        return found
    differences = sum(sign * values[arm] for arm, sign in claim.signs.items())
    rng, said = np.random.default_rng(1), None
    if all((claim.data, claim.metric, arm, s) in resamples for arm in claim.signs for s in seeds):
        drawn = sum(sign * np.stack([resamples[claim.data, claim.metric, arm, s] for s in seeds]) for arm, sign in claim.signs.items())
        method, between = "images and seeds", interval(drawn, rng)
    elif claim.data not in benches:
        method, between = "t", t_interval(differences)
    elif len(seeds) > 1:
        method, between = "turns", interval(np.repeat(differences[:, None], RESAMPLES, 1), rng)
    else:                                                           # memory: the same each time
        method, between, side = "one measurement", None, -differences[0] if claim.lower else differences[0]
        said = None if args.quick else "holds" if side > 0 else "does not hold"
    return {**found, "seeds": seeds, "differences": differences.tolist(), "interval": between, "method": method,
            "values": {arm: {"each": v.tolist(), **spread(v)} for arm, v in values.items()},
            "verdict": said or verdict(between, len(seeds), claim.lower, args.quick)}


def arm_summary(jobs, keys=()):
    """The finished runs of one arm: figures by seed, and the mean of their curves at the steps that all have. jobs: {seed: Job}.

    Without AP50 it gives "figures", the numbers of results.json, in place of "mean AP50"; "last two" is of the first key in the curve.
    """
    first = next(iter(jobs.values()))
    detector = "mean AP50" in results_of(first)
    results = {seed: results_of(job, detector) for seed, job in jobs.items()}
    curves = [{record["step"]: record for record in r.get("curve", [])} for r in results.values()]
    steps = sorted(set.intersection(*map(set, curves)))
    names = [k for k in curves[0][steps[0]] if k != "step"] if steps else []
    curve = [{"step": s, **{k: mean([c[s].get(k) for c in curves]) for k in names}} for s in steps]
    variants = results_of(first).get("also", {})
    if detector:
        key = "mean AP50"
        told = {key: [r[key] for r in results.values()],
                "also": {v: [number(job, f"@{v}", "AP50") for job in jobs.values()] for v in variants}}
    else:
        key = next((k for k in keys if k in names), None)
        told = {"figures": figures(list(results.values())), "last two of": key,
                "also": {v: figures([r.get("also", {}).get(v, {}) for r in results.values()]) for v in variants}}
    return {"command": command_of(first), "seeds": list(results), **told,
            "seconds": [r.get("seconds") for r in results.values()], "curve": curve,
            "last two": [record.get(key) for record in curve[-2:]] if key else []}


def command_of(job):
    """The command of an arm's run, for any seed: S stands for it, also in the runs whose weights it takes."""
    of_any_seed = {weights_of(need.name): weights_of(need.name.rpartition("-")[0] + "-S") for need in job.needs}
    return " ".join(["python examples/" + job.shown[0], *(of_any_seed.get(word, word) for word in job.shown[1:-1]), "S"])


def figures(results):
    """{key: its numbers in all results} for the numbers in the first, but the time; None where a result has no finite one."""
    return {k: [r[k] if type(r.get(k)) in (int, float) and math.isfinite(r[k]) else None for r in results]
            for k, v in results[0].items() if type(v) in (int, float) and k not in ("seconds", "training_seconds", "memory_MB")}


def mean(values):
    """Mean of numbers; None if one of them is missing or NaN."""
    return None if any(v is None or math.isnan(v) for v in values) else float(np.mean(values))


# Report

def report(args, table, claims, runs, benches):
    """Judge all claims on the runs that are done: a JSON value."""
    done = {key for key, job in runs.items() if is_done(job)}
    resamples = {**resampled(args, claims, runs, done), **resampled_images(args, claims, runs, done)}
    arms = {name: {} for name in table.ON}
    for name, listed in table.ON.items():
        for arm in listed:
            if there := {s: runs[name, arm, s] for s in args.seeds if (name, arm, s) in done}:
                arms[name][arm] = arm_summary(there, getattr(table, "CURVES", {}))
    measured = {name: {"command": " ".join(["python examples/" + job.shown[0], *job.shown[1:]]), "result": files.read_json(job.result)}
                for name, job in benches.items() if is_done(job)}
    missing = [job.name for key, job in runs.items() if key not in done] + [job.name for name, job in benches.items() if name not in measured]
    return {"paper": args.paper, "quick": args.quick, "seeds": args.seeds, "resamples": RESAMPLES, "missing": missing,
            "claims": [judge(c, args, runs, done, benches, resamples) for c in claims], "arms": arms, "benchmarks": measured,
            **({"rows": rows(args, table, runs, done)} if hasattr(table, "ROWS") else {})}


def rows(args, table, runs, done):
    """The table ROWS with its values: a JSON value."""
    found = []
    for name, paper, dataset, arm in table.ROWS["rows"]:
        seeds = [s for s in args.seeds if (dataset, arm.partition("@")[0], s) in done]
        found.append({"name": name, "paper": paper, "data": dataset, "arm": arm, "values": {
            metric: [number(runs[dataset, arm.partition("@")[0], s], arm, metric) for s in seeds
                     if metric in results_of(runs[dataset, arm.partition("@")[0], s])] for metric in table.ROWS["columns"].values()}})
    return {"columns": table.ROWS["columns"], "rows": found}


def markdown(found):
    """Lines of markdown: the claims, the ends of the curves, the commands."""
    lines = ["| claim | paper | data | ours | against | paired differences | 95 % interval | verdict |", "| --- " * 8 + "|"]
    for c in found["claims"]:
        scale, form = unit(c["metric"]) if c["data"] in found["arms"] else (1, ".4g")

        def told(*arms):
            return " − ".join(f"{arm}: {shown(c['values'].get(arm), scale, form)}" for arm in arms)

        each = [format(scale * d, "+" + form) for d in c["differences"]]
        each = " ".join(each) if len(each) <= 5 else f"{len(each)} pairs, mean {scale * np.mean(c['differences']):+{form}}"
        between = " .. ".join(format(scale * v, "+" + form) for v in c["interval"]) if c["interval"] else "-"
        between += f" ({c['method']})" if c["method"] not in (None, "images and seeds") else ""
        cells = (told(c["better"], c["worse"]), told(*c["than"])) if c["than"] else (told(c["better"]), told(c["worse"]))
        cells = (cells[0], f"{c['times']:g} times {cells[1]}") if c["times"] != 1 else cells
        lines.append(f"| {c['text']} | {c['paper']} | {c['data']} | {cells[0]} | {cells[1]} | {each or '-'} | {between} | {c['verdict']} |")
    keys = {a.get("last two of") for arms in found["arms"].values() for a in arms.values()} - {None}
    errors, aps = (any(map(of_kind, [*keys, *(c["metric"] for c in found["claims"])])) for of_kind in (is_error, is_ap))
    lines += ["", f"{'APs' if aps else 'AP50'}{' and errors' * errors} in points. Intervals: bootstrap over images and seeds, or over the turns of a "
              "benchmark; (t): Student's, of the seeds alone.",
              "", f"Mean AP50{', or the figure beside the arm,' * bool(keys)} at the last two points of the curve on the evaluation set, "
              "mean of the seeds:", "", "| data | arm | seeds | steps | last but one | last |", "| --- " * 6 + "|"]
    for name, arms in found["arms"].items():
        for arm, a in arms.items():
            key = a.get("last two of")
            scale, form = unit(key or "AP50")
            last = ["-" if v is None else format(scale * v, form) for v in [None, None, *a["last two"]][-2:]]
            arm, steps = f"{arm} ({key})" if key else arm, a["curve"][-1]["step"] if a["curve"] else "-"
            lines.append(f"| {name} | {arm} | {len(a['seeds'])} | {steps} | {' | '.join(last)} |")
    if "rows" in found:
        columns = found["rows"]["columns"]
        lines += ["", f"| row | paper | data | arm | {' | '.join(columns)} |", "| --- " * (4 + len(columns)) + "|"]
        for row in found["rows"]["rows"]:
            cells = []
            for metric in columns.values():
                cells.append(shown(spread(row["values"][metric]), *unit(metric)))
            lines.append(f"| {row['name']} | {row['paper']} | {row['data']} | {row['arm']} | {' | '.join(cells)} |")
    commands = [each["command"] for group in (*found["arms"].values(), found["benchmarks"]) for each in group.values()]
    runs = "; RUNS holds the runs, <data set>-<arm>-S" * any("RUNS/" in c for c in commands)
    lines += ["", f"Commands, S in {' '.join(map(str, found['seeds']))}{runs}:", "", *("    " + c for c in commands)] if commands else []
    return lines


def is_error(metric):
    return metric.endswith("_error")


def is_ap(metric):
    """Whether it is an AP of images, which ranking.json tells; AP50 is one of detections."""
    return metric.endswith("_ap")


def unit(metric):
    """Factor and format in which a metric is shown: APs and errors in points."""
    return (100, ".1f") if metric.endswith("AP50") or is_ap(metric) or is_error(metric) else (1, ".4g")


def spread(values):
    """Mean and standard deviation (n - 1) of numbers: {"mean", "sd"}, sd None of one; None of none, and where one is missing."""
    if not len(values) or any(v is None for v in values):
        return None
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def shown(value, scale, form):
    """Mean and spread of an arm as text."""
    if value is None:
        return "-"
    return f"{scale * value['mean']:{form}}" + ("" if value["sd"] is None else f" ± {scale * value['sd']:{form if scale > 1 else '.2g'}}")


def pictures(found, table, folder):
    """Draw the mean curves of each data set: AP50 and, where the runs have them, those of the table's CURVES."""
    drawn = {"mean AP50": ("mean AP50", "curves"), **{key: (label, key) for key, label in getattr(table, "CURVES", {}).items()}}
    for name, arms in found["arms"].items():
        for metric, (label, stem) in drawn.items():
            curves = {arm: [(r["step"], r[metric]) for r in a["curve"] if r.get(metric) is not None] for arm, a in arms.items()}
            if any(curves.values()):
                figure, axes = draw.plot("step", label, f"{found['paper']}, {name}: mean over the seeds")
                for i, arm in enumerate(table.ARMS):                # an arm has its colour on every data set
                    if curves.get(arm):
                        axes.plot(*zip(*curves[arm]), marker=".", color=draw.COLOURS[i % len(draw.COLOURS)],
                                  linestyle=("-", "--", ":")[i // len(draw.COLOURS) % 3], label=arm)
                axes.legend(fontsize="small")
                draw.save(figure, folder / f"{stem}_{name}.png")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("paper", choices=papers(), help="the table claims_<paper>.py")
    a("--data", type=Path, required=True, metavar="FOLDER", help="holds the data sets in folders by their names")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="a smoke run: the options QUICK of the table, one seed, no verdicts")
    size.add_argument("--full", action="store_true", help="what README shows")
    a("--report", action="store_true", help="run nothing: only the tables of the runs that are done")
    a("--only", nargs="+", metavar="ARM", help="run these arms alone")
    a("--seeds", nargs="+", type=int, metavar="S", help="(0 1 2; --quick: 0)")
    a("--jobs", type=int, default=2, metavar="N", help="runs at a time, which share the cores (%(default)s)")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="of the runs; cuda: on a GPU (%(default)s)")
    a("--out", type=Path, default=Path("runs/claims"), metavar="FOLDER", help="where the runs go, in a folder of the paper (%(default)s)")
    a("--json", type=Path, metavar="FILE", help="where the figures go (<out>/<paper>/claims.json)")
    args = parser.parse_args(argv)
    settle_seeds(parser, args)
    timing.check_json(parser, args.json)
    args.folder = (args.out / (args.paper + "-quick" * args.quick)).resolve()
    args.json = args.json or args.folder / "claims.json"
    return args


def settle_seeds(parser, args):
    """Set the seeds, if none are given: three, or one with --quick. Refuses them and --jobs where they cannot be."""
    args.seeds = args.seeds or [0, 1, 2][:1 if args.quick else 3]
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds) or args.jobs < 1:
        parser.error(f"--seeds must be different and not negative, --jobs at least 1, got {args.seeds} and {args.jobs}")


def main(args):
    draw.require()
    table, claims = read_table(args.paper)
    for arm in args.only or ():
        known("claims", "--only", arm, table.ARMS)
    folders = [name for name in table.ON if name not in getattr(table, "EMBEDDED", ())]
    for name in folders:
        if not (args.data / name).is_dir():
            raise FileNotFoundError(f"claims: --data must hold the data sets {', '.join(folders)}, got no folder {args.data / name}")
    runs, benches = jobs_of(args, table)
    if not args.report:
        run_all(args, runs, benches)
    elif not args.folder.is_dir():
        raise FileNotFoundError(f"claims: --report needs runs, got no folder {args.folder}")
    found = report(args, table, claims, runs, benches)
    files.write(args.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    pictures(found, table, args.folder)
    print("\n".join(markdown(found)))
    print(f"\nruns missing: {len(found['missing'])}" * bool(found["missing"]) + f"\nfigures: {args.json}; curves: {args.folder}")
    return found


def terminated(*_):
    raise KeyboardInterrupt


def as_command(main, args):
    """Run main(args); errors end in one line, and Ctrl-C and SIGTERM say how to go on."""
    signal.signal(signal.SIGTERM, terminated)
    try:
        main(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on from the last checkpoints in {args.folder}")


if __name__ == "__main__":
    as_command(main, arguments())
