"""Checkpoints are read without running them: what they hold comes out, what they name is inert."""

import collections
import datetime
import io
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import textwrap
import time
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerrec.errors import CheckpointError, ModelError
from steerrec.unpickling import Stub, find_state_dict, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*ComplexHalf")


def save(value, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


def crafted(path, pickled, members=(), root="archive", **more):
    """A checkpoint around a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        for name, content in [*dict(members).items(), *more.items()]:
            archive.writestr(f"{root}/{name}", content)
    return path


def bytes_of(tensor):
    return (
        torch.empty(tensor.shape, dtype=tensor.dtype)
        .copy_(tensor.detach())
        .untyped_storage()
        .tolist()
    )


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        )
        assert ours.storage_offset() == theirs.storage_offset() or not theirs.numel()
        assert ours.requires_grad == theirs.requires_grad
        assert bytes_of(ours) == bytes_of(theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)) and not isinstance(theirs, torch.Size):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.tolist() == theirs.tolist()
    else:
        assert ours == theirs


# --- what comes out

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    raw = torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    tensor = raw.view(dtype).reshape(shape)
    for _ in range(draw(st.integers(0, 3))):
        if not tensor.dim():
            tensor = tensor.expand(draw(st.integers(1, 3)))
            continue
        axis = draw(st.integers(0, tensor.dim() - 1))
        match draw(st.sampled_from(["transpose", "step", "narrow", "expand", "select"])):
            case "transpose":
                tensor = tensor.transpose(0, axis)
            case "step":
                tensor = tensor[:: draw(st.integers(1, 3))]
            case "narrow" if tensor.shape[axis]:
                start = draw(st.integers(0, tensor.shape[axis] - 1))
                tensor = tensor.narrow(axis, start, tensor.shape[axis] - start)
            case "expand":
                tensor = tensor.expand(draw(st.integers(1, 3)), *tensor.shape)
            case "select" if tensor.shape[axis]:
                tensor = tensor.select(axis, 0)
    if dtype.is_floating_point and draw(st.booleans()):
        tensor = torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.text(max_size=5), tensors(), max_size=4),
    zipped=st.booleans(),
    ordered=st.booleans(),
)
def test_tensors_come_out_as_torch_reads_them(tmp_path, values, zipped, ordered):
    path = tmp_path / "tensors.pt"
    save(
        collections.OrderedDict(values) if ordered else values,
        path,
        _use_new_zipfile_serialization=zipped,
    )
    try:
        expected = torch.load(path, weights_only=True)
    except AttributeError:  # torch cannot read its older format with the newer dtypes in it
        expected = collections.OrderedDict(values) if ordered else values
    assert_same(read_checkpoint(path), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_a_storage_still_do(tmp_path, zipped):
    table = torch.arange(12.0).reshape(3, 4)
    path = save(
        {"all": table, "row": table[1], "turned": table.T},
        tmp_path / "shared.pt",
        _use_new_zipfile_serialization=zipped,
    )
    read = read_checkpoint(path)
    read["all"][1, 2] = 100
    assert read["row"][2] == 100
    assert read["turned"][2, 1] == 100


def test_a_tensor_of_several_parts_is_read_whole(tmp_path):
    tensor = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8)
    for zipped in (True, False):
        path = save([tensor], tmp_path / "big.pt", _use_new_zipfile_serialization=zipped)
        assert torch.equal(read_checkpoint(path)[0], tensor)


def test_the_state_of_a_module_and_its_optimizer_is_read_with_its_attributes_left_out(tmp_path):
    module = torch.nn.TransformerEncoderLayer(8, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3, 8)).sum().backward()
    optimizer.step()
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "a state of its own"
    path = save(
        {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        tmp_path / "run.pt",
    )
    assert_same(read_checkpoint(path), torch.load(path, weights_only=True))
    (read,) = read_checkpoint(save([parameter], tmp_path / "noted.pt"))
    assert isinstance(read, torch.nn.Parameter)
    assert read.tolist() == [1, 1]


PLAIN = {
    "text": "ünï\ud800 code",
    b"bytes": b"\x00\xff" * 200,
    3: [True, False, None, -1, 255, 256, 65536, -(2**40), 2**200, 1.5, float("inf")],
    (1, "pair"): ({1, 2}, frozenset({"a"}), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    1.5: {"deep": [[[{"er": ()}]]], "empty": [{}, [], set()], "long": "x" * 70000},
    None: collections.OrderedDict(b=1, a=2),
    "bytes": [b"", b"x" * 300],
    "torch": [torch.float32, torch.bfloat16, torch.Size([2, 3]), torch.device("cuda", 1)],
    "many": list(range(3000)),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_come_out_as_they_went_in(tmp_path, protocol, zipped):
    path = save(
        PLAIN,
        tmp_path / "plain.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    assert_same(read_checkpoint(path), PLAIN)


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_text_protocols_are_read_too(tmp_path, protocol):
    plain = {"a": [1, -5, 2**70, 1.5, True, None, "ü\n"], "b": ((), (1,), {1})}
    pickled = pickle.dumps(plain, protocol)
    assert_same(read_checkpoint(crafted(tmp_path / "old.pt", pickled)), plain)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
        | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner),
    ),
    protocol=st.integers(2, 5),
)  # fmt: skip
def test_any_plain_value_comes_out_as_it_went_in(tmp_path, value, protocol):
    path = save(value, tmp_path / "any.pt", pickle_protocol=protocol)
    assert_same(read_checkpoint(path), value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_values_come_out_as_numbers_and_arrays(tmp_path, protocol):
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.array([], np.int64),
        np.array(3),
        np.array(["a", "ünï"]),
        np.array([b"a", b"bc"]),
        np.array([True, False]),
        np.array(["x", None, [1, [2]]], dtype=object),
        np.ones(3, np.float16),
        np.ones(3, np.complex64),
    ]
    scalars = [np.float64(1.5), np.int32(-2), np.bool_(True), np.str_("ü"), np.float32(0.5)]
    shared = arrays[0]
    path = save(
        {"arrays": arrays, "scalars": scalars, "shared": shared, "keys": {np.int64(3): 1}},
        tmp_path / "numpy.pt",
        pickle_protocol=protocol,
    )
    read = read_checkpoint(path)
    assert_same(read["arrays"], arrays)
    assert_same(read["scalars"], [scalar.item() for scalar in scalars])
    assert read["shared"] is read["arrays"][0]
    assert read["keys"] == {3: 1}
    read["shared"][0, 0] = 7  # owns its memory


def test_a_defaultdict_is_a_dict_and_the_rest_are_stubs(tmp_path):
    values = {
        "counts": collections.defaultdict(list, a=[1]),
        "date": datetime.date(2025, 4, 27),
        "times": np.array(["2025-04-27"], dtype="datetime64[D]"),
        "records": np.zeros(2, dtype=[("a", "i4")]),
        "function": json.dumps,
        "class": datetime.date,
        "storage": torch.ones(2).untyped_storage(),
    }
    read = read_checkpoint(save(values, tmp_path / "mixed.pt"))
    assert_same(read.pop("counts"), {"a": [1]})
    assert {key: type(value).__mro__[-2] for key, value in read.items()} == dict.fromkeys(
        read, Stub
    )
    assert read["date"].qualified_name == "datetime.date"
    assert len(read["date"].args) == 1
    assert read["function"].qualified_name == "json.dumps"
    assert read["function"].args is None
    assert "json.dumps" in repr(read["function"])


# --- objects of libraries that are not here


@pytest.fixture
def vanishing():
    """A module that exists while a checkpoint is written and no longer when it is read."""
    module = types.ModuleType("recbole_like")
    source = """
    import enum

    class Config:
        def __init__(self):
            self.final_config_dict = {"model": "SASRec", "type": Kind.SEQUENTIAL, "n_layers": 2}
        def __setstate__(self, state):
            raise AssertionError("ran")

    class Kind(enum.Enum):
        SEQUENTIAL = 2

    class Attributes(dict):
        pass

    class Log(list):
        pass

    class Slots:
        __slots__ = ("a",)
        def __init__(self): self.a = 1

    class Keyword:
        def __new__(cls, *, a): return super().__new__(cls)
        def __getnewargs_ex__(self): return (), {"a": 1}
    """
    exec(compile(textwrap.dedent(source), "recbole_like", "exec"), vars(module))
    for thing in list(vars(module).values()):
        if isinstance(thing, type):
            thing.__module__ = "recbole_like"
    sys.modules["recbole_like"] = module
    yield module
    sys.modules.pop("recbole_like", None)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_recbole_checkpoint_gives_its_tensors_and_its_configuration(
    tmp_path, vanishing, protocol
):
    state = torch.nn.Linear(3, 2).state_dict()
    path = save(
        {"config": vanishing.Config(), "epoch": 3, "state_dict": state, "other_parameter": {}},
        tmp_path / "recbole.pth",
        pickle_protocol=protocol,
    )
    del sys.modules["recbole_like"]
    read = read_checkpoint(path)
    config = read["config"]
    assert isinstance(config, Stub)
    assert config.qualified_name == "recbole_like.Config"
    settings = config.state["final_config_dict"]
    assert settings["n_layers"] == 2
    assert settings["type"].qualified_name == "recbole_like.Kind"
    assert settings["type"].args == (2,)
    assert_same(find_state_dict(read), dict(state))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_stub_keeps_what_its_object_was_given(tmp_path, vanishing, protocol):
    attributes = vanishing.Attributes(a=1, b=[2])
    attributes.own = 3
    keyed = {vanishing.Kind.SEQUENTIAL: "seq"}
    pickled = pickle.dumps(
        [attributes, vanishing.Log([5, 6]), vanishing.Keyword(a=1), keyed], protocol
    )
    vanished = sys.modules.pop("recbole_like")
    assert vanished is vanishing
    attributes, log, keyword, keyed = read_checkpoint(crafted(tmp_path / "stubs.pt", pickled))
    if protocol:  # protocol 0 gives the content to the constructor
        assert attributes.items == [("a", 1), ("b", [2])]
        assert log.items == [5, 6]
    assert attributes.state == {"own": 3}
    assert isinstance(keyword, Stub)
    if protocol == 4:
        assert keyword.kwargs == {"a": 1}
    assert [key.qualified_name for key in keyed] == ["recbole_like.Kind"]


def test_objects_that_refer_to_each_other_in_circles_are_read(tmp_path, vanishing):
    one, other = vanishing.Config(), vanishing.Config()
    one.other, other.other, one.own = other, one, [one]
    read = read_checkpoint(save(one, tmp_path / "circle.pt"))
    assert read.state["other"].state["other"] is read
    assert len(repr(read)) < 200


def test_a_whole_module_is_a_stub_that_find_state_dict_names(tmp_path):
    for zipped in (True, False):
        path = save(
            torch.nn.Linear(2, 2), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped
        )
        read = read_checkpoint(path)
        assert isinstance(read.state["_parameters"]["weight"], torch.nn.Parameter)
        with pytest.raises(ModelError, match=r"Linear.*save the state_dict"):
            find_state_dict(read)


# --- the state dict


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"net": state, "n_items": 5},
        lambda state: {"state_dict": {f"_model.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"torch_model.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"model.module.{k}": v for k, v in state.items()}},
        lambda state: {**state, "layer._extra_state": None},
    ],
)
def test_the_state_dict_is_found_in_the_usual_wrappings(wrap):
    state = {"layer.weight": torch.ones(2), "layer.bias": torch.nn.Parameter(torch.zeros(1))}
    found = find_state_dict(wrap(state))
    assert list(found) == list(state)
    assert type(found["layer.bias"]) is torch.Tensor


def test_a_prefix_that_not_all_names_have_stays():
    state = {"model.weight": torch.ones(2), "loss.weight": torch.ones(2)}
    assert list(find_state_dict(state)) == list(state)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "a dict of nothing"),
        ({"epoch": 3, "weights\x1b": [1]}, r"a dict of epoch, weights\\x1b;"),
        ([1], "a list"),
        (torch.ones(2), "a Tensor"),
        ({"state_dict": {"a": 1}}, "a dict of state_dict"),
        ({"state_dict": {1: torch.ones(1)}}, "a dict of state_dict"),
        (Stub("gru4rec.GRU4Rec", ()), r"<Stub gru4rec.GRU4Rec\(0 arguments\)>"),
    ],
)
def test_what_holds_no_state_dict_is_named(checkpoint, message):
    with pytest.raises(ModelError, match=message):
        find_state_dict(checkpoint)


# --- damaged, foreign and hostile files


def test_files_of_other_kinds_are_refused(tmp_path):
    def refused(content, match):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    refused(b"", "begins with")
    refused(b"version https://git-lfs.github.com/spec/v1", "begins with b'version https:/")
    refused(pickle.dumps({"a": 1}), "a pickle of something else")
    refused(pickle.dumps(0x1950A86A20F9469CFC6C), "damaged")
    refused(b"PK\3\4 nothing", "damaged")
    refused(b"\x80", "damaged")
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "pipe")


def sparse(): return torch.eye(3).to_sparse()  # fmt: skip


def csr(): return torch.eye(3).to_sparse_csr()  # fmt: skip


def meta(): return torch.empty(3, device="meta")  # fmt: skip


def conjugated(): return torch.ones(2, dtype=torch.complex64).conj()  # fmt: skip


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize("special", [sparse, csr, quantised, meta, conjugated])
def test_special_tensors_are_refused(tmp_path, special):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save({"weight": special()}, tmp_path / "special.pt")
    with pytest.raises(CheckpointError, match="is not read: "):
        read_checkpoint(path)


def repacked(source, target, change):
    """The checkpoint with its members as `change(name, content)` gives them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            for changed, content, method in change(name, old.read(name)):
                new.writestr(changed, content, method)
    return target


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: [(n, c, DEFLATED)], "compressed"),
        (lambda n, c: [(n, c, STORED)] * 2, "twice"),
        (lambda n, c: [(n, b"big" if n.endswith("byteorder") else c, STORED)], "byte order"),
        (lambda n, c: [(n.replace("data/", "../"), c, STORED)], "plain names"),
        (lambda n, c: [("/" + n, c, STORED)], "plain names"),
        (lambda n, c: [(n.replace("data/", "data\\"), c, STORED)], "plain names"),
        (lambda n, c: [(n, c, STORED)] * (not n.endswith("data/0")), "storage 0 is missing"),
        (lambda n, c: [(n, c[:20] if n.endswith("data/0") else c, STORED)], "claims 40 bytes"),
        (lambda n, c: [(n.replace("data.pkl", "other"), c, STORED)], "without one data.pkl"),
        (lambda n, c: [(n, c, STORED), ("second/data.pkl", b"N.", STORED)], "one data.pkl|twice"),
    ],
)
def test_tampered_archives_are_refused(tmp_path, change, message):
    source = save([torch.ones(10)], tmp_path / "good.pt")
    assert repacked(source, tmp_path / "same.pt", lambda n, c: [(n, c, STORED)]).exists()
    assert read_checkpoint(tmp_path / "same.pt")[0].sum() == 10
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(repacked(source, tmp_path / "bad.pt", change))


