"""The paper's tables: every number is what one would compute by hand, what is missing is never a number, and no name breaks a page."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from krrst_dist.provenance import Revision
from krrst_dist.results import (
    Cell,
    Entry,
    Outcome,
    PaperTable,
    ResultsError,
    ResultStore,
    paper_tables,
    report_main,
    to_csv,
    to_latex,
    to_markdown,
    to_text,
)
from krrst_dist.results.layout import CONVNETS
from krrst_dist.results.render import notes, title
from krrst_dist.results.tables import Difference

CELL = Cell(method="KRR-ST", source="cifar100", source_fingerprint="5a", target="cifar10", target_fingerprint="cifar10@32", task="finetune",
            architecture="convnet-128-256-512", resolution=32, evaluation_seed=0, distillation_seed=0, set_fingerprint="set 0",
            hyperparameters={"task": {"lr": 0.01}})
SCRATCH = replace(CELL, method="from scratch", source="", source_fingerprint="", distillation_seed=None, set_fingerprint="")


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "results")


def put(store: ResultStore, cell: Cell = CELL, accuracy: float = 0.5, status: str = "ok", metric: str = "accuracy", **change) -> None:
    """Store one number; the fingerprints follow from the names unless they are given."""
    if "distillation_seed" in change and cell.set_fingerprint:
        change.setdefault("set_fingerprint", f"set {change['distillation_seed']}")
    if "target" in change:
        change.setdefault("target_fingerprint", f"{change['target']}@32")
    outcome = Outcome(status="failed", error="out of memory") if status == "failed" else Outcome(status=status, metrics={metric: accuracy})
    store.write(replace(cell, **change), outcome)


def only(store: ResultStore, **options) -> PaperTable:
    [table] = paper_tables(store.read(), **options)
    return table


def lines(text: str) -> list[list[str]]:
    """The cells of a plain table: two spaces or more part them."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


# layout


def test_tables_1_to_3_have_methods_as_rows_and_targets_as_columns_in_the_papers_order(store):
    for method in ("Zeta", "KRR-ST", "FRePo", "KIP", "MTT", "DM", "DSA", "K-means", "Random + targets", "Random", "alpha"):
        for target in ("flowers", "cifar10", "cub2011", "cifar100", "dogs", "cars", "aircraft", "digits-5-9"):
            put(store, method=method, target=target, set_fingerprint=method)
    put(store, SCRATCH)
    table = only(store)
    assert table.methods == ("from scratch", "Random", "Random + targets", "K-means", "DSA", "DM", "MTT", "KIP", "FRePo", "KRR-ST",
                             "alpha", "Zeta")
    assert table.columns == ("cifar100", "cifar10", "aircraft", "cars", "cub2011", "dogs", "flowers", "digits-5-9")
    assert title(table) == "Table 1: finetune, source cifar100, 32 px, convnet-128-256-512, accuracy [%]"


@pytest.mark.parametrize(("source", "resolution", "columns", "name"), [
    ("tinyimagenet", 64, ("tinyimagenet", "cifar10", "aircraft"), "Table 2"),
    ("imagenet", 64, ("cifar10", "cifar100", "aircraft"), "Table 3"),
    ("imagenette", 224, ("imagenette", "aircraft", "flowers"), "Appendix D, first table"),
    ("digits-0-4", 16, ("digits-0-4", "cifar10", "digits-5-9"), ""),
])
def test_the_source_itself_is_the_first_column(store, source, resolution, columns, name):
    for target in columns[::-1]:
        put(store, source=source, resolution=resolution, target=target, architecture=CONVNETS.get(resolution, "convnet"))
    assert only(store).columns == columns and only(store).subject.paper == name


def test_each_architecture_metric_and_share_of_labels_has_a_table_of_its_own_and_published_ones_come_first(store):
    put(store, architecture="convnet", label_fraction=0.01, task="probe")
    put(store, architecture="convnet", task="probe")
    for architecture in ("vgg11", "resnet10", "convnet-64-128-256-512", "convnet-16-32"):
        put(store, source="tinyimagenet", resolution=64, architecture=architecture)
    put(store)
    put(store, metric="test_loss", task="probe", architecture="vgg11")
    found = [(t.subject.paper, t.subject.task, t.subject.architecture, t.subject.label_fraction, t.metric)
             for t in paper_tables(store.read())]
    assert found == [
        ("Table 1", "finetune", "convnet-128-256-512", 1.0, "accuracy"), ("Table 2", "finetune", "convnet-64-128-256-512", 1.0, "accuracy"),
        ("Figure 3, Tables 5-8", "finetune", "resnet10", 1.0, "accuracy"), ("Figure 3, Tables 5-8", "finetune", "vgg11", 1.0, "accuracy"),
        ("", "finetune", "convnet-16-32", 1.0, "accuracy"),
        ("", "probe", "convnet", 0.01, "accuracy"), ("", "probe", "convnet", 1.0, "accuracy"), ("", "probe", "vgg11", 1.0, "test_loss")]
    assert "probe, source cifar100, 32 px, convnet, 1% of the labels, accuracy [%]" in to_text(paper_tables(store.read()))


