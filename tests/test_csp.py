"""The constraint solver against enumeration and CP-SAT, what it cuts, what it says, and how it refuses misuse."""

import collections
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases.csp import Oracle, Source, WideSource, enumerate_values

from bench import cp_sat, csp_problems
from bench import csp as bench_csp
from seqops.tune import csp
from seqops.tune.csp import explanation, search, walk
from seqops.tune.csp.domains import MASKS, SPAN, Domains, Empty, divisors, multiples
from seqops.tune.csp.network import Network

ROOT = Path(__file__).parent.parent
SEEDS = 2000
CHUNK = 100
CHUNKS = range(0, SEEDS, CHUNK)


def enumerate_solutions(p: csp.Problem, oracle: Oracle) -> list[tuple[tuple, tuple[int, ...]]]:
    """Costs and values of every solution, cheapest first, by Python's own arithmetic."""
    found = []
    for values in enumerate_values(p):
        if oracle.met(values) and (costs := oracle.costs(values)) is not None:
            found.append((costs, tuple(values.values())))
    return sorted(found)


def gemm() -> csp.Problem:
    """The example of the documentation."""
    p = csp.Problem("gemm tile")
    m = p.int("m", 16, 256, multiple_of=16)
    n = p.int("n", values=(8, 16, 32))
    p.add(m * n <= 4096, "accumulators fit")
    p.add(768 % m == 0)
    p.add((m >= 64) | (n == 32))
    p.minimize(csp.ceildiv(768, m) * (40 + m * n / 64), then=-n)
    return p


# ---- answers


def check_against_enumeration(seed: int) -> None:
    source = Source(seed)
    p = source.problem()
    costs_of = source.oracle.costs
    expected = enumerate_solutions(p, source.oracle)
    found = list(p.solutions(seconds=60))
    assert p.statistics.optimal
    assert all(p.check(solution) is None for solution in found), seed
    values = [tuple(solution.values()) for solution in found]
    # Without an objective, solutions come as they are found.
    assert (values if p.objective else sorted(values)) == [values for _, values in expected], seed
    best = p.solve(seconds=60)
    if not expected:
        assert best is None, seed
        return
    assert p.check(best) is None
    assert costs_of(best) == expected[0][0], seed
    if p.objective:
        assert p.cost(best) == expected[0][0][0]
    shuffled = Source(seed).problem(shuffle=seed)
    assert costs_of(shuffled.solve(seconds=60)) == expected[0][0], seed


@pytest.mark.parametrize("first", CHUNKS)
def test_equals_enumeration(first):
    """Same feasibility, same optimum, all solutions in order; the order of constraints does not matter."""
    for seed in range(first, first + CHUNK):
        check_against_enumeration(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 40_000, 1000))
def test_equals_enumeration_at_length(first):
    for seed in range(first, first + 1000):
        check_against_enumeration(seed)


def check_against_cp_sat(seed: int) -> None:
    p = Source(seed, real=False, space=3000).problem()
    status, theirs, cost = cp_sat.solve(cp_sat.Model(p))
    ours = p.solve(seconds=60)
    if status == "INFEASIBLE":
        assert ours is None, seed
        return
    assert status == "OPTIMAL", seed
    assert p.check(theirs) is None and p.check(ours) is None, seed
    if p.objective:
        assert p.cost(ours) == p.cost(theirs) == round(cost), seed


@pytest.mark.parametrize("first", CHUNKS)
def test_equals_cp_sat(first):
    """CP-SAT finds the same optimum, or none either."""
    for seed in range(100_000 + first, 100_000 + first + CHUNK):
        check_against_cp_sat(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200_000, 205_000, 500))
def test_equals_cp_sat_at_length(first):
    for seed in range(first, first + 500):
        check_against_cp_sat(seed)


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_equals_cp_sat_on_wide_domains(first):
    """Where nothing can be enumerated. Few of them take so long that they are given up."""
    given_up = 0
    for seed in range(first, first + 40):
        p = WideSource(seed, real=False).problem()
        status, theirs, _ = cp_sat.solve(cp_sat.Model(p), seconds=2)
        if status == "UNKNOWN":
            continue
        try:
            ours = p.solve(nodes=1000, seconds=60)
        except csp.LimitReached:
            given_up += 1
            continue
        assert ours is None or p.check(ours) is None, seed
        assert (ours is None) == (status == "INFEASIBLE"), seed
        if p.objective and ours is not None and status == "OPTIMAL":
            assert p.check(theirs) is None and p.cost(ours) == p.cost(theirs), seed
    assert given_up <= 6


def test_random_problems_are_no_trivia():
    """Both outcomes are common, and every kind of node and constraint occurs in many of them."""
    feasible, branching = 0, 0
    occurs: collections.Counter[str] = collections.Counter()
    for seed in range(300):
        p = Source(seed).problem()
        feasible += p.solve() is not None
        branching += p.statistics.nodes > 1
        found = {type(part).__name__ for item in p.constraints for part in walk.parts(item)}
        for item in (*p.constraints, *p.objective):
            for part in walk.parts(item):
                found.add(getattr(part, "operator", getattr(part, "relation", "")))
        occurs.update(found)
    assert 60 < feasible < 240 and branching > 100
    kinds = "+ - neg * / // % ceildiv min max abs where lookup <= < >= > == != Conjunction Disjunction"
    for kind in kinds.split():
        assert occurs[kind] >= 20, (kind, occurs[kind])


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_best_few_and_distinct(first):
    """The K cheapest, and the cheapest of each value of some variables."""
    for seed in range(first, first + 100):
        source = Source(seed)
        p = source.problem()
        if not p.objective:
            continue
        costs_of = source.oracle.costs
        expected = enumerate_solutions(p, source.oracle)
        for limit in (1, 3):
            found = list(p.solutions(limit))
            assert [costs_of(solution) for solution in found] == [costs for costs, _ in expected[:limit]], seed
            assert len({tuple(solution.values()) for solution in found}) == len(found)
        names = list(p.variables)[:2]
        groups: dict[tuple, tuple] = {}
        for costs, values in expected:
            groups.setdefault(values[:2], costs)
        found = list(p.solutions(distinct=names))
        assert [costs_of(solution) for solution in found] == sorted(groups.values()), seed
        assert {tuple(solution[name] for name in names): costs_of(solution) for solution in found} == groups, seed
        few = list(p.solutions(2, distinct=names))
        assert [costs_of(solution) for solution in few] == sorted(groups.values())[:2], seed


def test_order_changes_the_search_and_not_the_optimum():
    for seed in range(100):
        source = Source(seed)
        p = source.problem()
        best = p.solve()
        p.order(*reversed(p.variables.values()))
        again = p.solve()
        assert (best is None) == (again is None)
        if best is not None:
            assert source.oracle.costs(best) == source.oracle.costs(again), seed


