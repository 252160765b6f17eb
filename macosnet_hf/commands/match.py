"""`macosnet match`: two images matched, the object cut out of both."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..io.memory import collector_paused, give_memory_back
from .arguments import add_model_arguments, model_name, save_mask, write_json

if TYPE_CHECKING:
    from PIL import Image

MATCH_RESULTS = ("matches.json", "matches.png", "source_mask.png", "target_mask.png", "source_warped.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet match`."""
    parser.description = "Writes matches.json, matches.png, source_mask.png, target_mask.png and source_warped.png."
    parser.add_argument("source", metavar="SOURCE", help="an image")
    parser.add_argument("target", metavar="TARGET", help="another image of the same kind of object")
    add_model_arguments(parser)
    points = parser.add_mutually_exclusive_group()
    points.add_argument("--points", metavar='"x,y;x,y"', help="points of the source, in pixels, to find in the target")
    points.add_argument(
        "--points-file", metavar="CSV", help="the same from a file, one x,y per line (a header may stand first)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="drop matches with a score below T, 0 to 1 (default 0)",
    )


def run(args: argparse.Namespace) -> int:
    """`macosnet match`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..io.checkpoints import check_checkpoint
    from ..io.image_files import load_image
    from ..io.output_folder import output_folder, refuse_to_overwrite

    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold must lie between 0 and 1; got {args.threshold:g}.")
    points = _read_points(args)
    check_checkpoint(args.model)
    give_memory_back()
    images = (load_image(args.source), load_image(args.target))
    if points is not None:
        _check_inside(points, images[0])
    refuse_to_overwrite(args.output_dir, MATCH_RESULTS, (args.source, args.target))

    with output_folder(args.output_dir) as folder:
        with collector_paused():
            from ..inference.pair import match_images
            from ..io.checkpoints import load_model_and_processor

            model, processor = load_model_and_processor(args.model, args.device)
        result = match_images(images, model=model, processor=processor, refine=args.refine, threshold=args.threshold)
        document: dict[str, Any] = {
            "source": {"file": str(args.source), "width": result.source.width, "height": result.source.height},
            "target": {"file": str(args.target), "width": result.target.width, "height": result.target.height},
            "quality": result.quality,
            "matches": [
                {
                    "source": _rounded(match["source"]),
                    "target": _rounded(match["target"]),
                    "score": round(match["score"], 4),
                }
                for match in result.matches
            ],
            # T_AB in normalised coordinates: takes points of the target to the source; `reverse` the other way.
            "affine": result.affine[0].tolist(),
            "tps": result.tps[0].tolist(),
            "reverse": {"affine": result.affine[1].tolist(), "tps": result.tps[1].tolist()},
            "model": model_name(args.model),
            "refine": args.refine,
            "threshold": args.threshold,
        }
        if points is not None:
            places = [point for _, point in points]
            document["points"] = [
                {"source": list(point), "target": _rounded(found)}
                for point, found in zip(places, result.transfer(places), strict=True)
            ]
        write_json(document, folder / "matches.json")
        result.draw_matches().save(folder / "matches.png", compress_level=4)
        save_mask(result.source_mask, folder / "source_mask.png")
        save_mask(result.target_mask, folder / "target_mask.png")
        result.warped_source().save(folder / "source_warped.png", compress_level=1)
    count = len(result.keypoints)
    words = f"{count} {'match' if count == 1 else 'matches'}, quality {result.quality}"
    print(f"{words}; see {Path(args.output_dir) / 'matches.png'}")
    for pair in document.get("points", []):
        print("source {:g},{:g} lies at target {:g},{:g}".format(*pair["source"], *pair["target"]))
    return 0


# A point and what to call it in an error: `("point 2", (x, y))`.
_NamedPoint = tuple[str, tuple[float, float]]


def _read_points(args: argparse.Namespace) -> list[_NamedPoint] | None:
    """The points of `--points` or `--points-file`; `None` if neither is given.

    Raises:
        InputError: naming the point or the line of the file that is wrong.
    """
    if args.points is not None:
        source = "--points"
        rows = [(f"point {number}", text) for number, text in enumerate(args.points.split(";"), 1) if text.strip()]
    elif args.points_file is not None:
        source = args.points_file
        rows = _points_file_rows(source)
    else:
        return None
    points = []
    for where, text in rows:
        try:
            x, y = (float(cell) for cell in text.split(","))
        except ValueError:
            raise InputError(f"{source}, {where}: expected two numbers x,y; got {text.strip()!r}.") from None
        if not (math.isfinite(x) and math.isfinite(y)):
            raise InputError(f"{source}, {where}: the numbers must be finite; got {text.strip()!r}.")
        points.append((f"{source}, {where}", (x, y)))
    if not points:
        raise InputError(f"{source} holds no points.")
    return points


def _points_file_rows(path: str) -> list[tuple[str, str]]:
    """The rows of a CSV file that are not empty, each with its line in the file; a header `x,y` is left out."""
    rows: list[tuple[str, str]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                header = not rows and [cell.strip().lower() for cell in cells] == ["x", "y"]
                if any(cell.strip() for cell in cells) and not header:
                    rows.append((f"line {reader.line_num}", ",".join(cells)))
    except OSError as error:
        raise InputError(f"The points file {path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, csv.Error) as error:  # a wrong encoding is a ValueError
        raise InputError(f"The points file {path} cannot be read (it is no text in UTF-8).") from error
    return rows


def _check_inside(points: Sequence[_NamedPoint], image: Image.Image) -> None:
    for where, (x, y) in points:
        if not (0 <= x <= image.width - 1 and 0 <= y <= image.height - 1):
            raise InputError(
                f"{where}: {x:g},{y:g} lies outside of the source, which is {image.width}x{image.height} pixels."
            )


def _rounded(point: Sequence[float]) -> list[float]:
    return [round(float(value), 2) for value in point]