def test_knowledge_distillation_has_architectures_as_columns(store):
    for architecture in ("resnet10", "mobilenet", "alexnet", "vgg11", "convnet-64"):
        put(store, task="kd", source="tinyimagenet", resolution=64, architecture=architecture)
        put(store, SCRATCH, task="kd", method="Gaussian", resolution=64, architecture=architecture)
    table = only(store)
    assert table.columns == ("convnet-64", "vgg11", "alexnet", "mobilenet", "resnet10") and table.methods == ("Gaussian", "KRR-ST")
    assert title(table) == "Table 4: kd, source tinyimagenet, target cifar10, 64 px, accuracy [%]"


def test_fid_has_sources_as_columns_and_the_lowest_is_best(store):
    for source, random, ours in (("tinyimagenet", 20.31, 47.54), ("cifar100", 34.49, 76.28)):
        for method, value in (("Random", random), ("KRR-ST", ours)):
            put(store, accuracy=value, metric="fid", task="fid", method=method, source=source, target=source, architecture="inception",
                set_fingerprint=method + source)
    table = only(store)
    assert table.columns == ("cifar100", "tinyimagenet") and table.subject.paper == "Appendix F"
    assert table.best("cifar100") == {"Random"} and "*34.49" in to_text([table]) and "76.28" in to_text([table])
    assert "best: lowest" in to_text([table])


def test_fid_in_another_networks_features_is_not_the_papers_table(store):
    put(store, metric="fid", task="fid", target="cifar100", architecture="target-9c1f")
    assert only(store).subject.paper == "" and title(only(store)) == "fid, 32 px, target-9c1f, fid"


def test_a_teachers_accuracy_is_told_and_not_ranked(store):
    for method, accuracy in (("KRR-ST", 0.5), ("Random", 0.6)):
        put(store, method=method, task="kd", metric="teacher_accuracy", accuracy=accuracy, set_fingerprint=method)
    table = only(store, over="distillation", significance=True)
    assert table.best(CELL.architecture) == set() and "*" not in to_text([table]) and "best" not in notes(table)[0]


def test_a_method_without_a_set_stands_in_every_table_that_it_fits(store):
    """Its cell does not depend on the source, so it was computed once."""
    put(store, SCRATCH, 0.4)
    for source in ("cifar100", "svhn"):
        put(store, source=source, set_fingerprint=source)
    put(store, source="svhn", architecture="vgg11", set_fingerprint="svhn")
    tables = {(t.subject.source, t.subject.architecture): t for t in paper_tables(store.read())}
    assert len(tables) == 3
    for source in ("cifar100", "svhn"):
        assert tables[source, CELL.architecture].entry("from scratch", "cifar10").values == (0.4,)
    assert tables["svhn", "vgg11"].methods == ("KRR-ST",)


def test_methods_without_sets_alone_make_a_table(store):
    put(store, SCRATCH, 0.4)
    assert title(only(store)) == "finetune, 32 px, convnet-128-256-512, accuracy [%]"


# numbers


def test_mean_and_population_std_over_evaluation_seeds_are_those_of_the_hand(store):
    for seed, accuracy in enumerate((0.50, 0.53, 0.56)):
        put(store, accuracy=accuracy, evaluation_seed=seed)
    entry = only(store).entry("KRR-ST", "cifar10")
    assert (entry.n, entry.mean, entry.std) == (3, pytest.approx(0.53), pytest.approx(math.sqrt((0.03**2 + 0 + 0.03**2) / 3)))
    assert "53.00 ± 2.45" in to_text([only(store)]) and "n = 3 unless stated" in to_text([only(store)])


def test_over_distillation_seeds_each_counts_once_with_the_mean_of_its_evaluation_seeds(store):
    numbers = {(0, 0): 0.50, (0, 1): 0.52, (1, 0): 0.60, (1, 1): 0.64, (2, 0): 0.40}
    for (distillation, evaluation), accuracy in numbers.items():
        put(store, accuracy=accuracy, distillation_seed=distillation, evaluation_seed=evaluation)
    put(store, SCRATCH, 0.3, evaluation_seed=0)
    put(store, SCRATCH, 0.4, evaluation_seed=1)
    over = only(store, over="distillation")
    entry = over.entry("KRR-ST", "cifar10")
    assert sorted(entry.values) == pytest.approx([0.40, 0.51, 0.62]) and entry.mean == pytest.approx(0.51)
    assert entry.std == pytest.approx(math.sqrt(2 * 0.11**2 / 3))
    assert sorted(over.entry("from scratch", "cifar10").values) == [0.3, 0.4]
    pooled = only(store).entry("KRR-ST", "cifar10")
    assert pooled.n == 5 and pooled.mean == pytest.approx(sum(numbers.values()) / 5)
    assert "over distillation seeds" in to_text([over])


