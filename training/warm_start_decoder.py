"""Second stage: the decoder gets a sensible start from masks that nobody drew.

    accelerate launch training/warm_start_decoder.py --model_name_or_path OUT_OF_STAGE_1 --dataset_name CLASS_FOLDERS
    --output_dir OUT

Needs images in class folders. Encoder and predictor stay as they are; the decoder learns the pseudo-masks
(`macosnet_hf/training/pseudo_masks.py`) by cross-entropy, each image together with a partner of its class
(`macosnet_hf/training/decoder_start.py`). The pseudo-masks are stored in the output folder.

With `--decoder_inputs common` the decoder learns what a group of images has in common, from composites of two classes
(`macosnet_hf/training/common_masks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from macosnet_hf.errors import InputError
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.common_masks import CommonObjective, CompositeGroups, composable_classes
from macosnet_hf.training.decoder_start import DecoderObjective, MaskedPairs, class_pairs, with_fresh_decoder
from macosnet_hf.training.features import class_similarity
from macosnet_hf.training.images import open_images
from macosnet_hf.training.launch import make_accelerator, run_script, save_model
from macosnet_hf.training.loop import ParameterGroup, check_enough, parameter_groups, train
from macosnet_hf.training.pseudo_masks import masks_of_run
from macosnet_hf.training.reports import Reports
from macosnet_hf.training.settings import DecoderSettings, parse_settings
from macosnet_hf.training.validation import mask_validation


def main(words: Sequence[str] | None = None) -> int:
    settings = parse_settings(DecoderSettings, words, __doc__)
    accelerator = make_accelerator(settings)
    images = open_images(settings, settings.photos_per_class)
    model, processor = load_model_and_processor(settings.model_name_or_path, accelerator.device)
    if settings.decoder_inputs is not None:
        model = with_fresh_decoder(model, settings.decoder_inputs, settings.decoder_rounds).to(accelerator.device)
    common = model.config.decoder_inputs == "common"
    if common:
        composable_classes(images)
    elif settings.train_encoder:
        raise InputError("--train_encoder goes with a decoder of the kind common.")
    elif len(settings.mask_teacher) > 1:
        raise InputError("Several models as --mask_teacher go with a decoder of the kind common.")
    pairs = [] if common else class_pairs(images, settings.partners, settings.seed)
    check_enough(len(images) if common else len(pairs), settings, accelerator, "groups" if common else "pairs")
    validate = None
    if settings.validation_masks:
        validate = mask_validation(settings.validation_masks, processor, settings.validation_per_class)
    device = accelerator.device if settings.on_device else None
    images.keep_in_memory(quiet=not accelerator.is_main_process, device=device)
    masks = masks_of_run(accelerator, settings, images, model, processor)
    masks = masks.to(device)
    mean, std = processor.image_mean, processor.image_std
    groups: list[ParameterGroup] = []
    dataset: CompositeGroups | MaskedPairs
    objective: CommonObjective | DecoderObjective
    if common:
        alike = class_similarity(model.macosnet, processor, images, masks) if settings.rival_share else None
        dataset = CompositeGroups(
            images,
            masks,
            group_size=settings.group_size,
            seed=settings.seed,
            alike=alike,
            rival_share=settings.rival_share,
        )
        objective = CommonObjective(
            model.macosnet,
            mean,
            std,
            composite_share=settings.composite_share,
            draw_on_device=settings.on_device,
            trained=("decoder", "encoder") if settings.train_encoder else ("decoder",),
            feature_weight=settings.feature_weight,
            freeze_fine_stages=settings.freeze_fine_stages,
        )
        rates = {"decoder": settings.learning_rate, "encoder": settings.encoder_learning_rate}
        groups = parameter_groups(objective, rates)
    else:
        dataset = MaskedPairs(images, masks, pairs)
        objective = DecoderObjective(model.macosnet, mean, std, paste_share=settings.paste_share)
    trained = train(accelerator, objective, dataset, settings, Reports(accelerator, settings, validate), groups=groups)
    model.macosnet.load_state_dict(trained.get_submodule("model").state_dict())
    save_model(accelerator, settings, model, processor)
    return 0


if __name__ == "__main__":
    run_script(main)
