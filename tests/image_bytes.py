"""Bytes of image files, and the colours of phones, that the tests share."""

import io
import struct

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