def test_the_note_says_what_the_runs_behind_a_mean_differ_in(store):
    """All evaluation seeds of one set in each place, or all runs; a set without a number does not count."""
    for seed in range(2):
        put(store, evaluation_seed=seed)
        put(store, method="Random", distillation_seed=1, evaluation_seed=seed, set_fingerprint="Random 1")
        put(store, SCRATCH, evaluation_seed=seed)
    put(store, distillation_seed=2, status="failed")
    for write in (to_text, to_markdown, to_latex):
        assert "population std over evaluation seeds; n = 2" in write([only(store)])
    put(store, distillation_seed=3)
    for write in (to_text, to_markdown, to_latex):
        assert "population std over all runs (distillation and evaluation seeds); n = 3" in write([only(store)])


def test_a_single_run_has_no_spread(store):
    put(store)
    assert only(store).entry("KRR-ST", "cifar10").std is None
    said = to_text([only(store)])
    assert "50.00\n" in said and "±" not in said and "single runs" in said


def test_where_there_are_fewer_runs_than_elsewhere_their_number_is_shown(store):
    for seed in range(3):
        put(store, evaluation_seed=seed)
    put(store, target="cars")
    assert "50.00 (n = 1)" in to_text([only(store)])


def test_losses_and_small_numbers_keep_three_digits_and_the_lowest_is_best(store):
    for method, value in (("Random", 0.00456), ("KRR-ST", 0.00123)):
        put(store, accuracy=value, metric="test_loss", method=method, set_fingerprint=method)
    said = to_text([only(store)])
    assert "*0.00123" in said and "0.00456" in said and "test_loss\n" in said and only(store).best("cifar10") == {"KRR-ST"}


def test_the_best_of_each_column_is_bold_in_every_format(store):
    for method, accuracies in {"Random": (0.5, 0.7), "KRR-ST": (0.6, 0.65)}.items():
        for target, accuracy in zip(("cifar10", "cars"), accuracies, strict=True):
            put(store, accuracy=accuracy, method=method, target=target, set_fingerprint=method)
    tables = paper_tables(store.read())
    assert lines(to_text(tables))[3:5] == [["Random", "50.00", "*70.00"], ["KRR-ST", "*60.00", "65.00"]]
    assert "| Random | 50.00 | **70.00** |\n| KRR-ST | **60.00** | 65.00 |" in to_markdown(tables)
    assert "Random & 50.00 & \\textbf{70.00} \\\\\nKRR-ST & \\textbf{60.00} & 65.00 \\\\\n\\bottomrule" in to_latex(tables)


def test_equal_bests_are_both_bold_and_one_method_alone_is_not(store):
    put(store)
    assert only(store).best("cifar10") == set()
    put(store, method="DM", set_fingerprint="DM")
    assert only(store).best("cifar10") == {"KRR-ST", "DM"}


# what is not there


def test_missing_diverged_and_failed_cells_are_shown_as_such_and_never_as_zero(store):
    put(store)
    put(store, method="DM", target="cars", set_fingerprint="DM")
    put(store, accuracy=0.0, status="diverged", method="MTT", set_fingerprint="MTT")
    put(store, status="failed", method="MTT", target="cars", set_fingerprint="MTT")
    tables = paper_tables(store.read())
    assert lines(to_text(tables))[3:6] == [["DM", "–", "50.00"], ["MTT", "diverged", "failed"], ["KRR-ST", "50.00", "–"]]
    assert "| MTT | diverged | failed |" in to_markdown(tables) and "DM & -- & 50.00" in to_latex(tables)
    found = {(row["method"], row["column"]): row for row in csv.DictReader(io.StringIO(to_csv(tables)))}
    assert {place: (row["state"], row["mean"], row["n"]) for place, row in found.items()} == {
        ("DM", "cifar10"): ("missing", "", "0"), ("DM", "cars"): ("ok", "0.5", "1"), ("MTT", "cifar10"): ("diverged", "", "0"),
        ("MTT", "cars"): ("failed", "", "0"), ("KRR-ST", "cifar10"): ("ok", "0.5", "1"), ("KRR-ST", "cars"): ("missing", "", "0")}
    assert not re.search(r"\b0\.00\b", to_text(tables) + to_markdown(tables) + to_latex(tables))


def test_runs_that_failed_or_diverged_beside_good_ones_are_counted_and_not_averaged(store):
    for seed in range(2):
        put(store, evaluation_seed=seed, accuracy=0.5 + 0.1 * seed)
    put(store, evaluation_seed=2, status="diverged", accuracy=0.01)
    put(store, evaluation_seed=3, status="failed")
    put(store, method="DM", set_fingerprint="DM", accuracy=0.2)
    put(store, method="Random", set_fingerprint="Random", accuracy=0.1)
    table = only(store)
    assert "55.00 ± 5.00 (n = 2, 1 diverged, 1 failed)" in to_text([table])
    assert table.best("cifar10") == {"DM"}, "the mean of those that did not diverge says too much"
    assert "a method with diverged runs is not ranked" in notes(table)


