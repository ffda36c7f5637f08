"""How the code is written, checked: modules are abstract or final, documented, and import one way."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import equinox as eqx
import pytest

import dpx

SOURCE = Path(dpx.__file__).parent
ROOMS = [
    "_types", "_events", "_checks", "_files", "_round", "_tree", "_norms", "_sensitive", "_wide", "_chacha", "random", "_draws", "sharding",
    "problem", "augmentation", "clipping", "gradients", "strategies", "noise", "metrics", "mechanism",
    "sampling", "accounting", "private_gradient", "private_sum", "plan", "optimizers", "training", "auditing", "testing", "cli",
]  # fmt: skip


def modules():
    for info in pkgutil.walk_packages([str(SOURCE)], "dpx."):
        importlib.import_module(info.name)

    def walk(cls):
        for child in cls.__subclasses__():
            yield child
            yield from walk(child)

    return sorted(
        {c for c in walk(eqx.Module) if c.__module__.startswith("dpx")}, key=lambda c: (c.__module__, c.__qualname__)
    )


CLASSES = modules()
PUBLIC = {
    value
    for name, module in sys.modules.items()
    if name.startswith("dpx") and not any(part.startswith("_") for part in name.split("."))
    for value in vars(module).values()
    if inspect.isclass(value)
}


def is_abstract(cls):
    return cls.__name__.lstrip("_").startswith("Abstract")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__qualname__)
def test_modules_are_abstract_or_final_and_documented(cls):
    has_abstract_parts = bool(getattr(cls, "__abstractmethods__", None)) or bool(
        getattr(cls, "__abstractvars__", None) or getattr(cls, "__abstractclassvars__", None)
    )
    if not is_abstract(cls):
        assert not has_abstract_parts, "a module with abstract parts is named Abstract*"
    for parent in cls.__mro__[1:]:
        if parent.__module__.startswith("dpx"):
            assert is_abstract(parent), f"{parent} is final and must not be subclassed"
            for name, value in vars(parent).items():
                is_method = inspect.isfunction(value) or isinstance(value, property)
                abstract = getattr(value, "__isabstractmethod__", False)
                if is_method and not abstract and not name.startswith("__"):
                    assert name not in vars(cls), f"{name} overrides a concrete method of {parent.__name__}"
    if cls in PUBLIC:
        assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("), "undocumented"
        if not is_abstract(cls):
            assert "**Arguments:**" in cls.__doc__


def test_the_walk_finds_modules():
    names = {c.__name__ for c in CLASSES}
    assert {"PrivateGradient", "FlatClipping", "PoissonSampler", "AbstractNoise"} <= names


def room(path):
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_the_list_of_rooms(path):
    here = room(path)
    if here == "__init__":
        return
    depth = len(path.relative_to(SOURCE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level != depth:
            continue
        targets = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        for target in targets:
            assert ROOMS.index(target) < ROOMS.index(here), f"{here} imports {target}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_names_are_documented():
    for name in vars(dpx):
        value = getattr(dpx, name)
        if not name.startswith("_") and getattr(value, "__module__", value.__name__).startswith("dpx"):
            assert inspect.getdoc(value), name
