"""The figures of a report."""

from simsid.models.signals import SIGNALS
from simsid.report import figures


def test_as_many_signals_as_there_are_have_lines_that_differ():
    lines = [figures._line(index) for index in range(len(SIGNALS))]
    assert len({(line["color"], line.get("dashes")) for line in lines}) == len(SIGNALS) > 6
