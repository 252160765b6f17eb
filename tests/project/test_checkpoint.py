"""What the embedded checkpoint must be able to do, on images of installed packages and on PF-WILLOW."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import PHOTOS
from skimage import data

from macosnet_hf import match_pair
from macosnet_hf.commands.main import main
from macosnet_hf.geometry import Transform, apply_affine, denormalize_points, invert_affine, normalize_points, warp

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_finds_points_again_after_a_known_warp():
    photo = Image.open(PHOTOS / "cheetah1.jpg").convert("RGB")
    # Target to source: turned by 12 degrees, 15 % smaller, moved.
    cos, sin = np.cos(0.21) * 1.15, np.sin(0.21) * 1.15
    affine = torch.tensor([[cos, -sin, 0.10, sin, cos, -0.08]], dtype=torch.float32)
    size = (photo.height, photo.width)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float()
    warped = warp(pixels, Transform(affine).grid(size, 240), side=240, padding_mode="reflection")
    target = Image.fromarray(warped[0].permute(1, 2, 0).round().byte().numpy())
    points = torch.tensor([[[100.0, 80.0], [150.0, 90.0], [90.0, 140.0], [140.0, 150.0], [120.0, 180.0]]])

    found = match_pair(photo, target, refine="none").transfer(points[0].tolist())

    expected = apply_affine(normalize_points(points, size, 240), invert_affine(affine))
    expected = denormalize_points(expected, size, 240)[0].numpy()
    identity = np.linalg.norm(points[0].numpy() - expected, axis=1).mean()
    error = np.linalg.norm(found - expected, axis=1).mean()
    assert identity > 15  # leaving the points where they are is clearly wrong
    assert error < 0.025 * photo.width


def test_cuts_out_the_animal_and_not_the_meadow():
    result = match_pair(PHOTOS / "cheetah.jpg", data.chelsea())
    mask = result.source_mask
    rows, columns = np.nonzero(mask)
    assert 0.02 < mask.mean() < 0.25
    border = np.concatenate((mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    assert border.mean() < 0.05
    # The cheetah runs in the middle of the image.
    assert abs(rows.mean() / mask.shape[0] - 0.5) < 0.15
    assert abs(columns.mean() / mask.shape[1] - 0.5) < 0.2


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "pf-willow").is_dir(), reason="needs the PF-WILLOW images")
def test_reaches_its_figure_on_pf_willow(tmp_path):
    file = tmp_path / "willow.json"
    assert main(["evaluate", "pf-willow", "--data", str(SHARED / "pf-willow"), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["samples"] == 450
    assert result["metrics"]["pck"]["image"]["0.1"] == pytest.approx(0.847, abs=0.005)
