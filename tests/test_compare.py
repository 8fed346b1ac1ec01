"""compare.py on runs written by hand, whose crossings, intervals and pictures are known."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import compare

FINAL, STEPS = "final accuracy (%)", "steps to the baseline's final accuracy"


def write(root, name, curve, seed=0, before=0, every=10, flops=1000, adapted="", **arguments):
    """A run with the accuracies `curve`, one each `every` steps, after `before` of pretraining."""
    rows = [f"pretrain,{t},{t},1,1,{t * flops},1,2,,,," for t in range(every, before + 1, every)]
    for i, accuracy in enumerate(curve):
        total = before + i * every
        rows.append(f"target,{i * every},{total},1,1,{total * flops},1,1.5,{accuracy},{adapted},,")
    told = {"name": name, "dataset": "shapes", "eval_on": "test", "seed": seed}
    told |= {"steps": before + every * len(curve) - every} | arguments
    folder = Path(root, name, f"seed{seed}")
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([compare.HEADER, *rows]) + "\n")
    (folder / "config.json").write_text(json.dumps({"arm": "any"} | told))
    return folder / "metrics.csv"


def write_two_arms(root):
    """Two seeds of MAML, which gets to 0.5 at step 40, and of fine-tuning, which ends with it."""
    for seed in (0, 1):
        write(root, "maml_ssl-shapes", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], seed, flops=3000)
        write(root, "pretrain_finetune-shapes", [0.1, 0.3, 0.5], seed, before=80)


def cells(text):
    """A Markdown table as {first cell of a row: {column: cell}}."""
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if "|" in x]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def table_of(root, baseline=None):
    (arms,) = compare.group(compare.read([root])).values()
    return cells(compare.table(arms, baseline))


def draw(root, column="total_step", **options):
    (arms,) = compare.group(compare.read([root])).values()
    ax = Figure(figsize=(4.2, 2.5), layout="constrained").subplots()
    return ax, compare.draw(ax, arms, column, **options)


def label_edges(ax, ends):
    """Write the labels; -> bottom and top of each, from the lowest up, in pixels."""
    compare.label_ends(ax, ends)
    ax.figure.draw_without_rendering()
    return np.sort([Text.get_window_extent(text).intervaly for text in ax.texts], axis=0).ravel()


def test_t_values_are_the_published_ones_and_the_interval_is_the_one_by_hand():
    for df, level, t in [(1, 0.95, 12.706), (4, 0.95, 2.776), (30, 0.95, 2.042), (5, 0.99, 4.032)]:
        assert compare.t_critical(df, level) == pytest.approx(t, abs=6e-4)  # t of NIST's handbook
    # 1, 2, 3: mean 2, standard deviation 1, half width 4.303 / sqrt(3) = 2.484
    assert compare.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2.484), abs=1e-3)
    assert np.isnan(compare.mean_interval([5.0])[1])


def test_first_for_good_is_the_last_crossing_or_never():
    def found(*accuracy):  # at x = 0, 10, 20, ...
        return compare.first_for_good(10 * np.arange(len(accuracy)), np.array(accuracy), 0.5)

    assert found(0.1, 0.3, 0.6, 0.7) == pytest.approx(10 + 20 / 3)  # between 0.3 and 0.6
    assert found(0.1, 0.6, 0.4, 0.9) == pytest.approx(22)  # there, below again, there for good
    assert found(0.1, 0.5) == 10 and found(0.6, 0.5, 0.7) == 0  # equal is there
    assert np.isnan(found(0.1, 0.6, 0.4))  # below at the end


def test_the_table_has_the_crossing_computed_by_hand_and_no_empty_column(tmp_path):
    write(tmp_path, "maml", [0.1, 0.6, 0.4, 0.8, 0.9], flops=3000)  # 0.5 for good at 20 + 10 / 4
    row = {"arm": "maml", "seeds": "1", FINAL: "90.0"}
    assert table_of(tmp_path)["maml"] == row
    write(tmp_path, "tuned", [0.1, 0.3, 0.5], before=80, adapted=0.7)  # 100 steps
    row |= {STEPS: "22", "ratio of steps": "0.23", "ratio of FLOPs": "0.68"}
    table = table_of(tmp_path, "tuned")
    assert table["maml"] == row | {"adapted (%)": ""} and table["tuned"]["adapted (%)"] == "70.0"


def test_each_seed_is_paired_with_the_baseline_of_its_own_seed(tmp_path):
    for seed, end in enumerate([0.3, 0.5, 0.7]):
        write(tmp_path, "tuned", [0.1, 0.2, end], seed, before=80)
        write(tmp_path, "maml", [round(0.1 * k, 1) for k in range(10)], seed)  # 0.3 at 30, ...
        write(tmp_path, "lost", [0.1, 0.6], seed + 1)  # of seeds 1, 2 and 3
    table = table_of(tmp_path, "tuned")
    # 30, 50, 70: standard deviation 20, half width 4.303 * 20 / sqrt(3) = 49.7
    assert (table["maml"][STEPS], table["maml"]["ratio of steps"]) == ("50 ± 50", "0.50 ± 0.50")
    assert (table["lost"][STEPS], table["lost"]["ratio of steps"]) == ("1 of 2 seeds", "")


def test_a_csv_of_results_and_run_directories_give_the_same_table(tmp_path):
    write_two_arms(tmp_path / "runs")
    lines = [f"run,seed,{compare.HEADER}"]
    for path in sorted(tmp_path.rglob("metrics.csv")):
        name, seed = path.parts[-3].removesuffix("-shapes"), path.parts[-2].removeprefix("seed")
        lines += [f"{name},{seed},{row}" for row in path.read_text().splitlines()[1:]]
    (tmp_path / "shapes.csv").write_text("\n".join(lines) + "\n")
    for path in ("runs", "shapes.csv"):
        compare.main([str(tmp_path / path)])
    table = (tmp_path / "shapes.md").read_text()
    assert table == (tmp_path / "runs" / "shapes.md").read_text() and "| 40 ± 0 " in table


def test_the_baseline_is_the_one_fine_tuned_arm_or_the_one_named(tmp_path, capsys):
    def steps(*argv):
        compare.main([str(tmp_path), *argv])
        return cells(capsys.readouterr().out)["maml_ssl"].get(STEPS)

    write_two_arms(tmp_path)
    write(tmp_path, "pretrain_finetune-shapes-pretrain_steps=0", [0.1, 0.4])
    assert steps() == "40 ± 0" and steps("--baseline", "pretrain_finetune-pretrain_steps=0") == "30"
    write(tmp_path, "pretrain_finetune-shapes-lr=0.1", [0.1, 0.4], before=10)  # now there are two
    assert steps() is None and "--baseline" in (tmp_path / "shapes.md").read_text()


def test_each_dataset_has_its_figure_and_table_and_val_is_apart_from_test(tmp_path, capsys):
    write_two_arms(tmp_path)
    write(tmp_path, "maml_ssl-my-own-lr=0.1", [0.1, 0.2], dataset="/data/my-own/")
    write(tmp_path, "maml_ssl-shapes-eval_on=val", [0.1, 0.9], eval_on="val")
    compare.main([str(tmp_path), "--out", str(tmp_path / "new")])
    said = capsys.readouterr().out
    assert "| maml_ssl-lr=0.1 " in said  # less the dataset
    for dataset, final in {"shapes": "60.0 ± 0.0", "my-own": "20.0", "shapes-val": "90.0"}.items():
        files = [tmp_path / "new" / f"{dataset}.{kind}" for kind in ("md", "png", "pdf")]
        table, png, pdf = (file.read_bytes() for file in files)
        assert table.decode() in said and f"| {final} " in table.decode() and pdf[:5] == b"%PDF-"
        assert struct.unpack(">8s8xI", png[:20]) == (b"\x89PNG\r\n\x1a\n", 1260)  # 300 dpi


def test_unfinished_seeds_are_left_out_beside_finished_ones_and_else_used(tmp_path, capsys):
    write(tmp_path, "maml", [0.1, 0.6])
    write(tmp_path, "maml", [0.1, 0.2], seed=1, steps=99)
    write(tmp_path, "alone", [0.1, 0.3], steps=99)
    write(tmp_path, "pretrains", [], before=20, steps=99)  # no accuracy yet
    finals = {arm: row[FINAL] for arm, row in table_of(tmp_path).items()}
    assert finals == {"maml": "60.0", "alone": "30.0"}
    (line,) = capsys.readouterr().err.splitlines()
    assert str(Path("maml", "seed1")) in line


def test_a_curve_is_the_mean_over_seeds_on_the_union_of_their_steps(tmp_path):
    write(tmp_path, "maml", [0.1, 0.3], every=20)
    write(tmp_path, "maml", [0.2, 0.4, 0.2], seed=1)
    ax, _ = draw(tmp_path)
    assert ax.lines[0].get_xydata() == pytest.approx(np.array([[0, 15], [10, 30], [20, 25]]))
    # at 10: 20 and 40, standard deviation 14.14, half width 12.706 * 14.14 / sqrt(2) = 127.06
    band = ax.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 10][:, 1].max() == pytest.approx(30 + 127.06, abs=0.01)


def test_a_curve_begins_after_pretraining_which_is_dotted(tmp_path):
    write(tmp_path, "tuned", [0.1, 0.3, 0.5], before=80)
    for column, x in {"total_step": 80, "flops": 80000, "step": 0}.items():
        ax, ends = draw(tmp_path, column, colours={"tuned": "#123456"})
        assert ax.lines[0].get_xdata()[0] == x and ends[0][3] == "#123456"
        parts = [part.get_segments() for part in ax.collections[1:]]
        assert [[*segment[:, 0]] for (segment,) in parts] == ([[0, x]] if x else [])


def test_a_single_short_run_is_labelled_at_the_end_of_its_curve(tmp_path, capsys):
    compare.main([str(write(tmp_path, "maml_ssl-shapes", [0.1, 0.2, 0.3]))])
    assert cells(capsys.readouterr().out)["maml_ssl"][FINAL] == "30.0"
    ax, ends = draw(tmp_path)
    (bottom, top), end = label_edges(ax, ends), ax.transData.transform((20, 30))[1]
    assert ax.texts[0].get_text() == "maml_ssl" and abs((bottom + top) / 2 - end) < 3  # pixels


def test_labels_do_not_overlap_and_stay_beside_the_axis():
    for end in (1, 55, 100):  # near the bottom, in the middle, near the top
        ax = Figure(figsize=(4.2, 2.5), layout="constrained").subplots()
        ax.set_ylim(0, 110)
        labels = ["a", "b\nx=1\ny=2", "c\nx=1", "d", "e", "f\nx=1"]
        edges = label_edges(ax, [(end + i / 9, 0.5, name, "C0") for i, name in enumerate(labels)])
        box = ax.get_window_extent()
        assert np.diff(edges).min() > 0 and edges[0] > box.y0 - 3 and edges[-1] < box.y1 + 8


def refused(capsys, argv, *said):
    """compare.py must end with exit code 2 and one line in which all of `said` stands."""
    with pytest.raises(SystemExit) as ended:
        compare.main([str(word) for word in argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("compare.py: ")
    assert all(word in line for word in said), line


def test_a_spoiled_log_is_refused_by_name_in_one_line(tmp_path, capsys):
    for i, (file, old, new, said) in enumerate([
        ("metrics.csv", ",pretext_loss,pretext_loss_adapted\n", "\n", "accuracy_adapted', not"),
        ("metrics.csv", ",0.2,,,\n", ",0.", "11 fields"),  # a torn line
        ("config.json", '"dataset"', '"data"', "config.json has no 'dataset'"),
    ]):  # fmt: skip
        path = write(tmp_path / str(i), "maml", [0.1, 0.2])
        text = path.with_name(file).read_text()
        path.with_name(file).write_text(text.replace(old, new, 1))
        refused(capsys, [path.parent], str(path), said)


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    refused(capsys, [tmp_path], str(tmp_path), "run an arm")
    write_two_arms(tmp_path)
    refused(capsys, [tmp_path, "--baseline", "me"], "me", "maml_ssl, pretrain_finetune")
    refused(capsys, [tmp_path, "--x", "epochs"], "epochs", "total_step")
    refused(capsys, [tmp_path, tmp_path], "seed0", "one run")
