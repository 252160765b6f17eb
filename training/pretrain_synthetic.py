"""First stage: the transformation predictor learns from synthetic warps of single images.

    accelerate launch training/pretrain_synthetic.py --dataset_name IMAGES --output_dir OUT

The encoder stays as ImageNet made it. Both heads of G (affine, then TPS) learn to undo random warps, in both
directions of every pair; the loss is the distance between where the predicted and the true transform send a grid of
points (`macosnet_hf/training/pretraining.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.encoder_weights import load_imagenet_encoder
from macosnet_hf.training.images import open_images, read_images
from macosnet_hf.training.launch import make_accelerator, run_script, save_model
from macosnet_hf.training.loop import check_enough, train
from macosnet_hf.training.pretraining import SyntheticObjective
from macosnet_hf.training.reports import Reports
from macosnet_hf.training.settings import SyntheticSettings, parse_settings
from macosnet_hf.training.validation import keypoint_validation


def main(words: Sequence[str] | None = None) -> int:
    settings = parse_settings(SyntheticSettings, words, __doc__)
    accelerator = make_accelerator(settings)
    images = open_images(settings)
    check_enough(len(images), settings, accelerator)
    if settings.model_name_or_path:
        model, processor = load_model_and_processor(settings.model_name_or_path, "cpu")
    else:
        model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(settings.preset))
        processor = MaCoSNetImageProcessor.from_preset(settings.preset)
        load_imagenet_encoder(model, settings.encoder_name_or_path)
    validate = keypoint_validation(settings.validation_pairs, processor) if settings.validation_pairs else None
    if settings.on_device:
        images.keep_in_memory(quiet=not accelerator.is_main_process, workers=8, device=accelerator.device)
    else:
        read_images(accelerator, settings, images)
    objective = SyntheticObjective(
        model.macosnet,
        processor.image_mean,
        processor.image_std,
        settings,
        background_swap=settings.background_swap,
        feature_noise=settings.feature_noise,
        exact_share=settings.exact_share,
        draw_on_device=settings.on_device,
    )
    trained = train(accelerator, objective, images, settings, Reports(accelerator, settings, validate))
    model.macosnet.load_state_dict(trained.get_submodule("model").state_dict())
    save_model(accelerator, settings, model, processor)
    return 0


if __name__ == "__main__":
    run_script(main)
