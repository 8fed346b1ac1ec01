"""The picture of one outer step, results/outer_step.png."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# --- the picture of one outer step ---
INSIDE, OUTSIDE, LEARNED = "#DCEAF5", "#FBE6D4", "#E3EFE3"
FORWARD, BACK = "0.3", "#D55E00"


class Box(NamedTuple):
    """A box of the picture; lengths in inches."""

    left: float
    bottom: float
    width: float
    height: float
    colour: str
    text: str


START = r"""initial weights $w_0$:
encoder $\theta$ and
head $\phi_t$ of task $t$"""
LOOP = r"""$\bf{inner\ loop}$, $K$ times

$w_{k+1} = w_k - \alpha\,\nabla L_t(w_k)$

$L_t$: loss of pretext task $t$
$\alpha$: size of a step"""
MODEL = r"""encoder with weights $w_K$,
classifier $\psi$ (not adapted)"""
LOSS = r"""$\bf{outer\ loss}$

cross-entropy
$+\ \beta\,L_t(w_0)$

$\beta$: a weight"""
WAY_BACK = r"""Orange: the gradient of the
outer loss, back through all
$K$ steps (second order).
Along it AdamW moves $w_0$
and $\psi$."""
BOXES = [
    Box(0.08, 1.22, 0.95, 0.55, INSIDE, "support images\nno labels"),
    Box(1.37, 1.22, 1.35, 0.55, INSIDE, "pretext task $t$ makes\ninputs and targets"),
    Box(1.37, 2.2, 1.35, 0.62, LEARNED, START),
    Box(3.3, 1.22, 1.75, 1.6, INSIDE, LOOP),
    Box(0.08, 0.1, 0.95, 0.55, OUTSIDE, "query images\nwith labels"),
    Box(3.3, 0.1, 1.75, 0.55, LEARNED, MODEL),
    Box(5.92, 0.1, 1.2, 1.67, OUTSIDE, LOSS),
]
ARROWS = [  # from, to, colour
    ((1.03, 1.5), (1.37, 1.5), FORWARD),  # support -> pretext task -> inner loop
    ((2.72, 1.5), (3.3, 1.5), FORWARD),
    ((1.03, 0.375), (3.3, 0.375), FORWARD),  # query -> model
    ((2.72, 2.6), (3.3, 2.6), FORWARD),  # initial weights -> inner loop
    ((3.3, 2.42), (2.72, 2.42), BACK),
    ((4.1, 1.22), (4.1, 0.65), FORWARD),  # inner loop -> model
    ((4.25, 0.65), (4.25, 1.22), BACK),
    ((5.05, 1.55), (5.92, 1.55), FORWARD),  # inner loop -> outer loss
    ((5.92, 1.4), (5.05, 1.4), BACK),
    ((5.05, 0.43), (5.92, 0.43), FORWARD),  # model -> outer loss
    ((5.92, 0.28), (5.05, 0.28), BACK),
]
WORDS = [  # left, bottom, text, colour
    (2.93, 2.65, "$w_0$", "black"),
    (3.88, 0.91, "$w_K$", "black"),
    (5.32, 1.62, "$L_t(w_0)$", "black"),
    (5.11, 0.5, "cross-entropy", "black"),
    (5.25, 2.02, WAY_BACK, BACK),
]


def draw_step(path: Path) -> None:
    """One outer step: what goes forward, and the way of the gradient back."""
    width, height = 7.2, 2.92
    figure = Figure((width, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    for box in BOXES:
        corner = (box.left, box.bottom)
        look = {"boxstyle": "round,pad=0,rounding_size=0.06"}
        look |= {"fc": box.colour, "ec": FORWARD, "lw": 0.8}
        ax.add_patch(FancyBboxPatch(corner, box.width, box.height, **look))
        middle = (box.left + box.width / 2, box.bottom + box.height / 2)
        ax.text(*middle, box.text, size=8, ha="center", va="center")
    for start, end, colour in ARROWS:
        look = {"arrowstyle": "-|>", "color": colour, "lw": 1.2}
        look |= {"shrinkA": 1, "shrinkB": 1}
        ax.annotate("", end, start, arrowprops=look)
    for left, bottom, text, colour in WORDS:
        ax.text(left, bottom, text, size=8, color=colour)
    figure.savefig(path, dpi=300)
