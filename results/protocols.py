"""What is run: the commands of every protocol, and how its settings were chosen.

A protocol is a set of runs of the arms (and of readers.py, controls.py), each with the
same seeds. What is tried (Trials) was written down before the runs, but for what lies
beyond an edge and for what is said below of the sites.

Not included: CIFAR-10 and the source, every second class of Tiny ImageNet at
32 x 32, both folders of JPEG images in data/.
"""

from itertools import product
from typing import NamedTuple


# --- what is run ---
class Trials(NamedTuple):
    """What an arm is tried with; the CSV files of trials hold all of it."""

    command: str
    settings: list[str]
    best: int  # the place of what was chosen

    @property
    def chosen(self) -> str:
        return f"{self.command} {self.settings[self.best]}"


# --- what is run: images of one distribution ---
# CIFAR-10, with the arms' own defaults where nothing is given. Pretraining takes a
# quarter, a half or three quarters of the steps. The headline takes the share that
# validation prefers over the seeds 100 to 102 (protocols shares, shares-10000).
# All are reported.
SHARES = (25, 50, 75)
CIFAR = "--dataset data/cifar10 --source data/tiny-imagenet-32"
RATES = ".0003 .0005 .001 .0015 .002 .003 .004 .006".split()
FROM_SCRATCH = "pretrain_finetune.py --pretrain-steps 0"
JOINT = "maml_ssl.py --inner-lr 0"


def cifar(labels: int = 500, steps: int = 2000) -> dict[str, str]:
    """The arms' commands: labels per class, and steps, pretraining included."""
    flags = f"{CIFAR} --labels-per-class {labels} --steps {steps}"
    commands = {
        "scratch": f"{FROM_SCRATCH} {flags}",
        "maml": f"maml_ssl.py {flags}",
        "joint": f"{JOINT} --lr .001 --pretext-weight .03 {flags}",
    }
    for share in SHARES:
        some = f"{flags} --pretrain-steps {steps * share // 100}"
        commands[f"fine-tuned-{share}"] = f"pretrain_finetune.py {some}"
        commands[f"probed-{share}"] = f"linear_probe.py {some}"
    return commands


PHOTOS = cifar()
MAML = PHOTOS["maml"]
FINE_TUNED = [f"fine-tuned-{share}" for share in SHARES]
PRETRAINED = FINE_TUNED + [f"probed-{share}" for share in SHARES]
VALIDATION = "--eval-on val"
SHORT = {arm: f"{PHOTOS[arm]} {VALIDATION}" for arm in PRETRAINED}
LONG = {arm: f"{cifar(steps=10000)[arm]} {VALIDATION}" for arm in FINE_TUNED}

FOUR = "rotation colorization masked_autoencoding contrastive"
CONTROLS = {
    "first-order": f"{MAML} --first-order",
    "random-labels": f"{MAML} --pretext random_labels",
    "self-supervised": f"{PHOTOS['fine-tuned-25']} --pretrain {FOUR}",
    "no-inner-loop": f"{MAML} --inner-lr 0",
    "maml-both": f"{MAML} --pretext-images both",
    # What TUNE_PHOTOS prefers for MAML: the settings of joint training above
    "joint-settings": f"{MAML} --lr .001 --pretext-weight .03",
    # What it prefers for joint training
    "joint-tuned": f"{PHOTOS['joint']} --pretext-weight .3",
}
TRIAL = f"--steps 600 {VALIDATION}"

# An inner loop that moves. Of those whose inner step lowers the pretext loss at the
# evaluation by a tenth or more: the one with the best validation accuracy (seed 100).
MOVING = {}
for alpha in (0.1, 0.3, 1, 3):
    MOVING[f"alpha-{alpha}"] = f"{MAML} --inner-lr {alpha} {TRIAL}"
for run in ("alpha-0.1", "alpha-1"):
    MOVING[f"{run}-5-steps"] = f"{MOVING[run]} --inner-steps 5"

