"""TSS (Taniai et al., CVPR 2016): each pair in both directions, with masks and flow, test only.

Layout: `TSS_CVPR2016/{FG3DCar,JODS,PASCAL}/<pair>/` with `image{1,2}.png`, `mask{1,2}.png`, `flow{1,2}.flo`,
`flip_gt.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..schema import Record
from .common import (
    Benchmark,
    Problems,
    each,
    image_file,
    pair_record,
    refuse_empty,
    required_folder,
    subfolder,
    subfolders,
)

GROUPS = ("FG3DCar", "JODS", "PASCAL")
FLOW_TAG = 202021.25


def read_flow(path: Path) -> np.ndarray:
    """A Middlebury `.flo` file as `(h, w, 2)` float32 (dx, dy) in pixels.

    Raises:
        DataError: if it is missing, has another tag, or is shorter or longer than its header says.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the flow is missing or cannot be read.") from error
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != np.float32(FLOW_TAG):
        raise DataError(f"{path}: this is not a .flo file.")
    # The header says width first, the array is height first.
    width, height = (int(number) for number in np.frombuffer(data, "<i4", 2, offset=4))
    if width <= 0 or height <= 0 or len(data) != 12 + 8 * width * height:
        raise DataError(f"{path}: the flow says {width}x{height} pixels but holds {len(data) - 12} bytes.")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """Two records of each pair: `/1` has image 1 as target (`flow1.flo` lives on its grid and leads into image 2, the
    source), `/2` the other way round.

    `flip_gt.txt` = 1 sets `mirror_source`: the source is mirrored before matching. The flow files are in coordinates of
    the images as they are stored, *not* mirrored, so a prediction has to be mirrored back before it is compared.
    """
    root = required_folder(subfolder(source, "TSS_CVPR2016"), "the folder of TSS")
    groups = subfolders(root)
    refuse_empty(groups, root, "group of pairs")
    folders: list[Path] = []
    for group in groups:
        if group.name not in GROUPS:
            problems.report(DataError(f"{group}: unknown group {group.name!r}; TSS has {', '.join(GROUPS)}."))
            continue
        pair_folders = subfolders(group)
        if not pair_folders:
            problems.report(DataError(f"{group}: there is no pair in the group {group.name!r}."))
        folders += pair_folders
    items = [(folder, target) for folder in folders for target in (1, 2)]
    yield from each(items, lambda item: _record(root, *item, split), problems)


def _record(root: Path, folder: Path, target: int, split: str) -> Record:
    where, source = str(folder), 3 - target
    flip_file = folder / "flip_gt.txt"
    try:
        flip = flip_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flip_file}: the file is missing or cannot be read.") from error
    if flip not in ("0", "1"):
        raise DataError(f"{flip_file}: it must hold 0 or 1.")
    flow = read_flow(folder / f"flow{target}.flo")
    return pair_record(
        where,
        root,
        folder / f"image{source}.png",
        folder / f"image{target}.png",
        id=f"{folder.parent.name}/{folder.name}/{target}",
        split=split,
        class_name=folder.parent.name,
        source_mask=image_file(folder / f"mask{source}.png", where),
        target_mask=image_file(folder / f"mask{target}.png", where),
        mirror_source=flip == "1",
        flow=flow.reshape(-1),
        flow_size=list(flow.shape[:2]),
    )


BENCHMARK = Benchmark(
    "tss",
    "TSS",
    "pairs",
    ("test",),
    read,
    classes=GROUPS,
    citation="@inproceedings{taniai2016joint, title={Joint Recovery of Dense Correspondence and "
    "Cosegmentation in Two Images}, author={Taniai, Tatsunori and Sinha, Sudipta N. and Sato, Yoichi}, "
    "booktitle={CVPR}, year={2016}}",
    homepage="https://taniai.space/projects/cvpr16_dccs/",
)
