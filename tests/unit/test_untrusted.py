"""Files and JSON from strangers: what is read, and everything that is refused before it costs."""

import contextlib
import json
import os
import tracemalloc

import pytest

from steerrec.errors import ArtifactError
from steerrec.untrusted import MAX_JSON, json_able, open_inside, parse_json, read_json, shown

# --- JSON


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, True, None, "é𝄞"], "b": {}},
        [10**18 - 1, -(10**17), 1e-300, 0.1],
        "text",
        0,
        {"": "\x00\n"},
    ],
)
def test_honest_json_is_read_as_the_standard_library_reads_it(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2)):
        assert parse_json(text, "it") == value
        assert parse_json(text.encode(), "it") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{} {}", "Extra data"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' occurs twice"),
        ("NaN", "it holds NaN"),
        ('{"a": [Infinity]}', "it holds Infinity"),
        ("-Infinity", "it holds -Infinity"),
        ("1e999", "not finite"),
        ("9" * 20, "an integer of 20 characters"),
        ("-" + "9" * 5000, "an integer of 5001 characters"),
        ("[" * 60 + "]" * 60, "too deeply nested"),
        ('{"a":' * 60 + "1" + "}" * 60, "too deeply nested"),
        ("[" * 50_000, "too deeply nested"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        (b"\xff", "can't decode byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("[" + "1," * 100_001 + "1]", "more than 100000 values"),
        ("[" + "{}," * 50_001 + "{}]", "more than 100000 values"),
        (" " * (MAX_JSON + 1), "longer than"),
    ],
)
def test_json_with_a_trap_in_it_is_refused(text, reason):
    with pytest.raises(ArtifactError, match=rf"^the file cannot be read: .*{reason}"):
        parse_json(text, "the file")


def test_the_depth_and_the_digits_that_are_allowed():
    assert parse_json("[" * 50 + "]" * 50, "it")
    assert parse_json("-" + "9" * 18, "it") == -(10**18) + 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 99_000,
        "[" + "{}," * 49_000 + "{}]",
        "[" + "[]," * 49_000 + "1]",
        "[" + '"a",' * 99_000 + '"a"]',
        '{"' + "é" * 2_000_000 + '": "𝄞"}',
        "[" + ",".join(f'{{"{n}":{n}}}' for n in range(49_000)) + "]",
    ],
    ids=["deep", "dicts", "lists", "strings", "wide", "keys"],
)
def test_memory_is_bounded_whatever_the_values(text):
    data = text.encode()
    tracemalloc.start()
    try:
        with contextlib.suppress(ArtifactError):
            parse_json(data, "it")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(data) + (32 << 20)


def test_what_is_written_can_be_read():
    value = {"a": (1.5, float("nan"), float("-inf")), 2: None, "b": {"c": [True]}}
    assert json_able(value) == {"a": [1.5, None, None], "2": None, "b": {"c": [True]}}
    with pytest.raises(ArtifactError, match=r"a set cannot be saved in JSON"):
        json_able({"a": {1, 2}})


def test_what_is_shown_is_short_and_escaped():
    assert shown("a\x1b[31m\n") == r"'a\x1b[31m\n'"
    assert len(shown("x" * 10**6)) == 81


# --- files


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "outside.json").write_text('{"secret": 1}')
    (tmp_path / "root" / "inside.json").write_text('{"mine": 1}')
    return tmp_path / "root"


def test_a_file_inside_is_read(root):
    assert read_json(root / "inside.json", root) == {"mine": 1}


def test_links_may_lead_within_the_root_and_nowhere_else(root, tmp_path):
    (root / "inner" / "in.json").symlink_to("../inside.json")
    assert read_json(root / "inner" / "in.json", root) == {"mine": 1}
    (root / "out.json").symlink_to("../outside.json")
    (root / "absolute.json").symlink_to(tmp_path / "outside.json")
    (root / "folder").symlink_to(tmp_path)
    for name in ("out.json", "absolute.json", "folder/outside.json"):
        with pytest.raises(ArtifactError, match=rf"{name} is a link that leads out of"):
            read_json(root / name, root)
        assert read_json(root / name, tmp_path) == {"secret": 1}


def test_a_root_that_is_a_link_itself_is_no_way_out(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    assert read_json(tmp_path / "alias" / "inside.json", tmp_path / "alias") == {"mine": 1}


def test_what_is_no_regular_file_is_refused_at_once(root):
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    for name, reason in (("pipe", "no regular file"), ("inner", "."), ("loop", ".")):
        with pytest.raises(ArtifactError, match=rf"{name} cannot be read: .*{reason}"):
            open_inside(root / name, root)
    with pytest.raises(ArtifactError, match="absent does not exist"):
        open_inside(root / "absent", root)


def test_a_huge_file_is_not_read_whole(root):
    with (root / "huge.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match="longer than"):
        read_json(root / "huge.json", root)