# MAML and joint training, tuned again: the same eight settings for both, and one more
# beyond each edge that the best of an arm lies on. Seeds 101 and 102 are for what is
# within two points of an arm's best with seed 100 (`run tune-photos --only ...`).
# There the mean decides.
GRID = [*product(("maml", "joint"), (".001", ".002"), (".03", ".1", ".3", "1"))]
GRID.append(("joint", ".0005", ".3"))
GRID.append(("maml", ".0005", ".03"))
GRID.append(("maml", ".001", ".01"))
TUNE_PHOTOS = {}
for arm, lr, weight in GRID:
    flags = f"--lr {lr} --pretext-weight {weight} {TRIAL}"
    TUNE_PHOTOS[f"{arm}-{lr}-{weight}"] = f"{PHOTOS[arm]} {flags}"


# --- what is run: few labels, so that pretraining pays ---
# 25 labels per class, 16 x 16, width 8; every 2% of a run an evaluation, on 2,000 test
# images. Chosen on 2,000 training images outside the label budget (cifar10-few-val,
# seed 100), mean of the last three evaluations. The gate, over the seeds 100 to 102:
# fine-tuned at least 3 points above from scratch. MAML and joint training are tried
# with a quarter of the steps, and less often: a step is dear.
FEW_STEPS = 3000
FEW = f"--source data/tiny-imagenet-32 --image-size 16 --width 8 --steps {FEW_STEPS}"
FEW += f" --labels-per-class 25 --eval-every {FEW_STEPS // 50}"
FEW += " --dataset data/cifar10-few"  # -val is added to this
FEW_PRETRAINING = [
    f"--lr {lr} --pretrain-steps {share * FEW_STEPS // 8}"
    for lr, share in product((".001", ".002"), (4, 6, 7))
]
FEW_PRETRAINING += [
    "--lr .0005 --pretrain-steps 2250",
    "--lr .004 --pretrain-steps 2250",
    "--lr .0005 --pretrain-steps 2625",  # beyond the edges that the best lies on
    "--lr .0003 --pretrain-steps 2250",
]
FEW_INNER = [
    f"--lr {lr} --inner-lr {inner_lr} --pretext-weight {weight}"
    for lr, inner_lr, weight in (
        (".001", ".01", ".03"),
        (".001", ".01", ".3"),
        (".001", ".1", ".3"),
        (".002", ".01", ".3"),
        (".004", ".01", ".3"),  # beyond the edges that the best lies on
        (".008", ".01", ".3"),
        (".004", ".01", "1"),
    )
]
FEW_JOINT = [
    f"--lr {lr} --pretext-weight {weight}"
    for lr, weight in (
        (".001", ".03"),
        (".001", ".3"),
        (".001", "1"),
        (".002", ".3"),
        (".004", ".3"),
        (".008", ".3"),
        (".004", "1"),
    )
]
FEW_RATES = [f"--lr {lr}" for lr in (".0005", ".001", ".002", ".004", ".008")]
FEW_TRIALS = {
    "fine-tuned": Trials("pretrain_finetune.py", FEW_PRETRAINING, 8),
    "probed": Trials("linear_probe.py", FEW_PRETRAINING, 7),
    "scratch": Trials(FROM_SCRATCH, FEW_RATES, 3),
    "maml": Trials("maml_ssl.py", FEW_INNER, 5),
    "joint": Trials(JOINT, FEW_JOINT, 4),
}
TUNE_FEW, FEW_ARMS = {}, {}
for arm, trials in FEW_TRIALS.items():
    FEW_ARMS[arm] = f"{trials.chosen} {FEW}"
    for i, flags in enumerate(trials.settings):
        trial = f"{trials.command} {flags} {FEW}-val"
        if arm in ("maml", "joint"):
            trial += f" --steps {FEW_STEPS // 4}"
        TUNE_FEW[f"{arm}-{i}"] = trial
