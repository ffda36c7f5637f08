"""The reference has an entry for every public name, and every entry is a public name."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

import dpx

PAGES = sorted((Path(__file__).parents[1] / "docs" / "reference").glob("*.md"))
ENTRIES = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
ROOMS = [
    "clipping",
    "gradients",
    "strategies",
    "noise",
    "sampling",
    "data",
    "accounting",
    "metrics",
    "optimizers",
    "auditing",
]


def resolve(entry):
    room, name = entry.rsplit(".", 1)
    return getattr(importlib.import_module(room), name)


@functools.cache
def documented():
    return {id(resolve(entry)): entry for entry in ENTRIES}


def test_entries_are_public_documented_and_listed_once():
    assert len(set(map(id, map(resolve, ENTRIES)))) == len(ENTRIES)
    for entry in ENTRIES:
        assert inspect.getdoc(resolve(entry)), entry


def test_every_name_of_the_package_has_an_entry():
    for name, value in vars(dpx).items():
        if not name.startswith("_") and not inspect.ismodule(value):
            assert id(value) in documented(), f"dpx.{name} is not in docs/reference"


@pytest.mark.parametrize("room", ROOMS)
def test_every_class_of_a_room_has_an_entry(room):
    for name, value in vars(getattr(dpx, room)).items():
        if inspect.isclass(value) and not name.startswith("_") and value.__module__.startswith("dpx"):
            assert id(value) in documented(), f"dpx.{room}.{name} is not in docs/reference"


def test_every_page_is_in_the_navigation():
    navigation = (Path(__file__).parents[1] / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"reference/{page.name}" in navigation
