"""SAE training by two processes of torchrun: the weights of one process, up to rounding."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from steerrec import distributed
from steerrec.autoencoder import fraction_of_variance_unexplained
from steerrec.errors import TrainingError
from steerrec.training import SAETraining, train_autoencoder

from .test_sae_training import sparse_rows, write_shards

TRAINING = {"latents": 32, "k": 3, "epochs": 3, "batch_size": 64, "aux_weight": 0.0}
DRIVER = """
    import json, sys
    import torch
    from safetensors.torch import save_file
    from steerrec import distributed
    from steerrec.activations import ActivationShards
    from steerrec.training import SAETraining, train_autoencoder

    torch.set_num_threads(1)
    with distributed.process_group():
        shards, work, training = ActivationShards("shards"), "work", json.loads(sys.argv[1])
        sae, summary = train_autoencoder(shards, SAETraining(**training), work=work)
        me = distributed.rank()
        save_file(sae.state_dict(), f"sae-{me}.safetensors")
        line = json.dumps([distributed.size(), summary["log"][-1]["fvu"]])
        sys.stdout.write(f"{line}\\n")  # at once: two processes write to one pipe
"""


def test_two_processes_train_what_one_trains(tmp_path):
    from safetensors.torch import load_file

    shards = write_shards(tmp_path / "shards", rows=sparse_rows()[0])
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    command = [
        *(sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", str(tmp_path / "driver.py"), json.dumps(TRAINING)),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, summary = train_autoencoder(shards, SAETraining(**TRAINING), work=tmp_path / "alone")

    first, second = (load_file(tmp_path / f"sae-{rank}.safetensors") for rank in (0, 1))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, atol=1e-4), name
    for size, fvu in map(json.loads, done.stdout.split("\n")[:2]):
        assert size == 2
        assert fvu == pytest.approx(summary["log"][-1]["fvu"], rel=1e-4)


def test_shares_of_a_batch_add_up_to_its_loss(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, x_hat = (torch.randn(11, 4, generator=generator) for _ in range(2))
    monkeypatch.setattr(distributed, "size", lambda: 3)
    total, rows = 0.0, []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine, weight = distributed.share(x)
        theirs, _ = distributed.share(x_hat)
        total += weight * float(fraction_of_variance_unexplained(mine, theirs))
        rows.append(mine)
    assert torch.equal(torch.cat(rows), x)
    assert total == pytest.approx(float(fraction_of_variance_unexplained(x, x_hat)))


def test_alone_nothing_is_shared():
    x = torch.randn(3, 2)
    mine, weight = distributed.share(x)
    assert mine is x
    assert weight == 1.0
    assert (distributed.rank(), distributed.size(), distributed.launched_as()) == (0, 1, 0)
    with distributed.process_group():
        assert distributed.size() == 1


def test_a_batch_too_small_to_share(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(TrainingError, match="3 rows for 2 processes"):
        distributed.share(torch.randn(3, 2))
