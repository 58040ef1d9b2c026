"""chunked_attention on the CPU against the reference in float64."""

import pytest
from cases import Case, assert_within, evaluate, exact_results, params


@pytest.mark.parametrize("case", params(operators=("chunked_attention",)))
def test_against_the_reference(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    exact = exact_results(case, inputs, cotangents)
    assert_within(evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact))
