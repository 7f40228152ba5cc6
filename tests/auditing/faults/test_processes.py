"""Processes that train with statistics of their own are told from those that merge them."""

import pytest
from auditing.faults.catalogue_processes import two_processes


def diverged(report):
    return {finding.layer: finding.evidence for finding in report.findings if finding.rule == "rank-divergence"}


def test_diverged_processes_are_found_in_both():
    one, two = two_processes()
    counts = [{row.name: row.count for row in report.layers} for report in (one, two)]
    assert counts[0] == counts[1], "of the data of both"
    assert one.losses == two.losses
    assert one.batches == 20
    found = diverged(one)
    assert found == diverged(two)
    assert list(found) == ["net.0.1"]
    assert found["net.0.1"]["spread"] > 0.3
    assert found["net.0.1"]["spread_at_validation"] > 0.3


@pytest.mark.slow
def test_merged_processes_are_left_in_peace():
    one, two = two_processes(merge="merge")
    assert not diverged(one)
    assert not diverged(two)
    assert one.exit_code("warning") == 0, str(one)
