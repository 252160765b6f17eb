"""Another encoder for a trained model: a start that needs no training (`macosnet_hf/training/adoption.py`).

    python training/adopt.py --model_name_or_path lite --preset base --dataset_name CLASS_FOLDERS --output_dir OUT

Heads and decoder are those of the model; the layers of the decoder that read the encoder are fitted on some images.
Then `training/warm_start_decoder.py --model_name_or_path OUT` trains the decoder further.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import torch
from tqdm import tqdm

from macosnet_hf import MaCoSNetConfig, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.adoption import adopt
from macosnet_hf.training.checkpoints import write_model
from macosnet_hf.training.encoder_weights import load_imagenet_encoder
from macosnet_hf.training.images import TrainingImages
from macosnet_hf.training.launch import run_script

# Settings that are the new encoder's; all others are those of the trained model.
_OF_ENCODER = {"backbone_config", "feature_strides", "fused_strides", "fused_weights", "feature_blocks", "image_size"}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, metavar="MODEL", help="the trained model")
    parser.add_argument("--preset", default="base", help="whose encoder and image size the new model has")
    parser.add_argument(
        "--dataset_name", nargs="+", required=True, metavar="FOLDER_OR_ID", help="images in class folders"
    )
    parser.add_argument("--photo_size", type=int, default=352, metavar="N", help="side to which they are resized")
    parser.add_argument("--count", type=int, default=240, metavar="N", help="images to fit on")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--output_dir", required=True, metavar="FOLDER", help="where the new model goes")
    args = parser.parse_args(words)
    teacher, _ = load_model_and_processor(args.model_name_or_path, "cpu")
    names = set(inspect.signature(MaCoSNetConfig).parameters) - _OF_ENCODER - {"config_version", "kwargs"}
    settings = {name: getattr(teacher.config, name) for name in names}
    student = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(args.preset, **settings))
    load_imagenet_encoder(student)
    processor = MaCoSNetImageProcessor.from_preset(args.preset)
    images = TrainingImages(args.dataset_name, args.photo_size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.count]
    batches = (torch.stack([images[row] for row in rows]) for rows in tqdm(order.split(8), desc="images"))
    adopt(teacher, student, batches, processor.image_mean, processor.image_std)
    write_model(args.output_dir, student.eval(), processor)
    return 0


if __name__ == "__main__":
    run_script(main)
