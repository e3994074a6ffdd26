"""The bench that every chapter shares. What stands here is what notebooks use; the rest is in its modules."""

from helpers.lab import datasets, estimates, figures, gaussian, models, networks, sliders, training
from helpers.lab.claims import ChapterTable, agree, bounded, exact
from helpers.lab.prose import glue
from helpers.lab.runtime import device, generator, seeded

__all__ = [
    "ChapterTable",
    "agree",
    "bounded",
    "datasets",
    "device",
    "estimates",
    "exact",
    "figures",
    "gaussian",
    "generator",
    "glue",
    "models",
    "networks",
    "seeded",
    "sliders",
    "training",
]
