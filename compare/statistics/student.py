"""Student's t distribution, for real degrees of freedom, without scipy.

Its tails are a regularised incomplete beta function, which is computed by a continued fraction:
NIST's DLMF, 8.17(v), evaluated by Lentz's method. It agrees with scipy to 1e-9 or better.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_PRECISION = 1e-16
_MAX_TERMS = 10_000  # the fraction takes about as many terms as the root of the freedom


def two_sided_p(t: float, freedom: float) -> float:
    """Returns the probability that |T| >= |t|, under `freedom` degrees of freedom (above 0)."""
    square = t * t
    if math.isinf(square):
        return 0.0
    inside = square / (freedom + square)
    # The fraction is used on the side on which it converges. There the smaller of the two
    # probabilities is computed, without subtracting it from 1, so that small tails keep all digits.
    if inside < 1.5 / (freedom / 2 + 2.5):
        return 1.0 - _beta_part(inside, 0.5, freedom / 2, freedom)
    return _beta_part(freedom / (freedom + square), freedom / 2, 0.5, freedom)


def upper_p(t: float, freedom: float) -> float:
    """Returns the probability that T >= t."""
    half = two_sided_p(t, freedom) / 2
    return half if t >= 0 else 1.0 - half


@lru_cache(maxsize=1024)  # a page of pairs asks for few quantiles, again and again
def t_quantile(probability: float, freedom: float) -> float:
    """Returns the t for which [-t, t] has this probability. Bisects until the floats of the bracket
    are neighbours."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > 1 - probability:
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        if two_sided_p(middle, freedom) > 1 - probability:
            low = middle
        else:
            high = middle
    return middle


def _beta_part(x: float, a: float, b: float, freedom: float) -> float:
    """Returns the regularised incomplete beta function I_x(a, b), where one of a and b is 1/2 and
    the other half of `freedom`."""
    if x <= 0.0:
        return 0.0
    log_scale = a * math.log(x) + b * math.log1p(-x) + _log_ratio(freedom / 2) - _HALF_LOG_PI
    # Lentz's method: c and d are ratios of successive numerators and denominators.
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    fraction = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for term in (even, odd):
            d, c = 1.0 + term * d, 1.0 + term / c
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = c if abs(c) > _TINY else _TINY
            fraction *= c * d
        if abs(fraction - before) <= _PRECISION * abs(fraction):
            break
    return math.exp(log_scale) * fraction / a


_HALF_LOG_PI = math.log(math.pi) / 2


def _log_ratio(a: float) -> float:
    """Returns log(gamma(a + 1/2) / gamma(a))."""
    if a < 50:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    # The two logarithms grow and their difference does not: it would lose all digits. This is its
    # asymptotic series, of which the next term is below 1e-14 here.
    return 0.5 * math.log(a) - 1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5)
