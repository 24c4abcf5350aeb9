"""The claims of Oquab et al. (CVPR 2014 and 2015), for examples/claims.py: transfer of mid-level features, and weak supervision.

Source tasks: close-ups of shapes (near: those of the scenes; far: others; both, twice as many images) and items of fashion-mnist on clutter. Targets: embedded
scenes, their given boxes one by one (scene-boxes: the action task), and playing-cards, of which weak runs see the image's labels alone. Rows B, D, E, F are those of the slides' table; A and C are other
nets. AP of images and of one place an image and class, in points; the paper's figures are on VOC 2012.
"""
PROGRAM = "weak_localization.py"
EMBEDDED = ("scenes", "scene-boxes")

DATA = {"scenes": ["--workers", "0"], "scene-boxes": ["--workers", "0"], "fashion-mnist": ["--workers", "0"], "playing-cards": ["--workers", "0"]}

SOURCE = ["pretrain.py", "--steps", "3000"]
BOTH, NEAR, FAR, FASHION = "@scenes/source", "@scenes/source, near", "@scenes/source, far", "@fashion-mnist/source, fashion"
STRONG = ["transfer.py", "--scenes", "400", "--eval-scenes", "400", "--steps", "3000"]
WEAK = ["--scenes", "400", "--eval-scenes", "400", "--steps", "2000"]
CARDS = ["--frame", "160", "--cached", "4", "--steps", "1500"]
SCRATCH = ["--start", "random"]

ARMS = {"source": [*SOURCE, "--images", "12000"],
        "source, near": [*SOURCE, "--classes", "near"],
        "source, far": [*SOURCE, "--classes", "far"],
        "source, fashion": [*SOURCE, "--images", "12000"],
        "strong": [*STRONG, "--weights", BOTH],
        "strong, near source": [*STRONG, "--weights", NEAR],
        "strong, far source": [*STRONG, "--weights", FAR],
        "strong, fashion source": [*STRONG, "--weights", FASHION],
        "strong, no pre-training": [*STRONG, *SCRATCH, "--lr", "0.03"],
        "strong, random features": [*STRONG, *SCRATCH, "--trains", "head"],
        "strong, all trains": [*STRONG, "--weights", BOTH, "--trains", "all", "--lr", "0.02"],
        "action": [*STRONG, "--scenes", "20", "--weights", BOTH, "--preset", "action"],
        "action, FC6 frozen": [*STRONG, "--scenes", "20", "--weights", BOTH, "--preset", "action", "--trains", "head"],
        "weak": [*WEAK, "--weights", BOTH],
        "weak, fashion source": [*WEAK, "--weights", FASHION],
        "weak, no pre-training": [*WEAK, *SCRATCH, "--lr", "0.01"],
        "weak, 3x3": [*WEAK, "--weights", BOTH, "--adapt-kernel", "3"],
        "strong + weak": [*WEAK, "--weights", BOTH, "--masked"],
        "full images": [*WEAK, "--weights", BOTH, "--whole"],
        "cards": [*CARDS, "--weights", FASHION],
        "cards, shapes source": [*CARDS, "--weights", BOTH],
        "cards, no pre-training": [*CARDS, *SCRATCH, "--lr", "0.01"],
        "cards, full images": [*CARDS, "--weights", FASHION, "--whole"],
        "cards, strong + weak": [*CARDS, "--weights", FASHION, "--masked"]}

ON = {"scenes": [arm for arm in ARMS if not arm.startswith(("cards", "action")) and arm != "source, fashion"], "fashion-mnist": ["source, fashion"],
      "scene-boxes": [arm for arm in ARMS if arm.startswith("action")], "playing-cards": [arm for arm in ARMS if arm.startswith("cards")]}

CURVES = {"class_ap": "AP of images", "top1_error": "top-1 error of the source task"}

TINY = ["--steps", "4", "--batch", "4", "--measure-every", "2"]
QUICK = {"pretrain.py": [*TINY, "--images", "40"], "transfer.py": [*TINY, "--scenes", "8", "--eval-scenes", "8"],
         "weak_localization.py": [*TINY, "--scenes", "8", "--eval-scenes", "8"]}


