"""Joint training: matching and segmentation improve each other on triplets (or pairs) of images of a class.

    accelerate launch training/train.py --config training/configs/pf-pascal.yaml --model_name_or_path MODEL
    --dataset_name CLASS_FOLDERS --output_dir OUT

The only label is which images show the same kind of thing. See `training/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

from macosnet_hf.training import joint_run
from macosnet_hf.training.launch import run_script
from macosnet_hf.training.settings import JointSettings, parse_settings


def main(words: Sequence[str] | None = None) -> int:
    joint_run.run(parse_settings(JointSettings, words, __doc__))
    return 0


if __name__ == "__main__":
    run_script(main)
