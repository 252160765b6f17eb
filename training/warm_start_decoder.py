"""Second stage: the decoder gets a sensible start from masks that nobody drew.

    accelerate launch training/warm_start_decoder.py --model_name_or_path OUT_OF_STAGE_1 --dataset_name PHOTOS
    --output_dir OUT

Needs images in class folders. Encoder and predictor stay as they are; the decoder learns the pseudo-masks
(`macosnet_hf/training/pseudo_masks.py`) by cross-entropy, each image together with a partner of its class
(`macosnet_hf/training/decoder_start.py`). The pseudo-masks are kept in the output folder.
"""

from __future__ import annotations

import argparse

from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.decoder_start import (
    DecoderObjective,
    MaskedPairs,
    class_pairs,
    kept_masks,
    make_masks,
)
from macosnet_hf.training.images import open_images
from macosnet_hf.training.loop import (
    check_enough,
    make_accelerator,
    parse_with_config,
    run_script,
    save_model,
    script_parser,
    train,
)
from macosnet_hf.training.validation import mask_validation


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="the model of the first stage")
    parser.add_argument("--photos_per_class", type=int, default=None, help="use at most so many images of a class")
    parser.add_argument("--partners", type=int, default=4, help="partners of each image")
    parser.add_argument(
        "--paste_share", type=float, default=0.4, help="share of pairs whose objects are pasted onto other images"
    )
    parser.add_argument("--validation_masks", default=None, help="folder with images/<class> and masks/<class>")
    parser.add_argument("--validation_per_class", type=int, default=6)
    return parse_with_config(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    accelerator = make_accelerator(args)
    photographs = open_images(args, args.photos_per_class)
    pairs = class_pairs(photographs, args.partners, args.seed)
    check_enough(len(pairs), args, accelerator, "pairs")
    model, processor = load_model_and_processor(args.model_name_or_path, accelerator.device)
    mean, std = list(processor.image_mean), list(processor.image_std)
    validate = (
        mask_validation(args.validation_masks, processor, args.validation_per_class) if args.validation_masks else None
    )
    photographs.keep_in_memory(quiet=not accelerator.is_main_process)
    masks = kept_masks(accelerator, args, photographs, lambda: make_masks(model.macosnet, photographs, mean, std))
    dataset = MaskedPairs(photographs, masks, pairs)
    trained = train(
        accelerator,
        DecoderObjective(model.macosnet, mean, std, paste_share=args.paste_share),
        dataset,
        args,
        validate=validate,
    )
    model.macosnet.load_state_dict(trained.model.state_dict())
    save_model(accelerator, args, model, processor)
    return 0


if __name__ == "__main__":
    run_script(main)