def test_torchscript_is_named(tmp_path):
    path = crafted(tmp_path / "script.pt", b"N.", {"constants.pkl": b"N."})
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(path)


def test_a_changed_byte_of_a_tensor_is_noticed(tmp_path):
    path = save([torch.full((100,), 2.0)], tmp_path / "good.pt")
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<2f", 2, 2)) + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC"):
        read_checkpoint(path)


def test_overlapping_members_are_refused(tmp_path):
    path = crafted(tmp_path / "good.pt", b"N.", {"data/0": b"0" * 100, "data/1": b"1" * 100})
    content = path.read_bytes()
    first, second = (content.index(b"PK\1\2"), content.rindex(b"PK\1\2"))
    middle = content.index(b"PK\1\2", first + 4)
    place = content[middle + 42 : middle + 46]
    path.write_bytes(content[: second + 42] + place + content[second + 46 :])
    with pytest.raises(CheckpointError, match="overlaps"):
        read_checkpoint(path)


# --- pickles, by hand


def op(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def integer(value):
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def tensor(size=(2,), stride=(1,), offset=0, count=10, key="0", kind="FloatStorage", dtype=None):
    def numbers(values):
        return b"(" + b"".join(integer(value) for value in values) + b"t"

    storage = b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu")
    version = "_rebuild_tensor_v3" if dtype else "_rebuild_tensor_v2"
    return (
        name("torch._utils", version)
        + b"((" + storage[1:] + integer(count) + b"tQ"
        + integer(offset) + numbers(size) + numbers(stride) + b"\x89N"
        + (name("torch", dtype) if dtype else b"") + b"tR"
    )  # fmt: skip


BIG = 1 << 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (11,)}, "outside its storage"),
        ({"size": (10,), "offset": 1}, "outside its storage"),
        ({"size": (4, 4), "stride": (4, 1)}, "outside its storage"),
        ({"size": (2,), "stride": (10,)}, "outside its storage"),
        ({"size": (BIG, 2), "stride": (BIG, BIG)}, "outside its storage"),
        ({"size": (2,), "stride": (-1,), "offset": 5}, "not a number from 0"),
        ({"offset": -1}, "not a number from 0"),
        ({"size": (-1,)}, "not a number from 0"),
        ({"size": (1 << 62,)}, "not a number from 0"),
        ({"size": (1 << 64,)}, "not a number from 0"),
        ({"size": (BIG,), "stride": (0,)}, "far more bytes"),
        ({"size": (0, BIG), "stride": (1, 1)}, "far more bytes"),
        ({"size": (2, 2)}, "cannot take"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "64 dimensions"),
        ({"count": -1}, "claims -1 elements"),
        ({"count": 1 << 70}, "more than the file"),
        ({"count": 11}, "claims 44 bytes, and has 40"),
        ({"key": "1"}, "storage 1 is missing"),
        ({"key": "../data.pkl"}, "is missing"),
        ({"kind": "QInt8Storage"}, "QInt8Storage"),
        ({"kind": "nothing"}, "torch.nothing"),
        ({"dtype": "qint8", "kind": "UntypedStorage"}, "expected a plain dtype"),
        ({"dtype": "float64", "kind": "UntypedStorage", "size": (6,)}, "outside its storage"),
    ],
)
def test_tensors_that_reach_beyond_their_bytes_are_refused(tmp_path, arguments, message):
    def path(**arguments):
        return crafted(tmp_path / "tensor.pt", op(tensor(**arguments)), {"data/0": bytes(40)})

    assert read_checkpoint(path()).tolist() == [0, 0]
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path(**arguments))


