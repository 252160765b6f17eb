"""Heads and decoder of a trained model on another encoder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import FUSED, random_images, small_model, small_processor

from macosnet_hf.errors import InputError
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching
from macosnet_hf.training.adoption import adopt

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"decoder_inputs": "common", "decoder_rounds": 2, "decoder_input_width": 8}


def images(count: int = 6) -> torch.Tensor:
    pixels = random_images(count)
    return ((1 + pixels / pixels.abs().max()) * 127).to(torch.uint8)


@torch.no_grad()
def test_a_model_with_the_same_encoder_becomes_the_teacher():
    """Then ridge regression has an exact answer: the teacher's own layers."""
    teacher, student = (
        small_model(MaCoSNetForKeypointMatching, seed, **FUSED, **COMMON).requires_grad_(False) for seed in (0, 1)
    )
    student.macosnet.encoder.load_state_dict(teacher.macosnet.encoder.state_dict())
    pairs = random_images(2, seed=5).unsqueeze(0)
    assert (student(pairs).mask_logits - teacher(pairs).mask_logits).abs().max() > 0.1
    adopt(teacher, student, images(40).split(8), [0.5] * 3, [0.25] * 3)
    found, expected = student(pairs), teacher(pairs)
    assert torch.equal(found.affine, expected.affine)
    spread = expected.mask_logits.std()
    assert (found.mask_logits - expected.mask_logits).abs().mean() < 0.05 * spread


@torch.no_grad()
def test_another_encoder_and_size_come_nearer_to_the_teacher():
    teacher = small_model(MaCoSNetForKeypointMatching, **FUSED, **COMMON)
    student = small_model(MaCoSNetForKeypointMatching, 1, **FUSED, **COMMON, image_size=144, predictor_grid=6)
    batch = images(40)
    adopt(teacher, student, batch.split(8), [0.5] * 3, [0.25] * 3)
    for name, value in teacher.macosnet.affine_head.state_dict().items():
        assert torch.equal(student.macosnet.affine_head.state_dict()[name], value)
    assert torch.equal(student.macosnet.decoder.mix[0].weight, teacher.macosnet.decoder.mix[0].weight)
    assert torch.isfinite(student(torch.nn.functional.interpolate(random_images(2), size=144)[None]).keypoints).all()


def test_what_does_not_fit_is_refused():
    paper = small_model(MaCoSNetForKeypointMatching)
    with pytest.raises(InputError, match="decoder_inputs='common'"):
        adopt(paper, paper, [images()], [0.5] * 3, [0.25] * 3)
    teacher = small_model(MaCoSNetForKeypointMatching, **COMMON)
    wider = small_model(MaCoSNetForKeypointMatching, **COMMON, decoder_widths=[12, 10, 8, 6])
    with pytest.raises(InputError, match="same settings"):
        adopt(teacher, wider, [images()], [0.5] * 3, [0.25] * 3)
    with pytest.raises(InputError, match="no image"):
        adopt(teacher, small_model(MaCoSNetForKeypointMatching, 1, **COMMON), [], [0.5] * 3, [0.25] * 3)


def test_the_script_writes_a_model(tmp_path):
    small_model(MaCoSNetForKeypointMatching, **COMMON).save_pretrained(tmp_path / "teacher")
    small_processor().save_pretrained(tmp_path / "teacher")
    (tmp_path / "images" / "thing").mkdir(parents=True)
    for number, pixels in enumerate(images(3)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "images" / "thing" / f"{number}.png")
    words = ["--model_name_or_path", tmp_path / "teacher", "--dataset_name", tmp_path / "images", "--preset", "nothing"]
    command = [sys.executable, ROOT / "training" / "adopt.py", *words, "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 2
    assert "There is no preset 'nothing'" in done.stderr
    assert not (tmp_path / "out").exists()
