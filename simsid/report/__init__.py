"""Reports: one self-contained HTML page of an evaluation or a scoring, pages of single images, and one picture."""

from simsid.report.examples import Example, HeatMap
from simsid.report.film import FilmRow, page_name, remove_films, write_film
from simsid.report.memory import MemoryViews
from simsid.report.page import write_picture, write_report

__all__ = [
    "Example",
    "FilmRow",
    "HeatMap",
    "MemoryViews",
    "page_name",
    "remove_films",
    "write_film",
    "write_picture",
    "write_report",
]
