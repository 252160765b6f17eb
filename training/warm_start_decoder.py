"""Second stage: the decoder gets a sensible start from masks that nobody drew.

    accelerate launch training/warm_start_decoder.py --model_name_or_path OUT_OF_STAGE_1 --dataset_name CLASS_FOLDERS
    --output_dir OUT

Needs images in class folders. Encoder and predictor stay as they are; the decoder learns the pseudo-masks
(`macosnet_hf/training/pseudo_masks.py`) by cross-entropy, each image together with a partner of its class
(`macosnet_hf/training/decoder_start.py`). The pseudo-masks are stored in the output folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.decoder_start import DecoderObjective, MaskedPairs, class_pairs
from macosnet_hf.training.images import open_images
from macosnet_hf.training.launch import make_accelerator, run_script, save_model
from macosnet_hf.training.loop import check_enough, train
from macosnet_hf.training.pseudo_masks import make_masks, masks_of_run
from macosnet_hf.training.reports import Reports
from macosnet_hf.training.settings import DecoderSettings, parse_settings
from macosnet_hf.training.validation import mask_validation


def main(words: Sequence[str] | None = None) -> int:
    settings = parse_settings(DecoderSettings, words, __doc__)
    accelerator = make_accelerator(settings)
    images = open_images(settings, settings.photos_per_class)
    pairs = class_pairs(images, settings.partners, settings.seed)
    check_enough(len(pairs), settings, accelerator, "pairs")
    model, processor = load_model_and_processor(settings.model_name_or_path, accelerator.device)
    validate = None
    if settings.validation_masks:
        validate = mask_validation(settings.validation_masks, processor, settings.validation_per_class)
    images.keep_in_memory(quiet=not accelerator.is_main_process)
    masks = masks_of_run(accelerator, settings, images, lambda: make_masks(model.macosnet, processor, images))
    mean, std = list(processor.image_mean), list(processor.image_std)
    objective = DecoderObjective(model.macosnet, mean, std, paste_share=settings.paste_share)
    dataset = MaskedPairs(images, masks, pairs)
    trained = train(accelerator, objective, dataset, settings, Reports(accelerator, settings, validate))
    model.macosnet.load_state_dict(trained.get_submodule("model").state_dict())
    save_model(accelerator, settings, model, processor)
    return 0


if __name__ == "__main__":
    run_script(main)
