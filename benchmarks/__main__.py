"""Run every benchmark once and end with a line of ratios."""

import argparse
import importlib
import pkgutil
from collections import defaultdict

import torch

import benchmarks
from benchmarks import timing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="how often each call is timed (default 21)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # processor time is that of all threads
    names = [f"benchmarks.{module.name}" for module in pkgutil.iter_modules(benchmarks.__path__)]
    modules = [importlib.import_module(name) for name in names if name != "benchmarks.__main__"]
    # Making the races compares their results, all of them before the first is timed.
    races = [race for module in modules if hasattr(module, "races") for race in module.races()]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, float32, median of {options.rounds} rounds\n")
    print(f"{'':40}{'ours':>10}  {'other':10}{'':>10}  {'ratio':>8}  {'peak memory':>19}  target")
    outcomes = []
    for race in races:
        for outcome in timing.run(race, options.rounds):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    print("\n" + summary(outcomes))


def line(outcome: timing.Outcome) -> str:
    ours, other = (f"{1e3 * seconds:7.2f} ms" for seconds in (outcome.our_seconds, outcome.other_seconds))
    note = "" if outcome.met else ", missed"
    peaks = (outcome.our_peak, outcome.other_peak)
    memory = " ".join(f"{'?':>9}" if peak is None else f"{peak / 2**20:5.0f} MiB" for peak in peaks)
    times = f"{outcome.race.case:40}{ours}  {outcome.other:10}{other}  {outcome.ratio:7.2f}x"
    return f"{times}  {memory}  {outcome.target}{note}"


def summary(outcomes: list[timing.Outcome]) -> str:
    """Return the worst ratio of each part to each other, and the targets that were missed."""
    worst: dict[str, dict[str, timing.Outcome]] = defaultdict(dict)
    for outcome in outcomes:
        part = worst[outcome.race.what]
        if outcome.other not in part or outcome.worse_than(part[outcome.other]):
            part[outcome.other] = outcome
    ratios = "; ".join(f"{what} " + ", ".join(map(str, part.values())) for what, part in worst.items())
    missed = [f"{outcome.race.case} {outcome} ({outcome.target})" for outcome in outcomes if not outcome.met]
    return f"{ratios}. " + ("Targets missed: " + ", ".join(missed) if missed else "All targets met.")


if __name__ == "__main__":
    main()
