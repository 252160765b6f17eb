"""One word for one thing: words that the project has given up stay away, but for a few deliberate places."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = ("macosnet_hf", "app.py", "README.md", "docs")
ALSO_SEARCHED = ("training", "model_card.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples", "Makefile")
# "photograph" is "image" now, "kept" says what it means: stored, unchanged, selected.
WORDS = re.compile(r"photograph|key-point|\bbent\b|crumb|workbench|\bkept\b", re.IGNORECASE)
MORE_WORDS = re.compile(
    r"picture|likeness|cut-out|closer look|\bmended\b|\bdesk\b|from near|masks? travel|\bcrumbs?\b", re.IGNORECASE
)
# File and a part of the line: names that programs or files of version 0.1 use.
DELIBERATE = (
    ("macosnet_hf/demo/api.py", "photographs"),  # argument of the endpoint `/segment_collection`
    ("macosnet_hf/training/images.py", "photographs, "),  # fingerprint in the checkpoints of 0.1
    ("training/README.md", "`--photographs`"),  # option of benchmarks/ablation.py
    ("macosnet_hf/training/pseudo_masks.py", "photographs"),  # key of the files of 0.1
)
MORE_DELIBERATE = (
    ("macosnet_hf/datasets/__init__.py", "mask_from_picture"),  # public names of 0.1
    ("macosnet_hf/datasets/__init__.py", "open_picture"),
)


def lines(*names: str) -> list[tuple[str, int, str]]:
    """(file, number, line) of every text file; the modules in checkpoints are links to those above them."""
    found = []
    for name in names:
        root = ROOT / name
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if not path.is_file() or path.is_symlink() or "__pycache__" in path.parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            file = path.relative_to(ROOT).as_posix()
            found += [(file, number, line) for number, line in enumerate(text.splitlines(), 1)]
    return found


def undeliberate(words: re.Pattern[str], deliberate: tuple[tuple[str, str], ...], *names: str) -> list[str]:
    hits = [hit for hit in lines(*names) if words.search(hit[2])]
    return [
        f"{file}:{number}: {line.strip()}"
        for file, number, line in hits
        if not any(file == place and part in line for place, part in deliberate)
    ]


def test_words_that_were_given_up_stay_away():
    assert undeliberate(WORDS, DELIBERATE, *SEARCHED, *ALSO_SEARCHED) == []
    assert len([line for *_, line in lines(*SEARCHED) if WORDS.search(line)]) < 20


def test_names_of_tests_use_the_words_of_the_table():
    words = re.compile(r"photograph|picture|key_point|likeness|_alike|points_travel|mask_travels|_bent\b|_is_kept")
    names = [name for *_, line in lines("tests") for name in re.findall(r"^def (test_\w+)", line)]
    assert len(names) > 1000
    assert [name for name in names if words.search(name.replace("multi_picture_jpeg", ""))] == []


def test_further_words_of_the_table_stay_away():
    assert undeliberate(MORE_WORDS, MORE_DELIBERATE, *SEARCHED, *ALSO_SEARCHED) == []


@pytest.mark.parametrize(("file", "part"), DELIBERATE + MORE_DELIBERATE)
def test_every_deliberate_place_is_still_there(file, part):
    assert part in (ROOT / file).read_text(encoding="utf-8")


def test_a_word_that_was_given_up_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_language.ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("Two photographs.\nAn image.\n")
    assert undeliberate(WORDS, DELIBERATE, "docs") == ["docs/page.md:1: Two photographs."]
