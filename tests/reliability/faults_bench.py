"""What every fault is tried on: a tiny model, images and archives, and the outputs of undisturbed runs."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import seeds
from faults_commands import COMMANDS
from faults_processes import Run, Work, aside


@dataclass
class Bench:
    """A tiny model, images and archives, which every command reads and none changes.

    Attributes:
        folder: for everything.
        commands: that the scenarios go through which are not about a single one.
        faults: what went wrong, one text each.
        counts: figures by name.
    """

    folder: Path
    rng: random.Random
    moments: int
    commands: tuple[str, ...] = ()
    faults: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    number: int = 0
    known: dict[Any, Any] = field(default_factory=dict)

    def make(self) -> None:
        seeds.tiny_checkpoint(self.model)
        for number in range(8):
            path = self.images / ("cats" if number % 2 else "things") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            seeds.image(130, 120, number).save(path)
        (self.folder / "flat").mkdir()
        for number in range(5):
            seeds.image(60, 48, number).save(self.folder / "flat" / f"{number}.png")
        for name, count in (("archive", 12), ("older", 5)):
            for kind in ("Bird", "Cat"):
                for number in range(count):
                    for part in ("images", "masks"):
                        path = self.folder / name / part / kind / f"{number}.png"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        content = seeds.image(60, 48, number)
                        (content if part == "images" else content.convert("1")).save(path)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def images(self) -> Path:
        return self.folder / "photos"

    def fresh(self) -> Path:
        """A new empty folder."""
        self.number += 1
        path = self.folder / f"run-{self.number}"
        path.mkdir()
        return path

    def problem(self, name: str, out: Path, whole: dict[str, Any]) -> str:
        """Empty, or what is half-written or mixed in an output folder."""
        return aside(lambda: COMMANDS[name].problem(out, whole), self.folder)

    def content(self, name: str, out: Path) -> Any:
        """What is in an output folder, to compare."""
        return aside(lambda: COMMANDS[name].content(out), self.folder)

    def run(self, work: Work, folder: Path) -> Run:
        self.number += 1
        return Run(work, self.folder / f"said-{self.number}.txt")

    def count(self, scenario: str, what: str, number: int = 1) -> None:
        figures = self.counts.setdefault(scenario, {})
        figures[what] = figures.get(what, 0) + number

    def fault(self, scenario: str, text: str) -> None:
        self.count(scenario, "faults")
        self.faults.append(f"{scenario}: {text}")
        print(f"FAULT {self.faults[-1]}", flush=True)

    def check(self, scenario: str, text: str) -> None:
        if text:
            self.fault(scenario, text)


def whole_outputs(bench: Bench, name: str, kinds: tuple[str, ...]) -> tuple[dict[str, Any], float]:
    """What undisturbed runs give, by kind, and the seconds that one takes."""
    return {kind: _undisturbed(bench, name, kind)[0] for kind in kinds}, _undisturbed(bench, name, "new")[1]


def names_left(bench: Bench, name: str) -> set[str]:
    """The names of the files that an undisturbed run leaves."""
    return _undisturbed(bench, name, "new")[2]


def _undisturbed(bench: Bench, name: str, kind: str) -> tuple[Any, float, set[str]]:
    """Content, seconds and names of the files of a run; the first run of each sort is remembered."""
    if (name, kind) not in bench.known:
        out = bench.fresh()
        run = bench.run(COMMANDS[name].work(bench, out, kind), out)
        code = run.end()
        seconds = time.monotonic() - run.began
        content = None if code else bench.content(name, out)
        if content is None:
            raise RuntimeError(f"{name} does not work at all: {run.text()[-2000:]}")
        bench.known[name, kind] = content, seconds, listing(out)
        shutil.rmtree(out)
    return bench.known[name, kind]


def listing(folder: Path) -> set[str]:
    """The names of everything in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
