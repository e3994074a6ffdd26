"""Claims keep their own promises: stated rates of false alarms and misses, refusals, and what they show."""

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import sympy as sp
import torch
from scipy import stats

from helpers.lab import claims
from helpers.lab.claims import (
    ChapterTable,
    Claim,
    ClaimError,
    agree,
    bounded,
    check_agree,
    check_bounded,
    check_exact,
    exact,
    percent,
)
from helpers.lab.estimates import Covariance, Estimate, Proportion, mean, proportion
from helpers.lab.runtime import rng

BOOK = Path(__file__).parents[1] / "book"
ID = "chapter.slug"
FALSE_ALARM, MISS = 1e-6, 1e-3
CLAIMS = 8_000
N = 10**6  # large, so that skewness does not matter
rates = pytest.mark.parametrize("rate", [0.01, 0.001])
SETTINGS = [{"s": 2.0, "m": 3}, {"s": 0.5, "m": 8}, {"s": 3.5, "m": 5}]
s, m = sp.symbols("s m", positive=True)


def upper_quantile(probability):
    """Return the point that a standard normal variable exceeds, by Python's own algorithm."""
    return -NormalDist().inv_cdf(probability)


def evidence_limit(false_alarm, miss, entries=1, resolution=0.05):
    """Return the largest standard error, as a fraction of the scale, that is evidence enough."""
    return resolution / (upper_quantile(false_alarm / (2 * entries)) + upper_quantile(miss))


def assert_count(count, trials, probability):
    """Refuse a count outside the exact binomial interval that is left once in a million runs."""
    low, high = stats.binom.ppf([5e-7, 1 - 5e-7], trials, probability)
    assert low <= count <= high


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(claims, "_shown", {})
    monkeypatch.delenv("BOOK_GO_ON", raising=False)


@pytest.fixture
def without_record(monkeypatch):
    """Leave out the ledger's figures, half of a check's run time, where only its outcome is counted."""
    monkeypatch.setattr(claims, "_plain", lambda numbers: None)


def count_failures(values, stderr, formula, rate):
    return sum(
        not check_agree(ID, Estimate(v, stderr, N, 0.0), formula=formula, false_alarm=rate, miss=rate).passed
        for v in values
    )


# The promised rates. Every count lies outside its interval with probability 1e-6.


@rates
def test_false_alarms_for_one_number_are_as_frequent_as_stated(without_record, rate):
    formula, stderr = 3.0, 3.0 * evidence_limit(rate, rate)
    values = rng(f"test.claims.alarm.{rate}").normal(formula, stderr, CLAIMS)
    assert_count(count_failures(values, stderr, formula, rate), CLAIMS, rate)


@rates
def test_misses_for_one_number_are_as_frequent_as_stated(without_record, rate):
    # The formula is wrong by the resolution, 5 %, and the sample just large enough to be evidence.
    formula, stderr = -3.0, 3.0 * evidence_limit(rate, rate)
    values = rng(f"test.claims.miss.{rate}").normal(formula + 0.15, stderr, CLAIMS)
    assert_count(CLAIMS - count_failures(values, stderr, formula, rate), CLAIMS, rate)


@rates
def test_false_alarms_for_ten_numbers_are_as_frequent_as_stated(without_record, rate):
    formula = np.linspace(1, 5, 10)
    stderr = formula * evidence_limit(rate, rate, 10)
    values = rng(f"test.claims.alarms.{rate}").normal(formula, stderr, (CLAIMS, 10))
    assert_count(count_failures(values, stderr, formula, rate), CLAIMS, 1 - (1 - rate / 10) ** 10)


@rates
def test_misses_of_one_wrong_number_in_ten_are_as_frequent_as_stated(without_record, rate):
    formula = np.linspace(1, 5, 10)
    stderr = formula * evidence_limit(rate, rate, 10)
    wrong = np.where(np.arange(10) == 6, 1.05, 1.0)
    values = rng(f"test.claims.misses.{rate}").normal(formula * wrong, stderr, (CLAIMS, 10))
    # A claim that misses the wrong number must also raise no false alarm for the other nine.
    probability = rate * (1 - rate / 10) ** 9
    assert_count(CLAIMS - count_failures(values, stderr, formula, rate), CLAIMS, probability)


@rates
def test_false_alarms_with_standard_errors_from_samples_are_as_frequent_as_stated(without_record, rate):
    n = 1000
    values = rng(f"test.claims.samples.{rate}").normal(10.0, 1.0, (n, 5000))
    estimates = mean(values)
    alarms = sum(
        not check_agree(ID, Estimate(*figures, n, skewness), formula=10.0, false_alarm=rate, miss=rate).passed
        for *figures, skewness in zip(estimates.value, estimates.stderr, estimates.skewness, strict=True)
    )
    # Exactly, z has Student's law.
    assert_count(alarms, 5000, 2 * stats.t.sf(upper_quantile(rate / 2), n - 1))


@pytest.mark.parametrize("wrong", range(10))
def test_one_grossly_wrong_number_in_ten_is_always_caught(wrong):
    # 40 standard errors; the noise of the estimate itself would have to exceed 33.
    formula = np.linspace(1, 5, 10)
    stderr = formula * evidence_limit(FALSE_ALARM, MISS, 10)
    values = rng(f"test.claims.gross.{wrong}").normal(formula, stderr)
    values[wrong] += 40 * stderr[wrong]
    claim = check_agree(ID, Estimate(values, stderr, N, 0.0), formula=formula)
    assert not claim.passed
    assert f"at entry {wrong} " in claim.problems[0]


def test_default_rates_are_one_in_a_million_and_one_in_a_thousand():
    # z of a single number is refused beyond 4.89, the normal quantile of a two-sided 1e-6.
    c = upper_quantile(5e-7)
    stderr = evidence_limit(FALSE_ALARM, MISS)
    assert check_agree(ID, Estimate(1 + 0.9999 * c * stderr, stderr, N, 0), formula=1.0).passed
    assert not check_agree(ID, Estimate(1 + 1.0001 * c * stderr, stderr, N, 0), formula=1.0).passed


@pytest.mark.parametrize("resolution", [0.05, 0.01])
@pytest.mark.parametrize("entries", [1, 10])
def test_evidence_is_enough_up_to_its_limit(entries, resolution):
    limit = evidence_limit(FALSE_ALARM, MISS, entries, resolution)
    formula = np.linspace(1, 5, entries) if entries > 1 else np.array(2.0)
    enough, too_noisy = (
        check_agree(ID, Estimate(formula * 1.0001, formula * limit * x, N, 0), formula=formula, resolution=resolution)
        for x in (1 - 1e-6, 1 + 1e-6)
    )
    assert enough.passed
    assert not too_noisy.passed


# What agree asks


def good(value=0.12514, stderr=0.00031, n=N, skewness=0.0):
    return Estimate(value, stderr, n, skewness)


