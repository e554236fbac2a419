"""Reports: one self-contained HTML page of an evaluation or a scoring, and one picture of it."""

from simsid.report.page import Example, write_picture, write_report

__all__ = ["Example", "write_picture", "write_report"]
