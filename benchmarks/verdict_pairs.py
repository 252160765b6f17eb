"""Pairs of images of which it is known whether they should match, for `benchmarks/verdicts.py`.

A pair is drawn within one half of the images ("choose": even numbers of a class, "report": odd ones), so that no image
is in both. The kinds:

    same side        one class, seen from the same side: classes of Caltech-101 (whose images are aligned), the six
                     classes of VOC 2007 with their side, leordeanu-cars
    same image       an image with a crop of itself, stored as a JPEG of quality 50
    class            one class of msrc-coseg; whether the sides agree is not known
    mirrored         one class, seen from opposite sides: left with right of VOC 2007, one image of a same-side pair
                     mirrored, a side view with its own mirror image
    turned           a same-side pair or an image with itself, one of them turned by 90 or 180 degrees
    kin              different classes of one kind (animals on four legs, motor vehicles ...)
    unrelated        different kinds of objects
    blank            at least one image of nothing: one colour, noise, a gradient, a sky
    texture          two pieces of one texture
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

HALVES = ("choose", "report")
KIN = [
    set(names.split())
    for names in (
        "cat cow dog sheep horse elephant rhino llama okapi gerenuk kangaroo dalmatian panda hedgehog beaver platypus "
        "Leopards cougar_body cougar_face wild_cat brontosaurus stegosaurus garfield snoopy lion cheetah",
        "Faces Faces_easy face buddha",
        "crab crayfish lobster scorpion ant tick mayfly dragonfly butterfly octopus",
        "bird emu ibis flamingo flamingo_head pigeon rooster",
        "boat ferry ketch schooner",
        "car car_side bus motorbike Motorbikes bicycle wheelchair",
        "aeroplane airplanes helicopter",
        "flower lotus sunflower water_lilly strawberry bonsai joshua_tree starfish",
        "sign stop_sign yin_yang",
        "chair windsor_chair",
        "crocodile crocodile_head",
        "bass dolphin hawksbill sea_horse trilobite nautilus",
        "mandolin electric_guitar euphonium saxophone",
        "camera cellphone laptop stapler metronome watch",
        "cup ewer",
        "lamp chandelier menorah ceiling_fan umbrella",
        "minaret pagoda pyramid",
        "accordion grand_piano gramophone",
        "cannon anchor revolver wrench scissors inline_skate",
        "pizza soccer_ball brain barrel dollar_bill headphone binocular",
    )
]
# Side views of Caltech-101 that cannot be taken for their mirror image.
SIDE_VIEWS = [
    "Motorbikes",
    "airplanes",
    "beaver",
    "brontosaurus",
    "cannon",
    "car_side",
    "crocodile",
    "dolphin",
    "elephant",
    "emu",
    "ewer",
    "flamingo",
    "gerenuk",
    "hedgehog",
    "helicopter",
    "ibis",
    "inline_skate",
    "kangaroo",
    "llama",
    "okapi",
    "pigeon",
    "platypus",
    "revolver",
    "rhino",
    "rooster",
    "saxophone",
    "stegosaurus",
    "wheelchair",
    "wild_cat",
]
_LEFT_RIGHT = {"_left": "_right", "_right": "_left"}


@dataclass(frozen=True)
class KnownPair:
    """Two images, what kind of pair they are, and which half they belong to."""

    kind: str
    half: str
    name: str
    source: Callable[[], Image.Image]
    target: Callable[[], Image.Image]


def known_pairs(data: Path, seed: int = 0) -> Iterator[KnownPair]:
    """All pairs of both halves. `data` holds caltech101, msrc-coseg, voc2007-6x2 and leordeanu-cars."""
    for number, half in enumerate(HALVES):
        random = np.random.default_rng([seed, number])
        caltech = _classes(data / "caltech101", number)
        background = caltech.pop("BACKGROUND_Google")
        msrc = _classes(data / "msrc-coseg" / "images", number)
        voc = _classes(data / "voc2007-6x2", number)
        pairs = [
            *_same_side(random, caltech, voc, _cars(data / "leordeanu-cars", number)),
            *_one_class(random, msrc),
            *_different_classes(random, [caltech, msrc, voc], background),
            *_of_nothing(random, [path for classes in (caltech, msrc) for some in classes.values() for path in some]),
        ]
        for kind, name, source, target in pairs:
            yield KnownPair(kind, half, name, source, target)


_Drawn = tuple[str, str, Callable[[], Image.Image], Callable[[], Image.Image]]


def _classes(folder: Path, half: int) -> dict[str, list[Path]]:
    found = {}
    for each in sorted(folder.iterdir()):
        if each.is_dir():
            found[each.name] = sorted(each.glob("[!.]*.jpg"))[half::2]
    if not found:
        raise SystemExit(f"{folder} holds no classes")
    return found


def _cars(folder: Path, half: int) -> list[tuple[Path, Path]]:
    with open(folder / "pairs.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(folder / row[0], folder / row[1]) for row in rows[half::2]]


def _two(random: np.random.Generator, paths: list[Path]) -> tuple[Path, Path]:
    first, second = random.choice(len(paths), 2, replace=False)
    return paths[first], paths[second]


def _open(path: Path, change: Callable[[Image.Image], Image.Image] | None = None) -> Image.Image:
    image = Image.open(path).convert("RGB")
    return image if change is None else change(image)


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _turned(turn: Image.Transpose, image: Image.Image) -> Image.Image:
    return image.transpose(turn)


def _cropped(box: tuple[float, ...], image: Image.Image) -> Image.Image:
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, (image.width, image.height) * 2, strict=True)
    )
    stream = io.BytesIO()
    image.crop((left, top, right, bottom)).save(stream, "JPEG", quality=50)
    return Image.open(stream).convert("RGB")


def _name(*paths: Path) -> str:
    return " ".join(f"{path.parent.name}/{path.name}" for path in paths)


def _same_side(
    random: np.random.Generator,
    caltech: dict[str, list[Path]],
    voc: dict[str, list[Path]],
    cars: list[tuple[Path, Path]],
) -> Iterator[_Drawn]:
    """Same side, mirrored, turned and same image."""
    together = [_two(random, paths) for paths in caltech.values()] + cars
    of_side = [_two(random, paths) for paths in voc.values() for _ in range(6)]
    for pair in together + of_side:
        yield "same side", _name(*pair), partial(_open, pair[0]), partial(_open, pair[1])
    for pair in of_side[::2]:
        yield "mirrored", _name(*pair) + " mirror", partial(_open, pair[0], _mirrored), partial(_open, pair[1])
    for name, paths in voc.items():
        for ending, other in _LEFT_RIGHT.items():
            if name.endswith(ending):
                others = voc[name.removesuffix(ending) + other]
                for _ in range(3):
                    pair = paths[random.integers(len(paths))], others[random.integers(len(others))]
                    yield "mirrored", _name(*pair), partial(_open, pair[0]), partial(_open, pair[1])
    for name in SIDE_VIEWS:
        path = caltech[name][random.integers(len(caltech[name]))]
        yield "mirrored", _name(path) + " itself", partial(_open, path, _mirrored), partial(_open, path)
        turn = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180)[random.integers(2)]
        yield "turned", _name(path) + " itself", partial(_open, path, partial(_turned, turn)), partial(_open, path)
    for pair in of_side[1::3]:
        turn = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180)[random.integers(2)]
        changed = partial(_open, pair[0], partial(_turned, turn))
        yield "turned", _name(*pair), changed, partial(_open, pair[1])
    for pair in (*together[::5], *of_side[::5]):
        left, top = random.uniform(0, 0.15, 2)
        change = partial(_cropped, (left, top, left + 0.85, top + 0.85))
        yield "same image", _name(pair[0]), partial(_open, pair[0], change), partial(_open, pair[0])


def _one_class(random: np.random.Generator, msrc: dict[str, list[Path]]) -> Iterator[_Drawn]:
    for paths in msrc.values():
        for _ in range(5):
            pair = _two(random, paths)
            yield "class", _name(*pair), partial(_open, pair[0]), partial(_open, pair[1])


def _different_classes(
    random: np.random.Generator, sets: list[dict[str, list[Path]]], background: list[Path]
) -> Iterator[_Drawn]:
    paths = [
        path
        for classes, count in zip(sets, (8, 60, 30), strict=True)
        for some in classes.values()
        for path in random.permutation(np.array(some, dtype=object))[:count]
    ]
    counts = {"kin": 40, "unrelated": 150}
    while any(counts.values()):
        pair = _two(random, paths)
        names = [path.parent.name.split("_left")[0].split("_right")[0] for path in pair]
        if names[0] == names[1]:
            continue
        kind = "kin" if any(kin.issuperset(names) for kin in KIN) else "unrelated"
        if counts[kind]:
            counts[kind] -= 1
            yield kind, _name(*pair), partial(_open, pair[0]), partial(_open, pair[1])
    for _ in range(50):
        pair = background[random.integers(len(background))], paths[random.integers(len(paths))]
        yield "unrelated", _name(*pair), partial(_open, pair[0]), partial(_open, pair[1])


# ---------------------------------------------------------------------------------------------------------------------
# Images of nothing
# ---------------------------------------------------------------------------------------------------------------------


def one_colour(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Black, white, grey or a colour."""
    color = random.integers(0, 256, 3)
    return np.broadcast_to(
        [np.zeros(3), np.full(3, 255), np.full(3, color[0]), color][random.integers(4)], (height, width, 3)
    )


