"""`macosnet evaluate` on several processes: `accelerate launch training/evaluate.py BENCHMARK --data ... [options]`.

Takes the options of `macosnet evaluate` and gives the same figures. Process k of n treats every n-th batch; sums, not
means, are gathered, so no sample is counted twice and none is dropped. On CPUs alone, start it with `accelerate launch
--multi_gpu --num_processes 2 training/evaluate.py ... --device cpu` (with `--cpu`, accelerate starts a single process).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from macosnet_hf.commands.evaluate import EvaluationJob, add_arguments
from macosnet_hf.errors import MaCoSNetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs this process's share; the first process prints and writes. Returns 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="training/evaluate.py")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    start = time.monotonic()

    from accelerate import Accelerator
    from accelerate.utils import gather_object

    accelerator = Accelerator(cpu=args.device == "cpu")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    failure: MaCoSNetError | None = None
    result = None
    try:
        job = EvaluationJob(args)
        job.load(accelerator.device)
    except MaCoSNetError as error:
        failure = error
    if not _anyone(failure):
        try:
            result = job.evaluate(rank=rank, world_size=world_size, barrier=accelerator.wait_for_everyone)
        except MaCoSNetError as error:
            failure = error
    # A process that failed must not leave the others waiting: all of them meet here, whatever happened.
    results = gather_object([(str(failure) if failure is not None else None, result)])
    messages = [message for message, _ in results if message is not None]
    if messages:
        if accelerator.is_main_process:
            print(f"error: {messages[0]}", file=sys.stderr)
        return 2
    status = 0
    if accelerator.is_main_process:
        total = results[0][1]
        for _, other in results[1:]:
            total.merge(other)
        try:
            job.report(total, time.monotonic() - start)
        except MaCoSNetError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    accelerator.wait_for_everyone()
    return status


def _anyone(failure: MaCoSNetError | None) -> bool:
    """Whether any process failed."""
    from accelerate.utils import gather_object

    return any(gather_object([failure is not None]))


def close() -> None:
    """Leaves the process group, where there is one."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    STATUS = main()
    close()
    sys.exit(STATUS)
