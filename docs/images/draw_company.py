"""Draws company.jpg, "same photo, different company": `python docs/images/draw_company.py`.

Each of five images shows two things. It is segmented twice, as one collection with the images of either company. All
are made of those in examples/, side by side; `--photos` also writes the two that the demo offers to examples/company/.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from macosnet_hf.collection import hard_mask, segment_collection
from macosnet_hf.drawing import cutout
from macosnet_hf.io.checkpoints import load_model_and_processor

ROOT = Path(__file__).resolve().parents[2]
COMPANY = ROOT / "examples" / "company"
SINGLE, DOUBLE, GAP, TOP = (120, 120), (240, 180), 8, 34
# A photo, and two companies: names of images in examples/, joined where they stand side by side, mirrored with "-".
ROWS = (
    ("dog+cup", ("cat", "tabby"), ("parrot+-cup",)),
    ("cat+sunflower", ("tabby", "dog"), ("parrot+-sunflower",)),
    ("-cup+tabby", ("cat", "dog"), ("cup+car",)),
    ("car+tabby", ("cat", "dog"), ("sunflower+-car",)),
    ("sunflower+dog", ("cat", "tabby"), ("-sunflower+cup",)),
)
OFFERED = {"dog-and-cup": "dog+cup", "parrot-and-cup": "parrot+-cup"}


def photo(name: str) -> Image.Image:
    """An image of examples/ cut to a square, or two, each cut to two thirds of its width."""
    if "+" in name:
        halves = [photo(half).crop((80, 0, 400, 480)) for half in name.split("+")]
        both = Image.new("RGB", (640, 480))
        for number, half in enumerate(halves):
            both.paste(half, (320 * number, 0))
        return both
    file = f"{name.removeprefix('-')}.jpg"
    path = COMPANY / file if (COMPANY / file).exists() else ROOT / "examples" / file
    with Image.open(path) as opened:
        square = ImageOps.fit(opened.convert("RGB"), (480, 480))
    return ImageOps.mirror(square) if name.startswith("-") else square


def draw(checkpoint: str = "lite") -> Image.Image:
    """Five rows: the photo, then twice the company and what the photo has in common with it."""
    model, processor = load_model_and_processor(checkpoint)
    left = DOUBLE[0] + 3 * GAP
    block = 2 * (SINGLE[0] + GAP) + DOUBLE[0] + 3 * GAP
    sheet = Image.new("RGB", (left + 2 * block, TOP + len(ROWS) * (DOUBLE[1] + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    pen.text((GAP, TOP / 2), "the photo", font=font, fill="black", anchor="lm")
    for number, (name, *companies) in enumerate(ROWS):
        image, y = photo(name), TOP + number * (DOUBLE[1] + GAP)
        sheet.paste(image.resize(DOUBLE, Image.Resampling.LANCZOS), (GAP, y))
        for side, company in enumerate(companies):
            x = left + side * block
            if number == 0:
                pen.text((x, TOP / 2), "in the company of", font=font, fill="black", anchor="lm")
                found_at = x + 2 * (SINGLE[0] + GAP)
                pen.text((found_at, TOP / 2), "this is what they share", font=font, fill="black", anchor="lm")
            others = [photo(other) for other in company]
            result = segment_collection([image, *others], model=model, processor=processor, refine="grabcut")
            mask = hard_mask(result.probabilities[0], (image.height, image.width))
            for place, other in enumerate(others):
                shown = ImageOps.contain(other, SINGLE if len(others) > 1 else (2 * SINGLE[0] + GAP, DOUBLE[1]))
                sheet.paste(shown, (x + place * (SINGLE[0] + GAP), y + (DOUBLE[1] - shown.height) // 2))
            found = cutout(image, mask).resize(DOUBLE, Image.Resampling.LANCZOS)
            ground = Image.fromarray(_chequered(DOUBLE)).convert("RGBA")
            ground.alpha_composite(found)
            sheet.paste(ground.convert("RGB"), (x + 2 * (SINGLE[0] + GAP), y))
    return sheet


def _chequered(size: tuple[int, int], cell: int = 10) -> np.ndarray:
    """`(height, width)` uint8: what editors show behind a cutout."""
    x, y = np.arange(size[0]) // cell, np.arange(size[1]) // cell
    return np.where((x[None] + y[:, None]) % 2, 255, 232).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=Path(__file__).with_name("company.jpg"))
    parser.add_argument("--photos", action="store_true")
    args = parser.parse_args()
    if args.photos:
        for file, name in OFFERED.items():
            photo(name).resize((512, 384), Image.Resampling.LANCZOS).save(COMPANY / f"{file}.jpg", quality=85)
    draw().save(args.output, quality=85, optimize=True)


if __name__ == "__main__":
    main()
