"""Fills the page templates; every value is escaped by Jinja2, and the page may run and load nothing but its own parts.

The content security policy names the one style sheet and the one script by their SHA-256 hashes, so that a browser
runs no other script even if a value ever reached the page unescaped.
"""

import base64
import functools
import hashlib
from importlib import resources

import jinja2
from markupsafe import Markup, escape

NOTICE = "Research use only. Not a medical device: do not use it for diagnosis, triage or treatment."


def render(template: str, **values: object) -> bytes:
    """Fill a template of this package.

    Args:
        template: its file name in `templates/`.
        values: the names it uses; strings are escaped.

    Returns:
        The page in UTF-8. File names can hold bytes that are not UTF-8, which Python carries as lone surrogates; they
        appear as `\\udcff`.
    """
    page = _environment().get_template(template).render(notice=NOTICE, **values)
    return page.encode("utf-8", errors="backslashreplace")


def data_uri(png: bytes) -> str:
    """Return a PNG as a URI that an `img` element can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simsid.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "breakable": _breakable}
    for name, file in (("style", "style.css"), ("script", "table.js")):
        # Line ends must be the "\n" that the browser's parser makes of them, or the hash differs.
        content = "\n" + (resources.files("simsid.report") / "templates" / file).read_text("utf-8")
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        environment.globals |= {name: Markup(content), f"{name}_hash": Markup(f"sha256-{digest}")}
    return environment


def _number(value: float | None, layout: str = ".3f") -> str:
    return "–" if value is None or value != value else format(value, layout)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None or fraction != fraction else f"{100.0 * fraction:.3g} %"


def _breakable(name: str, after: str = "_") -> Markup:
    """Let a browser break a name after each separator, so that a column stays narrow."""
    return Markup(f"{after}<wbr>").join(escape(part) for part in name.split(after))