def spread_over(formula, offset=0.2):
    """Return an estimate that is off by a fifth of a standard error everywhere."""
    formula = np.asarray(formula, dtype=float)
    return Estimate(formula * (1 + offset * 0.001), np.abs(formula) * 0.001, N, 0.0)


def variance(s, m):
    return s**2 / m


VALUES = [variance(**setting) for setting in SETTINGS]


def test_a_sample_too_noisy_is_a_failure():
    claim = check_agree(ID, good(stderr=0.002), formula=0.125)
    assert claim.problems == ["too noisy: would catch 13 %, wanted 5 %"]


COPIED = "the simulation equals the formula to the last digit: it was not simulated"


@pytest.mark.parametrize("off", [1.0, 1 + 1e-15, 1 - 0.9e-14])
@pytest.mark.parametrize("formula", [0.125, [0.125, 0.3], [0.0, 0.3]])
def test_a_simulation_that_equals_its_formula_is_a_failure(formula, off):
    formula = np.array(formula)
    claim = check_agree(ID, Estimate(formula * off, 1e-5, N, 0), formula=formula, scale=1.0)
    assert claim.problems == [COPIED]


@pytest.mark.parametrize(("simulated", "formula"), [(0.3 + 1.1e-14, 0.3), ([0.3, 0.1 + 1e-6], [0.3, 0.1]), (0.0, 0.0)])
def test_a_simulation_that_differs_in_one_entry_or_is_0_is_no_copy(simulated, formula):
    assert check_agree(ID, Estimate(simulated, 1e-5, N, 0), formula=formula, scale=1.0).passed


def test_two_simulations_from_the_same_data_are_a_failure():
    assert check_agree(ID, good(), formula=good()).problems == [COPIED]


@pytest.mark.parametrize(("n", "copied"), [(700_000, False), (800_000, True)])
def test_relative_frequencies_that_equal_the_formula_are_a_failure_if_chance_is_small(n, copied):
    # Each of two hits 0.3 with probability 1/√(2πn·0.21), both with 1.08e-6 or 0.95e-6; the limit is 1e-6.
    claim = check_agree(ID, Proportion([0.3, 0.3], math.sqrt(0.21 / n), n, 0), formula=[0.3, 0.3])
    assert claim.problems == ([COPIED] if copied else [])


def test_a_sample_too_skewed_is_a_failure():
    claim = check_agree(ID, good(n=100, skewness=1.0), formula=0.125)
    skew = upper_quantile(5e-7) ** 3 / (3 * 10)
    assert claim.problems == [f"too skewed for its sample: |γ|c³/(3√n) = {skew:.2g} must not exceed ln 2 = 0.69"]


@pytest.mark.parametrize("sign", [-1, 1])
def test_skewness_is_allowed_up_to_its_limit(sign):
    limit = math.log(2) * 3 * math.sqrt(400) / upper_quantile(5e-7) ** 3
    assert check_agree(ID, good(n=400, skewness=sign * limit * (1 - 1e-6)), formula=0.125).passed
    assert not check_agree(ID, good(n=400, skewness=sign * limit * (1 + 1e-6)), formula=0.125).passed


def test_a_formula_that_differs_is_a_failure():
    claim = check_agree(ID, good(), formula=0.128)
    assert claim.problems == ["simulation and formula differ by 9.2 standard errors"]


def test_a_derivation_that_differs_from_the_formula_is_a_failure():
    claim = check_agree(ID, spread_over(VALUES), formula=variance, derived=s**2 / (m - 1), at=SETTINGS)
    assert claim.problems == ["derived 2 is not the formula's 1.333333333 at s=2, m=3"]


@pytest.mark.parametrize(("difference", "passes"), [(0.9e-9, True), (1.1e-9, False)])
def test_a_derivation_must_equal_the_formula_to_nine_digits(difference, passes):
    derived = s**2 / m * (1 + sp.Float(difference, 30))
    assert check_agree(ID, spread_over(VALUES), formula=variance, derived=derived, at=SETTINGS).passed == passes


def test_a_derivation_is_checked_at_every_setting():
    # Right at two settings of three.
    derived = sp.Piecewise((s**2 / m * sp.Rational(11, 10), m > 6), (s**2 / m, True))
    claim = check_agree(ID, spread_over(VALUES), formula=variance, derived=derived, at=SETTINGS)
    assert claim.problems == ["derived 0.034375 is not the formula's 0.03125 at s=0.5, m=8"]


def test_symbols_are_matched_by_name_whatever_their_assumptions():
    derived = sp.Symbol("s") ** 2 / sp.Symbol("m", integer=True)
    assert check_agree(ID, spread_over(VALUES), formula=variance, derived=derived, at=SETTINGS).passed


def test_a_derivation_may_hold_unevaluated_integrals_and_sums():
    x, k = sp.symbols("x k")
    derived = sp.Integral(2 * x, (x, 0, s)) * sp.Sum(1 / m, (k, 1, m)) / m
    assert check_agree(ID, spread_over(VALUES), formula=variance, derived=derived, at=SETTINGS).passed


def test_a_derivation_without_symbols_needs_no_settings():
    assert check_agree(ID, good(), formula=0.125, derived=sp.Rational(1, 8)).passed


def test_derivations_are_computed_with_digits_to_spare():
    # (1 + x) - 1 for x = 1e-12 loses four digits in double precision.
    t = sp.Symbol("t")
    settings = [{"t": 3e-12}, {"t": 5e-12}, {"t": 7e-12}]
    values = [setting["t"] for setting in settings]
    assert check_agree(ID, spread_over(values), formula=lambda t: t, derived=(1 + t) - 1 + 0 * t, at=settings).passed
    assert check_agree(
        ID, spread_over(values), formula=lambda t: t, derived=sp.exp(sp.log(1 + t)) - 1, at=settings
    ).passed


def test_a_sequence_holds_one_estimate_per_setting():
    estimates = [spread_over(value) for value in VALUES]
    assert check_agree(ID, estimates, formula=variance, at=SETTINGS).passed


def test_formulas_may_be_arrays_of_each_setting():
    values = [[variance(**setting), setting["s"]] for setting in SETTINGS]
    claim = check_agree(ID, spread_over(values), formula=lambda s, m: np.array([s**2 / m, s]), at=SETTINGS)
    assert claim.passed


def test_torch_formulas_are_numbers_too():
    assert check_agree(ID, good(), formula=torch.tensor(0.125, dtype=torch.float64)).passed


