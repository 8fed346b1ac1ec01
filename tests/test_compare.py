"""compare.py on runs written by hand, whose numbers and pictures are known."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

import compare

FINAL = "final accuracy (%)"


def write(
    root,
    name,
    curve,
    seed=0,
    before=0,
    every=10,
    flops=1000,
    adapted=None,
    **config,
):
    """A run with the accuracies `curve`, one each `every` steps, after pretraining.

    before: steps of pretraining. adapted: accuracies beside those of `curve`.
    config: what else config.json has. Returns the path of its metrics.csv.
    """
    lines = [compare.HEADER]
    for step in range(every, before + 1, every):
        lines.append(f"pretrain,{step},{step},1,1,{step * flops},1,2,,,,")
    for i, accuracy in enumerate(curve):
        step, total = i * every, before + i * every
        work = f"target,{step},{total},1,1,{total * flops},1"
        lines.append(f"{work},1.5,{accuracy},{adapted[i] if adapted else ''},,")
    steps = before + every * (len(curve) - 1)
    told = {"arm": "any", "dataset": "shapes", "eval_on": "test", "steps": steps}
    told |= {"seed": seed, "classes": ["a", "b"], "environments": [""]} | config
    folder = Path(root, name, f"seed{seed}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder / "metrics.csv"


def write_two_arms(root):
    """Two seeds of MAML, at 0.5 after 40 steps, and of an arm that ends with it."""
    for seed in (0, 1):
        rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        write(root, "maml_ssl-shapes", rising, seed, flops=3000)
        write(root, "pretrain_finetune-shapes", [0.1, 0.3, 0.5], seed, before=80)


def arms_of(root):
    """The arms of the one dataset below `root`."""
    (arms,) = compare.group(compare.read([root])).values()
    return arms


def cells(text):
    """A Markdown table as {first cell of a row: {column: cell}}."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if "|" in line]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def table_of(root, baseline=None):
    return cells(compare.table(arms_of(root), baseline, [40, 50]))


def small_axes():
    return Figure(figsize=(4.2, 2.5), layout="constrained").subplots()


def figure_of(root):
    """The axes of the figure of the one dataset below `root`, laid out."""
    with rc_context(compare.STYLE):
        figure = compare.make_figure(arms_of(root), "total_step", "shapes")
        figure.draw_without_rendering()
    return figure.axes[0]


def boxes(ax):
    """{text: its box} for all that is written in `ax`, in pixels, links left out."""
    return {text.get_text(): Text.get_window_extent(text) for text in ax.texts}


def assert_legible(ax):
    """No two labels overlap, and all are inside the figure and right of `ax`."""
    found = list(boxes(ax).values())
    edges = np.sort([box.intervaly for box in found], axis=0).ravel()
    assert len(found) == len(ax.texts)  # no two are the same
    assert np.diff(edges).min() > 0
    assert edges[0] >= 0
    assert edges[-1] <= ax.figure.bbox.height
    assert max(box.x1 for box in found) <= ax.figure.bbox.width
    assert min(box.x0 for box in found) > ax.get_window_extent().x1


# --- statistics ---
def density_within(t, df):
    """How much of Student's distribution lies within -t to t."""
    x = np.linspace(-t, t, 100_001)
    factor = math.gamma((df + 1) / 2) / math.gamma(df / 2)
    density = factor / math.sqrt(df * math.pi) * (1 + x**2 / df) ** (-(df + 1) / 2)
    return np.sum(density[1:] + density[:-1]) / 2 * (x[1] - x[0])


def test_the_t_values_hold_95_percent_of_student_s_distribution():
    for df, t in enumerate(compare.T95, start=1):
        assert density_within(t, df) == pytest.approx(0.95, abs=5e-6)


def test_the_interval_is_the_one_computed_by_hand():
    # 1, 2, 3: mean 2, standard deviation 1, half width 4.303 / sqrt(3) = 2.484
    assert compare.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2.484), abs=1e-3)
    assert np.isnan(compare.mean_interval([5.0])[1])


def test_the_interval_of_more_than_ten_seeds_is_a_bit_too_wide():
    values = np.arange(20.0)  # t of NIST's handbook for 19 degrees of freedom: 2.093
    exact = 2.093 * np.std(values, ddof=1) / np.sqrt(20)
    assert exact < compare.mean_interval(values)[1] < 1.1 * exact


