"""The adapter on disk: it round-trips, plain PEFT reads it, and what is wrong with it is said."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import save_tiny_backbone, tiny, tiny_tokenizer

from layerroute.config import AdapterConfig, BypassConfig, LoraConfig, RouterConfig
from layerroute.errors import AdapterError, LayerRouteError, ModelError
from layerroute.models.adapter import (
    BYPASSES,
    LORA,
    MANIFEST,
    ROUTERS,
    bypassed_blocks,
    load_adapter,
    read_manifest,
    save_adapter,
    save_measured,
    start_from,
)
from layerroute.models.attaching import attach
from layerroute.models.loading import Backbone, load_backbone
from layerroute.routing.route import Route


def ids_and_mask():
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(20) < 12).expand(2, 20)


@pytest.fixture
def name(tmp_path):
    return save_tiny_backbone(tmp_path / "backbone")


def trained(name, **router):
    """A routed model as after training: standardised routers, LoRA and two of four bypasses with an effect."""
    backbone = load_backbone(name, dtype="float32")
    config = AdapterConfig(router=RouterConfig(**router), bypass=BypassConfig(rank=3))
    routed = attach(backbone.model, config).eval()
    generator = torch.Generator().manual_seed(3)
    for key, tensor in [*routed.named_parameters(), *routed.named_buffers()]:
        if ".lora_" in key or ".router." in key:
            torch.nn.init.normal_(tensor, std=0.5, generator=generator)
    for block in (1, 2):
        torch.nn.init.normal_(routed.blocks[block].bypass.up.weight, std=0.5, generator=generator)
    return routed, backbone


def test_save_and_load_round_trip(name, tmp_path):
    routed, backbone = trained(name, window=5, always_run=(0,))
    ids, context = ids_and_mask()
    logits, gates = routed.token_logits(ids, context)
    assert 0 < gates.float().mean() < 1
    save_adapter(tmp_path / "adapter", routed, backbone)
    again, _ = load_adapter(tmp_path / "adapter", dtype="float32")
    assert again.config == routed.config
    assert set(load_file(tmp_path / "adapter" / BYPASSES)) == {"1.down", "1.up", "2.down", "2.up"}
    new_logits, new_gates = again.token_logits(ids, context)
    assert gates.equal(new_gates)
    torch.testing.assert_close(new_logits, logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_saved_over_another_keeps_none_of_its_parts(name, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, *trained(name))
    backbone = load_backbone(name, dtype="float32")
    bare = AdapterConfig(lora=LoraConfig(rank=0))
    save_adapter(str(folder), attach(backbone.model, bare), backbone)
    assert {path.name for path in folder.iterdir()} == {MANIFEST, ROUTERS, "README.md"}


def test_a_backbone_that_is_gone_is_asked_for_by_its_flag(name, tmp_path):
    save_adapter(tmp_path / "adapter", *trained(name))
    (Path(name) / "config.json").unlink()
    with pytest.raises(ModelError, match="with --model"):
        load_adapter(tmp_path / "adapter")


def test_the_blocks_with_a_bypass_are_told_from_the_file(name, tmp_path):
    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    assert bypassed_blocks(tmp_path / "adapter") == (1, 2)
    (tmp_path / "adapter" / BYPASSES).unlink()
    with pytest.raises(AdapterError, match=r"bypasses.safetensors: missing or damaged"):
        bypassed_blocks(tmp_path / "adapter")


def test_plain_peft_reads_the_lora_part(name, tmp_path):
    from peft import PeftModel

    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    ids, context = ids_and_mask()
    wanted = routed.token_logits(ids, context, forced=Route.open(4))[0]
    with warnings.catch_warnings():  # peft asks transformers for a name that transformers 5 renames
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        plain = PeftModel.from_pretrained(load_backbone(name, dtype="float32").model, tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-5, atol=1e-6)


def test_training_may_begin_from_an_adapter(name, tmp_path):
    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    fresh = load_backbone(name, dtype="float32")
    begun = attach(fresh.model).eval()
    start_from(tmp_path / "adapter", begun, fresh)
    ids, context = ids_and_mask()
    for route in (Route.open(4), Route.skipping([3], 4)):
        wanted = routed.token_logits(ids, context, forced=route)[0]
        assert torch.equal(begun.token_logits(ids, context, forced=route)[0], wanted)
    assert bool(begun.token_logits(ids, context)[1].all())  # its routers are not taken over


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's name, new in transformers 5
def test_training_may_begin_from_what_plain_peft_trained(name, tmp_path):
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    plain = get_peft_model(
        load_backbone(name, dtype="float32").model, PeftLora(r=8, lora_alpha=16, target_modules=targets)
    )
    for key, tensor in plain.named_parameters():
        if ".lora_" in key:
            torch.nn.init.normal_(tensor, std=0.5)
    plain.eval().save_pretrained(tmp_path / "plain")
    fresh = load_backbone(name, dtype="float32")
    begun = attach(fresh.model).eval()
    start_from(tmp_path / "plain", begun, fresh)
    ids, context = ids_and_mask()
    torch.testing.assert_close(begun.token_logits(ids, context)[0], plain(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ({"rank": 4}, r"r is 8, 4 in this run. Give --lora.rank 8"),
        ({"alpha": 32.0}, r"lora_alpha is 16.0, 32.0 in this run. Give --lora.alpha 16.0"),
        ({"targets": "all"}, r"another lora.targets than 'all'"),
        ({"rank": 0}, r"no LoRA that could begin there"),
    ],
)
def test_a_start_of_another_shape_is_refused_with_the_flag_to_give(name, tmp_path, shape, remedy):
    save_adapter(tmp_path / "adapter", *trained(name))
    fresh = load_backbone(name, dtype="float32")
    with pytest.raises(AdapterError, match=remedy):
        start_from(tmp_path / "adapter", attach(fresh.model, AdapterConfig(lora=LoraConfig(**shape))), fresh)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changed the backbone it was trained on"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is .* Begin with plain LoRA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"init_lora_weights": "lora_ga"}, "changed the backbone it was trained on"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is .* Begin with plain LoRA"),
        ({"of_a_later_version": {"x": 1}}, "of_a_later_version is .* Begin with plain LoRA"),
    ],
)
def test_a_start_that_is_more_than_plain_lora_is_refused(name, tmp_path, change, says):
    save_adapter(tmp_path / "adapter", *trained(name))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fresh = load_backbone(name, dtype="float32")
    with pytest.raises(AdapterError, match=says):
        start_from(tmp_path / "adapter", attach(fresh.model), fresh)


def test_a_start_that_says_no_in_other_words_is_plain_lora(name, tmp_path):
    save_adapter(tmp_path / "adapter", *trained(name))
    path = tmp_path / "adapter" / "adapter_config.json"
    document = json.loads(path.read_text()) | {"rank_pattern": None, "of_a_later_version": False, "lora_dropout": 0.3}
    del document["use_dora"]  # as an earlier version wrote it
    path.write_text(json.dumps(document))
    fresh = load_backbone(name, dtype="float32")
    begun = attach(fresh.model)
    start_from(tmp_path / "adapter", begun, fresh)
    path.write_text("[]")
    with pytest.raises(AdapterError, match=r"adapter_config.json: missing or damaged \(no JSON object\)"):
        start_from(tmp_path / "adapter", begun, fresh)
    with pytest.raises(ModelError, match="routed already"):
        attach(fresh.model)


def test_a_start_of_another_backbone_is_refused(name, tmp_path):
    save_adapter(tmp_path / "adapter", *trained(name))
    fresh = load_backbone(save_tiny_backbone(tmp_path / "other", "qwen2"), dtype="float32")
    with pytest.raises(AdapterError, match="fingerprint"):
        start_from(tmp_path / "adapter", attach(fresh.model), fresh)


def test_the_fingerprint_ignores_dtype_and_the_adapter_but_not_the_weights(name, tmp_path):
    backbone = load_backbone(name, dtype="float32")
    before = backbone.fingerprint
    assert load_backbone(name, dtype="bfloat16").fingerprint == before
    attach(backbone.model)
    assert backbone.fingerprint == before
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[0, 0] += 1
    assert backbone.fingerprint != before


def test_a_wrong_backbone_is_refused(name, tmp_path):
    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    other = load_backbone(save_tiny_backbone(tmp_path / "other", "qwen2"), dtype="float32")
    with pytest.raises(AdapterError, match="--model"):
        load_adapter(tmp_path / "adapter", other)


@pytest.mark.parametrize("file", [ROUTERS, BYPASSES, LORA, MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_adapter_names_the_file(name, tmp_path, file, damage):
    routed, backbone = trained(name)
    folder = tmp_path / "adapter"
    save_adapter(folder, routed, backbone)
    path = folder / file
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AdapterError, match=file):
        load_adapter(folder, dtype="float32")


@pytest.mark.parametrize("change", [{"config": []}, {"measured": [1]}, {"blocks": None, "config": 3}])
def test_a_manifest_of_other_types_is_damaged(name, tmp_path, change):
    save_adapter(tmp_path, *trained(name))
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=f"{MANIFEST}: damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("change", ["half", "another block", "another shape"])
def test_bypasses_that_do_not_fit_are_refused(name, tmp_path, change):
    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    path = tmp_path / "adapter" / BYPASSES
    tensors = load_file(path)
    down = tensors.pop("1.down")
    if change == "another block":
        tensors |= {"1.down": down, "9.up": tensors["1.up"].clone()}
    if change == "another shape":
        tensors["1.down"] = down[:2].clone()
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=BYPASSES):
        load_adapter(tmp_path / "adapter", dtype="float32")


def test_tensors_that_do_not_fit_are_refused(name, tmp_path):
    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    path = tmp_path / "adapter" / LORA
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({**tensors, first: torch.zeros(1, 1)}, path)
    with pytest.raises(AdapterError, match="shape"):
        load_adapter(tmp_path / "adapter", dtype="float32")


def test_a_newer_format_is_refused(name, tmp_path):
    routed, backbone = trained(name)
    save_adapter(tmp_path / "adapter", routed, backbone)
    path = tmp_path / "adapter" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(AdapterError, match="Upgrade"):
        read_manifest(tmp_path / "adapter")


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_full_disk_leaves_the_old_adapter_whole(name, tmp_path, monkeypatch, written):
    import safetensors.torch

    routed, backbone = trained(name)
    folder = tmp_path / "adapter"
    save_adapter(folder, routed, backbone)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save, calls = safetensors.torch.save_file, []

    def full(tensors, path, *args, **kwargs):
        calls.append(path)
        if len(calls) > written:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save({key: tensor + 1 for key, tensor in tensors.items()}, path, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(LayerRouteError, match="No space left"):
        save_adapter(folder, routed, backbone)
    assert len(calls) == written + 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_routers_alone(name, tmp_path):
    backbone = load_backbone(name, dtype="float32")
    routed = attach(backbone.model, AdapterConfig(lora=LoraConfig(rank=0))).eval()
    save_adapter(tmp_path / "adapter", routed, backbone)
    assert not (tmp_path / "adapter" / LORA).exists()
    load_adapter(tmp_path / "adapter", dtype="float32")


def test_the_card_shows_what_was_measured(name, tmp_path):
    routed, backbone = trained(name)
    row = {"skip_rate": 0.25, "perplexity": {"routed": 2.0, "open": 1.9, "base": 5.0}}
    right = {way: {"value": share, "low": None, "high": None} for way, share in (("routed", 0.5), ("open", 0.625))}
    task = {"steps": 80, "skip_rate": {"routed": 0.2, "open": 0.0}, "accuracy": right}
    save_adapter(tmp_path / "adapter", routed, backbone)
    before = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    del before["config"]["bypass"]  # as the first format was, which knew none
    (tmp_path / "adapter" / MANIFEST).write_text(json.dumps(before))
    task["examples"] = [{"said": "secret"}]
    save_measured(tmp_path / "adapter", {"kinds": {"tool_call": row}, "tasks": {"tool_calls": task}})
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| tool_calls | 80 | 20.000 | 50.000 | 62.500 |" in card
    assert "| tool_call | 25.000 | 2.000 | 1.900 | 5.000 |" in card
    after = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    assert "secret" not in json.dumps(after)
    assert after.pop("measured")["kinds"]["tool_call"] == row
    assert before.pop("measured") == {}
    assert after == before


def test_the_manifest_is_put_in_place_last(tmp_path, monkeypatch):
    """A folder without it is no adapter, so a save that breaks off on its way is not taken for one."""
    backbone, placed = Backbone("tiny", tiny("llama"), tiny_tokenizer()), []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: placed.append(Path(target)) or replace(path, target))
    save_adapter(tmp_path / "adapter", attach(backbone.model), backbone)
    inside = [path.name for path in placed if path.parent == tmp_path / "adapter"]
    assert inside[-1] == MANIFEST
    assert inside.count(MANIFEST) == 1
