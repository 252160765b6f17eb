"""Both transforms of a pair, fitted to the matches on which its two directions agree."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import IMAGE_SIZE, small_config, small_model

from macosnet_hf import geometry
from macosnet_hf.commands.main import main
from macosnet_hf.matching import fit_mutually, match_locally
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

REGULARIZATION = 0.1
SIDE = 9


def some_transforms(count, seed=0, bend=0.1):
    """T_AB and T_BA of pairs, `(count, 2)`, which are not each other's inverse."""
    generator = torch.Generator().manual_seed(seed)
    affine = geometry.identity_affine(count, 2) + 0.1 * torch.randn(count, 2, 6, generator=generator)
    tps = geometry.identity_tps(count, 2) + bend * torch.randn(count, 2, 18, generator=generator)
    return geometry.Transform(affine, tps, REGULARIZATION)


def some_features(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(count, 2, 6, 4, 4, generator=generator)
    rough[:, 1] = rough[:, 0] + 0.5 * rough[:, 1]
    maps = F.interpolate(rough.flatten(0, 1), size=(SIDE, IMAGE_SIZE), mode="bicubic")
    return F.normalize(maps, dim=1).unflatten(0, (count, 2))


@torch.no_grad()
def slow_fit(features, transforms, temperature):
    """One pair at a time, point by point, by a least-squares solver in float64: where a 5x5 grid goes, both ways."""
    axis = np.linspace(-1, 1, 7)
    grid = torch.tensor([[x, y] for y in axis for x in axis], dtype=torch.float32)
    probe = geometry.make_grid(5, 5).reshape(-1, 2)
    answers = []
    for row in range(len(features)):
        found = []
        for end, start in ((0, 1), (1, 0)):  # T_AB takes points of B into A
            forth, back = transforms[row, [end]], transforms[row, [start]]
            options = {"sigmas": [0.3], "windows": [0.6], "temperature": temperature}
            own, other = features[row, start][None], features[row, end][None]
            there = match_locally(own, other, grid[None], forth, **options)
            again = match_locally(other, own, there.clamp(-1, 1), back, **options)
            weights = []
            for n in range(len(grid)):
                first = geometry.sample_at(own, grid[None, n : n + 1])[0, 0].double()
                second = geometry.sample_at(other, there[:, n : n + 1])[0, 0].double()
                cosine = max(0.0, float(first @ second / first.norm() / second.norm()))
                error = float((again[0, n] - grid[n]).norm())
                stays = float(there[0, n].abs().max()) <= 1.05
                weights.append(cosine**2 * np.exp(-(error**2) / 0.02) * stays)
            before = geometry.apply_cascade(grid[None], forth.affine, forth.tps, regularization=REGULARIZATION)
            found.append((there[0], np.array(weights), before[0]))
        for own, reverse in ((0, 1), (1, 0)):
            there, weights, before = found[own]
            starts = [grid, found[reverse][0], grid]
            ends = [there, grid, before]
            shares = [weights, found[reverse][1], np.full(len(grid), 0.1)]
            basis = np.concatenate(
                [geometry.tps_basis(s, regularization=REGULARIZATION).double().numpy() for s in starts]
            )
            goals = np.concatenate([end.double().numpy() for end in ends])
            root = np.sqrt(np.concatenate(shares))[:, None]
            moved = np.linalg.lstsq(root * basis, root * goals, rcond=None)[0]
            answers.append(geometry.tps_basis(probe, regularization=REGULARIZATION).double().numpy() @ moved)
    return np.stack(answers).reshape(len(features), 2, -1, 2), probe


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_a_slow_solver(seed):
    features, transforms = some_features(2, seed), some_transforms(2, seed)
    fitted = fit_mutually(features, transforms, temperature=30.0)
    expected, probe = slow_fit(features, transforms, 30.0)
    assert fitted.affine.shape == (2, 2, 6)
    assert fitted.tps.shape == (2, 2, 18)
    assert fitted.regularization == REGULARIZATION
    torch.testing.assert_close(fitted.affine, transforms.affine)
    for direction in (0, 1):
        found = fitted[:, direction].apply(probe)
        np.testing.assert_allclose(found.numpy(), expected[:, direction], atol=2e-4)
    # and it is not where it was
    before = transforms[:, 0].apply(probe)
    assert np.abs(before.numpy() - expected[:, 0]).max() > 0.02


def test_a_known_warp_is_found_better():
    generator = torch.Generator().manual_seed(4)
    source = F.normalize(F.interpolate(torch.randn(3, 8, 7, 7, generator=generator), size=15, mode="bicubic"), dim=1)
    true = some_transforms(3, seed=5, bend=0.05)[:, 0]
    target = F.normalize(geometry.warp(source, true.grid((15, 15)), padding_mode="border"), dim=1)
    start = geometry.Transform(geometry.identity_affine(3, 2), geometry.identity_tps(3, 2), 0.0)
    fitted = fit_mutually(torch.stack((source, target), dim=1), start)
    inner = 0.6 * geometry.make_grid(5, 5).reshape(1, -1, 2)
    truth = true.apply(inner)
    before = (inner - truth).norm(dim=-1).mean()
    there = fitted[:, 0].apply(inner)
    assert (there - truth).norm(dim=-1).mean() < 0.35 * before
    back = fitted[:, 1].apply(truth)
    assert (back - inner).norm(dim=-1).mean() < 0.35 * before


def test_the_images_may_be_swapped_and_pairs_stand_alone():
    features, transforms = some_features(3), some_transforms(3)
    fitted = fit_mutually(features, transforms)
    swapped = fit_mutually(features.flip(1), transforms.flip(1)).flip(1)
    alone = fit_mutually(features[1:2], transforms[1:2])
    for part in ("affine", "tps"):
        torch.testing.assert_close(getattr(swapped, part), getattr(fitted, part), atol=1e-5, rtol=0)
        torch.testing.assert_close(getattr(alone, part), getattr(fitted[1:2], part), atol=1e-5, rtol=0)


def test_without_similarity_the_transforms_stay():
    transforms = some_transforms(2)
    unlike = torch.zeros(2, 2, 4, SIDE, IMAGE_SIZE)
    unlike[:, 0, 0], unlike[:, 1, 1] = 1, 1  # unit vectors at right angles
    fitted = fit_mutually(unlike, transforms)
    torch.testing.assert_close(fitted.affine, transforms.affine)
    torch.testing.assert_close(fitted.tps, transforms.tps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["flat", "a point", "far away", "turned inside out"])
def test_senseless_transforms_do_no_harm(kind):
    transforms = some_transforms(1)
    affine = transforms.affine
    linear = {
        "flat": [1.0, 0, 0, 1, 0, 0],
        "a point": [0.0, 0, 0.2, 0, 0, 0],
        "far away": [1.0, 0, 50, 0, 1, 0],
        "turned inside out": [-1.0, 0, 0, 0, 1, 0],
    }[kind]
    affine[:, 0] = torch.tensor(linear)
    fitted = fit_mutually(some_features(1), transforms)
    for part in (fitted.affine, fitted.tps):
        assert torch.isfinite(part).all()
    unchanged = kind in ("far away", "turned inside out")
    torch.testing.assert_close(fitted.affine[0, 0], affine[0, 0] if unchanged else geometry.identity_affine(1)[0])
    torch.testing.assert_close(fitted.affine[0, 1], affine[0, 1])


def test_gradients_are_finite():
    features, transforms = some_features(1).requires_grad_(), some_transforms(1)
    transforms.affine.requires_grad_()
    fitted = fit_mutually(features, transforms)
    (fitted.affine.square().sum() + fitted.tps.square().sum()).backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(transforms.affine.grad).all()
    assert transforms.affine.grad.abs().max() > 0


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_matcher_fits_and_the_model_does_not(images):
    fitting = small_model(MaCoSNetForKeypointMatching, mutual_fit=True, tps_regularization=REGULARIZATION)
    plain = small_model(MaCoSNetForKeypointMatching, tps_regularization=REGULARIZATION)
    plain.load_state_dict(fitting.state_dict())
    sizes = torch.tensor([[[50, 40], [60, 30]]] * 2)
    outputs = fitting(images, output_flow=True, image_sizes=sizes)
    bare = plain(images)
    assert isinstance(fitting.macosnet, MaCoSNetModel)
    torch.testing.assert_close(fitting.macosnet(images).tps, bare.tps)
    torch.testing.assert_close(plain.macosnet(images).tps, bare.tps)
    expected = fit_mutually(bare.features, geometry.Transform(bare.affine, bare.tps, REGULARIZATION))
    torch.testing.assert_close(outputs.affine, expected.affine)
    torch.testing.assert_close(outputs.tps, expected.tps)
    assert (outputs.tps - bare.tps).abs().max() > 0.01
    # the flow and the transferred points are those of the fitted transforms
    torch.testing.assert_close(outputs.flow, plain.macosnet.dense_flow(outputs, sizes))
    points = torch.tensor([[[10.0, 10.0], [25.0, 40.0]]] * 2)
    moved = fitting.transfer_points(outputs, points, sizes, "target_to_source", local_matching=False)
    smooth = expected[:, 0].apply(geometry.normalize_points(points, sizes[:, 1], IMAGE_SIZE))
    torch.testing.assert_close(moved, geometry.denormalize_points(smooth, sizes[:, 0], IMAGE_SIZE), atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_fit(dtype):
    features, transforms = some_features(2), some_transforms(2)
    exact = fit_mutually(features, transforms).tps
    torch.testing.assert_close(fit_mutually(features.to(dtype), transforms).tps, exact, atol=0.02, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fit_mutually(features, transforms).tps, exact, atol=0.05, rtol=0)


def test_an_older_configuration_does_not_fit():
    document = small_config(mutual_fit=True).to_dict()
    assert document["mutual_fit"] is True
    assert document["config_version"] == 3
    del document["mutual_fit"]
    document["config_version"] = 1
    older = type(small_config())(**document)
    assert older.mutual_fit is False
    older.mutual_fit = True
    assert older.to_dict()["config_version"] == 3  # or an older package would read it and not fit


def test_asking_for_a_fit_that_the_model_does_not_make(start_model, tmp_path, capsys):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("source_image,target_image,class,XA,YA,XB,YB\n")
    command = ["evaluate", "pairs", "--data", str(tmp_path), "--pairs", str(pairs), "--model", str(start_model)]
    assert main([*command, "--matching", "fitted"]) == 2
    assert "mutual_fit" in capsys.readouterr().err
