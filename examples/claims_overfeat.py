"""The claims of OverFeat (1312.6229), for examples/claims.py: classification and localization on canvases, detection on photographs.

One classifier is trained per seed; both regressors stand on its trunk, and one detector starts from it. All arms of a data set have one
budget. Classification and localization: items of fashion-mnist, each alone on a cluttered canvas. Errors are shares of the images.
"""
PROGRAM = "overfeat.py"

DATA = {"fashion-mnist": ["--canvases", "12000", "--eval-canvases", "500", "--workers", "0"],
        "bccd": ["--steps", "800", "--measure-every", "400", "--also-nms", "--workers", "0"],
        "playing-cards": ["--window", "64", "--batch", "12", "--steps", "600", "--no-mirror", "--measure-every", "300", "--also-nms", "--workers", "0"]}

CLASSIFIER = "@fashion-mnist/classify"
ARMS = {"classify": ["overfeat_classify.py", "--steps", "4000", "--dropout", "0"],
        "localize": ["overfeat_localize.py", "--weights", CLASSIFIER],
        "localize, PCR": ["overfeat_localize.py", "--weights", CLASSIFIER, "--regressor", "PCR"],
        "localize, all trains": ["overfeat_localize.py", "--weights", CLASSIFIER, "--train-all"],
        "detect": [],
        "no background": ["--no-background"],
        "random negatives": ["--offending", "0"],
        "most offending": ["--offending", "1"],
        "context": ["--context"],
        "from classifier": ["--weights", CLASSIFIER]}

ON = {"fashion-mnist": ["classify", "localize", "localize, PCR", "localize, all trains"],
      "bccd": ["detect", "no background", "random negatives", "most offending", "context", "from classifier"],
      "playing-cards": ["detect", "no background"]}

CURVES = {"top1_error": "top-1 error", "localization_error": "localization error"}

QUICK = {"overfeat.py": ["--steps", "4", "--batch", "4", "--measure-every", "2"],
         "overfeat_classify.py": ["--steps", "4", "--batch", "4", "--canvases", "20", "--eval-canvases", "10", "--measure-every", "2"],
         "overfeat_localize.py": ["--steps", "4", "--batch", "4", "--canvases", "20", "--eval-canvases", "10", "--measure-every", "2"]}

CLASSES, PLACES = ({"data": "fashion-mnist", "metric": metric, "lower": True} for metric in ("top1_error", "localization_error"))

CLAIMS = [
    *(dict(text=f"fine stride beats coarse, {told}", paper=paper, better=f"classify@{n}-fine", worse=f"classify@{n}-coarse", **CLASSES)
      for n, told, paper in ((1, "one scale", "top-1 39.01 against 39.28 (unverified), top-5 16.97 against 17.12"), (4, "four scales", "-"))),
    dict(text="scales 1, 2, 4, 6 beat scale 1", paper="38.57 against 39.01 (unverified)", better="classify@4-fine", worse="classify@1-fine", **CLASSES),
    dict(text="six scales beat four", paper="38.12 (unverified) against 38.57", better="classify", worse="classify@4-fine", **CLASSES),
    *(dict(text=f"dense evaluation at four scales beats ten views, {told}", paper=paper, better="classify@4-fine", worse="classify@ten-views",
           **{**CLASSES, "metric": metric}) for told, metric, paper in (
        ("top-1", "top1_error", "the other way: 35.74 against 35.60 (unverified)"), ("top-5", "top5_error", "14.18 against 14.71 (unverified)"))),
    dict(text="all windows of six scales merged beat the centre window", paper="one centre crop 40, three to four scales 30.0", better="localize",
         worse="localize@centre", **PLACES),
    *(dict(text=f"{a} beat {b}, localization", paper=paper, better=better, worse=worse, **PLACES) for a, b, better, worse, paper in (
        ("two scales", "one", "localize@2", "localize@1", "31.5 against 40 (one centre crop)"),
        ("four scales", "two", "localize@4", "localize@2", "30.0 against 31.5"), ("six scales", "four", "localize", "localize@4", "-"))),
    dict(text="fine stride beats coarse, localization", paper="-", better="localize", worse="localize@coarse", **PLACES),
    dict(text="merging beats the surest window", paper="-", better="localize", worse="localize@none", **PLACES),
    dict(text="one box for all classes (SCR) beats one for each (PCR)", paper="31.3 against 44.1", better="localize", worse="localize, PCR", **PLACES),
    dict(text="one shared trunk: training all of the net to localize beats the classifier's trunk, frozen", paper="shared; training all: future work", better="localize, all trains", worse="localize", **PLACES),
    dict(text="one shared trunk: a detector that starts from the classifier's beats one from scratch", paper="all of the paper's detectors start so", data="bccd",
         better="from classifier", worse="detect"),
    *(dict(text=text, paper="-", data=name, better="detect", worse=worse) for text, worse in (
        ("negatives found on the fly beat none", "no background"), ("merging beats non-maximum suppression", "detect@nms")) for name in ("bccd", "playing-cards")),
    *(dict(text=text, paper=paper, data="bccd", better=better, worse=worse) for text, paper, better, worse in (
        ("the most offending negatives beat random ones", "both named, no figures", "most offending", "random negatives"),
        ("half and half beats random negatives", "-", "detect", "random negatives"),
        ("context from the coarser scale adds", "mAP 24.3 against 19.4, with longer training", "context", "detect"))),
    *(dict(text=f"the accurate net slid over six scales, {told}, takes less than a ninth of the time of the 1575 crops (16 timed)",
           paper="about 9 times faster than R-CNN", data="dense", better=f"turns.{route}", worse="turns.crops", times=1575 / 16 / 9, lower=True)
      for route, told in (("offsets", "offset by offset"), ("dilated", "by dilated kernels"))),
]

BENCH = {"dense": ["bench_overfeat.py", "--turns", "5"]}
QUICK_BENCH = ["--quick"]