def test_standard_errors_of_two_estimates_combine():
    simulated, formula = good(value=1.0, stderr=0.003), good(value=1.02, stderr=0.004)
    claim = check_agree(ID, simulated, formula=formula)
    assert claim.figures["stderr"] == pytest.approx(0.005)
    assert claim.figures["z"] == pytest.approx(-4.0)
    assert claim.figures["would_catch"] == pytest.approx((upper_quantile(5e-7) + upper_quantile(1e-3)) * 0.005 / 1.02)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_third_cumulants_of_two_estimates_combine(signs):
    # Of the difference: γ₁σ₁³ - γ₂σ₂³ over (σ₁² + σ₂²)^1.5, each γ being that of the estimate, skewness / √n.
    first, second = signs
    simulated, formula = good(1.001, 0.003, 100, first * 1.5), good(1.0, 0.002, 400, second * 5.0)
    asymmetry = (first * 0.15 * 0.003**3 - second * 0.25 * 0.002**3) / (0.003**2 + 0.002**2) ** 1.5
    skew = abs(asymmetry) * upper_quantile(5e-7) ** 3 / 3
    claim = check_agree(ID, simulated, formula=formula)
    expected = [f"too skewed for its sample: |γ|c³/(3√n) = {skew:.2g} must not exceed ln 2 = 0.69"]
    assert claim.problems == (expected if skew > math.log(2) else [])


def test_errors_of_proportions_are_measured_against_the_smaller_probability():
    claim = check_agree(ID, Proportion(0.98, 0.0001, N, 0.0), formula=0.98)
    assert claim.figures["would_catch"] == pytest.approx(0.05 * 0.0001 / 0.02 / evidence_limit(FALSE_ALARM, MISS))


def test_errors_of_covariances_are_measured_against_the_standard_deviations():
    matrix = np.array([[4.0, 0.0], [0.0, 9.0]])
    claim = check_agree(ID, Covariance(matrix + 0.001, 0.01, N, 0.0), formula=matrix)
    assert claim.passed
    assert claim.figures["would_catch"] == pytest.approx(0.05 * 0.01 / 4 / evidence_limit(FALSE_ALARM, MISS, 4))


def test_a_scale_that_is_named_replaces_the_formulas_size():
    claim = check_agree(ID, good(value=0.001, stderr=0.001), formula=0.0, scale=2.0)
    assert claim.passed
    assert claim.figures["would_catch"] == pytest.approx(0.05 * 0.0005 / evidence_limit(FALSE_ALARM, MISS))


# What agree refuses


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("check", ["formula", "array", "callable", "scale"])
def test_agree_refuses_what_is_not_finite(check, value):
    call = {
        "formula": lambda: check_agree(ID, good(), formula=value),
        "array": lambda: check_agree(ID, spread_over([1.0, 2.0]), formula=[1.0, value]),
        "callable": lambda: check_agree(ID, spread_over(VALUES), formula=lambda s, m: value, at=SETTINGS),
        "scale": lambda: check_agree(ID, good(), formula=0.125, scale=value),
    }[check]
    with pytest.raises(ValueError, match=r"^(formula|scale) must be finite and not empty, got"):
        call()


@pytest.mark.parametrize("field", ["value", "stderr", "skewness", "n"])
def test_a_simulation_that_is_not_finite_never_becomes_an_estimate(field):
    with pytest.raises(ValueError, match=f"{field} must be finite, got nan"):
        good(**{field: math.nan})


@pytest.mark.parametrize("derived", [sp.oo, sp.nan, sp.zoo, sp.I])
def test_agree_refuses_a_derivation_that_is_not_finite(derived):
    with pytest.raises(ValueError, match=r"derived must be finite and real, got .* at "):
        check_agree(ID, good(), formula=0.125, derived=derived)


def test_agree_refuses_a_derivation_with_a_pole_at_a_setting():
    with pytest.raises(ValueError, match=r"derived must be finite and real, got .* at "):
        check_agree(ID, spread_over(VALUES), formula=variance, derived=s**2 / (m - 3), at=SETTINGS)


@pytest.mark.parametrize(
    "id", ["", "chapter", "chapter.", ".slug", "Chapter.slug", "chapter.Slug", "a.b.c", "1a.b", "a.1b", "a.b ", "a-b.c"]
)
def test_ids_that_are_not_chapter_and_slug_are_refused(id):
    message = re.escape(f"a claim's id must have the form chapter.slug in lower case, got {id!r}")
    for call in (
        lambda: check_agree(id, good(), formula=0.125),
        lambda: check_exact(id, 1.0, 1.0),
        lambda: check_bounded(id, 1.0, bound=2.0, attained=(2.0, 2.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ids_may_hold_digits_and_underscores():
    assert check_exact("part_2.slug_3b", 1.0, 1.0).id == "part_2.slug_3b"


@pytest.mark.parametrize("simulated", [good(stderr=0.0), Estimate([0.125, 0.125], [0.001, 0.0], N, 0)])
def test_agree_refuses_a_standard_error_of_zero(simulated):
    with pytest.raises(ValueError, match="a standard error must be positive, got 0"):
        check_agree(ID, simulated, formula=np.full(simulated.value.shape, 0.125))


def test_agree_refuses_events_that_never_happened():
    with pytest.raises(ValueError, match="a standard error must be positive, got 0"):
        check_agree(ID, proportion(np.zeros(1000, dtype=bool)), formula=0.001)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (np.ones(3), "formula must have shape (2,), got (3,)"),
        (1.0, "formula must have shape (2,), got ()"),
        (np.ones((2, 1)), "formula must have shape (2,), got (2, 1)"),
        (Estimate(1.0, 0.001, N, 0), "formula must have shape (2,), got ()"),
    ],
)
def test_agree_refuses_formulas_of_another_shape(formula, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_agree(ID, spread_over([1.0, 1.0]), formula=formula)


def test_agree_refuses_more_estimates_than_settings():
    with pytest.raises(ValueError, match=re.escape("formula must have shape (4,), got (3,)")):
        check_agree(ID, spread_over([*VALUES, 1.0]), formula=variance, at=SETTINGS)


def test_agree_refuses_an_array_of_other_length_than_the_settings():
    # The worst entry is beyond the last setting.
    formula = np.ones(5)
    simulated = Estimate([1.0, 1.0, 1.0, 1.0, 1.002], 0.001, N, 0)
    with pytest.raises(ValueError, match="shape"):
        check_agree(ID, simulated, formula=formula, at=SETTINGS)


def test_agree_refuses_a_derivation_of_another_shape():
    with pytest.raises(ValueError, match=re.escape("derived must have shape (2,), got ()")):
        check_agree(ID, spread_over([1.0, 1.0]), formula=[1.0, 1.0], derived=sp.Integer(1))


def test_agree_refuses_scales_of_another_shape():
    with pytest.raises(ValueError, match=re.escape("scale must have shape (2,), got (3,)")):
        check_agree(ID, spread_over([1.0, 1.0]), formula=[1.0, 1.0], scale=np.ones(3))


def test_agree_refuses_theory_zero_without_a_scale():
    with pytest.raises(ValueError, match="scale must be positive; where theory gives 0 it has to be named, got 0"):
        check_agree(ID, good(value=0.001), formula=0.0)


@pytest.mark.parametrize("formula", [0.0, 1.0, 1.5])
def test_agree_refuses_probabilities_without_a_smaller_part(formula):
    with pytest.raises(ValueError, match="scale must be positive"):
        check_agree(ID, Proportion(0.98, 0.0001, N, 0.0), formula=formula)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_agree_refuses_scales_that_are_not_positive(scale):
    with pytest.raises(ValueError, match=f"scale must be positive; .* got {scale:g}"):
        check_agree(ID, good(), formula=0.125, scale=scale)


def test_agree_refuses_a_function_without_settings():
    with pytest.raises(ValueError, match="a formula that is a function needs its settings in `at`, got none"):
        check_agree(ID, good(), formula=variance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "a claim needs at least 3 settings, got 0"),
        (SETTINGS[:2], "a claim needs at least 3 settings, got 2"),
        ([{"s": 2.0, "m": 0}, *SETTINGS[1:]], "no parameter may be 0, ±1 or equal another in size"),
        ([*SETTINGS[:2], {"s": 1.0, "m": 5}], "no parameter may be 0, ±1 or equal another in size"),
        ([SETTINGS[0], {"s": -1, "m": 8}, SETTINGS[2]], "no parameter may be 0, ±1 or equal another in size"),
        ([SETTINGS[0], {"s": 8.0, "m": 8}, SETTINGS[2]], "no parameter may be 0, ±1 or equal another in size"),
        ([SETTINGS[0], {"s": -8.0, "m": 8}, SETTINGS[2]], "no parameter may be 0, ±1 or equal another in size"),
        ([*SETTINGS[:2], {"s": 2.0, "m": 5}], "every parameter must take at least 3 values, got s = 2"),
        ([{"s": 2.0, "m": 3}] * 3, "every parameter must take at least 3 values"),
        ([*SETTINGS[:2], {"s": 3.5}], "all settings must name the same parameters"),
        ([*SETTINGS[:2], {"s": 3.5, "k": 5}], "all settings must name the same parameters"),
    ],
)
def test_settings_at_which_a_wrong_formula_could_agree_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_agree(ID, spread_over(VALUES), formula=VALUES, derived=s**2 / m, at=settings)