def test_a_cell_that_diverged_is_shown_beside_the_good_ones_and_its_last_loss_makes_no_table(store):
    put(store)
    put(store, method="DM", set_fingerprint="DM", status="diverged", metric="train_loss", accuracy=float("nan"))
    table = only(store)
    assert (table.metric, table.methods) == ("accuracy", ("DM", "KRR-ST")) and table.entry("DM", "cifar10").state == "diverged"


def test_a_metric_that_is_not_a_number_in_a_good_run_counts_as_diverged(store):
    store.write(CELL, Outcome(status="ok", metrics={"accuracy": 0.5, "test_loss": float("inf")}))
    assert [table.entry("KRR-ST", "cifar10").state for table in paper_tables(store.read())] == ["ok", "diverged"]


def test_a_store_with_nothing_but_failures_has_a_table_of_them(store):
    put(store, status="failed")
    assert ["KRR-ST", "failed"] in lines(to_text([only(store)])) and "no number" in title(only(store))


def test_an_empty_store_has_no_tables_and_says_so(store):
    assert paper_tables(store.read()) == []
    assert to_text([]) == to_markdown([]) == "There are no results yet.\n" and to_latex([]) == "% There are no results yet.\n"
    assert len(to_csv([]).splitlines()) == 1


# what does not belong together


def test_runs_of_different_recipes_are_not_averaged(store):
    put(store, evaluation_seed=0)
    put(store, evaluation_seed=1, hyperparameters={"task": {"lr": 0.02}})
    put(store, method="DM", set_fingerprint="DM")
    table = only(store)
    entry = table.entry("KRR-ST", "cifar10")
    assert (entry.state, entry.n, entry.mean) == ("mixed", 0, None)
    assert "KRR-ST, cifar10: not averaged, there are several recipes, which differ in task.lr; narrow it down with --where" in \
        to_text([table])
    assert "50.00" in to_text([table])


def test_sets_that_were_made_with_different_settings_are_not_averaged(store):
    """Six seeds under one name, of which three were distilled for longer. What an old file does not say keeps nothing apart."""
    for seed, how in enumerate(({}, {"distill.m": 20, "distill.updates": 400}, {"distill.m": 20, "distill.updates": 800})):
        put(store, distillation_seed=seed, distillation=how)
    mixed = to_text([only(store)])
    assert "not averaged, there are sets that were made with different settings: distill.updates" in mixed
    report_main([store.uri, "--where", "distillation.distill.updates=800"])
    put(store, method="DM", distillation_seed=0, distillation={})
    put(store, method="DM", distillation_seed=1, distillation={"distill.m": 20})
    assert only(store).entry("DM", "cifar10").n == 2


def test_two_sets_of_one_distillation_seed_are_not_averaged(store):
    """An ablation that kept its method's name."""
    put(store, evaluation_seed=0)
    put(store, evaluation_seed=1, set_fingerprint="another")
    assert "several distilled sets with the same distillation seed" in to_text([only(store)])


def test_versions_of_a_target_are_columns_of_their_own(store):
    """Validation and test accuracies, or crops and squashed images, must not be compared."""
    put(store, SCRATCH, 0.4, target_fingerprint="aaaaaaaaaaaa")
    put(store, target_fingerprint="bbbbbbbbbbbb")
    assert only(store).columns == ("cifar10 (aaaaaaaa)", "cifar10 (bbbbbbbb)") and only(store).best("cifar10 (bbbbbbbb)") == set()


def test_versions_of_a_source_have_tables_of_their_own_and_an_unknown_one_joins_a_single_one(store):
    put(store)
    put(store, method="FRePo", source_fingerprint="", set_fingerprint="F")
    assert only(store).methods == ("FRePo", "KRR-ST")
    put(store, method="DM", source_fingerprint="77", set_fingerprint="DM")
    sources = [table.subject.source for table in paper_tables(store.read())]
    assert sources == ["cifar100 (5a)", "cifar100 (77)", "cifar100 (unknown version)"]


def test_the_same_data_set_in_fid_and_in_transfer_is_not_two_versions(store):
    put(store, target="cifar100")
    put(store, target="cifar100", target_fingerprint="5a", task="fid", metric="fid")
    assert [table.columns for table in paper_tables(store.read())] == [("cifar100",), ("cifar100",)]


def test_the_commits_behind_the_numbers_are_named(store):
    for seed, revision in enumerate([Revision("a" * 40, False), Revision("b" * 40, True)]):
        store._revision = revision
        put(store, evaluation_seed=seed)
    assert "commit aaaaaaaaaaaa, bbbbbbbbbbbb+ (+: with uncommitted changes)" in to_text([only(store)])


def test_an_unknown_spread_is_refused(store):
    with pytest.raises(ResultsError, match="over = 'seeds': must be 'evaluation' or 'distillation'"):
        paper_tables(store.read(), over="seeds")


# significance


BEST, SECOND, WORST = (0.61, 0.64, 0.60), (0.55, 0.60, 0.57), (0.10, 0.90, 0.20)


