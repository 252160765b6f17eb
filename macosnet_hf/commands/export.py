"""`macosnet export`: the network as one graph file."""

from __future__ import annotations

import argparse

from ..conversion.export import FORMATS
from ..errors import InputError
from ..io.package import DEFAULT_CHECKPOINT
from .arguments import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet export`."""
    parser.description = "Write the network as one graph file, and compare it with PyTorch."
    parser.add_argument("output", metavar="OUT", help="folder to write; created if need be")
    parser.add_argument(
        "--encoder",
        action="store_true",
        help="write a checkpoint, for --model, whose encoder onnxruntime computes: faster on a CPU",
    )
    parser.add_argument(
        "--int8",
        metavar="PHOTOS",
        help="with --encoder: in 8-bit integers, faster still; a folder of photos like yours decides their ranges",
    )
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the graph file (default: onnx)")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="ID_OR_DIR", help="checkpoint (default: the embedded one)"
    )


def run(args: argparse.Namespace) -> int:
    """`macosnet export`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..conversion.export import export, need
    from ..io.checkpoints import check_checkpoint, load_model_and_processor

    if args.int8 and not args.encoder:
        raise InputError("--int8 goes with --encoder.")
    if args.encoder:
        return _export_encoder(args)
    if args.format == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    check_checkpoint(args.model)
    with progress_bar() as progress:
        progress(0.0, "Loading the network")
        model, processor = load_model_and_processor(args.model, "cpu")
        done = export(model, processor, args.output, args.format, progress)
    print(f"{done.path}, {done.path.stat().st_size / 1e6:.1f} MB")
    worst = max(done.difference, key=lambda name: done.difference[name])
    print(f"largest difference from PyTorch: {done.difference[worst]:.1e} ({worst})")
    name = "onnxruntime" if args.format == "onnx" else "torch.export"
    print(f"one pair: {done.seconds * 1000:.0f} ms in {name}, {done.torch_seconds * 1000:.0f} ms in PyTorch")
    return 0


def _export_encoder(args: argparse.Namespace) -> int:
    """`macosnet export --encoder`."""
    from ..conversion.encoder_export import MOST_IMAGES, export_encoder
    from ..conversion.export import need
    from ..datasets.images import find_images
    from ..io.checkpoints import check_checkpoint, load_model_and_processor
    from ..io.image_files import load_image

    need("onnx", "onnxscript", "onnxruntime")
    check_checkpoint(args.model)
    paths = find_images(args.int8)[0] if args.int8 else []
    step = max(1, len(paths) // MOST_IMAGES)
    with progress_bar() as progress:
        progress(0.0, "Loading the network")
        images = [load_image(path) for path in paths[::step][:MOST_IMAGES]]
        model, processor = load_model_and_processor(args.model, "cpu")
        done = export_encoder(model, processor, args.output, images, progress)
    print(f"{done.path}, {done.path.stat().st_size / 1e6:.1f} MB")
    print(f"cosine similarity of its features with PyTorch's: {done.cosine:.4f}")
    print(f"use it with --model {args.output}")
    return 0
