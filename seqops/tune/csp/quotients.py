"""Propagators of integer quotients and remainders."""

from __future__ import annotations

from math import gcd

from .domains import Domains, Empty, divisors
from .linear import Propagator

# Pairs of values are compared one by one once neither side has more values than this.
FEW = 64


def not_zero(d: Domains, y: int) -> Propagator:
    """y != 0: a divisor."""
    lo, hi, step, remove = d.lo, d.hi, d.step, d.remove

    def run() -> None:
        if lo[y] <= 0 <= hi[y] and (step[y] or lo[y] == hi[y]):
            remove(y, 0)

    return run


def quotient(d: Domains, z: int, x: int, y: int, up: bool = False) -> Propagator:
    """z == x // y, as z y <= x < (z + 1) y where y > 0; y is not 0. With `up` z == ceildiv(x, y).

    The latter as ceildiv(x, y) - 1 == (x - 1) // y where y > 0, and == (x + 1) // y where y < 0.
    """
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi
    one = int(up)

    def run() -> bool:
        yl, yh = lo[y], hi[y]
        if yl <= 0:
            return negative(yl, yh) if yh < 0 else either(yl, yh)
        xl, xh = lo[x] - one, hi[x] - one
        low = xl // (yh if xl >= 0 else yl) + one
        high = xh // (yl if xh >= 0 else yh) + one
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        zl, top = lo[z] - one, hi[z] - one + 1
        again = False
        least = zl * (yl if zl >= 0 else yh)
        if least > xl:
            set_lo(x, least + one)
            again = True
        most = top * (yh if top >= 0 else yl) - 1
        if most < xh:
            set_hi(x, most + one)
            again = True
        return again if yl == yh else divisor(xl, xh, zl, top) or again

    def divisor(xl: int, xh: int, zl: int, top: int) -> bool:
        """Bounds of a positive y: z y <= x, and top y > x."""
        least, most = lo[y], hi[y]
        if zl > 0:
            most = min(most, xh // zl)
        elif zl < 0 and xh < 0:
            least = max(least, -(xh // -zl))
        if top > 0:
            least = max(least, xl // top + 1)
        elif top < 0:
            most = min(most, -(xl // -top) - 1)
        again = least > lo[y] or most < hi[y]
        if least > lo[y]:
            set_lo(y, least)
        if most < hi[y]:
            set_hi(y, most)
        return again

    def negative(yl: int, yh: int) -> bool:
        """Bounds of x and z; y is negative: z y >= x > (z + 1) y."""
        xl, xh = lo[x] + one, hi[x] + one
        found = [top // end + one for top in (xl, xh) for end in (yl, yh)]
        outer(found)
        zl, zh = lo[z] - one, hi[z] - one
        most = max(zl * yl, zl * yh)
        least = min((zh + 1) * yl, (zh + 1) * yh) + 1
        if most < xh:
            set_hi(x, most - one)
        if least > xl:
            set_lo(x, least - one)
        return most < xh or least > xl

    def either(yl: int, yh: int) -> bool:
        """Bounds of z; y has either sign."""
        ends = [end for end in (yl, -1, yh, 1) if end and yl <= end <= yh]
        outer([-(-top // end) if up else top // end for top in (lo[x], hi[x]) for end in ends])
        return False

    def outer(found: list[int]) -> None:
        if min(found) > lo[z]:
            set_lo(z, min(found))
        if max(found) < hi[z]:
            set_hi(z, max(found))

    return run


def remainder(d: Domains, z: int, x: int, y: int) -> Propagator:
    """z == x % y, with the sign of y; y is not 0."""
    lo, hi, step, bits = d.lo, d.hi, d.step, d.bits
    set_lo, set_hi, keep, congruent = d.set_lo, d.set_hi, d.keep, d.congruent

    def run() -> bool:
        xl, xh, yl, yh = lo[x], hi[x], lo[y], hi[y]
        low, high = (yl + 1 if yl < 0 else 0), (yh - 1 if yh > 0 else 0)
        away = None
        if yl > 0 and xl >= 0:
            high = min(high, xh)
            if xh < yl:
                low = xl
        if yl == yh and xl // yl == xh // yl:
            # All of x lies between two multiples.
            away = xl // yl * yl
            low, high = xl - away, xh - away
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        if away is not None:
            again = False
            if lo[z] + away > xl:
                set_lo(x, lo[z] + away)
                again = True
            if hi[z] + away < xh:
                set_hi(x, hi[z] + away)
                again = True
            return again
        if yl == yh:
            size = abs(yl)
            if lo[z] == hi[z]:
                return congruent(x, lo[z], size)
            g = gcd(step[x], size)
            return (g > 1 and congruent(z, lo[x], g)) or pairs(d, z, x, y)
        if xl == xh:
            if lo[z] == hi[z] and bits[y] and xl != lo[z]:
                return keep(y, divisors(xl - lo[z], d.base[y], d.unit[y], bits[y]))
        elif lo[z] == 0 == hi[z] and (xl > 0 or xh < 0):
            # |y| <= |x|
            size = max(abs(xl), abs(xh))
            if yh > size:
                set_hi(y, size)
                return True
            if yl < -size:
                set_lo(y, -size)
                return True
        return pairs(d, z, x, y)

    return run


def pairs(d: Domains, z: int, x: int, y: int) -> bool:
    """z == x % y for each pair of values left, where there are few; true if that cut."""
    bits, size = d.bits, d.size
    if not (bits[y] and size(y) <= FEW) and d.lo[y] != d.hi[y]:
        return False
    if not (bits[x] and size(x) <= FEW) and d.lo[x] != d.hi[x]:
        return False
    zl, zh = d.lo[z], d.hi[z]
    dividends = d.values(x)
    held_dividends: set[int] = set()
    held_divisors = []
    for divisor in d.values(y):
        held = [value for value in dividends if divisor and zl <= value % divisor <= zh]
        if held:
            held_divisors.append(divisor)
            held_dividends.update(held)
    if not held_divisors:
        raise Empty
    cut = bool(bits[y]) and d.keep(y, d.mask(y, held_divisors))
    return (bool(bits[x]) and d.keep(x, d.mask(x, held_dividends))) or cut
