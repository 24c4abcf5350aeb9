"""mAP as a training loss through NMS, in the spirit of Henderson & Ferrari (1607.03476): the settings and claims of examples/claims.py map.

The paper's tables could not be read: its figure is one word of its abstract, "equivalent" to Fast R-CNN on VOC 2007 and 2012. All arms of a data set
start from one net for each seed, trained with softmax, on whose validation images the settings were chosen (seed 0; CHOICE), and take as many
steps with the same images; only the head trains. "train AP50": average precision of the first training images, as they are.
"""
PROGRAM = "end_to_end_map.py"

DATA = {"bccd": ["--workers", "0"], "playing-cards": ["--workers", "0"]}

START = ["ohem.py", "--sampler", "random"]
TUNE = ["--steps", "100", "--measure-every", "25"]
# chosen on the validation images: how windows rank, rate, weight of the squared scores, and the rate of the softmax updates
BCCD, CARDS = [*TUNE, "--weights", "@bccd/start"], [*TUNE, "--weights", "@playing-cards/cards, start"]
RAW, ODDS = ["--scores", "raw", "--lr", "0.003", "--score-weight", "0.03"], ["--scores", "log_odds", "--lr", "0.0001", "--score-weight", "0.01"]
SOFTMAX = ["--loss", "softmax", "--lr", "0.005"]

ARMS = {"start": [*START, "--steps", "1000", "--measure-every", "250", "--batch", "512", "--nms", "0.4"],
        "map": [*BCCD, *RAW],
        "softmax": [*BCCD, *SOFTMAX],
        "env, centred": [*BCCD, *RAW, "--estimator", "env", "--centre", "--lr", "0.001"],       # as it is it loses classes, even at 0.0003
        "centred": [*BCCD, *RAW, "--centre"],
        "step of 0.25 sigma": [*BCCD, *RAW, "--kappa", "0.25"],
        "8 images": [*BCCD, *RAW, "--batch", "8"],
        "cards, start": [*START, "--steps", "5000", "--measure-every", "1000", "--batch", "256"],
        "cards, map": [*CARDS, *ODDS],
        "cards, softmax": [*CARDS, *SOFTMAX],
        "cards, env, centred": [*CARDS, *ODDS, "--estimator", "env", "--centre"],
        "cards, 8 images": [*CARDS, *ODDS, "--batch", "8"],
        "cards, 2 images": [*CARDS, *ODDS, "--batch", "2"]}

ON = {"bccd": [arm for arm in ARMS if not arm.startswith("cards")], "playing-cards": [arm for arm in ARMS if arm.startswith("cards")]}

CURVES = {"train AP50": "mean AP50 of training images"}

TINY = ["--steps", "2", "--measure-every", "2"]
QUICK = {"ohem.py": TINY, "end_to_end_map.py": [*TINY, "--batch", "2", "--watch", "2", "--windows", "100"]}

TRAIN = {"metric": "curve.-1.train AP50"}


def claim(text, better, worse, data="bccd", paper="-", **more):
    return dict(text=text, paper=paper, data=data, better=better, worse=worse, **more)


CLAIMS = [
    claim("mAP training beats as many further softmax updates", "map", "softmax", paper="equivalent to Fast R-CNN"),
    claim("mAP training beats as many further softmax updates", "cards, map", "cards, softmax", "playing-cards", "equivalent to Fast R-CNN"),
    claim("on training images, too", "map", "softmax", **TRAIN),
    claim("on training images, too", "cards, map", "cards, softmax", "playing-cards", **TRAIN),
    claim("mAP training beats the net it starts from", "map", "start"),
    claim("mAP training beats the net it starts from", "cards, map", "cards, start", "playing-cards"),
    claim("further softmax updates beat the net they start from", "softmax", "start"),
    claim("further softmax updates beat the net they start from", "cards, softmax", "cards, start", "playing-cards"),
    claim("the finite step beats the linear envelope, centred", "map", "env, centred"),
    claim("the finite step beats the linear envelope, centred", "cards, map", "cards, env, centred", "playing-cards"),
    claim("a step of one standard deviation beats one of 0.25", "map", "step of 0.25 sigma"),
    claim("32 images a step beat 8", "map", "8 images"),
    claim("32 images a step beat 8", "cards, map", "cards, 8 images", "playing-cards"),
    claim("32 images a step beat 2", "cards, map", "cards, 2 images", "playing-cards"),
    claim("the pseudo-gradient as it is beats the centred one", "map", "centred"),
]