def test_the_first_time_is_linear_between_evaluations_or_never():
    def found(*accuracy):  # at x = 0, 10, 20, ...
        x = 10 * np.arange(len(accuracy))
        return compare.first_time(x, np.array(accuracy), 0.5)

    assert found(0.1, 0.3, 0.6, 0.7) == pytest.approx(10 + 20 / 3)  # from 0.3 to 0.6
    assert found(0.1, 0.6, 0.4, 0.9) == pytest.approx(8)  # the first time
    assert found(0.1, 0.5) == 10  # equal is there
    assert found(0.6, 0.4) == 0  # there at once
    assert found(0.1, 0.4) == found(0.4) == np.inf


def test_the_ratio_is_the_geometric_mean_with_its_interval():
    # log ratios 0.9, 1 and 1.1: half width 4.30265 * 0.1 / sqrt(3) = 0.24842
    times = 100 * np.exp([0.9, 1.0, 1.1])
    base = np.full(3, 100.0)
    assert compare.ratio(times, base) == "2.72 (2.12 to 3.48)"
    assert compare.ratio([200], [100]) == "2.00"
    assert compare.ratio(times, [100, 100, np.inf]) == ""
    assert compare.ratio([0.0], [100]) == ""
    assert compare.ratio([], []) == ""


# --- table ---
def test_the_table_has_the_times_computed_by_hand_and_no_empty_column(tmp_path):
    curve = [0.1, 0.6, 0.4, 0.8, 0.9]  # at 0.4 after 6 steps, at 0.5 after 8
    write(tmp_path, "maml", curve, flops=3000)
    row = {"arm": "maml", "seeds": "1", FINAL: "90.0"}
    row |= {"steps to 40%": "6", "steps to 50%": "8"}
    assert table_of(tmp_path)["maml"] == row
    write(tmp_path, "tuned", [0.1, 0.3, 0.5], before=80)  # 100 steps in all
    row |= {"ratio of steps to 50%": "0.08", "ratio of FLOPs to 50%": "0.24"}
    assert table_of(tmp_path, "tuned")["maml"] == row
    assert compare.table(arms_of(tmp_path), "tuned", []).count("steps") == 0


def test_an_adapted_arm_has_a_row_of_its_own(tmp_path):
    for seed, adapted in enumerate([0.7, 0.9]):
        write(tmp_path, "maml", [0.1, 0.4], seed, adapted=[0.1, adapted])
    write(tmp_path, "scratch", [0.1, 0.5])
    table = table_of(tmp_path)
    assert [*table] == ["maml", "maml, adapted", "scratch"]
    assert table["maml"][FINAL] == "40.0 ± 0.0"
    assert table["maml"]["steps to 50%"] == "0 of 2 seeds"
    # 70, 90: standard deviation 14.14, half width 12.706 * 14.14 / sqrt(2) = 127.1
    assert table["maml, adapted"][FINAL] == "80.0 ± 127.1"
    # 4 / 6 and 4 / 8 of 10 steps
    assert table["maml, adapted"]["steps to 50%"] == "6 ± 11"


def test_each_seed_is_paired_with_the_baseline_of_its_own_seed(tmp_path):
    for seed, every in enumerate([10, 20, 40]):
        write(tmp_path, "tuned", [0.1, 0.3, 0.5], seed, every=every)
        write(tmp_path, "maml", [0.1, 0.5], seed, every=every)
        write(tmp_path, "lost", [0.1, 0.4 + 0.1 * seed], seed + 1)  # of 1, 2 and 3
    table = table_of(tmp_path, "tuned")
    # 10, 20, 40: standard deviation 15.3, half width 4.303 * 15.3 / sqrt(3) = 37.9
    assert table["maml"]["steps to 50%"] == "23 ± 38"
    assert table["maml"]["ratio of steps to 50%"] == "0.50 (0.50 to 0.50)"
    assert table["lost"]["steps to 50%"] == "2 of 3 seeds"
    assert table["lost"]["ratio of steps to 50%"] == ""


