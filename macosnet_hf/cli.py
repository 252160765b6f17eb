"""The command line: `macosnet match`, `macosnet segment` and the commands of the sub-packages.

What can be checked without the network is checked before torch is imported, so that a typing error answers at once.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import DEFAULT_CHECKPOINT, __version__
from .errors import ImageError, InputError, MaCoSNetError

if TYPE_CHECKING:
    from PIL import Image

REFINEMENTS = ("grabcut", "otsu", "crf", "none")
_PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".heic"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 bad input (one sentence on standard error), 130 interrupted."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except MaCoSNetError as error:
        print(f"macosnet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("macosnet: interrupted; nothing half-written is left.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="macosnet",
        description="Find where each point of one photograph lies in another of the same kind of object, "
        "and cut the object out.",
        epilog="Example: macosnet match cat1.jpg cat2.jpg --output-dir result",
    )
    parser.add_argument("--version", action="version", version=f"macosnet {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    match = commands.add_parser(
        "match",
        help="match two photographs and segment both",
        description="Writes matches.json, matches.png, source_mask.png, target_mask.png and source_warped.png.",
    )
    match.add_argument("source", metavar="SOURCE", help="a photograph")
    match.add_argument("target", metavar="TARGET", help="another photograph of the same kind of object")
    _add_model_arguments(match)
    points = match.add_mutually_exclusive_group()
    points.add_argument("--points", metavar='"x,y;x,y"', help="points of the source, in pixels, to find in the target")
    points.add_argument(
        "--points-file", metavar="CSV", help="the same from a file, one x,y per line (a header may stand first)"
    )
    match.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="drop matches with a score below T, 0 to 1 (default 0)",
    )
    match.set_defaults(run=run_match)

    segment = commands.add_parser(
        "segment",
        help="cut the common object out of two or more photographs",
        description="Writes <name>_mask.png and <name>_cutout.png for each photograph, overview.png and summary.json.",
    )
    segment.add_argument("photos", nargs="+", metavar="PHOTO", help="photographs, or one folder of them")
    _add_model_arguments(segment)
    segment.add_argument(
        "--partners",
        type=int,
        default=4,
        metavar="N",
        help="how many others each photograph is compared with (default 4)",
    )
    segment.set_defaults(run=run_segment)

    for name, module, text in (
        ("evaluate", ".evaluation.command", "print a benchmark's table"),
        ("prepare", ".datasets.command", "bring a benchmark's archive into one schema"),
    ):
        command = importlib.import_module(module, __package__)
        sub = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the results go; created if need be")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="ID_OR_DIR", help="checkpoint (default: the embedded one)"
    )
    parser.add_argument(
        "--refine", choices=REFINEMENTS, default="grabcut", help="how soft masks become hard ones (default grabcut)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is one"
    )


# ---------------------------------------------------------------------------------------------------------------------
# match
# ---------------------------------------------------------------------------------------------------------------------


def run_match(args: argparse.Namespace) -> int:
    from .image_io import load_image
    from .output_folder import output_folder

    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold must lie between 0 and 1; got {args.threshold:g}.")
    points = _read_points(args)
    photos = [load_image(args.source), load_image(args.target)]
    if points is not None:
        _check_inside(points, photos[0])

    with output_folder(args.output_dir) as folder:
        from .loading import load_model_and_processor
        from .pair import match_pair

        model, processor = load_model_and_processor(args.model, args.device)
        result = match_pair(*photos, model=model, processor=processor, refine=args.refine, threshold=args.threshold)
        document = {
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
            "model": "macosnet-lite" if args.model == DEFAULT_CHECKPOINT else str(args.model),
            "refine": args.refine,
            "threshold": args.threshold,
        }
        if points is not None:
            document["points"] = [
                {"source": list(point), "target": _rounded(found)}
                for point, found in zip(points, result.transfer(points), strict=True)
            ]
        (folder / "matches.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        result.draw_matches().save(folder / "matches.png", compress_level=4)
        _save_mask(result.source_mask, folder / "source_mask.png")
        _save_mask(result.target_mask, folder / "target_mask.png")
        result.warped_source().save(folder / "source_warped.png", compress_level=1)
    print(f"{len(result.keypoints)} matches ({result.quality}); see {Path(args.output_dir) / 'matches.png'}")
    return 0


def _read_points(args: argparse.Namespace) -> list[tuple[float, float]] | None:
    if args.points is not None:
        rows = [(f"point {number}", text) for number, text in enumerate(args.points.split(";"), 1) if text.strip()]
        source = "--points"
    elif args.points_file is not None:
        source = args.points_file
        try:
            with open(source, encoding="utf-8-sig", newline="") as file:
                lines = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
        except (OSError, UnicodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise InputError(f"The points file {source} cannot be read: {reason}.") from error
        if lines and [cell.strip().lower() for cell in lines[0][:2]] == ["x", "y"]:
            lines = lines[1:]
        rows = [(f"row {number}", ",".join(line)) for number, line in enumerate(lines, 1)]
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
        points.append((x, y))
    if not points:
        raise InputError(f"{source} holds no points.")
    return points


def _check_inside(points: Sequence[tuple[float, float]], photo: Image.Image) -> None:
    for x, y in points:
        if not (0 <= x <= photo.width - 1 and 0 <= y <= photo.height - 1):
            raise InputError(
                f"The point {x:g},{y:g} lies outside of the source, which is {photo.width}x{photo.height} pixels."
            )


def _rounded(point: Sequence[float]) -> list[float]:
    return [round(float(value), 2) for value in point]


def _save_mask(mask: object, path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).save(path, compress_level=4)


# ---------------------------------------------------------------------------------------------------------------------
# segment
# ---------------------------------------------------------------------------------------------------------------------


def run_segment(args: argparse.Namespace) -> int:
    from .output_folder import output_folder

    if args.partners < 1:
        raise InputError(f"--partners must be at least 1; got {args.partners}.")
    paths, from_folder = _photo_paths(args.photos)
    photos, kept, skipped = _read_photos(paths, skip_damaged=from_folder)
    for path, reason in skipped:
        print(f"macosnet: left out {path.name}: {reason}", file=sys.stderr)
    if len(photos) < 2:
        raise InputError(f"Co-segmentation needs two or more photographs; {len(photos)} can be used.")
    names = _distinct_names(kept)

    with output_folder(args.output_dir) as folder:
        from tqdm import tqdm

        from .collection import refined_masks, segment_collection
        from .drawing import cutout, overview
        from .loading import load_model_and_processor

        model, processor = load_model_and_processor(args.model, args.device)
        with tqdm(total=len(photos), desc="Segmenting", unit="photo", disable=not sys.stderr.isatty()) as bar:
            result = segment_collection(
                photos,
                model=model,
                processor=processor,
                partners=args.partners,
                progress=lambda done, total: bar.update(),
            )
        summary = []
        small_photos, small_masks = [], []
        masks = refined_masks(photos, result.probabilities, args.refine)
        for number, (name, photo, mask) in enumerate(
            tqdm(
                zip(names, photos, masks, strict=True),
                total=len(photos),
                desc="Cutting out",
                unit="photo",
                disable=not sys.stderr.isatty(),
            )
        ):
            _save_mask(mask, folder / f"{name}_mask.png")
            cutout(photo, mask).save(folder / f"{name}_cutout.png", compress_level=1)
            small, small_mask = _thumbnail(photo, mask)
            small_photos.append(small)
            small_masks.append(small_mask)
            summary.append(
                {
                    "photo": str(kept[number]),
                    "mask": f"{name}_mask.png",
                    "cutout": f"{name}_cutout.png",
                    "width": photo.width,
                    "height": photo.height,
                    "object_share": round(float(mask.mean()), 4),
                    "agreement": round(float(result.agreement[number]), 4),
                    "partners": [str(kept[index]) for index in result.partners[number]],
                }
            )
        overview(small_photos, small_masks, [path.name for path in kept]).save(
            folder / "overview.png", compress_level=4
        )
        document = {
            "photos": summary,
            "skipped": [{"photo": str(path), "reason": reason} for path, reason in skipped],
            "model": "macosnet-lite" if args.model == DEFAULT_CHECKPOINT else str(args.model),
            "refine": args.refine,
        }
        (folder / "summary.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{len(photos)} photographs; see {Path(args.output_dir) / 'overview.png'}")
    return 0


def _photo_paths(arguments: Sequence[str]) -> tuple[list[Path], bool]:
    """The photographs that were named, each once, and whether they come from a folder."""
    if len(arguments) == 1 and os.path.isdir(arguments[0]):
        folder = Path(arguments[0])
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PHOTO_SUFFIXES and path.is_file())
        if len(paths) < 2:
            raise InputError(f"The folder {folder} holds {len(paths)} photographs; co-segmentation needs two or more.")
        return paths, True
    paths = list(dict.fromkeys(Path(argument) for argument in arguments))
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; pass one folder alone, or photographs.")
    if len(paths) < 2:
        raise InputError("Co-segmentation needs two or more different photographs, or a folder of them.")
    return paths, False


def _read_photos(
    paths: Sequence[Path], *, skip_damaged: bool
) -> tuple[list[Image.Image], list[Path], list[tuple[Path, str]]]:
    from .image_io import load_image

    photos, kept, skipped = [], [], []
    for path in paths:
        try:
            photos.append(load_image(path))
            kept.append(path)
        except ImageError as error:
            if not skip_damaged:
                raise
            skipped.append((path, str(error)))
    return photos, kept, skipped


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names without suffix, numbered where two photographs would share one."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 2
        while name.lower() in taken:
            name, number = f"{path.stem}_{number}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _thumbnail(photo: Image.Image, mask: object) -> tuple[Image.Image, object]:
    import numpy as np
    from PIL import Image

    small = photo.copy()
    small.thumbnail((400, 400))
    reduced = Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).resize(small.size, Image.Resampling.BILINEAR)
    return small, np.asarray(reduced) >= 128


if __name__ == "__main__":
    sys.exit(main())