@pytest.mark.parametrize("shape", csp_problems.SHAPES, ids=str)
def test_kernel_problems(shape):
    """The optimum is CP-SAT's, and proving it takes few nodes: a measure of speed that no other process disturbs."""
    p = csp_problems.recurrent(shape)
    solution = p.solve(seconds=60)
    assert p.check(solution) is None
    assert p.statistics.optimal and p.statistics.nodes <= 600
    status, _, cost = cp_sat.solve(cp_sat.Model(p))
    assert status == "OPTIMAL" and p.cost(solution) == pytest.approx(cost, rel=1e-9)


def test_kernel_problems_have_the_size_they_claim():
    p = csp_problems.recurrent(csp_problems.GOALS[0])
    assert (len(p.variables), len(p.constraints)) == (57, 61)


def test_example():
    p = gemm()
    assert p.solve() == {"m": 256, "n": 8}
    assert p.cost({"m": 256, "n": 8}) == 216.0
    assert p.explain() is None
    found = list(p.solutions(limit=10, distinct=("m",)))
    assert found[:2] == [{"m": 256, "n": 8}, {"m": 192, "n": 8}]
    assert [solution["m"] for solution in found] == [256, 192, 128, 96, 64, 48, 32, 16]
    assert list(p.solutions(limit=0)) == []


def test_later_terms_break_ties():
    p = csp.Problem()
    x, y, z = (p.int(name, 0, 5) for name in "xyz")
    p.add(x + y + z == 7)
    p.minimize(csp.max_(x, y, z), then=(-x, z))
    assert p.solve() == {"x": 3, "y": 3, "z": 1}
    p.minimize(0, then=x)
    assert p.solve()["x"] == 0


def test_a_whole_cost_among_real_ones():
    """A real objective may happen to be an int; the next better one need not be smaller by one."""
    p = csp.Problem()
    x, y = p.int("x", 0, 1), p.int("y", 0, 4)
    # Bounds do not see that the first branch costs 5, so it comes first.
    p.minimize(csp.where(x == 0, 5 + abs(y) - csp.max_(y, 0), 4.5))
    p.order(x)
    assert p.cost({"x": 0, "y": 3}) == 5 and isinstance(p.cost({"x": 0, "y": 3}), int)
    assert p.cost(p.solve()) == 4.5


def test_first_solution_without_objective_is_streamed():
    p = csp.Problem()
    cells = [p.int(f"x{i}", 0, 10**6) for i in range(6)]
    p.add(cells[0] < cells[1])
    stream = p.solutions()
    assert p.check(next(stream)) is None
    assert next(stream) != next(stream)


def test_classics():
    """Problems of other kinds: a cryptogram, queens, a knapsack, a magic square."""
    p = csp.Problem("send more money")
    letters = {letter: p.int(letter, 0, 9) for letter in "SENDMORY"}
    for a, b in itertools.combinations(letters.values(), 2):
        p.add(a != b)

    def word(text):
        return sum(letters[letter] * 10**i for i, letter in enumerate(reversed(text)))

    p.add(word("SEND") + word("MORE") == word("MONEY"))
    p.add(letters["S"] > 0)
    p.add(letters["M"] > 0)
    found = list(p.solutions())
    assert [tuple(solution.values()) for solution in found] == [(9, 5, 6, 7, 1, 0, 8, 2)]

    p = csp.Problem("queens")
    rows = [p.int(f"q{i}", 0, 7) for i in range(8)]
    for (i, a), (j, b) in itertools.combinations(enumerate(rows), 2):
        p.add((a != b) & (abs(a - b) != j - i))
    assert len(list(p.solutions(seconds=60))) == 92

    p = csp.Problem("knapsack")
    weights, worths = (12, 7, 11, 8, 9, 6, 14, 5), (24, 13, 23, 15, 16, 11, 28, 9)
    taken = [p.int(f"item{i}", 0, 1) for i in range(8)]
    p.add(sum(w * t for w, t in zip(weights, taken, strict=True)) <= 35)
    p.minimize(-sum(w * t for w, t in zip(worths, taken, strict=True)))
    expected = max(
        sum(itertools.compress(worths, chosen))
        for chosen in itertools.product((0, 1), repeat=8)
        if sum(itertools.compress(weights, chosen)) <= 35
    )
    assert p.cost(p.solve()) == -expected

    p = csp.Problem("magic square")
    grid = [[p.int(f"c{i}{j}", 1, 9) for j in range(3)] for i in range(3)]
    for a, b in itertools.combinations(itertools.chain(*grid), 2):
        p.add(a != b)
    lines = [*grid, *zip(*grid, strict=True), [grid[i][i] for i in range(3)], [grid[i][2 - i] for i in range(3)]]
    for line in lines:
        p.add(sum(line) == 15)
    assert len(list(p.solutions(seconds=60))) == 8


# ---- propagation


def check_cuts(seed: int) -> None:
    """No cut removes a value of a solution: at the root, after random assignments, and below a ceiling of the cost."""
    source = Source(seed)
    p = source.problem()
    solutions = enumerate_solutions(p, source.oracle)
    r = random.Random(seed)
    for attempt in range(4):
        chosen = {}
        left = solutions
        try:
            network, terms = p.compile()
            d = network.domains
            network.settle()
            if attempt == 1 and terms and solutions:
                ceiling = r.choice(solutions)[0][0]
                left = [entry for entry in solutions if entry[0][0] <= ceiling]
                d.set_hi_real(terms[0], ceiling)
                network.propagate()
            if attempt >= 2:
                for x in r.sample(range(d.variables), min(attempt - 1, d.variables)):
                    value = r.choice(d.values(x))
                    chosen[x] = value
                    left = [entry for entry in left if entry[1][x] == value]
                    network.fix(x, value)
                    network.propagate()
            for _, values in left:
                for x, value in enumerate(values):
                    assert d.lo[x] <= value <= d.hi[x], (seed, attempt, chosen)
                    assert (value - d.lo[x]) % d.step[x] == 0 or d.bits[x], (seed, attempt, chosen)
                    if d.bits[x]:
                        assert d.bits[x] >> (value - d.base[x]) // d.unit[x] & 1, (seed, attempt, chosen)
            for x in range(d.variables):
                check_consistent(d, x)
        except Empty:
            assert not left, (seed, attempt, chosen)


def check_consistent(d: Domains, x: int) -> None:
    """The ends of the interval are values of the bit set."""
    if d.bits[x]:
        values = d.values(x)
        assert (values[0], values[-1]) == (d.lo[x], d.hi[x])
        assert d.size(x) == len(values)


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_propagation_is_sound(first):
    for seed in range(first, first + 100):
        check_cuts(seed)


def test_cuts_allow_for_rounding():
    """(57000 + 1e20) - 1e20 is 49152 in floating point: a bound of 50000 on it does not exclude 57000."""
    p = csp.Problem()
    x = p.int("x", 0, 100_000)
    p.minimize(x + 1e20 - 1e20)
    assert p.cost({"x": 57_000}) == 49152.0
    network, (term,) = p.compile()
    network.settle()
    network.domains.set_hi_real(term, 50_000.0)
    network.propagate()
    assert network.domains.hi[x.index] >= 57_000