CALL_OS = name("os", "system") + text("touch CANARY") + b"\x85R"


def nested_calls():
    """getattr(getattr(os, 'system'), '__call__')(...), the usual gadget chain."""
    getter = name("builtins", "getattr")
    inner = getter + name("builtins", "__import__") + text("os") + b"\x85R" + text("system")
    return inner + b"\x86R" + text("touch CANARY") + b"\x85R"


INERT = {
    "os.system": CALL_OS,
    "posix.system by INST": b"(" + text("touch CANARY") + b"iposix\nsystem\n",
    "os.system by OBJ": b"(" + name("os", "system") + text("touch CANARY") + b"o",
    "os.system by NEWOBJ": name("os", "system") + text("touch CANARY") + b"\x85\x81",
    "os.system by NEWOBJ_EX": name("os", "system") + text("touch CANARY") + b"\x85}\x92",
    "subprocess by STACK_GLOBAL": text("subprocess") + text("call") + b"\x93]\x85R",
    "eval": name("builtins", "eval") + text("open('CANARY', 'w')") + b"\x85R",
    "exec": name("__builtin__", "exec") + text("open('CANARY', 'w')") + b"\x85R",
    "open": name("io", "open") + text("CANARY") + text("w") + b"\x86R",
    "getattr chain": nested_calls(),
    "dotted name": text("os") + text("system.__call__") + b"\x93" + text("true") + b"\x85R",
    "hub": name("torch.hub", "load") + text("owner/name") + text("model") + b"\x86R",
    "torch.load": name("torch", "load") + text("other.pt") + b"\x85R",
    "jit": name("torch.jit._script", "unpackage_script_module") + b")R",
    "numpy runstring": name("numpy.testing._private.utils", "runstring") + text("1") + b"}\x86R",
    "numpy f2py": name("numpy.f2py.crackfortran", "getlincoef") + text("x") + b"}\x86R",
    "numpy load": name("numpy", "load") + text("x.npy") + b"\x85R",
    "setstate of a gadget": name("os", "system") + b")\x81" + text("touch CANARY") + b"b",
    "setstate by BUILD": name("functools", "partial") + name("os", "system") + b"\x85R"
    + b"(" + name("os", "system") + text("touch CANARY") + b"\x85}Ntb",
    "setitem of a stub": name("os", "environ") + text("CANARY") + text("1") + b"s",
    "append to a stub": name("sys", "path") + text("/tmp") + b"a",
    "import of a module": name("antigravity", "fly"),
    "call of a call": name("builtins", "getattr") + b")R)R)R)R)R",
    "state of a global": name("torch._utils", "_rebuild_tensor_v2") + b"}b",
    "rebuilt by os.system": name("torch._tensor", "_rebuild_from_type_v2")
    + b"(" + name("os", "system") + name("torch", "Tensor") + text("touch CANARY") + b"\x85NtR",
    "copyreg": name("copyreg", "_reconstructor") + name("os", "system")
    + name("builtins", "object") + b"N\x87R" + text("touch CANARY") + b"b",
    "defaultdict": name("collections", "defaultdict") + name("os", "abort") + b"\x85R",
    "key": b"}" + name("os", "system") + b")RNs",
}  # fmt: skip