@pytest.mark.parametrize("at", [None, SETTINGS])
def test_a_derivation_with_a_symbol_that_no_setting_names_is_refused(at):
    missing = r"\['k', 'm', 's'\]" if at is None else r"\['k'\]"
    simulated = good() if at is None else spread_over(VALUES)
    formula = 0.125 if at is None else variance
    with pytest.raises(
        ValueError, match=f"every symbol of `derived` must be a parameter in `at`, got {missing} besides"
    ):
        check_agree(ID, simulated, formula=formula, derived=s**2 / m + sp.Symbol("k"), at=at)


# exact


@pytest.mark.parametrize(("difference", "passes"), [(0.0, True), (0.9e-9, True), (1.1e-9, False), (-1.1e-9, False)])
def test_exact_allows_rounding(difference, passes):
    assert check_exact(ID, 2.0, 2.0 * (1 + difference)).passed == passes


@pytest.mark.parametrize(("computed", "passes"), [(2.0, True), (np.nextafter(2.0, 3.0), False)])
def test_exact_at_no_tolerance_wants_identical_numbers(computed, passes):
    claim = check_exact(ID, 2.0, computed, rtol=0)
    assert claim.passed == passes
    assert claim.row == ("2 = 2  equal" if passes else "2 ≠ 2  not equal")
    assert claim.sentence == "Two independent computations agree, to the last bit."


@pytest.mark.parametrize("rtol", [-1e-9, 1.0, math.inf, math.nan])
def test_exact_refuses_tolerances_outside_0_and_1(rtol):
    with pytest.raises(ValueError, match=re.escape(f"rtol must lie in [0, 1), got {rtol}")):
        check_exact(ID, 2.0, 2.0, rtol=rtol)


@pytest.mark.parametrize(("rtol", "passes"), [(0.011, True), (0.009, False)])
def test_exact_obeys_its_tolerance(rtol, passes):
    assert check_exact(ID, 2.0, 2.02, rtol=rtol).passed == passes


@pytest.mark.parametrize(("scale", "passes"), [(2.0, True), (0.5, False), (np.array([2.0, 0.5]), False)])
def test_exact_obeys_its_scale(scale, passes):
    assert check_exact(ID, [0.0, 0.0], [1e-9, 1e-9], scale=scale).passed == passes


def test_exact_checks_every_entry():
    claim = check_exact(ID, [1.0, 2.0, 4.0], [1.0, 2.0, 4.2])
    assert claim.problems == ["two computations at entry 2 differ by 5 %"]


def test_exact_takes_torch_tensors():
    assert check_exact(
        ID, torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True), np.array([1.0, 2.0])
    ).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["formula", "computed", "scale"])
def test_exact_refuses_what_is_not_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and not empty, got"):
        check_exact(**{"id": ID, "formula": 1.0, "computed": 1.0, name: value})


def test_exact_refuses_different_shapes():
    with pytest.raises(ValueError, match=re.escape("computed must have shape (2,), got (3,)")):
        check_exact(ID, np.ones(2), np.ones(3))


def test_exact_refuses_zero_without_a_scale():
    with pytest.raises(ValueError, match="scale must be positive; where theory gives 0 it has to be named, got 0"):
        check_exact(ID, 0.0, 0.0)


def test_exact_refuses_nothing_at_all():
    with pytest.raises(ValueError, match="formula must be finite and not empty"):
        check_exact(ID, [], [])


# bounded

ATTAINED = (2.0, 2.0)
CONTROL = (3.0, 2.0)


@pytest.mark.parametrize(
    ("observed", "passes"),
    [(1.0, True), (2.0, True), (2 * (1 + 0.9e-9), True), (2 * (1 + 1.1e-9), False), (3.0, False)],
)
def test_a_number_keeps_its_bound_to_rounding(observed, passes):
    assert check_bounded(ID, observed, bound=2.0, attained=ATTAINED).passed == passes


@pytest.mark.parametrize(("observed", "passes"), [(-2.0, True), (-2 * (1 - 0.9e-9), True), (-2 * (1 - 1.1e-9), False)])
def test_a_negative_bound_is_kept_to_rounding_too(observed, passes):
    assert check_bounded(ID, observed, bound=-2.0, attained=ATTAINED).passed == passes


def test_every_number_must_keep_its_bound():
    bound = np.array([2.0, 2.0, 5.0])
    assert check_bounded(ID, [1.0, 2.0, 4.9], bound=bound, control=CONTROL).passed
    claim = check_bounded(ID, [1.0, 2.25, 4.9], bound=bound, control=CONTROL)
    assert claim.problems == ["the bound is exceeded by 0.25"]


