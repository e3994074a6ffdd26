"""The rules for arguments: numbers and arrays alike, every entry, neither NaN nor infinite."""

import math
import re

import numpy as np
import pytest
import torch

from helpers.lab.checks import (
    require_at_least_one,
    require_between,
    require_not_negative,
    require_positive,
    require_same_device,
)

FORMS = {
    "number": lambda number: number,
    "numpy": lambda number: np.array([[2.0, number]]),
    "torch": lambda number: torch.tensor([2.0, number]),
    "list": lambda number: [2.0, number],
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_what_is_not_positive_and_finite_is_refused(form, number):
    with pytest.raises(ValueError, match=re.escape(f"std must be positive and finite, got {form(number)}")):
        require_positive(mean=1.0, std=form(number))


@forms
def test_positive_numbers_pass(form):
    require_positive(std=form(1e-30))


@forms
@pytest.mark.parametrize("number", [-1e-30, -math.inf, math.nan])
def test_negative_numbers_are_refused(form, number):
    with pytest.raises(ValueError, match=re.escape(f"variance must not be negative, got {form(number)}")):
        require_not_negative(mean=1.0, variance=form(number))


@forms
def test_infinite_numbers_are_refused_where_none_may_be_negative(form):
    with pytest.raises(ValueError, match=re.escape(f"variance must be finite, got {form(math.inf)}")):
        require_not_negative(variance=form(math.inf))


@forms
def test_zero_is_not_negative(form):
    require_not_negative(variance=form(0.0))


@forms
@pytest.mark.parametrize("count", [0, -3, 0.999, math.nan, -math.inf])
def test_counts_below_one_are_refused(form, count):
    with pytest.raises(ValueError, match=re.escape(f"n must be at least 1, got {form(count)}")):
        require_at_least_one(m=1, n=form(count))


@forms
def test_infinite_counts_are_refused(form):
    with pytest.raises(ValueError, match=re.escape(f"n must be finite, got {form(math.inf)}")):
        require_at_least_one(n=form(math.inf))


@forms
def test_a_count_of_one_passes(form):
    require_at_least_one(n=form(1))


@forms
@pytest.mark.parametrize("number", [-0.001, 3.001, math.nan, math.inf, -math.inf])
def test_numbers_outside_an_interval_are_refused(form, number):
    with pytest.raises(ValueError, match=re.escape(f"rho must lie in [0, 3], got {form(number)}")):
        require_between(0, 3, rho=form(number))


@forms
@pytest.mark.parametrize("number", [0, 3])
def test_the_ends_of_an_interval_belong_to_it(form, number):
    require_between(0, 3, rho=form(number))


def test_a_generator_of_another_device_is_refused():
    require_same_device(torch.Generator(), x=torch.zeros(1))
    message = "generator must be on the device of x, meta, got a generator on cpu"
    with pytest.raises(ValueError, match=message):
        require_same_device(torch.Generator(), x=torch.zeros(1, device="meta"))
