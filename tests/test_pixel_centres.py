"""Pixels of an image are where they were after the resize to the network's input and back, at any size.

The right values are those of half-pixel resizing, measured on images: the way there is PIL's, the way back is ours.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import CHEETAH, LION, PHOTOS

from macosnet_hf import MaCoSNetImageProcessor, match_pair
from macosnet_hf.collection import hard_mask
from macosnet_hf.commands.main import main
from macosnet_hf.crops import crop_to_box, paste_masks
from macosnet_hf.geometry import denormalize_points
from macosnet_hf.io.working_copy import open_working_copy
from macosnet_hf.modeling_macosnet import MaCoSNetKeypointMatchingOutput

SIDE = 240


def blob(width: int, height: int, share: float = 0.94) -> np.ndarray:
    """A bright spot around `(share * (width - 1), share * (height - 1))` on black, float32 `(H, W)` in [0, 1]."""
    x, y = (
        np.exp(-(((np.arange(count) - share * (count - 1)) * SIDE / count / 4) ** 2) / 2) for count in (width, height)
    )
    return (y[:, None] * x[None]).astype(np.float32)


def as_photo(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255 * values).astype(np.uint8)).convert("RGB")


def centroid(values: np.ndarray) -> np.ndarray:
    """(x, y) of the centre of mass of an image `(H, W)`."""
    values = values.astype(np.float64)
    rows, columns = np.indices(values.shape)
    return np.array([(values * columns).sum(), (values * rows).sum()]) / values.sum()


@pytest.mark.parametrize("share", [0.06, 0.94])
@pytest.mark.parametrize("size", [(4000, 3000), (960, 720), (480, 640), (301, 1000), (240, 240), (100, 75), (1, 4000)])
def test_a_spot_near_the_border_is_found_where_it_is(size, share):
    width, height = size
    # In 8 bits, but not a single column of them, whose rounding errors no other column evens out.
    image = as_photo(blob(width, height, share)) if width > 1 else blob(width, height, share)
    pixels = MaCoSNetImageProcessor()([image, image], return_tensors="pt")["pixel_values"][0, 0, 0]
    # From pixels of the network's input to its normalised coordinates, then to those of the image.
    seen = torch.from_numpy(centroid((pixels.numpy() + 1) / 2) / ((SIDE - 1) / 2) - 1)
    found = denormalize_points(seen, (height, width), SIDE).numpy()
    np.testing.assert_allclose(found, [share * (width - 1), share * (height - 1)], atol=0.05)


@pytest.mark.parametrize("size", [(4000, 3000), (4001, 3003), (2005, 999), (333, 641)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_working_copy_has_the_spot_where_it_is(size, orientation, tmp_path):
    """Also of a JPEG that is decoded at a fraction of its size, no whole number of pixels, or is turned."""
    image = as_photo(blob(*size))
    expected = 0.94 * (np.array(size) - 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation == 6:  # as it is stored, to be turned clockwise
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(tmp_path / "spot.jpg", quality=97, exif=exif)
    for side in (200, 480):
        copy = open_working_copy(tmp_path / "spot.jpg", side=side)
        assert copy.size == size
        values = np.asarray(copy.image)[..., 0].astype(float)
        values[values < 8] = 0  # ringing of the compression
        tolerance = 0.03 * max(size) / side  # hundredths of the copy's pixels
        np.testing.assert_allclose(copy.to_original(centroid(values)[None])[0], expected, atol=tolerance)


def ellipse(width: int, height: int) -> np.ndarray:
    """An object near the corner; of 2400x1800 pixels it is a disc of radius 80."""
    rows, columns = np.ogrid[:height, :width]
    across, down = (columns + 0.5) / width - 0.94, (rows + 0.5) / height - 0.94
    return np.hypot(30 * across, 22.5 * down) < 1


def soft_at_network_size(mask: np.ndarray) -> np.ndarray:
    """Its perfect soft mask `(S, S)`."""
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def assert_same_object(found: np.ndarray, mask: np.ndarray) -> None:
    assert (found & mask).sum() / (found | mask).sum() >= 0.99
    np.testing.assert_allclose(centroid(found), centroid(mask), atol=0.2)


@pytest.mark.parametrize("size", [(2400, 1800), (4000, 3000), (1600, 500), (400, 3000)])
def test_a_perfect_soft_mask_becomes_its_mask(size):
    mask = ellipse(*size)
    soft = soft_at_network_size(mask)
    logits = torch.logit(torch.tensor(soft).double(), eps=1e-12).float().expand(1, 2, -1, -1)
    outputs = MaCoSNetKeypointMatchingOutput(mask_logits=logits)
    found = MaCoSNetImageProcessor().post_process_cosegmentation(outputs, [[size[::-1]] * 2])[0]
    for each in found:
        assert_same_object(each.numpy(), mask)
    # What `match`, `segment`, the demo and `evaluate` do, in strips that bound the memory.
    steps = hard_mask(torch.sigmoid(logits[0, 0]).numpy(), size[::-1])
    np.testing.assert_array_equal(steps, found[0].numpy())


@pytest.mark.parametrize("size", [(2400, 1800), (640, 427), (333, 500)])
def test_the_second_pass_leaves_the_object_where_it_is(size):
    """A crop is seen at the network's size and its mask is pasted; the box ends between two pixels of the image."""
    mask = ellipse(*size)
    box = (137, 139, 239, 238)
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    crop = crop_to_box(image, box, SIDE)
    seen = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pasted = paste_masks(torch.from_numpy(seen)[None], [box])[0].numpy()
    np.testing.assert_allclose(centroid(pasted), centroid(soft_at_network_size(mask)), atol=0.04)