REFUSED = {
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "persistent text": b"Pstorage\n",
    "persistent object": name("os", "system") + b"Q",
    "persistent tuple": text("module") + text("os") + b"\x86Q",
    "persistent of a call": b"(" + text("storage") + CALL_OS + text("0") + text("cpu") + b"K\x01tQ",
    "call of a string": text("os.system") + b")R",
    "call of a list": b"])R",
    "call with no tuple": name("os", "system") + text("true") + b"R",
    "huge LONG4": b"\x8b\xff\xff\xff\x7f",
    "negative LONG4": b"\x8b\xff\xff\xff\xff",
    "long integer": b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000,
    "huge BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 60),
    "huge BINBYTES8": b"\x8e" + struct.pack("<Q", (1 << 63) - 1),
    "larger BINBYTES8": b"\x8e" + struct.pack("<Q", (1 << 64) - 1),
    "huge BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 40),
    "huge BINSTRING": b"T\xff\xff\xff\x7f",
    "huge FRAME": b"\x95" + struct.pack("<Q", 1 << 60) + b"\x8c\xff",
    "out of band": b"\x97",
    "huge memo": b"Nr\xff\xff\xff\xff",
    "negative memo": b"Np-1\n",
    "empty memo": b"h\x00",
    "long name": name("os", "x" * 10_000),
    "name of numbers": b"K\x01K\x02\x93",
    "empty stack": b"0",
    "no mark": b"t",
    "tuple of nothing": b"\x87",
    "append to a number": b"K\x01K\x02a",
    "append to a tensor": tensor() + b"Na",
    "set item of a number": b"K\x01K\x02K\x03s",
    "odd items": b"}(K\x01u",
    "key that is a list": b"}]Ns",
    "key that is a tensor": b"}" + tensor() + b"Ns",
    "set of a dict": b"\x8f(}\x90",
    "state of a tensor": tensor() + b"}b",
    "state of a dict": b"}}b",
    "nested lists": b"]" * 100_000 + b"a" * 99_999,
    "nested tuples": b")" + b"\x85" * 100_000,
    "nested dicts": b"}" + b"K\x00}" * 50_000 + b"s" * 50_000,
    "nested lists from the inside": b"]\x940" + b"]h\x00aq\x000" * 100_000 + b"h\x00",
    "nested below a flat list": b"]\x94]\x94"
    + b"0]h\x01aq\x01h\x00h\x01a0h\x01" * 50_000 + b"0h\x00",
    "billion laughs": b"]" + b"2\x86" * 99,
    "billion laughs of lists": b"]\x94"
    + b"".join(b"(" + bytes([ord("h"), level]) * 10 + b"l\x94" for level in range(12)),
    "billion laughs as a key": b"}K\x01" + b"2\x86" * 99 + b"Ns",
    "list in itself": b"]\x94h\x00a",
    "dict in itself": b"}\x94K\x01h\x00s",
    "tuple in its list": b"]\x94h\x00\x85a",
    "numpy of the wrong size": name("numpy._core.numeric", "_frombuffer")
    + b"(C\x04abcd" + name("numpy", "dtype") + text("f8") + b"\x85R(K\x03" + text("<") + b"tb"
    + b"\x8a\x08" + b"\xff" * 7 + b"\x0f" + b"\x85" + text("C") + b"tR",
    "numpy text that is none": name("numpy._core.numeric", "_frombuffer")
    + b"(C\x04\xff\xff\xff\x7f" + name("numpy", "dtype") + text("U1") + b"\x85R(K\x03" + text("<")
    + b"tbK\x01\x85" + text("C") + b"tR",
    "device": name("torch", "device") + text("rm -rf") + b"\x85R",
    "size": name("torch", "Size") + integer(-1) + b"\x85\x85R",
    "no tensor": name("torch._utils", "_rebuild_parameter") + b"N\x89N\x87R",
    "unknown opcode": b"\xff",
}  # fmt: skip

