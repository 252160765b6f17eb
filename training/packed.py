"""First stage on a machine that has a GPU and nothing else: no data, no network, no packages of this project.

    python training/packed.py pack --output_dir packed --dataset_name IMAGES --validation_pairs PAIRS.csv
    python training/packed.py train --packed packed --preset base --max_minutes 3 --output_dir results
    python training/packed.py join --results results --preset base --output_dir stage1

`pack` writes images and encoders into a few files, `train` needs nothing else and passes all further options on to
`pretrain_synthetic.py`, and `join` puts the trained heads and the encoder together where the data came from.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pretrain_synthetic

from macosnet_hf.training.checkpoints import write_model
from macosnet_hf.training.images import TrainingImages
from macosnet_hf.training.launch import run_script
from macosnet_hf.training.packing import join_results, pack, unpack, write_results


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", allow_abbrev=False)
    packing.add_argument("--dataset_name", nargs="+", required=True, help="folders of images, or Hub data-set ids")
    packing.add_argument("--photo_size", type=int, default=256, help="side to which images are resized")
    packing.add_argument("--images_per_class", type=int, default=None, help="at most so many of each class")
    packing.add_argument("--quality", type=int, default=40, help="of WebP, 0 to 100")
    packing.add_argument("--validation_pairs", default=None, help="CSV of pairs with keypoints")
    packing.add_argument("--presets", nargs="+", default=["lite", "base"], help="whose encoders to bring")
    training = commands.add_parser("train", allow_abbrev=False)
    training.add_argument("--packed", required=True, help="the folder that `pack` wrote")
    joining = commands.add_parser("join", allow_abbrev=False)
    joining.add_argument("--results", required=True, help="the folder that `train` wrote")
    for command in (training, joining):
        command.add_argument("--preset", required=True)
    for command in (packing, training, joining):
        command.add_argument("--output_dir", required=True)
    args, further = parser.parse_known_args()
    if further and args.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    return args, further


def main() -> int:
    args, further = parse_arguments()
    if args.command == "pack":
        images = TrainingImages(args.dataset_name, args.photo_size, limit=args.images_per_class)
        size = pack(args.output_dir, images, args.presets, args.validation_pairs, quality=args.quality)
        print(f"{len(images)} images and {len(args.presets)} encoders in {size / 2**20:.1f} MiB")
    elif args.command == "join":
        write_model(args.output_dir, *join_results(args.results, args.preset))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            found = unpack(args.packed, args.preset, scratch)
            words = [word for name, value in found.items() for word in (f"--{name}", value)]
            trained = str(Path(scratch) / "trained")
            pretrain_synthetic.main([*words, "--output_dir", trained, "--on_device", *further])
            write_results(trained, args.output_dir)
    return 0


if __name__ == "__main__":
    run_script(main)