def settled(p: csp.Problem) -> dict[str, list[int]]:
    """The values that propagation alone leaves."""
    network, _ = p.compile()
    network.settle()
    return {name: network.domains.values(v.index) for name, v in p.variables.items()}


def test_cuts_of_divisors_and_multiples():
    p = csp.Problem()
    x, y = p.int("x", 1, 100), p.int("y", 1, 100)
    p.add(60 % x == 0)
    p.add(y % 12 == 0)
    assert settled(p) == {"x": [1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60], "y": [12, 24, 36, 48, 60, 72, 84, 96]}


def test_cuts_of_remainders():
    p = csp.Problem()
    x, y = p.int("x", values=(6, 10, 15)), p.int("y", values=(4, 5, 7))
    p.add(x % y == 0)
    assert settled(p) == {"x": [10, 15], "y": [5]}
    p = csp.Problem()
    x = p.int("x", 0, 10**9)
    p.add(x % 1000 == 7)
    p.add(x < 3000)
    assert settled(p) == {"x": [7, 1007, 2007]}


def test_cuts_of_sums_by_greatest_common_divisor():
    p = csp.Problem()
    x, y = p.int("x", 0, 10**6), p.int("y", 0, 10**6)
    p.add(6 * x + 10 * y == 10**6 + 1)
    assert p.solve() is None and p.statistics.nodes == 0
    p = csp.Problem()
    x, y, z = p.int("x", 0, 20), p.int("y", 0, 10**6, multiple_of=6), p.int("z", 0, 10**6, multiple_of=4)
    p.add(x == y + z)
    assert settled(p)["x"] == list(range(0, 21, 2))


