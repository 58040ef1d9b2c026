"""One table of cases per operator. Every rung of tests reads it and adds nothing.

A case says shapes, dtype, options, memory layout and marks; it makes its own inputs, random gradients of its outputs,
and the bound its errors must keep. Errors are relative root mean squares against the reference in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import (
    block_diffusion_attention,
    causal_conv1d,
    chunked_attention,
    cluster_assign,
    combiner_attention,
    common,
    conv_ssm,
    delta_attention,
    fft_conv,
    gathered_attention,
    grid_scan,
    large_chunk_ttt,
    linear_attention,
    merge_attention,
    neural_memory,
    newton_schulz,
    pointer_scores,
    prob_sparse_attention,
    range_attention,
    rnn,
    routing_attention,
    scan,
    ssm_kernel,
    window_attention,
)
from .common import (
    LAYOUTS,
    NARROW,
    WIDE,
    Case,
    allowance,
    arrange,
    as_tuple,
    assert_same_bits,
    assert_within,
    differentiable,
    error,
    evaluate,
    exact_results,
    in_double,
    in_float64,
    only,
    pairwise,
    same_bits,
)

TABLES = (
    rnn,
    scan,
    grid_scan,
    linear_attention,
    causal_conv1d,
    fft_conv,
    ssm_kernel,
    conv_ssm,
    range_attention,
    chunked_attention,
    window_attention,
    block_diffusion_attention,
    combiner_attention,
    prob_sparse_attention,
    merge_attention,
    delta_attention,
    cluster_assign,
    gathered_attention,
    routing_attention,
    pointer_scores,
    newton_schulz,
    large_chunk_ttt,
    neural_memory,
)
ROOMS = {op: table for table in TABLES for op in table.OPERATORS}
OPERATORS = tuple(ROOMS)


class Tables(Mapping[str, list[Case]]):
    """The cases of every operator, made when they are first asked for: a process for one file needs few of them."""

    def __init__(self) -> None:
        self.made: dict[str, list[Case]] = {}

    def __getitem__(self, op: str) -> list[Case]:
        if op not in self.made:
            self.made[op] = ROOMS[op].table(op)
        return self.made[op]

    def __iter__(self) -> Iterator[str]:
        return iter(ROOMS)

    def __len__(self) -> int:
        return len(ROOMS)


CASES = Tables()

__all__ = [
    "CASES",
    "LAYOUTS",
    "NARROW",
    "OPERATORS",
    "ROOMS",
    "WIDE",
    "Case",
    "allowance",
    "arrange",
    "as_tuple",
    "assert_same_bits",
    "assert_within",
    "block_diffusion_attention",
    "causal_conv1d",
    "chunked_attention",
    "cluster_assign",
    "combiner_attention",
    "conv_ssm",
    "delta_attention",
    "differentiable",
    "error",
    "evaluate",
    "exact_results",
    "example",
    "fft_conv",
    "gathered_attention",
    "grid_scan",
    "in_double",
    "in_float64",
    "large_chunk_ttt",
    "linear_attention",
    "merge_attention",
    "neural_memory",
    "newton_schulz",
    "only",
    "pairwise",
    "params",
    "pointer_scores",
    "range_attention",
    "prob_sparse_attention",
    "rnn",
    "routing_attention",
    "same_bits",
    "scan",
    "ssm_kernel",
    "window_attention",
]


def example(op: str, **options: Any) -> Case:
    """A small case of any operator; every room knows B, T, dtype, reverse and layout."""
    return ROOMS[op].example(op, **options)


def params(
    mark: str | None = None,
    where: Callable[[Any], bool] = lambda case: True,
    operators: Sequence[str] = OPERATORS,
) -> list[Any]:
    """The cases as pytest parameters with their marks."""
    chosen = [case for op in operators for case in CASES[op]]
    return common.parameters(case for case in chosen if (mark is None or mark in case.marks) and where(case))