# What ends only at one of the limits, and takes seconds until then.
HEAVY = {
    "empty sets": b"(" + b"\x8f" * 3_000_000 + b"t",
    "memo": b"N" + b"\x94" * 6_000_000,
    "marks": b"(" * 6_000_000,
    "stubs": name("a", "b") + b"\x94(" + b"h\x00)\x81" * 2_100_000 + b"t",
    "tensors": tensor() + name("torch._utils", "_rebuild_tensor_v2") + b"\x94(("
    + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
    + b"K\x0atQK\x00K\x01\x85K\x01\x85\x89Nt\x94(" + b"h\x00h\x01R" * 210_000 + b"t",
    "copies": text("x" * 1_000_000) + b"\x94" + name("_codecs", "encode") + b"\x94("
    + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 5000 + b"t",
    "a name over and over": text("x" * 250) + b"\x94" + text("y") + b"\x94("
    + b"h\x00h\x01\x93" * 1_000_000 + b"t",
    "sets of one list": b"](" + b"K\x01" * 100_000 + b"e\x940" + name("builtins", "set")
    + b"\x94(" + b"h\x01h\x00\x85R" * 1000 + b"t",
}  # fmt: skip


def refusal_or_value(path):
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        refusal = error
    assert "\n" not in str(refusal)
    assert len(str(refusal)) < 1000
    return refusal


