"""What must hold for every input, not only for those that somebody thought of: hypothesis looks for the exception.

Everything about coordinates is asked in float64, so that a tolerance is about rounding and never about the claim; what
float32 and the whole network keep of it has tolerances of its own, which `docs/reliability.md` states.
"""

import contextlib
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from real_photos import CHEETAH, LION, TOWER
from small_models import random_images, small_model, transforms_of

from macosnet_hf import DEFAULT_CHECKPOINT, geometry
from macosnet_hf.errors import DataError, InputError
from macosnet_hf.evaluation import metrics
from macosnet_hf.evaluation.scoring import Tally
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor
from macosnet_hf.matching import match_locally
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel, MaCoSNetModelOutput, ordered_pairs
from macosnet_hf.training import losses

# How many times as many examples to try as the suite does; with more than 1, others in every run.
THOROUGHNESS = int(os.environ.get("PROPERTY_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """In the suite the same ones in every run: tests that fail now and then are not believed when they fail."""
    return settings(
        max_examples=count * THOROUGHNESS,
        deadline=None,
        derandomize=THOROUGHNESS == 1,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


seeds = st.integers(0, 2**31 - 1)
sides = st.integers(1, 9)
regularizations = st.sampled_from([0.0, 1e-3, 0.1, 10.0])
# From hardly warped to folded several times over.
spreads = st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def random_affine(count: int, seed: int, spread: float) -> torch.Tensor:
    return geometry.identity_affine(count, dtype=torch.float64) + spread * randn(count, 6, seed=seed)


def random_tps(count: int, seed: int, spread: float) -> torch.Tensor:
    return geometry.identity_tps(count, dtype=torch.float64) + spread * randn(count, 18, seed=seed + 1)


def random_points(count: int, number: int, seed: int) -> torch.Tensor:
    return 1.5 * randn(count, number, 2, seed=seed + 2)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Up to a tolerance relative to the largest number (a sum's rounding follows its largest term)."""
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(actual, expected, atol=tolerance * scale, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Mirrors and transposition: what they do to points, images and transforms
# ---------------------------------------------------------------------------------------------------------------------

# As 2x2 matrices on (x, y). Each is its own inverse, so that T becomes S T S in mirrored coordinates.
SYMMETRIES = {"x": [[-1.0, 0.0], [0.0, 1.0]], "y": [[1.0, 0.0], [0.0, -1.0]], "transposed": [[0.0, 1.0], [1.0, 0.0]]}


def on_points(name: str, points: torch.Tensor) -> torch.Tensor:
    return points @ torch.tensor(SYMMETRIES[name], dtype=points.dtype)


def on_image(name: str, image: torch.Tensor) -> torch.Tensor:
    """`(..., H, W)`."""
    return image.transpose(-1, -2) if name == "transposed" else image.flip(-1 if name == "x" else -2)


def on_affine(name: str, affine: torch.Tensor) -> torch.Tensor:
    (a, b), (c, d) = SYMMETRIES[name]
    symmetry = torch.tensor([a, b, 0, c, d, 0], dtype=affine.dtype)
    return geometry.compose_affine(symmetry, geometry.compose_affine(affine, symmetry))


def on_tps(name: str, tps: torch.Tensor) -> torch.Tensor:
    """The control point that rests at S c moves to S (where c moved)."""
    resting = geometry.control_points(dtype=tps.dtype)
    order = [int((resting == on_points(name, place)).all(-1).nonzero()) for place in resting]
    moved = tps.unflatten(-1, (2, 9)).transpose(-1, -2)[..., order, :]
    return on_points(name, moved).transpose(-1, -2).flatten(-2)


def on_correlation(name: str, correlation: torch.Tensor) -> torch.Tensor:
    """`(..., h*w, h, w)`; the channels are positions as well."""
    height, width = correlation.shape[-2:]
    positions = on_image(name, correlation.flatten(-2).transpose(-1, -2).unflatten(-1, (height, width)))
    return on_image(name, positions.flatten(-2).transpose(-1, -2).unflatten(-1, (height, width)))


def on_outputs(name: str, outputs: MaCoSNetModelOutput) -> MaCoSNetModelOutput:
    return MaCoSNetModelOutput(
        affine=on_affine(name, outputs.affine),
        tps=on_tps(name, outputs.tps),
        correlation=on_correlation(name, outputs.correlation),
        mask_logits=on_image(name, outputs.mask_logits),
        features=on_image(name, outputs.features),
    )


symmetries = st.sampled_from(sorted(SYMMETRIES))


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates and transforms
# ---------------------------------------------------------------------------------------------------------------------


@examples(60)
@given(seeds, st.integers(1, 5000), st.integers(1, 5000))
def test_pixels_and_normalised_coordinates_undo_each_other(seed, height, width):
    points = random_points(3, 5, seed)
    pixels = geometry.denormalize_points(points, (height, width), 240)
    assert_close(geometry.normalize_points(pixels, (height, width), 240), points)
    mirrored = geometry.denormalize_points(on_points("x", points), (height, width), 240)
    assert_close(mirrored[..., 0], width - 1 - pixels[..., 0])


@examples(60)
@given(seeds, spreads)
def test_affine_transforms_form_a_group(seed, spread):
    first, second, third = (random_affine(4, seed + k, spread) for k in range(3))
    points = random_points(4, 7, seed)
    both = geometry.compose_affine(first, second)
    assert_close(
        geometry.apply_affine(points, both), geometry.apply_affine(geometry.apply_affine(points, second), first)
    )
    assert_close(
        geometry.compose_affine(both, third), geometry.compose_affine(first, geometry.compose_affine(second, third))
    )
    identity = geometry.identity_affine(4, dtype=torch.float64)
    assert torch.equal(geometry.compose_affine(first, identity), first)
    assert torch.equal(geometry.compose_affine(identity, first), first)


@examples(60)
@given(seeds, spreads)
def test_the_inverse_undoes_a_map_from_both_sides_and_of_a_composition_in_reverse_order(seed, spread):
    first, second = random_affine(4, seed, spread), random_affine(4, seed + 1, spread)
    for affine in (first, second):
        assume(float(torch.linalg.cond(affine.unflatten(-1, (2, 3))[..., :2]).max()) < 1e4)
    identity = geometry.identity_affine(4, dtype=torch.float64)
    inverse, other = geometry.invert_affine(first), geometry.invert_affine(second)
    assert_close(geometry.compose_affine(inverse, first), identity, 1e-7)
    assert_close(geometry.compose_affine(first, inverse), identity, 1e-7)
    assert_close(geometry.invert_affine(inverse), first, 1e-7)
    assert_close(
        geometry.invert_affine(geometry.compose_affine(first, second)), geometry.compose_affine(other, inverse), 1e-7
    )


@examples(60)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6))
def test_an_affine_map_is_inverted_to_numbers_or_refused(parameters):
    affine = torch.tensor([parameters], dtype=torch.float64)
    with contextlib.suppress(InputError):
        assert torch.isfinite(geometry.invert_affine(affine)).all()


@examples(40)
@given(seeds, regularizations)
def test_identity_gives_the_identity(seed, regularization):
    points = random_points(3, 6, seed)
    affine, tps = geometry.identity_affine(3, dtype=torch.float64), geometry.identity_tps(3, dtype=torch.float64)
    assert torch.equal(geometry.apply_affine(points, affine), points)
    assert_close(geometry.apply_tps(points, tps, regularization=regularization), points)
    assert_close(geometry.apply_cascade(points, affine, tps, regularization=regularization), points)


@examples(60)
@given(seeds, spreads, regularizations)
def test_a_spline_is_linear_in_its_control_points_and_follows_an_affine_map_of_them(seed, spread, regularization):
    """So the cascade, affine after spline, is the spline whose control points went through the affine."""
    points, affine = random_points(3, 6, seed), random_affine(3, seed, spread)
    one, other = random_tps(3, seed, spread), random_tps(3, seed + 9, spread)
    carry = [geometry.apply_tps(points, tps, regularization=regularization) for tps in (one, other, (one + other) / 2)]
    assert_close((carry[0] + carry[1]) / 2, carry[2])
    moved = geometry.apply_affine(one.unflatten(-1, (2, 9)).transpose(-1, -2), affine).transpose(-1, -2).flatten(-2)
    assert_close(
        geometry.apply_cascade(points, affine, one, regularization=regularization),
        geometry.apply_tps(points, moved, regularization=regularization),
    )


@examples(60)
@given(seeds, spreads, regularizations, symmetries)
def test_transforms_commute_with_mirrors_and_transposition(seed, spread, regularization, name):
    points = random_points(3, 6, seed)
    affine, tps = random_affine(3, seed, spread), random_tps(3, seed, spread)
    assert_close(
        geometry.apply_cascade(
            on_points(name, points), on_affine(name, affine), on_tps(name, tps), regularization=regularization
        ),
        on_points(name, geometry.apply_cascade(points, affine, tps, regularization=regularization)),
    )


@examples(60)
@given(seeds, spreads, sides, sides, sides, sides, symmetries, st.sampled_from(["zeros", "border", "reflection"]))
def test_warping_commutes_with_mirrors_and_transposition(seed, spread, height, width, rows, columns, name, padding):
    assume(padding != "reflection" or min(height, width) > 1)  # there is nothing to reflect in a single pixel
    image = randn(2, 3, height, width, seed=seed)
    affine, tps = random_affine(2, seed, spread), random_tps(2, seed, spread)
    warped = geometry.warp(image, geometry.sampling_grid(affine, tps, size=(rows, columns)), padding_mode=padding)
    size = (columns, rows) if name == "transposed" else (rows, columns)
    grid = geometry.sampling_grid(on_affine(name, affine), on_tps(name, tps), size=size)
    assert_close(geometry.warp(on_image(name, image), grid, padding_mode=padding), on_image(name, warped))


@examples(60)
@given(seeds, sides, sides, st.sampled_from(["bilinear", "nearest"]), st.booleans())
def test_the_identity_warps_an_image_on_to_itself(seed, height, width, mode, spline):
    image = randn(2, 3, height, width, seed=seed)
    tps = geometry.identity_tps(2, dtype=torch.float64) if spline else None
    grid = geometry.sampling_grid(geometry.identity_affine(2, dtype=torch.float64), tps, size=(height, width))
    # To the centres of the border pixels, rounding may step over the border by an ulp: one ulp of the pixel is lost.
    assert_close(geometry.warp(image, grid, mode=mode), image, 1e-9 if mode == "bilinear" else 0.0)


@examples(40)
@given(seeds, st.integers(2, 9), st.integers(2, 9), st.sampled_from([0.01, 0.05, 0.1]))
def test_warping_twice_is_warping_once_through_the_composition(seed, height, width, spread):
    """Exact for a ramp, which bilinear sampling reproduces, as long as nothing leaves the image."""
    ramp = geometry.make_grid(height, width, dtype=torch.float64).permute(2, 0, 1).expand(2, -1, -1, -1)
    shrink = torch.tensor([0.5, 1, 1, 1, 0.5, 1], dtype=torch.float64)
    outer, inner = (shrink * random_affine(2, seed + k, spread) for k in (0, 1))
    grids = [
        geometry.sampling_grid(affine, size=(height, width))
        for affine in (outer, inner, geometry.compose_affine(outer, inner))
    ]
    assume(all(bool(geometry.inside(grid).all()) for grid in grids))
    assert_close(geometry.warp(geometry.warp(ramp, grids[0]), grids[1]), geometry.warp(ramp, grids[2]))


@examples(60)
@given(seeds, sides, sides, st.sampled_from([0.0, 0.3, 1.0, 30.0]), st.sampled_from(["zeros", "border", "reflection"]))
def test_warping_never_leaves_the_range_of_the_image(seed, height, width, spread, padding):
    assume(padding != "reflection" or min(height, width) > 1)
    image = randn(2, 1, height, width, seed=seed).sigmoid()
    grid = geometry.sampling_grid(random_affine(2, seed, spread), random_tps(2, seed, spread), size=(7, 6))
    warped = geometry.warp(image, grid, padding_mode=padding)
    lowest = 0.0 if padding == "zeros" else float(image.min())
    assert float(warped.min()) >= lowest - 1e-12
    assert float(warped.max()) <= float(image.max()) + 1e-12


@examples(60)
@given(seeds, spreads)
def test_the_share_of_folds_does_not_change_by_turning_nor_by_a_mirror(seed, spread):
    affine, tps = random_affine(3, seed, spread), random_tps(3, seed, spread)
    share = geometry.folded(geometry.Transform(affine, tps, 0.0))
    assert ((share >= 0) & (share <= 1)).all()
    if spread == 0:
        assert (share == 0).all()
    mirror = torch.tensor([-1.0, 0, 0, 0, 1, 0], dtype=torch.float64)
    assert_close(geometry.folded(geometry.Transform(geometry.compose_affine(mirror, affine), tps, 0.0)), share, 1e-6)
    transposed = geometry.folded(geometry.Transform(on_affine("transposed", affine), on_tps("transposed", tps), 0.0))
    assert_close(transposed, share, 1e-6)  # shares are in float32
    angle = randn(1, seed=seed + 5)
    turn = torch.stack((angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle), dim=-1)
    assert_close(geometry.folded(geometry.Transform(geometry.compose_affine(turn, affine), tps, 0.0)), share, 1e-6)


@examples(20)
@given(seeds, symmetries)
def test_local_matching_commutes_with_mirrors_and_transposition(seed, name):
    source, target = (F.normalize(randn(2, 4, 5, 6, seed=seed + k).float(), dim=1) for k in (0, 1))
    points, affine = random_points(2, 4, seed).float(), random_affine(2, seed, 0.1).float()
    tps = random_tps(2, seed, 0.1).float()
    moved = match_locally(source, target, points, geometry.Transform(affine, tps, 0.1))
    mirrored = match_locally(
        on_image(name, source),
        on_image(name, target),
        on_points(name, points),
        geometry.Transform(on_affine(name, affine), on_tps(name, tps), 0.1),
    )
    assert_close(mirrored, on_points(name, moved), 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

SIDE, PIXELS, CHANNELS = 4, 12, 5

LOSSES = {
    "matching": losses.matching_loss,
    "matching, not guided": lambda o, t, **k: losses.matching_loss(o, t, mask_guided=False, **k),
    "cycle": lambda o, t, **k: losses.cycle_loss(t, **k),
    "cycle, squared": lambda o, t, **k: losses.cycle_loss(t, squared=True, **k),
    "transitivity": lambda o, t, **k: losses.transitivity_loss(t, **k),
    "contrast": lambda o, t, **k: losses.contrastive_loss(o, **k),
    "consistency": losses.consistency_loss,
}
# What a decoder may say of a pixel: unsure, sure, and so sure that nothing but the sign is left.
LOGITS = (0.0, 1e-30, 1.0, 12.0, 100.0, 1e4, 1e30)
MASKS = ("random", "empty", "full", "one pixel", "alternating", "mixed")
TRANSFORMS = ("random", "identity", "collapsed", "folded", "mirrored", "far", "huge")


def drawn_logits(kind: str, size: float, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = randn(*shape, seed=seed)
    if kind == "random":
        return size * noise
    if kind == "mixed":
        choice = torch.randint(len(LOGITS), shape, generator=generator(seed))
        return torch.tensor(LOGITS, dtype=torch.float64)[choice] * noise.sign()
    logits = torch.full(shape, -size, dtype=torch.float64)
    if kind == "full":
        logits = -logits
    elif kind == "one pixel":
        logits[..., 0, 0] = size
    elif kind == "alternating":  # of every pair, one mask empty and the other full
        logits[:, 1::2] = size
    return logits


def drawn_transforms(kind: str, pairs: int, seed: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    spread = {"random": 0.2, "identity": 0.0, "collapsed": 0.0, "folded": 2.0}.get(kind, 0.1)
    affine, tps = (
        make(batch * pairs, seed, spread).unflatten(0, (batch, pairs)) for make in (random_affine, random_tps)
    )
    if kind == "collapsed":
        affine, tps = torch.zeros_like(affine), torch.zeros_like(tps)
    elif kind == "mirrored":
        affine = affine * torch.tensor([-1.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    elif kind == "far":
        affine = affine + 1e3
    elif kind == "huge":
        affine, tps = affine * 1e3, tps * 1e3
    return affine, tps


def drawn_outputs(views: int, mask: str, size: float, transform: str, seed: int, batch: int = 2) -> MaCoSNetModelOutput:
    pairs = views * (views - 1)
    affine, tps = drawn_transforms(transform, pairs, seed, batch)
    correlation = F.normalize(randn(batch, pairs, SIDE**2, SIDE, SIDE, seed=seed).clamp(min=0), dim=2)
    return MaCoSNetModelOutput(
        affine=affine,
        tps=tps,
        correlation=correlation,
        mask_logits=drawn_logits(mask, size, (batch, pairs, PIXELS, PIXELS), seed),
        features=F.normalize(randn(batch, views, CHANNELS, SIDE, SIDE, seed=seed), dim=2),
    )


def in_float32(outputs: MaCoSNetModelOutput) -> MaCoSNetModelOutput:
    return MaCoSNetModelOutput(**{name: value.float() for name, value in outputs.items()})


def chosen(outputs: MaCoSNetModelOutput, index: list[int]) -> MaCoSNetModelOutput:
    return MaCoSNetModelOutput(**{name: value[index] for name, value in outputs.items()})


# Per-channel statistics that are not taken from the batch, so that a sample's loss is its own.
STATISTICS = (torch.zeros(CHANNELS, dtype=torch.float64), torch.full((CHANNELS,), 0.4, dtype=torch.float64))


def values_of(name: str, outputs: MaCoSNetModelOutput) -> torch.Tensor:
    """One value per sample."""
    statistics = {"statistics": STATISTICS} if name == "contrast" else {}
    return LOSSES[name](outputs, transforms_of(outputs), reduction="none", **statistics)


@pytest.mark.parametrize("name", LOSSES)
@examples(40)
@given(seeds, st.sampled_from(MASKS), st.sampled_from(LOGITS), st.sampled_from(TRANSFORMS), st.sampled_from([0.0, 0.1]))
def test_losses_and_their_gradients_are_finite(name, seed, mask, size, transform, regularization):
    outputs = in_float32(drawn_outputs(3, mask, size, transform, seed))
    fields = ("affine", "tps", "correlation", "mask_logits")
    for field in fields:
        outputs[field] = outputs[field].requires_grad_()
    loss = LOSSES[name](outputs, transforms_of(outputs, regularization))
    assert torch.isfinite(loss)
    loss.backward()
    for field in fields:
        assert outputs[field].grad is None or torch.isfinite(outputs[field].grad).all(), field


@pytest.mark.parametrize("name", LOSSES)
@examples(15)
@given(seeds, st.sampled_from(MASKS), st.sampled_from(TRANSFORMS), st.permutations(range(3)))
def test_losses_of_a_sample_do_not_know_its_batch(name, seed, mask, transform, order):
    outputs = drawn_outputs(3, mask, 3.0, transform, seed, batch=3)
    together = values_of(name, outputs)
    assert_close(values_of(name, chosen(outputs, order)), together[order], 1e-12)
    for number in range(3):
        assert_close(values_of(name, chosen(outputs, [number])), together[[number]], 1e-12)
    if name != "contrast":
        assert_close(LOSSES[name](outputs, transforms_of(outputs)), together.mean(), 1e-12)


@pytest.mark.parametrize("name", LOSSES)
@examples(15)
@given(seeds, st.sampled_from(MASKS), st.permutations(range(3)))
def test_losses_do_not_know_which_view_is_called_the_first(name, seed, mask, order):
    outputs = drawn_outputs(3, mask, 3.0, "random", seed)
    index = {pair: p for p, pair in enumerate(ordered_pairs(3))}
    moved = [index[order[i], order[j]] for i, j in ordered_pairs(3)]
    renamed = {key: value[:, moved] for key, value in outputs.items() if key != "features"}
    renamed = MaCoSNetModelOutput(features=outputs.features[:, order], **renamed)
    assert_close(values_of(name, renamed), values_of(name, outputs))


@pytest.mark.parametrize("name", LOSSES)
@examples(20)
@given(seeds, st.sampled_from(MASKS), st.sampled_from(["random", "folded"]), symmetries)
def test_losses_are_the_same_in_a_mirror(name, seed, mask, transform, symmetry):
    """All images mirrored or transposed, with everything that is known about them."""
    outputs = drawn_outputs(3, mask, 3.0, transform, seed)
    # A fold throws points far out, where a cycle carries them on in powers: what is compared is the rounding of that.
    assert_close(values_of(name, on_outputs(symmetry, outputs)), values_of(name, outputs), 1e-7)


@examples(20)
@given(seeds, st.sampled_from(MASKS), st.sampled_from(TRANSFORMS))
def test_losses_do_not_depend_on_the_memory_layout(seed, mask, transform):
    outputs = drawn_outputs(3, mask, 3.0, transform, seed)
    strided = MaCoSNetModelOutput(
        **{name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in outputs.items()}
    )
    assert not strided.mask_logits.is_contiguous()
    for name in LOSSES:
        assert_close(values_of(name, strided), values_of(name, outputs), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The network: batch, order, memory layout, threads
# ---------------------------------------------------------------------------------------------------------------------

FIELDS = ("affine", "tps", "correlation", "mask_logits", "features", "keypoints")


@contextlib.contextmanager
def computing_on(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fields_of(model, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        outputs = model(images)
    found = {name: outputs[name] for name in FIELDS if name in outputs}
    # A logit's own size says nothing: what is used is the probability.
    return {**found, "mask_logits": outputs.mask_logits.sigmoid()}


def assert_fields_close(actual, expected, tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: name + text)


def other_layouts(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers, otherwise in memory."""
    padded = F.pad(images, (1, 2, 3, 1))[..., 3:-1, 1:-2]
    colours_last = images.movedim(-3, -1).contiguous().movedim(-1, -3)
    return {"a window of a larger tensor": padded, "colours last": colours_last}


@pytest.mark.parametrize("cascade", ["exact", "features"])
@pytest.mark.parametrize("views", [2, 3])
def test_the_network_does_not_depend_on_batch_order_layout_or_threads(views, cascade):
    model = small_model(MaCoSNetModel, cascade=cascade)
    images = random_images(5, views)
    expected = fields_of(model, images)
    order = [3, 0, 4, 2, 1]
    assert_fields_close(fields_of(model, images[order]), {name: value[order] for name, value in expected.items()}, 2e-5)
    for some in ([2], [1, 4], [0, 1, 2]):
        assert_fields_close(
            fields_of(model, images[some]), {name: value[some] for name, value in expected.items()}, 2e-5
        )
    for layout in other_layouts(images).values():
        assert not layout.is_contiguous()
        assert_fields_close(fields_of(model, layout), expected, 2e-5)
    with computing_on(2):
        assert_fields_close(fields_of(model, images), expected, 2e-5)
    # `to` works in place, so this comes last.
    assert_fields_close(fields_of(model.to(memory_format=torch.channels_last), images), expected, 2e-5)


def example_images() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in (CHEETAH, LION, TOWER)]


@pytest.fixture(scope="module")
def checkpoint():
    model = MaCoSNetForKeypointMatching.from_pretrained(DEFAULT_CHECKPOINT).eval()
    return model, MaCoSNetImageProcessor.from_pretrained(DEFAULT_CHECKPOINT)


def test_the_checkpoint_s_points_and_masks_do_not_depend_on_batch_order_layout_or_threads(checkpoint):
    """On real images, in the units of a user: hundredths of a pixel, and thousandths of a probability."""
    model, processor = checkpoint
    first, second, third = example_images()
    pairs = [[first, second], [second, third], [third, first]]
    inputs = processor(pairs, return_tensors="pt")["pixel_values"]
    sizes = torch.tensor([[[photo.height, photo.width] for photo in pair] for pair in pairs])
    points = torch.rand(len(pairs), 9, 2, generator=generator(1)) * (sizes[:, :1].flip(-1) - 1)

    def answer(index: list[int], pixels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            outputs = model(inputs[index] if pixels is None else pixels)
            return (
                model.transfer_points(outputs, points[index], sizes[index], "source_to_target"),
                outputs.mask_logits.sigmoid(),
            )

    def assert_same(found, index: list[int]) -> None:
        torch.testing.assert_close(found[0], expected[0][index], atol=0.02, rtol=0)
        torch.testing.assert_close(found[1], expected[1][index], atol=1e-3, rtol=0)

    everything = list(range(len(pairs)))
    expected = answer(everything)
    order = [2, 0, 1]
    assert_same(answer(order), order)
    for number in (0, 2):
        assert_same(answer([number]), [number])
    for layout in other_layouts(inputs).values():
        assert_same(answer(everything, layout), everything)
    with computing_on(2):  # of one pair: threads that wait for each other on a busy machine are slow
        assert_same(answer([1]), [1])
    model.to(memory_format=torch.channels_last)
    try:
        assert_same(answer(everything), everything)
    finally:
        model.to(memory_format=torch.contiguous_format)


def test_preparing_images_does_not_depend_on_the_batch_or_on_how_they_are_given(checkpoint):
    processor = checkpoint[1]
    photos = example_images()
    together = processor([photos[:2], photos[1:]], return_tensors="pt")["pixel_values"]
    for number, pair in enumerate((photos[:2], photos[1:])):
        assert torch.equal(processor(pair, return_tensors="pt")["pixel_values"], together[[number]])
        arrays = [np.asarray(photo) for photo in pair]
        assert torch.equal(processor(arrays, return_tensors="pt")["pixel_values"], together[[number]])
        columns_first = [np.asfortranarray(array) for array in arrays]
        assert torch.equal(processor(columns_first, return_tensors="pt")["pixel_values"], together[[number]])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

# Whole numbers of pixels: distances and boxes are then the same to the bit, however the points are moved.
pixel = st.integers(0, 400).map(float)
point = st.tuples(pixel, pixel)
point_pairs = st.lists(st.tuples(point, point), min_size=2, max_size=12)
protocols = st.sampled_from(metrics.PCK_PROTOCOLS)
alphas = st.sampled_from([0.01, 0.05, 0.1, 0.15, 0.5, 1.0])
anything = st.floats(allow_nan=True, allow_infinity=True)


def errors_of(predicted, truth, protocol, size=(320, 401), **options) -> metrics.KeypointErrors:
    return metrics.keypoint_errors(np.array(predicted), np.array(truth), protocol, size=size, **options)


def has_extent(truth) -> bool:
    return len(set(truth)) > 1


@examples(80)
@given(point_pairs, protocols, st.randoms(use_true_random=False))
def test_pck_is_a_share_grows_with_alpha_and_does_not_know_the_order_of_points(pairs, protocol, random):
    predicted, truth = zip(*pairs, strict=True)
    assume(has_extent(truth))
    result = errors_of(predicted, truth, protocol)
    shares = [result.pck(alpha) for alpha in (0.0, 0.05, 0.1, 0.5, 1.0, 3.0)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)
    shuffled = random.sample(pairs, len(pairs))
    again = errors_of(*zip(*shuffled, strict=True), protocol)
    assert sorted(again.errors) == sorted(result.errors)
    assert again.length == result.length
    assert errors_of(truth, truth, protocol).pck(0.0) == 1


@examples(60)
@given(point_pairs, alphas, st.integers(-300, 300), st.sampled_from([0.25, 2.0, 8.0]))
def test_pck_bbox_does_not_change_when_the_image_is_moved_scaled_or_mirrored(pairs, alpha, shift, factor):
    predicted, truth = (np.array(points) for points in zip(*pairs, strict=True))
    assume(has_extent(list(map(tuple, truth))))
    share = errors_of(predicted, truth, "bbox").pck(alpha)
    every = np.ones(len(truth), dtype=bool)  # a point that is moved to (-1, -1) is a point all the same
    for change in (lambda p: p + shift, lambda p: p * factor, lambda p: p[:, ::-1], lambda p: 400 - p):
        assert errors_of(change(predicted), change(truth), "bbox", valid=every).pck(alpha) == share


@examples(60)
@given(point_pairs, alphas, st.sampled_from([0.5, 2.0, 4.0]), st.sampled_from([0.5, 1.0, 8.0]))
def test_pck_image_does_not_change_when_an_image_is_resized(pairs, alpha, tall, wide):
    predicted, truth = (np.array(points) for points in zip(*pairs, strict=True))
    factor = np.array([wide, tall])
    share = errors_of(predicted, truth, "image", size=(320, 400)).pck(alpha)
    resized = errors_of(predicted * factor, truth * factor, "image", size=(320 * tall, 400 * wide))
    assert resized.pck(alpha) == share


@examples(80)
@given(st.lists(st.tuples(*[anything] * 4), min_size=1, max_size=5), protocols, st.booleans())
def test_pck_of_anything_is_a_share_or_refused(rows, protocol, all_valid):
    """Annotations and predictions with infinities and worse."""
    table = np.array(rows, dtype=np.float64)
    with contextlib.suppress(DataError), np.errstate(over="ignore", invalid="ignore"):
        options = {"valid": np.ones(len(table), dtype=bool)} if all_valid else {}
        result = errors_of(table[:, :2], table[:, 2:], protocol, **options)
        assert 0 <= result.pck(0.1) <= 1
        assert 0 < result.length < np.inf


masks = st.tuples(seeds, st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))


def drawn_mask(seed: int, height: int, width: int, share: float, salt: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, salt]).random((height, width)) < share


@examples(80)
@given(masks, st.sampled_from([0.0, 0.3, 1.0]))
def test_mask_metrics_stay_in_range_and_do_not_know_the_order_of_pixels(drawn, share):
    truth, predicted = drawn_mask(*drawn), drawn_mask(*drawn[:3], share, salt=1)
    p, j = metrics.precision(predicted, truth), metrics.jaccard(predicted, truth)
    assert 0 <= p <= 1
    assert (j is None) == (not truth.any())
    assert j is None or 0 <= j <= 1
    order = np.random.default_rng(drawn[0]).permutation(truth.size)
    shuffled = [mask.flatten()[order].reshape(mask.shape[::-1]) for mask in (predicted, truth)]
    assert (metrics.precision(*shuffled), metrics.jaccard(*shuffled)) == (p, j)
    # Both compare two sets of pixels, neither of which comes first.
    assert metrics.precision(truth, predicted) == p
    if truth.any() and predicted.any():
        assert metrics.jaccard(truth, predicted) == j
    assert metrics.precision(~predicted, ~truth) == p
    assert metrics.precision(truth, truth) == 1
    assert metrics.jaccard(truth, truth) == (1.0 if truth.any() else None)


def own_places(height: int, width: int) -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack((columns, rows), axis=-1).astype(np.float64)


@examples(60)
@given(masks, st.floats(0, 400))
def test_transferred_labels_stay_in_range_and_the_identity_transfers_everything(drawn, spread):
    source, target = drawn_mask(*drawn), drawn_mask(*drawn[:3], 0.5, salt=1)
    height, width = source.shape
    rng = np.random.default_rng(drawn[0])
    places = own_places(height, width) + spread * rng.standard_normal((height, width, 2))
    places[rng.random((height, width)) < 0.1] = rng.choice([np.nan, np.inf, -np.inf, 1e300])
    accuracy, overlap = metrics.label_transfer(source, target, places)
    assert 0 <= accuracy <= 1
    assert overlap is None or 0 <= overlap <= 1
    assert (metrics.transfer_mask(source, own_places(height, width)) == source).all()
    # The same question about transposed images has the same answer.
    flipped = metrics.label_transfer(source.T, target.T, places.transpose(1, 0, 2)[..., ::-1])
    assert flipped == (accuracy, overlap)


@examples(60)
@given(masks, st.sampled_from([0.0, 1.0, 30.0]), alphas)
def test_flow_errors_are_finite_and_the_same_in_transposed_images(drawn, spread, alpha):
    mask = drawn_mask(*drawn)
    rng = np.random.default_rng(drawn[0])
    flow = rng.integers(-9, 9, (*mask.shape, 2)).astype(np.float64)
    flow[rng.random(mask.shape) < 0.2] = rng.choice([1e9, 1e10, np.nan, np.inf])
    places = own_places(*mask.shape) + np.where(metrics.valid_flow(flow)[..., None], flow, 0.0)
    places = places + np.round(spread * rng.standard_normal(places.shape))
    assume((metrics.valid_flow(flow) & mask).any())
    result = metrics.flow_errors(places, flow, mask, (40, 60))
    assert np.isfinite(result.errors).all()
    assert 0 <= result.pck(alpha) <= 1
    if spread == 0:
        assert result.pck(0.0) == 1
    transposed = [array.transpose(1, 0, 2)[..., ::-1] for array in (places, flow)]
    again = metrics.flow_errors(*transposed, mask.T, (60, 40))
    assert sorted(again.errors) == sorted(result.errors)
    assert again.length == result.length


METRICS = ("pck.bbox.0.1", "pck_per_point.bbox.0.1", "precision", "jaccard")
sample = st.tuples(st.sampled_from("abc"), st.fixed_dictionaries(dict.fromkeys(METRICS, st.integers(0, 8))))


def tally_of(samples) -> Tally:
    tally = Tally()
    for class_name, scores in samples:
        # Jaccard is undefined for some samples, as for an image without an object.
        tally.add(class_name, {k: (v / 8, 1.0) for k, v in scores.items() if k != "jaccard" or v > 2})
    return tally


@examples(60)
@given(st.lists(sample, min_size=1, max_size=20), st.randoms(use_true_random=False), st.integers(0, 20))
def test_means_stay_in_range_and_do_not_know_order_or_the_number_of_processes(samples, random, cut):
    tally = tally_of(samples)
    overall = tally.overall()
    assert set(overall) >= set(METRICS[:-1])
    assert all(0 <= value <= 1 for value in overall.values())
    for row in tally.class_means().values():
        assert all(0 <= value <= 1 for value in row.values())
    shuffled = tally_of(random.sample(samples, len(samples)))
    halves = tally_of(samples[:cut])
    halves.merge(tally_of(samples[cut:]))
    for other in (shuffled, halves):
        assert other.class_means() == tally.class_means()
        assert other.overall() == pytest.approx(overall, abs=1e-12)
