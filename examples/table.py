"""Mean and spread over runs of a detector that differ in the seed alone: the tables in README.

    python examples/table.py runs/cells-0 runs/cells-1 runs/cells-2 --json results.json

Prints AP50 of each class and their mean, and COCO's numbers, each as mean, standard deviation (n - 1) and the single runs, and the
wall time (not known of a resumed run); and what was wrong at the score of best F1: tinydet.mistakes.errors.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from tinydet import files


def print_rows(rows):
    for name, values in rows.items():
        values = np.array(values, float)                            # None (a class without objects) becomes NaN
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        print(f"{name:12} {np.mean(values):.3f}  {spread:.3f}   " + " ".join(f"{v:.3f}" for v in values))


def main(args):
    configs = [files.read_json(Path(run) / "config.json", "seed") for run in args.runs]
    results = [files.read_json(Path(run) / "results.json", "set", "AP50", "mean AP50", "errors", "seconds") for run in args.runs]
    for config, result in zip(configs, results):                    # how boxes were combined may change after training
        config.update({k: result[k] for k in ("merging", "threshold", "testing") if k in result})
    for run, config in zip(args.runs, configs):
        if changed := [k for k in config if k not in ("seed", "name") and config[k] != configs[0].get(k)]:
            raise ValueError(f"table: runs must differ in the seed alone, got another {', '.join(changed)} in {run}")
    rows = {name: [r["AP50"][name] for r in results] for name in results[0]["AP50"]}
    rows["mean"] = [r["mean AP50"] for r in results]
    seconds = [r["seconds"] for r in results]
    print(f"{len(results)} runs, set {results[0]['set']}, AP50: mean, standard deviation, single runs")
    print_rows(rows)
    coco = {name: [r["COCO"][name] for r in results] for name in results[0].get("COCO", {}) if all("COCO" in r for r in results)}
    if coco:
        print("COCO's numbers")
        print_rows(coco)
    errors = {name: {kind: float(np.mean([r["errors"][name][kind] for r in results])) for kind in kinds}
              for name, kinds in results[0]["errors"].items()}
    print("errors at the score of best F1 (mean of the runs)")
    for name, kinds in errors.items():
        print(f"{name:12} " + ", ".join(f"{kind} {count:.0f}" for kind, count in kinds.items()))
    print("seconds      " + " ".join("-" if s is None else str(s) for s in seconds))
    if args.json:
        settings = {k: v for k, v in configs[0].items() if k not in ("seed", "name", "data")}
        files.write(args.json, json.dumps({"set": results[0]["set"], "seeds": [c["seed"] for c in configs], "AP50": rows, "COCO": coco,
                                           "errors": errors, "seconds": seconds, "settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    try:
        main(parser.parse_args())
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"error: {error}")
