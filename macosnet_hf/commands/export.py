"""`macosnet export`: the network as one graph file."""

from __future__ import annotations

import argparse

from ..conversion.export import FORMATS
from ..io.package import DEFAULT_CHECKPOINT
from .arguments import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet export`."""
    parser.description = "Write the network as one graph file, and compare it with PyTorch."
    parser.add_argument("output", metavar="OUT", help="folder to write; created if need be")
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
