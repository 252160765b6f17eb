"""`macosnet segment`: what two or more images have in common, cut out of each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ImageError, InputError
from ..io.memory import collector_paused, give_memory_back
from .arguments import add_model_arguments, model_name, save_mask, write_json

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# `segment` keeps copies of this size of all images in memory: the network sees 240 pixels of an image, and cuts
# small objects out to 0.4 of it.
_COPY_SIDE = 640
_OVERVIEW_SIDE = 400
_READERS = min(8, os.cpu_count() or 1)  # images that are decoded at the same time
_CUTTERS = 2  # images that are refined at the same time, in full size

T = TypeVar("T")
_PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".heic"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet segment`."""
    parser.description = "Writes <name>_mask.png and <name>_cutout.png for each image, overview.png and summary.json."
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="images, or one folder of them")
    add_model_arguments(parser)
    parser.add_argument(
        "--partners",
        type=int,
        default=2,
        metavar="N",
        help="how many others each image is compared with (default 2)",
    )


def run(args: argparse.Namespace) -> int:
    """`macosnet segment`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from tqdm import tqdm

    from ..io.checkpoints import check_checkpoint
    from ..io.image_files import load_image
    from ..io.output_folder import output_folder, refuse_to_overwrite

    if args.partners < 1:
        raise InputError(f"--partners must be at least 1; got {args.partners}.")
    check_checkpoint(args.model)
    paths, from_folder = _image_paths(args.photos)
    if from_folder and os.path.realpath(args.output_dir) == os.path.realpath(args.photos[0]):
        raise InputError("The output folder is the folder of the images; a second run would take masks for them.")
    give_memory_back()
    copies, kept, skipped = _read_copies(paths, skip_damaged=from_folder)
    if len(kept) < 2:
        raise InputError(
            f"Co-segmentation needs two or more images; of the {len(paths)} in {args.photos[0]} {len(kept)} can "
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
            from ..collection import hard_mask, odd_ones_out, segment_collection
            from ..drawing import cutout, overview
            from ..io.checkpoints import load_model_and_processor

            model, processor = load_model_and_processor(args.model, args.device)
        with tqdm(total=len(kept), desc="Segmenting", unit="photo", disable=quiet) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total  # each image up to three times where masks are refined
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
            image = load_image(kept[number])  # again, so that few images are in memory in full size
            mask = hard_mask(result.probabilities[number], (image.height, image.width))
            save_mask(mask, folder / f"{names[number]}_mask.png")
            cutout(image, mask).save(folder / f"{names[number]}_cutout.png", compress_level=1)
            copies[number].thumbnail((_OVERVIEW_SIDE, _OVERVIEW_SIDE))
            entry = {
                "photo": str(kept[number]),
                "mask": f"{names[number]}_mask.png",
                "cutout": f"{names[number]}_cutout.png",
                "width": image.width,
                "height": image.height,
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
            "model": model_name(args.model),
            "refine": args.refine,
        }
        write_json(document, folder / "summary.json")
    for number in odd:
        print(f"{kept[number]} does not seem to show what the others show")
    print(f"{len(done)} images; see {Path(args.output_dir) / 'overview.png'}")
    if len(done) < len(kept):
        print(f"macosnet: interrupted; {len(done)} of {len(kept)} images were cut out and kept.", file=sys.stderr)
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


def _image_paths(arguments: Sequence[str]) -> tuple[list[Path], bool]:
    """The images that were named, each once, and whether they come from a folder."""
    if len(arguments) == 1 and os.path.isdir(arguments[0]):
        folder = Path(arguments[0])
        try:
            paths = sorted(path for path in folder.iterdir() if _looks_like_image(path))
        except OSError as error:
            raise InputError(f"The folder {folder} cannot be read ({error.strerror or error}).") from error
        if len(paths) < 2:
            raise InputError(
                f"Co-segmentation needs two or more images; the folder {folder} holds {len(paths) or 'none'}."
            )
        return paths, True
    for argument in arguments:
        if not os.path.exists(argument):
            raise ImageError(f"'{argument}' does not exist.")
        if os.path.isdir(argument):
            raise InputError(f"{argument} is a folder; pass one folder alone, or images.")
    named: dict[str, Path] = {}
    for argument in arguments:
        named.setdefault(os.path.realpath(argument), Path(argument))
    paths = list(named.values())
    if len(paths) < 2:
        raise InputError("Co-segmentation needs two or more different images, or a folder of them.")
    return paths, False


def _looks_like_image(path: Path) -> bool:
    # Hidden files are left out: some systems keep a "._name.jpg" beside every image, which is none.
    return path.suffix.lower() in _PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_copies(
    paths: Sequence[Path], *, skip_damaged: bool
) -> tuple[list[Image.Image], list[Path], list[tuple[Path, str]]]:
    """Small copies of the images, the paths of those that could be read, and the others with the reason.

    Raises:
        ImageError: for the first one that cannot be read, unless `skip_damaged`.
    """
    from concurrent.futures import ThreadPoolExecutor

    from ..io.image_files import load_image

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
    """File names without suffix, numbered where images would share one; whatever the order of the paths."""
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
