"""Runs that are killed or told to end at any moment, and then started once more."""

from __future__ import annotations

import re
import shutil
import signal

from faults_bench import Bench, listing, names_left, whole_outputs
from faults_commands import COMMANDS


def kills(bench: Bench, name: str, orderly: bool = False) -> None:
    """SIGKILL at random moments, half of them over an older output; then the same once more, to the end.

    Args:
        orderly: SIGTERM and SIGHUP in turn instead, after which nothing temporary is there.
    """
    scenario, command = f"{'end' if orderly else 'kill'}-{name}", COMMANDS[name]
    over_older = name in ("segment", "prepare", "save")
    whole, seconds = whole_outputs(bench, name, ("new", "old") if over_older else ("new",))
    clean = names_left(bench, name)
    killed = tries = 0
    while killed < bench.moments and tries < 5 * bench.moments:
        out, tries = bench.fresh(), tries + 1
        if over_older and tries % 2 == 0:
            code = bench.run(command.work(bench, out, "old"), out).end()
            assert code == 0
        run = bench.run(command.work(bench, out, "new"), out)
        # The last part, in which files get their names, is short; a third of the kills go there.
        share = bench.rng.random() if tries % 3 else bench.rng.uniform(0.75, 1.05)
        how = (signal.SIGTERM, signal.SIGHUP)[killed % 2] if orderly else signal.SIGKILL
        if run.kill(share * seconds, how):
            killed += 1
            left = [path for path in listing(out) if re.search(r"\.macosnet-|partial|replaced", path)]
            if orderly and (left or "Traceback" in run.text()):
                bench.fault(scenario, f"{how.name} left {sorted(left)[:5]}, said {run.text()[-800:]!r}")
            bench.count(scenario, "killed over an older output" if over_older and tries % 2 == 0 else "killed")
        else:
            bench.count(scenario, "was through already")
            seconds *= 0.9  # the run that was measured met with more of other people's work
        bench.check(scenario, bench.problem(name, out, whole))
        again = bench.run(command.work(bench, out, "new"), out)
        code = again.end()
        if code:
            bench.fault(scenario, f"the run after the kill ended with {code}: {again.text()[-800:]}")
        elif bench.content(name, out) != whole["new"]:
            bench.fault(scenario, "the run after the kill gave another result")
        else:
            bench.count(scenario, "restarted and ended as if undisturbed")
        left = listing(out) - clean
        if left:
            bench.fault(scenario, f"left behind: {sorted(left)[:5]}")
        shutil.rmtree(out)
