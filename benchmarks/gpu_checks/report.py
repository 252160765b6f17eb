"""Runs checks within a time, and writes what they found as JSON and as a Markdown table."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE = 15  # seconds that the last check may take beyond the time of all; then the program ends itself


class Skipped(Exception):
    """A check that cannot be made here, with the reason."""


class Figures:
    """What a check measured: numbers with their unit, and the limits that they must keep."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []

    def add(self, name: str, value: float | str, unit: str = "") -> None:
        """Takes down a figure that has no limit."""
        self.values[name] = {"value": value, "unit": unit}

    def at_most(self, name: str, value: float, limit: float, unit: str = "") -> None:
        """A figure above its limit, or that is no number, fails the check."""
        self._judge(name, value, limit, unit, "at most", value <= limit)

    def at_least(self, name: str, value: float, limit: float, unit: str = "") -> None:
        """A figure below its limit, or that is no number, fails the check."""
        self._judge(name, value, limit, unit, "at least", value >= limit)

    def _judge(self, name: str, value: float, limit: float, unit: str, bound: str, holds: bool) -> None:
        self.values[name] = {"value": value, "unit": unit, bound: limit}
        if not holds:
            self.faults.append(f"{name} is {_number(value)}{unit}, not {bound} {_number(limit)}{unit}")


@dataclass(frozen=True)
class Check:
    """A named check.

    Args:
        name: for `--only`.
        run: measures; raises [`Skipped`] where it cannot.
        about: what it compares, in a line.
        tolerance: the limits, in words.
        seconds: after which it is stopped on a GPU; on a CPU it has six times as long.
    """

    name: str
    run: Callable[[Any, Figures], None]
    about: str
    tolerance: str
    seconds: float = 40


@dataclass
class Result:
    """What became of a check: `passed`, `failed` or `skipped`."""

    name: str
    about: str
    tolerance: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


class Report:
    """The results so far; written anew after each of them, so that a killed run leaves what it had found.

    Args:
        environment: what the run was made on.
        folder: where `gpu_check.json` and `gpu_check.md` go; nothing is written without it.
    """

    def __init__(self, environment: dict[str, Any], folder: Path | None = None):
        self.environment, self.folder, self.results = environment, folder, list[Result]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, result: Result) -> None:
        """Prints and keeps a result."""
        self.results.append(result)
        print(f"{result.status:8} {result.name:20} {result.seconds:6.1f} s  {_detail(result)}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes both files, if a folder was given."""
        if self.folder is None:
            return
        whole = {"environment": self.environment, "checks": [asdict(result) for result in self.results]}
        text = json.dumps(_finite(whole), indent=1, allow_nan=False)
        (self.folder / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / "gpu_check.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The table, under a line that says what the run was made on."""
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items()) + ".", ""]
        lines += ["| check | result | seconds | figures |", "|---|---|---:|---|"]
        for result in self.results:
            detail = _detail(result).replace("|", "/")
            lines.append(f"| {result.name}: {result.about} | {result.status} | {result.seconds:.1f} | {detail} |")
        return "\n".join(lines) + "\n"

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(result.status == "failed" for result in self.results)


def run_checks(checks: Sequence[Check], bench: Any, report: Report, seconds: float, start: float) -> None:
    """Makes the checks in their order; those that have not begun `seconds` after `start` are skipped.

    A check that hangs is stopped by an alarm. Where that has no effect, as inside of a driver, the program writes what
    it has and ends itself.
    """
    current = [""]
    until_end = seconds + GRACE - (time.monotonic() - start)
    watchdog = threading.Timer(until_end, _give_up, (report, checks, current))
    watchdog.daemon = True
    watchdog.start()
    for check in checks:
        left = seconds - (time.monotonic() - start)
        if left <= 0:
            report.add(Result(check.name, check.about, check.tolerance, "skipped", reason="the time was used up"))
            continue
        current[0] = check.name
        bench.seconds_left = left
        limit = check.seconds if bench.cuda else 6 * check.seconds
        report.add(_run_one(check, bench, min(limit, left + GRACE / 2)))
    watchdog.cancel()


def _run_one(check: Check, bench: Any, limit: float) -> Result:
    figures, begun = Figures(), time.monotonic()
    status, reason = "passed", ""
    try:
        with _alarm(limit):
            check.run(bench, figures)
        if figures.faults:
            status, reason = "failed", "; ".join(figures.faults)
    except Skipped as skipped:
        status, reason = "skipped", str(skipped)
    except Exception as error:  # one check that breaks must not take the others with it
        status, reason = "failed", f"{type(error).__name__}: {_first_lines(error)}{_place(error)}"
    seconds = time.monotonic() - begun
    return Result(check.name, check.about, check.tolerance, status, seconds, reason, figures.values)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in the block once the time is over."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # such as that of a test's own limit


def _give_up(report: Report, checks: Sequence[Check], current: Sequence[str]) -> None:
    done = {result.name for result in report.results}
    for check in checks:
        if check.name not in done:
            status, reason = ("failed", "did not end") if check.name == current[0] else ("skipped", "the run hung")
            report.add(Result(check.name, check.about, check.tolerance, status, reason=reason))
    os._exit(3)


def _detail(result: Result) -> str:
    figures = [f"{name} {_figure(figure)}" for name, figure in result.figures.items()]
    return ". ".join(part for part in (result.reason, ", ".join(figures)) if part)


def _figure(figure: dict[str, Any]) -> str:
    bounds = [f"{bound} {_number(figure[bound])}" for bound in ("at most", "at least") if bound in figure]
    return f"{_number(figure['value'])}{figure['unit']}" + "".join(f" ({bound})" for bound in bounds)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _place(error: BaseException) -> str:
    """The last two places in this repository that an error came through."""
    places, trace = [], error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.parent.name == "gpu_checks" or "macosnet_hf" in path.parts:
            places.append(f"{path.name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f" (at {', '.join(places[-2:])})" if places else ""


def _finite(value: Any) -> Any:
    """The same with text in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