GATE = {arm: f"{FEW_ARMS[arm]}-val" for arm in ("fine-tuned", "scratch")}
FEW_ARMS["maml-both"] = f"{FEW_ARMS['maml']} --pretext-images both"
FEW_ARMS["learned-labels"] = f"{FEW_ARMS['maml']} --pretext learned_labels"
FEW_ARMS["learned-labels"] += " --pretext-weight 0"
# Started from the weights that the fine-tuned model starts from, at its rate
PRETRAIN = FEW_TRIALS["fine-tuned"].chosen.split("--pretrain-steps ")
FEW_ARMS["fine-tuned"] += " --eval-every 15"  # its steps on the desired task are few
FEW_FIRST = {"pretrained": f"{FEW_ARMS['fine-tuned']} --steps {PRETRAIN[1]}"}
FEW_LAST = {}
for arm in ("maml", "joint"):
    start = "--encoder {out}/few/pretrained/seed{seed}/checkpoint.pt --lr .0005"
    start += f" --steps {FEW_STEPS - int(PRETRAIN[1])}"
    FEW_LAST[f"{arm}-pretrained"] = f"{FEW_ARMS[arm]} {start} --eval-every 15"


# --- what is run: several environments ---
# Eight settings for each arm. Chosen is, with seed 100, the best mean accuracy over
# the training environments' validation images after the last step, adapted where the
# arm adapts; of equal ones the first. Where adapting arms have trials within two
# points of the best (CLOSE), the mean of three seeds decides. The new environment
# has no say.
INNER_SETTINGS = [
    f"--lr {lr} --inner-lr {inner_lr} --pretext-weight {weight}"
    for lr, inner_lr, weight in product((".001", ".002"), (1, 3), (".1", ".3"))
]
JOINT_SETTINGS = [
    f"--lr {lr} --pretext-weight {weight}"
    for lr, weight in product((".0005", ".001", ".002", ".004"), (".1", ".3"))
]
SCRATCH_SETTINGS = [f"--lr {lr}" for lr in RATES]
PRETRAINING_SETTINGS = [
    "--lr .001 --pretrain-steps 150",
    "--lr .001 --pretrain-steps 300",
    "--lr .001 --pretrain-steps 450",
    "--lr .002 --pretrain-steps 150",
    "--lr .002 --pretrain-steps 300",
    "--lr .002 --pretrain-steps 450",
    "--lr .0005 --pretrain-steps 300",
    "--lr .004 --pretrain-steps 300",
]
COLORIZATION = "maml_ssl.py --pretext colorization"
RANDOM = "maml_ssl.py --pretext random_labels"
TRIALS = {
    "maml": Trials("maml_ssl.py", INNER_SETTINGS, 6),
    "colorization": Trials(COLORIZATION, INNER_SETTINGS, 3),
    "first-order": Trials("maml_ssl.py --first-order", INNER_SETTINGS, 0),
    "random-labels": Trials(RANDOM, INNER_SETTINGS, 4),
    "joint": Trials(JOINT, JOINT_SETTINGS, 6),
    "scratch": Trials(FROM_SCRATCH, SCRATCH_SETTINGS, 6),
    "fine-tuned": Trials("pretrain_finetune.py", PRETRAINING_SETTINGS, 5),
    "probed": Trials("linear_probe.py", PRETRAINING_SETTINGS, 5),
}
CLOSE = ("maml-0", "maml-1", "maml-2", "maml-6", "colorization-0", "colorization-3")
CHOSEN, SHAPES, TUNE = {}, {}, {}  # SHAPES: what was chosen, on coloured_shapes
for arm, trials in TRIALS.items():
    CHOSEN[arm] = trials.chosen
    SHAPES[arm] = f"{CHOSEN[arm]} --dataset coloured_shapes --steps 1000"
    for i, flags in enumerate(trials.settings):
        trial = f"{flags} --dataset coloured_shapes {TRIAL}"
        TUNE[f"{arm}-{i}"] = f"{trials.command} {trial}"

