"""Sources: files, the hub (never reached here) and the generator; splits, hashes and the report of bad rows."""

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerroute.data.conversation import Conversation, Message, ToolCall
from layerroute.data.preview import summary
from layerroute.data.sources import (
    LoadReport,
    content_hash,
    load_conversations,
    load_sources,
    messages_hash,
    split_of,
)
from layerroute.errors import ConfigError, DataError


def row(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Hello"}], **more}


def talk(text: str, split: str | None = None, **more: Any) -> Conversation:
    return Conversation("x", (Message("user", text), Message("assistant", "Hello")), split=split, **more)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return str(path)


def bad_lines(path: Path) -> str:
    lines = [
        json.dumps(row()).encode(),
        b"",
        b'{"messages": ',
        b'{"foo": 1}',
        b"\xff\xfe",
        b"[1]",
        b'{"question": "x", "answer": NaN}',
        json.dumps(row(split="tset")).encode(),
        json.dumps(row("\ud800", split="train")).encode(),
        json.dumps(row(id="\ud800", split="train")).encode(),
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_jsonl(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": '{"x": 1}'}}]
    source = write(
        tmp_path / "talks.jsonl",
        row("é", id="a", source="mine", split="Val"),
        {"messages": [*row()["messages"], {"role": "assistant", "tool_calls": calls}], "tools": [{"name": "f"}]},
        {"question": "2+2?", "answer": "4", "split": "test"},
    )
    found, report = load_conversations(source)
    assert report == LoadReport(source, 3, 3, ())
    assert [c.id for c in found] == ["a", f"{source}:2", f"{source}:3"]
    assert [c.source for c in found] == ["mine", "talks", "talks"]
    assert [c.split for c in found] == ["validation", split_of(found[1]), "test"]
    assert found[1].messages[2].tool_calls == (ToolCall("f", {"x": 1}),)


def test_all_bad_rows_are_listed_with_their_lines(tmp_path: Path) -> None:
    source = bad_lines(tmp_path / "a.jsonl")
    with pytest.raises(DataError) as caught:
        load_conversations(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: 9 of 10 rows can't be read:\n")
    reasons = [
        "3: not valid JSON",
        "4: the fields (foo) match no known row shape",
        "5: not UTF-8 (byte 1)",
        "6: a row must be a JSON object, not list",
        "7: not usable JSON (NaN",
        "8: 'split' is 'tset'. Did you mean 'test'?",
        "9: text with a lone surrogate",
        "10: text with a lone surrogate",
        "11: not usable JSON",
    ]
    for reason, line in zip(reasons, message.splitlines()[1:-1], strict=True):
        assert line.startswith(f"  {source}:{reason}")
    assert "--skip-bad" in message.splitlines()[-1]


def test_skip_bad_counts_them(tmp_path: Path) -> None:
    source = bad_lines(tmp_path / "a.jsonl")
    found, report = load_conversations(source, skip_bad=True)
    assert (len(found), report.rows, report.kept, len(report.bad)) == (1, 10, 1, 9)
    assert report.bad[2] == (f"{source}:5", "not UTF-8 (byte 1). Save the file as UTF-8.")


def test_a_long_list_of_bad_rows_is_cut_at_twenty(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_conversations(write(tmp_path / "a.jsonl", *[{"n": 1}] * 25))
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-2]) == (23, "  and 5 more")


def test_nothing_readable_is_an_error_even_with_skip_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of its 1 rows can be read.*a.jsonl:1: a row must be"):
        load_conversations(write(tmp_path / "a.jsonl", 3), skip_bad=True)
    with pytest.raises(DataError, match="holds no rows"):
        load_conversations(write(tmp_path / "b.jsonl"))


def test_split_and_limit(tmp_path: Path) -> None:
    rows = [row(str(n), split="test" if n % 2 else "train") for n in range(10)]
    source = write(tmp_path / "a.jsonl", *rows)
    found, report = load_conversations(source, split="test", limit=2)
    assert [c.messages[0].content for c in found] == ["1", "3"]
    assert (report.rows, report.kept) == (4, 2)
    with pytest.raises(DataError, match=r"no conversation in split 'validation'. It has train \(5\), test \(5\)"):
        load_conversations(source, split="validation")
    with pytest.raises(ConfigError, match="Did you mean 'test'"):
        load_conversations(source, split="tests")
    with pytest.raises(ConfigError, match="limit: 0"):
        load_conversations(source, limit=0)


def snapshots(number: int, turns: int, **fields: Any) -> list[dict[str, Any]]:
    """A log of requests: a row for every answer of one conversation, each with all that went before."""
    messages: list[dict[str, str]] = []
    rows = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"{number} asks {turn}"},
            {"role": "assistant", "content": f"answer {turn}"},
        ]
        rows.append({"messages": list(messages), **fields})
    return rows


def test_of_a_log_of_requests_the_longest_row_of_each_conversation_is_kept(tmp_path: Path) -> None:
    rows = [row for turn in zip(*(snapshots(number, 3) for number in range(40)), strict=True) for row in turn]
    source = write(tmp_path / "a.jsonl", *rows)
    said: list[str] = []
    whole, _ = load_sources([source], say=said.append)
    assert [len(c.messages) for c in whole] == [6] * 40
    assert said == [f"{source}: 80 rows left out, because another row goes on from each"]
    assert summary(whole)["conversations"]["steps_in_two_splits"] == 0
    for split in ("train", "test"):
        mine = [c for c in whole if c.split == split]
        found, report = load_conversations(source, split=split, limit=3)
        assert [c.messages for c in found] == [c.messages for c in mine[:3]]
        assert (report.rows, report.kept) == (120, 3)
    own, report = load_conversations(write(tmp_path / "b.jsonl", *snapshots(0, 3, split="test")), limit=2)
    assert (len(own), report.rows, report.begun) == (2, 2, 0)  # its own split counts, and rows behind aren't read


def test_gzip_bom_and_json_list(tmp_path: Path) -> None:
    lines = "\ufeff" + json.dumps(row("a")) + "\r\n" + json.dumps(row("b"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.json").write_text(json.dumps([row("a"), row("b")]), encoding="utf-8")
    zipped, listed = (load_conversations(str(tmp_path / name))[0] for name in ("a.jsonl.gz", "b.json"))
    assert [c.messages for c in zipped] == [c.messages for c in listed] == [talk("a").messages, talk("b").messages]
    assert {c.source for c in zipped} == {"a"}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl.gz", gzip.compress(json.dumps(row()).encode() * 99)[:60], "damaged gzip file"),
        ("a.jsonl.gz", b"{}", "damaged gzip file"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.json", b"{}", "must hold a list of rows"),
        ("a.json", b"[", "not valid JSON"),
        ("a.csv", b"", "unknown kind of file"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as caught:
        load_conversations(str(tmp_path / name), skip_bad=True)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_parquet_round_trip_without_foreign_arguments(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "2"}}]
    rows = [{"messages": [row()["messages"][0], {"role": "assistant", "tool_calls": [call]}]} for call in calls]
    parquet.write_table(arrow.Table.from_pylist([*rows, {"messages": []}]), tmp_path / "a.parquet")
    found, report = load_conversations(str(tmp_path / "a.parquet"), skip_bad=True)
    assert [c.messages[1].tool_calls[0].arguments for c in found] == [{"x": 1}, {"y": "2"}]
    assert [where for where, _ in report.bad] == [f"{tmp_path}/a.parquet:3"]


def test_what_json_cannot_write_is_a_bad_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "since": date(2026, 1, 1)}}
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "tools": [tool]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: a value of a call or a tool that JSON can't write .*date"):
        load_conversations(str(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"layerroute\[hub\]"):
        load_conversations(str(tmp_path / "a.parquet"))


def test_directory_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl", row("last"))
    write(tmp_path / "b.jsonl", row("first"))
    write(tmp_path / ".hidden.jsonl", row("never"))
    (tmp_path / ".checkpoints").mkdir()
    write(tmp_path / ".checkpoints" / "c.jsonl", row("never"))
    (tmp_path / "spark.parquet").mkdir()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl: can.t be read"):  # never passed over in silence
        load_conversations(str(tmp_path))
    (tmp_path / "gone.jsonl").unlink()
    write(tmp_path / "config.json", {"not": "data"})
    found, _ = load_conversations(str(tmp_path))
    assert [c.messages[0].content for c in found] == ["first", "last"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .jsonl, .jsonl.gz, .parquet file in this directory"):
        load_conversations(str(tmp_path / "empty"))


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    write(tmp_path / "transcripts.jsonl", row())
    with pytest.raises(DataError, match=r"no such file. Did you mean 'transcripts.jsonl'\?"):
        load_conversations(str(tmp_path / "transcript.jsonl"))
    with pytest.raises(DataError, match="Give a file, a directory, hf:owner/name or builtin"):
        load_conversations(str(tmp_path / "nowhere" / "zzz"))
    for source in ("x" * 300, "~nosuchuser/x.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            load_conversations(source)


# The hub


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_rows_keep_the_splits_they_are_filed_under(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    parts = {"train": [{"question": "a", "answer": "b", "rationale": None}], "test": [row("c")], "extra": [row("d")]}
    hub(monkeypatch, lambda *args: asked.append(args) or parts)
    found, _ = load_conversations("hf:openai/gsm8k:main")
    assert asked == [("openai/gsm8k", "main")]
    assert [c.id for c in found] == ["openai/gsm8k/train:1", "openai/gsm8k/test:1", "openai/gsm8k/extra:1"]
    assert [c.split for c in found] == ["train", "test", split_of(found[2])]
    assert {c.source for c in found} == {"openai/gsm8k"}


def test_hub_data_with_one_part_is_split_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda *_: {"train": [row(str(n)) for n in range(60)]})
    assert {c.split for c in load_conversations("hf:a/b")[0]} == {"train", "validation", "test"}


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it.\nmore"), ConnectionError(), KeyError("x")])
def test_unreachable_hub_is_one_sentence_with_alternatives(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> Any:
        raise error

    hub(monkeypatch, fail)
    with pytest.raises(DataError, match=r"^hf:a/b: can't be had from the hub \([^\n]+\); give .*or builtin.$"):
        load_conversations("hf:a/b")


def test_hub_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'layerroute\[hub\]'"):
        load_conversations("hf:a/b")
    for source in ("hf:", "hf:gsm8k", "hf:a/b/c", "hf:a/b:"):
        with pytest.raises(DataError, match="Write hf:owner/name"):
            load_conversations(source)


# The generator


def test_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def generate(count: int, start: int) -> list[Conversation]:
        asked.append((count, start))
        return [talk(str(start + i)) for i in range(count)]

    module = ModuleType("layerroute.data.generator")
    module.generate = generate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "layerroute.data.generator", module)
    found, report = load_conversations("builtin:30")
    assert (len(found), report.rows) == (30, 30)
    assert all(c.split == split_of(c) and c.source == "builtin" for c in found)
    load_conversations("builtin", limit=1)
    assert load_conversations("builtin:20-30")[0] == found[20:]
    assert asked == [(30, 0), (2000, 0), (10, 20)]
    for source in ("builtin:", "builtin:x", "builtin:0", "builtin:-1", "builtin:30-30", "builtin:30-", "builtin:1-2-3"):
        with pytest.raises(DataError, match="builtin:500"):
            load_conversations(source)


# Splits and hashes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(texts=st.lists(st.text(max_size=2), min_size=1, max_size=20))
def test_loading_each_split_parts_the_file_without_overlap(tmp_path: Path, texts: list[str]) -> None:
    source = write(tmp_path / "a.jsonl", *map(row, texts))
    whole, _ = load_conversations(source)
    parts = {c.split: load_conversations(source, split=c.split)[0] for c in whole}
    assert sum(map(len, parts.values())) == len(whole) == len(texts)
    seen = [{messages_hash(c) for c in part} for part in parts.values()]
    assert len(set().union(*seen)) == sum(map(len, seen)) == len(set(texts))


@given(st.lists(st.tuples(st.text(max_size=3), st.sampled_from(["", "f"])), max_size=30))
def test_splits_are_disjoint_and_duplicates_together(texts: list[tuple[str, str]]) -> None:
    places: dict[str, set[str]] = {}
    for number, (text, tool) in enumerate(texts):
        tools = ({"name": tool},) if tool else ()
        conversation = replace(talk(text, tools=tools), id=str(number))
        places.setdefault(text, set()).add(split_of(conversation))
    assert all(len(splits) == 1 for splits in places.values())


@pytest.mark.parametrize("first", [True, False])
def test_a_copy_goes_with_the_row_that_has_a_split(tmp_path: Path, first: bool) -> None:
    text = next(text for text in map(str, range(99)) if split_of(talk(text)) == "train")
    rows = [row(text), row(text, split="test")]
    source = write(tmp_path / "a.jsonl", *(rows if first else rows[::-1]))
    assert [c.split for c in load_conversations(source)[0]] == ["test", "test"]
    with pytest.raises(DataError, match=r"no conversation in split 'train'. It has test \(2\)"):
        load_conversations(source, split="train")


def test_splits_are_80_10_10() -> None:
    splits = [split_of(talk(str(n))) for n in range(2000)]
    assert splits.count("train") == pytest.approx(1600, abs=60)
    assert splits.count("validation") == pytest.approx(200, abs=45)
    assert splits.count("test") == pytest.approx(200, abs=45)


def test_splits_never_change_between_versions() -> None:
    places = [split_of(talk(str(n))) for n in range(24)]
    assert [n for n, split in enumerate(places) if split == "validation"] == [15]
    assert [n for n, split in enumerate(places) if split == "test"] == [2, 5, 12]


def test_a_row_whose_answer_is_context_alone_in_the_longer_one_is_kept(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 1}]
    again = [{**asked[0]}, {**asked[1], "weight": 0}, *asked]
    path = write(tmp_path / "log.jsonl", {"messages": asked}, {"messages": again})
    found, report = load_conversations(path)
    assert (len(found), report.begun) == (2, 0)
    path = write(tmp_path / "log.jsonl", {"messages": asked}, {"messages": [*asked, *asked]})
    assert load_conversations(path)[1].begun == 1


def test_rows_whose_earlier_answers_are_context_alone_lie_in_one_split(tmp_path: Path) -> None:
    rows = [row for number in range(60) for row in snapshots(number, 3)]
    for each in rows:
        for message in each["messages"][1:-1:2]:
            message["weight"] = 0
        each["messages"] = [dict(message) for message in each["messages"]]
        each["messages"][-1]["weight"] = 1
    source = write(tmp_path / "log.jsonl", *rows)
    whole, report = load_conversations(source)
    assert (len(whole), report.begun) == (180, 0)
    places: dict[str, set[str | None]] = {}
    for conversation in whole:
        places.setdefault(conversation.messages[0].content, set()).add(conversation.split)
    assert all(len(splits) == 1 for splits in places.values())
    assert len(set.union(*places.values())) == 3
    assert summary(whole)["conversations"]["steps_in_two_splits"] == 0
    moved = [replace(c, split="test" if len(c.messages) == 2 else "train") for c in whole]
    assert summary(moved)["conversations"]["steps_in_two_splits"] == 60
    for split in ("train", "test"):
        assert load_conversations(source, split=split)[0] == [c for c in whole if c.split == split]
    longer = {"messages": [*rows[2]["messages"], *row("x")["messages"]], "split": "test"}
    found, _ = load_conversations(write(tmp_path / "more.jsonl", *rows, longer))
    assert {c.split for c in found if c.messages[0].content == "0 asks 0"} == {"test"}


def test_content_hash_changes_with_content_alone() -> None:
    first, second = talk("a", "train"), talk("b", "train")
    one = content_hash([first, second])
    assert len(one) == 16
    assert int(one, 16) >= 0
    assert content_hash([second, replace(first, id="other", source="s")]) == one
    calls = (first.messages[0], Message("assistant", "Hello", (ToolCall("f", {"x": 1}),)))
    changed = [
        [first],
        [first, first, second],
        [first, talk("c", "train")],
        [first, replace(second, split="test")],
        [first, replace(second, tools=({"name": "f"},))],
        [second, replace(first, messages=calls)],
    ]
    assert len({one, *map(content_hash, changed)}) == 1 + len(changed)
    assert messages_hash(first) == messages_hash(replace(first, split="test", tools=({"name": "f"},)))


# The summary


def test_summary_is_json_and_counts() -> None:
    tool = replace(talk("a", "train", source="s"), tools=({"name": "f"},))
    acting = (tool.messages[0], Message("assistant", "", (ToolCall("f", {}),)))
    conversations = [tool, replace(tool, split="test"), replace(tool, messages=acting), talk("b", source="t")]
    step = SimpleNamespace(input_ids=(1,) * 10, context_length=7, kind="tool_call", source="s", tools_offered=True)
    document = summary(conversations, [step])
    assert json.loads(json.dumps(document)) == document
    assert document["content_hash"] == content_hash(conversations)
    assert document["conversations"] == {
        "count": 4,
        "turns": 4,
        "by_source": {
            "s": {"train": 2, "validation": 0, "test": 1},
            "t": {"train": 0, "validation": 0, "test": 0, "none": 1},
        },
        "by_split": {"train": 2, "validation": 0, "test": 1, "none": 1},
        "by_kind": {"tool_call": 1, "planning": 3},
        "with_tools": 3,
        "distinct_tools": 1,
        "duplicates": 1,
        "in_two_splits": 1,
        "steps_in_two_splits": 1,
    }
    assert document["steps"] == {
        "count": 1,
        "by_kind": {"tool_call": 1, "planning": 0},
        "by_source": {"s": {"tool_call": 1, "planning": 0}},
        "tools_offered": {"tool_call": 1, "planning": 0},
    }
    assert document["tokens"]["tool_call"]["response"]["median"] == 3
    assert not {"steps", "tokens"} & set(summary(conversations))
    assert document["tokens"]["planning"]["step"] == {}


def test_a_hub_rows_own_split_counts_more_than_the_part_it_is_filed_under(monkeypatch) -> None:
    hub(monkeypatch, lambda *_: {"train": [row("a", split="test"), row("b")], "test": [row("c")]})
    assert [c.split for c in load_conversations("hf:a/b")[0]] == ["test", "train", "test"]


def test_the_limit_is_that_of_each_source(tmp_path) -> None:
    sources = [
        write(tmp_path / f"{name}.jsonl", *(row(f"{name} {n}", split="train") for n in range(4))) for name in "ab"
    ]
    found, _ = load_sources(sources, split="train", limit=3)
    assert [c.source for c in found] == ["a"] * 3 + ["b"] * 3