@pytest.mark.parametrize("entries", [1, 10])
def test_an_estimate_breaks_its_bound_beyond_the_one_sided_limit(entries):
    limit = upper_quantile(1e-6 / entries) * 0.01
    value = np.ones(entries)
    value[-1] = 2 + limit * (1 - 1e-6)
    assert check_bounded(ID, Estimate(value, 0.01, N, 0), bound=2.0, control=CONTROL).passed
    value[-1] = 2 + limit * (1 + 1e-6)
    assert not check_bounded(ID, Estimate(value, 0.01, N, 0), bound=2.0, control=CONTROL).passed


@pytest.mark.parametrize(("k", "n"), [(1, 50), (7, 50), (49, 50), (50, 50), (900, 1000)])
@pytest.mark.parametrize("false_alarm", [1e-6, 1e-2])
def test_counts_break_their_bound_beyond_the_clopper_pearson_limit(k, n, false_alarm):
    test = stats.binomtest(k, n, alternative="greater")
    limit = test.proportion_ci(confidence_level=1 - false_alarm, method="exact").low
    observed = proportion(np.arange(n) < k)
    # SciPy finds its limit by bisection, to 2e-12.
    kept, broken = (
        check_bounded(ID, observed, bound=limit + offset, control=CONTROL, false_alarm=false_alarm)
        for offset in (2e-9, -2e-9)
    )
    assert kept.passed
    assert not broken.passed


def test_levels_of_several_counts_are_shared_out():
    limit = stats.binomtest(9, 50, alternative="greater").proportion_ci(1 - 1e-6 / 2, method="exact").low
    observed = proportion(np.stack([np.arange(50) < 9, np.zeros(50, dtype=bool)], axis=1))
    assert check_bounded(ID, observed, bound=limit * (1 + 1e-6), control=CONTROL).passed
    assert not check_bounded(ID, observed, bound=limit * (1 - 1e-6), control=CONTROL).passed


@pytest.mark.parametrize("bound", [0.0, 1e-9, 0.01])
def test_no_event_in_n_keeps_every_bound(bound):
    assert check_bounded(ID, proportion(np.zeros(100, dtype=bool)), bound=bound, control=CONTROL).passed


@pytest.mark.parametrize("rate", [0.01, 0.001])
def test_a_bound_that_is_attained_is_found_broken_as_rarely_as_stated(without_record, rate):
    estimates = rng(f"test.claims.bounded.{rate}").normal(2.0, 0.01, 5000)
    alarms = sum(
        not check_bounded(ID, Estimate(x, 0.01, N, 0), bound=2.0, control=CONTROL, false_alarm=rate).passed
        for x in estimates
    )
    assert_count(alarms, 5000, rate)


def test_a_bound_with_neither_attained_nor_control_is_refused():
    with pytest.raises(
        ValueError, match="a bound needs a case that attains it or a control that breaks it, got neither"
    ):
        check_bounded(ID, 1.0, bound=2.0)


@pytest.mark.parametrize(
    ("attained", "passes"),
    [
        ((2.0, 2.0), True),
        ((2.0, 2 * (1 + 0.9e-9)), True),
        ((2.0, 2 * (1 + 1.1e-9)), False),
        ((1.9, 2.0), False),
        (([2.0, 2.0], [2.0, 2.1]), False),
        ((Estimate(2.001, 0.001, N, 0), 2.0), True),
        ((Estimate(1.99, 0.001, N, 0), 2.0), False),
        ((Estimate(2.0, 0.1, N, 0), 2.0), False),  # too noisy to tell
    ],
)
def test_the_case_that_attains_the_bound_must_attain_it(attained, passes):
    claim = check_bounded(ID, 1.0, bound=2.0, attained=attained)
    assert claim.problems == ([] if passes else ["the case that should attain the bound does not"])


@pytest.mark.parametrize(
    ("control", "passes"),
    [
        ((3.0, 2.0), True),
        (([1.0, 2.1], 2.0), True),
        ((2.0, 2.0), False),
        ((1.0, 2.0), False),
        ((Estimate(2.1, 0.01, N, 0), 2.0), True),
        ((Estimate(2.04, 0.01, N, 0), 2.0), False),  # within its limit of 4.75 standard errors
        ((proportion(np.arange(100) < 60), 0.2), True),
        ((proportion(np.arange(100) < 25), 0.2), False),
    ],
)
def test_the_control_must_break_the_bound(control, passes):
    claim = check_bounded(ID, 1.0, bound=2.0, control=control)
    assert claim.problems == ([] if passes else ["the control, which should break the bound, does not"])


def test_both_a_control_and_an_attaining_case_are_checked():
    assert len(check_bounded(ID, 3.0, bound=2.0, attained=(1.0, 2.0), control=(1.0, 2.0)).problems) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["observed", "bound"])
def test_bounded_refuses_what_is_not_finite(name, value):
    for where in ({}, {"attained"}, {"control"}):
        pair = {"observed": 1.0, "bound": 2.0, name: value}
        sound = {"observed": 1.0, "bound": 2.0}
        arguments = sound | dict.fromkeys(where, tuple(pair.values())) if where else pair | {"control": CONTROL}
        with pytest.raises(ValueError, match=f"{name} must be finite and not empty, got"):
            check_bounded(ID, **arguments)


def test_bounded_refuses_different_shapes():
    with pytest.raises(ValueError, match=re.escape("bound must have shape (2,), got (3,)")):
        check_bounded(ID, np.ones(2), bound=np.ones(3), control=CONTROL)


# Rows


def rows_of(claim):
    return repr(claim).split("\n")


def test_row_of_an_agreement():
    claim = check_agree("minibatch_loss.iid_variance", good(), formula=0.125)
    assert repr(claim) == "minibatch_loss.iid_variance  0.125 ≈ 0.12514 ± 0.00031  z +0.45  would catch 2 %"


def test_row_of_an_agreement_with_a_derivation():
    claim = check_agree("minibatch_loss.iid_variance", good(), formula=0.125, derived=sp.Rational(1, 8))
    assert repr(claim) == "minibatch_loss.iid_variance  0.125 = 0.125 ≈ 0.12514 ± 0.00031  z +0.45  would catch 2 %"


def test_row_of_a_case_names_it():
    claim = check_agree(ID, good(), formula=0.125, case="two losses")
    assert repr(claim) == "chapter.slug [two losses]  0.125 ≈ 0.12514 ± 0.00031  z +0.45  would catch 2 %"


def test_row_of_a_negative_difference_and_a_small_resolution():
    claim = check_agree(ID, good(value=0.1249, stderr=0.00004), formula=0.125)
    assert repr(claim) == "chapter.slug  0.125 ≈ 0.1249 ± 4e-05  z -2.50  would catch 0.26 %"