def compared(store: ResultStore, samples: dict[str, tuple[float, ...]], over: str = "evaluation") -> PaperTable:
    for method, values in samples.items():
        for seed, value in enumerate(values):
            put(store, accuracy=value, method=method, evaluation_seed=seed, set_fingerprint=method)
    return only(store, significance=True, over=over)


def welch(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """By the formula: t with the Welch-Satterthwaite degrees of freedom, two-sided."""
    means, parts = [], []
    for x in (a, b):
        mean = sum(x) / len(x)
        means.append(mean)
        parts.append(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))
    t = (means[0] - means[1]) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    return float(2 * stats.t.sf(abs(t), freedom))


def test_the_best_is_compared_with_the_runner_up_by_welchs_test(store):
    table = compared(store, {"KRR-ST": BEST, "FRePo": SECOND, "DM": WORST})
    p = table.p_value("cifar10")
    assert p == pytest.approx(welch(BEST, SECOND), rel=1e-9)
    assert p == pytest.approx(stats.ttest_ind(BEST, SECOND, equal_var=False).pvalue, rel=1e-12)
    assert p != pytest.approx(stats.ttest_ind(BEST, SECOND).pvalue, rel=1e-3)
    assert lines(to_text([table]))[-4][:2] == ["p", f"{p:.3f}"] and f"| p | {p:.3f} |" in to_markdown([table])
    found = {row["method"]: row["p_value"] for row in csv.DictReader(io.StringIO(to_csv([table])))}
    assert found == {"DM": "", "FRePo": "", "KRR-ST": repr(p)}


@pytest.mark.parametrize("samples", [
    {"KRR-ST": BEST}, {"KRR-ST": BEST, "DM": (0.5,)}, {"KRR-ST": (0.6, 0.6), "DM": (0.5, 0.5)},
], ids=["one method", "one run", "no spread at all"])
def test_without_a_spread_to_go_by_there_is_no_p_value(store, samples):
    table = compared(store, samples)
    assert table.p_value("cifar10") is None
    assert ["p", "–"] in lines(to_text([table]))


def test_a_tiny_p_value_is_not_shown_as_zero(store):
    table = compared(store, {"KRR-ST": (0.9, 0.9001, 0.9002), "DM": (0.1, 0.1001, 0.1002)})
    assert table.p_value("cifar10") < 1e-6
    assert "<0.001" in to_text([table]) and r"\<0.001" in to_markdown([table]) and r"\textless{}0.001" in to_latex([table])


def test_over_distillation_seeds_the_test_goes_by_their_means(store):
    means = {}
    for method, start in (("KRR-ST", 0.6), ("DM", 0.5)):
        for distillation in range(3):
            pair = (start + 0.02 * distillation, start + 0.03 * distillation**2)
            means.setdefault(method, []).append(sum(pair) / 2)
            for evaluation, value in enumerate(pair):
                put(store, accuracy=value, method=method, distillation_seed=distillation, evaluation_seed=evaluation,
                    set_fingerprint=f"{method} {distillation}")
    table = only(store, over="distillation", significance=True)
    assert table.p_value("cifar10") == pytest.approx(welch(tuple(means["KRR-ST"]), tuple(means["DM"])))


def test_significance_is_shown_only_on_request(store):
    compared(store, {"KRR-ST": BEST, "DM": SECOND})
    assert "Welch" not in to_text([only(store)]) and ["p", "–"] not in lines(to_text([only(store)]))


def test_a_method_is_compared_with_another_seed_by_seed(store):
    """By hand: gains of 0.01, 0.03 and 0.05; t(0.975, 2) = 4.302653; half = 4.302653 x 0.02 / sqrt(3)."""
    for seed, (ours, theirs) in enumerate([(0.61, 0.60), (0.53, 0.50), (0.75, 0.70)]):
        for method, value in (("KRR-ST", ours), ("Random", theirs)):
            put(store, accuracy=value, method=method, distillation_seed=seed, set_fingerprint=f"{method} {seed}")
    put(store, accuracy=0.1, method="Random", distillation_seed=7, set_fingerprint="Random 7")  # nobody's pair
    table = only(store, against="Random", over="distillation")
    gain = table.differences["KRR-ST", "cifar10"]
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.03, 0.03 - half, 0.03 + half), abs=1e-8)
    assert (gain.pairs, gain.paired) == (3, True) and ("Random", "cifar10") not in table.differences
    assert ["KRR-ST, less Random", "+3.00 (-1.97 to 7.97, 3 pairs)"] in lines(to_text([table]))
    assert "Student's t" in to_text([table]) and "not paired" not in to_text([table])
    [row] = [row for row in csv.DictReader(io.StringIO(to_csv([table]))) if row["method"] == "KRR-ST"]
    assert (row["against"], float(row["difference"]), row["pairs"]) == ("Random", gain.mean, "3")


