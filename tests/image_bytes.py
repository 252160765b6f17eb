"""Bytes of image files, and the colours of phones, that the tests share."""

import io
import struct

import cv2
import numpy as np
from PIL import Image, ImageCms


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def display_p3():
    """The ICC profile of recent phones: sRGB's with other primaries."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for entry in range(struct.unpack(">I", profile[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", profile[132 + 12 * entry : 144 + 12 * entry])
        if name in primaries:
            profile[offset + 8 : offset + 20] = struct.pack(">iii", *(round(v * 65536) for v in primaries[name]))
    return bytes(profile)


def odd_files() -> dict[str, bytes]:
    """One image in files of many kinds: turned, in other colours, of more bits, transparent."""
    small = np.random.default_rng(7).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((90, 61), Image.Resampling.BICUBIC)
    lying = image.transpose(Image.Transpose.ROTATE_90)  # 61 wide
    turn = Image.Exif()
    turn[0x0112] = 6
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    deep = np.asarray(image)[..., ::-1].astype(np.uint16) * 257
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "turned.jpg": encoded(lying, "JPEG", exif=turn),
        "turned.tif": encoded(lying, "TIFF", exif=turn),
        "turned.webp": encoded(lying, "WEBP", exif=turn, lossless=True),
        "phone.jpg": encoded(lying, "JPEG", exif=turn, icc_profile=display_p3()),
        "phone.png": encoded(image, "PNG", icc_profile=display_p3()),
        "print.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "lab.tif": encoded(image.convert("LAB"), "TIFF"),
        "grey16.png": encoded(Image.fromarray(wide), "PNG"),
        "colours16.png": cv2.imencode(".png", deep)[1].tobytes(),
        "float.tif": encoded(Image.fromarray(np.float32(wide / 65535)), "TIFF"),
        "palette.png": encoded(image.quantize(40), "PNG", transparency=3),
        "clear.png": encoded(clear, "PNG"),
    }
