"""Draws heat maps over their images, with a color bar that says what the colors mean."""

import functools

import numpy as np

BAND_PIXELS = 2**20
"""Pixels that are colored at a time: an image of 100 million takes gigabytes in floating point."""


def gray(image: np.ndarray) -> np.ndarray:
    """Convert gray values in -1..1 to uint8; what lies outside is clipped, NaN is black."""
    finite = np.clip(np.nan_to_num(np.asarray(image, np.float64), nan=-1.0), -1.0, 1.0)
    return np.rint(finite * 127.5 + 127.5).astype(np.uint8)


def colors(values: np.ndarray) -> np.ndarray:
    """Return colors `[..., 3]` uint8 for values in 0..1, on a perceptually uniform map that also prints in gray."""
    return _color_table()[np.minimum(np.asarray(values * 256.0).astype(np.int64), 255)]


def overlay(image: np.ndarray, heat: np.ndarray, limit: float) -> np.ndarray:
    """Lay a heat map over its dimmed image, brightest where `heat` reaches `limit`.

    The image stays visible everywhere: some maps are well above 0 on normal anatomy too.

    Args:
        image: `[H, W]`, uint8, or floating point in -1..1.
        heat: `[H, W]`, 0 and more; NaN counts as 0.
        limit: above 0.

    Returns:
        `[H, W, 3]` uint8.
    """
    drawn = np.empty((*np.shape(heat), 3), np.uint8)
    step = max(1, BAND_PIXELS // max(1, drawn.shape[1]))
    for top in range(0, len(drawn), step):
        band = slice(top, top + step)
        pixels = image[band] if image.dtype == np.uint8 else gray(image[band])
        values = np.clip(np.nan_to_num(np.asarray(heat[band], np.float64), nan=0.0) / limit, 0.0, 1.0)
        opacity = 0.8 * values[..., None] ** 1.5
        drawn[band] = opacity * colors(values) + (1.0 - opacity) * 0.8 * pixels[..., None]
    return drawn


def upper_limit(heat: np.ndarray) -> float:
    """Return the 99.5 % quantile of the finite values; the maximum would let a few pixels darken all the rest."""
    values = np.ravel(heat).astype(np.float64)
    values = values[np.isfinite(values)]
    limit = float(np.quantile(values, 0.995)) if values.size else 0.0
    return limit if limit > 0.0 else 1.0


def with_color_bar(picture: np.ndarray, limit: float, text: str) -> np.ndarray:
    """Put a color bar from 0 to `limit` and a line of text below a picture.

    Args:
        picture: `[H, W, 3]` uint8; it stays as it is, at the top left.
        limit: the value at the bright end.
        text: what is shown, with its unit.

    Returns:
        `[H + bar, W or more, 3]` uint8 on black; wider than the picture where the text would not fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = picture.shape[:2]
    size = min(max(width / 40, 12.0), 64.0)
    font, line = ImageFont.load_default(size), round(1.4 * size)
    ends = ("0", f"{limit:.3g}")
    edges = [round(font.getlength(end)) + line // 2 for end in ends]
    wide = max(width, round(font.getlength(text)) + line, sum(edges) + 4 * line)
    canvas = np.zeros((height + 2 * line + line // 2, wide, 3), np.uint8)
    canvas[:height, :width] = picture
    bar = slice(edges[0] + line // 4, wide - edges[1] - line // 4)
    canvas[height + line // 4 : height + line, bar] = colors(np.linspace(0.0, 1.0, bar.stop - bar.start))
    strip = Image.fromarray(canvas[height:])
    draw = ImageDraw.Draw(strip)
    draw.text((line // 4, line * 5 // 8), ends[0], "white", font, anchor="lm")
    draw.text((wide - line // 4, line * 5 // 8), ends[1], "white", font, anchor="rm")
    draw.text((line // 4, line * 7 // 4), text, "white", font, anchor="lm")
    canvas[height:] = np.asarray(strip)
    return canvas


@functools.cache
def _color_table() -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