def test_pairs_are_of_equal_distillation_and_evaluation_seeds_and_one_pair_alone_is_none(store):
    put(store, accuracy=0.6, method="KRR-ST", distillation_seed=0, evaluation_seed=1, set_fingerprint="ours")
    put(store, accuracy=0.5, method="Random", distillation_seed=0, evaluation_seed=1, set_fingerprint="theirs")
    put(store, accuracy=0.8, method="KRR-ST", distillation_seed=0, evaluation_seed=0, set_fingerprint="ours")
    put(store, accuracy=0.6, method="Random", distillation_seed=0, evaluation_seed=2, set_fingerprint="theirs")
    gain = only(store, against="Random", over="evaluation").differences["KRR-ST", "cifar10"]
    assert gain.mean == pytest.approx(0.15) and not gain.paired


@pytest.mark.parametrize("seed", range(50))
def test_without_pairs_the_interval_of_a_difference_is_welchs(seed):
    """As scipy has it, whatever the sizes and the spreads."""
    rng = np.random.default_rng(seed)
    ours, theirs = (rng.normal(rng.normal(), 10.0 ** rng.integers(-6, 6), rng.integers(2, 9)).tolist() for _ in range(2))
    gain = Difference.of(*(Entry(tuple(values), seeds=tuple((name, i) for i in range(len(values))))
                           for name, values in (("ours", ours), ("theirs", theirs))))
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert gain.mean == pytest.approx(np.mean(ours) - np.mean(theirs)) and not gain.paired


def test_a_difference_of_equal_numbers_is_known_and_one_of_single_runs_has_no_interval():
    def gain(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Difference | None:
        return Difference.of(Entry(ours, seeds=tuple(range(len(ours)))), Entry(theirs, seeds=tuple(range(7, 7 + len(theirs)))))

    assert gain((0.75, 0.75), (0.5, 0.5)) == Difference(0.25, 0.25, 0.25, pairs=0)
    assert gain((0.75, 0.75), (0.5, 0.25)).low == pytest.approx(0.375 - 12.706205 * 0.125)  # one degree of freedom
    assert gain((0.75,), (0.5, 0.25)) == Difference(0.375, None, None, pairs=0)
    assert gain((0.75,), ()) is gain((), (0.75,)) is None


def test_runs_that_are_not_averaged_are_not_compared_either(store):
    for seed in range(2):
        put(store, method="Random", distillation_seed=seed, set_fingerprint=f"theirs {seed}")
        for lr in (0.1, 0.2):
            put(store, method="KRR-ST", distillation_seed=seed, set_fingerprint=f"ours {seed}", hyperparameters={"task": {"lr": lr}})
    assert only(store, against="Random").differences == {}


def test_a_comparison_with_an_unknown_method_is_refused(store):
    put(store, method="KRR-ST")
    with pytest.raises(ResultsError, match="against = 'KRRST': no result is of this method; did you mean 'KRR-ST'"):
        only(store, against="KRRST")


def test_a_baseline_without_a_seed_in_common_is_compared_by_means_and_the_note_says_so(store):
    for seed, (ours, theirs) in enumerate([(0.61, 0.50), (0.63, 0.56)]):
        put(store, accuracy=ours, distillation_seed=seed)
        put(store, SCRATCH, theirs, evaluation_seed=seed)
    table = only(store, against="from scratch")
    expected = stats.ttest_ind([61, 63], [50, 56], equal_var=False).confidence_interval()
    shown = f"+9.00 ({expected.low:.2f} to {expected.high:.2f})"
    for write in (to_text, to_markdown, to_latex):
        written = write([table]).replace("\\", "")
        assert shown in written and "less from scratch: not paired: difference of means, Welch's 95 % interval" in written
        assert "Student" not in written
    [row] = [row for row in csv.DictReader(io.StringIO(to_csv([table]))) if row["method"] == "KRR-ST"]
    assert (float(row["difference"]), float(row["difference_low"])) == pytest.approx((0.09, expected.low / 100)) and row["pairs"] == "0"


def test_a_store_with_one_seed_each_has_bare_differences(store):
    put(store, accuracy=0.6)
    put(store, method="DM", accuracy=0.5, set_fingerprint="DM")
    table = only(store, against="DM")
    assert ["KRR-ST, less DM", "+10.00"] in lines(to_text([table]))
    [row] = [row for row in csv.DictReader(io.StringIO(to_csv([table]))) if row["method"] == "KRR-ST"]
    assert (row["difference_low"], row["difference_high"], row["pairs"]) == ("", "", "0")


def test_a_difference_that_is_not_paired_says_so_beside_those_that_are(store):
    for seed in range(2):
        put(store, accuracy=0.6 + 0.01 * seed, distillation_seed=seed)
        put(store, accuracy=0.5 + 0.01 * seed, method="DM", distillation_seed=seed, set_fingerprint=f"DM {seed}")
    put(store, SCRATCH, 0.4)
    text = to_text([only(store, against="DM")])
    assert ["KRR-ST, less DM", "+10.00 (10.00 to 10.00)"] in lines(text) and ["from scratch, less DM", "-10.50 (not paired)"] in lines(text)
    assert "interval (Student's t); not paired: difference of means" in text


@pytest.mark.parametrize(("metric", "ours", "theirs", "shown"), [
    ("test_loss", (1.221, 1.219), (1.223, 1.227), "-0.005 (-0.043 to 0.033)"),
    ("test_loss", (1.2, 1.2), (1.2, 1.20001), "0.000 (0.000 to 0.000)"),
    ("fid", (20.31, 20.33), (20.3, 20.32), "+0.010 (0.010 to 0.010)"), ("accuracy", (0.5, 0.5), (0.5, 0.50002), "0.00 (-0.01 to 0.01)"),
])
def test_differences_have_a_digit_more_than_numbers_that_are_no_shares_and_a_zero_has_no_sign(store, metric, ours, theirs, shown):
    for method, values in (("KRR-ST", ours), ("DM", theirs)):
        for seed, value in enumerate(values):
            put(store, accuracy=value, metric=metric, method=method, distillation_seed=seed, set_fingerprint=f"{method} {seed}")
    assert ["KRR-ST, less DM", shown] in lines(to_text([only(store, against="DM")]))


def test_a_baseline_that_stands_alone_is_compared_with_nothing(store):
    put(store)
    put(store, method="DM", target="cars", set_fingerprint="DM")
    assert "less DM: there is nothing to compare with it" in to_text([only(store, against="DM")])


# formats


HOSTILE = ["[12] a", "* ours",
           "a|b", "a\nb\r\n# c", "50% & more_$x^2 #{~}\\", "=cmd()|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "**bold** `code` [x](y)",
           "<script>alert(1)</script>",
           "\x1b[31mred\x07", "\u202egnp.exe", '"quoted", with, commas', "ünïcødé 方法", "\\textbf{x", "a – b ± c"]


@pytest.fixture
def hostile(store) -> list[PaperTable]:
    for i, method in enumerate(HOSTILE):
        put(store, method=method, accuracy=0.01 * (i + 1), set_fingerprint=str(i))
    return paper_tables(store.read())


def test_no_method_name_breaks_a_markdown_table(hostile):
    rows = [line for line in to_markdown(hostile).splitlines() if line.startswith("|")]
    assert len(rows) == len(HOSTILE) + 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in rows)
    assert not re.search(r"(?<!\\)[<`\[]", "".join(rows)) and r"\*\*bold\*\*" in "".join(rows)