def test_cuts_of_products_and_quotients():
    p = csp.Problem()
    x, y, q = p.int("x", 1, 1000), p.int("y", 3, 1000), p.int("q", 0, 1000)
    p.add(x * y <= 20)
    p.add(q == 100 // x)
    left = settled(p)
    assert left["x"] == [1, 2, 3, 4, 5, 6] and left["y"][-1] == 20
    assert (left["q"][0], left["q"][-1]) == (16, 100)
    p = csp.Problem()
    unit, groups = p.int("unit", values=(4, 8, 16)), p.int("groups", 1, 8)
    p.add(unit * groups % 16 == 0)
    p.add(unit == 4)
    assert settled(p)["groups"] == [4, 8]


def test_cuts_of_alternatives():
    """What every open branch leaves out is gone; a refuted branch no longer counts."""
    p = csp.Problem()
    x, y = p.int("x", 0, 20), p.int("y", 0, 20)
    p.add((x == 3) | (x == 7) | (x >= 18))
    p.add((x <= 5) | (y == 4))
    p.add(x >= 6)
    left = settled(p)
    assert left["x"] == [7, 18, 19, 20] and left["y"] == [4]


def test_a_zero_divisor_leaves_the_domain():
    p = csp.Problem()
    x, y = p.int("x", 0, 3), p.int("y", -1, 1)
    p.minimize(x // y + x)
    assert all(solution["y"] for solution in p.solutions())
    p = csp.Problem()
    x = p.int("x", 0, 4)
    p.add((x == 0) | (12 % x == 0))
    assert [solution["x"] for solution in p.solutions()] == [1, 2, 3, 4]


def test_wide_domains():
    """Bounds up to 2^40, values too far apart for a bit set, bit sets made on the way down."""
    far = 1 << 40
    p = csp.Problem()
    x, y = p.int("x", -far, far), p.int("y", -far, far)
    p.add(x + y == far)
    p.add(x - y == 2)
    assert p.solve() == {"x": far // 2 + 1, "y": far // 2 - 1}
    p = csp.Problem()
    x = p.int("x", values=(-far, 0, 17, far))
    y = p.int("y", 0, far, multiple_of=1000)
    p.add(x > 5)
    p.add(x < 10**6)
    p.add(y >= 10**9)
    p.add(y != 10**9)
    p.minimize(y)
    assert p.solve() == {"x": 17, "y": 10**9 + 1000}
    p = csp.Problem()
    x, y = p.int("x", 0, far), p.int("y", 0, far)
    p.add(x * y == 1_000_003 * 999_983)
    p.add(x > y)
    p.add(y > 1)
    p.add(y % 999_983 == 0)
    assert p.solve(seconds=60) == {"x": 1_000_003, "y": 999_983}


@pytest.mark.parametrize("last", (65535, 65536, 1 << 30))
def test_listed_values_at_the_edge_of_a_bit_set(last):
    """The widest list that becomes a bit set, the narrowest that does not, and one far beyond."""
    p = csp.Problem()
    x = p.int("x", values=(0, 1, last))
    p.add(x % last == 0)
    assert [solution["x"] for solution in p.solutions()] == [0, last]


def test_slow_convergence_ends():
    """x < y < x creeps by ones over 2^40 values: it ends at a limit, not never."""
    p = csp.Problem()
    x, y = p.int("x", 0, 1 << 40), p.int("y", 0, 1 << 40)
    p.add(x < y)
    p.add(y < x)
    began = time.perf_counter()
    with pytest.raises(csp.LimitReached):
        p.solve(nodes=20, seconds=30)
    assert time.perf_counter() - began < 20


def test_long_sums_do_not_recurse():
    p = csp.Problem()
    total = 0
    for i in range(3000):
        total = total + p.int(f"x{i}", 0, 1)
    p.add(total >= 3000)
    assert sum(p.solve(seconds=60).values()) == 3000
    assert str(total).startswith("0 + x0 + x1")
    p = csp.Problem()
    x = p.int("x", 1, 2)
    cost = x / 2
    for _ in range(3000):
        cost = cost + 0.5
    p.minimize(cost)
    assert p.cost(p.solve()) == 1500.5


def test_divisors_of_both_ways():
    """By factor pairs and by trying every value."""
    for base, unit, number in ((1, 1, 60), (0, 1, 60), (-20, 1, 36), (4, 4, 96), (1, 1, 10**12)):
        bits = (1 << 200) - 1
        values = [base + unit * k for k in range(200)]
        expected = sum(1 << k for k, value in enumerate(values) if value and number % value == 0)
        assert divisors(number, base, unit, bits) == divisors(-number, base, unit, bits) == expected


def creeping(size: int) -> csp.Problem:
    """Bounds that move by ones until propagation is cut short: y > x and x > y, but for their largest values."""
    p = csp.Problem("creeping")
    x, y = p.int("x", 0, size), p.int("y", 0, size)
    p.add(y >= csp.min_(x + 1, size))
    p.add(x >= csp.min_(y, size))
    return p


@pytest.mark.parametrize("size", (3000, pytest.param(100_000, marks=pytest.mark.slow)))
def test_leaves_of_unfinished_propagation_are_checked(size):
    """Marks that were dropped leave u != v unseen; the values decide."""
    p = creeping(size)
    assert p.check(p.solve(seconds=60)) is None
    p = creeping(size)
    u, v = p.int("u", 5, 5), p.int("v", 5, 5)
    p.add(u != v)
    assert p.solve(seconds=60) is None
    assert p.explain(seconds=60).splitlines()[-1] == "  u != v"
    p = creeping(size)
    u, v = p.int("u", 0, 2), p.int("v", 0, 2)
    p.add(u != v)
    p.minimize(u + v)
    assert sorted((s["u"], s["v"]) for s in p.solutions(2, seconds=60)) == [(0, 1), (1, 0)]


def test_real_objectives_beyond_the_exact_integers():
    """Beyond 2^53 an integer lies between floats: bounds must not round to the wrong side of it."""
    for square in (94_906_267, 1_000_000_008, (1 << 31) + 3, (1 << 40) - 7):
        p = csp.Problem()
        x, y = p.int("x", square, square + 3), p.int("y", 0, 1)
        p.minimize(x * x + csp.min_(0.1, y), then=-y)
        expected = sorted((a * a + min(0.1, b), -b, a, b) for a in range(square, square + 4) for b in (0, 1))
        assert [(p.cost(s), -s["y"], s["x"], s["y"]) for s in p.solutions()] == expected
    r = random.Random(0)
    forms = (
        lambda a, b, less, more: a * a / 7 - less(0.1, b) * a,
        lambda a, b, less, more: 5 - a * a / 7.0 + more(b, 0.5),
        lambda a, b, less, more: -(a * a) - 0.1 + b * 3,
        lambda a, b, less, more: a * (a * 0.1) + less(b, a * 0.5) * a,
        lambda a, b, less, more: more(0.5, b) / (a * a * a) - less(a, 0.25) * a,
    )
    for number in range(200):
        form, low = forms[number % len(forms)], r.randrange(1 << r.randint(20, 39))
        p = csp.Problem()
        a, b = p.int("a", low, low + 9), p.int("b", 0, 2)
        p.minimize(form(a, b, csp.min_, csp.max_))
        expected = sorted((form(v, w, min, max), v, w) for v in range(low, low + 10) for w in range(3))
        assert [(p.cost(s), *s.values()) for s in p.solutions()] == expected, number


def test_a_cost_that_is_not_a_number_never_wins():
    p = csp.Problem()
    x = p.int("x", -2, 2)
    large = x * 1e308 * 100.0
    p.minimize(large - large)
    assert [s["x"] for s in p.solutions()] == [0]
    assert p.check({"x": 1}) == "inf - inf in objective: x*1e+308*100.0 - x*1e+308*100.0"
    with pytest.raises(ValueError, match=r"^inf - inf$"):
        p.cost({"x": 1})
    p.add(x > 0)
    assert p.solve() is None
    assert p.explain() == (
        "infeasible: these 2 of 2 constraints cannot hold together\n"
        "  x > 0\n"
        "  objective is defined: x*1e+308*100.0 - x*1e+308*100.0"
    )


@pytest.mark.parametrize("modulus", (65_535, 65_536, 65_537, 10**9, 1 << 40))
def test_large_moduli(modulus):
    """Masks of multiples stay as small as the bit sets."""
    assert multiples(-5, 1, 3, modulus).bit_length() <= SPAN
    p = csp.Problem()
    x, y = p.int("x", -5, 9), p.int("y", 0, 1 << 40)
    p.add(x % modulus == 3)
    p.add(y % modulus == 7)
    p.add(y > 7)
    p.minimize(y)
    assert p.solve() == ({"x": 3, "y": 7 + modulus} if modulus < 1 << 40 else None)


def test_masks_that_are_kept_are_few():
    p = csp.Problem()
    x = p.int("x", 0, 4000)
    network = Network(list(p.variables.values()))
    for modulus in range(2, 700):
        network.domains.congruent(x.index, 0, modulus)
        network.domains.set_values(x.index, tuple(range(4001)))
    assert 0 < len(network.domains.masks) <= MASKS


REPEATED = {
    "max": lambda e, x, i: csp.max_(e, x + i),
    "min": lambda e, x, i: csp.min_(x - i, e),
    "times": lambda e, x, i: e * 1,
    "negative": lambda e, x, i: -e,
    "quotient": lambda e, x, i: e // 1,
    "right sum": lambda e, x, i: i + e,
    "right difference": lambda e, x, i: i - e,
    "real": lambda e, x, i: e * 1.0,
    "real right sum": lambda e, x, i: 0.5 + e,
    "where": lambda e, x, i: csp.where(x > i, e, i),
    "horner": lambda e, x, i: e // 2 * 2 + 1,
}


@pytest.mark.parametrize("kind", REPEATED)
def test_deep_expressions_do_not_recurse(kind):
    """A thousand levels, built in a loop."""
    p = csp.Problem()
    x = p.int("x", 1, 3)
    item = x
    for i in range(1000):
        item = REPEATED[kind](item, x, i)
    p.minimize(item)
    p.define("named", item)
    found = list(p.solutions(seconds=60))
    assert len(found) == 3 and len(str(item)) > 10
    costs = [p.cost(s) for s in found]
    assert costs == sorted(costs) and p.values(found[0])["named"] == costs[0]
    assert p.explain() is None


def test_deep_constraints_do_not_recurse():
    p = csp.Problem()
    x = p.int("x", 1, 9)
    held = x > 0
    for i in range(500):
        held = (held & (x > i - 1000)) | (x == 3)
    p.add(~held | (x == 5))
    assert [s["x"] for s in p.solutions(seconds=60)] == [5]
    assert str(held).startswith("((")


# ---- explanations


def test_explanation_word_for_word():
    p = gemm()
    m, n = p.variables.values()
    p.add(m >= 192)
    p.add(n == 32)
    assert p.solve() is None
    assert p.explain() == (
        "infeasible: these 3 of 5 constraints cannot hold together\n"
        "  accumulators fit: m*n <= 4096     m*n is at least 6144\n"
        "  m >= 192\n"
        "  n == 32"
    )


def test_explanation_of_one_and_of_two_sides():
    p = csp.Problem()
    x, y = p.int("x", 0, 9), p.int("y", 10, 19)
    p.add(x * 2 + 5 > y * 3, "more")
    p.add(x < 8)
    assert p.explain() == (
        "infeasible: 1 of 2 constraints cannot hold\n"
        "  more: x*2 + 5 > y*3     x*2 + 5 is at most 23, y*3 is at least 30"
    )
    p = csp.Problem()
    x = p.int("x", 0, 9)
    p.add(x % 4 == 1)
    p.add(768 % 64 != 0, "a size that divides")
    assert p.explain() == "infeasible: 1 of 2 constraints cannot hold\n  a size that divides: False"


def test_explanation_of_an_undefined_objective():
    p = csp.Problem()
    x = p.int("x", 5, 9)
    p.add(x < 8)
    p.minimize(csp.lookup(x, {1: 2, 9: 4}))
    assert p.solve() is None
    assert p.explain() == (
        "infeasible: these 2 of 2 constraints cannot hold together\n"
        "  x < 8\n"
        "  objective is defined: lookup(x, {1: 2, 9: 4})"
    )


def test_explained_sets_are_minimal():
    """The reported set fails; without any one of its members it can be met."""
    seen = 0
    for seed in range(400):
        source = Source(seed, space=200)
        p = source.problem()
        p.minimize(0)
        solutions = [values for values in enumerate_values(p) if source.oracle.met(values)]
        text = explanation.explain(p, 60.0, filter_seconds=60.0)
        if solutions:
            assert text is None
            continue
        assert "smallest set found in time" not in text
        lines = [re.sub(r"     .*", "", line).strip() for line in text.splitlines()[1:]]
        members = [i for i, constraint in enumerate(p.constraints) if str(constraint) in lines]
        assert sorted(str(p.constraints[i]) for i in members) == sorted(lines), seed
        assert f"{len(members)} of {len(p.constraints)}" in text
        assert not met(p, source.oracle, members), seed
        for member in members:
            assert met(p, source.oracle, [other for other in members if other != member]), seed
        seen += 1
    assert seen > 100


def met(p: csp.Problem, oracle: Oracle, members: list[int]) -> bool:
    """Some values meet the constraints of these numbers, by enumeration."""
    return any(oracle.met(values, members) for values in enumerate_values(p))


def test_explanation_out_of_time_says_so():
    p = gemm()
    m, n = p.variables.values()
    p.add(m >= 192)
    p.add(n == 32)
    text = explanation.explain(p, 2.0, filter_seconds=0.0)
    assert text.splitlines()[0] == (
        "infeasible: these 6 of 6 constraints cannot hold together (the smallest set found in time; a part of it may "
        "fail too)"
    )


def test_explanation_of_many_constraints_takes_its_time_only():
    """Compiling and comparing bounds count as well."""
    p = csp.Problem()
    cells = [p.int(f"x{i}", 0, 9) for i in range(50)]
    for a, b in itertools.permutations(cells, 2):
        p.add(a + b >= 9)
    for a, b in itertools.pairwise(cells):
        p.add(a < b)
    began = time.perf_counter()
    text = p.explain(seconds=60)
    assert time.perf_counter() - began < 3
    assert text.startswith("infeasible: these ")
    began = time.perf_counter()
    with pytest.raises(csp.LimitReached, match=r"not known to be infeasible within 0\.001 s"):
        p.explain(seconds=0.001)
    assert time.perf_counter() - began < 1


# ---- determinism

REPORT = """
import json
from bench import csp_problems
from seqops.tune.csp.explanation import explain
from cases.csp import Source
out = []
for seed in range(60):
    p = Source(seed).problem()
    out.append([list(p.solutions(5)), p.statistics.nodes, p.solve(), p.statistics.nodes, explain(p, 60.0, 60.0)])
for shape in csp_problems.SHAPES[:4]:
    p = csp_problems.recurrent(shape)
    out.append([p.solve(), p.statistics.nodes])
print(json.dumps(out))
"""


def test_two_processes_give_equal_answers():
    """Nothing depends on hashes: solutions, their order, nodes and words are the same."""
    runs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, "-c", REPORT]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        runs.append(json.loads(result.stdout))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 64


def test_package_is_importable_alone():
    """Without torch, NumPy or the rest of seqops: the standard library is enough."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import csp\n"
        "p = csp.Problem(); x = p.int('x', 0, 9); p.minimize(abs(x - 4)); print(p.solve())\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in ('torch', 'numpy', 'seqops')))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "seqops" / "tune")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "{'x': 4}\n[]\n"


# ---- limits


def hard() -> csp.Problem:
    """Pigeons: more of them than holes, which bounds alone do not see."""
    p = csp.Problem("pigeons")
    places = [p.int(f"x{i}", 0, 8) for i in range(10)]
    for a, b in itertools.combinations(places, 2):
        p.add(a != b)
    return p


def test_limits_raise_with_what_was_found():
    with pytest.raises(csp.LimitReached, match=r"^pigeons: more than 50 nodes$") as caught:
        hard().solve(nodes=50)
    assert caught.value.best is None
    p = csp_problems.recurrent(csp_problems.Shape(256, 12, 64))
    with pytest.raises(csp.LimitReached, match="more than 100 nodes") as caught:
        p.solve(nodes=100)
    assert p.check(caught.value.best) is None
    assert not p.statistics.optimal and p.statistics.nodes == 101 and p.statistics.seconds > 0
    best = p.solve(seconds=60)
    assert p.cost(best) < p.cost(caught.value.best)
    with pytest.raises(csp.LimitReached) as caught:
        list(p.solutions(5, nodes=120))
    found = caught.value.best
    assert 1 <= len(found) <= 5 and all(p.check(solution) is None for solution in found)
    assert [p.cost(solution) for solution in found] == sorted(p.cost(solution) for solution in found)


def test_time_limit():
    p = hard()
    began = time.perf_counter()
    with pytest.raises(csp.LimitReached, match=r"^pigeons: out of time$") as caught:
        p.solve(nodes=10**9, seconds=0.2)
    assert caught.value.best is None
    assert 0.2 <= time.perf_counter() - began < 2
    with pytest.raises(csp.LimitReached, match=r"^pigeons: not known to be infeasible within 0.1 s$"):
        p.explain(seconds=0.1)


def test_time_limit_covers_compilation_and_propagation():
    p = csp.Problem()
    cells = [p.int(f"x{i}", 0, 1 << 40) for i in range(400)]
    for a, b in itertools.pairwise(cells):
        p.add(a < b)
    p.add(cells[-1] < cells[0])
    for seconds in (0.001, 0.2):
        began = time.perf_counter()
        with pytest.raises(csp.LimitReached, match="out of time"):
            p.solve(seconds=seconds)
        assert time.perf_counter() - began < seconds + 0.5
    p = csp.Problem()
    cells = [p.int(f"x{i}", 0, 9) for i in range(100)]
    for a, b in itertools.permutations(cells, 2):
        p.add(2 * a + 3 * b <= 60)
    p.add(False)
    assert p.solve(seconds=60) is None
    whole = p.statistics.seconds
    with pytest.raises(csp.LimitReached, match="out of time"):
        p.solve(seconds=1e-4)
    assert p.statistics.seconds < whole / 3


def test_no_limit_and_the_least():
    p = gemm()
    assert p.solve(seconds=math.inf) == {"m": 256, "n": 8}
    with pytest.raises(csp.LimitReached, match=r"^gemm tile: more than 1 node$"):
        p.solve(nodes=1)
    with pytest.raises(csp.LimitReached, match=r"^gemm tile: more than 0 nodes$"):
        p.solve(nodes=0)


def test_a_slow_consumer_takes_no_time_of_the_search():
    p = csp.Problem()
    p.int("x", 0, 4)
    found = []
    for solution in p.solutions(seconds=0.3):
        time.sleep(0.1)
        found.append(solution["x"])
    assert found == [0, 1, 2, 3, 4] and p.statistics.seconds < 0.3


def test_streams_keep_no_solutions():
    best = search.Best(3, (), kept=False)
    for i in range(3):
        assert not best.full
        best.add((), (i,))
    assert best.full and not best.found
    p = csp.Problem()
    p.int("x", 0, 99)
    stream = p.solutions(nodes=20)
    found = []
    with pytest.raises(csp.LimitReached) as caught:
        found.extend(stream)
        found.extend(stream)
    assert caught.value.best == []
    assert len(list(p.solutions(5))) == 5 and p.statistics.optimal


def test_a_stream_is_of_the_problem_as_it_was():
    p = csp.Problem()
    x = p.int("x", 0, 3)
    stream = p.solutions()
    found = [next(stream)]
    p.int("y", 0, 1)
    p.add(x < 2)
    p.minimize(-x)
    assert [*found, *stream] == [{"x": 0}, {"x": 1}, {"x": 2}, {"x": 3}]
    assert [s["x"] for s in p.solutions(distinct=x)] == [1, 0]


# ---- one solution, names, text


def test_one_constraint_under_two_names():
    p, q = csp.Problem(), csp.Problem()
    x = p.int("x", 0, 9)
    held = x > 5
    p.add(held, "first")
    p.add(held, "second")
    p.add(x < 3)
    assert [c.name for c in p.constraints] == ["first", "second", None] and held.name is None
    assert p.explain().splitlines()[1] in ("  first: x > 5", "  second: x > 5")
    fixed = csp.implies(True, True)
    p.add(fixed, "p")
    q.add(fixed, "q")
    assert (p.constraints[-1].name, q.constraints[-1].name) == ("p", "q")


def test_numpy_truth_is_truth():
    numpy = pytest.importorskip("numpy")
    p = csp.Problem()
    x = p.int("x", 0, 9)
    p.add(numpy.bool_(True))
    p.add(csp.implies(numpy.int64(3) < numpy.int64(5), x > 7))
    assert csp.where(numpy.bool_(False), 1, 2) == 2
    assert [s["x"] for s in p.solutions()] == [8, 9]


def test_check_says_what_is_wrong():
    p = gemm()
    assert p.check({"m": 256, "n": 8}) is None
    for solution, expected in (
        ({"m": 256}, "n: missing"),
        ({"m": 256, "n": 8, "k": 3}, "k: not a variable of gemm tile"),
        ({"m": "256", "n": 8}, "m: expected an int, got '256'"),
        ({"m": True, "n": 8}, "m: expected an int, got True"),
        ({"m": 17, "n": 8}, "m: expected a value of 16..256 in steps of 16, got 17"),
        ({"m": 256, "n": 9}, "n: expected a value of {8, 16, 32}, got 9"),
        ({"m": 256, "n": 32}, "violates accumulators fit: m*n <= 4096"),
        ({"m": 160, "n": 8}, "violates 768 % m == 0"),
        ({"m": 32, "n": 8}, "violates (m >= 64) | (n == 32)"),
    ):
        assert p.check(solution) == expected
    p = csp.Problem()
    x = p.int("x", 0, 3)
    p.define("share", 6 / x)
    assert p.check({"x": 0}) == "6 / 0 in share: 6/x"
    p.add(5 % x >= 0)
    assert p.check({"x": 0}) == "5 % 0 in 5 % x >= 0"
    with pytest.raises(ValueError, match=r"^6 / 0$"):
        p.values({"x": 0})


def test_definitions():
    p = gemm()
    m, n = p.variables.values()
    tile = p.define("tile", m * n)
    p.define("share", tile / 4096)
    p.define("seven", 7)
    assert list(p.values({"m": 256, "n": 8}).items()) == [("tile", 2048), ("share", 0.5), ("seven", 7)]
    assert p.solve() == {"m": 256, "n": 8}
    assert repr(p) == "<problem gemm tile: 2 variables, 3 constraints>"
    assert list(p.variables) == ["m", "n"] and p.constraints[0].name == "accumulators fit"


def test_plain_numbers_stay_numbers():
    assert csp.ceildiv(768, 100) == 8 and csp.ceildiv(-7, 2) == -3
    assert csp.min_(3, 1.5) == 1.5 and csp.max_([3, 9, 4]) == 9 and csp.abs_(-3) == 3
    assert csp.where(True, 1, 2) == 1 and csp.where(False, 1, 2) == 2
    assert csp.lookup(4, {2: 10, 4: 7.5}) == 7.5
    p = csp.Problem()
    x = p.int("x", 0, 3)
    p.add(768 % 64 == 0)
    p.add(csp.implies(True, x > 1) & True)
    p.add((x > 2) | False)
    assert [solution["x"] for solution in p.solutions()] == [3]
    p.add(768 % 100 == 0, "divides")
    assert p.solve() is None


def test_text():
    p = csp.Problem()
    x, y = p.int("x", -5, 5), p.int("y", values=range(20))
    for item, expected in (
        (x * y + 4 <= 9, "x*y + 4 <= 9"),
        (x * (y + 4) - (x - y) == -x, "x*(y + 4) - (x - y) == -x"),
        (-(x + y) * 2 < 7 // y, "-(x + y)*2 < 7 // y"),
        (x - (y - 1) != x % y, "x - (y - 1) != x % y"),
        ((x // y) // 2 >= x // (y // 2), "x // y // 2 >= x // (y // 2)"),
        (csp.ceildiv(x, 4) > csp.min_(x, y, 3), "ceildiv(x, 4) > min(x, y, 3)"),
        (abs(x) * -3 == csp.max_(x, y), "abs(x)*(-3) == max(x, y)"),
        (csp.implies(x > 1, (y < 3) & (y != x)), "(x <= 1) | ((y < 3) & (y != x))"),
        (~((x > 1) | (y == 2)), "(x <= 1) & (y != 2)"),
        (x * 0 + y * -1 != 0, "x*0 + y*(-1) != 0"),
        (3 > x, "x < 3"),  # noqa: SIM300
    ):
        assert str(item) == expected
    assert str(csp.where(x > 1, x / 2, 0.5)) == "where(x > 1, x/2, 0.5)"
    assert str(csp.lookup(x, {4: 7.5, 2: 10})) == "lookup(x, {2: 10, 4: 7.5})"
    assert repr(x) == "<variable x in -5..5>" and repr(x + 1) == "<expression x + 1>"
    assert repr(y) == "<variable y in {0, 1, 2, 3, 4, 5, 6, 7, ...}>"
    assert repr(p.add(x < y, "less")) == "<constraint less: x < y>"


# ---- misuse


def misuse(p, q):
    """Message by what causes it."""
    x, y, a = p.int("x", 0, 9), p.int("y", 0, 9), q.int("a", 0, 9)
    truth = (
        "has no truth value before the problem is solved: write a & b for `and`, a | b for `or`, ~a for `not`, "
        "(a < b) & (b < c) for a < b < c, csp.where(condition, x, y) for `if`, csp.max_ and csp.min_ for max and min, "
        "(x == 2) | (x == 3) for `in`"
    )
    reals = "constraints compare integers, got the real"
    return [
        (lambda: x > 1 and y > 1, TypeError, f"the constraint x > 1 {truth}"),
        (lambda: x > 1 or y > 1, TypeError, f"the constraint x > 1 {truth}"),
        (lambda: not x > 1, TypeError, f"the constraint x > 1 {truth}"),
        (lambda: 1 < x < 5, TypeError, f"the constraint x > 1 {truth}"),
        (lambda: 1 if x == y else 2, TypeError, f"the constraint x == y {truth}"),
        (lambda: 1 if x + y else 2, TypeError, f"the expression x + y {truth}"),
        (lambda: (x > 1) != (y > 1), TypeError, "!=: cannot compare the constraint x > 1: write (a & ~b) | (~a & b)"),
        (lambda: max(x, y), TypeError, f"the constraint y > x {truth}"),
        (lambda: y in [x, y], TypeError, f"the constraint x == y {truth}"),
        (lambda: x & 3, TypeError,
         "& joins constraints, such as (x > 1) & (y > 1), not expressions: write x % 4 for x & 3"),
        (lambda: ~x, TypeError, "| and ~ join constraints, such as (x > 1) | (y > 1); expressions have no bits"),
        (lambda: x << 1, TypeError, "<< and >> are not part of the language: write x * 4, x // 4"),
        (lambda: divmod(x, 3), TypeError, "divmod: write x // y and x % y"),
        (lambda: round(x / 2), TypeError, "expressions are not rounded: use // or csp.ceildiv"),
        (lambda: 2**x, TypeError,
         "** is not part of the language: write m * m, or a table, csp.lookup(x, {0: 1, 1: 2, 2: 4}), for 2**x"),
        (lambda: csp.where(True, "a", 3), TypeError, "where: expected a number or an expression, got 'a'"),
        (lambda: (p.define("d", x), p.int("d", 0, 1)), ValueError,
         "int: d: the problem has a definition of this name already"),
        (lambda: p.int("z", values=5), TypeError, "int: z: values: expected integers, got 5"),
        (lambda: p.solutions(distinct=3), TypeError,
         "solutions: distinct: expected variables or their names, got 3"),
        (lambda: p.solutions(distinct=[[]]), TypeError,
         "solutions: distinct: expected variables or their names, got []"),
        (lambda: p.solutions(distinct=(a,)), ValueError,
         "solutions: distinct: a: belongs to another problem, 'second'"),
        (lambda: p.check(None), TypeError,
         "check: solution: expected a mapping from names to integers, got None"),
        (lambda: (p.minimize(x), p.cost({"x": "a", "y": 1})), TypeError,
         "cost: solution: x: expected an int, got 'a'"),
        (lambda: p.values([]), TypeError, "values: solution: expected a mapping from names to integers, got []"),
        (lambda: p.solve(nodes=None), TypeError, "solve: nodes: expected an integer, got None"),
        (lambda: p.solve(nodes=1.5), TypeError, "solve: nodes: expected an integer, got 1.5"),
        (lambda: p.solve(nodes=-1), ValueError, "solve: nodes: expected at least 0, got -1"),
        (lambda: p.solve(seconds="3"), TypeError, "solve: seconds: expected a number, got '3'"),
        (lambda: p.solutions(seconds=None), TypeError, "solutions: seconds: expected a number, got None"),
        (lambda: p.solve(seconds=-1), ValueError, "solve: seconds: expected at least 0, got -1"),
        (lambda: p.explain(seconds=math.nan), ValueError, "explain: seconds: expected at least 0, got nan"),
        (lambda: (x > 1) == (y > 1), TypeError, "==: cannot compare the constraint x > 1: write (a & b) | (~a & ~b)"),
        (lambda: x / 2 <= 3, TypeError, f"{reals} x/2 <= 3: multiply out, or use // or csp.ceildiv"),
        (lambda: x <= 2.5, TypeError, f"{reals} x <= 2.5: multiply out, or use // or csp.ceildiv"),
        (lambda: x // 2.0, TypeError, "//: expected integer operands, got a real one in x // 2.0"),
        (lambda: x // 0, ZeroDivisionError, "x // 0"),
        (lambda: x % 0, ZeroDivisionError, "x % 0"),
        (lambda: csp.ceildiv(x, 0), ZeroDivisionError, "ceildiv(x, 0)"),
        (lambda: x / 0, ZeroDivisionError, "x / 0"),
        (lambda: x**2, TypeError, 
         "** is not part of the language: write m * m, or a table, csp.lookup(x, {0: 1, 1: 2, 2: 4}), for 2**x"),
        (lambda: x + "1", TypeError, "right operand of +: expected a number or an expression, got '1'"),
        (lambda: None * x, TypeError, "left operand of *: expected a number or an expression, got None"),
        (lambda: x == "1", TypeError, "right operand of ==: expected a number or an expression, got '1'"),
        (lambda: x + (y > 1), TypeError,
         "+: expected a number or an expression, got the constraint y > 1: use csp.where"),
        (lambda: (y > 1) * 4, TypeError,
         "*: expected a number or an expression, got the constraint y > 1: use csp.where"),
        (lambda: csp.max_(x, y > 1), TypeError,
         "max_: expected a number or an expression, got the constraint y > 1: use csp.where"),
        (lambda: x + (1 << 41), ValueError, f"right operand of +: expected an integer within ±2^40, got {1 << 41}"),
        (lambda: x * float("inf"), ValueError, "right operand of *: expected a finite number, got inf"),
        (lambda: x * float("nan"), ValueError, "right operand of *: expected a finite number, got nan"),
        (lambda: x + a, ValueError, "operands belong to two problems, 'first' and 'second'"),
        (lambda: p.add(a > 1), ValueError, "add: a > 1: belongs to another problem, 'second'"),
        (lambda: p.add(x + 1), TypeError, "add: expected a constraint such as m >= 16, got <expression x + 1>"),
        (lambda: p.add(1), TypeError, "add: expected a constraint such as m >= 16, got 1"),
        (lambda: p.add(x > 1, 3), TypeError, "add: name: expected a string, got 3"),
        (lambda: (x > 1) | 3, TypeError, "|: expected a constraint such as m >= 16, got 3"),
        (lambda: csp.implies(x, y > 1), TypeError,
         "implies: expected a constraint such as m >= 16, got <variable x in 0..9>"),
        (lambda: csp.where(x, 1, 2), TypeError,
         "where: condition: expected a constraint such as m >= 16, got <variable x in 0..9>"),
        (lambda: csp.min_(), TypeError, "min_: expected at least one operand, got none"),
        (lambda: csp.min_(3), TypeError, "min_: expected operands or one sequence of them, got 3"),
        (lambda: csp.lookup(x, {}), TypeError,
         "lookup: table: expected a mapping from integers to numbers, got {}"),
        (lambda: csp.lookup(x, {1.5: 2}), TypeError, "lookup: table: expected integer keys, got 1.5"),
        (lambda: csp.lookup(x / 2, {1: 2}), TypeError, "lookup: key: expected an integer expression, got the real x/2"),
        (lambda: csp.lookup(3, {1: 2}), ValueError, "lookup: the table has no 3"),
        (lambda: csp.ceildiv(1.5, 2), TypeError, "ceildiv: expected integers, got 1.5 and 2"),
        (lambda: p.int("x", 0, 1), ValueError, "int: x: the problem has a variable of this name already"),
        (lambda: p.int("", 0, 1), TypeError, "int: name: expected a non-empty string, got ''"),
        (lambda: p.int("z"), TypeError, "int: z: expected bounds low and high, or values"),
        (lambda: p.int("z", 0, 5, values=(1,)), TypeError, "int: z: expected either bounds or values, got both"),
        (lambda: p.int("z", 5, 0), ValueError, "int: z: expected a value between low and high, got 5..0"),
        (lambda: p.int("z", 17, 31, multiple_of=16), ValueError,
         "int: z: expected a multiple of 16 between low and high, got 17..31"),
        (lambda: p.int("z", 0, 5, multiple_of=0), ValueError, "int: z: multiple_of: expected at least 1, got 0"),
        (lambda: p.int("z", 0, 1 << 41), ValueError,
         f"int: z: high: expected an integer within ±2^40, got {1 << 41}"),
        (lambda: p.int("z", 0, 2.5), TypeError, "int: z: high: expected an integer, got 2.5"),
        (lambda: p.int("z", values=()), ValueError, "int: z: values: expected at least one, got none"),
        (lambda: p.int("z", values=range(5000)), ValueError, "int: z: values: expected at most 4096, got 5000"),
        (lambda: p.define("x", x + 1), ValueError, "define: x: the problem has this name already"),
        (lambda: p.define("", x), TypeError, "define: name: expected a non-empty string, got ''"),
        (lambda: p.minimize(x > 1), TypeError,
         "minimize: objective: expected an expression, got the constraint x > 1: use csp.where"),
        (lambda: p.minimize(x, then=a), ValueError, "minimize: then: a: belongs to another problem, 'second'"),
        (lambda: p.order("x"), TypeError, "order: expected variables, got 'x'"),
        (lambda: p.order(a), ValueError, "order: a: belongs to another problem, 'second'"),
        (lambda: p.solutions(-1), ValueError, "solutions: limit: expected at least 0, got -1"),
        (lambda: p.solutions(distinct=("z",)), ValueError, "solutions: distinct: expected variables of first, got 'z'"),
        (lambda: p.cost({"x": 1, "y": 1}), ValueError, "cost: first has no objective"),
        (lambda: p.values({"x": 1}), ValueError, "values: solution: y: missing"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(misuse(csp.Problem(), csp.Problem()))))
def test_misuse_word_for_word(number):
    cause, kind, message = misuse(csp.Problem("first"), csp.Problem("second"))[number]
    with pytest.raises(kind) as caught:
        cause()
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_numbers_beyond_reach_are_refused():
    p = csp.Problem()
    cells = [p.int(f"x{i}", 1, 1 << 40) for i in range(14)]
    product = cells[0]
    for cell in cells[1:]:
        product = product * cell
    p.minimize(product)
    with pytest.raises(ValueError, match=r"can leave ±2\^512: it reaches from 2\^1 to 2\^521$"):
        p.solve()
    p.minimize(product * product)
    with pytest.raises(ValueError, match="can leave ±2"):
        p.solve()


def test_what_is_too_large_waits_for_what_narrows_it():
    """The order of constraints decides nothing."""
    for first in (True, False):
        p = csp.Problem()
        x = p.int("x", 0, 1 << 40)
        power = x
        for _ in range(13):
            power = power * x
        parts = [power >= 1 << 14, x <= 3]
        for part in parts if first else reversed(parts):
            p.add(part)
        assert [s["x"] for s in p.solutions()] == [2, 3]
        p.add(x < 2)
        assert p.solve() is None and "x < 2" in p.explain()


def test_limits_of_best_keep_the_cheapest_of_a_group():
    """A better solution of a group takes the place of the worse one; ties keep the first."""
    best = search.Best(2, (0,))
    for key, values in (((5,), (1, 1)), ((4,), (2, 1)), ((4,), (1, 2)), ((4,), (1, 3)), ((3,), (3, 1)), ((6,), (4, 1))):
        best.add(key, values)
    assert best.found == [((3,), (3, 1)), ((4,), (1, 2))]
    assert best.ceiling == (4,)


def test_network_shares_equal_expressions():
    """x*y is one node, however often and in whatever order it is written."""
    p = csp.Problem()
    x, y = p.int("x", 1, 9), p.int("y", 1, 9)
    network = Network(list(p.variables.values()))
    assert network.slot(x * y) == network.slot(y * x) == network.slot((x + 0) * y)
    assert network.slot(x + y) == network.slot(y + x)
    assert network.slot(csp.max_(x, y)) == network.slot(csp.max_(y, x))
    assert network.slot(csp.ceildiv(x, 4)) == network.slot(csp.ceildiv(x, 4))


# ---- the benchmark


def test_benchmark_rows_and_page(tmp_path, capsys):
    """One problem measured: a plain row, JSON that can be read again, a table between the markers of a page."""
    page, file = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{bench_csp.BEGIN}\nold\n{bench_csp.END}\nafter\n")
    assert bench_csp.main(["--goals", "--rounds", "1", "--json", str(file), "--page", str(page)]) == 0
    record = json.loads(file.read_text())
    assert [row["problem"] for row in record["rows"]] == ["12x64 B=16", "1x768 B=16"]
    for row in record["rows"]:
        assert (row["variables"], row["constraints"], row["goal_ms"]) == (57, 61, 50.0)
        assert row["ms"] > 0 and row["peer_ms"] > row["peer_build_ms"] > 0 and row["nodes"] > 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| 12x64 B=16 |") == 1 and "one worker" in text
    assert "1x768 B=16" in capsys.readouterr().out
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected one line <!-- solver:begin -->"):
        bench_csp.update_page(page, record)
