"""Spell out the tokens that a backbone never learned, so that it can write their text.

A vocabulary may hold a token of its own for `<tool_call>` that was never trained: its row equals those of other unused
tokens. LoRA on the attention can't help, because a frozen head gives equal rows equal logits, and no tool call would
ever be written (Qwen2.5-Coder-0.5B; lab notes, 2026-11-26). Spelt as `<`, `tool`, `_call`, `>`, the text is the same.
"""

import json
from typing import Any

import torch
from torch import Tensor

SAME = 0.999  # cosine above which a head can't tell two rows apart
SPELT = "\0"  # begins the text of an added token that is spelt out already


def spell_unlearned(tokenizer: Any, head: Tensor) -> tuple[str, ...]:
    """Make `tokenizer` spell its unlearned text tokens, and return their texts.

    Unlearned is an added token whose row in `head` is the same as another added token's. Special tokens stay: they are
    no text. The tokenizer is changed in place; ids of other tokens stay as they are.

    Args:
        tokenizer: a fast tokenizer of transformers.
        head: the rows of the LM head, (vocabulary, dim).
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:  # not a fast one: left as it is
        return ()
    state = json.loads(inner.to_str())
    added = [token for token in state["added_tokens"] if token["id"] < len(head) and token["content"][0] != SPELT]
    rows = head[[token["id"] for token in added]].detach().float()
    empty, rows = ~rows.any(dim=1), torch.nn.functional.normalize(rows, dim=1)
    same = ((rows @ rows.T) > SAME) | (empty[:, None] & empty)
    alike = same.fill_diagonal_(False).any(dim=1).tolist()
    texts = {token["content"] for token, same in zip(added, alike, strict=True) if same and not token["special"]}
    if texts:
        from tokenizers import Tokenizer

        # Ids of added tokens that the vocabulary lacks are counted in order, so such a one keeps its place, under a
        # text that nobody writes.
        known = inner.get_vocab(with_added_tokens=False)
        state["added_tokens"] = [
            token | {"content": SPELT + token["content"]} if token["content"] in texts else token
            for token in state["added_tokens"]
            if token["content"] not in texts or token["content"] not in known
        ]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # transformers has no public way
    return tuple(sorted(texts))
