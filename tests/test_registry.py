"""Every part of dpx obeys the laws of `dpx.testing`, and none is left out of the registry."""

import inspect

import pytest

import dpx
from dpx import accounting, clipping, gradients, metrics, noise, sampling, strategies
from registry import ABSTRACT, REGISTRY, laws_of

CASES = [
    pytest.param(law, id=f"{type(record).__name__.removesuffix('Record').lower()}-{record.name}-{law.name}")
    if not law.is_slow
    else pytest.param(
        law,
        id=f"{type(record).__name__.removesuffix('Record').lower()}-{record.name}-{law.name}",
        marks=pytest.mark.slow,
    )
    for record in REGISTRY
    for law in laws_of(record)
]


@pytest.mark.parametrize("law", CASES)
def test_every_part_obeys_its_laws(law):
    law.check()


def exported(abstract):
    """The concrete classes of an interface among all that users can import."""
    rooms = (dpx, accounting, clipping, gradients, metrics, noise, sampling, strategies)
    values = [value for room in rooms for name, value in vars(room).items() if not name.startswith("_")]
    return {v for v in values if inspect.isclass(v) and issubclass(v, abstract) and not inspect.isabstract(v)}


@pytest.mark.parametrize("abstract", ABSTRACT, ids=lambda cls: cls.__name__)
def test_no_part_is_missing(abstract):
    found = {cls for cls in exported(abstract) if not cls.__name__.startswith("Abstract")}
    # a variant has another record of its class, and some are costly to make
    records = [record for record in ABSTRACT[abstract] if not record.is_variant]
    assert found and found == {type(record.value) for record in records}


def test_names_are_for_reading_only():
    names = [(type(record), record.name) for record in REGISTRY]
    assert len(set(names)) == len(names)
