"""The command line: `macosnet match`, `macosnet segment` and the commands of the sub-packages.

What can be checked without the network is checked before torch is imported, so that a typing error answers at once.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import DEFAULT_CHECKPOINT, __version__
from .allocator import give_memory_back
from .collector import collector_paused, no_collection_at_exit
from .errors import ImageError, InputError, MaCoSNetError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

REFINEMENTS = ("grabcut", "otsu", "crf", "none")
MATCH_RESULTS = ("matches.json", "matches.png", "source_mask.png", "target_mask.png", "source_warped.png")
# `segment` keeps copies of this size of all photographs in memory: the network sees 240 pixels of a picture, and cuts
# small objects out to 0.4 of it.
_COPY_SIDE = 640
_OVERVIEW_SIDE = 400
_READERS = min(8, os.cpu_count() or 1)  # photographs that are decoded at the same time
_CUTTERS = 2  # photographs that are refined at the same time, in full size

T = TypeVar("T")
_PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".heic"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 bad input (one sentence on standard error), 130 interrupted."""
    # Threads that wait for each other asleep instead of spinning: on a machine whose cores are busy otherwise, one
    # forward pass took 0.2 s so and 4.7 s without. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    no_collection_at_exit()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end a finished run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(arguments)
        code: int = args.run(args)
        return code
    except MaCoSNetError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("There is not enough memory for this; try smaller photographs.")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own, which cannot be named before torch is imported
            raise
        return _fail("The CUDA device has not enough free memory; use --device cpu.")
    except KeyboardInterrupt:
        print("macosnet: interrupted; nothing half-written is left.", file=sys.stderr)
        return 130


