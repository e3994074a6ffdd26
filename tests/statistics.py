"""What statistical tests share: assertions that a right program fails once in a million runs, and that say by how much.

A family of entries that are tested together shares one false-alarm rate, by Bonferroni's inequality. Each assertion
returns what it looked at (the worst z-score, the share of hits, the p-value), so that a test can print or bound it.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

FALSE_ALARM = 1e-6  # of each assertion, for all its entries together


class Moment(NamedTuple):
    """A sample moment and its standard error, entry by entry."""

    value: np.ndarray
    stderr: np.ndarray

    def z(self, expected: ArrayLike) -> np.ndarray:
        """Return by how many standard errors the moment misses what is expected."""
        return (self.value - array(expected)) / self.stderr


class Moments(NamedTuple):
    """The first four standardized moments of a sample."""

    mean: Moment
    variance: Moment
    skewness: Moment
    excess_kurtosis: Moment


def array(values: ArrayLike | torch.Tensor) -> np.ndarray:
    """Return numbers as a float64 array, wherever they are."""
    values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
    return np.asarray(values, dtype=np.float64)


def limit_of_z(entries: int, false_alarm: float = FALSE_ALARM) -> float:
    """Return what the largest of so many standard normal |z| exceeds with at most this probability."""
    return float(stats.norm.isf(false_alarm / (2 * entries)))


def worst_z(z: ArrayLike | torch.Tensor) -> float:
    """Return the z-score that is farthest from 0, with its sign; NaN if any is NaN."""
    z = array(z).ravel()
    assert z.size, "there are no z-scores: nothing would be tested"
    return float(z[np.argmax(np.abs(z))])  # argmax stops at a NaN


def assert_z(z: ArrayLike | torch.Tensor, *, false_alarm: float = FALSE_ALARM) -> float:
    """Refuse z-scores of which one is larger than chance allows; return the worst.

    Parameters
    ----------
    z : array_like
        Standard normal each if the program is right, dependent or not.
    false_alarm : float, optional
        Largest probability that a right program is refused, for all entries together.
    """
    worst, entries = worst_z(z), array(z).size
    limit = limit_of_z(entries, false_alarm)
    assert abs(worst) <= limit, f"worst z {worst:+.2f} of {entries}, beyond ±{limit:.2f}: {array(z)}"
    return worst


def moments(samples: ArrayLike | torch.Tensor) -> Moments:
    """Return the moments along dimension 0, with standard errors by the delta method.

    The influence of one sample, standardized to z, on the skewness γ is z³ - γ - 3z - 3γ(z² - 1)/2, and on the
    kurtosis κ it is z⁴ - κ - 4γz - 2κ(z² - 1).
    """
    samples = array(samples)
    mean, variance = samples.mean(0), samples.var(0)
    z = (samples - mean) / np.sqrt(variance)
    skewness, kurtosis = (z**3).mean(0), (z**4).mean(0)
    by_power = {
        "mean": (mean, samples - mean),
        "variance": (samples.var(0, ddof=1), variance * (z**2 - 1)),
        "skewness": (skewness, z**3 - skewness - 3 * z - 1.5 * skewness * (z**2 - 1)),
        "excess_kurtosis": (kurtosis - 3, z**4 - kurtosis - 4 * skewness * z - 2 * kurtosis * (z**2 - 1)),
    }
    return Moments(
        **{
            name: Moment(value, influence.std(0, ddof=1) / math.sqrt(len(samples)))
            for name, (value, influence) in by_power.items()
        }
    )


def assert_means(samples: ArrayLike | torch.Tensor, expected: ArrayLike | torch.Tensor) -> float:
    """Refuse samples of which a mean along dimension 0 misses what is expected; return the worst z-score.

    The z-scores are nearly normal only if the samples are many beside their skewness γ: beyond c, the limit, skewness
    multiplies a tail by exp(|γ|c³/(3√n)), to first order. Too few samples, for which this exceeds 2, are refused too.
    """
    found = moments(samples)
    z, n = found.mean.z(expected), len(samples)
    limit = limit_of_z(z.size)
    needed = (np.abs(found.skewness.value).max() * limit**3 / (3 * math.log(2))) ** 2
    assert n >= needed, f"{n} samples are too few for their skewness: {needed:.0f} would do"
    return assert_z(z)


def assert_standard(z: ArrayLike | torch.Tensor) -> None:
    """Refuse independent z-scores, one repetition a row, whose mean is not 0 or variance not 1.

    Mean and variance of each column have their exact laws for normal z; false alarms: 1e-6 each for all columns.
    """
    z = array(z)
    z = z.reshape(len(z), -1)
    repetitions, columns = z.shape
    assert_z(z.mean(0) * math.sqrt(repetitions))
    scaled = (repetitions - 1) * z.var(0, ddof=1)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2 / columns, 1 - FALSE_ALARM / 2 / columns], repetitions - 1)
    assert ((low <= scaled) & (scaled <= high)).all(), (
        f"variances {scaled / (repetitions - 1)} of {repetitions} z-scores, "
        f"outside [{low / (repetitions - 1):.3f}, {high / (repetitions - 1):.3f}]"
    )


def assert_share(
    hits: ArrayLike | torch.Tensor, probability: float | Sequence[float], *, false_alarm: float = FALSE_ALARM
) -> float:
    """Refuse a number of hits that independent trials make too seldom; return the share of hits.

    Parameters
    ----------
    hits : array_like of bool
        One entry for each trial, for instance whether an interval covered the truth.
    probability : float or pair of float
        Probability of a hit, or the smallest and largest that are allowed, ``(0.93, 1.0)`` for "at least 93 %".
    false_alarm : float, optional
        Largest probability that a right program is refused, by exact binomial tails, half of it on either side.
    """
    hits = array(hits).ravel()
    assert hits.size, "there are no trials: nothing would be tested"
    assert np.isin(hits, (0.0, 1.0)).all(), f"a trial is a hit or not, got {hits}"
    low, high = np.broadcast_to(np.asarray(probability, dtype=float), 2)
    count, trials = int(hits.sum()), hits.size
    too_few = stats.binom.cdf(count, trials, low) < false_alarm / 2
    too_many = stats.binom.sf(count - 1, trials, high) < false_alarm / 2
    wanted = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    assert not too_few, f"{count} hits in {trials} trials are too few for a probability of {wanted}"
    assert not too_many, f"{count} hits in {trials} trials are too many for a probability of {wanted}"
    return count / trials


def assert_law(samples: ArrayLike | torch.Tensor, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """Refuse independent samples that have not this continuous distribution; return Kolmogorov's p-value.

    It would notice a distance between the distribution functions of 4.3/√n, 999 times in 1,000.
    """
    p = float(stats.kstest(array(samples).ravel(), cdf).pvalue)
    assert p >= FALSE_ALARM, f"the samples have not this law, p = {p:.1e}"
    return p


def assert_counts(counts: ArrayLike | torch.Tensor, expected: ArrayLike | torch.Tensor | None = None) -> float:
    """Refuse counts that differ from what is expected, equal ones by default; return the p-value of Pearson's χ².

    The law of χ² is an approximation: at least 20 are expected in each cell.
    """
    counts = array(counts).ravel()
    expected = np.full_like(counts, counts.mean()) if expected is None else array(expected).ravel()
    assert expected.min() >= 20, f"at least 20 must be expected in each cell, got {expected.min():.1f}"
    p = float(stats.chisquare(counts, expected).pvalue)
    assert p >= FALSE_ALARM, f"the counts are not what is expected, p = {p:.1e}"
    return p


def assert_refuses(call: Callable[[], object], rule: str, value: object) -> str:
    """Refuse a call that does not raise a `ValueError` with this rule, followed by ``got`` and this value.

    Returns the message. A program that must be refused for another reason does not pass.
    """
    assert rule.strip(), "a refusal without a rule would always do"
    try:
        call()
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError(f"nothing was refused, wanted a ValueError: {rule}")
    assert rule in message, f"the rule is {rule!r}, the message {message!r}"
    got = rf"\bgot {re.escape(str(value))}(?!\w|\.\d)"
    assert re.search(got, message.partition(rule)[2]), f"the value is {value!r}, the message {message!r}"
    return message
