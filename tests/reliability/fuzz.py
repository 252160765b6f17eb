"""Damaged input for everything that reads: is each handled, or refused in a typed error, in 5 seconds and 1 GB?

    python tests/reliability/fuzz.py [--count 20000] [--seed 0] [--only jpeg,json] [--report figures.json]
    python tests/reliability/fuzz.py --only jpeg --number 1234      # one input again, with its traceback

Valid files of every format (`seeds.py`) are damaged (`damage.py`) and read by the library in child processes
(`sandbox.py`). Input k of a kind depends on the seed, the kind and k alone. The seconds are of the processor, so that
other work on the machine does not count; the gigabyte is what a child may take beyond what the imports hold. The exit
code is 1 if any input was neither handled nor refused.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import damage
import sandbox
import seeds

Read = Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        share: of the inputs; dear kinds get less.
        place: `(random numbers, empty or used folder) -> function that reads what was placed`.
    """

    share: float
    place: Callable[[random.Random, Path], Read]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _image(files: list[bytes], mutation: damage.Damage) -> Kind:
    """Through `load_image`, `image_size` and `mask_from_image`, from memory and from a file."""
    from macosnet_hf.datasets.masks import mask_from_image
    from macosnet_hf.io.image_files import image_size, load_image

    def place(rng: random.Random, folder: Path) -> Read:
        data = mutation(rng.choice(files), rng)
        way = rng.randrange(6)
        if way == 0:
            (folder / "image").write_bytes(data)
            return lambda: load_image(folder / "image")
        if way == 1:
            return lambda: load_image(data, reduced_to=8)
        if way == 2:
            return lambda: image_size(data)
        if way == 3:
            return lambda: mask_from_image({"bytes": data, "path": None}, "here")
        return lambda: load_image(data)

    return Kind(4.0, place)


def _archive(
    share: float,
    build: Callable[[Path], None],
    benchmark: str,
    files: dict[str, tuple[list[bytes], damage.Damage]],
    split: str = "test",
) -> Kind:
    """An archive in which one file is damaged, read by the reader of its benchmark.

    Args:
        build: makes the sound archive.
        files: what may be damaged: its place in the archive, sound contents, how to damage it.
    """
    from macosnet_hf.datasets.benchmarks import Problems, iter_records

    def place(rng: random.Random, folder: Path) -> Read:
        root = folder / benchmark
        if not root.exists():
            build(root)
        for name, (contents, _) in files.items():
            (root / name).write_bytes(contents[0])
        name = rng.choice(list(files))
        contents, mutation = files[name]
        (root / name).write_bytes(mutation(rng.choice(contents), rng))
        problems = Problems(skip=rng.random() < 0.3)
        return lambda: list(iter_records(benchmark, root, split, problems=problems))

    return Kind(share, place)


def _pair_list() -> Kind:
    """A list of pairs in PF's columns, given by itself."""
    from macosnet_hf.datasets.benchmarks import iter_records

    def place(rng: random.Random, folder: Path) -> Read:
        if not (folder / "p").exists():
            seeds.pair_archive(folder)
        path = folder / "pairs.csv"
        benchmark = rng.choice(("pairs", "pf-willow", "pf-pascal"))
        sound = seeds.TRAINING_LIST if benchmark == "pf-pascal" and rng.random() < 0.5 else seeds.PAIR_LIST
        split = "train" if sound is seeds.TRAINING_LIST else "test"
        path.write_bytes(damage.damage_text(sound, rng))
        return lambda: list(iter_records(benchmark, folder, split, pairs=path))

    return Kind(5.0, place)


