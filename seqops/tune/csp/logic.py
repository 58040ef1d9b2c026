"""Propagators of conditions: the truth of a comparison as a slot of 0 and 1, alternatives, `where`."""

from __future__ import annotations

from collections.abc import Callable

from .domains import Domains, Empty
from .linear import Propagator

# Alternatives are tried one by one, and the union of what they leave is kept, once no more are open than this.
OPEN = 4


def truth_at_most(d: Domains, b: int, x: int, bound: int) -> Propagator:
    """b == (x <= bound)."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi

    def run() -> None:
        if lo[b] == hi[b]:
            if lo[b]:
                if hi[x] > bound:
                    set_hi(x, bound)
            elif lo[x] <= bound:
                set_lo(x, bound + 1)
        elif hi[x] <= bound:
            set_lo(b, 1)
        elif lo[x] > bound:
            set_hi(b, 0)

    return run


def truth_equal(d: Domains, b: int, x: int, value: int) -> Propagator:
    """b == (x == value)."""
    lo, hi, step, bits, base, unit = d.lo, d.hi, d.step, d.bits, d.base, d.unit
    set_lo, set_hi, remove = d.set_lo, d.set_hi, d.remove

    def run() -> None:
        if lo[b] == hi[b]:
            if not lo[b]:
                remove(x, value)
                return
            if lo[x] < value:
                set_lo(x, value)
            if hi[x] > value:
                set_hi(x, value)
            if lo[x] != value or hi[x] != value:
                raise Empty
            return
        low, high = lo[x], hi[x]
        if low == high == value:
            set_lo(b, 1)
        elif value < low or value > high or (value - low) % step[x] or is_hole(value):
            set_hi(b, 0)

    def is_hole(value: int) -> bool:
        return bool(bits[x]) and not bits[x] >> (value - base[x]) // unit[x] & 1

    return run


def truth_all(d: Domains, b: int, parts: list[int]) -> Propagator:
    """b == (every part is 1)."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi

    def run() -> None:
        if lo[b]:
            for part in parts:
                if not lo[part]:
                    set_lo(part, 1)
            return
        open_parts = [part for part in parts if not lo[part]]
        if not open_parts:
            set_lo(b, 1)
        elif any(not hi[part] for part in open_parts):
            if hi[b]:
                set_hi(b, 0)
        elif not hi[b] and len(open_parts) == 1:
            set_hi(open_parts[0], 0)

    return run


def truth_any(d: Domains, b: int, parts: list[int]) -> Propagator:
    """b == (some part is 1)."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi

    def run() -> None:
        if not hi[b]:
            for part in parts:
                if hi[part]:
                    set_hi(part, 0)
            return
        open_parts = [part for part in parts if hi[part]]
        if not open_parts:
            set_hi(b, 0)
        elif any(lo[part] for part in open_parts):
            if not lo[b]:
                set_lo(b, 1)
        elif lo[b] and len(open_parts) == 1:
            set_lo(open_parts[0], 1)

    return run


def alternatives(
    d: Domains, parts: list[int], shared: list[int], attempt: Callable[[int], tuple[list, ...] | None]
) -> Propagator:
    """Some part is 1. `shared` are the variables that every part restricts.

    `attempt(part)` gives the domains that are left if the part is 1, None if nothing is.
    """
    lo, hi, bits, set_lo, set_hi, keep = d.lo, d.hi, d.bits, d.set_lo, d.set_hi, d.keep

    def run() -> None:
        open_parts = []
        for part in parts:
            if lo[part]:
                return
            if hi[part]:
                open_parts.append(part)
        if not open_parts:
            raise Empty
        if len(open_parts) == 1:
            set_lo(open_parts[0], 1)
            return
        if not shared or len(open_parts) > OPEN:
            return
        left = []
        for part in open_parts:
            state = attempt(part)
            if state is None:
                set_hi(part, 0)
            else:
                left.append(state)
        if not left:
            raise Empty
        for x in shared:
            low, high = min(state[0][x] for state in left), max(state[1][x] for state in left)
            if low > lo[x]:
                set_lo(x, low)
            if high < hi[x]:
                set_hi(x, high)
            if bits[x] and all(state[2][x] for state in left):
                union = 0
                for state in left:
                    union |= state[2][x]
                keep(x, union)

    return run


def choice(d: Domains, z: int, b: int, x: int, y: int) -> Propagator:
    """z == x where b is 1, else y."""
    lo, hi, set_lo, set_hi = d.lo, d.hi, d.set_lo, d.set_hi
    set_lo_real, set_hi_real = d.set_lo_real, d.set_hi_real

    def run() -> bool:
        if lo[b] == hi[b]:
            taken = x if lo[b] else y
            set_lo_real(z, lo[taken])
            set_hi_real(z, hi[taken])
            return set_lo_real(taken, lo[z]) | set_hi_real(taken, hi[z])
        low, high = min(lo[x], lo[y]), max(hi[x], hi[y])
        if low > lo[z]:
            set_lo(z, low)
        if high < hi[z]:
            set_hi(z, high)
        if lo[x] > hi[z] or hi[x] < lo[z]:
            set_hi(b, 0)
            return True
        if lo[y] > hi[z] or hi[y] < lo[z]:
            set_lo(b, 1)
            return True
        return False

    return run