def test_row_of_an_array_shows_its_worst_entry():
    simulated = Estimate([1.0, 2.003, 4.001], [0.001, 0.002, 0.004], N, 0)
    claim = check_agree(ID, simulated, formula=[1.0, 2.0, 4.0])
    assert repr(claim) == "chapter.slug  3 values, worst at entry 1: 2 ≈ 2.003 ± 0.002  z +1.50  would catch 0.82 %"


def test_row_of_a_matrix_shows_where_its_worst_entry_is():
    simulated = Estimate([[1.0, 2.0], [4.0, 8.012]], 0.008, N, 0)
    claim = check_agree(ID, simulated, formula=[[1.0, 2.0], [4.0, 8.0]])
    assert repr(
        claim
    ) == "chapter.slug  4 values, worst at entry 1, 1: 8 ≈ 8.012 ± 0.008  z +1.50  would catch 6.6 %" + (
        "\n  FAILED: too noisy: would catch 6.6 %, wanted 5 %"
    )


def test_row_of_settings_names_the_worst():
    estimates = [good(1.3333, 0.001), good(0.03126, 0.00002), good(2.45, 0.002)]
    claim = check_agree(ID, estimates, formula=variance, derived=s**2 / m, at=SETTINGS)
    assert repr(claim) == (
        "chapter.slug  3 values, worst at s=0.5, m=8: 0.03125 = 0.03125 ≈ 0.03126 ± 2e-05  z +0.50  would catch 0.67 %"
    )


def test_row_of_arrays_at_settings_names_setting_and_entry():
    values = np.array([[variance(**setting), setting["s"]] for setting in SETTINGS])
    simulated = Estimate(values + np.array([[0, 0], [0, 0], [0, 0.007]]), values * 0.001, N, 0)
    claim = check_agree(ID, simulated, formula=lambda s, m: np.array([s**2 / m, s]), at=SETTINGS)
    assert rows_of(claim)[0].startswith(
        "chapter.slug  6 values, worst at s=3.5, m=5, entry (1,): 3.5 ≈ 3.507 ± 0.0035  "
    )


def test_row_of_a_failure_gives_its_reasons_on_lines_of_their_own():
    claim = check_agree(ID, good(stderr=0.002), formula=0.14)
    assert rows_of(claim) == [
        "chapter.slug  0.14 ≈ 0.12514 ± 0.002  z -7.43  would catch 11 %",
        "  FAILED: too noisy: would catch 11 %, wanted 5 %",
        "  FAILED: simulation and formula differ by 7.4 standard errors",
    ]


def test_row_of_an_exact_claim():
    assert repr(check_exact(ID, 0.125, 0.125)) == "chapter.slug  0.125 = 0.125  equal to 1e-09"


def test_row_of_an_exact_array_shows_its_first_entry():
    # Which of entries equal to rounding is worst depends on the processor.
    claim = check_exact(ID, [1.0, 2.0], [1.0, 2 + 1e-9], rtol=1e-6)
    assert repr(claim) == "chapter.slug  2 values, the first: 1 = 1  equal to 1e-06"


def test_row_of_an_exact_failure_shows_its_worst_entry():
    claim = check_exact(ID, [1.0, 2.0, 4.0], [1.0, 2.0, 4.2])
    assert claim.row == "3 values, worst at entry 2: 4 ≠ 4.2  not equal to 1e-09"


def test_row_of_an_exact_failure_of_one_number():
    assert check_exact(ID, 1.0, 2.0).row == "1 ≠ 2  not equal to 1e-09"


@pytest.mark.parametrize(
    ("observed", "bound", "row"),
    [
        (1.5, 2.0, "1.5 ≤ 2  slack 25 %"),
        (-3.0, -2.0, "-3 ≤ -2"),
        (0.0, 2.0, "0 ≤ 2  slack 100 %"),
        (Estimate(1.5, 0.012, N, 0), 2.0, "1.5 ± 0.012 ≤ 2  slack 25 %"),
        ([1.5, 0.5], [2.0, 0.8], "2 values, worst at entry 0: 1.5 ≤ 2  slack 25 %"),
        ([90.0, 0.97], [100.0, 1.0], "2 values, worst at entry 1: 0.97 ≤ 1  slack 3 %"),
        ([-3.0, -1.0], [1.0, 0.0], "2 values, worst at entry 1: -1 ≤ 0"),
        (proportion(np.arange(100) < 20), 0.25, "20 of 100 ≤ 0.25  slack 20 %"),
        (proportion(np.zeros(100, dtype=bool)), 0.25, "0 of 100 ≤ 0.25  slack 100 %"),
    ],
)
def test_row_of_a_bound(observed, bound, row):
    assert repr(check_bounded(ID, observed, bound=bound, attained=ATTAINED)) == f"chapter.slug  {row}  attained"
    assert repr(check_bounded(ID, observed, bound=bound, control=CONTROL)) == f"chapter.slug  {row}  control rejected"


def test_row_of_a_bound_that_is_not_attained_does_not_say_that_it_is():
    claim = check_bounded(ID, 1.0, bound=2.0, attained=(1.0, 2.0))
    assert not claim.passed
    assert "attained" not in claim.row.replace("not attained", "")


def test_row_of_a_control_that_is_not_rejected_does_not_say_that_it_is():
    claim = check_bounded(ID, 1.0, bound=2.0, control=(1.0, 2.0))
    assert not claim.passed
    assert "control rejected" not in claim.row


# Sentences and HTML


