"""Cases of linear_scan and softmax_scan."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqops.scan import reference

from . import common
from .common import LAYOUTS, NARROW, Function, arrange, name_of, pairwise

OPERATORS = ("linear_scan", "softmax_scan")
STATES = {"linear_scan": ("initial_state",), "softmax_scan": ("initial_lse", "initial_out")}
SEQUENCES = {"linear_scan": ("x", "a"), "softmax_scan": ("s", "v")}
HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64, *HALF)
# Of x, and the gates that may go with it: none is more precise than the state.
GATES = {
    **dict.fromkeys(HALF, (*HALF, torch.float32)),
    **dict.fromkeys((torch.float32, torch.complex64), (*HALF, torch.float32, torch.complex64)),
    **dict.fromkeys((torch.float64, torch.complex128), (*REAL, torch.complex64, torch.complex128)),
}
# The pairs of storage and gate that kernels see; the host widens gates of other dtypes.
NATIVE = [
    *((dtype, dtype) for dtype in GATES),
    *((dtype, torch.float32) for dtype in HALF),
    (torch.complex64, torch.float32),
    (torch.complex128, torch.float64),
]
DOUBLE = {torch.complex64: torch.float32, torch.complex128: torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in, without the imaginary part."""
    return DOUBLE.get(dtype, torch.float32 if dtype in HALF else dtype)


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """linear_scan of x [B, T, *channels] and a, or softmax_scan of s [B, T, H] and v [B, T, H, D], [H, D] = channels.

    The gate a has the dimensions named in `gate`: B, T and channel dimensions by number; the others are 1.
    """

    channels: tuple[int, ...] = (17,)
    gate: str = "BT012"
    gate_dtype: torch.dtype | None = None  # of a, or of the scores s; None: as x and v
    states: str = "state"  # the dtype of the initial states: "storage", "state", "real" (of the state), or "none"
    packed: bool = False  # several sequences along T, some of them empty
    gaps: bool = False  # exact zeros in a; scores of -inf, with NaN for their values

    def words(self) -> list[str]:
        sizes = "x".join(map(str, self.channels))
        words = [f"B{self.B}", f"T{self.T}", f"C{sizes}", name_of(self.dtype)]
        words += [] if self.gate_dtype is None else [f"gate_{name_of(self.gate_dtype)}"]
        words += [] if self.op != "linear_scan" or self.gate == "BT012" else [f"gate_{self.gate or 'scalar'}"]
        words += [] if self.states == "state" else [f"states_{self.states}"]
        words += [name for name in ("reverse", "packed", "gaps") if getattr(self, name)]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return getattr(reference, self.op)

    @property
    def other_dtype(self) -> torch.dtype:
        """Of the gate or the scores."""
        return self.gate_dtype or self.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Of what is carried and summed."""
        real = real_of(self.dtype)
        if self.dtype.is_complex or self.other_dtype.is_complex:
            return torch.complex128 if real == torch.float64 else torch.complex64
        return real

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.state_dtype if self.state_dtype.is_complex else self.dtype, self.state_dtype]

    @property
    def gate_shape(self) -> tuple[int, ...]:
        sizes = (self.B, self.T, *self.channels)
        names = ("B", "T", *map(str, range(len(self.channels))))
        return tuple(size if name in self.gate else 1 for name, size in zip(names, sizes, strict=True))

    def edges(self) -> list[int]:
        """The ends of the packed sequences: the first and the last are empty, the second is one step."""
        draw = random.Random(self.seed)
        inner = sorted(draw.randint(min(1, self.T), self.T) for _ in range(3))
        return [0, 0, min(1, self.T), *inner, self.T, self.T]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        assert self.B == 1 or not self.packed
        generator, expanded = self.generator(), self.layout == "expanded"

        def draw(*shape: int, shared: Sequence[int] = (), complex: bool = False) -> Tensor:
            """Normal values; with layout "expanded" the dimensions `shared` are read with stride 0."""
            sizes = [min(size, 1) if expanded and d in shared else size for d, size in enumerate(shape)]
            return torch.randn(sizes, dtype=torch.complex128 if complex else torch.float64, generator=generator)

        def uniform(shape: Sequence[int]) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator)

        def place(values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return arrange(values.to(dtype).to(device), self.layout).expand(*shape).requires_grad_()

        B, T, channels = self.B, self.T, self.channels
        rows = len(self.edges()) - 1 if self.packed else B
        state_dtypes = {"state": self.state_dtype, "real": real_of(self.dtype)}
        state_dtype = state_dtypes.get(self.states, self.dtype)
        inputs: dict[str, Any] = {}
        if self.op == "linear_scan":
            x = draw(B, T, *channels, shared=(0, 1 + len(channels)), complex=self.dtype.is_complex)
            a_shape = [min(size, 1) if expanded and d == 1 else size for d, size in enumerate(self.gate_shape)]
            # Forgets most of the past, but not so much that an error in what tiles hand on would not show.
            a = (uniform(a_shape) * -min(2.0, 16 / max(T, 1))).exp()
            if self.other_dtype.is_complex:
                a = torch.polar(a, uniform(a_shape) * math.tau)
            else:
                a = torch.where(uniform(a_shape) < 0.25, -a, a)
            if self.gaps:
                a = a.masked_fill(uniform(a_shape) < 0.1, 0.0)
            inputs["x"] = place(x, (B, T, *channels), self.dtype)
            inputs["a"] = place(a, self.gate_shape, self.other_dtype)
            if self.states != "none":
                state = draw(rows, *channels, shared=(0,), complex=state_dtype.is_complex)
                inputs["initial_state"] = place(state, (rows, *channels), state_dtype)
        else:
            heads, width = channels
            s, v = draw(B, T, heads, shared=(0,)) * 2, draw(B, T, heads, width, shared=(0, 3))
            if self.gaps:
                absent = uniform(s.shape) < 0.25
                absent[:, :2] = True  # at the start, and all steps of one head of several
                absent[:, :, 1:][..., -1:] = True
                s = s.masked_fill(absent, -math.inf)
                v = v.expand(v.shape[0], T, heads, width).masked_fill(absent[..., None], torch.nan)
            inputs["s"] = place(s, (B, T, heads), self.other_dtype)
            inputs["v"] = place(v, (B, T, heads, width), self.dtype)
            if self.states != "none":
                lse, out = draw(rows, heads, shared=(0,)) * 2, draw(rows, heads, width, shared=(0, 2))
                if self.gaps:
                    lse[:1] = -math.inf
                    # Else the gradient of this head's initial lse is what rounding leaves of a zero.
                    lse[:, 1:][..., -1:] = -math.inf
                lse_dtype = self.other_dtype if self.states == "storage" else self.state_dtype
                inputs["initial_lse"] = place(lse, (rows, heads), lse_dtype)
                inputs["initial_out"] = place(out, (rows, heads, width), state_dtype)
        if self.packed:
            integer = random.Random(self.seed).choice([torch.int32, torch.int64])
            inputs["cu_seqlens"] = torch.tensor(self.edges(), dtype=integer, device=device)
        return inputs | {"reverse": self.reverse}

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            kind = torch.complex128 if output.is_complex() else torch.float64
            values = torch.randn(shape, dtype=kind, generator=generator)
            values = values.to(output.dtype if output.is_complex() else self.dtype).to(output.dtype)
            cotangents.append(arrange(values.to(output.device), self.layout).expand(output.shape))
        return cotangents

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        """For each result the largest error allowed.

        Where no 16-bit dtype has a part in a result, that is the bound of the dtype it is computed in. Elsewhere it is
        1.2 times the error of the reference in this dtype, or of one rounding if that is larger.
        """
        names = {"0": self.output_dtypes[0], "1": self.output_dtypes[1]}
        dtypes = names | {f"d{name}": value.dtype for name, value in common.differentiable(inputs).items()}
        # On the way of the state and of its gradient nothing is stored.
        direct = ("1", "dinitial_state")
        bounds, peer = {}, None
        for name, value in exact.items():
            stored = [dtypes[name], *([] if name in direct else [self.dtype])]
            narrow = [torch.finfo(dtype).eps / 2 for dtype in stored if dtype in NARROW]
            bound = max(TOLERANCE[real_of(dtype)] for dtype in (*stored, self.dtype))
            bounds[name] = common.allowance(bound, value)
            if narrow:
                peer = peer or common.evaluate(self.reference, inputs, self.as_stored(cotangents, exact["0"]))
                floor = common.allowance(max(narrow), value)
                bounds[name] = 1.2 * max(common.error(peer[name], value), floor)
        return bounds

    def as_stored(self, cotangents: Sequence[Tensor], exact_out: Tensor) -> list[Tensor]:
        """Gradients for the reference that have the effect of o being rounded before the backward reads it.

        The backward of softmax_scan has o in `<do, o> - dlse` alone, so its rounding is a change of dlse.
        """
        if self.op == "linear_scan":
            return [*cotangents]
        do, dlse = cotangents
        rounding = exact_out.to(self.dtype).double() - exact_out
        return [do, (dlse.cpu() - (do.cpu().double() * rounding).sum(-1)).to(dlse)]


def shapes(op: str, *widths: int) -> list[tuple[int, ...]]:
    """Channels of these widths: one dimension for linear_scan, one head for softmax_scan."""
    return [(width,) if op == "linear_scan" else (1, width) for width in widths]


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    linear = op == "linear_scan"
    pairs = [(dtype, gate) for dtype in GATES for gate in GATES[dtype]]
    if not linear:
        pairs = [(dtype, gate) for dtype, gate in pairs if not (dtype.is_complex or gate.is_complex)]
    factors = {
        "channels": [(1, 1), (1, 17), (3, 1), (2, 64), (3, 100), (1, 512), (5, 3)],
        "gate": ["BT01", "BT0", "BT1", "T01", "01", "B0", "BT", "T", "1", ""] if linear else ["BT012"],
        "B": [1, 2, 7],
        "T": [1, 2, 5, 37, 64, 129],
        "pair": pairs,
        "layout": LAYOUTS,
        "reverse": [False, True],
        "packed": [False, True],
        "states": ["none", "storage", "state", "real"] if linear else ["none", "storage", "state"],
        "gaps": [False, True],
    }
    for row in pairwise(factors, seed=len(op)):
        row["dtype"], row["gate_dtype"] = row.pop("pair")
        if row["packed"]:
            row["B"] = 1
        yield Case(op, **row)


ONCE = ("", "1", "01", "BT0", "T1", "BT01")  # each kind of sum in a gate's gradient, for the slow interpreter


def table(op: str) -> list[Case]:
    linear = op == "linear_scan"
    make = partial(Case, op)
    wide, heads = ((40,), (3, 5)) if linear else ((2, 20), (3, 5))
    everything = {"reverse": True, "gaps": True}
    native = [pair for pair in NATIVE if linear or not pair[0].is_complex]
    cases = [
        # For the simulator, the interpreter and the sanitizers. First the lengths around the edges of tiles.
        *(
            make(B=2, T=T, channels=channels).with_marks("small", "sanitize", *(["tiny"] if T == 1 else []))
            for T, channels in itertools.product((1, 2, 31, 33, 63, 64, 65, 127, 129), shapes(op, 17))
        ),
        *(make(B=2, T=T, channels=wide, **everything).with_marks("small", "sanitize") for T in (1, 33, 65, 130)),
        *(make(B=1, T=T, channels=wide, packed=True, gaps=True).with_marks("small", "sanitize") for T in (5, 63, 200)),
        make(B=1, T=20, channels=heads, packed=True).with_marks("small", "sanitize", "tiny"),
        make(B=1, T=200, channels=heads, packed=True, reverse=True).with_marks("small", "sanitize"),
        make(B=2, T=19, channels=heads, **everything).with_marks("small", "sanitize", "tiny"),
        # Few channels and many, one row and many.
        *(make(B=1, T=130, channels=channels).with_marks("small") for channels in shapes(op, 1, 3, 129)),
        *(make(B=9, T=3, channels=channels).with_marks("small") for channels in shapes(op, 1, 130)),
        make(B=3, T=2, channels=shapes(op, 33)[0]).with_marks("small", "tiny"),
        make(B=1, T=17, channels=shapes(op, 17)[0]).with_marks("small", "tiny"),
        # Every pair of dtypes that a kernel sees. The interpreter truncates where bfloat16 is stored, GPUs round.
        *(
            make(B=2, T=66, channels=heads, dtype=dtype, gate_dtype=gate, **everything).with_marks("small", "sanitize")
            for dtype, gate in native
        ),
        *(
            make(B=1, T=9, channels=heads, dtype=dtype, gate_dtype=gate, states="storage").with_marks(
                "small", *(["tiny"] if torch.bfloat16 not in (dtype, gate) and dtype != torch.complex128 else [])
            )
            for dtype, gate in native
        ),
        # Nothing to do, in time, in the batch, and in both.
        *(
            make(B=B, T=T, channels=heads, states=states, reverse=reverse).with_marks("small", "sanitize", "tiny")
            for (B, T), states, reverse in (
                ((0, 5), "state", True),
                ((3, 0), "state", False),
                ((0, 0), "none", False),
                ((3, 0), "none", True),
            )
        ),
        make(B=1, T=0, channels=heads, packed=True).with_marks("small", "sanitize", "tiny"),
        make(B=1, T=1, channels=heads, packed=True, dtype=torch.float16).with_marks("small", "sanitize", "tiny"),
        # Layouts.
        *(make(B=2, T=11, channels=heads, layout=name).with_marks("small", "sanitize", "tiny") for name in LAYOUTS[1:]),
        # Long and wide.
        *(make(B=2, T=127, channels=channels) for channels in shapes(op, 1, 3, 17, 512)),
        make(B=1, T=1000, channels=shapes(op, 512)[0], dtype=torch.bfloat16),
        make(B=3, T=1000, channels=heads, dtype=torch.float16, gate_dtype=torch.float32, states="none"),
        make(B=2, T=1000, channels=shapes(op, 17)[0], packed=False, **everything),
        make(B=1, T=8000, channels=shapes(op, 3)[0], reverse=True),
        make(B=1, T=16323, channels=shapes(op, 17)[0]),
        *(
            make(B=B, T=T, channels=channels, dtype=dtype).with_marks("slow")
            for B, T, channels, dtype in (
                (2, 127323, shapes(op, 3)[0], torch.float32),
                (1, 16323, shapes(op, 512)[0], torch.bfloat16),
                (1, 8000, shapes(op, 1)[0], torch.float64),
            )
        ),
    ]
    if linear:
        patterns = ["".join(names) for n in range(5) for names in itertools.combinations("BT01", n)]
        cases += [
            *(
                make(B=2, T=5, channels=(3, 5), gate=gate).with_marks("small", *(["tiny"] if gate in ONCE else []))
                for gate in patterns
            ),
            # A gate that no (div, mod) describes, and no channel dimension at all.
            make(B=2, T=5, channels=(2, 3, 4), gate="BT02").with_marks("small", "sanitize", "tiny"),
            make(B=2, T=5, channels=(2, 3, 4), gate="T1", gaps=True).with_marks("small", "sanitize"),
            make(B=2, T=70, channels=()).with_marks("small", "sanitize"),
            # Gates shared over more than a tile, whose gradients are sums over many.
            *(
                make(B=2, T=130, channels=(2, 17), gate=gate).with_marks("small")
                for gate in ("", "01", "T0", "BT", "0")
            ),
            *(make(B=1, T=70, channels=(2, 17), gate=gate, packed=True, reverse=True) for gate in ("", "T0", "BT")),
            make(B=1, T=4000, channels=(4,), gate="0", dtype=torch.complex64),
            make(B=2, T=1000, channels=(6, 20), gate="BT0", dtype=torch.bfloat16),
            *(make(B=2, T=33, channels=(17,), dtype=x, gate_dtype=a, states="real") for x in GATES for a in GATES[x]),
        ]
    else:
        cases += [make(B=2, T=65, channels=(5, 1), **everything).with_marks("small", "sanitize")]
    cases += covering(op)
    sizes = itertools.product((1, 2, 9), (1, 2, 31, 64, 65, 1000), [(1, 1), (1, 17), (7, 3), (4, 128)], (False, True))
    cases += [make(B=B, T=T, channels=c, packed=p and B == 1, reverse=p).with_marks("slow") for B, T, c, p in sizes]
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(op, **({"B": 3, "T": 5, "channels": (2, 4)} | options))
