"""Every rule has a fault, and no catalogue's fault hides another's."""

from pathlib import Path

import pytest
from auditing.faults import catalogue_forwards, catalogue_steps, catalogue_trainings, catalogues
from auditing.faults.catalogues import every_fault

from bn_lightning.auditing.rules import RULES


def test_every_rule_has_a_fault_and_all_of_them_count():
    faults = every_fault()
    assert list(dict.fromkeys(fault.slug for fault in faults)) == [rule.slug for rule in RULES]
    twice = {fault.catalogue: fault.audit for fault in faults if fault.slug == "extra-forward"}
    assert twice == {
        "forwards": catalogue_forwards.extra_forward,
        "steps": catalogue_steps.extra_forward,
        "trainings": catalogue_trainings.extra_forward,
    }
    assert {fault.catalogue for fault in faults} == {
        path.stem.removeprefix("catalogue_") for path in Path(__file__).parent.glob("catalogue_*.py")
    }


def test_a_rule_without_a_fault_is_an_error(monkeypatch):
    monkeypatch.delitem(catalogues.import_module("auditing.faults.catalogue_device").FAULTS, "device-mismatch")
    with pytest.raises(LookupError, match="device-mismatch"):
        every_fault()
