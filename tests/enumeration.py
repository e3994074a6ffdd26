"""Every batch of a small population, listed: the oracle of what is said of random batches."""

import itertools

import numpy as np

from helpers.lab.runtime import rng


def batch_means(population, batch_size):
    """Return the means of all C(N, m) batches, all equally likely."""
    return np.array([np.mean(batch, axis=0) for batch in itertools.combinations(population, batch_size)])


def batch_means_with_replacement(population, batch_size):
    """Return the means of all N^m ordered draws with replacement, all equally likely."""
    return np.array([np.mean(batch, axis=0) for batch in itertools.product(population, repeat=batch_size)])


def vectors(n):
    """Return n skewed gradients of three correlated coordinates with different variances."""
    z = rng("test.gradient_noise.vectors").standard_exponential((n, 3))
    return z @ np.array([[1.0, 0.4, 0.0], [0.0, 2.0, -0.7], [0.5, 0.0, 0.3]]) + [0.4, -2.0, 1.0]
