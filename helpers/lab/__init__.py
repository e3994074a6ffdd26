"""The bench that every chapter shares."""

from helpers.lab import datasets, estimates, figures, models, sliders, training
from helpers.lab.claims import ChapterTable, ClaimError, agree, bounded, exact
from helpers.lab.estimates import Estimate, covariance, function_of, mean, proportion, variance
from helpers.lab.prose import glue
from helpers.lab.runtime import device, generator, rng, seeded

__all__ = [
    "ChapterTable",
    "ClaimError",
    "Estimate",
    "agree",
    "bounded",
    "covariance",
    "datasets",
    "device",
    "estimates",
    "exact",
    "figures",
    "function_of",
    "generator",
    "glue",
    "mean",
    "models",
    "proportion",
    "rng",
    "seeded",
    "sliders",
    "training",
    "variance",
]
