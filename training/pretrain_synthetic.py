"""First stage: the transformation predictor learns from synthetic warps of single images.

    accelerate launch training/pretrain_synthetic.py --dataset_name PHOTOS --output_dir OUT

The encoder stays as ImageNet made it. Both heads of G (affine, then TPS) learn to undo random warps, in both
directions of every pair; the loss is the distance between where the predicted and the true transform send a grid of
points (`macosnet_hf/training/pretraining.py`).
"""

from __future__ import annotations

import argparse

from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor
from macosnet_hf.errors import InputError
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.encoder_weights import load_imagenet_encoder
from macosnet_hf.training.images import open_images, read_images
from macosnet_hf.training.loop import (
    check_enough,
    make_accelerator,
    parse_with_config,
    run_script,
    save_model,
    script_parser,
    train,
)
from macosnet_hf.training.pretraining import SyntheticObjective
from macosnet_hf.training.synthetic import WarpRange
from macosnet_hf.training.validation import keypoint_validation


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--preset", default="lite", help="paper, vgg16, lite, lite-fused or base")
    parser.add_argument("--model_name_or_path", default=None, help="go on from this model instead of a fresh preset")
    parser.add_argument("--background_swap", type=float, default=0.5)
    parser.add_argument("--feature_noise", type=float, default=0.7)
    parser.add_argument("--exact_share", type=float, default=0.5)
    parser.add_argument("--validation_pairs", default=None, help="CSV of pairs with keypoints, in PF-WILLOW's columns")
    for name, value in vars(WarpRange()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help="limit of the random warps")
    return parse_with_config(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    accelerator = make_accelerator(args)
    dataset = open_images(args)
    check_enough(len(dataset), args, accelerator)
    if args.per_device_train_batch_size < 2 and args.background_swap > 0:
        raise InputError(
            "--background_swap takes the other background from the batch: use a batch of at least 2, or 0."
        )
    if args.model_name_or_path:
        model, processor = load_model_and_processor(args.model_name_or_path, "cpu")
    else:
        model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(args.preset))
        processor = MaCoSNetImageProcessor.from_preset(args.preset)
        load_imagenet_encoder(model)
    validate = keypoint_validation(args.validation_pairs, processor) if args.validation_pairs else None
    read_images(accelerator, args, dataset)
    objective = SyntheticObjective(
        model.macosnet,
        list(processor.image_mean),
        list(processor.image_std),
        WarpRange(**{name: getattr(args, name) for name in vars(WarpRange())}),
        background_swap=args.background_swap,
        feature_noise=args.feature_noise,
        exact_share=args.exact_share,
    )
    trained = train(accelerator, objective, dataset, args, validate=validate)
    model.macosnet.load_state_dict(trained.model.state_dict())
    save_model(accelerator, args, model, processor)
    return 0


if __name__ == "__main__":
    run_script(main)
