"""Propagators of integer sums: `sum c x <= b`, `== b`, `!= b`, and scaling.

A propagator is a function without arguments that cuts slots by its relation. It returns true if it may have more to cut
after its own cuts; otherwise the marks that it set on itself are dropped. Once all its slots have one value it fails
where the relation does not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import gcd

from .domains import Domains, Empty

Propagator = Callable[[], object]
Terms = list[tuple[int, int]]  # coefficient, slot


def at_most(d: Domains, terms: Terms, bound: int) -> Propagator:
    """sum c x <= bound."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi
    if len(terms) == 2 and terms[0][0] == -terms[1][0]:
        (c, x), (_, y) = terms if terms[0][0] > 0 else terms[::-1]
        return ordered(d, x, y, bound // c)
    plus = [(c, x) for c, x in terms if c > 0]
    minus = [(-c, x) for c, x in terms if c < 0]

    def run() -> None:
        room = bound
        for c, x in plus:
            room -= c * lo[x]
        for c, x in minus:
            room += c * hi[x]
        if room < 0:
            raise Empty
        for c, x in plus:
            low = lo[x]
            if c * (hi[x] - low) > room:
                set_hi(x, low + room // c)
        for c, x in minus:
            high = hi[x]
            if c * (high - lo[x]) > room:
                set_lo(x, high - room // c)

    return run


def ordered(d: Domains, x: int, y: int, gap: int) -> Propagator:
    """x <= y + gap."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi

    def run() -> None:
        if hi[x] > hi[y] + gap:
            set_hi(x, hi[y] + gap)
        if lo[y] < lo[x] - gap:
            set_lo(y, lo[x] - gap)

    return run


def equal(d: Domains, terms: Terms, total: int) -> Propagator:
    """sum c x == total."""
    if len(terms) == 2:
        (a, x), (b, y) = terms
        if a == -b and total % a == 0:
            return shifted(d, x, y, total // a)
        if abs(a) == 1 or abs(b) == 1:
            # x = c y + e
            (a, x), (b, y) = ((a, x), (b, y)) if abs(a) == 1 else ((b, y), (a, x))
            return scaled(d, x, y, -b * a, total * a)
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi
    plus = [(c, x) for c, x in terms if c > 0]
    minus = [(-c, x) for c, x in terms if c < 0]

    def run() -> bool:
        room = total
        over = -total
        for c, x in plus:
            room -= c * lo[x]
            over += c * hi[x]
        for c, x in minus:
            room += c * hi[x]
            over -= c * lo[x]
        if room < 0 or over < 0:
            raise Empty
        # The sum can grow by `room` from its least value, and shrink by `over` from its largest.
        again = False
        for c, x in plus:
            low, high = lo[x], hi[x]
            width = c * (high - low)
            if width > room:
                set_hi(x, low + room // c)
                again = True
            if width > over:
                value = high - over // c
                if value > lo[x]:
                    set_lo(x, value)
                    again = True
        for c, x in minus:
            low, high = lo[x], hi[x]
            width = c * (high - low)
            if width > room:
                set_lo(x, high - room // c)
                again = True
            if width > over:
                value = low + over // c
                if value < hi[x]:
                    set_hi(x, value)
                    again = True
        return again

    return run


def shifted(d: Domains, x: int, y: int, gap: int) -> Propagator:
    """x == y + gap."""
    lo, hi, step, bits, base, unit = d.lo, d.hi, d.step, d.bits, d.base, d.unit
    set_lo, set_hi, keep, congruent = d.set_lo, d.set_hi, d.keep, d.congruent

    def run() -> bool:
        xl, xh, yl, yh = lo[x], hi[x], lo[y] + gap, hi[y] + gap
        if xl < yl:
            set_lo(x, yl)
        elif yl < xl:
            set_lo(y, xl - gap)
        if xh > yh:
            set_hi(x, yh)
        elif yh > xh:
            set_hi(y, xh - gap)
        if lo[x] == hi[x]:
            return lo[y] != hi[y]
        if step[x] != step[y]:
            congruent(y, lo[x] - gap, step[x])
            congruent(x, lo[y] + gap, step[y])
        if bits[x] and bits[y] and unit[x] == unit[y]:
            away, rest = divmod(base[y] + gap - base[x], unit[x])
            if rest == 0:
                keep(x, bits[y] << away if away >= 0 else bits[y] >> -away)
                keep(y, bits[x] >> away if away >= 0 else bits[x] << -away)
        return lo[x] != lo[y] + gap or hi[x] != hi[y] + gap

    return run


def scaled(d: Domains, x: int, y: int, c: int, e: int) -> Propagator:
    """x == c y + e."""
    lo, hi, step, bits = d.lo, d.hi, d.step, d.bits
    set_lo, set_hi, congruent = d.set_lo, d.set_hi, d.congruent
    size = abs(c)

    def run() -> bool:
        low, high = c * lo[y] + e, c * hi[y] + e
        if c < 0:
            low, high = high, low
        if low > lo[x]:
            set_lo(x, low)
        if high < hi[x]:
            set_hi(x, high)
        if bits[x] and low != high:
            congruent(x, low, size * step[y])
        elif lo[x] == low and hi[x] == high:
            return False
        # What x keeps, as bounds of y.
        first, last = lo[x] - e, hi[x] - e
        if c < 0:
            first, last = -last, -first
        first, last = -(-first // size), last // size
        again = False
        if first > lo[y]:
            set_lo(y, first)
            again = True
        if last < hi[y]:
            set_hi(y, last)
            again = True
        return again

    return run


def different(d: Domains, terms: Terms, total: int) -> Propagator:
    """sum c x != total."""
    lo, hi, remove = d.lo, d.hi, d.remove

    def run() -> None:
        rest = total
        free = None
        for c, x in terms:
            low = lo[x]
            if low == hi[x]:
                rest -= c * low
            elif free is None:
                free = (c, x)
            else:
                return
        if free is None:
            if rest == 0:
                raise Empty
        else:
            c, x = free
            value, odd = divmod(rest, c)
            if not odd:
                remove(x, value)

    return run


def align(d: Domains, terms: Terms, total: int) -> None:
    """What steps alone say of sum c x == total: its remainder, and each term's from those of the others.

    Raises:
        Empty: the greatest common divisor of coefficients and steps does not divide what it has to.
    """
    rest = total - sum(c * d.lo[x] for c, x in terms)
    steps = [c * d.step[x] if d.lo[x] != d.hi[x] else 0 for c, x in terms]
    g = gcd(*steps)
    if (rest % g if g else rest) != 0:
        raise Empty
    # The greatest common divisors of all steps before and of all steps after each.
    after = [*accumulate(reversed(steps), gcd, initial=0)][-2::-1]
    for i, (before, (c, x)) in enumerate(zip(accumulate(steps, gcd, initial=0), terms, strict=False)):
        others = gcd(before, after[i])
        if others > 1 and steps[i]:
            # c (x - lo) = rest modulo `others`
            h = gcd(c, others)
            if h < others:
                d.congruent(x, int(d.lo[x]) + rest // h * pow(c // h, -1, others // h), others // h)
