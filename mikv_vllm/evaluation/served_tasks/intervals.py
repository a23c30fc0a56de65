"""95 % confidence intervals of accuracies, and of differences between paired accuracies."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean
from typing import NamedTuple

NORMAL_95 = 1.96
"""Half the width of the 95 % interval of a standard normal number."""


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def wilson(accuracies: Sequence[float]) -> Interval:
    """Return the mean of accuracies from 0 to 1 with Wilson's interval.

    For accuracies between 0 and 1 the interval is too wide rather than too narrow, because no
    distribution with the same mean varies more than one of zeros and ones.
    """
    count, mean = len(accuracies), fmean(accuracies)
    square = NORMAL_95**2
    centre = (mean + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 / (1 + square / count)
    half *= sqrt(mean * (1 - mean) / count + square / (4 * count**2))
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def paired(differences: Sequence[float]) -> Interval:
    """Return the mean of differences from -1 to 1 with the interval of Agresti and Min.

    The interval is that of the differences and of four halves of a pair: one better, one worse, two
    equal (Statistics in Medicine 24, 2005). So it has a width also if no pair differs.
    """
    count = len(differences) + 2
    mean = sum(differences) / count
    variance = (sum(d * d for d in differences) + 1) / count - mean**2
    half = NORMAL_95 * sqrt(variance / count)
    return Interval(fmean(differences), max(-1.0, mean - half), min(1.0, mean + half))


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of independent means, with its interval.

    The distances from the means to their limits are added like standard deviations, below and
    above on their own (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    count = len(intervals)
    mean = fmean(one.mean for one in intervals)
    below = sqrt(sum((one.mean - one.low) ** 2 for one in intervals)) / count
    above = sqrt(sum((one.high - one.mean) ** 2 for one in intervals)) / count
    return Interval(mean, mean - below, mean + above)