class Outline(HTMLParser):
    """Collect text by the innermost element, and the class of the outermost one."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.text, self.classes = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if not self.stack:
            self.outermost, self.classes = tag, dict(attributes).get("class", "").split()
        if tag != "br":
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text[self.stack[-1]] = self.text.get(self.stack[-1], "") + data


def test_html_of_a_claim_is_a_sentence_with_figures_on_expansion():
    claim = check_agree(ID, good(), formula=0.125)
    outline = Outline(claim._repr_html_())
    assert outline.stack == []
    assert (outline.outermost, outline.classes) == ("details", ["claim", "claim-passed"])
    assert outline.text["summary"].strip() == (
        "The simulation agrees with the formula: off by 0.11 %; an error of 2 % would have been noticed."
    )
    assert outline.text["code"] == claim.row


@pytest.mark.parametrize(("case", "name"), [("", "slug"), ("two losses", "slug [two losses]")])
def test_html_names_the_claim_within_its_chapter(case, name):
    claim = check_exact(ID, 1.0, 1.0, case=case)
    assert Outline(claim._repr_html_()).text["small"] == name


@pytest.mark.parametrize(
    ("claim", "sentence"),
    [
        (
            lambda: check_agree(ID, good(), formula=0.125, derived=sp.Rational(1, 8)),
            "The simulation agrees with the formula and its derivation: off by 0.11 %; "
            "an error of 2 % would have been noticed.",
        ),
        (
            lambda: check_agree(ID, spread_over(VALUES), formula=VALUES),
            "The simulation agrees with the formula: off by 0.02 % at most; "
            "an error of 0.82 % would have been noticed.",
        ),
        (lambda: check_exact(ID, 1.0, 1.0), "Two independent computations agree, to 9 digits."),
        (lambda: check_exact(ID, 1.0, 1.0, rtol=1e-4), "Two independent computations agree, to 4 digits."),
        (
            lambda: check_bounded(ID, 1.5, bound=2.0, attained=ATTAINED),
            "The bound holds with 25 % to spare, and a case attains it.",
        ),
        (
            lambda: check_bounded(ID, 2.0, bound=2.0, control=CONTROL),
            "The bound holds with nothing to spare, and the control breaks it, as it must.",
        ),
        (
            lambda: check_bounded(ID, -1.0, bound=0.0, attained=ATTAINED, control=CONTROL),
            "The bound holds, and a case attains it, and the control breaks it, as it must.",
        ),
    ],
)
def test_sentences(claim, sentence):
    assert claim().sentence == sentence


def test_html_of_a_failure_says_so_and_why():
    claim = check_agree(ID, good(), formula=0.128)
    outline = Outline(claim._repr_html_())
    assert outline.classes == ["claim", "claim-failed"]
    assert outline.text["summary"].strip() == (
        "This claim failed: simulation and formula differ by 9.2 standard errors."
    )
    assert outline.text["span"] == "✗"


def test_html_is_escaped():
    text = "<script>&\"'"
    claim = Claim(ID, text, "exact", text, text, {})
    for shown in (claim, Claim(ID, text, "exact", text, text, {}, [text])):
        assert "<script>" not in shown._repr_html_()
        assert shown._repr_html_().count(html.escape(text)) == 3


@pytest.mark.parametrize(
    "claim",
    [
        lambda: check_agree(ID, good(), formula=0.125, case="a case"),
        lambda: check_agree(ID, spread_over(VALUES), formula=variance, derived=s**2 / m, at=SETTINGS, case="a case"),
        lambda: check_agree(ID, good(), formula=good(0.125), case="a case"),
        lambda: check_agree(ID, good(), formula=0.128, case="a case"),
        lambda: check_exact(ID, np.ones(3), np.ones(3), case="a case"),
        lambda: check_bounded(ID, np.ones(2), bound=2, attained=ATTAINED, case="a case"),
        lambda: check_bounded(ID, proportion(np.arange(9) < 2), bound=0.0, control=CONTROL, case="a case"),
    ],
)
def test_record_of_a_claim_goes_into_the_metadata_as_plain_json(claim):
    claim = claim()
    data, metadata = claim._repr_mimebundle_()
    assert data == {"text/plain": repr(claim), "text/html": claim._repr_html_()}
    record = metadata["claim"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for name in ("id", "case", "kind", "passed", "row", "problems"):
        assert record[name] == getattr(claim, name)
    assert not {*claim.figures} - {*record}


def test_record_of_an_agreement_holds_its_figures():
    estimates = [good(1.3333, 0.001), good(0.03126, 0.00002), good(2.45, 0.002)]
    claim = check_agree(ID, estimates, formula=variance, derived=s**2 / m, at=SETTINGS)
    record = claim._repr_mimebundle_()[1]["claim"]
    assert record["formula"] == record["derived"] == [4 / 3, 0.03125, 2.45]
    assert record["simulated"] == [1.3333, 0.03126, 2.45]
    assert record["stderr"] == [0.001, 0.00002, 0.002]
    assert record["z"] == pytest.approx([-1 / 30, 0.5, 0], abs=1e-6)
    assert record["shown"] == 1


def test_record_of_a_bound_holds_its_figures():
    record = check_bounded(ID, [0.5, 1.5], bound=2.0, control=CONTROL)._repr_mimebundle_()[1]["claim"]
    expected = {"observed": [0.5, 1.5], "bound": [2.0, 2.0], "slack": 0.25, "shown": 1}
    assert {name: record[name] for name in expected} == expected


@pytest.mark.parametrize(("computed", "shown"), [([1.0, 2.0, 4.0], 0), ([1.0, 2.0, 4.2], 2)])
def test_record_of_an_exact_claim_holds_its_figures(computed, shown):
    record = check_exact(ID, [1.0, 2.0, 4.0], computed)._repr_mimebundle_()[1]["claim"]
    expected = {"formula": [1.0, 2.0, 4.0], "computed": computed, "rtol": 1e-9, "shown": shown}
    assert {name: record[name] for name in expected} == expected


def shown_figures(record):
    """Return the figures of a record's shown entry, written as a row writes them."""

    def entry(name):
        return np.ravel(record[name])[record["shown"]]

    if record["kind"] == "agree":
        derived = [] if record["derived"] is None else [f"{entry('derived'):.5g} = "]
        simulated = f"≈ {entry('simulated'):.5g} ± {entry('stderr'):.2g}"
        return [
            *derived,
            f"{entry('formula'):.5g} {simulated}  z {entry('z'):+.2f}  would catch ",
            percent(record["would_catch"]),
        ]
    if record["kind"] == "exact":
        return [f"{entry('formula'):.5g} {'=' if record['passed'] else '≠'} {entry('computed'):.5g}"]
    slack = [] if record["slack"] is None else [f"slack {percent(record['slack'])}"]
    return [f"{record['seen']} ≤ {entry('bound'):.5g}", *slack]


@pytest.mark.parametrize(
    "claim",
    [
        lambda: check_agree(ID, good(), formula=0.125),
        lambda: check_agree(ID, spread_over(VALUES), formula=variance, derived=s**2 / m, at=SETTINGS),
        lambda: check_agree(ID, good(), formula=0.128),
        lambda: check_exact(ID, [1.0, 2.0], [1.0, 2.5]),
        lambda: check_exact(ID, 3.0, 3.0, rtol=0),
        lambda: check_bounded(ID, [0.5, 1.5], bound=2.0, control=CONTROL),
        lambda: check_bounded(ID, -1.0, bound=0.0, control=(1.0, 0.0)),
        lambda: check_bounded(ID, proportion(np.arange(9) < 2), bound=0.9, control=CONTROL),
    ],
)
def test_figures_of_a_record_occur_in_its_row(claim):
    record = claim()._repr_mimebundle_()[1]["claim"]
    for figure in shown_figures(record):
        assert figure in record["row"]


@pytest.mark.parametrize("notebook", sorted(BOOK.glob("*/*.ipynb")), ids=lambda path: path.stem)
def test_figures_of_every_stored_claim_occur_in_its_printed_row(notebook):
    # nbval compares the text and skips the metadata, from which the ledger is made.
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "claim" in output.get("metadata", {})]
    assert outputs
    for output in outputs:
        record, text = output["metadata"]["claim"], "".join(output["data"]["text/plain"])
        name = f"{record['id']} [{record['case']}]" if record["case"] else record["id"]
        assert text == "\n".join([f"{name}  {record['row']}", *(f"  FAILED: {p}" for p in record["problems"])])
        for figure in shown_figures(record):
            assert figure in record["row"], f"{name}: {figure!r} is stored, the row says {record['row']!r}"


