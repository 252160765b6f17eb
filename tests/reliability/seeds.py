"""Valid files of every format that is read, tiny, for the fuzzer to damage."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from macosnet_hf.evaluation.predictions import FORMAT
from macosnet_hf.images import reads_heif


def image(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth coloured noise, neither square nor symmetric."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _encoded(content: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    content.save(stream, kind, **options)
    return stream.getvalue()


def images() -> dict[str, list[bytes]]:
    """Files of each image format, in the modes and encodings that the format has."""
    photo = image()
    grey, palette, clear = photo.convert("L"), photo.convert("P"), photo.convert("RGBA")
    clear.putalpha(grey)
    frames = [photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), photo.rotate(30)]
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    animated = {"save_all": True, "append_images": frames, "duration": 40}
    found = {
        "jpeg": [
            _encoded(photo, "JPEG", exif=exif, quality=80),
            _encoded(photo, "JPEG", progressive=True, icc_profile=b"not a profile" * 9),
            _encoded(grey, "JPEG", quality=30),
            _encoded(photo.convert("CMYK"), "JPEG"),
            _encoded(photo, "JPEG", restart_marker_blocks=2, subsampling=0),
        ],
        "png": [
            _encoded(photo, "PNG", exif=exif, dpi=(72, 72)),
            _encoded(clear, "PNG"),
            _encoded(palette, "PNG", transparency=3),
            _encoded(grey.convert("1"), "PNG"),
            _encoded(wide, "PNG"),
            _encoded(photo, "PNG", **animated),
        ],
        "webp": [
            _encoded(photo, "WEBP", exif=exif),
            _encoded(clear, "WEBP", lossless=True),
            _encoded(photo, "WEBP", **animated),
        ],
        "gif": [_encoded(palette, "GIF"), _encoded(palette, "GIF", transparency=3), _encoded(photo, "GIF", **animated)],
        "tiff": [
            _encoded(photo, "TIFF", compression="tiff_lzw", exif=exif),
            _encoded(photo, "TIFF", compression="jpeg"),
            _encoded(clear, "TIFF", compression="tiff_adobe_deflate"),
            _encoded(grey.convert("1"), "TIFF", compression="group4"),
            _encoded(wide, "TIFF"),
            _encoded(real, "TIFF"),
            _encoded(photo, "TIFF", **{key: animated[key] for key in ("save_all", "append_images")}),
        ],
        "bmp": [
            _encoded(photo, "BMP"),
            _encoded(palette, "BMP"),
            _encoded(grey.convert("1"), "BMP"),
            _encoded(clear, "BMP"),
            _rle_bmp(),
        ],
        "other images": [
            _encoded(photo, "PPM"),
            _encoded(grey, "PPM"),
            b"P3 3 2 255\n" + b"9 8 7 " * 6,
            _encoded(photo, "ICO", sizes=[(32, 32), (16, 16)]),
            _encoded(photo, "SGI"),
            _psd(photo),
        ],
    }
    for kind in ("AVIF", "JPEG2000"):
        if kind in Image.SAVE or (Image.init() and kind in Image.SAVE):
            try:
                found["other images"].append(_encoded(photo, kind))
            except OSError:  # PIL was built without this codec
                continue
    if reads_heif():
        found["heif"] = [
            _encoded(photo, "HEIF", exif=exif.tobytes()),
            _encoded(clear, "HEIF", quality=30),
            _encoded(wide, "HEIF"),
            _encoded(photo, "HEIF", save_all=True, append_images=frames, thumbnails=[16]),
            _encoded(photo.resize((96, 80)), "HEIF", tile_size=64, icc_profile=b"not a profile" * 9),
        ]
    return found


def _rle_bmp() -> bytes:
    """8 x 2 pixels with run lengths, which PIL reads but does not write."""
    pixels = bytes([8, 1, 0, 0, 0, 4, 1, 2, 3, 4, 4, 5, 0, 1])
    palette = b"".join(struct.pack("<BBBB", value, 255 - value, 9, 0) for value in range(0, 256))
    header = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + header + palette + pixels


def _psd(photo: Image.Image) -> bytes:
    """Version 1, three channels of 8 bits, uncompressed."""
    pixels = np.asarray(photo).transpose(2, 0, 1).tobytes()
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, photo.height, photo.width, 8, 3)
    return header + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + pixels


# ---------------------------------------------------------------------------------------------------------------------
# Archives of benchmarks
# ---------------------------------------------------------------------------------------------------------------------

PAIR_LIST = (
    b"source_image,target_image,class,XA,YA,XB,YB\n"
    b"p/a.png,p/b.png,1,1;2;30.5,4;5;6,7;8;9,10;11;12\n"
    b'"p/b.png","p/a.png",car(G),1;2;-1,4;5;-1,7;8;-1,10;11;-1\n'
)
TRAINING_LIST = b"source_image,target_image,class,flip\np/a.png,p/b.png,8,0\np/a.png,p/b.png,8,1\n"
ANNOTATION = json.dumps(
    {
        "filename": "1:cat",
        "src_imname": "a.jpg",
        "trg_imname": "b.jpg",
        "src_bndbox": [5, 6, 45, 40],
        "trg_bndbox": [4, 8, 44, 28],
        "category": "cat",
        "src_kps": [[1, 2], [3.5, 4], None],
        "trg_kps": [[5, 6], [7, 8], [1, 1]],
        "kps_ids": ["0", "1", "4"],
        "mirror": 0,
        "viewpoint_variation": 1,
        "scale_variation": 1,
        "truncation": 0,
        "occlusion": 3,
    }
).encode()


def flow() -> bytes:
    """A Middlebury flow of 5 x 4 pixels."""
    values = np.arange(40, dtype="<f4")
    return struct.pack("<fii", 202021.25, 5, 4) + values.tobytes()


def mat(compressed: bool = False, **others: Any) -> bytes:
    """Keypoints as in PF-WILLOW."""
    from scipy.io import savemat

    stream = io.BytesIO()
    savemat(stream, {"pts_coord": np.arange(20.0).reshape(2, 10), **others}, do_compression=compressed)
    return stream.getvalue()


def pair_archive(folder: Path) -> None:
    """Two images `p/a.png` and `p/b.png`."""
    (folder / "p").mkdir(parents=True)
    for number, name in enumerate("ab"):
        image(seed=number).save(folder / "p" / f"{name}.png")


def willow_archive(folder: Path) -> None:
    """PF-WILLOW without a list: one class of two images with keypoints."""
    where = folder / "PF-dataset" / "car(G)"
    where.mkdir(parents=True)
    for number, name in enumerate("ab"):
        image(seed=number).save(where / f"{name}.png")
        (where / f"{name}.mat").write_bytes(mat())


def spair_archive(folder: Path) -> None:
    """SPair-71k with one pair of cats."""
    content, annotations = folder / "JPEGImages" / "cat", folder / "PairAnnotation" / "test"
    lists = folder / "Layout" / "large"
    for where in (content, annotations, lists):
        where.mkdir(parents=True)
    for number, name in enumerate("ab"):
        image(seed=number).save(content / f"{name}.jpg")
    (annotations / "1:cat.json").write_bytes(ANNOTATION)
    (lists / "test.txt").write_text("1:cat\n")


def tss_archive(folder: Path) -> None:
    """TSS with one pair."""
    where = folder / "TSS_CVPR2016" / "JODS" / "pair"
    where.mkdir(parents=True)
    for number in (1, 2):
        image(5, 4, seed=number).save(where / f"image{number}.png")
        image(5, 4, seed=number).convert("L").save(where / f"mask{number}.png")
        (where / f"flow{number}.flo").write_bytes(flow())
    (where / "flip_gt.txt").write_text("0")


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def tiny_checkpoint(folder: Path) -> None:
    """A model with every part of the real one that loads in a tenth of a second, and its processor."""
    import torch
    from transformers import ResNetConfig

    from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    config = MaCoSNetConfig(
        backbone_config=backbone,
        image_size=96,
        predictor_channels=[16, 12],
        predictor_kernel_sizes=[3, 3],
        decoder_widths=[12, 10, 8, 8],
    )
    MaCoSNetForKeypointMatching(config).save_pretrained(folder)
    MaCoSNetImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)


def published_state() -> dict[str, Any]:
    """Few small weights under names of the published networks."""
    import torch

    return {
        "FeatureExtraction.model.0.weight": torch.ones(2, 3, 7, 7),
        "FeatureExtraction.model.1.running_mean": torch.zeros(2),
        "FeatureRegression.conv.0.weight": torch.ones(4, 225, 7, 7, dtype=torch.float16),
        "FeatureRegression.conv.3.weight": torch.ones(4, 4, 5, 5),
        "FeatureRegression.linear.weight": torch.ones(6, 100),
        "FeatureRegression.linear.bias": torch.ones(6),
        "Decoder.x": torch.ones(1),
    }


def published_checkpoints() -> list[bytes]:
    """Files like the published ones, as `torch.save` writes them now and wrote them before, with few small weights."""
    import argparse

    import torch

    state = published_state()
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, name="a"),
        "best_test_loss": np.float64(0.5),
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    found = []
    for document in (content, state):
        for new in (True, False):
            stream = io.BytesIO()
            torch.save(document, stream, _use_new_zipfile_serialization=new)
            found.append(stream.getvalue())
    return found


def predictions(folder: Path) -> None:
    """A complete set of predictions of two samples."""
    folder.mkdir(parents=True)
    values = {"0|points": np.ones((3, 2)), "1|points": np.zeros((3, 2))}
    np.savez_compressed(folder / "samples-000-00000.npz", allow_pickle=False, **values)
    samples = {name: ["samples-000-00000.npz", f"{number}|{'0' * 16}"] for number, name in enumerate("ab")}
    (folder / "manifest.json").write_text(json.dumps({"model": "m", "format": FORMAT, "samples": samples}))