# Where does the gain end? Other sizes of the support, other K, and folders that
# `write_environments` makes: colour agrees with the label in other shares, or there
# are gray photographs, tinted, in place of shapes.
FOLDER = "--environments --image-size 16 --width 8 --batch-size 128"
FOLDER += " --dataset data/coloured"
OTHERS = {
    "90-10-80": (0.9, 0.1, 0.8),
    "80-40-90": (0.8, 0.4, 0.9),
    "photographs": (0.8, 0.1, 0.9),
}
WHERE = {}
for size in (8, 128, 256):
    WHERE[f"support-{size}"] = f"{SHAPES['maml']} --support-batch-size {size}"
for k in (3, 5):
    WHERE[f"steps-{k}"] = f"{SHAPES['maml']} --inner-steps {k}"
for other in ("90-10-80", "80-40-90"):
    for arm in ("maml", "scratch"):
        WHERE[f"{arm}-{other}"] = f"{CHOSEN[arm]} {FOLDER}-{other} --steps 1000"
# Each other task alone; and each with a loop of its own, which takes the whole step,
# where the mean of four losses gives a task a quarter of it
for task in ("rotation", "masked_autoencoding", "contrastive"):
    WHERE[task] = f"{SHAPES['colorization']} --steps 600 --pretext {task}"
WHERE["per-task"] = f"{SHAPES['maml']} --steps 600 --inner per-task --inner-lr 1"


# --- what is run: who reads a support set, and how? ---
# On coloured_shapes, whose images are drawn anew for each seed. Eight settings for each
# reader (seed 100, validation images of the training environments, mean of the last
# three evaluations), four for `inferred`, where all were alike; with the other sizes
# of the support the same one.
HORIZON = "--dataset coloured_shapes --steps 1000"
LEARNED_SETTINGS = [
    f"--lr {lr} --inner-lr {inner_lr} --pretext-weight 0"
    for lr, inner_lr in product((".001", ".002"), (".3", "1", "3", "10"))
]
READER_SETTINGS = [f"--lr {lr}" for lr in RATES]
# Nash's step is alpha sqrt(T) long whatever the gradients; tried after MAML's alpha, 3,
# with which the test rows (nash-alpha-3) are at chance
NASH_SETTINGS = [
    f"--lr .002 --inner-lr {alpha} --pretext-weight .1" for alpha in (".1", ".3")
]
BEYOND = [  # the best lay in a corner
    "--lr .001 --inner-lr 1 --pretext-weight 1",
    "--lr .001 --inner-lr .3 --pretext-weight .3",
    "--lr .0005 --inner-lr 1 --pretext-weight .3",
]
READER_TRIALS = {
    "context": Trials("results/readers.py --reader context", READER_SETTINGS, 3),
    "inferred": Trials("results/readers.py --reader inferred", READER_SETTINGS, 3),
    "learned-labels": Trials(
        "maml_ssl.py --pretext learned_labels", LEARNED_SETTINGS, 1
    ),
    "learned-loss": Trials("maml_ssl.py --pretext learned_loss", LEARNED_SETTINGS, 2),
    "random-labels": Trials(RANDOM, INNER_SETTINGS, 4),
    "maml": Trials("maml_ssl.py", INNER_SETTINGS + BEYOND, 1),
    "nash": Trials("maml_ssl.py --balance nash", NASH_SETTINGS, 1),
}
TUNE_READERS = {}
for arm, trials in READER_TRIALS.items():
    for i, flags in enumerate(trials.settings):
        trial = f"{flags} {HORIZON} {VALIDATION}"
        TUNE_READERS[f"{arm}-{i}"] = f"{trials.command} {trial}"

