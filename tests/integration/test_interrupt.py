"""Ctrl-C in the middle: one line, no output that looks whole, and the same command goes on."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from steerrec.checkpoint import load_checkpoint
from steerrec.data import simulate, write_csv

PATIENCE = 240  # seconds


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(simulate(120, 40, seed=5), "data")
    return tmp_path


@pytest.fixture
def succeed(cli):
    def succeed(*arguments):
        found = cli(*arguments)
        assert found.code == 0, found.err

    return succeed


def interrupted(*arguments, once):
    """Start a command in a process of its own, and press Ctrl-C as soon as a file is there."""
    run = subprocess.Popen(
        [sys.executable, "-m", "steerrec.cli", *arguments],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not once.exists():
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline, f"no {once.name} in {PATIENCE} s"
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    assert run.returncode == 130, err
    assert out == ""
    *notes, line = err.splitlines()
    assert line == "steerrec: interrupted; run the same command again to go on where it stopped"
    assert not any("Traceback" in note for note in notes)


def epochs_done(checkpoint):
    _, saved = load_checkpoint(checkpoint)
    return saved["state"]["epoch"]


def weights(folder):
    files = folder.rglob("*.safetensors")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_training_goes_on_where_it_was_interrupted(cli, succeed, here, caplog):
    size = ("--hidden-size", "16", "--layers", "1", "--max-length", "20")
    train = ("train", "data", *size, "--epochs", "100", "--patience", "100", "-o")
    checkpoint = here / "model.partial" / "checkpoint.safetensors"
    interrupted(*train, "model", once=checkpoint)
    assert not (here / "model").exists()
    done = epochs_done(checkpoint)
    assert 0 < done < 100

    other = cli(*train, "model", "--seed", "1")
    assert other.code == 1
    assert "is a checkpoint of other settings or data" in other.err
    assert epochs_done(checkpoint) == done

    caplog.set_level(logging.INFO, "steerrec")
    succeed(*train, "model")
    assert f"going on from {checkpoint}" in caplog.text
    assert not checkpoint.parent.exists()
    succeed(*train, "straight")
    assert weights(here / "model") == weights(here / "straight") != {}


def test_an_sae_goes_on_where_it_was_interrupted(succeed, here, caplog):
    size = ("--hidden-size", "16", "--layers", "1", "--max-length", "20", "--epochs", "1")
    succeed("train", "data", "-o", "model", *size)
    sae = ("--latents", "256", "--k", "8", "--batch-size", "64", "--epochs", "40")
    attach = ("attach", "model", "--data", "data", *sae, "-o")
    checkpoint = here / "artifact.partial" / "checkpoint.safetensors"
    interrupted(*attach, "artifact", once=checkpoint)
    assert not (here / "artifact").exists()
    assert 0 < epochs_done(checkpoint) < 40

    caplog.set_level(logging.INFO, "steerrec")
    succeed(*attach, "artifact")
    assert f"going on from {checkpoint}" in caplog.text
    assert not checkpoint.parent.exists()
    succeed(*attach, "straight")
    assert weights(here / "artifact") == weights(here / "straight") != {}
