"""Every operator at several lengths, in small sizes: `python -m bench --suite lengths`.

For the plots of time and memory against length: a forward pass and a training step, beside the first peer of the
operator's own table as far as that peer goes in reasonable time. Values are compared with float64 on the first steps
alone; the suite of operators compares them over whole lengths. Nothing here has a goal.

Of operators without a time axis the length is what grows: rows of a grid, of a matrix, entries of a kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench import (
    attention_peers,
    block_diffusion_attention,
    causal_conv1d,
    chunked_attention,
    combiner_attention,
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
    ssm,
    update_centroids,
    window_attention,
)
from bench.harness import FORWARD, TRAINING, Case

USUAL = (256, 1024, 4096, 16384)
CHECK_STEPS = 128


@dataclass(frozen=True)
class Sweep:
    """The cases of one operator.

    Attributes:
        make: length -> a case of its own table.
        lengths: ascending.
        peer_until: the longest at which the peer is timed, too.
        check_steps: of the comparison with float64.
    """

    make: Callable[[int], Case]
    lengths: Sequence[int] = USUAL
    peer_until: int = 16384
    check_steps: int = CHECK_STEPS


def heads(T: int, B: int = 1, H: int = 4, D: int = 64) -> attention_peers.Shape:
    return attention_peers.Shape(B, T, H, D)


def recurrent(op: str) -> Callable[[int], Case]:
    return lambda T: rnn.make_case(rnn.module(op, 4, T, 64))


def clusters(T: int) -> int:
    """Lists of about 256 tokens."""
    return max(T // 256, 2)


SWEEPS: dict[str, Sweep] = {
    "lstm": Sweep(recurrent("lstm"), (64, 256, 1024, 4096)),
    "gru": Sweep(recurrent("gru"), (64, 256, 1024, 4096), 1024),
    "elman": Sweep(recurrent("elman"), (64, 256, 1024, 4096)),
    "slstm": Sweep(lambda T: rnn.make_case(rnn.Shape("slstm", 4, T, 64, H=2)), (64, 256, 1024, 4096), 256),
    "linear_scan": Sweep(lambda T: scan.make_case(scan.linear(2, T, 256), peers=(scan.LOOP,)), peer_until=1024),
    "softmax_scan": Sweep(
        lambda T: scan.make_case(scan.Shape("softmax_scan", 2, T, 4, 64), peers=(scan.LOOP,)), peer_until=1024
    ),
    "grid_scan": Sweep(
        lambda X: grid_scan.make_case(grid_scan.Shape(2, X, X, 4, 32), peers=(grid_scan.DIAGONALS,)), (8, 16, 32, 64)
    ),
    "linear_attention": Sweep(lambda T: linear_attention.make_case(linear_attention.Shape(1, T, 4, 64, 64))),
    "causal_conv1d": Sweep(lambda T: causal_conv1d.make_case(causal_conv1d.Shape(2, T, 256, 4))),
    "fft_conv": Sweep(lambda T: fft_conv.make_case(fft_conv.Shape(2, T, 128, T), peers=(fft_conv.PLAIN,))),
    "conv_ssm": Sweep(
        lambda T: conv_ssm.make_case(conv_ssm.Shape(1, T, 8, 32, 32), yardsticks=()), (16, 64, 256, 1024), check_steps=4
    ),
    "ssm_kernel": Sweep(lambda L: ssm.make_case(ssm.Shape("ssm_kernel", 64, 32, L)), peer_until=4096),
    "cauchy_kernel": Sweep(
        lambda L: ssm.make_case(ssm.Shape("cauchy_kernel", 64, 32, L)), (257, 1025, 4097, 16385), peer_until=4097
    ),
    "range_attention": Sweep(lambda T: range_attention.case(heads(T)), peer_until=2048),
    "chunked_attention": Sweep(lambda T: chunked_attention.case(heads(T), 256)),
    "window_attention": Sweep(lambda T: window_attention.case(heads(T), 256, 0)),
    "block_diffusion_attention": Sweep(
        lambda T: block_diffusion_attention.case(heads(T), 32), (256, 1024, 2048, 4096), 2048
    ),
    "combiner_attention": Sweep(lambda T: combiner_attention.case(heads(T), 64), check_steps=256),
    "delta_attention": Sweep(lambda T: delta_attention.case(heads(T), 0.6, 128), (256, 512, 1024, 2048, 4096), 1024),
    "gathered_attention": Sweep(lambda T: gathered_attention.case(heads(T), clusters(T), 256), peer_until=4096),
    "routing_attention": Sweep(lambda T: routing_attention.case(heads(T), clusters(T), 256, True), peer_until=4096),
    "cluster_assign": Sweep(lambda T: routing_attention.assignment(heads(T), clusters(T), 256, "causal")),
    "update_centroids": Sweep(lambda T: update_centroids.case(update_centroids.Shape(1, T, 4, 64, 16))),
    "prob_sparse_attention": Sweep(
        lambda T: prob_sparse_attention.case(heads(T), 5 * max(T - 1, 1).bit_length()), (256, 512, 1024, 2048, 4096)
    ),
    "merge_attention": Sweep(lambda T: merge_attention.case(merge_attention.Shape(1, T, 4, 64))),
    "pointer_scores": Sweep(
        lambda T: pointer_scores.case(pointer_scores.Shape(2, T, T, 128), goals={}), (32, 64, 128, 256, 512), 256
    ),
    "newton_schulz": Sweep(
        lambda M: newton_schulz.make_case(newton_schulz.Shape(4, M, M)), (32, 64, 128, 256, 512), check_steps=512
    ),
    "large_chunk_ttt": Sweep(
        lambda T: large_chunk_ttt.make_case(large_chunk_ttt.Shape(1, T, 2, 64, 128, 256), sgemm=False), check_steps=512
    ),
    "neural_memory": Sweep(
        lambda T: neural_memory.make_case(
            neural_memory.Shape(1, T, 2, 64, 128, 16), peers=(neural_memory.CHUNKED,), modes=(FORWARD, TRAINING)
        ),
        (256, 1024, 4096),
        1024,
    ),
}


def make_cases(op: str) -> list[Case]:
    sweep, made = SWEEPS[op], []
    for length in sweep.lengths:
        case = sweep.make(length)
        kept = case.peers[:1] if length <= sweep.peer_until else []
        left_out = {name for name in case.peers if name not in kept}
        modes = tuple(mode for mode in case.modes if mode in (FORWARD, TRAINING))
        made.append(
            replace(
                case,
                name=f"{case.name} by length",
                builders={name: builder for name, builder in case.builders.items() if name not in left_out},
                modes=modes,
                flops={mode: case.flops[mode] for mode in modes},
                bytes={mode: case.bytes[mode] for mode in modes},
                goals={},
                causes={},
                copy_goals={},
                time_goals={},
                absent={},
                yardsticks={},
                check_steps=sweep.check_steps if sweep.check_steps < case.steps else None,
                check_whole=False,
                length=length,
            )
        )
    return made


def load_cases() -> list[Case]:
    return [case for op in SWEEPS for case in make_cases(op)]
