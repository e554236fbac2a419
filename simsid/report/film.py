"""One page for one radiograph, and its row in the table of all of them."""

import hashlib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from simsid import checkpoint
from simsid.errors import InputError
from simsid.report.examples import Example, HeatMap, color_bar, encode, label_name, map_limit
from simsid.report.render import data_uri, render
from simsid.scoring.overlay import gray, overlay

PAGE_NAME = re.compile(r"films/[A-Za-z0-9-]{1,40}-[0-9a-f]{12}\.html")
SIDE_LIMIT = 1024  # pixels: such a page has a few pictures, so they may be larger than those of the report


@dataclass(frozen=True)
class FilmRow:
    """What the table of a report shows of one file.

    Args:
        path: the file.
        finding: its kind, or `""`.
        label: 0 normal, 1 abnormal, None unknown.
        score: the model's score, higher = more anomalous; None where the file could not be scored.
        percentile: 0..100, the percentage of held-out normal images that score lower; None without such images.
        flagged: whether the score lies above the threshold; None without one.
        signals: raw values by name.
        reason: why the file could not be scored, or `""`.
        page: its own page relative to the report, as `page_name` returns it, or None.

    Raises:
        InputError: `page` is not a name that `page_name` returns; it becomes a link, so no other address is accepted.
    """

    path: str
    finding: str = ""
    label: int | None = None
    score: float | None = None
    percentile: float | None = None
    flagged: bool | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    page: str | None = None

    def __post_init__(self) -> None:
        if self.page is not None and not PAGE_NAME.fullmatch(self.page):
            raise InputError(f"page must be a name that page_name returns, got {self.page!r}")


def page_name(path: str) -> str:
    """Return the name of a file's page relative to the report: the same for the same path, safe on every system.

    Args:
        path: the file as `FilmRow.path` has it.

    Returns:
        `films/<readable part>-<12 hex digits of the path's SHA-256>.html`.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", pathlib.PurePath(path).stem)[:40].strip("-") or "image"
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"films/{readable}-{digest}.html"


def write_film(
    report: str | os.PathLike[str],
    row: FilmRow,
    example: Example,
    *,
    maps: Sequence[HeatMap] = (),
    standardized: Mapping[str, float] | None = None,
    descriptions: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Write the page of one radiograph into the folder `films` beside its report.

    Args:
        report: the file of the report, which the page links back to; it need not exist yet.
        row: the radiograph's row in the report; `row.page` names the page to write.
        example: its pictures, and in `details` how the file was read.
        maps: the maps to show instead of `example.heat_map`, each `[H, W]` like the input, with its own scale.
        standardized: deviations from the mean of normal images by signal, in their standard deviations.
        descriptions: what each signal measures.

    Returns:
        The file written.

    Raises:
        InputError: `row` has no page, or a map differs in shape from the input.
    """
    if row.page is None:
        raise InputError(f"row must name a page, got None for {row.path}")
    report = pathlib.Path(report)
    if not maps and example.heat_map is not None:
        maps = [HeatMap(example.heat_name or "heat map", example.heat_map)]
    for heat in maps:
        if heat.values.shape != example.input.shape:
            raise InputError(f"map {heat.name!r} must have shape {example.input.shape}, got {heat.values.shape}")
    plain = {"input": example.input, "reconstruction": example.reconstruction}
    shown: list[dict[str, object]] = [
        {"name": name, "image": data_uri(encode(gray(picture), SIDE_LIMIT)), "limit": None, "unit": ""}
        for name, picture in plain.items()
        if picture is not None
    ]
    for heat in maps:
        limit = map_limit(heat)
        image = data_uri(encode(overlay(example.input, heat.values, limit), SIDE_LIMIT))
        shown.append({"name": heat.name, "image": image, "limit": limit, "unit": heat.unit})
    page = render(
        "film.html",
        title=pathlib.PurePath(row.path).name,
        row=row,
        label=label_name(row.label),
        pictures=shown,
        scale=data_uri(color_bar()),
        standardized=standardized or {},
        descriptions=descriptions or {},
        details=example.details,
        report=f"../{report.name}",
    )
    path = report.parent / row.page
    path.parent.mkdir(exist_ok=True)
    checkpoint.write_file(path, page)
    return path


def remove_films(report: str | os.PathLike[str]) -> None:
    """Delete the pages that an earlier report left in the folder `films` beside it; other files there stay.

    Args:
        report: the file of the report. A page that it does not link to would show scores that no longer hold.
    """
    for path in (pathlib.Path(report).parent / "films").glob("*.html"):
        if PAGE_NAME.fullmatch(f"films/{path.name}"):
            path.unlink()