def claim(text, paper, better, worse, metric="class_ap", data="scenes"):
    return dict(text=text, paper=paper, data=data, better=better, worse=worse, metric=metric)


CLAIMS = [
    claim("pre-training beats none, boxes", "VOC12 mAP 82.8 or 78.7 against 70.9", "strong", "strong, no pre-training"),
    claim("pre-training beats none, image labels", "-", "weak", "weak, no pre-training"),
    claim("pre-training beats none, image labels", "-", "cards", "cards, no pre-training", data="playing-cards"),
    claim("features of the source net beat random ones", "-", "strong", "strong, random features"),
    claim("more source classes, and nearer ones, beat fewer", "1512 classes 82.8 against 1000: 78.7", "strong", "strong, far source"),
    claim("near source classes beat far ones", "1000 of ILSVRC 78.7 against 1000 at random 76.3", "strong, near source", "strong, far source"),
    claim("close-ups of shapes beat clothes as a source, boxes", "-", "strong", "strong, fashion source"),
    claim("close-ups of shapes beat clothes as a source, image labels", "-", "weak", "weak, fashion source"),
    claim("clothes beat close-ups of shapes as a source, image labels", "-", "cards", "cards, shapes source", data="playing-cards"),
    claim("adaptation layers on a frozen net beat training all of it", "the paper freezes; no figures", "strong", "strong, all trains"),
    claim("k = 5 beats k = 1", "k = 5 by validation", "strong", "strong@k1"),
    claim("patches beat the whole image", "-", "strong", "strong@whole"),
    claim("sliding beats full images, F against D", "86.3 against 78.7", "weak", "full images"),
    claim("sliding beats full images, F against D", "86.3 against 78.7", "cards", "cards, full images", data="playing-cards"),
    claim("six test scales beat one", "-", "weak", "weak@scale-1"),
    claim("weak supervision beats strong on the same images, F against B", "86.3 against 82.8", "weak", "strong"),
    claim("boxes add to weak supervision, E against F", "86.0 against 86.3: they do not", "strong + weak", "weak"),
    claim("boxes add to weak supervision, E against F", "86.0 against 86.3: they do not", "cards, strong + weak", "cards", data="playing-cards"),
    claim("1x1 adaptation layers beat 3x3", "the paper: 1x1, the released code: 3x3; no figures", "weak", "weak, 3x3"),
    claim("the place, from labels alone: beats the image's middle", "74.5 against 50.9 (unverified)", "weak", "weak@middle", "location_ap"),
    claim("the place, from labels alone: beats the image's middle", "74.5 against 50.9 (unverified)", "cards", "cards@middle", "location_ap", "playing-cards"),
    claim("the place: weak beats strong on the same images", "74.5 against R-CNN's 74.8 (unverified)", "weak", "strong", "location_ap"),
    claim("the place: boxes add to weak supervision, E against F", "72.3 against 74.5 (unverified): they do not", "strong + weak", "weak", "location_ap"),
    claim("the place, from patches: the sum over patches beats the mean", "both named, no figures", "strong@sum", "strong@mean", "location_ap"),
    claim("the place: cells at their centres beat maps stretched", "-", "weak", "weak@stretch", "location_ap"),
    claim("actions: training FC6, too, beats adaptation layers alone", "70.2 against 68.4", "action", "action, FC6 frozen", data="scene-boxes"),
]

# The slides' table of variants, VOC12 test mAP, as far as it can run here (unverified): A and C are other nets
ROWS = {"columns": {"AP of images": "class_ap", "AP of places": "location_ap"},
        "rows": [("B: boxes (CVPR 2014)", "82.8", "scenes", "strong"), ("D: full images", "78.7", "scenes", "full images"),
                 ("E: strong + weak", "86.0", "scenes", "strong + weak"), ("F: weak", "86.3", "scenes", "weak"),
                 ("no pre-training, boxes", "70.9", "scenes", "strong, no pre-training"),
                 ("D: full images", "-", "playing-cards", "cards, full images"), ("E: strong + weak", "-", "playing-cards", "cards, strong + weak"),
                 ("F: weak", "-", "playing-cards", "cards")]}
