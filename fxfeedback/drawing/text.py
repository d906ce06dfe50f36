"""How wide a text is, in the font that matplotlib ships, so that every machine draws the same."""

import functools
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from PIL import ImageFont

FAMILY = "DejaVu Sans, Verdana, sans-serif"
_MEASURED_AT = 100  # pixels


@functools.cache
def font_file(bold: bool = False) -> Path:
    """The font's file."""
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")


@functools.cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file(bold)), _MEASURED_AT)


@functools.lru_cache(maxsize=10_000)
def width_of(text: str, size: float, bold: bool = False) -> float:
    """The width of a text in pixels; size is that of the font."""
    return _font(bold).getlength(text) * size / _MEASURED_AT


def fitted(text: str, width: float, size: float, bold: bool = False) -> str:
    """The text, or as much of its beginning as fits."""
    shorter = (text[:n] + "…" for n in range(len(text) - 1, -1, -1))
    return next((one for one in (text, *shorter) if width_of(one, size, bold) <= width), "")


def fitted_name(name: str, width: float, size: float, bold: bool = True) -> str:
    """A qualified name, or as much of its end as fits: whole parts of it if possible."""
    parts = ("…" + name[i + 1 :] for i, letter in enumerate(name) if letter == ".")
    letters = ("…" + name[i:] for i in range(1, len(name) + 1))
    return next((one for one in (name, *parts, *letters) if width_of(one, size, bold) <= width), "")


def wrapped(sentences: Iterable[str], width: float, size: float) -> list[str]:
    """The lines of these sentences, at most `width` pixels wide; each sentence begins a new line."""
    lines: list[str] = []
    for sentence in sentences:
        lines.append("")
        for word in sentence.split():
            longer = f"{lines[-1]} {word}".strip()
            if width_of(longer, size) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def short_number(number: int) -> str:
    """Three digits and a unit: 61.1 M"""
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def sizes(shape: tuple[int | None, ...] | None) -> str:
    """A shape in words: 256 × 13 × 13; a size that depends on the batch is n."""
    return " × ".join("n" if size is None else str(size) for size in shape or ())