def _predictions() -> Kind:
    """Predictions that an evaluation stored."""
    from macosnet_hf.evaluation.predictions import PredictionReader, record_stamp

    stamp = record_stamp({"id": "a"})

    def place(rng: random.Random, folder: Path) -> Read:
        where = folder / "predictions"
        if not where.exists():
            seeds.predictions(where)
            shutil.copytree(where, folder / "sound")
        for name, mutation in (
            ("manifest.json", damage.damage_json),
            ("samples-000-00000.npz", damage.damage_zip),
        ):
            sound = (folder / "sound" / name).read_bytes()
            (where / name).write_bytes(mutation(sound, rng) if rng.random() < 0.6 else sound)

        def read() -> None:
            reader = PredictionReader(where, {"model": "m"})
            for name in "ab":
                if name in reader.index:
                    # The stamp is that of the record, whatever the manifest says, so that the shard is opened.
                    file, where_in_it = reader.index[name]
                    reader.index[name] = (file, f"{where_in_it.split('|')[0]}|{stamp}")
                reader.get({"id": name})

        return read

    return Kind(1.0, place)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def _checkpoint(scratch: Path, name: str, mutation: damage.Damage, share: float) -> Kind:
    """A checkpoint folder with one damaged file, loaded."""
    from macosnet_hf.io.checkpoints import check_checkpoint, load_model_and_processor

    sound = _tiny(scratch)

    def place(rng: random.Random, folder: Path) -> Read:
        where = folder / "checkpoint"
        if not where.exists():
            where.mkdir()
        for path in sound.iterdir():
            if path.suffix in (".json", ".safetensors"):
                shutil.copy(path, where)
        (where / name).write_bytes(mutation((sound / name).read_bytes(), rng))
        if rng.random() < 0.5:
            return lambda: check_checkpoint(where)
        return lambda: load_model_and_processor(where, "cpu")

    return Kind(share, place)


def _index(scratch: Path) -> Kind:
    """The list of the files that hold the weights, where there are several."""
    from macosnet_hf.io.checkpoints import check_checkpoint, load_model_and_processor

    sound = _tiny(scratch)
    weights = "model-00001-of-00001.safetensors"

    def place(rng: random.Random, folder: Path) -> Read:
        where = folder / "sharded"
        if not where.exists():
            where.mkdir()
            for name in ("config.json", "preprocessor_config.json"):
                shutil.copy(sound / name, where)
            shutil.copy(sound / "model.safetensors", where / weights)
        document = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_names(sound), weights)}
        damaged = damage.damage_json(json.dumps(document).encode(), rng)
        (where / "model.safetensors.index.json").write_bytes(damaged)
        if rng.random() < 0.7:
            return lambda: check_checkpoint(where)
        return lambda: load_model_and_processor(where, "cpu")

    return Kind(0.3, place)


@functools.lru_cache(maxsize=1)
def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as weights:
        return list(weights.keys())


def _tiny(scratch: Path) -> Path:
    folder = scratch / "tiny"
    if not folder.exists():
        seeds.tiny_checkpoint(folder)
    return folder


def _published() -> Kind:
    """A `.pth.tar` for `macosnet convert`."""
    from macosnet_hf.conversion.published import convert, read_state_dict

    files = seeds.published_checkpoints()

    def place(rng: random.Random, folder: Path) -> Read:
        data = rng.choice(files)
        mutation = damage.damage_zip if data.startswith(b"PK") else damage.damage_bytes
        path = folder / "published.pth.tar"
        path.write_bytes(mutation(data, rng))
        return (lambda: convert(path)) if rng.random() < 0.3 else (lambda: read_state_dict(path))

    return Kind(3.0, place)


def _tensors() -> Kind:
    """A `.pth.tar` of which whole tensors are of another kind: strides, layouts, types, devices, values."""
    from macosnet_hf.conversion.published import convert, read_state_dict

    state = seeds.published_state()

    def place(rng: random.Random, folder: Path) -> Read:
        path = folder / "hostile.pth.tar"
        path.write_bytes(damage.damage_tensors(state, rng))
        return (lambda: convert(path)) if rng.random() < 0.2 else (lambda: read_state_dict(path))

    return Kind(1.5, place)


