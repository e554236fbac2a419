"""The tables of presets in docs/differences.md against the configurations."""

import ast
import dataclasses
import re

import documents
import pytest

from simsid.config import PRESETS, Config, TrainingConfig
from simsid.models import presets

SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", documents.PAGES["docs/differences.md"], re.S | re.M))


def rows(name):
    """Return (fields, values, reason) of each row of a preset's table; one value may stand for several fields."""
    found = []
    for line in SECTIONS[name].splitlines():
        if line.startswith("| `"):
            fields, paper, released, values, reason = (cell.strip() for cell in line.strip("|").split(" | "))
            assert paper and released and reason, line
            names = re.findall(r"`(\w+)`", fields)
            values = [ast.literal_eval(text) for text in re.findall(r"`([^`]+)`", values)]
            found.append((names, values * len(names) if len(values) == 1 else values))
    return found


@pytest.mark.parametrize("name", presets.PRESETS)
def test_table_of_a_preset_has_the_values_of_its_configuration(name):
    config, listed = presets.preset(name).config(), set()
    for names, values in rows(name):
        assert len(names) == len(values), names
        for field, value in zip(names, values):
            owner = config if hasattr(config, field) else TrainingConfig()
            assert getattr(owner, field) == value, field
            listed.add(field)
    assert listed
    if name in PRESETS:
        changed = {field for field, value in Config().to_dict().items() if getattr(config, field) != value}
        assert changed <= listed, "a choice that differs from SimSID has no row"
    else:
        assert listed <= {entry.name for entry in dataclasses.fields(config)}


def test_every_preset_has_a_table_and_every_table_a_preset():
    assert set(SECTIONS) == set(presets.PRESETS)
