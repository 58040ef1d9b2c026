"""Propagators of nodes that take one value of several: extremes, absolute values, tables, lists of values."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from .domains import Domains, Empty
from .linear import Propagator


def extreme(d: Domains, z: int, operands: list[int], largest: bool) -> Propagator:
    """z == max(operands) or min(operands)."""
    lo, hi = d.lo, d.hi
    set_lo, set_hi, set_lo_real, set_hi_real = d.set_lo, d.set_hi, d.set_lo_real, d.set_hi_real

    def run_max() -> bool:
        low = max([lo[x] for x in operands])
        high = max([hi[x] for x in operands])
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        zl, zh = lo[z], hi[z]
        again = False
        if zh < high:
            for x in operands:
                if hi[x] > zh:
                    again |= set_hi_real(x, zh)
        if zl > low:
            able = [x for x in operands if hi[x] >= zl]
            if not able:
                raise Empty
            if len(able) == 1:
                again |= set_lo_real(able[0], zl)
        return again

    def run_min() -> bool:
        low = min([lo[x] for x in operands])
        high = min([hi[x] for x in operands])
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        zl, zh = lo[z], hi[z]
        again = False
        if zl > low:
            for x in operands:
                if lo[x] < zl:
                    again |= set_lo_real(x, zl)
        if zh < high:
            able = [x for x in operands if lo[x] <= zh]
            if not able:
                raise Empty
            if len(able) == 1:
                again |= set_hi_real(able[0], zh)
        return again

    return run_max if largest else run_min


def absolute(d: Domains, z: int, x: int) -> Propagator:
    """z == |x|."""
    lo, hi = d.lo, d.hi
    set_lo, set_hi, set_lo_real, set_hi_real = d.set_lo, d.set_hi, d.set_lo_real, d.set_hi_real

    def run() -> bool:
        a, b = lo[x], hi[x]
        low = a if a >= 0 else -b if b <= 0 else 0
        high = max(-a, b)
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        zl, zh = lo[z], hi[z]
        again = set_hi_real(x, zh) | set_lo_real(x, -zh)
        if zl > 0:
            # Nothing of x lies between -zl and zl.
            if -zl < lo[x] < zl:
                again |= set_lo_real(x, zl)
            if -zl < hi[x] < zl:
                again |= set_hi_real(x, -zl)
        return again

    return run


def table(d: Domains, z: int, x: int, entries: dict[int, int | float]) -> Propagator:
    """z == entries[x]; x is one of the keys."""
    lo, hi, bits, step, base, unit = d.lo, d.hi, d.bits, d.step, d.base, d.unit
    set_lo, set_hi, keep = d.set_lo, d.set_hi, d.keep
    items = list(entries.items())

    def run() -> bool:
        xl, xh, zl, zh, b = lo[x], hi[x], lo[z], hi[z], bits[x]
        left = []
        for key, value in items:
            if xl <= key <= xh and zl <= value <= zh:
                if b:
                    k, rest = divmod(key - base[x], unit[x])
                    if rest or not b >> k & 1:
                        continue
                elif (key - xl) % step[x]:
                    continue
                left.append((key, value))
        if not left:
            raise Empty
        again = False
        if b:
            again = keep(x, d.mask(x, [key for key, _ in left]))
        else:
            if left[0][0] > xl:
                set_lo(x, left[0][0])
                again = True
            if left[-1][0] < xh:
                set_hi(x, left[-1][0])
                again = True
        found = [value for _, value in left]
        low, high = min(found), max(found)
        if low > zl:
            set_lo(z, low)
            again |= lo[z] > low
        if high < zh:
            set_hi(z, high)
            again |= hi[z] < high
        return again

    return run


def member(d: Domains, x: int, values: tuple[int, ...]) -> Propagator:
    """x is one of values that lie too far apart for a bit set."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi

    def run() -> bool:
        first, last = bisect_left(values, lo[x]), bisect_right(values, hi[x]) - 1
        if first > last:
            raise Empty
        again = False
        if values[first] > lo[x]:
            set_lo(x, values[first])
            again = True
        if values[last] < hi[x]:
            set_hi(x, values[last])
            again = True
        return again

    return run
