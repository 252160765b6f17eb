"""A run of joint training: checks before time is spent, data, objective, validation, saving.

Behind `training/train.py` and `macosnet adapt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..io.checkpoints import load_model_and_processor
from ..modeling_macosnet import MaCoSNetForKeypointMatching
from .checkpoints import BestModel, write_model
from .features import feature_statistics
from .groups import GroupedImages, check_classes, fixed_groups, hold_out
from .images import TrainingImages, open_images, read_images
from .joint import JointObjective, checkpoint_activations
from .launch import make_accelerator, save_model
from .loop import parameter_groups, train
from .losses import MaCoSNetObjective, PerceptualNetwork
from .pretraining import SyntheticObjective
from .pseudo_masks import masks_of_run
from .reports import Reports, Validation
from .settings import JointSettings
from .synthetic import WarpRange
from .validation import SampleImages, keypoint_validation, label_free_validation, labelled_validation, mask_validation

# Images from which the per-channel statistics of the contrastive term are taken.
_STATISTICS_IMAGES = 128


def run(settings: JointSettings) -> dict[str, Any]:
    """Trains, and leaves the model in `output_dir`.

    Returns:
        `best`: step and criterion of the best model; `before` and `after`: the figures of the first and the last
        validation in the log.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence; most before the first step.
    """
    accelerator = make_accelerator(settings)
    images = open_images(settings, settings.photos_per_class)
    check_classes(images.class_names, settings.group_size)
    model, processor = load_model_and_processor(settings.model_name_or_path, accelerator.device)
    labels = _labelled_validations(settings, processor)
    read_images(accelerator, settings, images)
    masks = masks_of_run(accelerator, settings, images, model, processor) if settings.prior_weight else None

    used, held_out = list(range(len(images))), list[int]()
    if not labels:
        used, held_out = hold_out(images.class_names, settings.group_size, settings.seed)
        if not held_out and accelerator.is_main_process:
            print("No class has enough images to hold some out; groups of the same images are judged.")
    step_size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    dataset = GroupedImages(
        images,
        settings.group_size,
        indices=used,
        masks=masks,
        seed=settings.seed,
        flip_probability=settings.flip_probability,
        smallest_crop=settings.smallest_crop,
        # A small collection has many more groups than images.
        length=max(len(used), step_size),
    )
    judged = GroupedImages(
        images,
        settings.group_size,
        indices=held_out or used,
        seed=settings.seed + 1,
        flip_probability=0,
        smallest_crop=1,
    )
    objective = make_objective(settings, model, processor, images)
    if labels:
        validate = labelled_validation(labels)
    else:
        validate = label_free_validation(fixed_groups(judged, settings.validation_groups))
    sample = None
    if settings.sample_steps:
        sample = SampleImages(settings.output_dir, fixed_groups(judged, settings.sample_groups))

    def save(averaged: nn.Module, folder: Path) -> None:
        state = {f"macosnet.{name}": value for name, value in averaged.get_submodule("model").state_dict().items()}
        write_model(folder, model, processor, state)

    best = BestModel(settings.output_dir, save)
    reports = Reports(accelerator, settings, validate, best, sample, settings.sample_steps)
    trained = train(
        accelerator,
        objective,
        dataset,
        settings,
        reports,
        groups=parameter_groups(objective, settings.learning_rates()),
    )
    state = trained.get_submodule("model").state_dict()
    accelerator.wait_for_everyone()
    if settings.load_best_model_at_end:
        saved = load_file(best.folder / "model.safetensors", device=str(accelerator.device))
        state = {name.removeprefix("macosnet."): value for name, value in saved.items()}
    model.macosnet.load_state_dict(state)
    save_model(accelerator, settings, model, processor)
    return {"best": best.record(), **_first_and_last(Path(settings.output_dir) / "log.jsonl")}


def _first_and_last(log: Path) -> dict[str, dict[str, float]]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    validations = [line for line in lines if "criterion" in line]
    return {"before": validations[0], "after": validations[-1]} if validations else {}


def make_objective(
    settings: JointSettings,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    images: TrainingImages,
) -> JointObjective:
    """The objective that the settings describe, for a loaded model.

    Raises:
        InputError: if no loss reaches what is to be trained.
        CheckpointError: if the perceptual network's weights cannot be had.
    """
    base, mean, std = model.macosnet, processor.image_mean, processor.image_std
    weights = settings.loss_weights()
    perceptual = None
    if weights.contrast and weights.contrastive_form == "pixels":
        perceptual = PerceptualNetwork(settings.perceptual_network, mean, std).load_imagenet_weights()
    losses = MaCoSNetObjective(
        weights,
        perceptual,
        coupled=not settings.separate_streams,
        detach_masks=settings.detach_masks,
    )
    statistics = None
    if weights.contrastive_form == "features":
        count = min(len(images), _STATISTICS_IMAGES)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))[:count].tolist()
        statistics = feature_statistics(base, processor, images, order)
    synthetic = SyntheticObjective(base, mean, std, WarpRange()) if settings.synthetic_weight else None
    objective = JointObjective(
        base,
        mean,
        std,
        losses,
        trained=settings.trained(),
        frozen_statistics=settings.frozen_statistics(),
        cascade=settings.cascade,
        prior_weight=settings.prior_weight,
        local_weight=settings.local_weight,
        paste_share=settings.paste_share,
        synthetic=synthetic,
        synthetic_weight=settings.synthetic_weight,
        change_colours=settings.photometric,
        mirror_partners=settings.mirror_partners,
        statistics=statistics,
        channels_last=settings.channels_last,
    )
    if settings.gradient_checkpointing:
        checkpoint_activations(objective)
    if settings.torch_compile:
        for part in (base.encoder, base.affine_head, base.tps_head, base.decoder):
            part.compile()
    return objective


def _labelled_validations(settings: JointSettings, processor: MaCoSNetImageProcessor) -> list[tuple[Validation, str]]:
    validations: list[tuple[Validation, str]] = []
    if settings.validation_pairs:
        pck = keypoint_validation(settings.validation_pairs, processor, ("transform", "local"))
        validations.append((pck, "pck_local@0.1"))
    if settings.validation_masks:
        masks = mask_validation(settings.validation_masks, processor, settings.validation_per_class)
        validations.append((masks, "jaccard"))
    return validations
