"""``make reseed`` executes what it says, notices what is wrong, and changes nothing; on this machine and on Dask."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from scipy import stats

from helpers.lab import reseed
from helpers.lab.claims import check_exact
from helpers.lab.estimates import mean
from helpers.lab.reseed import Run, z_score_problems
from helpers.lab.runtime import rng

ROOT = Path(__file__).parents[1]
SEED = 7
Outcome = namedtuple("Outcome", "status printed runs")

IMPORTS = """
import os
import torch
from helpers.lab import agree, bounded, estimates, exact, generator

def draws(stream, n=5000):
    random = generator(stream)
    return torch.randn(n, generator=random, device=random.device, dtype=torch.float64)
"""
RIGHT = [
    IMPORTS,
    "agree('right.mean', estimates.mean(3 + draws('right.mean')), formula=3.0)",
    "agree('right.square', estimates.mean((5 + draws('right.square')) ** 2), formula=26.0)",
    "exact('right.seed', 1.0, 1.0, case=os.environ['BOOK_SEED'])",
    "bounded('right.bounded', 0.5, bound=1.0, attained=(1.0, 1.0))",
]
WRONG = [
    IMPORTS,
    "agree('wrong.mean', estimates.mean(3 + draws('wrong.mean')), formula=3.3, case='ten <percent>')\n"
    "exact('wrong.same_cell', 1.0, 1.0)",
    "1 / 0",
    "exact('wrong.before_the_error', 1.0, 1.0)\nexact('wrong.error', -1.0, float('nan'))",
    "agree('wrong.later_cell', estimates.mean(3 + draws('wrong.later_cell')), formula=3.0)",
]
# A kernel that imports nothing of the book starts in a second instead of seven. The second claim names its parent.
LIGHT = [
    """
import os, random
from IPython.display import display

def show(kind, **figures):
    claim = {"id": f"light.{kind}", "case": "", "kind": kind, "passed": True, "row": "", "problems": []}
    display({"text/plain": ""}, metadata={"claim": claim | figures}, raw=True)