# What was chosen, at 1,000 steps. The number after a name: images of an environment
# in all that a step's support has; of four tasks each has its own quarter of them.
READING = {arm: trials.chosen for arm, trials in READER_TRIALS.items()}
SUPPORT = "--support-batch-size"
READERS = {
    "maml-128": f"{SHAPES['maml']} {SUPPORT} 32",
    # tuned again at this horizon, after the contrasts were fixed
    "maml-tuned-128": f"{READING['maml']} {HORIZON} {SUPPORT} 32",
    "maml-32": f"{SHAPES['maml']} {SUPPORT} 8",
    "context-128": f"{READING['context']} {HORIZON} {SUPPORT} 128",
    "context-32": f"{READING['context']} {HORIZON} {SUPPORT} 32",
    "inferred-128": f"{READING['inferred']} {HORIZON} {SUPPORT} 128",
    "inferred-32": f"{READING['inferred']} {HORIZON} {SUPPORT} 32",
    "colorization-128": f"{SHAPES['colorization']} {SUPPORT} 128",
    "random-labels-128": f"{READING['random-labels']} {HORIZON} {SUPPORT} 128",
    # not tuned: the settings of the run above that is most like it
    "told": f"{READING['inferred']} --reader told {HORIZON}",
    "batchnorm-128": f"{READING['context']} --reader batchnorm {HORIZON}",
    "no-pretext-loss": f"{SHAPES['maml']} --pretext-weight 0",
    "nash": f"{READING['nash']} {HORIZON} {SUPPORT} 32",
    "nash-alpha-3": f"{SHAPES['maml']} --balance nash",
    "first-order": SHAPES["first-order"],
}
READERS["normalised"] = READERS["nash"].replace("maml_ssl.py", "results/controls.py")
for arm in ("learned-labels", "learned-loss"):
    for size in (32, 128):
        READERS[f"{arm}-{size}"] = f"{READING[arm]} {HORIZON} {SUPPORT} {size}"
for size in (32, 128):
    name, labels = f"detached-labels-{size}", READERS[f"learned-labels-{size}"]
    labels = labels.replace("maml_ssl.py", "results/controls.py")
    READERS[name] = labels.replace("learned_labels", "detached_labels")
NOT_READING = {arm: SHAPES[arm] for arm in ("scratch", "joint", "fine-tuned", "probed")}
# The arms of the four contrasts that were fixed beforehand have ten seeds, as has MAML
# tuned again; normalised and nash-alpha-3 were run with three, the others with five.
# None was used before
PRIMARY = [
    "maml-128",
    "maml-tuned-128",
    "context-128",
    "context-32",
    "learned-labels-32",
    "detached-labels-128",
]
MORE = {arm: command for arm, command in READERS.items() if arm not in PRIMARY}
MORE |= NOT_READING
# The baselines with the FLOPs of maml-128; where to stop is chosen on the validation
# images of dear-tune. From scratch on tinted photographs too (TINTED).
DEAR = {
    "scratch-long": f"{SHAPES['scratch']} --steps 8800",
    "joint-long": f"{SHAPES['joint']} --steps 2400",
    "fine-tuned-long": f"{SHAPES['fine-tuned']} --steps 8800 --pretrain-steps 3960",
}

