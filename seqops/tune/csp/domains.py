"""What every variable and every node of an expression can still be, and the cuts that narrow it.

A slot is one variable or one node. It has an interval `[lo, hi]`; an integer slot has a step as well, so that its
values are `lo, lo + step, ... hi`; a variable with at most 4,096 values has a bit set, in which bit k stands for the
value `base + k * unit`. Cuts keep the three consistent: both ends of the interval are always values.

A cut that changes a slot marks the propagators that watch it. Marks are the bits of one integer, so marking is one `|`
and the next propagator is the lowest bit: those made first, which are the operands of those made later, run first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from math import floor, gcd, inf

BITS = 4096
# No bit set has more bits than this: a list of values may span so many.
SPAN = 16 * BITS
# So many masks of multiples are kept, of up to 8 KB each.
MASKS = 512


class Empty(Exception):
    """A slot has no value left."""


class Domains:
    """All slots, and the cuts as functions that hold its lists.

    Attributes:
        lo, hi: ends of the intervals.
        step: distance of neighbouring values; 0: real numbers.
        bits: bit sets; 0: none.
        base: value of bit 0. unit: distance of neighbouring bits.
        lists: the values of variables whose list is too wide for a bit set.
        on_lo, on_hi, on_hole: by slot, the propagators to mark when an end moves or an inner value goes.
        marked: one integer in a list, the propagators to run.
        variables: slots below this number are variables.
    """

    def __init__(self) -> None:
        self.lo: list[int | float] = []
        self.hi: list[int | float] = []
        self.step: list[int] = []
        self.bits: list[int] = []
        self.base: list[int] = []
        self.unit: list[int] = []
        self.on_lo: list[int] = []
        self.on_hi: list[int] = []
        self.on_hole: list[int] = []
        self.marked = [0]
        self.variables = 0
        self.lists: dict[int, tuple[int, ...]] = {}
        self.masks: dict[tuple[int, ...], int] = {}
        self.define_cuts()

    def slot(self, lo: int | float, hi: int | float, step: int) -> int:
        """A new slot."""
        self.lo.append(lo)
        self.hi.append(hi)
        self.step.append(step)
        for column in (self.bits, self.base, self.unit, self.on_lo, self.on_hi, self.on_hole):
            column.append(0)
        return len(self.lo) - 1

    def watch(self, propagator: int, slots: tuple[int, ...], events: str = "lo hi") -> None:
        """Marks the propagator when one of the slots changes: `lo`, `hi`, `hole`."""
        mark = 1 << propagator
        for event in events.split():
            column = {"lo": self.on_lo, "hi": self.on_hi, "hole": self.on_hole}[event]
            for slot in slots:
                column[slot] |= mark

    def set_values(self, x: int, values: tuple[int, ...]) -> None:
        """Starts a variable's domain as a list of values, ascending."""
        unit = gcd(*(value - values[0] for value in values)) or 1
        self.lo[x], self.hi[x], self.step[x] = values[0], values[-1], unit
        if (values[-1] - values[0]) // unit < SPAN:
            self.base[x], self.unit[x] = values[0], unit
            self.bits[x] = self.mask(x, values)
        else:
            self.lists[x] = values

    def make_bits(self, x: int) -> bool:
        """Gives a variable without bit set one, if few values are left."""
        if x in self.lists:
            left = self.listed(x)
            unit = gcd(*(value - left[0] for value in left)) or 1
            few = bool(left) and (left[-1] - left[0]) // unit < SPAN
            if few:
                self.base[x], self.unit[x] = left[0], unit
                self.bits[x] = self.mask(x, left)
            return few
        step = self.step[x]
        count = int(self.hi[x] - self.lo[x]) // step + 1
        if count <= BITS:
            self.base[x], self.unit[x] = int(self.lo[x]), step
            self.bits[x] = (1 << count) - 1
        return count <= BITS

    def listed(self, x: int) -> tuple[int, ...]:
        """The values left of a list without bit set."""
        values = self.lists[x]
        return values[bisect_left(values, self.lo[x]) : bisect_right(values, self.hi[x])]

    def size(self, x: int) -> int:
        bits = self.bits[x]
        if bits:
            return bits.bit_count()
        if x in self.lists:
            return len(self.listed(x))
        return int(self.hi[x] - self.lo[x]) // self.step[x] + 1

    def values(self, x: int) -> list[int]:
        """Ascending; only for slots with few values."""
        bits, base, unit = self.bits[x], self.base[x], self.unit[x]
        if not bits:
            if x in self.lists:
                return list(self.listed(x))
            return list(range(int(self.lo[x]), int(self.hi[x]) + 1, self.step[x]))
        found = []
        while bits:
            low = bits & -bits
            found.append(base + unit * (low.bit_length() - 1))
            bits ^= low
        return found

    def mask(self, x: int, values: Iterable[int]) -> int:
        """The bits of some of x's values."""
        base, unit = self.base[x], self.unit[x]
        return sum(1 << (value - base) // unit for value in values)

    def save(self) -> tuple[list, ...]:
        return self.lo[:], self.hi[:], self.bits[:], self.step[:], self.base[:], self.unit[:]

    def restore(self, state: tuple[list, ...]) -> None:
        self.lo[:], self.hi[:], self.bits[:], self.step[:], self.base[:], self.unit[:] = state

    # The cuts are closures, not methods: half of all time is spent in them.
    set_lo: Callable[[int, int | float], None]
    set_hi: Callable[[int, int | float], None]
    set_lo_real: Callable[[int, float], bool]
    set_hi_real: Callable[[int, float], bool]
    remove: Callable[[int, int], None]
    keep: Callable[[int, int], bool]
    congruent: Callable[[int, int, int], bool]

    def define_cuts(self) -> None:
        self.set_lo, self.set_hi = interval_cuts(self)
        self.set_lo_real, self.set_hi_real = real_cuts(self)
        self.remove, self.keep = inner_cuts(self)
        self.congruent = congruence_cut(self)


def interval_cuts(d: Domains) -> tuple[Callable, Callable]:
    """`set_lo`, `set_hi`."""
    lo, hi, step, bits, base, unit = d.lo, d.hi, d.step, d.bits, d.base, d.unit
    on_lo, on_hi, marked = d.on_lo, d.on_hi, d.marked

    def set_lo(x: int, value: int | float) -> None:
        """x >= value, where value > lo."""
        b = bits[x]
        if b:
            k = -((base[x] - value) // unit[x])
            b = b >> k << k
            if not b:
                raise Empty
            bits[x] = b
            lo[x] = base[x] + unit[x] * ((b & -b).bit_length() - 1)
        else:
            s = step[x]
            if s > 1:
                low = lo[x]
                value = low - (low - value) // s * s
            if value > hi[x]:
                raise Empty
            lo[x] = value
        marked[0] |= on_lo[x]

    def set_hi(x: int, value: int | float) -> None:
        """x <= value, where value < hi."""
        b = bits[x]
        if b:
            k = (value - base[x]) // unit[x]
            if k < 0:
                raise Empty
            b &= (2 << k) - 1
            if not b:
                raise Empty
            bits[x] = b
            hi[x] = base[x] + unit[x] * (b.bit_length() - 1)
        else:
            s = step[x]
            if s > 1:
                high = hi[x]
                value = high - -((value - high) // s) * s
            if value < lo[x]:
                raise Empty
            hi[x] = value
        marked[0] |= on_hi[x]

    return set_lo, set_hi


def real_cuts(d: Domains) -> tuple[Callable, Callable]:
    """`set_lo_real`, `set_hi_real`."""
    lo, hi, step, set_lo, set_hi = d.lo, d.hi, d.step, d.set_lo, d.set_hi

    def set_lo_real(x: int, value: float) -> bool:
        """x >= value of any slot, where value may be below lo already; true if that cut an integer."""
        if value > lo[x]:
            if not step[x]:
                set_lo(x, value)
            elif value == inf:
                raise Empty
            elif (ceiling := -floor(-value)) > lo[x]:
                set_lo(x, ceiling)
                return True
        return False

    def set_hi_real(x: int, value: float) -> bool:
        """x <= value of any slot, where value may be above hi already; true if that cut an integer."""
        if value < hi[x]:
            if not step[x]:
                set_hi(x, value)
            elif value == -inf:
                raise Empty
            elif (whole := floor(value)) < hi[x]:
                set_hi(x, whole)
                return True
        return False

    return set_lo_real, set_hi_real


def inner_cuts(d: Domains) -> tuple[Callable, Callable]:
    """`remove`, `keep`."""
    lo, hi, bits, base, unit, set_lo, set_hi = d.lo, d.hi, d.bits, d.base, d.unit, d.set_lo, d.set_hi
    on_lo, on_hi, on_hole, marked = d.on_lo, d.on_hi, d.on_hole, d.marked

    def remove(x: int, value: int) -> None:
        """x != value."""
        if lo[x] <= value <= hi[x]:
            if lo[x] == hi[x]:
                raise Empty
            if value == lo[x]:
                set_lo(x, value + 1)
            elif value == hi[x]:
                set_hi(x, value - 1)
            elif bits[x]:
                k, rest = divmod(value - base[x], unit[x])
                if not rest and bits[x] >> k & 1:
                    bits[x] ^= 1 << k
                    marked[0] |= on_hole[x]

    def keep(x: int, mask: int) -> bool:
        """Only the values of the mask, whose bits are those of x; true if that cut."""
        old = bits[x]
        b = old & mask
        if b == old:
            return False
        if not b:
            raise Empty
        bits[x] = b
        low = base[x] + unit[x] * ((b & -b).bit_length() - 1)
        high = base[x] + unit[x] * (b.bit_length() - 1)
        marks = on_hole[x]
        if low > lo[x]:
            lo[x] = low
            marks |= on_lo[x]
        if high < hi[x]:
            hi[x] = high
            marks |= on_hi[x]
        marked[0] |= marks
        return True

    return remove, keep


def congruence_cut(d: Domains) -> Callable[[int, int, int], bool]:
    """`congruent`."""
    lo, hi, step, bits, base, unit, keep = d.lo, d.hi, d.step, d.bits, d.base, d.unit, d.keep
    on_lo, on_hi, marked, masks = d.on_lo, d.on_hi, d.marked, d.masks

    def congruent(x: int, rest: int, modulus: int) -> bool:
        """x % modulus == rest % modulus; true if that cut."""
        s, low, high = step[x], lo[x], hi[x]
        if low == high:
            if (rest - low) % modulus:
                raise Empty
            return False
        g = gcd(s, modulus)
        away, odd = divmod(rest - low, g)
        if odd:
            raise Empty
        if g == modulus:
            return False
        if bits[x]:
            first, u = base[x], unit[x]
            key = (first, u, rest % modulus, modulus)
            mask = masks.get(key)
            if mask is None:
                if len(masks) >= MASKS:
                    masks.clear()
                mask = masks[key] = multiples(first, u, rest, modulus)
            return keep(x, mask)
        period = modulus // g
        value = low + away * pow(s // g, -1, period) % period * s
        if value > high:
            raise Empty
        step[x] = s * period
        hi[x] = value + (high - value) // (s * period) * (s * period)
        lo[x] = value
        if value > low:
            marked[0] |= on_lo[x]
        if hi[x] < high:
            marked[0] |= on_hi[x]
        return True

    return congruent


def multiples(base: int, unit: int, rest: int, modulus: int) -> int:
    """The mask of all bits k < SPAN with (base + k * unit) % modulus == rest % modulus."""
    g = gcd(unit, modulus)
    if (rest - base) % g:
        return 0
    period = modulus // g
    first = (rest - base) // g * pow(unit // g, -1, period) % period if period > 1 else 0
    count = (SPAN - first + period - 1) // period
    if count <= 0:
        return 0
    if count == 1:
        return 1 << first
    # 1 + 2^p + 2^2p + ... by doubling.
    mask, length = 1, 1
    while length < count:
        mask |= mask << length * period
        length *= 2
    return (mask & (1 << count * period) - 1) << first


def divisors(number: int, base: int, unit: int, bits: int) -> int:
    """The bits whose values divide `number`, which is not 0."""
    number = abs(number)
    mask = 0
    top = base + unit * (bits.bit_length() - 1)
    if number <= bits.bit_count() ** 2 and base > 0:
        found = [d for small in range(1, int(number**0.5) + 1) if number % small == 0 for d in (small, number // small)]
        for value in found:
            k, rest = divmod(value - base, unit)
            if not rest and base <= value <= top:
                mask |= 1 << k
        return mask & bits
    rest = bits
    while rest:
        low = rest & -rest
        value = base + unit * (low.bit_length() - 1)
        if value and number % value == 0:
            mask |= low
        rest ^= low
    return mask