def _settings(scratch: Path) -> Kind:
    """Values of MaCoSNetConfig; what it takes must also serve for a match that gives numbers."""
    import torch

    from macosnet_hf import MaCoSNetConfig
    from macosnet_hf.io.checkpoints import load_model_and_processor

    model, _ = load_model_and_processor(_tiny(scratch), "cpu")
    document = model.config.to_dict()
    names = [name for name in document if not name.startswith(("_", "auto_map", "architectures", "transformers"))]
    at_match = [
        name for name in names if name.startswith(("local_", "match_", "tps_", "mutual_", "cascade", "padding"))
    ]
    pixels = torch.rand(1, 2, 3, 96, 96, generator=torch.Generator().manual_seed(0))

    def place(rng: random.Random, _: Path) -> Read:
        changed = {}
        for _ in range(rng.randrange(1, 3)):
            name = rng.choice(at_match if rng.random() < 0.7 else names)
            extreme = rng.choice((1e-3, 1e-2, 0.5, 1, 1e2, 1e3, 1e4))
            old = document[name]
            if isinstance(old, list) and rng.random() < 0.4:
                changed[name] = [extreme] * len(old)
            else:
                changed[name] = extreme if rng.random() < 0.3 else damage.damage_value(old, rng)

        def read() -> None:
            config = MaCoSNetConfig(**{**document, **changed})
            for name in at_match:
                setattr(model.config, name, getattr(config, name))
            with torch.inference_mode():
                found = model(pixels)
            if not all(bool(getattr(found, name).isfinite().all()) for name in ("keypoints", "matching_scores")):
                raise ValueError("a match with numbers that are not finite")

        return read

    return Kind(1.5, place)


def _yaml() -> Kind:
    """A file of settings for training."""
    from macosnet_hf.training.settings import JointSettings, _parser, _read_config, read_settings

    root = Path(__file__).resolve().parents[2]
    files = [path.read_bytes() for path in sorted((root / "training" / "configs").glob("*.yaml"))]
    required = {"dataset_name": ["d"], "model_name_or_path": "m", "output_dir": "o"}
    parser = _parser(JointSettings, None)  # takes a hundred times as long as the reading

    def place(rng: random.Random, folder: Path) -> Read:
        path = folder / "settings.yaml"
        path.write_bytes(damage.damage_yaml(rng.choice(files), rng))
        if rng.random() < 0.1:
            return lambda: read_settings(JointSettings, path, **required)
        return lambda: _read_config(str(path), parser)

    return Kind(4.0, place)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _point_text() -> Kind:
    """`--points` and `--points-file` of the command line."""
    from macosnet_hf.commands import match

    texts = (b"1,2;3,4", b"x,y\n1,2\n3.5,4\n", b'"1","2"\r\n\r\n"49","39"\r\n', b"49,39")

    def place(rng: random.Random, folder: Path) -> Read:
        data = damage.damage_text(rng.choice(texts), rng)
        if rng.random() < 0.5:
            (folder / "points.csv").write_bytes(data)
            args = argparse.Namespace(points=None, points_file=str(folder / "points.csv"))
        else:
            args = argparse.Namespace(points=data.decode("utf-8", "replace"), points_file=None)

        def read() -> None:
            match._check_inside(match._read_points(args) or [], (50, 40))

        return read

    return Kind(3.0, place)


def _point_values() -> Kind:
    """Points as a program or a stranger's request gives them, to the calls that transfer them."""
    from macosnet_hf.inference.pair import check_points

    def place(rng: random.Random, folder: Path) -> Read:
        value: Any = [[1, 2], [3.5, 4], [49, 39]]
        for _ in range(rng.randrange(1, 4)):
            value = damage.damage_value(value, rng)
        return lambda: check_points(value, (50, 40))

    return Kind(2.0, place)


