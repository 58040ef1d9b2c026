"""The pytest-benchmark suite: one test for each case and mode of the case tables."""

import pytest

from bench import suite


def test_speed(measurement, benchmark, request: pytest.FixtureRequest) -> None:
    """Values agree with the float64 reference; only then is there a time."""
    result = suite.find(request.config).measure(*measurement, benchmark)
    benchmark.extra_info.update(
        ratios=result.ratios, gemm_fraction=result.gemm_fraction, seconds=result.seconds, memory=result.memory
    )
    assert result.error is None, result.error
