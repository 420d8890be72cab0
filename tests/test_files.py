"""Files are written whole or not at all, whatever library writes them."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_tokenizer

from layerroute.errors import LayerRouteError
from layerroute.files import check_writable, open_up, replacing, unwritten, write_text


@contextmanager
def small_disk(limit):
    """Let no file grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "text": lambda path: path.write_text("x" * 100_000),
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
    "tokenizers": lambda path: tiny_tokenizer().backend_tokenizer.save(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_from_other_errors_and_the_file_is_as_it_was(writer, tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")
    with (
        pytest.raises(LayerRouteError, match=r"could not be written .*free some space"),
        small_disk(1024),
        replacing(path) as temporary,
    ):
        WRITERS[writer](temporary)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("writer", ["text", "safetensors", "torch"])
def test_who_may_read_a_file_is_for_the_user_to_say(writer, tmp_path):
    before = os.umask(0o007)
    try:
        with replacing(tmp_path / "file") as temporary:
            WRITERS[writer](temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o660


def test_files_of_a_folder_are_opened_up_as_far_as_the_user_says(tmp_path):
    before = os.umask(0o007)
    try:
        (tmp_path / "within").mkdir()
        save_file({"x": torch.zeros(3)}, tmp_path / "within" / "x.safetensors")
        open_up(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"within": 0o770, "x.safetensors": 0o660}


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "folder" / "report.html")
    assert not list((tmp_path / "folder").iterdir())
    with pytest.raises(LayerRouteError, match=r"file/report.html: could not be written"):
        check_writable(tmp_path / "file" / "report.html")


def test_an_error_that_is_not_about_writing_stays_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="odd"), replacing(tmp_path / "file"):
        raise ValueError("odd")
    assert not list(tmp_path.iterdir())
    assert unwritten(ValueError("odd")) is None
    assert unwritten(LayerRouteError("a loss is not finite")) is None