def test_no_method_name_breaks_a_latex_table(hostile):
    said = to_latex(hostile)
    body = said.partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    assert len(body) == len(HOSTILE) and all(line.endswith(r" \\") for line in body)
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 for line in body)
    assert not re.search(r"(?<!\\)[%#$_^~]", "".join(body).replace(r"$\pm$", ""))
    assert all(line.count("{") == line.count("}") for line in re.sub(r"\\[{}]", "", "\n".join(body)).splitlines())
    assert r"50\% \& more\_\$x\textasciicircum{}2 \#\{\textasciitilde{}\}\textbackslash{}" in said
    assert r"\textbackslash{}textbf\{x" in said and r"a -- b $\pm$ c" in said


def test_no_method_name_is_run_by_a_spreadsheet_and_csv_is_read_back_as_it_was(hostile):
    rows = list(csv.DictReader(io.StringIO(to_csv(hostile))))
    assert len(rows) == len(HOSTILE)
    assert not [value for row in rows for value in row.values() if value.startswith(("=", "+", "-", "@", "\t", "\r"))]
    read = {row["method"].removeprefix("'"): float(row["mean"]) for row in rows}
    assert read == {method: pytest.approx(0.01 * (i + 1)) for i, method in enumerate(HOSTILE)}


def test_no_method_name_reaches_the_terminal_as_a_command(hostile):
    said = to_text(hostile)
    assert all(character.isprintable() or character == "\n" for character in said)
    assert len(said.splitlines()) == 4 + len(HOSTILE) + len(notes(hostile[0]))


def test_csv_holds_full_precision_with_std_and_n(store):
    for seed, accuracy in enumerate((1 / 3, 2 / 7)):
        put(store, accuracy=accuracy, evaluation_seed=seed)
    [row] = csv.DictReader(io.StringIO(to_csv(paper_tables(store.read()))))
    entry = only(store).entry("KRR-ST", "cifar10")
    assert (float(row["mean"]), float(row["std"]), int(row["n"])) == (entry.mean, entry.std, 2)
    assert (row["table"], row["task"], row["source"], row["resolution"], row["metric"], row["column"], row["spread_over"]) == \
        ("Table 1", "finetune", "cifar100", "32", "accuracy", "cifar10", "evaluation")