# --- what is run: sites, natural photographs with class frequencies of their own ---
# CIFAR-10 at 16 x 16, 32 sites of 1,000 images, tested on these and on 8 new ones; the
# lower the concentration, the more they differ. The sites are drawn with the seed.
# Trials of eight arms (seed 100, the training sites' validation images): the best after
# 1,000 steps went on to 1,500, and gives the temperature of the runs whose name begins
# so. Smaller alphas, and larger ones for inner_prior, were added when the best lay on
# the edge; of learned labels and contrastive it is the smallest. The prior network was
# added when the context network's trials had been seen, log_prior and inner_prior when
# the test rows of three seeds of all others had been, inner_weights last. Contrastive
# was run again: it had been chosen before its last trial had ended.
SITES = "--environments --image-size 16 --width 16 --batch-size 128 --steps 1500"
LEARNED_LABELS = "maml_ssl.py --pretext learned_labels --pretext-weight 0"
CONTRASTIVE = "maml_ssl.py --pretext contrastive --lr .001 --pretext-weight .1"
SITES_RATES = [f"--lr {lr}" for lr in (".001", ".0005", ".002", ".003")]
SITES_LABELS = [
    "--lr .001 --inner-lr 1",
    "--lr .001 --inner-lr .3",
    "--lr .001 --inner-lr .1",
    "--lr .002 --inner-lr .3",
    "--lr .001 --inner-lr .03",
]
SITES_INNER = [f"--inner-lr {inner_lr}" for inner_lr in ("1", ".1", ".01")]
SITES_STEPS = [
    f"--lr .001 --inner-lr {inner_lr} --inner-steps {k}"
    for inner_lr, k in ((3, 1), (10, 1), (1, 5), (3, 5), (30, 1), (10, 5), (100, 1))
]
SITES_WEIGHTS = [
    f"--lr .001 --inner-lr {inner_lr} --inner-steps 1 {SUPPORT} 32"
    for inner_lr in (".1", ".03", ".3", "1", ".01", ".003")
]
SITES_TRIALS = {
    "scratch": Trials(FROM_SCRATCH, SITES_RATES, 0),
    "context": Trials("results/readers.py --reader context", SITES_RATES, 0),
    "prior": Trials("results/readers.py --reader prior", SITES_RATES, 0),
    "log-prior": Trials("results/readers.py --reader log_prior", SITES_RATES, 0),
    "inner-prior": Trials("results/readers.py --reader inner_prior", SITES_STEPS, 4),
    "inner-weights": Trials(
        "results/readers.py --reader inner_weights", SITES_WEIGHTS, 4
    ),
    "learned-labels": Trials(LEARNED_LABELS, SITES_LABELS, 4),
    "contrastive": Trials(CONTRASTIVE, SITES_INNER, 2),
}
SITES_BEST = {arm: f"{trials.chosen} {SITES}" for arm, trials in SITES_TRIALS.items()}
SITES_ARMS = {
    "scratch": SITES_BEST["scratch"],
    "scratch-long": f"{SITES_BEST['scratch']} --steps 3000",  # FLOPs of context-32
    "fine-tuned": f"pretrain_finetune.py --lr .001 --pretrain-steps 500 {SITES}"
    " --source data/tiny-imagenet-32",
    "joint": f"{JOINT} --lr .001 --pretext-weight .1 {SITES}",
    "context-32": f"{SITES_BEST['context']} {SUPPORT} 32",
    "context-128": f"{SITES_BEST['context']} {SUPPORT} 128",
    "prior-32": f"{SITES_BEST['prior']} {SUPPORT} 32",
    "prior-128": f"{SITES_BEST['prior']} {SUPPORT} 128",
    "log-prior-32": f"{SITES_BEST['log-prior']} {SUPPORT} 32",
    "log-prior-128": f"{SITES_BEST['log-prior']} {SUPPORT} 128",
    "inner-prior-32": f"{SITES_BEST['inner-prior']} {SUPPORT} 32",
    "inner-prior-128": f"{SITES_BEST['inner-prior']} {SUPPORT} 128",
    "inner-weights-32": SITES_BEST["inner-weights"],
    "inner-prior-32-long": f"{SITES_BEST['inner-prior']} {SUPPORT} 32 --steps 3000",
    "learned-labels-32": f"{SITES_BEST['learned-labels']} {SUPPORT} 32",
    "learned-labels-128": f"{SITES_BEST['learned-labels']} {SUPPORT} 128",
    "contrastive-32": f"{SITES_BEST['contrastive']} {SUPPORT} 32",
    # not tuned: what contrastive was first run with
    "colorization-32": f"{CONTRASTIVE} --inner-lr .1 {SITES} --pretext colorization",
}
LABELS = SITES_ARMS["learned-labels-32"].replace("maml_ssl.py", "results/controls.py")
SITES_ARMS["detached-labels-32"] = LABELS.replace("learned_labels", "detached_labels")
DOSE = ("scratch", "prior-32", "learned-labels-32")


