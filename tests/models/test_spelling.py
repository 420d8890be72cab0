"""A text token whose row no head can tell from another's is spelt out; everything else stays."""

import json

import pytest
import torch
from tiny import save_tiny_backbone, tiny_tokenizer
from tokenizers import Tokenizer

from layerroute.data.rendering import parse_tool_calls
from layerroute.models.loading import load_backbone
from layerroute.models.spelling import spell_unlearned

CALL = '<tool_call>\n{"name": "paint", "arguments": {}}\n</tool_call><|im_end|>'


@pytest.fixture
def tokenizer():
    made = tiny_tokenizer()
    made.add_tokens(["<tool_call>", "</tool_call>"])
    return made


def ids_of(tokenizer, *texts):
    return [tokenizer.get_added_vocab()[text] for text in texts]


@pytest.mark.parametrize("size", [1.0, 0.0])
def test_unlearned_tags_are_spelt_and_their_text_is_the_same(tokenizer, size):
    tags, markers = ids_of(tokenizer, "<tool_call>", "</tool_call>"), ids_of(tokenizer, "<|im_end|>")
    head = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0))
    head[tags[0]] *= size
    head[tags[1]] = 1.0001 * head[tags[0]]
    before = tokenizer(CALL)["input_ids"]
    assert spell_unlearned(tokenizer, head) == ("</tool_call>", "<tool_call>")
    after = tokenizer(CALL)["input_ids"]
    assert set(tags) <= set(before)
    assert not set(tags) & set(after)
    assert after[-1] == before[-1] == markers[0]  # special tokens stay whole
    assert tokenizer.decode(after) == CALL
    assert parse_tool_calls(tokenizer.decode(after[:-1]))[1][0].name == "paint"


@pytest.mark.parametrize("known", [False, True])
def test_ids_of_other_tokens_stay(known):
    """Whether the vocabulary itself has the tags, or added tokens alone."""
    made = tiny_tokenizer()
    if known:
        state = json.loads(made.backend_tokenizer.to_str())
        state["model"]["vocab"] |= {tag: len(made) + n for n, tag in enumerate(("<tool_call>", "</tool_call>"))}
        made._tokenizer = Tokenizer.from_str(json.dumps(state))
    made.add_tokens(["<tool_call>", "</tool_call>"])
    made.add_tokens(["<|late|>"], special_tokens=True)
    tags, late = ids_of(made, "<tool_call>", "</tool_call>"), ids_of(made, "<|late|>")
    head = torch.randn(len(made), 16, generator=torch.Generator().manual_seed(0))
    head[tags[1]] = head[tags[0]]
    before = made("a<|late|>b")["input_ids"]
    spell_unlearned(made, head)
    assert made("a<|late|>b")["input_ids"] == before
    assert ids_of(made, "<|late|>") == late
    assert not set(tags) & set(made(CALL)["input_ids"])
    assert made.decode(made(CALL)["input_ids"]) == CALL
    assert spell_unlearned(made, head) == ()  # as when an exported checkpoint is loaded


def test_learned_tags_stay(tokenizer):
    head = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0))
    before = tokenizer(CALL)["input_ids"]
    assert spell_unlearned(tokenizer, head) == ()
    assert tokenizer(CALL)["input_ids"] == before


def test_special_tokens_stay_even_if_unlearned(tokenizer):
    head = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0))
    first, second = ids_of(tokenizer, "<|im_end|>", "<|endoftext|>")
    head[second] = head[first]
    assert spell_unlearned(tokenizer, head) == ()


@pytest.mark.parametrize("learned", [True, False])
def test_a_backbone_loads_with_the_tokenizer_it_can_write(tokenizer, learned, tmp_path):
    backbone = load_backbone(save_tiny_backbone(tmp_path), dtype="float32")
    backbone.model.resize_token_embeddings(len(tokenizer))
    head = backbone.model.get_output_embeddings().weight
    first, second = tags = ids_of(tokenizer, "<tool_call>", "</tool_call>")
    with torch.no_grad():
        head[second] = -head[first] if learned else head[first]
    backbone.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path), dtype="float32")
    assert set(tags).issubset(loaded.tokenizer(CALL)["input_ids"]) == learned
    assert loaded.spelt == (() if learned else ("</tool_call>", "<tool_call>"))


def test_tokens_beyond_the_head_are_left_as_they_are(tokenizer):
    head = torch.randn(len(tokenizer) - 1, 16, generator=torch.Generator().manual_seed(0))
    before = tokenizer(CALL)["input_ids"]
    assert spell_unlearned(tokenizer, head) == ()
    assert tokenizer(CALL)["input_ids"] == before
