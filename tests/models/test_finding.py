"""Where an adapter is found."""

import huggingface_hub
import pytest

from layerroute.errors import AdapterError
from layerroute.models import finding
from layerroute.models.adapter import read_manifest
from layerroute.models.finding import MANIFEST, find_adapter, is_adapter, shipped


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A package that ships one adapter, `small`."""
    (tmp_path / "shipped" / "small").mkdir(parents=True)
    (tmp_path / "shipped" / "small" / MANIFEST).write_text("{}")
    (tmp_path / "shipped" / "notes").mkdir()
    monkeypatch.setattr(finding, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_with_an_adapter_wins_over_a_shipped_name(pretend):
    assert find_adapter("small") == pretend / "shipped" / "small"
    (pretend / "small").mkdir()  # as an export of that name leaves it
    assert find_adapter("small") == pretend / "shipped" / "small"
    (pretend / "small" / MANIFEST).write_text("{}")
    assert find_adapter("small").resolve() == pretend / "small"


def test_a_home_that_is_not_there_is_a_name_as_any_other(pretend):
    assert not is_adapter("~nobody-of-that-name/small")
    with pytest.raises(AdapterError, match="no adapter here"):
        find_adapter("~nobody-of-that-name/small")


def test_only_folders_with_a_manifest_are_shipped(pretend):
    assert shipped() == ("small",)
    assert is_adapter("small")
    assert not is_adapter("notes")
    assert not is_adapter("smollm2")


def test_an_unknown_name_is_answered_with_the_near_one(pretend):
    with pytest.raises(AdapterError, match="Did you mean 'small'"):
        read_manifest("smal")


def test_the_hub_is_asked_for_the_adapter_and_nothing_else(pretend, monkeypatch):
    asked = {}
    monkeypatch.setattr(finding, "only_cached", lambda name: False)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or str(pretend)
    )
    assert find_adapter("hf:someone/adapter") == pretend
    assert asked["repo"] == "someone/adapter"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["hf:someone/adapter", "hf:not a name"])
def test_a_hub_that_does_not_answer_is_one_clear_sentence(pretend, monkeypatch, name):
    monkeypatch.setattr(finding, "only_cached", lambda name: True)
    with pytest.raises(AdapterError, match=r"no copy is cached.*small"):
        find_adapter(name)
