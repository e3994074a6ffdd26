"""Races: one way of doing something against others, timed in turn."""

import ctypes
import gc
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """A call of this repository, others that do the same, and the target.

    Attributes
    ----------
    what : str
        Races of the same name share a part of the summary, which shows the worst of them.
    case : str
        Which of them.
    ours : callable
    others : dict of str to callable
    at_least : float, optional
        Target: every other takes at least this many times as long as ours.
    at_most : float, optional
        Target, if there is no `at_least`: ours takes at most this many times as long as every other.
    """

    what: str
    case: str
    ours: Call
    others: dict[str, Call]
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The times of ours and of one other, medians in seconds, and the median of their ratios in single rounds."""

    race: Race
    other: str
    our_seconds: float
    other_seconds: float
    ratio: float  # the one that the target is about
    our_peak: int | None  # bytes, as of peak_memory
    other_peak: int | None

    @property
    def met(self) -> bool:
        return self.ratio <= self.race.at_most if self.race.at_least is None else self.ratio >= self.race.at_least

    @property
    def target(self) -> str:
        at_least = self.race.at_least
        return f"at most {self.race.at_most:g}x" if at_least is None else f"at least {at_least:g}x"

    def worse_than(self, outcome: "Outcome") -> bool:
        return self.ratio > outcome.ratio if self.race.at_least is None else self.ratio < outcome.ratio

    def __str__(self) -> str:
        return f"{'<= ' if self.race.at_least is None else ''}{self.ratio:.3g}x {self.other}"


def run(race: Race, rounds: int) -> list[Outcome]:
    """Time all calls of a race in turn, so that a slow moment of the machine hits them alike.

    It is processor time, to which other programs add less than to the time on the clock.
    """
    calls = {"": race.ours, **race.others}
    for call in calls.values():
        call()  # the first call pays for what is loaded, compiled or cached
    peaks = {name: peak_memory(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timeit.timeit(call, timer=time.process_time, number=1))
    ours = seconds.pop("")
    outcomes = []
    for name, theirs in seconds.items():
        over, under = (ours, theirs) if race.at_least is None else (theirs, ours)
        ratio = statistics.median(a / b for a, b in zip(over, under, strict=True))
        outcomes.append(Outcome(race, name, *map(statistics.median, (ours, theirs)), ratio, peaks[""], peaks[name]))
    return outcomes


def peak_memory(call: Call) -> int | None:
    """Return by how many bytes the memory of the process grows at most during a call; None where Linux does not tell.

    It is what the system hands out, whoever asks for it: PyTorch, NumPy or Python. Memory that is free but not yet
    handed back is handed back first, so that it is counted again when it is used.
    """
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    marks.write_text("5")  # forget the highest memory so far
    before = _kilobytes(status, "VmRSS")
    call()
    return 1024 * max(_kilobytes(status, "VmHWM") - before, 0)


def _kilobytes(status: Path, name: str) -> int:
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))


def require_equal(found: object, wanted: object) -> None:
    """Refuse results that differ by more than 1e-5 of their size, in float32; near 0, where terms of order 1 cancel,
    by more than 1e-6.

    Raises
    ------
    AssertionError
        So that nothing wrong is timed.
    """
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
