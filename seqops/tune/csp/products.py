"""Propagators of integer products.

Each works both ways: from the operands it bounds the node, and from what the node may still be it bounds the operands.
"""

from __future__ import annotations

from math import gcd, isqrt

from .domains import Domains, Empty
from .linear import Propagator
from .reals import corners


def product(d: Domains, z: int, x: int, y: int) -> Propagator:
    """z == x y, of integers."""
    if x == y:
        return square(d, z, x)
    lo, hi, step, set_lo, set_hi = d.lo, d.hi, d.step, d.set_lo, d.set_hi

    def restrict(x: int, y: int) -> bool:
        """Cuts x to the integers of z / y."""
        a, b = lo[y], hi[y]
        low, high = lo[z], hi[z]
        if a > 0 or b < 0:
            if b < 0:
                a, b, low, high = -b, -a, -high, -low
            # Between a z of either sign and a divisor of one sign, the bound is the outermost quotient.
            first = -(-low // (b if low > 0 else a))
            last = high // (a if high > 0 else b)
        elif low > 0 or high < 0:
            # y may be anything but 0.
            last = max(abs(low), abs(high))
            first = -last
        else:
            return False
        cut = False
        if first > lo[x]:
            set_lo(x, first)
            cut = True
        if last < hi[x]:
            set_hi(x, last)
            cut = True
        return cut

    def run() -> bool:
        xl, xh, yl, yh = lo[x], hi[x], lo[y], hi[y]
        positive = xl >= 0 and yl >= 0
        low, high = (xl * yl, xh * yh) if positive else corners(xl, xh, yl, yh)
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        zl, zh = lo[z], hi[z]
        again = False
        if zl > low or zh < high:
            if not positive or zl <= 0:
                again = restrict(x, y)
                again |= restrict(y, x)
            else:
                # As `restrict` does, without calls: most factors are positive.
                bound = -(-zl // yh)
                if bound > xl:
                    set_lo(x, bound)
                    xl = lo[x]
                    again = True
                bound = zh // (yl or 1)
                if bound < xh:
                    set_hi(x, bound)
                    xh = hi[x]
                    again = True
                bound = -(-zl // xh)
                if bound > yl:
                    set_lo(y, bound)
                    again = True
                bound = zh // xl
                if bound < yh:
                    set_hi(y, bound)
                    again = True
        s = step[z]
        if s > 1 and zl != zh:
            if lo[x] == hi[x]:
                again |= divide_step(d, z, int(lo[x]), y)
            elif lo[y] == hi[y]:
                again |= divide_step(d, z, int(lo[y]), x)
        return again

    return run


def divide_step(d: Domains, z: int, c: int, y: int) -> bool:
    """What the step of z == c y says of y; true if that cut."""
    s = d.step[z]
    g = gcd(c, s)
    if g < s:
        if d.lo[z] % g:
            raise Empty
        return d.congruent(y, int(d.lo[z]) // g * pow(c // g, -1, s // g), s // g)
    return False


def align_product(d: Domains, z: int, x: int, y: int) -> None:
    """The step of z == x y from those of x and y."""
    lo, hi, step = d.lo, d.hi, d.step
    a = 0 if lo[x] == hi[x] else step[x]
    b = 0 if lo[y] == hi[y] else step[y]
    # (lo + i a) (lo + j b)
    g = gcd(int(lo[x]) * b, int(lo[y]) * a, a * b)
    if g > 1:
        d.congruent(z, int(lo[x]) * int(lo[y]), g)


def square(d: Domains, z: int, x: int) -> Propagator:
    """z == x x."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi

    def run() -> bool:
        a, b = lo[x], hi[x]
        low = 0 if a <= 0 <= b else min(a * a, b * b)
        high = max(a * a, b * b)
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        if hi[z] < 0:
            raise Empty
        root = isqrt(hi[z])
        again = False
        if a < -root:
            set_lo(x, -root)
            again = True
        if b > root:
            set_hi(x, root)
            again = True
        if lo[z] > low:
            root = isqrt(lo[z] - 1) + 1
            if lo[x] > -root and lo[x] < root:
                set_lo(x, root)
                again = True
            if hi[x] < root and hi[x] > -root:
                set_hi(x, -root)
                again = True
        return again

    return run
