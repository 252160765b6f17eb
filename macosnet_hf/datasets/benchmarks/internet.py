"""Internet / Object Discovery (Rubinstein et al., CVPR 2013), the 100-image subsets: single images with masks.

Layout: `Data/{Airplane100,Car100,Horse100}/*.jpg` with `GroundTruth/*.png`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ..schema import Record, make_record
from .common import Benchmark, Problems, each, image_file, images_in, report_orphans, required_folder, subfolder

CLASSES = {"Airplane100": "Airplane", "Car100": "Car", "Horse100": "Horse"}


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """Single images. Those without the object have an empty mask; they count for P and are left out of J, as in the
    literature."""
    root = required_folder(subfolder(source, "Data"), "the folder Data of the Internet set")

    def build(path: Path) -> Record:
        class_name = CLASSES[path.parent.name]
        return make_record(
            str(path),
            id=f"{class_name}/{path.stem}",
            split=split,
            class_name=class_name,
            source_id=f"{class_name}/{path.name}",
            source_image=image_file(path, str(path)),
            source_mask=image_file(path.parent / "GroundTruth" / f"{path.stem}.png", str(path)),
        )

    yield from each(_images(root, problems), build, problems)


def _images(root: Path, problems: Problems) -> Iterator[Path]:
    for folder_name, class_name in CLASSES.items():
        folder = root / folder_name
        images = images_in(folder)
        if images:
            report_orphans(folder / "GroundTruth", images, problems)
        else:
            problems.report(DataError(f"{folder}: there is no image of the class {class_name!r}."))
        yield from images


BENCHMARK = Benchmark(
    "internet",
    "Internet (Object Discovery)",
    "images",
    ("test",),
    read,
    classes=tuple(CLASSES.values()),
    citation="@inproceedings{rubinstein2013unsupervised, title={Unsupervised Joint Object Discovery and "
    "Segmentation in Internet Images}, author={Rubinstein, Michael and Joulin, Armand and Kopf, Johannes and "
    "Liu, Ce}, booktitle={CVPR}, year={2013}}",
    homepage="https://people.csail.mit.edu/mrub/ObjectDiscovery/",
)