def test_record_counts_entries_of_matrices_row_by_row():
    simulated = Estimate([[1.0, 2.0], [4.003, 8.0]], 0.002, N, 0)
    assert check_agree(ID, simulated, formula=[[1.0, 2.0], [4.0, 8.0]]).figures["shown"] == 2


# The verbs

VERBS = {
    "agree": (lambda **k: agree(ID, good(), formula=0.125, **k), lambda: agree(ID, good(), formula=0.128)),
    "exact": (lambda **k: exact(ID, 1.0, 1.0, **k), lambda: exact(ID, 1.0, 2.0)),
    "bounded": (
        lambda **k: bounded(ID, 1.0, bound=2.0, control=CONTROL, **k),
        lambda: bounded(ID, 3.0, bound=2.0, control=CONTROL),
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_show_a_row_and_return_nothing(capsys, verb):
    assert VERBS[verb][0]() is None
    shown = capsys.readouterr().out
    assert shown.startswith("chapter.slug  ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_show_the_row_before_they_raise(capsys, verb):
    with pytest.raises(ClaimError, match=r"^chapter\.slug: ") as error:
        VERBS[verb][1]()
    shown = capsys.readouterr().out
    assert shown.startswith("chapter.slug  ")
    assert f"  FAILED: {str(error.value).removeprefix('chapter.slug: ')}\n" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_show_failures_without_raising_when_told_to_go_on(capsys, monkeypatch, verb):
    monkeypatch.setenv("BOOK_GO_ON", "1")
    VERBS[verb][1]()
    assert "  FAILED: " in capsys.readouterr().out
    assert not claims._shown[ID, ""].passed


@pytest.mark.parametrize("verb", VERBS)
def test_refusals_are_raised_even_when_told_to_go_on(monkeypatch, verb):
    monkeypatch.setenv("BOOK_GO_ON", "1")
    refused = {
        "agree": lambda: agree(ID, good(), formula=math.nan),
        "exact": lambda: exact(ID, math.nan, 1.0),
        "bounded": lambda: bounded(ID, 1.0, bound=math.nan, control=CONTROL),
    }
    with pytest.raises(ValueError, match="must be finite"):
        refused[verb]()


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_count_every_case_once(verb):
    for case in ("one", "two", "one"):
        VERBS[verb][0](case=case)
    assert list(claims._shown) == [(ID, "one"), (ID, "two")]


@pytest.mark.parametrize("verb", VERBS)
def test_failed_claims_are_counted_too(verb):
    with pytest.raises(ClaimError):
        VERBS[verb][1]()
    assert not claims._shown[ID, ""].passed


def test_a_claim_error_names_the_case_and_every_problem():
    message = "chapter.slug [a case]: too noisy: would catch 11 %, wanted 5 %; simulation and formula differ by 7.4"
    with pytest.raises(ClaimError, match=re.escape(message)):
        agree(ID, good(stderr=0.002), formula=0.14, case="a case")


def test_agree_passes_on_its_options(capsys):
    estimates = [spread_over(value) for value in VALUES]
    agree(ID, estimates, formula=variance, derived=s**2 / m, at=SETTINGS, case="a case", resolution=0.01, scale=3.0)
    shown = capsys.readouterr().out
    assert (
        shown
        == repr(check_agree(ID, estimates, formula=variance, derived=s**2 / m, at=SETTINGS, case="a case", scale=3))
        + "\n"
    )
    with pytest.raises(ClaimError, match=r"wanted 0\.1 %"):
        agree(ID, estimates, formula=variance, at=SETTINGS, resolution=0.001)


def test_exact_passes_on_its_options(capsys):
    exact(ID, [0.0], [1e-3], rtol=1e-2, scale=1.0, case="a case")
    assert capsys.readouterr().out == "chapter.slug [a case]  1 values, the first: 0 = 0.001  equal to 1e-02\n"


def test_bounded_passes_on_its_options(capsys):
    bounded(ID, 1.0, bound=2.0, attained=ATTAINED, control=CONTROL, case="a case")
    assert capsys.readouterr().out == "chapter.slug [a case]  1 ≤ 2  slack 50 %  attained  control rejected\n"


# The chapter's table


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "chapter.yml").write_text(
        "title: A chapter\nmodule: nothing\nclaims:\n"
        "  first: {title: 'A < B & C', source: 'Theorem 1 <i>', checks: 2}\n"
        "  second: {title: Variance, checks: 1}\n",
        encoding="utf-8",
    )
    return tmp_path


def check(*ids_and_cases):
    for id, case in ids_and_cases:
        exact(f"chapter.{id}", 1.0, 1.0, case=case)


def test_table_counts_the_checks_of_every_claim(registry):
    check(("first", "one"), ("first", "two"), ("first", "two"), ("second", ""))
    exact("chapter_two.first", 1.0, 1.0)
    assert repr(ChapterTable("chapter", registry)).splitlines() == [
        "Claim           What it says  Source              Checks",
        "chapter.first   A < B & C     Theorem 1 <i>            2",
        "chapter.second  Variance      beyond the sources       1",
    ]


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ([("first", "one"), ("second", "")], "chapter.first is checked once, but registered with 2 checks"),
        (
            [("first", "one"), ("first", "two"), ("first", "three"), ("second", "")],
            "chapter.first is checked 3 times, but registered with 2 checks",
        ),
        ([("first", "one"), ("first", "two")], "chapter.second is checked nowhere, but registered with 1 checks"),
        (
            [("first", "one"), ("first", "two"), ("second", ""), ("third", "")],
            "chapter.third is checked once, but registered with no checks",
        ),
    ],
)
def test_table_rejects_a_check_too_few_or_too_many(registry, shown, message):
    check(*shown)
    with pytest.raises(ClaimError, match=f"^{re.escape(message)}$"):
        ChapterTable("chapter", registry)


def test_table_rejects_a_chapter_that_is_not_registered(registry):
    with pytest.raises(ValueError, match=r"^a chapter must be one of chapter, got 'chapter_three'$"):
        ChapterTable("chapter_three", registry)


def test_table_is_escaped_html_that_links_each_claim(registry):
    check(("first", "one"), ("first", "two"), ("second", ""))
    table = ChapterTable("chapter", registry)._repr_html_()
    assert "A &lt; B &amp; C" in table
    assert "Theorem 1 &lt;i&gt;" in table
    assert "<i>" not in table
    assert '<a href="#chapter.first"><code>first</code></a>' in table
    assert Outline(table).stack == []
    assert table.count("<tr>") == 3
