"""Text for the terminal."""

import pytest

from simsid.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Röntgen 胸部.png", "Röntgen 胸部.png"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\udcfcbung.png", r"\udcfcbung.png"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
    ],
    ids=["text", "line breaks", "escape sequence", "not UTF-8", "writing direction"],
)
def test_printable_escapes_what_would_move_the_cursor_or_fail_to_print(text, shown):
    assert printable(text) == shown
    printable(text).encode("utf-8")
