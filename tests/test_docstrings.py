"""What `help(seqops.lstm)` teaches: an example that runs, and the type of everything that goes in and comes out."""

import doctest
import inspect

import pytest
import torch

import seqops
import seqops.nn
from seqops.core import backend

OPERATORS = [name for name in seqops.__all__ if name in backend.table()]
CLASSES = [name for name in seqops.nn.__all__ if inspect.isclass(getattr(seqops.nn, name))]
FUNCTIONS = [f"seqops.{name}" for name in [*OPERATORS, "backend"]]
FUNCTIONS += [f"seqops.nn.{name}" for name in seqops.nn.__all__ if name not in CLASSES]


def run(text: str, name: str) -> list[str]:
    """The failures of a docstring's examples; torch and seqops are there."""
    torch.manual_seed(0)
    names = {"torch": torch, "seqops": seqops}
    examples = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=said.append)
    return said


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_an_example_that_runs(operator):
    """Three to seven lines in a section of their own, before the paper."""
    text = inspect.getdoc(getattr(seqops, operator))
    assert text.count("\nExample:\n    >>> ") == 1
    before, after = text.split("\nExample:\n")
    example, paper = after.split("\n\n", 1)
    assert "Memory: " in before and paper
    assert 3 <= example.count("    >>> ") + example.count("    ... ") <= 7
    assert f"seqops.{operator}(" in example
    assert run(text, operator) == []


@pytest.mark.parametrize("name", CLASSES)
def test_examples_of_modules_run(name):
    assert run(inspect.getdoc(getattr(seqops.nn, name)) or "", name) == []


def test_a_wrong_example_is_found():
    assert run(">>> 1 + 1\n3\n", "wrong")


def unannotated(function: object) -> list[str]:
    """Parameters without a type, and "return" where the function does not say what it gives."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    missing = [name for name, each in signature.parameters.items() if name != "self" and each.annotation is empty]
    return missing + ["return"] * (signature.return_annotation is inspect.Signature.empty)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated(name):
    module = seqops.nn if name.startswith("seqops.nn.") else seqops
    function = getattr(module, name.rpartition(".")[2])
    assert unannotated(function) == []
    assert inspect.signature(function, eval_str=True)


@pytest.mark.parametrize("name", CLASSES)
def test_methods_are_annotated(name):
    """Every public method that the class or a base of this library defines, and the constructor."""
    cls = getattr(seqops.nn, name)
    for method, function in inspect.getmembers(cls, inspect.isfunction):
        ours = function.__module__.startswith("seqops.")
        if ours and (method == "__init__" or not method.startswith("_")):
            assert unannotated(function) == [], method


def test_public_names_exist():
    for module in (seqops, seqops.nn):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
