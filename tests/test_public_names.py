"""The front door: every public name resolves, has a docstring, and costs nothing until it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import replicate


@pytest.mark.parametrize("name", replicate.__all__)
def test_public_name_resolves_and_has_a_docstring(name: str) -> None:
    value = getattr(replicate, name)
    assert inspect.getdoc(value)
    assert value.__module__ == replicate._homes()[name]
    assert name in dir(replicate)


def test_public_name_is_never_a_submodule() -> None:
    assert not [name for name in replicate.__all__ if importlib.util.find_spec(f"replicate.{name}")]


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse(inspect.getsource(replicate))
    seen = {
        alias.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == replicate._homes()


def test_importing_the_package_imports_neither_torch_nor_pandas() -> None:
    program = "import sys, replicate; dir(replicate); print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = replicate.no_such_name
