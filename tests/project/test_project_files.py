"""The files that a contributor expects at the top level: each is there, holds true, and agrees with the others."""

import re
from pathlib import Path

import pytest

import macosnet_hf

yaml = pytest.importorskip("yaml", reason="needs PyYAML (extra `train`)")
ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def targets() -> dict[str, str]:
    """Recipe of each target of the Makefile."""
    return dict(re.findall(r"^([a-z]+):[^\n]*\n((?:\t[^\n]*\n)*)", read("Makefile"), re.MULTILINE))


def test_every_path_and_target_in_contributing_exists():
    text = read("CONTRIBUTING.md")
    names = re.findall(r"`([\w./-]*[/.][\w./-]*)`", text)
    assert len(names) > 30
    for name in names:
        assert "NAME" in name or (ROOT / name).exists() or (ROOT / name).suffix == "", name
    for target in re.findall(r"\bmake ([a-z]+)", text):
        assert target in targets(), target


def test_the_map_of_contributing_shows_every_folder_and_flat_module():
    text = read("CONTRIBUTING.md")
    package = ROOT / "macosnet_hf"
    folders = [path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))]
    for name in folders:
        assert f"`macosnet_hf/{name}/`" in text, name
    for path in package.glob("[a-z]*.py"):
        assert f"`macosnet_hf/{path.name}`" in text, path.name
    for name in ("training", "benchmarks", "tests"):
        assert f"`{name}/`" in text, name


def test_every_kind_of_wrong_value_names_tests_that_exist():
    section = read("docs/reliability.md").split("\n## Wrong values\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 18
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        for path, name in tests:
            assert re.search(rf"^def {name}\(", read(path), re.MULTILINE), f"{path}::{name}"


def test_contributing_says_how_to_add_what_is_added_most():
    text = read("CONTRIBUTING.md")
    for what in ("A benchmark", "A metric", "A command", "A loss", "A demo control"):
        assert f"**{what}" in text, what


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == macosnet_hf.__version__
    assert versions == sorted(versions, key=lambda version: tuple(map(int, version.split("."))), reverse=True)
    kinds = set(re.findall(r"^### (\w+)$", read("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == macosnet_hf.__version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] in " ".join(read("model_card.md").split())
    assert [author["family-names"] for author in paper["authors"]] == ["Chen", "Lin", "Yang", "Huang"]
    assert paper["doi"].startswith("10.1109/")


def test_the_hooks_call_the_checks_of_the_makefile():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert repository["repo"] == "local"
    assert set(hooks) == {"lint", "typecheck"}
    for name, hook in hooks.items():
        assert hook["entry"].split()[0] == "make"
        assert hook["entry"].split()[-1] == name
        assert name in targets()
    assert all(tool in targets()["lint"] for tool in ("ruff check", "ruff format --check", "lint-imports"))
    assert "pre_commit install" in targets()["hooks"]


def test_the_workflow_runs_make_test_on_the_oldest_and_the_newest_python():
    workflow = yaml.safe_load(read(".github/workflows/test.yml"))
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.13"]
    assert job["runs-on"].startswith("ubuntu")
    steps = [step.get("run", "") for step in job["steps"]]
    assert steps[-1] == "make test"
    assert any("chromium" in step for step in steps)
    classifiers = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))
    assert (classifiers[0], classifiers[-1]) == ("3.10", "3.13")


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_templates_have_what_github_needs(name):
    template = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}"))
    assert {"name", "description", "body"} <= set(template)
    for field in template["body"]:
        assert {"type", "id", "attributes"} <= set(field)
        assert field["attributes"]["label"]
