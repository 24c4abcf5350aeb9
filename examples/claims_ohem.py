"""OHEM (1604.03540): the settings and claims of examples/claims.py ohem. Paper's figures: mAP on VOC07 test, VGG16 unless said.

OHEM has bg_lo 0 and no quota of positives, random sampling bg_lo 0.1 and a quarter of positives; both N = 2. B = 512 here, chosen on
bccd's validation images: with a dozen objects an image the hardest 64 hold hardly any background (the paper: 128).
"""
PROGRAM = "ohem.py"

DATA = {"bccd": ["--steps", "1000", "--batch", "512", "--nms", "0.4", "--measure-every", "250", "--workers", "0", "--also-iterate"],
        "apple-orchard": ["--steps", "1000", "--batch", "512", "--nms", "0.4", "--measure-every", "250", "--workers", "0", "--also-iterate",
                          "--share", "0.9", "--short", "480"]}

ARMS = {"random": ["--sampler", "random"],
        "ohem": ["--sampler", "ohem"],
        "random, bg_lo 0": ["--sampler", "random", "--bg-lo", "0"],
        "ohem, bg_lo 0.1": ["--sampler", "ohem", "--bg-lo", "0.1"],
        "random, N=1": ["--sampler", "random", "--images", "1", "--batch", "256"],
        "ohem, N=1": ["--sampler", "ohem", "--images", "1", "--batch", "256"],
        "all": ["--sampler", "all"],
        "all, lr 0.06": ["--sampler", "all", "--lr", "0.06"],           # the paper, too, trains all regions at 3 to 4 times the rate
        "ssd": ["--sampler", "ssd"],
        "focal": ["--sampler", "focal"],
        "focal, lr 0.005": ["--sampler", "focal", "--lr", "0.005"],    # at 0.02 one of three seeds does not train
        "ohem, multi-scale": ["--sampler", "ohem", "--short", "180", "240", "320", "--test-short", "180", "240", "320"]}

ON = {"bccd": list(ARMS), "apple-orchard": ["random", "ohem"]}

CURVES = {"all_loss": "mean loss over all regions"}

QUICK = ["--steps", "4", "--measure-every", "2"]

BENCH = {"cost": ["bench_ohem.py"], "cost, VGG_M": ["bench_ohem.py", "--table", "VGG_CNN_M_1024", "--short", "300", "--regions", "1000",
                                                                     "--turns", "3"]}
QUICK_BENCH = ["--turns", "2", "--regions", "50"]

ALL_LOSS = {"data": "bccd", "better": "ohem", "metric": "all_loss", "lower": True, "paper": "a plot: OHEM lowest"}

CLAIMS = [
    *(dict(text="OHEM beats the heuristics", paper="69.9 against 67.2 (VGG_M: 62.0 against 59.6)", data=name, better="ohem", worse="random")
      for name in ON),
    dict(text="without bg_lo random sampling loses", paper="VGG_M: 59.6 to 57.2 (VGG16: 67.2 to 67.5, unverified)", data="bccd",
         better="random", worse="random, bg_lo 0"),
    dict(text="OHEM needs no bg_lo: with 0.1 it loses", paper="OHEM has none", data="bccd", better="ohem", worse="ohem, bg_lo 0.1"),
    dict(text="without bg_lo OHEM loses less than random sampling", paper="OHEM has none", data="bccd",
         better="random", worse="random, bg_lo 0", than=("ohem, bg_lo 0.1", "ohem")),
    dict(text="N=1 costs OHEM less than random sampling", paper="69.9 to 69.7, against 67.2 to 66.3", data="bccd",
         better="random", worse="random, N=1", than=("ohem", "ohem, N=1")),
    dict(text="OHEM beats training on all regions at the same rate", paper="-", data="bccd", better="ohem", worse="all"),
    dict(text="OHEM beats training on all regions at a higher rate", paper="69.9 against 68.7 (unverified)", data="bccd", better="ohem",
         worse="all, lr 0.06"),
    *(dict(text=f"OHEM ends with a lower mean loss over all regions than {worse}", worse=worse, **ALL_LOSS)
      for worse in ("random", "random, bg_lo 0", "all", "all, lr 0.06")),
    dict(text="iterated boxes with voting add", paper="with multi-scale 69.9 to 75.1", data="bccd", better="ohem@iterate", worse="ohem"),
    dict(text="iterated boxes with voting add", paper="with multi-scale 69.9 to 75.1", data="apple-orchard", better="ohem@iterate", worse="ohem"),
    dict(text="iterated boxes with voting add to random sampling", paper="with multi-scale 67.2 to 72.4", data="bccd", better="random@iterate",
         worse="random"),
    dict(text="multi-scale adds", paper="with iterated boxes 69.9 to 75.1", data="bccd", better="ohem, multi-scale", worse="ohem"),
    dict(text="OHEM beats SSD's 3:1", paper="-", data="bccd", better="ohem", worse="ssd"),
    dict(text="OHEM beats focal loss at the same rate", paper="-", data="bccd", better="ohem", worse="focal"),
    dict(text="OHEM beats focal loss at a lower rate", paper="-", data="bccd", better="ohem", worse="focal, lr 0.005"),
    dict(text="a step of two networks takes less than half of one with zeroed weights", paper="more than 2 times faster", data="cost",
         better="turns.ohem", worse="turns.zeroing", times=0.5, lower=True),
    dict(text="so it does where the head is most of the net (VGG_CNN_M_1024)", paper="more than 2 times faster", data="cost, VGG_M",
         better="turns.ohem", worse="turns.zeroing", times=0.5, lower=True),
    dict(text="a step of OHEM takes at most 1.75 times that of random sampling", paper="1.00 s against 0.57 s", data="cost",
         better="turns.ohem", worse="turns.random", times=1.75, lower=True),
    dict(text="at VGG_CNN_M_1024, too", paper="0.22 s against 0.13 s (unverified)", data="cost, VGG_M",
         better="turns.ohem", worse="turns.random", times=1.75, lower=True),
    dict(text="its peak memory, weights included, is at most 1.36 times that of random sampling", paper="8.7 GB against 6.4 GB", data="cost",
         better="memory.total MB.ohem", worse="memory.total MB.random", times=1.36, lower=True)]
