"""Results arrive together or not at all, and nothing of a failed run stays behind."""

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from macosnet_hf.errors import InputError, OutputError
from macosnet_hf.io.output_folder import check_writable, output_folder, refuse_to_overwrite, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, error=None, **texts):
    """Text files `<name>.txt` as the results of one run, which ends with an error if there is one."""
    with output_folder(folder) as partial:
        for name, text in texts.items():
            (partial / f"{name}.txt").write_text(text)
        if error is not None:
            raise error


def test_results_move_into_a_folder_that_is_created(tmp_path):
    target = tmp_path / "some" / "new folder"
    with output_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
        assert not (target / "a.txt").exists()
    assert names(target) == ["a.txt", "b.txt"]
    assert (target / "b.txt").read_text() == "b"


def test_older_results_are_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    with output_folder(str(tmp_path)) as folder:
        (folder / "a.txt").write_text("new")
    assert names(tmp_path) == ["a.txt", "mine.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [InputError("no"), ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failed_block_leaves_neither_files_nor_folders(tmp_path, error):
    with pytest.raises(type(error)):
        write(tmp_path / "some" / "new", error, a="half")
    assert names(tmp_path) == []


def test_a_failed_block_leaves_an_existing_folder_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(InputError):
        write(tmp_path, InputError("no"), a="half")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_write_error_in_the_block_becomes_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="could not be written"), output_folder(tmp_path / "new") as folder:
        (folder / "no such folder" / "a.txt").write_text("a")
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_a_result_stops_everything(tmp_path):
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(OutputError, match=r"b\.txt is a folder"):
        write(tmp_path, a="a", b="b")
    assert names(tmp_path) == ["b.txt"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"), output_folder(tmp_path / "file"):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="cannot be created"), output_folder(tmp_path / "file" / "below" / "it"):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "null\0byte"])
def test_a_name_that_no_folder_can_have(tmp_path, name):
    with pytest.raises(OutputError, match="cannot be created"), output_folder(tmp_path / "parent" / name):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(OutputError, match="empty"), output_folder(""):
        pytest.fail("the block must not run")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux, where not even root writes into /proc")
@pytest.mark.parametrize("folder", ["/proc", "/proc/new"])
def test_a_folder_that_cannot_be_written(folder):
    with pytest.raises(OutputError, match=r"cannot be created|Nothing can be written"), output_folder(folder):
        pytest.fail("the block must not run")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), output_folder(tmp_path):
        pytest.fail("the block must not run")
    tmp_path.chmod(0o700)


def test_results_never_replace_what_they_are_made_from(tmp_path, monkeypatch):
    photo = tmp_path / "a_mask.png"
    photo.write_text("an image")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, ".", "", "link", tmp_path / "link" / ".." / tmp_path.name):
        with pytest.raises(OutputError, match=r"a_mask\.png would replace"):
            refuse_to_overwrite(folder, ["b.png", "a_mask.png"], ["a_mask.png"])
    refuse_to_overwrite(tmp_path / "other", ["a_mask.png"], [photo])
    refuse_to_overwrite(tmp_path, ["b_mask.png"], [photo])


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    # Two processes of an evaluation once removed each other's temporary file.
    path = tmp_path / "result.json"

    def work(number):
        for _ in range(50):
            check_writable(path)
            write_file(path, str(number) * 1000)
            text = path.read_text()
            assert len(text) == 1000
            assert len(set(text)) == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert names(tmp_path) == ["result.json"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    write_file(tmp_path / "ours.txt", "é")
    (tmp_path / "theirs.txt").write_text("é")
    ours, theirs = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours.txt", "theirs.txt"))
    assert ours == theirs
    assert (tmp_path / "ours.txt").read_bytes() == "é".encode()


@pytest.mark.parametrize("function", [check_writable, lambda path: write_file(path, b"x")])
def test_a_file_that_cannot_be_written_is_said_so(tmp_path, function):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "folder", tmp_path / "none" / "a.json", tmp_path / "file" / "a.json", tmp_path / "a\0b"):
        with pytest.raises(OutputError):
            function(path)
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []
