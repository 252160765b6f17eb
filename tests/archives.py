"""Small archives in the exact layouts of the benchmarks, with images that are neither square nor symmetric."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_image(path: Path, size=(48, 64), seed=0, mirrored=False) -> np.ndarray:
    """Writes a smooth random image of (height, width) and returns its pixels."""
    height, width = size
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    if mirrored:
        pixels = pixels[:, ::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=95)
    return pixels


def disc(size=(48, 64), centre=(20, 25), radius=11) -> np.ndarray:
    """Bool mask of a disc, centre as (y, x)."""
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def mask(path: Path, pixels: np.ndarray, mode="L") -> None:
    """Writes a mask as grey (0/255), palette (0/1) or 1-bit image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "P":
        image = Image.fromarray(pixels.astype(np.uint8)).convert("L")
        indexed = Image.fromarray(np.asarray(image), mode="P")
        indexed.putpalette([0, 0, 0, 120, 10, 10] + [0] * 762)
        indexed.save(path)
    else:
        Image.fromarray(pixels.astype(np.uint8) * 255).convert(mode).save(path)


def row_numbers(values) -> str:
    return ";".join(f"{value:.6f}" for value in values)


def csv_line(source: str, target: str, label, source_points, target_points) -> str:
    columns = [np.asarray(source_points)[:, 0], np.asarray(source_points)[:, 1]]
    columns += [np.asarray(target_points)[:, 0], np.asarray(target_points)[:, 1]]
    return ",".join([source, target, str(label), *map(row_numbers, columns)])


HEADER = "source_image,target_image,class,XA,YA,XB,YB"


def points(count: int, size=(48, 64), seed=0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.uniform(2, [size[1] - 3, size[0] - 3], (count, 2)).round(4)


def pf_willow(root: Path, images=3, classes=("car(G)", "duck(S)")) -> Path:
    """PF-WILLOW with all pairs of each class, `.mat` files and `test_pairs.csv`."""
    from scipy.io import savemat

    lines = [HEADER]
    numbers = {"car(G)": 1, "duck(S)": 4}
    for offset, name in enumerate(classes):
        keypoints = []
        for index in range(images):
            size = (48 + 4 * index, 64 - 4 * index)
            path = root / "PF-dataset" / name / f"photo_{index:03d}.png"
            write_image(path, size, seed=10 * offset + index)
            keypoints.append(points(10, size, seed=100 * offset + index))
            savemat(path.with_suffix(".mat"), {"pts_coord": keypoints[-1].T})
        for first in range(images):
            for second in range(first + 1, images):
                names = [f"PF-dataset/{name}/photo_{index:03d}.png" for index in (first, second)]
                lines.append(csv_line(*names, numbers[name], keypoints[first], keypoints[second]))
    (root / "test_pairs.csv").write_text("\n".join(lines) + "\n")
    return root


def pf_pascal(root: Path) -> Path:
    """PF-PASCAL: 3 test pairs with 6, 4 and 5 keypoints, 1 validation pair, 2 training pairs without keypoints."""
    folder = root / "PF-dataset-PASCAL" / "JPEGImages"
    names = [f"2010_{index:06d}.jpg" for index in range(4)]
    for index, name in enumerate(names):
        write_image(folder / name, (50, 60 + 2 * index), seed=index)
    paths = [f"PF-dataset-PASCAL/JPEGImages/{name}" for name in names]
    test = [HEADER]
    for number, (a, b, label, count) in enumerate([(0, 1, 1, 6), (1, 2, 20, 4), (0, 2, 1, 5)]):
        test.append(
            csv_line(paths[a], paths[b], label, points(count, (50, 60), number), points(count, (50, 60), number + 50))
        )
    (root / "test_pairs.csv").write_text("\n".join(test) + "\n")
    (root / "val_pairs.csv").write_text("\n".join([HEADER, test[1]]) + "\n")
    train = ["source_image,target_image,class,flip", f"{paths[0]},{paths[3]},8,0", f"{paths[0]},{paths[3]},8,1"]
    (root / "train_pairs.csv").write_text("\n".join(train) + "\n")
    return root


def spair(root: Path) -> Path:
    """SPair-71k: two test pairs of cats, one training pair, layout lists and segmentations."""
    for index in range(3):
        write_image(root / "JPEGImages" / "cat" / f"2008_{index:06d}.jpg", (50, 70 - 5 * index), seed=index)
        mask(root / "Segmentation" / "cat" / f"2008_{index:06d}.png", disc((50, 70 - 5 * index)))
    lists = {"trn": [], "val": [], "test": []}
    for number, (split, a, b, viewpoint) in enumerate([("test", 0, 1, 0), ("test", 2, 0, 2), ("trn", 1, 2, 1)]):
        name = f"{number + 1:06d}-2008_{a:06d}-2008_{b:06d}:cat"
        annotation = {
            "filename": name,
            "src_imname": f"2008_{a:06d}.jpg",
            "trg_imname": f"2008_{b:06d}.jpg",
            "src_imsize": [70 - 5 * a, 50, 3],
            "trg_imsize": [70 - 5 * b, 50, 3],
            "src_bndbox": [5, 6, 45, 40],
            "trg_bndbox": [4, 8, 44, 28],
            "category": "cat",
            "src_kps": points(4, (50, 55), number).tolist(),
            "trg_kps": points(4, (50, 55), number + 9).tolist(),
            "kps_ids": ["0", "1", "4", "7"],
            "mirror": 0,
            "viewpoint_variation": viewpoint,
            "scale_variation": 1,
            "truncation": 0,
            "occlusion": 3,
        }
        path = root / "PairAnnotation" / split / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(annotation))
        lists[split].append(name)
    folder = root / "Layout" / "large"
    folder.mkdir(parents=True)
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def write_flow(path: Path, flow: np.ndarray) -> None:
    height, width = flow.shape[:2]
    head = np.asarray([202021.25], "<f4").tobytes() + np.asarray([width, height], "<i4").tobytes()
    path.write_bytes(head + flow.astype("<f4").tobytes())


def tss(root: Path) -> Path:
    """TSS with one pair a group. Image 2 is image 1 of another size; in PASCAL it is mirrored too (`flip_gt.txt` = 1).

    The true flow is the identity of normalised coordinates (mirrored where the pair is), invalid outside the mask.
    """
    for number, (group, flip) in enumerate((("FG3DCar", 0), ("JODS", 0), ("PASCAL", 1))):
        folder = root / "TSS_CVPR2016" / group / "car_01_02"
        sizes = [(48, 64), (40, 80)]
        for side in (0, 1):
            write_image(folder / f"image{side + 1}.png", sizes[side], seed=number, mirrored=bool(flip and side))
            size, other = sizes[side], sizes[1 - side]
            scale = (size[0] / 48, size[1] / 64)
            y, x = np.mgrid[: size[0], : size[1]]
            object_mask = ((y / scale[0] - 20) / 14) ** 2 + ((x / scale[1] - 24) / 18) ** 2 <= 1
            if flip and side:
                object_mask = object_mask[:, ::-1]
            mask(folder / f"mask{side + 1}.png", object_mask, mode="P" if group == "JODS" else "L")
            place_x = (x + 0.5) * other[1] / size[1] - 0.5
            place_y = (y + 0.5) * other[0] / size[0] - 0.5
            if flip:
                place_x = (other[1] - 1) - place_x
            flow = np.stack((place_x - x, place_y - y), axis=-1).astype(np.float32)
            flow[~object_mask] = 1e10
            write_flow(folder / f"flow{side + 1}.flo", flow)
        (folder / "flip_gt.txt").write_text(str(flip))
        (folder / "pair.txt").write_text("Image1,Image2\na.jpg,b.jpg\n")
    return root


def internet(root: Path, images=3) -> Path:
    """Internet: three classes; the last image of each has no object."""
    for offset, name in enumerate(("Airplane100", "Car100", "Horse100")):
        for index in range(images):
            write_image(root / "Data" / name / f"{index + 1:04d}.jpg", (40, 56), seed=10 * offset + index)
            pixels = disc((40, 56), (18, 24), 9) if index < images - 1 else np.zeros((40, 56), bool)
            mask(root / "Data" / name / "GroundTruth" / f"{index + 1:04d}.png", pixels)
    return root


def coseg(root: Path, images=3, classes=("Bird", "Cat"), masks=True) -> Path:
    """Class folders `images/` and `masks/`, masks of 1 bit."""
    for offset, name in enumerate(classes):
        for index in range(images):
            size = (40 + 4 * index, 56)
            write_image(root / "images" / name / f"p{index}.jpg", size, seed=10 * offset + index)
            if masks:
                mask(root / "masks" / name / f"p{index}.png", disc(size, (18, 20 + 3 * index), 10), mode="1")
    return root
