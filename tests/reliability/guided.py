"""Coverage-guided fuzzing with atheris: inputs that reach new lines of the readers are stored and damaged further.

    pip install atheris                                              # wheels for Linux, Python 3.11 to 3.13
    python tests/reliability/guided.py TARGET [--seconds 600] [--corpus FOLDER]
    python tests/reliability/guided.py TARGET --file INPUT           # one input again, without atheris

An input must be handled or refused in a typed error, in 10 s and 2 GB; anything else ends the search, and the input
is written into the working folder (`crash-...`). Put it, made small, into tests/reliability/corpus/TARGET: the suite
reads all of them (`test_guided.py`), without atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
CORPUS = HERE / "corpus"

# Every target: the modules whose lines guide the search, and sound inputs to begin with.
TARGETS: dict[str, tuple[str, ...]] = {
    "image": ("macosnet_hf.images", "macosnet_hf.io.image_files", "PIL"),
    "mask": ("macosnet_hf.datasets.masks", "macosnet_hf.io.image_files", "PIL"),
    "flo": ("macosnet_hf.datasets.benchmarks.tss",),
    "mat": ("macosnet_hf.datasets.benchmarks.mat",),
    "csv": ("macosnet_hf.datasets.benchmarks", "csv"),
    "config": ("macosnet_hf.configuration_macosnet", "json"),
    "yaml": ("macosnet_hf.training.settings", "yaml"),
    "converter": ("macosnet_hf.conversion.published", "torch._weights_only_unpickler", "zipfile"),
}


def make_target(name: str, scratch: Path) -> Callable[[bytes], Any]:
    """A function of the bytes of an input that raises for what is neither handled nor refused.

    Args:
        scratch: a folder for readers that want a file.
    """
    from macosnet_hf import MaCoSNetError

    path, good = scratch / "input", (MaCoSNetError,)

    def file(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    if name == "image":
        from macosnet_hf.io.image_files import image_size, load_image

        def read(data: bytes) -> Any:
            with contextlib.suppress(MaCoSNetError):
                image_size(data)
            return load_image(data)

    elif name == "mask":
        from macosnet_hf.datasets.masks import mask_from_image

        def read(data: bytes) -> Any:
            return mask_from_image({"bytes": data, "path": None}, "here")

    elif name == "flo":
        from macosnet_hf.datasets.benchmarks.tss import read_flow

        def read(data: bytes) -> Any:
            return read_flow(file(data))

    elif name == "mat":
        from macosnet_hf.datasets.benchmarks.mat import read_matrix

        good = (ValueError,)  # its callers give it the file's name

        def read(data: bytes) -> Any:
            return read_matrix(data, "pts_coord")

    elif name == "csv":
        import seeds

        from macosnet_hf.datasets.benchmarks import iter_records

        seeds.pair_archive(scratch)

        def read(data: bytes) -> Any:
            return list(iter_records("pairs", scratch, "test", pairs=file(data)))

    elif name == "config":
        from macosnet_hf import MaCoSNetConfig

        def read(data: bytes) -> Any:
            try:
                document = json.loads(data)
            except (ValueError, RecursionError):
                return None
            return MaCoSNetConfig(**document) if isinstance(document, dict) else None

    elif name == "yaml":
        from macosnet_hf.training import settings

        parser = settings._parser(settings.JointSettings, None)  # made once: it takes a hundred times the reading

        def read(data: bytes) -> Any:
            return settings._read_config(str(file(data)), parser)

    else:
        from macosnet_hf.conversion.published import read_state_dict

        def read(data: bytes) -> Any:
            return read_state_dict(file(data))

    def target(data: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return read(data)
            except good:
                return None

    return target


def sound_inputs(name: str) -> list[bytes]:
    """Files that are read without an error."""
    import seeds

    if name in ("image", "mask"):
        return [file for kind in seeds.images().values() for file in kind]
    if name == "config":
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            seeds.tiny_checkpoint(Path(folder))
            return [(Path(folder) / "config.json").read_bytes()]
    if name == "yaml":
        return [path.read_bytes() for path in sorted((HERE.parents[1] / "training" / "configs").glob("*.yaml"))]
    made = {
        "flo": lambda: [seeds.flow()],
        "mat": lambda: [seeds.mat(), seeds.mat(True)],
        "csv": lambda: [seeds.PAIR_LIST],
    }
    return made.get(name, seeds.published_checkpoints)()


def _mutator(name: str, mutate: Callable[[bytes, int], bytes]) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's own changes, and those of the other fuzzer, which keep the form of a container or document."""
    import damage

    forms: dict[str, damage.Damage] = {
        "config": damage.damage_json,
        "yaml": damage.damage_yaml,
        "converter": damage.damage_zip,
        "csv": damage.damage_text,
    }

    def change(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if name in forms and rng.random() < 0.7:
            with contextlib.suppress(Exception):  # it has no such form any more
                return forms[name](data, rng)[:longest]
        return mutate(data, longest)

    return change


def _functions_loaded(names: Sequence[str]) -> list[FunctionType]:
    """The functions of these modules and packages, and of their classes, which are in memory already: what somebody
    else has loaded is not loaded again while atheris looks on."""
    modules = [
        sys.modules[name] for name in sorted(sys.modules) if f"{name}.".startswith(tuple(f"{n}." for n in names))
    ]
    found: dict[int, FunctionType] = {}
    for module in modules:
        for value in list(vars(module).values()):
            members = list(vars(value).values()) if isinstance(value, type) else [value]
            for member in members:
                member = getattr(member, "__func__", member)
                if isinstance(member, FunctionType) and member.__module__ == module.__name__:
                    found[id(member)] = member
    return list(found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600, help="how long to search (default 600)")
    parser.add_argument("--corpus", type=Path, help="keep what reaches new lines here, and go on from it")
    parser.add_argument("--file", type=Path, help="read this input alone, and let its error out")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.file is not None:
            print(repr(make_target(args.target, scratch)(args.file.read_bytes()))[:1000])
            return 0
        import atheris

        begin, stored = scratch / "begin", args.corpus or scratch / "stored"
        begin.mkdir()
        stored.mkdir(exist_ok=True)
        importlib.import_module("transformers")  # outside: its own lines are not to guide the search
        for function in _functions_loaded(TARGETS[args.target]):
            atheris.instrument_func(function)
        with atheris.instrument_imports(include=list(TARGETS[args.target])):
            importlib.import_module("macosnet_hf")
            # The package puts a finder of its own first, which would load the configuration without atheris.
            sys.meta_path.sort(key=lambda finder: not type(finder).__module__.startswith("atheris"))
            target = make_target(args.target, scratch)
        known = sorted((CORPUS / args.target).glob("*"))
        for number, data in enumerate([*sound_inputs(args.target), *(path.read_bytes() for path in known)]):
            (begin / str(number)).write_bytes(data)
        options = [f"-max_total_time={args.seconds}", "-timeout=10", "-rss_limit_mb=2500", "-print_final_stats=1"]
        words = [sys.argv[0], *options, "-max_len=100000", str(stored), str(begin)]
        # atheris puts its function in place when it starts: one taken from the module now only says so.
        mutator = _mutator(args.target, lambda data, longest: atheris.Mutate(data, longest))
        atheris.Setup(words, target, custom_mutator=mutator)
        atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