def _requests(scratch: Path) -> Kind:
    """What a matched pair is asked by the app: points, a direction, a refinement."""
    from PIL import Image

    from macosnet_hf.inference.files import match_files
    from macosnet_hf.io.checkpoints import load_model_and_processor

    folder = scratch / "images"
    folder.mkdir(exist_ok=True)
    for number in (0, 1):
        seeds.image(50, 40, number).save(folder / f"{number}.png")
    model, processor = load_model_and_processor(_tiny(scratch), "cpu")
    paths = [str(folder / f"{number}.png") for number in (0, 1)]
    work = match_files(*paths, model=model, processor=processor, refine="none")
    assert isinstance(work.result.source, Image.Image)

    def place(rng: random.Random, _: Path) -> Read:
        question: Any = {"points": [[1, 2], [49, 39]], "direction": "source_to_target"}
        for _ in range(rng.randrange(1, 3)):
            question = damage.damage_value(question, rng)
        if not isinstance(question, dict):
            question = {"points": question}
        return lambda: work.transfer(question.get("points"), question.get("direction", "source_to_target"))

    return Kind(1.0, place)


def _pipelines(scratch: Path) -> Kind:
    """What a person may hand to the two pipelines and to the image processor."""
    from PIL import Image

    from macosnet_hf.io.checkpoints import load_model_and_processor
    from macosnet_hf.pipeline_macosnet import MaCoSNetCosegmentationPipeline, MaCoSNetKeypointMatchingPipeline

    model, processor = load_model_and_processor(_tiny(scratch), "cpu")
    matcher = MaCoSNetKeypointMatchingPipeline(model=model, image_processor=processor)
    segmenter = MaCoSNetCosegmentationPipeline(model=model, image_processor=processor)
    files = [file for kind in seeds.images().values() for file in kind]

    def thing(rng: random.Random, folder: Path) -> Any:
        kind = rng.randrange(8)
        if kind < 3:
            return seeds.image(rng.randrange(1, 60), rng.randrange(1, 60), kind)
        if kind < 6:
            path = folder / f"{kind}.png"
            path.write_bytes(damage.damage_bytes(rng.choice(files), rng))
            return str(path)
        if kind == 6:
            return Image.new(rng.choice(("1", "L", "I", "F", "P", "RGBA", "CMYK", "I;16")), (20, 10))
        return damage.damage_value(rng.choice(([1, 2], "nothing.jpg", "data:image/png;base64,AAAA")), rng)

    def place(rng: random.Random, folder: Path) -> Read:
        things = [thing(rng, folder) for _ in range(rng.choice((0, 1, 2, 2, 2, 2, 2, 3)))]
        way = rng.randrange(4)
        if way == 0:
            return lambda: matcher(things if rng.random() < 0.8 else [things], threshold=0.1)
        if way == 1:
            return lambda: segmenter(things, refine="otsu", partners=rng.choice((1, 2, 4)))
        return lambda: processor(things, return_tensors="pt")

    return Kind(0.4, place)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def kinds(scratch: Path) -> dict[str, Kind]:
    """Every kind of input by name.

    Args:
        scratch: a folder for the tiny checkpoint and the like.
    """
    text, whole_json = damage.damage_text, damage.damage_json
    mats = [seeds.mat(), seeds.mat(True), seeds.mat(pts_more={"a": [1, 2]}, name="text"), seeds.mat(True, flag=True)]
    found = {
        name: _image(files, damage.damage_png if name == "png" else damage.damage_bytes)
        for name, files in seeds.images().items()
    }
    tss = "TSS_CVPR2016/JODS/pair/"
    found |= {
        "flow": _archive(
            2.0,
            seeds.tss_archive,
            "tss",
            {f"{tss}flow1.flo": ([seeds.flow()], damage.damage_bytes), f"{tss}flip_gt.txt": ([b"0"], text)},
        ),
        "mat": _archive(
            2.0,
            seeds.willow_archive,
            "pf-willow",
            {"PF-dataset/car(G)/a.mat": (mats, damage.damage_bytes)},
        ),
        "csv": _pair_list(),
        "json annotations": _archive(
            4.0,
            seeds.spair_archive,
            "spair-71k",
            {
                "PairAnnotation/test/1:cat.json": ([seeds.ANNOTATION], whole_json),
                "Layout/large/test.txt": ([b"1:cat\n"], text),
            },
        ),
        "predictions": _predictions(),
        "config.json": _checkpoint(scratch, "config.json", whole_json, 0.5),
        "preprocessor_config.json": _checkpoint(scratch, "preprocessor_config.json", whole_json, 0.5),
        "safetensors": _checkpoint(scratch, "model.safetensors", damage.damage_safetensors, 1.0),
        "weights index": _index(scratch),
        "published checkpoints": _published(),
        "hostile tensors": _tensors(),
        "settings": _settings(scratch),
        "YAML": _yaml(),
        "points as text": _point_text(),
        "points as values": _point_values(),
        "requests": _requests(scratch),
        "pipeline inputs": _pipelines(scratch),
    }
    return found


def run(kind: str, what: Kind, count: int, seed: int, scratch: Path, first: int = 0) -> sandbox.Tally:
    """Treats inputs `first` to `first + count - 1` of a kind in children."""
    from macosnet_hf import MaCoSNetError

    def place(number: int, folder: Path) -> Read:
        return what.place(random.Random(f"{seed} {kind} {number}"), folder)

    return sandbox.run_numbers(place, range(first, first + count), scratch / "run", (MaCoSNetError,))


def again(kind: str, what: Kind, number: int, seed: int, scratch: Path) -> None:
    """One input in this process, without limits; the error comes out."""
    folder = scratch / "again"
    folder.mkdir()
    print(repr(what.place(random.Random(f"{seed} {kind} {number}"), folder)()))


def shares(found: dict[str, Kind], count: int) -> dict[str, int]:
    """How many inputs of each kind, at least one of each, at least `count` together."""
    whole = sum(what.share for what in found.values())
    return {name: max(1, -(-int(count * what.share) // int(whole)) + 1) for name, what in found.items()}


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="inputs altogether (default 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds, separated by commas")
    parser.add_argument("--number", type=int, help="treat this input alone, here, and let its error out")
    parser.add_argument("--report", metavar="FILE", help="write the figures here as JSON")
    args = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    with _folder() as scratch:
        found = kinds(scratch)
        if args.only:
            wanted = args.only.split(",")
            unknown = [name for name in wanted if name not in found]
            if unknown:
                parser.error(f"no kind {unknown[0]!r}; there are {', '.join(found)}")
            found = {name: found[name] for name in wanted}
        if args.number is not None:
            for name, what in found.items():
                again(name, what, args.number, args.seed, scratch)
            return 0
        tallies = {}
        print(f"{'kind':<26}{'inputs':>8}{'handled':>9}{'typed':>8}{'else':>6}{'slowest s':>11}{'MB':>7}", flush=True)
        for name, count in shares(found, args.count).items():
            tally = tallies[name] = run(name, found[name], count, args.seed, scratch)
            counts = tally.counts
            bad = tally.total - counts["handled"] - counts["typed error"]
            print(
                f"{name:<26}{tally.total:>8}{counts['handled']:>9}{counts['typed error']:>8}{bad:>6}"
                f"{tally.slowest:>11.2f}{tally.memory:>7.0f}",
                flush=True,
            )
    faults = [(name, fault) for name, tally in tallies.items() for fault in tally.faults]
    for name, fault in faults[:200]:
        print(f"{name}, input {fault['number']}: {fault['outcome']}\n{fault['detail']}", flush=True)
    total = sum(tally.total for tally in tallies.values())
    print(f"{total} inputs, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    if args.report:
        report = {"seed": args.seed, "kinds": {name: asdict(tally) for name, tally in tallies.items()}}
        Path(args.report).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
