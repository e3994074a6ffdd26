"""The bench that every chapter shares. What stands here is what notebooks use; the rest is in its modules."""

from helpers.lab import datasets, estimates, figures, models, sliders, training
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
    "generator",
    "glue",
    "models",
    "seeded",
    "sliders",
    "training",
]
