"""A run of joint training: arguments, checks before time is spent, data, objective, validation, saving.

Behind `training/train.py` and `macosnet adapt`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import DataError, InputError
from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..io.checkpoints import load_model_and_processor
from ..modeling_macosnet import MaCoSNetForKeypointMatching
from .decoder_start import kept_masks, load_masks, make_masks
from .groups import GroupedImages, check_classes, fixed_groups, hold_out
from .images import TrainingImages, open_images, read_images
from .joint import CASCADES, JointObjective, checkpoint_activations, feature_statistics
from .loop import (
    BestModel,
    ParameterGroup,
    make_accelerator,
    parse_with_config,
    save_model,
    script_parser,
    train,
    write_model,
)
from .losses import CONTRASTIVE_FORMS, UNITS, MaCoSNetLossWeights, MaCoSNetObjective, PerceptualNetwork
from .pretraining import SyntheticObjective
from .pseudo_masks import teacher_masks
from .synthetic import WarpRange
from .validation import (
    SampleImages,
    Validation,
    keypoint_validation,
    label_free_validation,
    labelled_validation,
    mask_validation,
)

BENCHMARKS = ("tss", "internet", "pf-pascal", "spair-71k")
LAMBDAS = ("matching", "cycle", "trans", "contrast", "task")

# Images from which the per-channel statistics of the contrastive term are taken.
_STATISTICS_PHOTOGRAPHS = 128


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All arguments of joint training."""
    parser = script_parser(description)
    parser.set_defaults(learning_rate=1e-5, per_device_train_batch_size=8, ema_decay=0.99)
    flag = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--model_name_or_path", required=True, help="the model to train further")
    data.add_argument("--group_size", type=int, choices=(2, 3), default=3, help="pairs or triplets of a class")
    data.add_argument("--photos_per_class", type=int, default=None, help="use at most so many images of a class")
    data.add_argument("--smallest_crop", type=float, default=0.8, help="side of the smallest random crop; 1: no crops")
    data.add_argument("--flip_probability", type=float, default=0.5, help="of mirroring a whole group")
    data.add_argument("--photometric", action=flag, default=False, help="change colours, blur and noise at random")

    losses = parser.add_argument_group("losses (a weight of 0 turns a loss off)")
    losses.add_argument(
        "--benchmark_weights",
        choices=BENCHMARKS,
        default="pf-pascal",
        help="the paper's weights for this benchmark; each --lambda_ that is given wins over them",
    )
    for name in LAMBDAS:
        losses.add_argument(f"--lambda_{name}", type=float, default=None)
    losses.add_argument("--margin", type=float, default=2.0, help="m of the contrastive loss")
    losses.add_argument(
        "--contrastive_form",
        choices=CONTRASTIVE_FORMS,
        default="features",
        help="features: pooled features of whole images (stable); pixels: masked images as in the paper",
    )
    losses.add_argument("--perceptual_network", default="resnet50", help="timm name of F, for the form pixels")
    losses.add_argument("--cycle_unit", choices=UNITS, default="pixel", help="of the cycle and transitivity losses")
    losses.add_argument("--squared_norms", action=flag, default=False, help="square them, as the authors' code does")
    losses.add_argument(
        "--separate_streams",
        action=flag,
        default=False,
        help="no coupling: matching without masks, no consistency between the tasks",
    )
    losses.add_argument(
        "--detach_masks", action=flag, default=False, help="keep the matching loss from training the decoder"
    )
    losses.add_argument(
        "--synthetic_weight",
        type=float,
        default=0.0,
        help="of the first stage's loss on known warps of the same images, an anchor for the predictor",
    )
    losses.add_argument(
        "--prior_weight", type=float, default=0.0, help="of pseudo-masks that nobody drew, an anchor for the decoder"
    )
    losses.add_argument(
        "--local_weight",
        type=float,
        default=0.0,
        help="of what local matching makes of the transforms on these very pairs, a teacher for the predictor",
    )
    losses.add_argument(
        "--paste_share",
        type=float,
        default=0.0,
        help="share of groups whose objects, by the pseudo-masks, are pasted onto other images",
    )
    losses.add_argument("--pseudo_masks", default=None, help="take them from this pseudo_masks.npz")
    losses.add_argument(
        "--mask_teacher",
        default=None,
        metavar="MODEL",
        help="let this trained model make the pseudo-masks, which are better than those made without one",
    )

    parts = parser.add_argument_group("what is trained")
    parts.add_argument("--train_encoder", action=flag, default=False, help="its batch-norm statistics stay frozen")
    parts.add_argument("--train_predictor", action=flag, default=True)
    parts.add_argument("--train_decoder", action=flag, default=True)
    parts.add_argument("--encoder_learning_rate", type=float, default=None, help="default: --learning_rate")
    parts.add_argument("--decoder_learning_rate", type=float, default=1e-4)
    parts.add_argument("--freeze_predictor_statistics", action=flag, default=True)
    parts.add_argument("--freeze_decoder_statistics", action=flag, default=False)
    parts.add_argument("--cascade", choices=CASCADES, default="features", help="exact encodes every warped image again")
    parts.add_argument("--gradient_checkpointing", action=flag, default=False, help="less memory, more computing")
    parts.add_argument("--channels_last", action=flag, default=True)
    parts.add_argument("--torch_compile", action=flag, default=False)

    watching = parser.add_argument_group("validation and images")
    watching.add_argument("--validation_pairs", default=None, help="CSV of pairs with keypoints: PCK")
    watching.add_argument("--validation_masks", default=None, help="folder with images/<class> and masks/<class>")
    watching.add_argument("--validation_per_class", type=int, default=6)
    watching.add_argument(
        "--validation_groups", type=int, default=32, help="held-out groups to judge by where no labels are given"
    )
    watching.add_argument("--load_best_model_at_end", action=flag, default=False)
    watching.add_argument("--sample_steps", type=int, default=None, help="draw sample images so often")
    watching.add_argument("--sample_groups", type=int, default=4, help="groups on a sheet")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Command line and `--config` file of joint training.

    Raises:
        InputError: for a configuration that cannot be used.
    """
    return parse_with_config(make_parser(description), arguments)


def loss_weights(args: argparse.Namespace) -> MaCoSNetLossWeights:
    """The weights that the arguments mean.

    Raises:
        InputError: for a weight that makes no sense.
    """
    given = {name: getattr(args, f"lambda_{name}") for name in LAMBDAS if getattr(args, f"lambda_{name}") is not None}
    if args.group_size == 2:
        if given.get("trans"):
            raise InputError("--lambda_trans needs triplets: use --group_size 3.")
        given["trans"] = 0.0
    return MaCoSNetLossWeights.from_benchmark(
        args.benchmark_weights,
        margin=args.margin,
        contrastive_form=args.contrastive_form,
        unit=args.cycle_unit,
        squared=args.squared_norms,
        **given,
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raises [`InputError`] for what cannot work, before anything is loaded."""
    for name in ("synthetic_weight", "prior_weight", "local_weight"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise InputError(f"--{name} must be a number, zero or more.")
    for name in ("validation_groups", "validation_per_class", "sample_groups"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1.")
    if args.photos_per_class is not None and args.photos_per_class < args.group_size:
        raise InputError(f"--photos_per_class must be at least {args.group_size}, the size of a group.")
    if not 0 <= args.flip_probability <= 1 or not 0 < args.smallest_crop <= 1:
        raise InputError("--flip_probability must lie in [0, 1] and --smallest_crop in (0, 1].")
    if args.pseudo_masks is not None:
        if not args.prior_weight:
            raise InputError("--pseudo_masks is of no use without --prior_weight.")
        if not Path(args.pseudo_masks).is_file():
            raise InputError(f"There is no file {args.pseudo_masks} (--pseudo_masks).")
    if args.mask_teacher is not None and (not args.prior_weight or args.pseudo_masks is not None):
        raise InputError("--mask_teacher makes the masks of --prior_weight, and does not go with --pseudo_masks.")
    loss_weights(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, and leaves the model in `output_dir`.

    Returns:
        `best`: step and criterion of the best model; `before` and `after`: the figures of the first and the last
        validation in the log.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence; most before the first step.
    """
    check_arguments(args)
    accelerator = make_accelerator(args)
    quiet = not accelerator.is_main_process
    images = open_images(args, args.photos_per_class)
    check_classes(images.class_names, args.group_size)
    model, processor = load_model_and_processor(args.model_name_or_path, accelerator.device)
    labels = _labelled_validations(args, processor)
    read_images(accelerator, args, images)
    masks = _masks(accelerator, args, images, model, processor) if args.prior_weight else None

    kept, held = list(range(len(images))), list[int]()
    if not labels:
        kept, held = hold_out(images.class_names, args.group_size, args.seed)
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    dataset = GroupedImages(
        images,
        args.group_size,
        indices=kept,
        masks=masks,
        seed=args.seed,
        flip_probability=args.flip_probability,
        smallest_crop=args.smallest_crop,
        # A small collection has many more groups than images.
        length=max(len(kept), step_size),
    )
    judged = GroupedImages(
        images, args.group_size, indices=held or kept, seed=args.seed + 1, flip_probability=0, smallest_crop=1
    )
    objective = make_objective(args, model, processor, images)
    if labels:
        validate = labelled_validation(labels)
    else:
        if not quiet and not held:
            print("No class has enough images to hold some out; groups of the same images are judged.")
        validate = label_free_validation(fixed_groups(judged, args.validation_groups))
    sample = SampleImages(args.output_dir, fixed_groups(judged, args.sample_groups)) if args.sample_steps else None

    def save(averaged: nn.Module, folder: Path) -> None:
        state = {f"macosnet.{name}": value for name, value in averaged.get_submodule("model").state_dict().items()}
        write_model(folder, model, processor, state)

    best = BestModel(args.output_dir, save)
    trained = train(
        accelerator,
        objective,
        dataset,
        args,
        validate=validate,
        groups=parameter_groups(args, objective),
        best=best,
        sample=sample,
    )
    state = trained.get_submodule("model").state_dict()
    accelerator.wait_for_everyone()
    if args.load_best_model_at_end:
        from safetensors.torch import load_file

        saved = load_file(best.folder / "model.safetensors", device=str(accelerator.device))
        state = {name.removeprefix("macosnet."): value for name, value in saved.items()}
    model.macosnet.load_state_dict(state)
    save_model(accelerator, args, model, processor)
    return {"best": best.record(), **_first_and_last(Path(args.output_dir) / "log.jsonl")}


def _first_and_last(log: Path) -> dict[str, dict[str, float]]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    validations = [line for line in lines if "criterion" in line]
    return {"before": validations[0], "after": validations[-1]} if validations else {}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a run
# ---------------------------------------------------------------------------------------------------------------------


def make_objective(
    args: argparse.Namespace,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    images: TrainingImages,
) -> JointObjective:
    """The objective that the arguments mean, for a loaded model.

    Raises:
        InputError: if no loss reaches what is to be trained.
        CheckpointError: if the perceptual network's weights cannot be had.
    """
    base, mean, std = model.macosnet, list(processor.image_mean), list(processor.image_std)
    weights = loss_weights(args)
    perceptual = None
    if weights.contrast and weights.contrastive_form == "pixels":
        perceptual = PerceptualNetwork(args.perceptual_network, mean, std).load_imagenet_weights()
    losses = MaCoSNetObjective(
        weights,
        perceptual,
        coupled=not args.separate_streams,
        detach_masks=args.detach_masks,
        tps_regularization=base.config.tps_regularization,
    )
    statistics = None
    if weights.contrastive_form == "features":
        count = min(len(images), _STATISTICS_PHOTOGRAPHS)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:count].tolist()
        statistics = feature_statistics(base, lambda k: images[order[k]], count, mean, std)
    synthetic = SyntheticObjective(base, mean, std, WarpRange()) if args.synthetic_weight else None
    objective = JointObjective(
        base,
        mean,
        std,
        losses,
        trained=tuple(part for part in ("encoder", "predictor", "decoder") if getattr(args, f"train_{part}")),
        frozen_statistics=tuple(
            part for part in ("predictor", "decoder") if getattr(args, f"freeze_{part}_statistics")
        ),
        cascade=args.cascade,
        prior_weight=args.prior_weight,
        local_weight=args.local_weight,
        paste_share=args.paste_share,
        synthetic=synthetic,
        synthetic_weight=args.synthetic_weight,
        change_colours=args.photometric,
        statistics=statistics,
        channels_last=args.channels_last,
    )
    if args.gradient_checkpointing:
        checkpoint_activations(objective)
    if args.torch_compile:
        for part in (base.encoder, base.affine_head, base.tps_head, base.decoder):
            part.compile()
    return objective


def parameter_groups(args: argparse.Namespace, objective: JointObjective) -> list[ParameterGroup]:
    """The trained parts with their rates."""
    encoder_rate = args.encoder_learning_rate if args.encoder_learning_rate is not None else args.learning_rate
    rates = {"predictor": args.learning_rate, "encoder": encoder_rate, "decoder": args.decoder_learning_rate}
    return [
        ParameterGroup(name, [p for part in objective.parts(name) for p in part.parameters()], rate)
        for name, rate in rates.items()
        if name in objective.trained
    ]


def _labelled_validations(args: argparse.Namespace, processor: MaCoSNetImageProcessor) -> list[tuple[Validation, str]]:
    validations: list[tuple[Validation, str]] = []
    if args.validation_pairs:
        pck = keypoint_validation(args.validation_pairs, processor, ("transform", "local"))
        validations.append((pck, "pck_local@0.1"))
    if args.validation_masks:
        validations.append((mask_validation(args.validation_masks, processor, args.validation_per_class), "jaccard"))
    return validations


def _masks(
    accelerator: Accelerator,
    args: argparse.Namespace,
    images: TrainingImages,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
) -> Tensor:
    """Pseudo-masks `(N, S, S)`: from a file, or made once on the first process and kept for a resumed run."""
    if args.pseudo_masks is not None:
        masks = load_masks(Path(args.pseudo_masks), images.fingerprint())
        if masks is None:
            raise DataError(f"{args.pseudo_masks} was made of other images; leave --pseudo_masks out to make some.")
        return masks
    return kept_masks(accelerator, args, images, lambda: _make_masks(args.mask_teacher, images, model, processor))


def _make_masks(
    teacher: str | None,
    images: TrainingImages,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
) -> Tensor:
    if teacher is None:
        return make_masks(model.macosnet, images, list(processor.image_mean), list(processor.image_std))
    model, processor = load_model_and_processor(teacher, model.device)
    return teacher_masks(
        model.eval(),
        processor,
        lambda members: torch.stack([images[index] for index in members]),
        images.class_names,
    )


__all__ = [
    "check_arguments",
    "loss_weights",
    "make_objective",
    "make_parser",
    "parameter_groups",
    "parse_arguments",
    "run",
]
