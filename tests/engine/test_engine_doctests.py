"""The examples in the docstrings run, in every module."""

import doctest
import importlib
import pkgutil

import pytest

import bilevel

MODULES = ["bilevel", *(f"bilevel.{m.name}" for m in pkgutil.iter_modules(bilevel.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["solve", "hypergradient", "implicit"])
def test_the_functions_have_examples(name):
    found = doctest.DocTestFinder().find(getattr(bilevel, name), name)
    assert sum(len(test.examples) for test in found) >= 3