def test_the_warp_of_an_image_onto_itself_is_the_image(network):
    """Not a smaller or a larger one: with the identity as transform each pixel stays."""
    photo = Image.open(LION).convert("RGB")
    result = match_pair(photo, photo.resize((640, 400)), **network, refine="none")
    result.affine[:] = [1, 0, 0, 0, 1, 0]
    result.tps[:] = np.array([-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1], dtype=np.float32)
    warped = np.asarray(result.warped_source()).astype(float)
    expected = np.asarray(photo.resize((640, 400), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(warped - expected)[2:-2, 2:-2].mean() < 1.5
    shifted = np.roll(warped, 1, axis=1)
    assert np.abs(shifted - expected)[2:-2, 2:-2].mean() > 3  # so that a pixel would have been noticed


def annotated(root, images: dict, masks: dict):
    """The layout of a co-segmentation benchmark with these images and masks, paths by name."""
    for kind, files in (("images", images), ("masks", masks)):
        (root / kind / "thing").mkdir(parents=True)
        for name, path in files.items():
            shutil.copy(path, root / kind / "thing" / name)
    return root


def evaluated(root, *options: str) -> dict:
    assert main(["evaluate", "coseg", "--data", str(root), "--json", str(root / "report.json"), *options]) == 0
    metrics: dict = json.loads((root / "report.json").read_text())["metrics"]
    return metrics


def test_evaluate_and_segment_make_the_same_masks(tmp_path, large_lion):
    """Masks that `segment` writes, given to `evaluate` as the truth, are right in every pixel."""
    images = {"lion.jpg": large_lion, "first.jpg": CHEETAH, "second.jpg": PHOTOS / "cheetah1.jpg"}
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, path in images.items():
        shutil.copy(path, folder / name)
    assert main(["segment", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    masks = {name.replace(".jpg", ".png"): tmp_path / "out" / name.replace(".jpg", "_mask.png") for name in images}
    metrics = evaluated(annotated(tmp_path / "data", images, masks), "--masks", "collection")
    assert metrics["precision"] == 1
    assert metrics["jaccard"] == 1


def test_evaluate_and_match_make_the_same_masks(tmp_path):
    images = {"lion.jpg": LION, "cheetah.jpg": CHEETAH}
    result = match_pair(*images.values(), refine="none")
    masks = {}
    for name, mask in zip(("lion.png", "cheetah.png"), (result.source_mask, result.target_mask), strict=True):
        masks[name] = tmp_path / name
        assert 0 < mask.mean() < 1
        Image.fromarray(mask).save(masks[name])
    metrics = evaluated(annotated(tmp_path / "data", images, masks), "--partners", "1", "--refine", "none")
    # A batch of two and single images may differ in the last digit, and with it a pixel.
    assert metrics["precision"] > 1 - 2 / result.source_mask.size