READER = """
import encodings.cp437, encodings.unicode_escape  # of zipfile and of messages, on first use
import json, resource, sys, time
import steerrec.unpickling as unpickling
from steerrec.errors import CheckpointError

assert unpickling.read_checkpoint(sys.argv[1])  # whatever is imported late is imported now
allowance = int(sys.argv[2]) << 20
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + allowance
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (200, 200))
watched = ""  # the only path that may be opened; everything else that Python audits has run

def audit(event, args):
    if watched and event != "builtins.id" and (event, args[:1]) != ("open", (watched,)):
        print("RAN", event, f"{args!r:.300}", flush=True)
        import os
        os._exit(3)

sys.addaudithook(audit)
for line in sys.stdin:
    start = time.monotonic()
    watched = line.strip()
    try:
        value = unpickling.read_checkpoint(watched)
        result = f"value {value!r:.80}" if isinstance(value, unpickling.Stub) else "value"
        del value
    except CheckpointError as error:
        result = f"refused {error}"
        del error
    finally:
        watched = ""
    print(json.dumps([result, time.monotonic() - start]), flush=True)
"""


def read_apart(folder, pickles, allowance):
    """What reading each pickle gives, and in how many seconds, in a process of little memory."""
    good = save([torch.ones(2), PLAIN, np.ones(2)], folder / "good.pt")
    paths = [
        crafted(folder / f"{number}.pt", op(pickled), {"data/0": bytes(40)})
        for number, pickled in enumerate(pickles.values())
    ]
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", READER, str(good), str(allowance)],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(folder.iterdir()) == before  # no canary, and nothing else either
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(pickles, results, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_hostile_pickles_run_nothing_and_take_neither_memory_nor_time(tmp_path):
    read = read_apart(tmp_path, INERT | REFUSED, allowance=256)
    assert {case: read[case][0][:5] for case in INERT} == dict.fromkeys(INERT, "value")
    assert {case: read[case][0][:7] for case in REFUSED} == dict.fromkeys(REFUSED, "refused")
    assert max(seconds for _, seconds in read.values()) < 10
    assert not [result for result, _ in read.values() if "MemoryError" in result]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.slow
def test_pickles_that_only_a_limit_ends_are_ended_by_it(tmp_path):
    read = read_apart(tmp_path, HEAVY, allowance=800)
    assert {case: read[case][0][:7] for case in HEAVY} == dict.fromkeys(HEAVY, "refused") | {
        "a name over and over": "value",
        "sets of one list": "refused",
    }
    assert max(seconds for _, seconds in read.values()) < 60
    assert not [result for result, _ in read.values() if "MemoryError" in result]


def test_keys_made_to_collide_end_at_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr("steerrec.unpickling._MAX_SECONDS", 1.0)
    prime = (1 << 61) - 1  # by which Python hashes integers: all of these to zero
    keys = [integer(prime * number) for number in range(1, 60_000)]
    for pickled in (b"}(" + b"N".join(keys) + b"Nu", b"\x8f(" + b"".join(keys) + b"\x90"):
        path = crafted(tmp_path / "collide.pt", op(pickled))
        assert "seconds" in str(refusal_or_value(path))


def test_the_limits_end_what_is_too_much(tmp_path, monkeypatch):
    path = save([PLAIN, torch.ones(2), torch.ones(2)], tmp_path / "plain.pt")
    for limit in ("_MAX_STEPS", "_MAX_OBJECTS", "_MAX_TENSORS", "_MAX_PICKLE", "_MAX_DEPTH"):
        with monkeypatch.context() as patch:
            patch.setattr(f"steerrec.unpickling.{limit}", 1)
            assert isinstance(refusal_or_value(path), CheckpointError), limit


def test_a_stub_is_what_os_system_comes_out_as(tmp_path):
    read = read_checkpoint(crafted(tmp_path / "os.pt", op(CALL_OS)))
    assert (read.qualified_name, read.args) == ("os.system", ("touch CANARY",))
    read = read_checkpoint(crafted(tmp_path / "chain.pt", op(nested_calls())))
    assert (read.qualified_name, read.args[1:]) == ("(call)", ("touch CANARY",))
    assert read.args[0].qualified_name == "builtins.getattr"


def test_a_name_cannot_garble_the_terminal(tmp_path):
    path = crafted(tmp_path / "name.pt", op(text("\x1b[31m\n") + text("evil") + b"\x93)R"))
    assert repr(read_checkpoint(path)) == "<Stub \\x1b[31m\\n.evil(0 arguments)>"


def test_a_legacy_file_that_claims_more_than_it_has_is_refused(tmp_path):
    path = save([torch.ones(1000)], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    count = b"M" + struct.pack("<H", 1000)  # BININT2
    assert content.count(count) == 2
    for claim in (b"M\xff\xff", b"M\x01\x00"):
        path.write_bytes(content.replace(count, claim, 1))
        assert isinstance(refusal_or_value(path), CheckpointError)
    path.write_bytes(content[:-1])
    assert "middle of a tensor" in str(refusal_or_value(path))
    huge = pickle.dumps(b"x" * 300, 4).replace(struct.pack("<H", 300), b"\xff\xff", 1)
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + huge)
    assert "claims" in str(refusal_or_value(path))


# --- fuzzing


def seeds(folder):
    """Small checkpoints of many kinds, as bytes."""
    values = [
        {"state_dict": torch.nn.Linear(3, 2).state_dict(), "epoch": 3},
        PLAIN,
        [np.arange(5.0), np.float32(1), np.array(["a", None], object), torch.nn.Linear(2, 2)],
        {"when": datetime.datetime(2025, 4, 27), "t": [torch.ones(2, 3).T, torch.ones(2).half()]},
    ]
    for value in values:
        for zipped in (True, False):
            for protocol in (2, 4):
                path = save(
                    value,
                    folder / "seed.pt",
                    pickle_protocol=protocol,
                    _use_new_zipfile_serialization=zipped,
                )
                yield path.read_bytes()
    for pickled in (INERT | REFUSED).values():
        if len(pickled) < 2000:
            path = crafted(folder / "seed.pt", op(pickled), {"data/0": bytes(40)})
            yield path.read_bytes()


OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


def mutated(content, dice):
    """The bytes, cut off, flipped, overwritten, doubled, or with opcodes strewn in."""
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        place = dice.randrange(len(content))
        match dice.randrange(8):
            case 0:
                del content[place + 1 :]
            case 1 | 2:
                content[place] ^= 1 << dice.randrange(8)
            case 3 | 4:
                content[place] = dice.choice(OPCODES)
            case 5:
                content[place:place] = content[dice.randrange(len(content)) :][:50]
            case 6:
                width = dice.choice((1, 2, 4, 8))
                content[place : place + width] = dice.choice((b"\xff", b"\x7f", b"\0")) * width
            case 7:
                content[place:place] = bytes(dice.choices(OPCODES, k=dice.randrange(1, 8)))
    return bytes(content)


def with_pickle(content, change):
    """The zip with another pickle in it and its checksum right, so that the pickle is reached."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.namelist():
            part = old.read(entry)
            new.writestr(entry, change(part) if entry.endswith("data.pkl") else part)
    return target.getvalue()


def fuzz(folder, cases, seed):
    dice = random.Random(seed)
    sources = list(seeds(folder))
    path = folder / "fuzzed.pt"
    refused, longest = 0, 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(cases):
        source = dice.choice(sources)
        if number % 10 == 0:
            content = dice.choice((b"", b"PK\3\4", b"\x80\x02", source[:60]))
            content += dice.randbytes(dice.randrange(300))
        elif number % 10 < 7 and source[:2] == b"PK":
            content = with_pickle(source, lambda pickled: mutated(pickled, dice))
        else:
            content = mutated(source, dice)
        path.write_bytes(content)
        start = time.monotonic()
        refused += isinstance(refusal_or_value(path), CheckpointError)
        longest = max(longest, time.monotonic() - start)
    assert longest < 20  # of milliseconds, on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB
    return refused


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_checkpoints_are_refused_or_read_and_nothing_else(tmp_path):
    assert 1000 < fuzz(tmp_path, 4000, seed=0) < 4000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_checkpoints_are_refused_or_read_and_nothing_else(tmp_path, seed):
    assert 3000 < fuzz(tmp_path, 10_000, seed=seed) < 10_000


def test_every_truncation_is_refused(tmp_path):
    for zipped in (True, False):
        path = save(
            {"w": torch.ones(2), "config": datetime.date(2025, 4, 27)},
            tmp_path / "whole.pt",
            _use_new_zipfile_serialization=zipped,
        )
        content = path.read_bytes()
        for length in range(0, len(content), 1 if not zipped else 7):
            path.write_bytes(content[:length])
            assert isinstance(refusal_or_value(path), CheckpointError), length


def test_names_of_prefixes_without_end_are_refused():
    with pytest.raises(ModelError, match="over 100 prefixes"):
        find_state_dict({"model." * 5000 + "weight": torch.ones(1)})
