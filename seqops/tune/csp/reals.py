"""Propagators of real sums, products and quotients, whose operands may be integers as well.

Floating-point operations keep the order of their operands, so operations on bounds bound what Python computes. Integers
do not round, however: beyond 2^53 their exact value may lie outside of the rounded bounds. There every bound is moved
outwards to the next float.
"""

from __future__ import annotations

from math import inf, nextafter

from .domains import Domains
from .linear import Propagator

# Every integer up to here is a float.
EXACT = 1 << 53
# Rounding of a few operations, with room to spare; cuts that real numbers imply are relaxed by this share ...
SLACK = 1e-12
# ... and by this much, since numbers near 0 round by a larger share.
TINY = 1e-290


def down(value: int | float) -> int | float:
    """Not above `value`: itself up to 2^53, else a float."""
    return value if -EXACT <= value <= EXACT else nextafter(value, -inf)


def up(value: int | float) -> int | float:
    """Not below `value`: itself up to 2^53, else a float."""
    return value if -EXACT <= value <= EXACT else nextafter(value, inf)


def corners(a: int | float, b: int | float, c: int | float, e: int | float) -> tuple[int | float, int | float]:
    """The range of x*y for x in [a, b], y in [c, e]."""
    products = (a * c, a * e, b * c, b * e)
    return min(products), max(products)


def total(d: Domains, z: int, terms: list[tuple[int, int]]) -> Propagator:
    """z == x + y - ..., from left to right as Python adds; terms are (sign, slot)."""
    lo, hi, set_lo, set_hi, set_lo_real, set_hi_real = d.lo, d.hi, d.set_lo, d.set_hi, d.set_lo_real, d.set_hi_real
    share = SLACK + 1e-15 * len(terms)

    def run() -> bool:
        low = high = 0
        for sign, x in terms:
            if sign > 0:
                low = down(low + down(lo[x]))
                high = up(high + up(hi[x]))
            else:
                low = down(low - up(hi[x]))
                high = up(high - down(lo[x]))
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        room, over = up(hi[z]) - low, high - down(lo[z])
        if room >= high - low and over >= high - low:
            return False
        # Of all terms: large ones that cancel leave their rounding behind.
        slack = share * (abs(lo[z]) + abs(hi[z]) + sum([max(abs(lo[x]), abs(hi[x])) for _, x in terms]))
        again = False
        for sign, x in terms:
            first, last = up(lo[x]), down(hi[x])
            more, less = (room, over) if sign > 0 else (over, room)
            again |= set_hi_real(x, first + more + slack)
            again |= set_lo_real(x, last - less - slack)
        return again

    return run


def product(d: Domains, z: int, x: int, y: int) -> Propagator:
    """z == x y."""
    lo, hi = d.lo, d.hi
    set_lo, set_hi, set_lo_real, set_hi_real = d.set_lo, d.set_hi, d.set_lo_real, d.set_hi_real

    def run() -> bool:
        xl, xh, yl, yh = down(lo[x]), up(hi[x]), down(lo[y]), up(hi[y])
        if xl >= 0 and yl >= 0:
            low, high = xl * yl, xh * yh
        elif x == y:
            low, high = (0, max(xl * xl, xh * xh)) if xl <= 0 <= xh else sorted((xl * xl, xh * xh))
        else:
            low, high = corners(xl, xh, yl, yh)
        low, high = down(low), up(high)
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        again = False
        if xl >= 0 and yl >= 0:
            # The only case that costs need: nothing here is negative.
            if hi[z] < high:
                zh = relaxed(hi[z], 1)
                if yl > 0:
                    again |= set_hi_real(x, zh / yl + TINY)
                if xl > 0:
                    again |= set_hi_real(y, zh / xl + TINY)
            if lo[z] > low:
                zl = relaxed(lo[z], -1)
                if yh > 0:
                    again |= set_lo_real(x, zl / yh - TINY)
                if xh > 0:
                    again |= set_lo_real(y, zl / xh - TINY)
        return again

    return run


def quotient(d: Domains, z: int, x: int, y: int) -> Propagator:
    """z == x / y; y is not 0."""
    lo, hi, step = d.lo, d.hi, d.step
    set_lo, set_hi, set_lo_real, set_hi_real = d.set_lo, d.set_hi, d.set_lo_real, d.set_hi_real

    def run() -> bool:
        xl, xh, yl, yh = down(lo[x]), up(hi[x]), down(lo[y]), up(hi[y])
        if yl > 0 and xl >= 0:
            low, high = xl / yh, xh / yl
        else:
            ends = (yl, yh)
            if yl <= 0 <= yh:
                if not step[y]:
                    return False
                # An integer other than 0.
                ends = [end for end in (yl, yh, -1 if yl < 0 else 0, 1 if yh > 0 else 0) if end]
            found = [top / end for top in (xl, xh) for end in ends]
            low, high = min(found), max(found)
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        again = False
        if yl > 0 and xl >= 0:
            if hi[z] < high:
                # x = z y <= zh yh, y = x / z >= xl / zh
                zh = relaxed(hi[z], 1)
                again |= set_hi_real(x, zh * yh + TINY)
                if zh > 0:
                    again |= set_lo_real(y, xl / zh - TINY)
            if lo[z] > low:
                zl = relaxed(lo[z], -1)
                again |= set_lo_real(x, zl * yl - TINY)
                if zl > 0:
                    again |= set_hi_real(y, xh / zl + TINY)
        return again

    return run


def relaxed(bound: int | float, direction: int) -> float:
    """A bound of a product or quotient, moved up or down by what rounding may have taken."""
    return bound + direction * (SLACK * abs(bound) + TINY)