def at_sites(commands: dict[str, str], concentration: str) -> dict[str, str]:
    """With the folder of sites of each seed, which run_protocol fills in."""
    folder = f"--dataset data/sites-{concentration}-{{seed}}"
    return {arm: f"{command} {folder}" for arm, command in commands.items()}


TUNE_SITES = {}
for arm, trials in SITES_TRIALS.items():
    for i, flags in enumerate(trials.settings):
        trial = f"{trials.command} {flags} {SITES} {VALIDATION}"
        if i != trials.best:
            trial += " --steps 1000"
        TUNE_SITES[f"{arm}-{i}"] = trial

# The settings of coloured_shapes, not tuned again, and MAML with alpha 1 too
TINTED = {}
for arm in ("scratch", "fine-tuned", "joint", "maml", "colorization"):
    flags = f"{FOLDER}-photographs --source shapes --steps 1500"
    TINTED[arm] = f"{CHOSEN[arm]} {flags}"
TINTED["maml-alpha-1"] = f"{TINTED['maml']} --inner-lr 1"
TINTED["scratch-long"] = f"{TINTED['scratch']} --steps 13200"
DEAR_TRIALS = {arm: f"{command} {VALIDATION}" for arm, command in DEAR.items()}
DEAR_TRIALS["tinted-scratch-long"] = f"{TINTED['scratch-long']} {VALIDATION}"


class Protocol(NamedTuple):
    """Each command is run with each seed."""

    seeds: range
    commands: dict[str, str]  # by the name of the run


TUNING = range(100, 103)
PROTOCOLS = {
    "photos": Protocol(range(5), PHOTOS | CONTROLS),
    # other label budgets and a longer horizon, with the settings for 500 and 2,000
    "labels-100": Protocol(range(3), cifar(labels=100)),
    "labels-5000": Protocol(range(3), cifar(labels=5000)),
    "steps-10000": Protocol(range(3), cifar(steps=10000)),
    "moving-tune": Protocol(TUNING[:1], MOVING),
    "tune-photos": Protocol(TUNING, TUNE_PHOTOS),
    "shares": Protocol(TUNING, SHORT),
    "shares-10000": Protocol(TUNING, LONG),
    "tinted": Protocol(range(3), TINTED),
    "tune": Protocol(TUNING[:1], TUNE),
    "tune-again": Protocol(TUNING[1:], {run: TUNE[run] for run in CLOSE}),
    "where": Protocol(range(3), WHERE),
    "tune-few": Protocol(TUNING[:1], TUNE_FEW),
    "gate": Protocol(TUNING, GATE),
    "few": Protocol(range(5), FEW_FIRST | FEW_ARMS | FEW_LAST),
    "tune-readers": Protocol(TUNING[:1], TUNE_READERS),
    "readers": Protocol(range(10, 20), {arm: READERS[arm] for arm in PRIMARY}),
    "readers-more": Protocol(range(10, 15), MORE),
    "tune-sites": Protocol(TUNING[:1], at_sites(TUNE_SITES, "0.2")),
    "sites-0.2": Protocol(range(10, 15), at_sites(SITES_ARMS, "0.2")),
    "sites-1.0": Protocol(
        range(10, 13), at_sites({arm: SITES_ARMS[arm] for arm in DOSE}, "1.0")
    ),
    "sites-inf": Protocol(
        range(10, 13), at_sites({arm: SITES_ARMS[arm] for arm in DOSE}, "inf")
    ),
    "dear-tune": Protocol(TUNING[:1], DEAR_TRIALS),
    "dear": Protocol(range(10, 13), DEAR),
}