def _fail(sentence: str) -> int:
    print(f"macosnet: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


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
        default=2,
        metavar="N",
        help="how many others each photograph is compared with (default 2)",
    )
    segment.set_defaults(run=run_segment)

    for name, module, text in (
        ("adapt", ".adapt", "train a model further on photographs of your own, without labels"),
        ("evaluate", ".evaluation.command", "print a benchmark's table"),
        ("prepare", ".datasets.command", "bring a benchmark's archive into one schema"),
        ("convert", ".convert", "read a published checkpoint of this line of work"),
        ("export", ".export", "write the network as an ONNX graph"),
        ("push", ".hub", "upload a model, a data set or the Space"),
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
    """`macosnet match`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from .image_io import load_image
    from .loading import check_checkpoint
    from .output_folder import output_folder, refuse_to_overwrite

    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold must lie between 0 and 1; got {args.threshold:g}.")
    points = _read_points(args)
    check_checkpoint(args.model)
    give_memory_back()
    photos = (load_image(args.source), load_image(args.target))
    if points is not None:
        _check_inside(points, photos[0])
    refuse_to_overwrite(args.output_dir, MATCH_RESULTS, (args.source, args.target))

    with output_folder(args.output_dir) as folder:
        with collector_paused():
            from .loading import load_model_and_processor
            from .pair import match_photos

            model, processor = load_model_and_processor(args.model, args.device)
        result = match_photos(photos, model=model, processor=processor, refine=args.refine, threshold=args.threshold)
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
            "model": _model_name(args.model),
            "refine": args.refine,
            "threshold": args.threshold,
        }
        if points is not None:
            places = [point for _, point in points]
            document["points"] = [
                {"source": list(point), "target": _rounded(found)}
                for point, found in zip(places, result.transfer(places), strict=True)
            ]
        _write_json(document, folder / "matches.json")
        result.draw_matches().save(folder / "matches.png", compress_level=4)
        _save_mask(result.source_mask, folder / "source_mask.png")
        _save_mask(result.target_mask, folder / "target_mask.png")
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


def _check_inside(points: Sequence[_NamedPoint], photo: Image.Image) -> None:
    for where, (x, y) in points:
        if not (0 <= x <= photo.width - 1 and 0 <= y <= photo.height - 1):
            raise InputError(
                f"{where}: {x:g},{y:g} lies outside of the source, which is {photo.width}x{photo.height} pixels."
            )


def _rounded(point: Sequence[float]) -> list[float]:
    return [round(float(value), 2) for value in point]


def _model_name(model: str) -> str:
    return "macosnet-lite" if model == DEFAULT_CHECKPOINT else str(model)


def _write_json(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _save_mask(mask: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(mask.astype("uint8") * 255).save(path, compress_level=4)


# ---------------------------------------------------------------------------------------------------------------------
# segment
# ---------------------------------------------------------------------------------------------------------------------


def run_segment(args: argparse.Namespace) -> int:
    """`macosnet segment`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from tqdm import tqdm

    from .image_io import load_image
    from .loading import check_checkpoint
    from .output_folder import output_folder, refuse_to_overwrite

    if args.partners < 1:
        raise InputError(f"--partners must be at least 1; got {args.partners}.")
    check_checkpoint(args.model)
    paths, from_folder = _photo_paths(args.photos)
    if from_folder and os.path.realpath(args.output_dir) == os.path.realpath(args.photos[0]):
        raise InputError("The output folder is the folder of the photographs; a second run would take masks for them.")
    give_memory_back()
    copies, kept, skipped = _read_copies(paths, skip_damaged=from_folder)
    if len(kept) < 2:
        raise InputError(
            f"Co-segmentation needs two or more photographs; of the {len(paths)} in {args.photos[0]} {len(kept)} can "
            f"be read ({skipped[0][1].rstrip('.')})."
        )
    names = _distinct_names(kept)
    results = [f"{name}_{kind}.png" for name in names for kind in ("mask", "cutout")]
    refuse_to_overwrite(args.output_dir, [*results, "overview.png", "summary.json"], kept)
    for _, reason in skipped:
        print(f"macosnet: left out: {reason}", file=sys.stderr)

    quiet = not sys.stderr.isatty()
    with output_folder(args.output_dir) as folder:
        with collector_paused():
            from .collection import odd_ones_out, refined_mask, segment_collection
            from .drawing import cutout, overview
            from .loading import load_model_and_processor

            model, processor = load_model_and_processor(args.model, args.device)
        with tqdm(total=len(kept), desc="Segmenting", unit="photo", disable=quiet) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total  # each photograph up to three times where masks are refined
                bar.update(done - bar.n)

            result = segment_collection(
                copies,
                model=model,
                processor=processor,
                partners=args.partners,
                refine=args.refine,
                progress=tell,
            )
        odd = odd_ones_out(result.agreement)

        def cut_out(number: int) -> tuple[dict[str, Any], np.ndarray]:
            photo = load_image(kept[number])  # again, so that few photographs are in memory in full size
            mask = refined_mask(photo, result.probabilities[number], "none")
            _save_mask(mask, folder / f"{names[number]}_mask.png")
            cutout(photo, mask).save(folder / f"{names[number]}_cutout.png", compress_level=1)
            copies[number].thumbnail((_OVERVIEW_SIDE, _OVERVIEW_SIDE))
            entry = {
                "photo": str(kept[number]),
                "mask": f"{names[number]}_mask.png",
                "cutout": f"{names[number]}_cutout.png",
                "width": photo.width,
                "height": photo.height,
                "object_share": round(float(mask.mean()), 4),
                "agreement": round(float(result.agreement[number]), 4),
                "partners": [str(kept[index]) for index in result.partners[number]],
            }
            return entry, _resized_mask(mask, copies[number].size)

        with tqdm(total=len(kept), desc="Cutting out", unit="photo", disable=quiet) as bar:
            done = _in_parallel(cut_out, len(kept), lambda: bar.update() and None)
        overview(
            [copies[number] for number in done],
            [mask for _, mask in done.values()],
            [kept[number].name for number in done],
        ).save(folder / "overview.png", compress_level=4)
        document = {
            "photos": [entry for entry, _ in done.values()],
            "odd_ones_out": [str(kept[number]) for number in odd],
            "skipped": [{"photo": str(path), "reason": reason} for path, reason in skipped],
            "not_done": [str(kept[number]) for number in range(len(kept)) if number not in done],
            "model": _model_name(args.model),
            "refine": args.refine,
        }
        _write_json(document, folder / "summary.json")
    for number in odd:
        print(f"{kept[number]} does not seem to show what the others show")
    print(f"{len(done)} photographs; see {Path(args.output_dir) / 'overview.png'}")
    if len(done) < len(kept):
        print(f"macosnet: interrupted; {len(done)} of {len(kept)} photographs were cut out and kept.", file=sys.stderr)
        return 130
    return 0


def _in_parallel(work: Callable[[int], T], count: int, progress: Callable[[], None]) -> dict[int, T]:
    """`work(number)` for 0 to count - 1, a few at a time; after Ctrl+C what is done until then, if anything is.

    Raises:
        KeyboardInterrupt: if nothing was done before Ctrl+C.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_CUTTERS) as pool:
        futures = [pool.submit(work, number) for number in range(count)]
        interrupt = None
        try:
            for future in futures:
                future.result()
                progress()
        except KeyboardInterrupt as error:
            interrupt = error
        finally:
            for future in futures:  # those that run already are waited for
                future.cancel()
    done = {number: future.result() for number, future in enumerate(futures) if not future.cancelled()}
    if interrupt is not None and not done:
        raise interrupt
    return done


def _photo_paths(arguments: Sequence[str]) -> tuple[list[Path], bool]:
    """The photographs that were named, each once, and whether they come from a folder."""
    if len(arguments) == 1 and os.path.isdir(arguments[0]):
        folder = Path(arguments[0])
        try:
            paths = sorted(path for path in folder.iterdir() if _looks_like_photo(path))
        except OSError as error:
            raise InputError(f"The folder {folder} cannot be read ({error.strerror or error}).") from error
        if len(paths) < 2:
            raise InputError(
                f"Co-segmentation needs two or more photographs; the folder {folder} holds {len(paths) or 'none'}."
            )
        return paths, True
    for argument in arguments:
        if not os.path.exists(argument):
            raise ImageError(f"'{argument}' does not exist.")
        if os.path.isdir(argument):
            raise InputError(f"{argument} is a folder; pass one folder alone, or photographs.")
    named: dict[str, Path] = {}
    for argument in arguments:
        named.setdefault(os.path.realpath(argument), Path(argument))
    paths = list(named.values())
    if len(paths) < 2:
        raise InputError("Co-segmentation needs two or more different photographs, or a folder of them.")
    return paths, False


def _looks_like_photo(path: Path) -> bool:
    # Hidden files are left out: some systems keep a "._name.jpg" beside every photograph, which is none.
    return path.suffix.lower() in _PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_copies(
    paths: Sequence[Path], *, skip_damaged: bool
) -> tuple[list[Image.Image], list[Path], list[tuple[Path, str]]]:
    """Small copies of the photographs, the paths of those that could be read, and the others with the reason.

    Raises:
        ImageError: for the first one that cannot be read, unless `skip_damaged`.
    """
    from concurrent.futures import ThreadPoolExecutor

    from .image_io import load_image

    def read(path: Path) -> Image.Image | ImageError:
        try:
            copy = load_image(path, reduced_to=_COPY_SIDE)  # JPEG at a fraction of its size, which is much faster
        except ImageError as error:
            return error
        copy.thumbnail((_COPY_SIDE, _COPY_SIDE))
        return copy

    copies, kept, skipped = [], [], []
    with ThreadPoolExecutor(_READERS) as pool:
        for path, found in zip(paths, pool.map(read, paths), strict=True):
            if not isinstance(found, ImageError):
                copies.append(found)
                kept.append(path)
            elif skip_damaged:
                skipped.append((path, str(found)))
            else:
                raise found
    return copies, kept, skipped


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names without suffix, numbered where photographs would share one; whatever the order of the paths."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in sorted(paths):
        name, number = path.stem, 2
        while name.lower() in taken:
            name, number = f"{path.stem}_{number}", number + 1
        taken.add(name.lower())
        names[path] = name
    return [names[path] for path in paths]


def _resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask `(H, W)` at another size (width, height)."""
    import numpy as np
    from PIL import Image

    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized) >= 128


if __name__ == "__main__":
    sys.exit(main())
