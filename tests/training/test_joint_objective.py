"""The joint objective by itself: geometry of crops, what is computed how often, where gradients go, and memory."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small_models import IMAGE_SIZE, seeded, small_model, transforms_of
from training_runs import TRAINING, Runs, environment, image_folder, log

from macosnet_hf.errors import DataError, InputError
from macosnet_hf.geometry import identity_tps, sampling_grid, warp
from macosnet_hf.modeling_macosnet import MaCoSNetModel, MaCoSNetModelOutput
from macosnet_hf.training.losses import MaCoSNetLossWeights, MaCoSNetObjective

for package in ("accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")

from macosnet_hf.training.groups import check_classes, hold_out, view_of  # noqa: E402
from macosnet_hf.training.joint import JointObjective, checkpoint_activations, pearson, polarity  # noqa: E402
from macosnet_hf.training.validation import mask_agreement, match_rank  # noqa: E402

FIVE = MaCoSNetLossWeights(cycle=5, trans=4, contrast=3, task=2)
PARTS = ("encoder", "affine_head", "tps_head", "decoder")


def batch_of(groups: int = 2, views: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    coarse = torch.rand(groups * views, 3, 7, 7, generator=seeded(seed))
    images = torch.nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear") * 255
    whole = torch.tensor([1.0, 0, 0, 0, 1, 0]).expand(groups, views, 6)
    return {"images": images.to(torch.uint8).unflatten(0, (groups, views)), "views": whole.clone()}


def objective_of(weights: MaCoSNetLossWeights = FIVE, coupled: bool = True, **options) -> JointObjective:
    losses = MaCoSNetObjective(weights, coupled=coupled)
    return JointObjective(small_model(MaCoSNetModel), [0.5] * 3, [0.25] * 3, losses, **options).train()


def gradients(objective: JointObjective, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    objective(batch, seeded())["total"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_on_the_device_is_the_crop_of_the_image(flip):
    """Against cropping and mirroring with PIL, where the crop falls on whole pixels."""
    coarse = torch.rand(1, 3, 5, 5, generator=seeded())
    smooth = torch.nn.functional.interpolate(coarse, size=(101, 101), mode="bicubic", align_corners=True).clamp(0, 1)
    crop = (0.1, 0.3, 0.7, 0.9)
    image = Image.fromarray((smooth[0].permute(1, 2, 0) * 255).byte().numpy())
    cropped = image.crop((10, 30, 71, 91))
    cropped = ImageOps.mirror(cropped) if flip else cropped
    expected = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255
    # Pixels 10 to 69 of 101 are 1 - 2 / 101 of what lies between the centres of pixels 10 and 70.
    found = warp(smooth, sampling_grid(view_of(crop, flip)[None], size=(61, 61)))[0]
    assert tuple(expected.shape) == (3, 61, 61)
    assert (found - expected).abs().mean() < 0.01
    other = warp(smooth, sampling_grid(view_of(crop, not flip)[None], size=(61, 61)))[0]
    assert (other - expected).abs().mean() > 0.05


def test_a_tenth_of_large_classes_is_held_out():
    names = ["large"] * 40 + ["small"] * 6
    used, held = hold_out(names, 3, seed=0)
    assert sorted(used + held) == list(range(46))
    assert len(held) == 4
    assert all(names[index] == "large" for index in held)
    assert hold_out(names, 3, seed=0) == (used, held)
    assert hold_out(["one"] * 12, 3, seed=0)[1] == []


def test_classes_that_are_too_small_are_named():
    check_classes(["a", "a", "b", "b"], 2)
    with pytest.raises(DataError, match=r"'b' \(2\).*--group_size 2"):
        check_classes(["a"] * 3 + ["b"] * 2, 3)
    with pytest.raises(DataError, match="one image to train on, and a pair takes 2"):
        check_classes(["a"], 2)


# ---- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cascade", "views"), [("features", 3), ("exact", 2)])
def test_outputs_are_those_of_the_model(cascade, views):
    objective = objective_of(MaCoSNetLossWeights(cycle=5, contrast=3, task=2), cascade=cascade).eval()
    pixels, _ = objective.prepare_images(batch_of(views=views))
    outputs = objective.run_model(pixels)
    objective.model.config.cascade = cascade
    with torch.no_grad():
        expected = objective.model(pixels)
    for name in ("affine", "tps", "correlation", "mask_logits", "features"):
        assert torch.allclose(getattr(outputs, name), getattr(expected, name), atol=1e-4), name


def test_partners_that_face_the_other_way_are_mirrored():
    """A group of one image, some of them mirrored, is trained on as the group of that image alone."""
    batch = batch_of(groups=2)
    batch["images"][:] = batch["images"][:, :1].clone()
    batch["masks"] = torch.rand(2, 1, IMAGE_SIZE, IMAGE_SIZE, generator=seeded(2)).expand(-1, 3, -1, -1) > 0.5
    turned = torch.tensor([[False, True, False], [False, True, True]])
    mixed = {**batch}
    for name in ("images", "masks"):
        where = turned.reshape(2, 3, *[1] * (batch[name].dim() - 2))
        mixed[name] = torch.where(where, batch[name].flip(-1), batch[name])
    mirroring = objective_of(prior_weight=1.0, mirror_partners=True).eval()
    pixels, _ = mirroring.prepare_images(mixed)
    assert torch.equal(mirroring.facing_away(pixels), turned)
    expected = objective_of(prior_weight=1.0).eval()(batch, seeded())
    found = mirroring(mixed, seeded())
    untold = objective_of(prior_weight=1.0).eval()(mixed, seeded())
    for name in ("total", "matching", "cycle", "transitivity", "consistency", "prior"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-3), name
    assert untold["prior"].item() != pytest.approx(expected["prior"].item(), rel=1e-3)


def test_the_total_is_the_weighted_sum_of_the_terms():
    losses = objective_of()(batch_of(), seeded())
    weights = {"matching": 1, "cycle": 5, "transitivity": 4, "contrast": 3, "consistency": 2}
    expected = sum(weight * losses[name].item() for name, weight in weights.items())
    assert losses["total"].item() == pytest.approx(expected, rel=1e-5)


def test_each_image_is_encoded_once():
    objective = objective_of()
    rows = []
    objective.model.encoder.register_forward_hook(lambda module, given, result: rows.append(len(given[0])))
    gradients(objective, batch_of(groups=2, views=3))
    assert rows == [6]


def test_the_perceptual_network_runs_once_and_is_not_part_of_the_objective():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rows = torch.nn.Conv2d(3, 4, 3), []

        def forward(self, images):
            self.rows.append(len(images))
            return self.conv(images).mean(dim=(2, 3))

    network = Network()
    losses = MaCoSNetObjective(MaCoSNetLossWeights(contrast=1, contrastive_form="pixels"), network)
    objective = JointObjective(small_model(MaCoSNetModel), [0.5] * 3, [0.25] * 3, losses).train()
    before = set(objective.state_dict())
    assert gradients(objective, batch_of(groups=2, views=3))
    assert network.rows == [2 * 6 * 2]  # object and background of six ordered pairs of two triplets
    assert not [name for name in before if "conv.weight" in name and not name.startswith("model.")]
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "trained",
    [parts for n in (1, 2, 3) for parts in itertools.combinations(("encoder", "predictor", "decoder"), n)],
    ids="-".join,
)
def test_gradients_reach_what_is_trained_and_nothing_else(trained):
    objective = objective_of(trained=trained)
    found = gradients(objective, batch_of())
    reached = {part for part in PARTS if any(name.startswith(f"model.{part}.") for name in found)}
    heads = {"affine_head", "tps_head"} if "predictor" in trained else set()
    assert reached == heads | ({*trained} - {"predictor"})
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
    trainable = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trainable == set(found)  # nothing waits for a gradient, which would stop a run on several processes


def test_a_part_that_no_loss_reaches_is_refused():
    with pytest.raises(InputError, match="No loss reaches the decoder"):
        objective_of(MaCoSNetLossWeights(), coupled=False)
    with pytest.raises(InputError, match="No loss reaches the predictor"):
        objective_of(MaCoSNetLossWeights(matching=0, contrast=1))


@pytest.mark.parametrize("frozen", [("predictor",), ("predictor", "decoder"), ()])
def test_statistics_move_only_where_they_may(frozen):
    objective = objective_of(trained=("encoder", "predictor", "decoder"), frozen_statistics=frozen)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    objective(batch_of(), seeded())
    moved = {
        part
        for part in PARTS
        for name, buffer in objective.named_buffers()
        if name.startswith(f"model.{part}.") and not torch.equal(buffer, before[name])
    }
    expected = set(PARTS) - {"encoder"}
    expected -= {"affine_head", "tps_head"} if "predictor" in frozen else set()
    assert moved == expected - ({"decoder"} if "decoder" in frozen else set())


def test_gradient_checkpointing_changes_nothing_but_the_memory():
    results = []
    for checkpointed in (False, True):
        objective = objective_of(trained=("encoder", "predictor", "decoder"), frozen_statistics=())
        if checkpointed:
            checkpoint_activations(objective)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            total = objective(batch_of(), seeded())["total"]
        total.backward()
        buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
        results.append((total.detach(), {n: p.grad for n, p in objective.named_parameters()}, buffers, sum(saved)))
    (loss, grads, buffers, memory), (loss2, grads2, buffers2, memory2) = results
    assert torch.equal(loss, loss2)
    for first, second in ((grads, grads2), (buffers, buffers2)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert memory2 < 0.7 * memory


# ---- what is watched -------------------------------------------------------------------------------------------------


def test_feature_statistics_are_state_only_where_there_are_any():
    # Of two empty tensors safetensors keeps one: a checkpoint with both would not load.
    without = objective_of()
    assert not {"feature_mean", "feature_std"} & without.state_dict().keys()
    given = objective_of(statistics=(torch.rand(16), torch.rand(16)))
    assert {"feature_mean", "feature_std"} <= given.state_dict().keys()
    assert torch.equal(given.state_dict()["feature_std"], given.feature_statistics()[1])


def test_pearson_against_numpy():
    first, second = torch.rand(2, 4, 5, generator=seeded()), torch.rand(2, 4, 5, generator=seeded(1))
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert pearson(first, second).tolist() == pytest.approx(expected, abs=1e-5)
    assert pearson(torch.ones(1, 4, 5), second[:1]).item() == 0


def test_polarity_tells_an_object_from_its_background():
    features = torch.randn(1, 1, 8, 1, 1, generator=seeded()).expand(1, 2, 8, 12, 12).clone()
    features[..., 4:8, 4:8] = torch.randn(8, 1, 1, generator=seeded(1))
    logits = torch.full((1, 2, 48, 48), -6.0)
    logits[..., 16:32, 16:32] = 6
    assert polarity(logits, features).min() > 0.5
    assert polarity(-logits, features).max() < -0.5
    assert polarity(torch.full_like(logits, 9.0), features).abs().max() < 1e-3


def test_the_criterion_prefers_the_transform_that_is_right():
    """View 0 is view 1 mirrored: the mirroring transform ranks best, and only with it do the masks agree."""
    features = torch.nn.functional.normalize(torch.randn(1, 1, 16, 9, 9, generator=seeded()), dim=2)
    pair = torch.cat((features.flip(-1), features), dim=1)
    mask = torch.full((1, 1, 45, 45), -5.0)
    mask[..., 10:30, 5:15] = 5
    masks = torch.cat((mask.flip(-1), mask), dim=1)
    tps = identity_tps(1, 2)

    def outputs(sign: float, logits=masks) -> MaCoSNetModelOutput:
        affine = torch.tensor([sign, 0, 0, 0, 1, 0]).expand(1, 2, 6)
        return MaCoSNetModelOutput(affine=affine, tps=tps, mask_logits=logits, features=pair)

    right, wrong, full = outputs(-1), outputs(1), outputs(-1, torch.full_like(masks, 9.0))
    assert match_rank(right, transforms_of(right)).min() > 0.95
    assert 0.3 < match_rank(wrong, transforms_of(wrong)).mean() < 0.7
    assert mask_agreement(right, transforms_of(right)).min() > 0.95
    assert mask_agreement(wrong, transforms_of(wrong)).max() < 0.3
    assert mask_agreement(full, transforms_of(full)).abs().max() < 1e-3


# ---- runs ------------------------------------------------------------------------------------------------------------


def arguments(photos, start_model) -> list[str]:
    words = ["--dataset_name", photos, "--model_name_or_path", start_model, "--photo_size", 96, "--logging_steps", 1]
    words += ["--num_warmup_steps", 0, "--validation_groups", 2, "--max_train_steps", 3, "--learning_rate", 1e-4]
    return [str(word) for word in words]


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half_written(tmp_path, start_model):
    photos = image_folder(tmp_path / "photos", 8)
    runs = Runs(tmp_path)
    base = (*arguments(photos, start_model), "--per_device_train_batch_size", 2)
    runs.add("best", "train", *base, "--output_dir", tmp_path / "best", largest_file=60_000)
    synthetic = ("--dataset_name", photos, "--model_name_or_path", start_model, "--photo_size", 96)
    synthetic += ("--per_device_train_batch_size", 2, "--max_train_steps", 2, "--checkpointing_steps", 1)
    runs.add("state", "pretrain", *synthetic, "--output_dir", tmp_path / "state", largest_file=60_000)
    runs.start()
    for name, what in (("best", "best could not be written"), ("state", "checkpoint-1 could not be written")):
        text = runs.text(name)
        assert runs.statuses[name] == 2, text[-3000:]
        assert "Traceback" not in text
        (sentence,) = [line for line in text.splitlines() if "error: " in line]
        assert what in sentence
        assert "is the disk full" in sentence
        assert [path.name for path in (tmp_path / name).iterdir() if path.is_dir()] == []


def launched(processes: int, option: str, *words: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch OPTION --num_processes N training/train.py WORDS`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), option]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(20000 + (os.getpid() + 13) % 20000)]
    command = [*launcher, str(TRAINING / "train.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def test_processes_that_accelerate_does_not_start_are_missed_at_once(tmp_path, start_model):
    """With `--cpu` accelerate starts a single process, whatever `--num_processes` says."""
    words = (*arguments(tmp_path / "nowhere", start_model), "--output_dir", tmp_path / "out")
    done = launched(2, "--cpu", *words)
    assert done.returncode != 0
    assert "use accelerate launch --multi_gpu --num_processes N" in done.stderr
    assert "train.py ..., which on a machine without GPUs takes its CPUs." in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one_with_twice_the_batch(tmp_path, start_model):
    photos = image_folder(tmp_path / "photos", 8)
    curves = []
    for processes, batch, option in ((1, 4, "--cpu"), (2, 2, "--multi_gpu")):
        output = tmp_path / str(processes)
        words = (*arguments(photos, start_model), "--freeze_decoder_statistics", "--output_dir", output)
        words += ("--per_device_train_batch_size", batch, "--checkpointing_steps", 3)
        done = launched(processes, option, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        run = json.loads((output / "checkpoint-3" / "run.json").read_text())
        assert run["settings"]["num_processes"] == processes
        curves.append([line["total"] for line in log(output)])
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[0][0] != pytest.approx(
        curves[0][2], rel=1e-3
    )  # other groups, other weights: the comparison says something