def noise(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Uniform or normal noise, grey or coloured, in grains of 1 to 8 pixels."""
    grain, channels = 2 ** random.integers(4), (1, 3)[random.integers(2)]
    shape = (height // grain + 1, width // grain + 1, channels)
    values = random.uniform(0, 255, shape) if random.integers(2) else random.normal(128, random.uniform(3, 60), shape)
    values = values.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width]
    return np.broadcast_to(values, (height, width, 3))


def gradient(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """From one colour to another, along a line or from a centre."""
    y, x = np.mgrid[: 1 : height * 1j, : 1 : width * 1j]
    if random.integers(2):
        angle = random.uniform(0, 2 * np.pi)
        ramp = np.cos(angle) * x + np.sin(angle) * y
    else:
        ramp = np.hypot(x - random.random(), y - random.random())
    ramp = ((ramp - ramp.min()) / np.ptp(ramp))[..., None]
    return (1 - ramp) * random.integers(0, 256, 3) + ramp * random.integers(0, 256, 3)


def sky(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A blue that gets paler downwards, with the noise of a camera, half of the time with soft clouds."""
    ramp = np.linspace(0, 1, height)[:, None, None]
    blue = np.array([70, 130, 210]) + random.uniform(-25, 25, 3)
    values = blue + ramp * random.uniform(20, 70, 3) + random.normal(0, random.uniform(0.5, 4), (height, width, 3))
    if random.integers(2):
        small = Image.fromarray(random.uniform(0, 255, (6, 9)).astype(np.uint8)).resize((width, height), 3)
        cloud = np.asarray(small.filter(ImageFilter.GaussianBlur(5)), dtype=float)[..., None] / 255
        values = values + random.uniform(0.1, 0.5) * cloud.clip(0.4) * (255 - values)
    return values


NOTHING = (one_colour, noise, gradient, sky)


def nothing(make: Callable[[np.random.Generator, int, int], np.ndarray], seed: int) -> Image.Image:
    """An image of nothing, 150 to 500 pixels a side."""
    random = np.random.default_rng(seed)
    height, width = random.integers(150, 500, 2)
    return Image.fromarray(make(random, height, width).clip(0, 255).astype(np.uint8))


def _of_nothing(random: np.random.Generator, paths: list[Path]) -> Iterator[_Drawn]:
    """Images of nothing with one of the same kind, themselves, one of another kind and an image of something."""
    for make in NOTHING:
        for number in range(20):
            seeds = random.integers(2**31, size=2).tolist()
            first = partial(nothing, make, seeds[0])
            other = NOTHING[(NOTHING.index(make) + 1 + number // 4 % 3) % 4]
            path = paths[random.integers(len(paths))]
            second, name = [
                (partial(nothing, make, seeds[1]), f"another {make.__name__}"),
                (first, "itself"),
                (partial(nothing, other, seeds[1]), other.__name__),
                (partial(_open, path), _name(path)),
            ][number % 4]
            yield "blank", f"{make.__name__}({seeds[0]}) with {name}", first, second
    for name in ("brick", "grass", "gravel"):
        for _ in range(8):
            corners = random.uniform(0, 0.5, 4)
            ends = [partial(_piece, name, tuple(corners[k : k + 2])) for k in (0, 2)]
            yield "texture", name, *ends


def _piece(name: str, corner: tuple[float, float]) -> Image.Image:
    import skimage.data

    pixels = getattr(skimage.data, name)()
    top, left = (round(share * side) for share, side in zip(corner, pixels.shape, strict=True))
    return Image.fromarray(pixels[top : top + pixels.shape[0] // 2, left : left + pixels.shape[1] // 2]).convert("RGB")
