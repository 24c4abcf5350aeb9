"""AP-loss (1904.06373, 2008.07294): the settings and claims of examples/claims.py ap_loss. Paper's figures: COCO-style AP / AP50 on VOC2007 test,
RetinaNet with ResNet-50 at 512 pixels; recalled, all unverified.

Same net, images, rate and number of steps in all arms but those that name a rate. The rate was tried on bccd's validation images with seed 0
(CHOICE; 400 steps at 240x320): 0.2 beat 0.1 for each of the five losses, and 0.4 for AP-loss and focal loss; for the others (ce, auc, smooth_ap)
0.4 was better, which is why two of them have an arm with it on bccd; auc has none. smooth_ap has AP-loss's value, not interpolated, and its
derivative in place of the update: "ap, plain" is the arm of the same value. Metric imbalance: see examples/ap_loss.py.
"""
PROGRAM = "ap_loss.py"

COMMON = ["--steps", "600", "--upside-down", "--measure-every", "150", "--workers", "0"]
DATA = {"bccd": [*COMMON, "--size", "288", "384"], "apple-orchard": [*COMMON, "--size", "320", "320"]}

ARMS = {"ap": ["--loss", "ap"],
        "focal": ["--loss", "focal"],
        "ce": ["--loss", "ce"],
        "auc": ["--loss", "auc"],
        "smooth_ap": ["--loss", "smooth_ap"],
        "ce, lr 0.4": ["--loss", "ce", "--lr", "0.4"],
        "smooth_ap, lr 0.4": ["--loss", "smooth_ap", "--lr", "0.4"],
        "ap, delta 0.25": ["--loss", "ap", "--delta", "0.25"],
        "ap, delta 2": ["--loss", "ap", "--delta", "2"],
        "ap, plain": ["--loss", "ap", "--plain"],
        "ap, per image": ["--loss", "ap", "--per-image"]}

ON = {"bccd": list(ARMS), "apple-orchard": ["ap", "focal", "ce", "auc", "smooth_ap"]}

CURVES = {"ranking_ap": "average precision of the training batches' ranking", "pull_ratio": "gradient on negatives / on positives"}

QUICK = ["--steps", "4", "--measure-every", "2"]

BENCH = {"speed": ["bench_ap_loss.py", "--only", "loop", "large", "--turns", "20"]}
QUICK_BENCH = ["--positives", "500", "2000", "--negatives", "2000", "--large", "50", "20000", "--turns", "1"]

CLAIMS = [
    *(dict(text=f"AP-loss beats {told}", paper=paper, data=name, better="ap", worse=worse) for worse, told, paper in (
        ("focal", "focal loss", "53.1/82.3 against 51.3/80.9 (unverified)"),
        ("ce", "cross-entropy with 3:1 mining", "53.1/82.3 against 49.1/81.5 (unverified)"),
        ("auc", "the AUC loss", "53.1/82.3 against 49.3/79.7 (unverified)"),
        ("smooth_ap", "the derivative of its own smoothed value", "other optimisers of AP: clearly (unverified)")) for name in ON),
    *(dict(text=f"AP-loss beats {told} at a higher rate", paper="-", data="bccd", better="ap", worse=worse) for worse, told in (
        ("ce, lr 0.4", "cross-entropy with 3:1 mining"), ("smooth_ap, lr 0.4", "the derivative of its own smoothed value"))),
    *(dict(text=f"delta = 1 beats {delta}", paper=paper, data="bccd", better="ap", worse=f"ap, delta {delta}") for delta, paper in (
        ("0.25", "82.3 against 80.7 (unverified)"), ("2", "53.1/82.3 against 52.8/82.6 (unverified)"))),
    dict(text="interpolation adds", paper="82.3 against 82.2, AP 53.1 against 52.6 (unverified)", data="bccd", better="ap", worse="ap, plain"),
    dict(text="ranking the batch together beats ranking each image", paper="batch of 8: 82.3, of 1: 80.2 (unverified)", data="bccd", better="ap",
         worse="ap, per image"),
    *(dict(text=f"its gradients on positives and negatives are nearer to balance than those of {told}, all along", paper="equal by construction",
           data=name, better="ap", worse=worse, metric="imbalance", lower=True) for worse, told in (("focal", "focal loss"), ("ce", "cross-entropy")) for name in ON),
]

SPEED = {"data": "speed", "lower": True, "paper": "-"}
CLAIMS += [dict(text=f"exact AP-loss is {times} times faster than the loop over {P} positives ({name})", better=f"turns.P={P}.ours",
                worse=f"turns.P={P}.{name} loop", times=1 / times, **SPEED) for P, times in ((500, 60), (2000, 150)) for name in ("numpy", "torch")]
CLAIMS += [dict(text="20 million scores take at most 10 times a sort", better="turns.large.ours", worse="turns.large.sort", times=10.0, **SPEED),
           dict(text="memory, result included, is at most 4 times that of the sorted scores", better="memory.MB.ours.traced",
                worse="memory.MB.sort.traced", times=4.0, **SPEED)]
