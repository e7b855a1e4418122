"""Safetensors files: as the library has them, and every lie in a header found out."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steerrec.errors import ArtifactError
from steerrec.tensor_files import TensorFile, write_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = {"b": (3,), "a": (2, 5), "scalar": (), "empty": (0, 4)}
    return {
        name: (torch.randn(shape, generator=generator) * 3).to(dtype)
        for name, shape in values.items()
    }


def read(path):
    with TensorFile(path, path.parent) as file:
        return {name: file.read(name) for name in file.tensors}, file.metadata


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_is_written_and_the_other_way_round(path, dtype):
    write_tensors(path, tensors(dtype), {"made": "here", "é": "𝄞"})
    assert same(load_file(path), tensors(dtype))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made": "here", "é": "𝄞"}
    save_file(tensors(dtype), path, {"made": "there"})
    found, metadata = read(path)
    assert same(found, tensors(dtype))
    assert metadata == {"made": "there"}


def test_equal_tensors_give_equal_bytes_in_any_order(path):
    metadata = {f"key{n}": str(n) for n in range(20)}
    write_tensors(path, tensors(), metadata)
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == first
    assert int.from_bytes(first[:8], "little") % 8 == 0  # the tensors are aligned


def test_a_transposed_tensor_is_written_as_it_reads(path):
    write_tensors(path, {"a": torch.arange(6.0).view(2, 3).T}, {})
    assert torch.equal(read(path)[0]["a"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_tensors_outlive_the_file(path):
    """They are in memory of their own: a map of the file would end in a crash."""
    write_tensors(path, {"a": torch.ones(1000)}, {})
    found, _ = read(path)
    path.write_bytes(b"")
    assert float(found["a"].sum()) == 1000


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), start=0, stop=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


EIGHT = bytes(8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has 0 bytes"),
        (b"\0" * 7, "it has 7 bytes"),
        (raw({}, length=10**18), "its header claims 1000000000000000000"),
        (raw({}, length=3), "its header claims 3"),
        (raw({}, length=1), "cannot be read"),
        (b"\xff" * 8 + b"{}", "its header claims 18446744073709551615"),
        (raw(b"[]"), "is not a JSON object"),
        (raw({"a": entry()}), "its tensors take 8 bytes of 0"),
        (raw({"a": entry()}, EIGHT[:7]), "its tensors take 8 bytes of 7"),
        (raw({"a": entry()}, EIGHT + b"\0"), "its tensors take 8 bytes of 9"),
        (raw({"a": entry(start=1, stop=9)}, EIGHT + b"\0"), "begins at 1, not at 0"),
        (raw({"a": entry(), "b": entry()}, EIGHT), "'b' begins at 0, not at 8"),
        (raw({"a": entry(), "b": entry(start=4, stop=12)}, EIGHT * 2), "begins at 4, not at 8"),
        (raw({"a": entry(), "b": entry(start=9, stop=17)}, EIGHT * 3), "begins at 9, not at 8"),
        (raw({"a": entry(shape=(3,))}, EIGHT), "'a' is described as"),
        (raw({"a": entry(shape=(2, 10**15))}, EIGHT), "'a' is described as"),
        (raw({"a": entry(shape=(-2,))}, EIGHT), "'a' is described as"),
        (raw({"a": entry(shape=(2.0,))}, EIGHT), "'a' is described as"),
        (raw({"a": entry(shape=(True, 2))}, EIGHT), "'a' is described as"),
        (raw({"a": entry(shape=(1,) * 9, stop=4)}, EIGHT[:4]), "'a' is described as"),
        (raw({"a": entry(dtype="F4")}, EIGHT), "'a' is described as"),
        (raw({"a": entry(dtype=["F32"])}, EIGHT), "'a' is described as"),
        (raw({"a": entry(start=-8, stop=0)}, EIGHT), "'a' is described as"),
        (raw({"a": entry(start=8, stop=0)}, EIGHT), "'a' is described as"),
        (raw({"a": entry(stop="8")}, EIGHT), "'a' is described as"),
        (raw({"a": {**entry(), "more": 1}}, EIGHT), "'a' is described as"),
        (raw({"a": {"dtype": "F32"}}, EIGHT), "'a' is described as"),
        (raw({"a": None}, EIGHT), "'a' is described as"),
        (raw({"__metadata__": []}), "its metadata is not text by name"),
        (raw({"__metadata__": {"a": 1}}), "its metadata is not text by name"),
        (raw(b'{"a": 1, "a": 2}'), "key 'a' occurs twice"),
        (raw(b" " * (5 << 20)), "a header of 5242880 bytes; expected at most"),
    ],
)
def test_a_header_that_lies_is_found_out_before_anything_is_allocated(
    path, monkeypatch, content, reason
):
    path.write_bytes(content)
    monkeypatch.setattr(torch, "empty", None)  # nothing could be
    with pytest.raises(ArtifactError, match=rf"file\.safetensors.* {reason}"):
        TensorFile(path, path.parent)


def test_the_library_takes_zero_by_a_million_and_require_does_not(path):
    path.write_bytes(raw({"a": entry(shape=(0, 10**15), stop=0)}))
    message = r"'a' is float32 of shape \(0, 1000000000000000\)"
    with TensorFile(path, path.parent) as file, pytest.raises(ArtifactError, match=message):
        file.require({"a": (0, 4)}, torch.float32)


def test_require_wants_exactly_these_tensors(path):
    write_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(2)}, {})
    with TensorFile(path, path.parent) as file:
        file.require({"a": (2,), "b": (2,)}, torch.float32)
        file.require({"a": (2,)}, torch.float32, others=(2,))
        for shapes, others, reason in (
            ({"a": (2,)}, None, "'b' is float32 of shape .*; expected no such tensor"),
            ({"a": (2,)}, (3,), r"'b' is .*; expected float32 of shape \(3,\)"),
            ({"a": (2,), "b": (2,), "c": (1,)}, None, "'c' is missing; expected float32"),
            ({"a": (1, 2), "b": (2,)}, None, r"'a' is .*; expected float32 of shape \(1, 2\)"),
        ):
            with pytest.raises(ArtifactError, match=f"tensor {reason}"):
                file.require(shapes, torch.float32, others=others)
        with pytest.raises(ArtifactError, match="expected float16 of shape"):
            file.require({"a": (2,), "b": (2,)}, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(path, dtype, value):
    for place in (0, 63, 999):
        tensor = torch.full((2, 500), -1.0, dtype=dtype)
        tensor.view(-1)[place] = value
        write_tensors(path, {"a": tensor}, {})
        with (
            TensorFile(path, path.parent) as file,
            pytest.raises(ArtifactError, match="not finite"),
        ):
            file.read("a")


def test_a_file_that_shrinks_while_it_is_open_is_an_error(path):
    write_tensors(path, {"a": torch.zeros(10_000)}, {})
    with TensorFile(path, path.parent) as file:
        path.open("r+b").truncate(1000)
        with pytest.raises(ArtifactError, match="ends in the middle of 'a'"):
            file.read("a")