random.seed(int(os.environ["BOOK_SEED"]))
show("agree", z=[random.gauss(0, 1) for _ in range(4)])
show("exact", computed=os.getppid())
"""
]


def write_notebook(path, sources):
    """Write a notebook whose cells are named cell-0, cell-1, …, each storing a failed claim that no run has made."""
    stored = check_exact("stale.claim", 1.0, 2.0)._repr_mimebundle_()
    cells = [
        nbformat.v4.new_code_cell(
            source,
            id=f"cell-{index}",
            execution_count=index + 1,
            outputs=[nbformat.v4.new_output("display_data", data=stored[0], metadata=stored[1])],
        )
        for index, source in enumerate(sources)
    ]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def run_main(*arguments, seeds=()):
    """Return exit status, printed text and runs of ``main``; `seeds` are what the fresh ones turn out to be."""
    runs, real, seeds = [], reseed.report, iter(seeds)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(reseed, "report", lambda found: runs.extend(found) or real(found))
        patch.setattr(reseed, "secrets", SimpleNamespace(randbits=lambda bits: next(seeds)))
        status = reseed.main([str(argument) for argument in arguments])
    return Outcome(status, printed.getvalue(), runs)


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    sources = {"right": RIGHT, "wrong": WRONG, "light": LIGHT}
    return {name: write_notebook(folder / f"{name}.ipynb", cells) for name, cells in sources.items()}


@pytest.fixture(scope="module")
def stored(notebooks):
    return {path: path.read_bytes() for path in notebooks.values()}


@pytest.fixture(scope="module")
def right(notebooks, stored):
    return run_main(notebooks["right"], notebooks["light"], "--seed", SEED, "--jobs", 1)


@pytest.fixture(scope="module")
def wrong(notebooks, stored):
    return run_main(notebooks["wrong"], "--seed", SEED, "--jobs", 1)


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def on_dask(notebooks, stored, cluster):
    address = cluster.scheduler_address
    return run_main(notebooks["light"], "--seeds", 2, "--scheduler", address, seeds=[SEED, SEED + 1])


def ids(run):
    return [claim["id"] for claim in run.claims]


# What execute records


def test_the_kernel_gets_the_seed(right, wrong):
    (run, _) = right.runs
    assert run.seed == SEED
    assert [claim["case"] for claim in run.claims if claim["id"] == "right.seed"] == [str(SEED)]


def test_every_claim_of_a_right_notebook_is_recorded_in_order(right):
    (run, _) = right.runs
    assert ids(run) == [f"right.{slug}" for slug in ("mean", "square", "seed", "bounded")]
    assert run.failed == []
    assert run.errors == []


def test_the_figures_are_those_of_the_seed(right, monkeypatch):
    # The same draws in this process, where BOOK_DEVICE is the kernel's.
    monkeypatch.setenv("BOOK_SEED", str(SEED))
    namespace = {}
    exec(IMPORTS, namespace)
    here = mean(3 + namespace["draws"]("right.mean"))
    claim = right.runs[0].claims[0]
    assert claim["simulated"] == pytest.approx(float(here.value), rel=1e-7)
    assert claim["z"] == pytest.approx((float(here.value) - 3) / float(here.stderr), rel=1e-6)


def test_z_scores_are_those_of_the_simulations(right):
    run = right.runs[0]
    assert run.z.tolist() == [claim["z"] for claim in run.claims if claim["kind"] == "agree"]
    assert run.z.size == 2


def test_a_failed_claim_does_not_stop_its_cell_or_those_after_it(wrong):
    (run,) = wrong.runs
    slugs = ("mean", "same_cell", "before_the_error", "later_cell")
    assert ids(run) == [f"wrong.{slug}" for slug in slugs]
    assert [claim["id"] for claim in run.failed] == ["wrong.mean"]


def test_errors_that_are_no_failed_claims_are_recorded_with_their_cell(wrong):
    (run,) = wrong.runs
    first, second = run.errors
    assert first == "cell cell-2: ZeroDivisionError: division by zero"
    assert second.startswith("cell cell-3: ValueError: computed must be finite")


def test_a_kernel_that_dies_is_an_error_of_its_notebook(tmp_path):
    path = write_notebook(tmp_path / "dying.ipynb", ["import os\nos._exit(1)"])
    run = reseed.execute("dying", path.read_text(encoding="utf-8"), SEED)
    assert len(run.errors) == 1


# What main does


def test_a_right_book_is_right(right):
    assert right.status == 0
    assert "FAILED" not in right.printed
    assert "ERROR" not in right.printed


def test_every_chapter_has_a_line_with_its_figures(right):
    for run, checked in zip(right.runs, (4, 2), strict=True):
        largest = np.abs(run.z).max()
        assert f"{run.notebook}: {checked} claims checked, 0 failed, largest |z| {largest:.2f}\n" in right.printed


def test_the_scores_of_the_whole_book_are_summed_up(right):
    z = np.concatenate([run.z for run in right.runs])
    rms = np.sqrt(np.mean(z**2))
    assert f"\n6 z-scores, mean {z.mean():+.3f}, root mean square {rms:.3f} (not tested: one seed only)\n" in (
        right.printed
    )


def test_the_last_line_sums_up(right, wrong, on_dask):
    assert right.printed.splitlines()[-1] == "1 seeds, 6 claims checked, 0 failed, 0 problems with z"
    assert wrong.printed.splitlines()[-1] == "1 seeds, 4 claims checked, 3 failed, 0 problems with z"
    assert on_dask.printed.splitlines()[-1] == "2 seeds, 4 claims checked, 0 failed, 0 problems with z"


def test_a_wrong_formula_is_named_with_its_seed_and_figures(wrong):
    assert wrong.status == 1
    claim = wrong.runs[0].failed[0]
    start = f"FAILED wrong.mean [ten <percent>] under BOOK_SEED={SEED}: "
    (line,) = [line for line in wrong.printed.splitlines() if line.startswith("FAILED")]
    assert line == f"{start}{claim['row']}: {claim['problems'][0]}"
    assert re.fullmatch(r"3\.3 ≈ [23]\.\d+ ± 0\.014  z -\d\d\.\d+  would catch 3\.4 %", claim["row"])
    assert re.fullmatch(r"simulation and formula differ by \d\d\.\d standard errors", claim["problems"][0])


def test_errors_are_named_with_their_seed(wrong):
    start = f"ERROR in wrong under BOOK_SEED={SEED}: cell cell-"
    assert sum(line.startswith(start) for line in wrong.printed.splitlines()) == 2


def test_errors_alone_make_a_book_wrong(notebooks, monkeypatch):
    run = Run("raising", SEED, [claim_with([0.5])], ["cell cell-0: ZeroDivisionError: division by zero"])
    monkeypatch.setattr(reseed, "sweep", lambda *arguments: iter([run]))
    outcome = run_main(notebooks["light"], "--seed", SEED)
    assert outcome.status == 1
    assert outcome.printed.splitlines()[-1] == "1 seeds, 1 claims checked, 1 failed, 0 problems with z"


def test_problems_with_the_scores_alone_make_a_book_wrong(capsys):
    assert reseed.report(runs_of(rng("test.reseed.report").normal(0.5, 1, (20, 30)))) == 1
    printed = capsys.readouterr().out
    assert "FAILED: the mean of the z-scores is not that of N(0, 1), p = " in printed
    assert printed.splitlines()[-1].startswith("20 seeds, 20 claims checked, 0 failed, 1 problems with z")


def test_the_notebooks_stay_as_they_were(stored, right, wrong, on_dask):
    assert stored == {path: path.read_bytes() for path in stored}


def test_claims_stored_before_are_not_counted(right, wrong):
    assert "stale.claim" not in right.printed + wrong.printed


@pytest.fixture
def seeds_of(monkeypatch, notebooks):
    """Return a function that runs ``main`` without executing anything and returns the seeds it would have used."""

    def run(*arguments):
        chosen = []
        monkeypatch.setattr(
            reseed, "sweep", lambda paths, seeds, jobs: chosen.extend(seeds) or runs_of(np.ones((len(seeds), 1)))
        )
        monkeypatch.setattr(reseed, "report", lambda runs: 0)
        assert reseed.main([str(notebooks["light"]), *arguments]) == 0
        return chosen

    return run


def test_twenty_seeds_are_drawn_afresh_at_every_call(seeds_of):
    # Two of forty are equal once in three million calls.
    first, second = seeds_of(), seeds_of()
    assert len(first) == len(second) == 20
    assert len({*first, *second}) == 40


def test_the_number_of_seeds_can_be_chosen(seeds_of):
    assert len(seeds_of("--seeds", "3")) == 3
    assert seeds_of("--seed", "7") == [7]
    assert seeds_of("--seed", "0") == [0]


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_seeds_are_refused(notebooks, number, capsys):
    with pytest.raises(SystemExit) as exit:
        reseed.main([str(notebooks["light"]), "--seeds", number])
    assert exit.value.code == 2
    assert f"--seeds must be at least 1, got {number}" in capsys.readouterr().err


def test_notebooks_of_one_name_in_two_folders_are_both_executed(tmp_path, monkeypatch):
    paths = [write_notebook(tmp_path / part / "same.ipynb", [f"'{part}'"]) for part in ("one", "two")]
    executed = []
    monkeypatch.setattr(reseed, "execute", lambda name, text, seed: executed.append(text) or Run(name, seed, [], []))
    assert len(list(reseed.sweep(paths, [SEED], jobs=1))) == 2
    assert executed == [path.read_text(encoding="utf-8") for path in paths]


def test_a_seed_can_be_run_again_from_the_command_line(notebooks, right):
    # As make calls it, with processes of joblib's own. They have to import the package, so that one test must do.
    process = subprocess.run(
        [sys.executable, "-m", "helpers.lab.reseed", "--seed", str(SEED), "--jobs", "2", str(notebooks["light"])],
        cwd=ROOT,
        env=os.environ | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    largest = np.abs(right.runs[1].z).max()
    chapter, scores, summary = process.stdout.splitlines()
    assert chapter == f"light: 2 claims checked, 0 failed, largest |z| {largest:.2f}"
    assert scores.startswith("4 z-scores, ")
    assert summary == "1 seeds, 2 claims checked, 0 failed, 0 problems with z"


# On a cluster of several processes


def test_a_cluster_checks_every_seed(on_dask):
    assert on_dask.status == 0
    assert sorted(run.seed for run in on_dask.runs) == [SEED, SEED + 1]


def test_kernels_of_a_cluster_are_children_of_its_workers(on_dask, right, cluster):
    from distributed import Client

    with Client(cluster) as client:
        workers = set(client.run(os.getpid).values())
    assert len(workers) == 2
    assert os.getpid() not in workers
    assert {run.claims[1]["computed"] for run in on_dask.runs} <= workers
    assert right.runs[1].claims[1]["computed"] == os.getpid()


def test_one_seed_gives_the_same_claims_wherever_it_runs(on_dask, right):
    first, second = sorted(on_dask.runs, key=lambda run: run.seed)
    assert first.claims[0] == right.runs[1].claims[0]
    assert second.claims[0]["z"] != first.claims[0]["z"]


# The test of the z-scores


def claim_with(z):
    return {"id": "tiny.slug", "case": "", "kind": "agree", "passed": True, "row": "", "problems": [], "z": list(z)}


def runs_of(scores):
    """One run for each row of scores, under seeds 0, 1, …"""
    return [Run("tiny", seed, [claim_with(z)], []) for seed, z in enumerate(scores)]


def test_standard_normal_scores_are_refused_about_as_rarely_as_stated():
    # Two tests at 1e-4. The rows' mean squares are a little skewed, which makes it 3.4e-4 for 30 scores a row.
    sets = 500
    z = rng("test.reseed.standard").normal(size=(sets, 20, 30))
    refused = sum(bool(z_score_problems(runs_of(scores))[1]) for scores in z)
    assert stats.binom.sf(refused - 1, sets, 2e-4) > 1e-6


def test_overstated_standard_errors_are_caught():
    for scores in rng("test.reseed.overstated").normal(0, 0.8, (20, 20, 30)):
        _, problems = z_score_problems(runs_of(scores))
        assert any(problem.startswith("the root mean square of the z-scores is not") for problem in problems)


def test_understated_standard_errors_are_caught():
    for scores in rng("test.reseed.understated").normal(0, 1.3, (20, 20, 30)):
        _, problems = z_score_problems(runs_of(scores))
        assert any(problem.startswith("the root mean square of the z-scores is not") for problem in problems)


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_scores_off_center_are_caught(shift):
    for scores in rng("test.reseed.shifted").normal(shift, 1, (20, 20, 30)):
        _, problems = z_score_problems(runs_of(scores))
        assert any(problem.startswith("the mean of the z-scores is not") for problem in problems)


def test_scores_of_all_notebooks_under_a_seed_count_as_one_sample():
    scores = rng("test.reseed.notebooks").normal(0, 1, (20, 30))
    halves = [
        Run(name, seed, [claim_with(z)], [])
        for seed, row in enumerate(scores)
        for name, z in (("first", row[:15]), ("second", row[15:]))
    ]
    assert z_score_problems(halves) == z_score_problems(runs_of(scores))


def test_one_seed_is_no_sample():
    summary, problems = z_score_problems(runs_of(rng("test.reseed.one").normal(5, 1, (1, 30))))
    assert summary.endswith("(not tested: one seed only)")
    assert summary.startswith("30 z-scores, mean +")
    assert problems == []


def test_a_book_without_scores_is_a_problem(capsys):
    runs = [
        Run("tiny", seed, [check_exact("tiny.slug", 1.0, 1.0)._repr_mimebundle_()[1]["claim"]], []) for seed in (1, 2)
    ]
    assert z_score_problems(runs) == ("no z-scores", ["no claim has a z-score"])
    assert reseed.report(runs) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 seeds, 2 claims checked, 0 failed, 1 problems with z"
