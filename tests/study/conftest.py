"""A study of a tiny backbone on a folder of made-up transcripts, as a YAML file."""

import json

import pytest
import torch
import yaml
from tiny import save_tiny_backbone

WORDS = ["red", "blue", "green", "tall", "short", "fast", "slow", "old", "new", "big"]


def write_transcripts(path, count=30):
    rows = []
    for index in range(count):
        word = WORDS[index % len(WORDS)]
        messages = [
            {"role": "user", "content": f"Paint it {word} {index}."},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"name": "paint", "arguments": {"colour": word, "coats": index}}],
            },
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": f"It is {word} now, all {index} coats."},
        ]
        split = "test" if index % 5 == 4 else "train"
        rows.append({"messages": messages, "tools": [{"name": "paint"}], "split": split})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def declared(tmp_path):
    """The study as plain data; `save` writes it."""
    write_transcripts(tmp_path / "log.jsonl")
    common = {"data": [str(tmp_path / "log.jsonl")], "max_length": 700, "dtype": "float32"}
    answers = {"tasks": ["tool_calls"], "task_limit": 3, "task_tokens": 4, "timed_steps": 0}
    return {
        "output": str(tmp_path / "study"),
        "seeds": [0, 1],
        "reference": "open",
        "train": {
            **common,
            "model": save_tiny_backbone(tmp_path / "backbone"),
            "steps": 4,
            "batch_size": 2,
            "save_every": 2,
            "adapter": {"lora": {"dropout": 0.1}, "bypass": {"rank": 4}},
            "settle": {"at": 0.3, "free": 0.6, "steps": 2, "fit": 4},
        },
        "evaluate": {**common, "bootstrap": 20, "curve_steps": 0, "controls": ["two_masks"], **answers},
        "variants": {"open": {"train": {"objective": "open"}, "evaluate": {"controls": []}}, "budget": {}},
    }


@pytest.fixture
def save(tmp_path):
    """Write a declared study and return its file."""

    def write(declared):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(declared, sort_keys=False))
        return path

    return write


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are faster on one thread, and much faster where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