def test_an_arm_against_itself_has_the_ratio_1(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(5):
        curve = np.linspace(0.1, 0.6, 11) + rng.normal(0, 0.02, 11)
        write(tmp_path, "one", curve, seed)
        write(tmp_path, "copy", curve, seed)
    for row in table_of(tmp_path, "one").values():
        assert row["ratio of steps to 50%"] == "1.00 (1.00 to 1.00)"
        assert row["ratio of FLOPs to 50%"] == "1.00 (1.00 to 1.00)"


def test_targets_lie_between_the_lowest_start_and_the_baseline_s_end(tmp_path):
    write(tmp_path, "slow", [0.1, 0.4])
    write(tmp_path, "tuned", [0.2, 0.6])
    arms = arms_of(tmp_path)  # 60, 80 and 95% of the way
    assert compare.choose_targets(arms, "slow") == [28, 34, 38]
    assert compare.choose_targets(arms, "tuned") == [40, 50, 58]
    assert compare.choose_targets(arms, None) == [40, 50, 58]  # the highest end
    assert compare.choose_targets(arms, "of another dataset") == [40, 50, 58]


def test_a_csv_of_results_and_run_directories_give_the_same_table(tmp_path):
    write_two_arms(tmp_path / "runs")
    lines = [f"run,seed,{compare.HEADER}"]
    for path in sorted(tmp_path.rglob("metrics.csv")):
        name = path.parts[-3].removesuffix("-shapes")
        seed = path.parts[-2].removeprefix("seed")
        rows = path.read_text().splitlines()[1:]
        lines += [f"{name},{seed},{row}" for row in rows]
    (tmp_path / "shapes.csv").write_text("\n".join(lines) + "\n")
    compare.main([str(tmp_path / "runs")])
    compare.main([str(tmp_path / "shapes.csv")])
    table = (tmp_path / "shapes.md").read_text()
    assert table == (tmp_path / "runs" / "shapes.md").read_text()
    assert "| 38 ± 0 " in table  # to 48%, 95% of the way from 10 to 50


def test_the_baseline_is_the_one_fine_tuned_arm_or_the_one_named(tmp_path, capsys):
    def ratio(*argv):
        compare.main([str(tmp_path), "--targets", "40", "20", *argv])
        return cells(capsys.readouterr().out)["maml_ssl"].get("ratio of steps to 40%")

    write_two_arms(tmp_path)
    scratch = "pretrain_finetune-shapes-pretrain_steps=0"
    write(tmp_path, scratch, [0.1, 0.4])
    assert ratio() == "0.32 (0.32 to 0.32)"  # 30 / 95
    assert ratio("--baseline", scratch.replace("-shapes", "")) == "3.00"  # 30 / 10
    write(tmp_path, "pretrain_finetune-shapes-lr=0.1", [0.1, 0.4], before=10)
    assert ratio() is None  # now there are two
    assert "--baseline ARM" in (tmp_path / "shapes.md").read_text()


# --- what is read and written ---
def test_each_dataset_has_its_files_which_are_named_and_val_is_apart(tmp_path, capsys):
    write_two_arms(tmp_path)
    write(tmp_path, "maml_ssl-my-own-lr=0.1", [0.1, 0.2], dataset="/data/my-own/")
    write(tmp_path, "maml_ssl-shapes-eval_on=val", [0.1, 0.9], eval_on="val")
    out = tmp_path / "new"
    compare.main([str(tmp_path), "--out", str(out)])
    said = capsys.readouterr().out
    assert "| maml_ssl-lr=0.1 " in said  # less the dataset
    finals = {"shapes": "60.0 ± 0.0", "my-own": "20.0", "shapes-val": "90.0"}
    for dataset, final in finals.items():
        paths = [out / f"{dataset}.{kind}" for kind in ("md", "png", "pdf")]
        assert f"wrote {', '.join(map(str, paths))}" in said.splitlines()
        table, png, pdf = (path.read_bytes() for path in paths)
        assert table.decode() in said
        assert f"| {final} " in table.decode()
        signature, width = struct.unpack(">8s8xI", png[:20])
        assert signature == b"\x89PNG\r\n\x1a\n"
        assert width == 1650  # 5.5 inches at 300 dpi
        assert pdf[:5] == b"%PDF-"
    assert len([*out.iterdir()]) == 9


def test_other_tables_beside_a_log_are_not_read(tmp_path):
    path = write(tmp_path, "maml", [0.1, 0.6])
    path.with_name("environments.csv").write_text("environment,accuracy\n0,0.5\n")
    assert table_of(tmp_path)["maml"][FINAL] == "60.0"


def test_unfinished_seeds_are_left_out_beside_finished_ones(tmp_path, capsys):
    write(tmp_path, "maml", [0.1, 0.6])
    write(tmp_path, "maml", [0.1, 0.2], seed=1, steps=99)
    (row,) = table_of(tmp_path).values()
    assert (row["seeds"], row[FINAL]) == ("1", "60.0")
    (line,) = capsys.readouterr().err.splitlines()
    assert str(Path("maml", "seed1")) in line
    assert "unfinished" in line


def test_a_run_that_is_not_finished_is_marked_in_table_and_figure(tmp_path, capsys):
    write(tmp_path, "done", [0.1, 0.6])
    write(tmp_path, "alone", [0.1, 0.3], adapted=[0.1, 0.5], steps=99)
    write(tmp_path, "pretrains", [], before=20, steps=99)  # no accuracy yet
    table = table_of(tmp_path)
    alone = {"alone (unfinished)", "alone (unfinished), adapted"}
    assert set(table) == {"done"} | alone
    assert table["alone (unfinished)"][FINAL] == "30.0"
    written = set(boxes(figure_of(tmp_path)))
    marked = {"alone (unfinished), adapted", "alone (unfinished), not adapted"}
    assert written == {"done"} | marked
    assert capsys.readouterr().err == ""  # nothing is left out


def test_an_unfinished_baseline_is_marked_too(tmp_path, capsys):
    name = "pretrain_finetune-shapes"
    write(tmp_path, name, [0.1, 0.3], before=80, steps=999)
    compare.main([str(tmp_path)])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("shapes, baseline: pretrain_finetune (unfinished); ")


# --- figure ---
def test_an_arm_that_adapts_has_two_curves_of_one_colour(tmp_path):
    write(tmp_path, "a", [0.1, 0.3], adapted=[0.2, 0.8])
    write(tmp_path, "b", [0.1, 0.5])
    ax = figure_of(tmp_path)
    adapted, plain, other = ax.lines
    assert adapted.get_ydata() == pytest.approx([20, 80])
    assert plain.get_ydata() == pytest.approx([10, 30])
    assert other.get_ydata() == pytest.approx([10, 50])
    assert adapted.get_color() == plain.get_color() != other.get_color()
    assert adapted.get_linestyle() == other.get_linestyle() == "-"
    assert plain.get_linestyle() == "--"
    assert adapted.get_marker() != other.get_marker()
    colours = {text.get_text(): text.get_color() for text in ax.texts}
    ours = adapted.get_color()
    assert colours.pop("b") == other.get_color()
    assert colours == {"a, adapted": ours, "a, not adapted": ours}


def test_labels_of_curves_that_are_the_same_are_legible(tmp_path):
    curve = [0.1, 0.4, 0.7]
    write(tmp_path, "maml_ssl-shapes-lr=0.1", curve, adapted=curve)
    ax = figure_of(tmp_path)
    upper, lower = "maml_ssl\nlr=0.1, adapted", "maml_ssl\nlr=0.1, not adapted"
    assert set(boxes(ax)) == {upper, lower}
    assert boxes(ax)[upper].y0 > boxes(ax)[lower].y1
    assert_legible(ax)


def test_the_figure_is_as_high_as_many_labels_need(tmp_path):
    for i in range(16):
        name = f"maml_ssl-shapes-lr={i}"
        write(tmp_path, name, [0.1, 0.5], adapted=[0.1, 0.6])
    ax = figure_of(tmp_path)
    assert len(ax.texts) == 32
    assert_legible(ax)


def test_the_first_56_arms_look_different(tmp_path):
    for i in range(56):
        write(tmp_path, f"arm{i}", [0.1, 0.5])
    with rc_context(compare.STYLE):
        curves = compare.draw(small_axes(), arms_of(tmp_path), "total_step")
    looks = {(curve.get_color(), curve.get_marker()) for curve in curves}
    assert len(looks) == 56


def test_a_curve_is_the_mean_over_seeds_as_far_as_all_got(tmp_path):
    write(tmp_path, "maml", [0.2, 0.4, 0.2, 0.9])  # at 0, 10, 20 and 30 steps
    write(tmp_path, "maml", [0.1, 0.3], seed=1, every=20)  # at 0 and 20
    ax = small_axes()
    (curve,) = compare.draw(ax, arms_of(tmp_path), "total_step")
    assert curve.get_xydata() == pytest.approx(np.array([[0, 15], [10, 30], [20, 25]]))
    # at 10: 40 and 20, standard deviation 14.14, half width 127.06
    band = ax.collections[0].get_paths()[0].vertices
    top = band[band[:, 0] == 10][:, 1].max()
    assert top == pytest.approx(30 + 127.06, abs=0.01)


def test_a_curve_begins_after_pretraining_which_is_dotted(tmp_path):
    write(tmp_path, "tuned", [0.1, 0.3, 0.5], before=80)
    for column, x in {"total_step": 80, "flops": 80000, "step": 0}.items():
        ax = small_axes()
        (curve,) = compare.draw(ax, arms_of(tmp_path), column)
        assert curve.get_xdata()[0] == x
        _, dotted = ax.collections
        assert dotted.get_segments()[0] == pytest.approx(np.array([[0, 10], [x, 10]]))
        assert dotted.get_linestyle()[0][1] is not None  # it is not solid
        written = [text.get_text() for text in ax.texts]
        assert written == (["dotted: pretraining"] if x else [])


def test_draw_takes_the_accuracy_and_the_colours_that_it_is_given(tmp_path):
    write(tmp_path, "maml", [0.1, 0.3], adapted=[0.2, 0.8])
    ax, colours = small_axes(), {"maml": "#123456"}
    arms = arms_of(tmp_path)
    (curve,) = compare.draw(ax, arms, "flops", "accuracy_adapted", colours)
    assert curve.get_xydata() == pytest.approx(np.array([[0, 20], [10000, 80]]))
    assert curve.get_color() == "#123456"
    band = ax.collections[0].get_facecolor()[0]
    assert tuple(band[:3]) == to_rgba("#123456")[:3]


def test_a_single_short_run_is_labelled_at_the_end_of_its_curve(tmp_path, capsys):
    path = write(tmp_path, "maml_ssl-shapes", [0.1, 0.2, 0.3])
    compare.main([str(path)])
    assert cells(capsys.readouterr().out)["maml_ssl"][FINAL] == "30.0"
    ax = figure_of(tmp_path)
    box = boxes(ax)["maml_ssl"]
    _, end = ax.transData.transform((20, 30))
    assert (box.y0 + box.y1) / 2 == pytest.approx(end, abs=3)  # pixels


@pytest.mark.parametrize("end", [1, 55, 100])  # near the bottom, the middle, the top
def test_labels_do_not_overlap_and_stay_beside_the_axis(end):
    ax = small_axes()
    ax.set_ylim(0, 110)
    curves = []
    for i, label in enumerate(["a", "b\nx=1\ny=2", "c\nx=1", "d", "e", "f\nx=1"]):
        curves += ax.plot([0, 1], [50, end + i / 9], label=label)
    compare.label_ends(ax, curves)
    ax.figure.draw_without_rendering()
    assert_legible(ax)
    frame = ax.get_window_extent()
    assert min(box.y0 for box in boxes(ax).values()) > frame.y0 - 3
    assert max(box.y1 for box in boxes(ax).values()) < frame.y1 + 8


# --- errors ---
def refused(capsys, argv, *said):
    """compare.py must end with code 2 and one line in which all of `said` stands."""
    with pytest.raises(SystemExit) as ended:
        compare.main([str(word) for word in argv])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: ")
    for words in said:
        assert words in line


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("metrics.csv", ",accuracy_adapted", "", "'accuracy_adapted'"),
        ("metrics.csv", ",0.2,,,\n", ",0.", "(cut off)"),
        ("metrics.csv", ",0.2,,,\n", ",much,,,\n", "much"),
        ("config.json", '"dataset"', '"data"', "'dataset'"),
        ("config.json", "{", "", "JSON"),
    ],
)
def test_a_spoiled_run_is_refused_in_one_line(tmp_path, capsys, file, old, new, said):
    path = write(tmp_path, "maml", [0.1, 0.2])
    spoiled = path.with_name(file)
    spoiled.write_text(spoiled.read_text().replace(old, new, 1))
    refused(capsys, [path.parent], str(path), said)


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    refused(capsys, [tmp_path], str(tmp_path), "run an arm")
    refused(capsys, [tmp_path / "nothing"], str(tmp_path / "nothing"))
    write_two_arms(tmp_path)
    arms = "['maml_ssl', 'pretrain_finetune']"
    refused(capsys, [tmp_path, "--baseline", "me"], "me", arms)
    refused(capsys, [tmp_path, "--targets", "half"], "half")
    refused(capsys, [tmp_path, "--x", "epochs"], "epochs", "total_step")
    refused(capsys, [tmp_path, tmp_path], "seed0", "one run")
