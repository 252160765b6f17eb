"""Draws coordinates.png, the image of docs/coordinates.md: `python docs/images/draw_coordinates.py`."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS, CELL = 5, 3, 96
LEFT, TOP = 150, 150
INK, FAINT, PIXELS, NORMALIZED, UNIT = (40, 44, 52), (214, 218, 224), (190, 60, 20), (20, 100, 190), (20, 130, 80)


def draw() -> Image.Image:
    """An image of 5x3 pixels with three scales: pixels, normalised coordinates, and keypoints in [0, 1]."""
    image = Image.new("RGB", (LEFT + COLUMNS * CELL + 60, TOP + ROWS * CELL + 118), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    for row in range(ROWS):
        for column in range(COLUMNS):
            x, y = LEFT + column * CELL, TOP + row * CELL
            shade = (246, 247, 249) if (row + column) % 2 else (233, 236, 240)
            pen.rectangle((x, y, x + CELL, y + CELL), fill=shade, outline=FAINT)
            centre = (x + CELL // 2, y + CELL // 2)
            pen.ellipse((centre[0] - 4, centre[1] - 4, centre[0] + 4, centre[1] + 4), fill=INK)
    scales = [
        ("pixels", PIXELS, lambda index, count: str(index)),
        ("normalised", NORMALIZED, lambda index, count: f"{_normalised(index, count):+.3f}".replace("+0.000", "0")),
        ("keypoints", UNIT, lambda index, count: f"{(index + 0.5) / count:.3f}"),
    ]
    for line, (name, color, label) in enumerate(scales):
        pen.text((12, 40 + 32 * line), name, font=font, fill=color, anchor="lm")
        for column in range(COLUMNS):
            place = (LEFT + column * CELL + CELL // 2, 40 + 32 * line)
            pen.text(place, label(column, COLUMNS), font=font, fill=color, anchor="mm")
        for row in range(ROWS):
            place = (LEFT - 14, TOP + row * CELL + CELL // 2 + 26 * (line - 1))
            pen.text(place, label(row, ROWS), font=font, fill=color, anchor="rm")
    _arrow(pen, (LEFT + CELL // 2, 130), (LEFT + (COLUMNS - 1) * CELL + CELL // 2, 130))
    pen.text((LEFT + COLUMNS * CELL - 8, 130), "x", font=font, fill=INK, anchor="lm")
    bottom = TOP + ROWS * CELL
    _arrow(pen, (70, TOP + CELL // 2), (70, bottom - CELL // 2))
    pen.text((70, bottom - CELL // 2 + 18), "y", font=font, fill=INK, anchor="mm")
    for x, unit, normalised in ((LEFT, "0", -240 / 239), (LEFT + COLUMNS * CELL, "1", 240 / 239)):
        pen.line((x, bottom, x, bottom + 14), fill=INK, width=2)
        pen.text((x, bottom + 28), unit, font=font, fill=UNIT, anchor="mm")
        pen.text((x, bottom + 52), f"{normalised:+.3f}", font=font, fill=NORMALIZED, anchor="mm")
    pen.text((LEFT + COLUMNS * CELL // 2, bottom + 28), "outer edges", font=font, fill=INK, anchor="mm")
    caption = "5 wide, 3 high, network of 240: dots are the centres of the pixels"
    pen.text((LEFT + COLUMNS * CELL // 2, bottom + 90), caption, font=font, fill=INK, anchor="mm")
    return image


def _normalised(index: int, count: int, side: int = 240) -> float:
    return ((2 * index + 1) / count - 1) * side / (side - 1)


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    pen.line((start, end), fill=INK, width=2)
    if start[1] == end[1]:
        head = [end, (end[0] - 10, end[1] - 5), (end[0] - 10, end[1] + 5)]
    else:
        head = [end, (end[0] - 5, end[1] - 10), (end[0] + 5, end[1] - 10)]
    pen.polygon(head, fill=INK)


if __name__ == "__main__":
    draw().save(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("coordinates.png"), optimize=True)