def test_latex_is_a_whole_booktabs_table(store):
    put(store)
    put(store, target="cars")
    said = to_latex(paper_tables(store.read()))
    assert said.startswith("\\begin{table}\n\\centering\n\\caption{Table 1: finetune, source cifar100")
    assert "\\begin{tabular}{lcc}\n\\toprule\nmethod & cifar10 & cars \\\\\n\\midrule\nKRR-ST & 50.00 & 50.00 \\\\\n\\bottomrule" in said
    assert said.count(r"\begin") == said.count(r"\end") == 2 and "accuracy [\\%]" in said


def test_an_entry_says_what_it_is():
    states = [Entry(), Entry((0.5,)), Entry(diverged=1, failed=1), Entry(failed=1), Entry((0.5, 0.6), 1, 1), Entry((0.5, 0.6), mixed="two")]
    assert [entry.state for entry in states] == ["missing", "ok", "diverged", "failed", "ok", "mixed"]
    assert [entry.n for entry in states] == [0, 1, 0, 0, 2, 0] and states[-1].mean is states[-1].std is None


# krrst report


def test_the_report_is_printed_and_written_in_three_formats(store, tmp_path, capsys):
    table = compared(store, {"KRR-ST": BEST, "DM": SECOND}, over="distillation")
    report_main([store.uri, "--over", "distillation", "--significance", "--out", str(tmp_path / "report")])
    said = capsys.readouterr().out
    assert said.startswith(to_text([table])) and "report.md" in said
    for name, text in {"report.md": to_markdown, "report.csv": to_csv, "report.tex": to_latex}.items():
        assert (tmp_path / "report" / name).read_text() == text([table])


def test_a_report_can_be_narrowed_down_and_keeps_failed_cells_when_a_metric_is_chosen(store, capsys):
    store.write(CELL, Outcome(status="ok", metrics={"accuracy": 0.5, "test_loss": 1.0}))
    put(store, status="failed", method="DM", set_fingerprint="DM")
    put(store, evaluation_seed=1, hyperparameters={"task": {"lr": 0.02}})
    report_main([store.uri, "--where", "metric=accuracy", "hyperparameters.task.lr=0.01"])
    together = capsys.readouterr().out
    for apart in (["--where", "metric=accuracy", "--where", "hyperparameters.task.lr=0.01"],
                  ["--where=metric=accuracy", "--over", "evaluation", "--where", "hyperparameters.task.lr=0.01"]):
        report_main([store.uri, *apart])
        assert capsys.readouterr().out == together
    report_main([store.uri, "--where", "metric=accuracy", "hyperparameters.task.lr=0.01"])
    said = capsys.readouterr().out
    assert "test_loss" not in said and ["DM", "failed"] in lines(said) and ["KRR-ST", "50.00"] in lines(said)


def test_methods_are_compared_by_distillation_seeds_unless_the_user_says_otherwise(store, capsys):
    for method, start in (("KRR-ST", 0.6), ("Random", 0.5)):
        for seed in range(2):
            for evaluation in range(3):
                put(store, accuracy=start + 0.01 * seed * (method == "Random") + 0.001 * evaluation, method=method, distillation_seed=seed,
                    evaluation_seed=evaluation, set_fingerprint=f"{method} {seed}")
    report_main([store.uri, "--against", "Random"])
    assert "distillation seeds, each the mean" in (shown := capsys.readouterr().out) and "+9.50 (3.15 to 15.85)" in shown
    report_main([store.uri, "--against", "Random", "--over", "evaluation"])
    assert "+9.50 (8.93 to 10.07)" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "over"), [
    ({}, "evaluation"), ({"against": "KRR-ST"}, "distillation"), ({"significance": True}, "distillation"),
    ({"against": "KRR-ST", "over": "evaluation"}, "evaluation"), ({"over": "distillation"}, "distillation"),
])
def test_the_spread_is_over_distillation_seeds_where_methods_are_compared_unless_it_is_said(store, asked, over):
    put(store)
    assert only(store, **asked).over == over


def test_a_report_finds_the_results_in_a_grids_folder_and_says_when_nothing_fits(store, capsys):
    put(store)
    report_main([store.uri.removesuffix("/results")])
    assert "KRR-ST" in capsys.readouterr().out
    with pytest.raises(ResultsError, match="--where method=KRR: none of the 1 rows fits"):
        report_main([store.uri, "--where", "method=KRR"])


def test_a_report_of_nothing_says_so_and_one_of_nowhere_is_refused(tmp_path, capsys):
    report_main([str(tmp_path)])
    assert capsys.readouterr().out == "There are no results yet.\n"
    with pytest.raises(ResultsError, match="there is nothing; check the path"):
        report_main([str(tmp_path / "nowhere")])


def test_a_large_store_is_summarised(store):
    """Seconds at most for ten thousand cells; no bound is asserted."""
    for method in ("DM", "KRR-ST"):
        put(store, method=method, set_fingerprint=method)
    base = store.read().to_pylist()
    many = [row | {"cell": f"{i} {row['cell']}", "evaluation_seed": i} for i in range(5000) for row in base]
    [table] = paper_tables(pa.Table.from_pylist(many, schema=store.read().schema))
    assert table.entry("DM", "cifar10").n == 5000
