"""``make reseed``: does every claim hold for any seed, and are the z-scores standard normal?

Executes every notebook under many values of ``BOOK_SEED`` and leaves the stored outputs alone. A stored notebook shows
that a claim held once; this shows how often it holds, and would show standard errors that are too large (z-scores too
small) as well as formulas that are slightly wrong (z-scores off center).
"""

import argparse
import os
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import nbclient
import nbformat
import numpy as np
from scipy import stats
from tqdm import tqdm

from helpers.lab.claims import GO_ON
from helpers.lab.ledger import stored_claims

FALSE_ALARM = 1e-4  # of each of the two tests of the z-scores
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Run:
    """One notebook executed under one seed: the records of its claims, and the cells that raised something else."""

    notebook: str
    seed: int
    claims: list[dict[str, Any]]
    errors: list[str]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The records of the claims that failed."""
        return [claim for claim in self.claims if not claim["passed"]]

    @property
    def z(self) -> np.ndarray:
        """All z-scores of the run."""
        scores = [np.ravel(claim["z"]) for claim in self.claims if claim["kind"] == "agree"]
        return np.concatenate(scores) if scores else np.empty(0)


def execute(name: str, text: str, seed: int) -> Run:
    """Execute one notebook under one seed, going on after failed claims and errors.

    Parameters
    ----------
    name, text : str
        The notebook's name and its JSON; a worker on another machine need not have the file, only the package.
    seed : int
        Value of ``BOOK_SEED``.

    Returns
    -------
    Run
    """
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # a cell that is never reached must not show what is stored
    settings = {"BOOK_SEED": str(seed), GO_ON: "1", "TQDM_DISABLE": "1"} | dict.fromkeys(ONE_THREAD, "1")
    options = {"timeout": None, "kernel_name": "python3", "allow_errors": True}
    client = nbclient.NotebookClient(notebook, extra_arguments=["--IPKernelApp.log_level=ERROR"], **options)
    try:
        client.execute(env=os.environ | settings)
    except nbclient.exceptions.DeadKernelError as error:
        return Run(name, seed, stored_claims(notebook), [f"DeadKernelError: {error}"])
    errors = [
        f"cell {cell.id}: {output.ename}: {output.evalue}"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    return Run(name, seed, stored_claims(notebook), errors)


def sweep(notebooks: Sequence[Path], seeds: Sequence[int], jobs: int = -1) -> Iterator[Run]:
    """Execute every notebook under every seed on joblib's current backend, yielding runs as they finish."""
    texts = [(path.stem, path.read_text(encoding="utf-8")) for path in notebooks]
    tasks = (joblib.delayed(execute)(name, text, seed) for seed in seeds for name, text in texts)
    return joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks)


def z_score_problems(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """Test mean and mean square of the z-scores against those of N(0, 1).

    Scores of one notebook and seed may share data, so the unit is the run of all notebooks under one seed: Student's t
    over seeds, on the seed's mean of z and of z² - 1.

    Returns
    -------
    summary : str
        Number, mean and root mean square of the scores.
    problems : list of str
        Empty if both are standard.
    """
    by_seed = defaultdict(list)
    for run in runs:
        by_seed[run.seed].append(run.z)
    scores = [np.concatenate(z) for z in by_seed.values()]
    everything = np.concatenate(scores)
    if not everything.size:
        return "no z-scores", ["no claim has a z-score"]
    rms = np.sqrt(np.mean(everything**2))
    summary = f"{everything.size} z-scores, mean {everything.mean():+.3f}, root mean square {rms:.3f}"
    if len(scores) < 2:
        return f"{summary} (not tested: one seed only)", []
    problems = []
    for name, per_seed in [
        ("mean", [z.mean() for z in scores]),
        ("root mean square", [np.mean(z**2) - 1 for z in scores]),
    ]:
        p = stats.ttest_1samp(per_seed, 0).pvalue
        summary += f", p({name}) = {p:.2g}"
        if not p >= FALSE_ALARM:
            problems.append(f"the {name} of the z-scores is not that of N(0, 1), p = {p:.1g}")
    return summary, problems


def report(runs: Sequence[Run]) -> int:
    """Print what the sweep found and return the exit status: 1 if a claim failed or the z-scores are not standard."""
    for run in runs:
        for claim in run.failed:
            case = f" [{claim['case']}]" if claim["case"] else ""
            why = "; ".join(claim["problems"])
            print(f"FAILED {claim['id']}{case} under BOOK_SEED={run.seed}: {claim['row']}: {why}")
        for error in run.errors:
            print(f"ERROR in {run.notebook} under BOOK_SEED={run.seed}: {error}")
    checked, failed, largest = Counter(), Counter(), defaultdict(float)
    for run in runs:
        checked[run.notebook] += len(run.claims)
        failed[run.notebook] += len(run.failed) + len(run.errors)
        largest[run.notebook] = max(largest[run.notebook], np.abs(run.z).max(initial=0))
    for name in checked:
        print(f"{name}: {checked[name]} claims checked, {failed[name]} failed, largest |z| {largest[name]:.2f}")
    summary, problems = z_score_problems(runs)
    print("\n".join([summary, *(f"FAILED: {problem}" for problem in problems)]))
    seeds = len({run.seed for run in runs})
    print(f"{seeds} seeds, {checked.total()} claims checked, {failed.total()} failed, {len(problems)} problems with z")
    return int(failed.total() > 0 or bool(problems))


@contextmanager
def workers(scheduler: str | None) -> Iterator[None]:
    """Let joblib use this machine's cores, or the Dask cluster whose scheduler has this address."""
    if scheduler is None:
        yield
        return
    from distributed import Client

    with Client(scheduler), joblib.parallel_config(backend="dask"):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="reseed", description="Check every claim of the book under fresh seeds.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=20, help="how many fresh seeds to draw")
    parser.add_argument("--seed", type=int, help="run this one seed instead, to look at a failure again")
    parser.add_argument("--jobs", type=int, default=-1, help="processes on this machine, -1 for one a core")
    parser.add_argument("--scheduler", help="address of a Dask scheduler, such as tcp://host:8786")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    seeds = [options.seed] if options.seed is not None else [secrets.randbits(62) for _ in range(options.seeds)]
    with workers(options.scheduler):
        total = len(options.notebooks) * len(seeds)
        runs = list(tqdm(sweep(options.notebooks, seeds, options.jobs), total=total, unit="notebook"))
    return report(runs)


if __name__ == "__main__":
    sys.exit(main())
