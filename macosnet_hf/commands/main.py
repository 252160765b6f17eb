"""The command line `macosnet`.

Commands check what they can before they import torch, so that a typing error is reported at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import signal
import sys
from collections.abc import Sequence

from ..errors import MaCoSNetError
from ..io.ends import close_output, ended_by_signals, flush_output, open_streams
from ..io.memory import no_collection_at_exit, ran_out_of_memory
from ..io.package import VERSION
from ..io.threads import wait_briefly

# One module of this folder each, with `add_arguments(parser)` and `run(args)`; importing one loads nothing heavy.
COMMANDS = {
    "match": "match two images and segment both",
    "segment": "segment the object that two or more images have in common",
    "adapt": "train a model further on your own images, without labels",
    "evaluate": "measure a model on a benchmark",
    "prepare": "write a benchmark's archive as a data set of one schema",
    "convert": "convert a published checkpoint of this line of work",
    "export": "write the network as an ONNX graph",
    "push": "upload a model, a data set or the Space to the Hub",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        the exit code: 0 done, 2 bad input (one sentence on standard error), 128 + N ended by signal N: 130 by Ctrl+C,
        141 where what reads its output has ended before it.
    """
    wait_briefly()
    no_collection_at_exit()
    open_streams()
    with ended_by_signals() as ended:
        try:
            args = _parser().parse_args(arguments)
            code: int = args.run(args)
            flush_output()
            return code
        except KeyboardInterrupt:
            print("macosnet: interrupted; nothing half-written is left.", file=sys.stderr)
            return 130
        except BrokenPipeError:
            close_output()
            return 128 + signal.SIGPIPE
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None:
                raise
            return _fail(sentence)
        except SystemExit:
            with contextlib.suppress(OSError):  # of --help
                flush_output()
            if ended:
                print(f"macosnet: ended by {ended[0].name}; nothing half-written is left.", file=sys.stderr)
            raise


def _sentence(error: BaseException) -> str | None:
    """What an error means for a person; `None` for a fault of the program."""
    if ran_out_of_memory(error):
        return "There is not enough memory for this; try smaller images."
    if isinstance(error, MaCoSNetError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, which cannot be named before torch is imported
        return "The CUDA device has not enough free memory; use --device cpu."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO) and error.filename is None:
        close_output()
        return (
            f"The standard output cannot be written ({error.strerror}); files that the command has written are whole."
        )
    return None


def _fail(sentence: str) -> int:
    print(f"macosnet: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


class _Paragraphs(argparse.HelpFormatter):
    """Wraps each paragraph of a description; argparse's own formatters join them or do not wrap."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="macosnet",
        description="Find corresponding points in images of the same kind of object, and segment the object.",
        epilog="Example: macosnet match examples/cat.jpg examples/dog.jpg --output-dir result",
    )
    parser.add_argument("--version", action="version", version=f"macosnet {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    for name, text in COMMANDS.items():
        command = importlib.import_module(f".{name}", __package__)
        sub = commands.add_parser(name, help=text, formatter_class=_Paragraphs)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
