"""Synthetic pairs: the known transform is the true one, nothing at the border tells it, and seeds repeat."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from small_models import IMAGE_SIZE, seeded, small_model

from macosnet_hf.geometry import (
    identity_affine,
    identity_tps,
    invert_affine,
    make_grid,
    sampling_grid,
    warp,
)
from macosnet_hf.matching import correlate
from macosnet_hf.modeling_macosnet import MaCoSNetModel
from macosnet_hf.training.pretraining import SyntheticObjective
from macosnet_hf.training.synthetic import (
    WarpRange,
    clean_cutouts,
    make_pairs,
    paste_on_others,
    photometric,
    random_affine,
    random_tps,
    random_view,
    soft_ellipse,
)

CPU = torch.device("cpu")
SIDE = 96


def smooth_images(batch: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """`(batch, 3, side, side)` in [0, 1], asymmetric, and smooth enough that bilinear sampling is nearly exact."""
    noise = torch.rand(batch, 3, 6, 6, generator=seeded(seed))
    return torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def dots(batch: int) -> torch.Tensor:
    """A soft bright dot on black, off the centre and in another place in each image."""
    grid = make_grid(SIDE, SIDE)
    centres = torch.tensor([[-0.30, 0.10], [0.25, -0.35], [0.05, 0.30], [0.35, 0.20]])[:batch]
    distance2 = (grid - centres.view(-1, 1, 1, 2)).square().sum(-1)
    return torch.exp(-distance2 / (2 * 0.04**2)).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def centre_of_brightness(images: torch.Tensor) -> torch.Tensor:
    """`(B, 2)` normalised place of the dot: the mean position of the bright pixels around the brightest."""
    grid, places = make_grid(SIDE, SIDE), []
    for image in images.mean(1):
        brightest = grid.reshape(-1, 2)[image.flatten().argmax()]
        near = ((grid - brightest).square().sum(-1) < 0.2**2).float() * image
        places.append((grid * near.unsqueeze(-1)).sum((0, 1)) / near.sum())
    return torch.stack(places)


GENTLE = WarpRange(rotation=0.3, log_scale=0.2, log_aspect=0.1, shear=0.1, translation=0.15, tps_jitter=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_a_dot_at_q_in_the_target_is_at_t_of_q_in_the_source(seed):
    pairs = make_pairs(dots(4), SIDE, GENTLE, seeded(seed), background_swap=0, change_colours=False)
    in_target, in_source = centre_of_brightness(pairs.target), centre_of_brightness(pairs.source)
    mapped = pairs.transform.apply(in_target[:, None])[:, 0]
    assert torch.allclose(mapped, in_source, atol=0.02)
    # The other direction, or leaving out one of the two stages, would be seen.
    assert (in_target - in_source).norm(dim=-1).max() > 0.1
    backwards = pairs.transform.apply(in_source[:, None])[:, 0]
    assert (backwards - in_target).norm(dim=-1).max() > 0.1
    assert (pairs.transform.without_spline().apply(in_target[:, None])[:, 0] - in_source).norm(dim=-1).max() > 0.025


def bilinear(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """One sample by hand; (x, y) in pixels, inside."""
    column, row = min(int(x), SIDE - 2), min(int(y), SIDE - 2)
    u, v = x - column, y - row
    top = (1 - u) * image[:, row, column] + u * image[:, row, column + 1]
    bottom = (1 - u) * image[:, row + 1, column] + u * image[:, row + 1, column + 1]
    return (1 - v) * top + v * bottom


def test_the_target_shows_at_q_what_the_source_shows_at_t_of_q():
    pairs = make_pairs(smooth_images(3), SIDE, WarpRange(), seeded(5), background_swap=0, change_colours=False)
    compared = 0
    for index in range(3):
        for row in range(0, SIDE, 7):
            for column in range(0, SIDE, 7):
                q = torch.tensor([[[2 * column / (SIDE - 1) - 1, 2 * row / (SIDE - 1) - 1]]])
                place = pairs.transform[index : index + 1].apply(q)[0, 0]
                if place.abs().max() >= 1:
                    continue
                x, y = ((place + 1) / 2 * (SIDE - 1)).tolist()
                expected = bilinear(pairs.source[index], x, y)
                assert torch.allclose(pairs.target[index, :, row, column], expected, atol=0.03)
                compared += 1
    assert compared > 200


def test_nothing_outside_the_image_is_filled_with_a_colour_of_its_own():
    """An image of brightness 0.5 to 1: reflection keeps to these, a black, white or grey frame would not."""
    images = 0.5 + smooth_images(6) / 2
    images[:, 0] = 1.0
    far = WarpRange(translation=0.9, log_scale=0.7)
    for seed in range(3):
        pairs = make_pairs(images, SIDE, far, seeded(seed), background_swap=0.5, change_colours=False)
        outside = pairs.transform.apply(make_grid(SIDE, SIDE).reshape(1, -1, 2)).abs().amax(-1) > 1.2
        assert outside.float().mean() > 0.2  # there is much to fill
        for view in (pairs.source, pairs.target):
            assert view.min() >= 0.5 - 1e-5
            assert torch.allclose(view[:, 0], torch.ones(()), atol=1e-5)


def test_no_row_at_the_border_stands_still_as_with_border_padding():
    """Where the frame shows what lies outside the image, neighbouring pixels still differ."""
    noise = torch.rand(4, 3, SIDE, SIDE, generator=seeded(1))
    pairs = make_pairs(noise, SIDE, WarpRange(translation=0.9), seeded(2), background_swap=0, change_colours=False)
    for images in (pairs.source, pairs.target):
        across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean(1)
        down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean(1)
        blocks = torch.nn.functional.avg_pool2d(across[:, :-1] + down[:, :, :-1], 8)
        assert blocks.min() > 0.02


def test_swapped_backgrounds_keep_the_object_and_change_the_rest():
    images = smooth_images(2)
    images[0], images[1] = images[0] * 0.3, 0.7 + images[1] * 0.3
    far = WarpRange(rotation=0.3, log_scale=0.3, translation=0.9)
    kwargs = {"change_colours": False}
    plain = make_pairs(images, SIDE, far, seeded(3), background_swap=0, **kwargs)
    swapped = make_pairs(images, SIDE, far, seeded(3), background_swap=1, **kwargs)
    assert torch.equal(plain.transform.affine, swapped.transform.affine)
    assert torch.equal(plain.transform.tps, swapped.transform.tps)
    assert torch.equal(plain.source, swapped.source)
    # Where the middle of A lies in B the image is the same, in the corners it is the other image's.
    in_source = plain.transform.apply(make_grid(SIDE, SIDE).reshape(1, -1, 2)).unflatten(1, (SIDE, SIDE))
    radius = in_source.norm(dim=-1)
    difference = (plain.target - swapped.target).abs().mean(1)
    assert difference[radius < 0.2].max() < 0.02
    assert difference[radius > 1.4].min() > 0.3


def test_the_same_seed_gives_the_same_pairs_and_another_does_not():
    images = smooth_images(3)
    first, second = (make_pairs(images, SIDE, WarpRange(), seeded(7)) for _ in range(2))
    other = make_pairs(images, SIDE, WarpRange(), seeded(8))
    for name in ("source", "target", "transform.affine", "transform.tps"):
        values = operator.attrgetter(name)
        assert torch.equal(values(first), values(second))
        assert not torch.equal(values(first), values(other))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    make_pairs(images, SIDE, WarpRange(), seeded(7))
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn elsewhere


def test_affine_warps_are_a_rotation_of_a_shear_of_a_scale_within_their_limits():
    limits = WarpRange(rotation=0.3, log_scale=0.45, log_aspect=0.2, shear=0.25, translation=0.35)
    affine = random_affine(2000, limits, seeded(), CPU).double()
    a, b, tx, c, d, ty = affine.unbind(1)
    angle = torch.atan2(c, a)
    scale_x = torch.sqrt(a**2 + c**2)
    # The second column, turned back: (shear * scale_y, scale_y).
    sheared = angle.cos() * b + angle.sin() * d
    scale_y = -angle.sin() * b + angle.cos() * d
    found = {
        "rotation": angle,
        "log_scale": (scale_x * scale_y).log() / 2,
        "log_aspect": (scale_x / scale_y).log() / 2,
        "shear": sheared / scale_y,
        "translation": tx,
    }
    for name, values in found.items():
        limit = getattr(limits, name)
        assert values.abs().max() <= limit * (1 + 1e-5), name
        assert values.max() > 0.98 * limit, name  # the whole range is used, on both sides
        assert values.min() < -0.98 * limit, name
        assert abs(values.mean()) < 0.05 * limit * math.sqrt(2), name
    assert ty.abs().max() <= limits.translation
    assert not torch.equal(tx, ty)


def test_limits_of_zero_give_the_identity():
    nothing = WarpRange(0, 0, 0, 0, 0, 0)
    assert torch.allclose(random_affine(5, nothing, seeded(), CPU), identity_affine(5), atol=1e-7)
    assert torch.equal(random_tps(5, nothing, seeded(), CPU), identity_tps(5))


def test_control_points_move_no_further_than_the_jitter():
    moved = (random_tps(500, WarpRange(tps_jitter=0.2), seeded(), CPU) - identity_tps(500)).abs()
    assert moved.max() <= 0.2
    assert moved.max() > 0.18
    # Each pair has a strength of its own: some hardly bend at all.
    assert moved.amax(1).min() < 0.01


def test_half_of_the_views_are_mirrored_and_all_show_most_of_the_image():
    view = random_view(1000, seeded(), CPU)
    assert 0.4 < (view[:, 0] < 0).float().mean() < 0.6
    assert torch.equal(view[:, 0].abs(), view[:, 4])  # no change of aspect, never upside down
    assert view[:, 4].min() >= 0.75
    assert view[:, 4].max() <= 1.05 + 1e-6
    assert view[:, [2, 5]].abs().max() <= 0.1
    assert (view[:, [1, 3]] == 0).all()


def test_photometric_changes_stay_in_range_and_keep_every_image_to_itself():
    images = smooth_images(8)
    changed = photometric(images, seeded(4))
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed - images).abs().mean(dim=(1, 2, 3)).min() > 0.005
    # What happens to an image does not depend on the others of its batch.
    others = images.clone()
    others[1:] = images[1:].flip(-1)
    assert torch.equal(photometric(others, seeded(4))[0], changed[0])


def test_the_ellipse_is_one_in_the_middle_and_nothing_in_the_corners():
    ellipse = soft_ellipse(200, 61, seeded(), CPU)
    assert ellipse.shape == (200, 1, 61, 61)
    assert ellipse[:, 0, 30, 30].min() > 0.99
    assert ellipse[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.1
    share = ellipse.mean(dim=(1, 2, 3))
    assert share.min() < 0.25
    assert share.max() > 0.55


def test_grid_loss_against_loops():
    from macosnet_hf.training.pretraining import grid_loss

    generator = seeded(3)
    predicted, expected = (torch.randn(2, 5, 2, generator=generator) for _ in range(2))
    weight = torch.rand(2, 5, generator=generator)
    total = weighted = sum_of_weights = 0.0
    for b in range(2):
        for n in range(5):
            dx, dy = (predicted[b, n] - expected[b, n]).tolist()
            distance = math.sqrt(dx * dx + dy * dy + 0.01**2)
            total += distance / 10
            weighted += distance * weight[b, n].item()
            sum_of_weights += weight[b, n].item()
    assert grid_loss(predicted, expected).item() == pytest.approx(total, rel=1e-5)
    assert sum_of_weights > 1
    assert grid_loss(predicted, expected, weight).item() == pytest.approx(weighted / sum_of_weights, rel=1e-5)
    assert grid_loss(predicted, expected, torch.zeros(2, 5)).item() == 0  # nothing in sight: no loss, and no 0/0
    same = predicted.clone().requires_grad_()
    grid_loss(same, predicted).backward()
    assert torch.isfinite(same.grad).all()


class Told(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, correlation):
        self.correlation = correlation
        return self.answer.clone()


def test_the_objective_is_smallest_at_the_true_transforms():
    """Both rows of the batch, (A, B) and (B, A): heads that know the answer have no loss but the epsilon."""
    limits = WarpRange(tps_jitter=0)  # an affine way back exists only without bending
    model = small_model(MaCoSNetModel)
    objective = SyntheticObjective(model, [0.5] * 3, [0.25] * 3, limits, exact_share=1.0, feature_noise=0).eval()
    images = (smooth_images(3, side=IMAGE_SIZE) * 255).to(torch.uint8)
    pairs = make_pairs(images.float() / 255, IMAGE_SIZE, limits, seeded(11))
    affine = pairs.transform.affine

    model.tps_head = Told(identity_tps(6))
    losses = {}
    answers = {
        "swapped": torch.cat((invert_affine(affine), affine)),
        "identity": identity_affine(6),
        "right": torch.cat((affine, invert_affine(affine))),
    }
    for name, answer in answers.items():
        model.affine_head = Told(answer)
        losses[name] = objective(images, seeded(11))
    assert losses["right"]["total"].item() == pytest.approx(0.02, abs=1e-4)
    assert losses["identity"]["affine"] > 0.15
    assert losses["swapped"]["affine"] > 0.3
    # What the heads were shown: S_AB, then S_BA; for the spline with A (then B) warped and encoded again.
    pixels = [(view - 0.5) / 0.25 for view in (pairs.source, pairs.target)]
    with torch.no_grad():
        a, b = (model.encoder(view).normalized for view in pixels)
        warped = warp(torch.cat(pixels), sampling_grid(answers["right"], size=(IMAGE_SIZE, IMAGE_SIZE)))
        again = model.encoder(warped).normalized
        for shown, source in ((model.affine_head, torch.cat((a, b))), (model.tps_head, again)):
            expected = correlate(source, torch.cat((b, a)))
            assert torch.allclose(shown.correlation, expected, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_coordinates_are_exact_where_the_network_is_autocast(precision):
    model, limits = small_model(MaCoSNetModel), WarpRange(tps_jitter=0)
    objective = SyntheticObjective(model, [0.5] * 3, [0.25] * 3, limits).eval()
    images = (smooth_images(3, side=IMAGE_SIZE) * 255).to(torch.uint8)
    affine = make_pairs(images.float() / 255, IMAGE_SIZE, limits, seeded(11)).transform.affine
    model.affine_head, model.tps_head = Told(torch.cat((affine, invert_affine(affine)))), Told(identity_tps(6))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        losses = objective(images, seeded(11))
    assert model.tps_head.correlation.dtype == getattr(torch, precision)  # autocast was at work
    assert losses["total"].item() == pytest.approx(0.02, abs=1e-4)


def test_numbers_drawn_on_the_device_are_those_of_the_seed():
    """On a CPU both ways draw the same."""
    images = (smooth_images(3, side=IMAGE_SIZE) * 255).to(torch.uint8)
    losses = []
    for draw_on_device in (False, True):
        model = small_model(MaCoSNetModel)
        objective = SyntheticObjective(model, [0.5] * 3, [0.25] * 3, WarpRange(), draw_on_device=draw_on_device)
        losses.append(objective(images, seeded(7))["total"])
    assert torch.equal(*losses)


# --- pasted objects ---


def coloured_groups(groups: int = 6, size: int = 64):
    """Pairs of images, each of its own flat grey with a brighter rectangle in red: the object."""
    images = torch.linspace(0.05, 0.6, 2 * groups).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()
    masks = torch.zeros(2 * groups, size, size)
    masks[:, 20:44, 16:40] = 1
    images[:, 0][masks.bool()] = 1.0
    return images, masks


def test_pasted_objects_lie_on_backgrounds_of_other_groups():
    images, masks = coloured_groups()
    greys = images[:, 2, 0, 0]
    pasted, labels = paste_on_others(images, masks, 1.0, torch.Generator().manual_seed(0))
    count = len(images)
    backgrounds = []
    for k in range(count):
        inside = labels[k] > 0.99
        core = -F.max_pool2d(-inside[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
        assert core.any()
        assert pasted[k, 0][core].min() > 0.98  # the object's red
        assert pasted[k, 2][core].sub(greys[k]).abs().max() < 0.02  # and its own blue
        grey = pasted[k, 2][labels[k] == 0].median()
        backgrounds.append(int((greys - grey).abs().argmin()))
        assert abs(float(grey) - float(greys[backgrounds[-1]])) < 0.02
    for k in range(0, count, 2):
        first, second = backgrounds[k] // 2, backgrounds[k + 1] // 2
        assert len({first, second, k // 2}) == 3  # three different groups
    area = labels.mean(dim=(1, 2))
    assert area.max() / area.min() > 2  # many sizes


def test_pasting_leaves_alone_what_is_not_chosen_or_not_clean():
    images, masks = coloured_groups()
    same, labels = paste_on_others(images, masks, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(same, images)
    assert torch.equal(labels, masks)
    masks[3], masks[4] = 1.0, 0.0  # a flood and an empty mask
    masks[5, :, :] = 0
    masks[5, :30, :20] = 1  # cut by the frame
    assert clean_cutouts(masks).tolist() == [k not in (3, 4, 5) for k in range(len(masks))]
    pasted, labels = paste_on_others(images, masks, 1.0, torch.Generator().manual_seed(0))
    for k in (3, 4, 5):
        assert torch.equal(pasted[k], images[k])
        assert torch.equal(labels[k], masks[k])
    few = images[:4], masks[:4]
    assert torch.equal(paste_on_others(*few, 1.0, torch.Generator().manual_seed(0))[0], few[0])
