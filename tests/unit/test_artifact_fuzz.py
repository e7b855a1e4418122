"""Thousands of damaged and hostile artifacts: read, or refused by an error of steerrec's own.

Every mutation is seeded, so that a failure names the number that brings it back.
"""

import copy
import json
import random
import resource
import warnings
from pathlib import Path

import pytest
import torch

from steerrec.artifacts import Artifact, load_artifact
from steerrec.attribution import score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactWarning, SteerrecError
from steerrec.explaining import table_in_words
from steerrec.gates import NeuronGate, TasteGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.profiles import popularity_contrast
from steerrec.sites import Site
from steerrec.steering import Steering

from .test_card import COMPARE, PNG, SWEEP
from .tiny import random_histories, random_recommender

QUICK, THOROUGH = 1000, 30_000
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
HOSTILE = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**62, 10**17, 0.5, 1e308, -0.0),
    *("", "a", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\x00b", "\x1b[31m", "é", "𝄞"),
    *("sum", "gated", "latents", "response", "neuron", "taste"),
    *("topk", "jumprelu", "delta", "shift", "scale", "float32", "bfloat16", "BF16", "F64", "1.0"),
    *("mean", "item_embedding", "layers.*", "-1", "x" * 300, [], {}, [[]], [{}], {"a": {}}, [0, 8]),
    *(
        {"name": "popularity"},
        {"path": "mean"},
        {"kind": "Lengths", "path": ""},
        ["delta"],
        [1e308],
    ),
]


@pytest.fixture(scope="module")
def rec():
    return random_recommender()


@pytest.fixture(scope="module")
def honest(rec, tmp_path_factory):
    """An artifact with everything in it, on two sites."""
    folder = tmp_path_factory.mktemp("fuzz") / "artifact"
    sae = SparseAutoencoder(4, 12, 3)
    made = Artifact.create(rec, sae, data={"format": "csv", "user_col": "u", "k_core": 5})
    table = score_neurons(
        rec, sae, popularity_contrast(rec.catalogue), random_histories(), users=50
    )
    made.at().tables[table.name] = table
    made.at().steerings["popsteer"] = Steering.popsteer(table, alpha=1.5)
    nested = Steering.popsteer(table) + LatentSteering.scale(sae, [1, 2], 0.5)
    nested = gated(nested, TasteGate(torch.ones(4), 0.5)) + ResponseSteering(
        torch.ones(12, 4), torch.zeros(4)
    )
    made.at().steerings["nested"] = gated(nested, NeuronGate(3)).named("nested")
    made.at().training.update({"reconstruction": {"fvu": 0.1, "l0": 2.0}, "log": [{"epoch": 1}]})
    jumps = SparseAutoencoder(4, 8, 2, architecture="jumprelu")
    made.add(rec, jumps, site=Site("item_embedding", positions_from="last"))
    made.about.update({"datasets": ["visits"], "license": "mit"})
    here = made.sites[rec.site.folder]
    here.results |= {"sweep": SWEEP, "compare": COMPARE}
    here.results["neurons-popularity"] = table_in_words(table, sae, rec, neurons=2, items=2)
    here.pictures["sweep"] = PNG
    made.save(folder)
    return folder


# --- mutations


def nodes(value, path=()):
    """The path of every node of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from nodes(inner, (*path, key))


def mutate_tree(rng, value):
    """A few nodes replaced, dropped, doubled, moved or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        *where, last = rng.choice([path for path in nodes(value) if path] or [("a",)])
        home = value
        for key in where:
            home = home[key]
        if not isinstance(home, dict | list) or not len(home):
            continue
        action = rng.randrange(6)
        if action == 0:
            del home[last]
        elif action == 1 and isinstance(home, dict):
            home[rng.choice(["new", "..", "a/b", "x" * 200, "\n"])] = home.pop(last)
        elif action == 2 and isinstance(home, dict):
            home[f"{last}2"] = copy.deepcopy(home[last])
        elif action == 3:
            for _ in range(rng.choice([1, 40, 60, 150])):
                home[last] = [home[last]] if rng.random() < 0.5 else {"a": home[last]}
        elif action == 4 and isinstance(home[last], int | float):
            home[last] += rng.choice([1, -1, 1e300, 10**17])
        else:
            home[last] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def mutate_bytes(rng, data):
    """Bits flipped, parts cut out, doubled or swapped, the end cut off, noise put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([1, 2, 8, 64]))
        action = rng.randrange(5)
        if action == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[start:stop]
        elif action == 2:
            data[start:start] = data[start:stop]
        elif action == 3:
            data[start:start] = rng.randbytes(rng.choice([1, 8, 100]))
        elif rng.random() < 0.3:
            del data[start:]
    return bytes(data)


def mutate_json(rng, data):
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    text = json.dumps(mutate_tree(rng, json.loads(data)))
    if rng.random() < 0.1:
        text = text.replace(": ", rng.choice([": NaN, ", ": 1e999, ", ":" + "9" * 30 + ","]), 1)
    if rng.random() < 0.1:
        text = text.replace("{", '{"site": 1, "site": 2, ', 1)
    return text.encode()


def mutate_safetensors(rng, data):
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    choice = rng.random()
    if choice < 0.15:
        return mutate_bytes(rng, data)
    if choice < 0.25:  # a length that lies
        size = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1])
        return size.to_bytes(8, "little") + header + body
    if choice < 0.35:  # values that are no numbers, and bytes too many or too few
        body = mutate_bytes(rng, body) if rng.random() < 0.5 else b"\xff" * len(body)
    tree = json.loads(header)
    if "__metadata__" in tree and rng.random() < 0.6:
        ((key, text),) = tree["__metadata__"].items()
        tree["__metadata__"][key] = mutate_json(rng, text.encode()).decode("utf-8", "replace")
    else:
        tree = mutate_tree(rng, tree)
    header = json.dumps(tree).encode()
    return len(header).to_bytes(8, "little") + header + body


MUTATE = {".safetensors": mutate_safetensors, ".json": mutate_json, ".png": mutate_bytes}


def mutations(rng, files):
    """One file of the artifact, or two, and what becomes of them."""
    for name in rng.sample(sorted(files), rng.choice([1, 1, 1, 2])):
        yield name, MUTATE[Path(name).suffix](rng, files[name])


# --- what may happen


def use(folder, rec, work):
    """Whatever can be done with what was read."""
    artifact = load_artifact(folder)
    artifact.differences(rec)
    for name, here in artifact.sites.items():
        artifact.at(name)
        for recipe in here.steerings:
            artifact.transform(recipe, site=name)(X)
        for contrast in here.tables:
            artifact.transform(contrast=contrast, site=name)(X)
    for strict in (True, False):
        try:
            artifact.check(rec, strict=strict)
        except SteerrecError:
            continue
        artifact.measure_fit(rec, random_histories(users=5, shortest=3), site=name)
    artifact.save(work)
    load_artifact(work)


def attack(honest, rec, tmp_path, monkeypatch, seeds):
    """How many mutated artifacts were read, and how many were refused."""
    files = {str(f.relative_to(honest)): f.read_bytes() for f in honest.rglob("*.*") if f.is_file()}
    del files["README.md"]
    size = sum(map(len, files.values()))
    asked = []
    empty = torch.empty
    patched = lambda *shape, **options: asked.append(shape[0]) or empty(*shape, **options)  # noqa: E731
    monkeypatch.setattr("steerrec.tensor_files.torch.empty", patched)
    read = refused = 0
    lines = []
    for seed in seeds:
        rng = random.Random(seed)
        changed = dict(mutations(rng, files))
        for name, data in changed.items():
            (honest / name).write_bytes(data)
        del asked[:]
        try:
            use(honest, rec, tmp_path / "work")
            read += 1
        except SteerrecError as error:
            refused += 1
            lines.append((seed, str(error)))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        finally:
            for name in changed:
                (honest / name).write_bytes(files[name])
        biggest = max([size, *map(len, changed.values())])
        assert max(asked, default=0) <= 2 * biggest, f"seed {seed}"
    for seed, line in lines:
        assert len(line) < 2000, f"seed {seed}: {line}"
        assert line.isprintable(), f"seed {seed}: {line}"
    return read, refused


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArtifactWarning)
        yield


def test_a_mutated_artifact_is_read_or_refused_by_our_own_error(honest, rec, tmp_path, monkeypatch):
    read, refused = attack(honest, rec, tmp_path, monkeypatch, range(QUICK))
    assert read > QUICK / 20  # else the mutations would be too coarse to reach anything
    assert refused > QUICK / 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_more_mutated_artifacts(honest, rec, tmp_path, monkeypatch):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attack(honest, rec, tmp_path, monkeypatch, range(QUICK, QUICK + THOROUGH))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
