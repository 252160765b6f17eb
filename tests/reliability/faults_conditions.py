"""What else may happen to a run: a dead or starved worker, a clock that goes back, another run beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from typing import Any

from faults_bench import Bench, whole_outputs
from faults_commands import COMMANDS
from faults_processes import Work, refused_in_a_sentence


def dead_worker(bench: Bench) -> None:
    """A worker of the data loader is killed or starved: the run ends, and one more ends as if undisturbed."""
    scenario = "worker"
    whole, seconds = whole_outputs(bench, "train", ("new",))
    for moment in range(max(1, bench.moments // 5)):
        out = bench.fresh()
        starved = moment % 2 == 1
        work = COMMANDS["train"].work(bench, out, "worker")
        run = bench.run(_starving_workers(work) if starved else work, out)
        if not starved:
            workers = _children_of(run.pid)
            limit = time.monotonic() + 20 * seconds
            while not workers and time.monotonic() < limit and _alive(run.pid):
                time.sleep(0.005)
                workers = _children_of(run.pid)
            time.sleep(bench.rng.uniform(0, 0.2))
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        code = run.end()
        bench.count(scenario, "out of memory" if starved else "killed")
        if code == 1000:
            bench.fault(scenario, "the run hangs without its worker")
        elif code == 0:
            bench.count(scenario, "was through already")
        elif "Traceback" in run.text():
            bench.count(scenario, "ended with a traceback")
        else:
            bench.count(scenario, "ended in one sentence")
        bench.check(scenario, bench.problem("train", out, whole))
        again = bench.run(COMMANDS["train"].work(bench, out, "new"), out)
        if again.end() or bench.content("train", out) != whole["new"]:
            bench.fault(scenario, f"not made good: {again.text()[-600:]}")
        else:
            bench.count(scenario, "restarted and ended as if undisturbed")
        shutil.rmtree(out)


def _starving_workers(work: Work) -> Work:
    """Every worker may take one more megabyte than it has at its start."""

    def starving() -> Any:
        import sandbox
        from torch.utils.data import _utils

        from macosnet_hf.training import loop as training

        training.WORKER_SECONDS = 60  # instead of the many that a slow disk may need
        original = _utils.worker._worker_loop

        def loop(*arguments: Any, **options: Any) -> Any:
            sandbox.limit_memory(1)
            return original(*arguments, **options)

        _utils.worker._worker_loop = loop
        return work()

    return starving


def _children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
            return [int(number) for number in children.read().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def backward_clock(bench: Bench) -> None:
    """The time of day goes back an hour at every look; the results are the same."""
    scenario = "clock"
    for name in bench.commands:
        command = COMMANDS[name]
        whole, _ = whole_outputs(bench, name, ("new",))
        out = bench.fresh()
        run = bench.run(_backwards(command.work(bench, out, "new")), out)
        code = run.end()
        if code or bench.content(name, out) != whole["new"]:
            bench.fault(scenario, f"{name}: {code} {run.text()[-600:]}")
        bench.count(scenario, "same result")
        shutil.rmtree(out)


def _backwards(work: Work) -> Work:
    def backwards() -> Any:
        now = [time.time()]

        def earlier() -> float:
            now[0] -= 3600
            return now[0]

        time.time = earlier
        time.time_ns = lambda: int(earlier() * 1e9)
        return work()

    return backwards


def together(bench: Bench, names: tuple[str, ...]) -> None:
    """Two different runs at a time into one folder: each ends well or is refused, and what stands there is of one."""
    for name in names:
        scenario, command = f"together-{name}", COMMANDS[name]
        whole, seconds = whole_outputs(bench, name, ("new", "old"))
        for _ in range(max(1, bench.moments // 3)):
            out = bench.fresh()
            first = bench.run(command.work(bench, out, "old"), out)
            time.sleep(bench.rng.uniform(0, 0.5 * seconds))
            second = bench.run(command.work(bench, out, "new"), out)
            codes = [first.end(), second.end()]
            for run, code in zip((first, second), codes, strict=True):
                if code == 0:
                    bench.count(scenario, "ended well")
                else:
                    bench.check(scenario, refused_in_a_sentence(run, code) and f"{code} {run.text()[-800:]}")
                    bench.count(scenario, "refused in one sentence")
            bench.check(scenario, bench.problem(name, out, whole))
            if 0 in codes and bench.content(name, out) is None:
                bench.fault(scenario, "one run ended well, but nothing is there")
            shutil.rmtree(out)
