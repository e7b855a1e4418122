"""SAEs between steerrec and the libraries themselves, each where it is installed.

No part of `make test`: sae-lens brings about 120 packages, and all need much that steerrec does
not. sae-lens in an environment of its own, with steerrec in it:

    make sae-lens

The others want torchvision, and a torch of its build; in an environment without sae-lens:

    pip install eai-sparsify==1.3.3 dictionary-learning==0.1.0 pytest pytest-timeout sybil .

The formulas that test_importing.py writes out are thereby those of the libraries.
"""

import json

import pytest
import torch

from steerrec.artifacts import Artifact
from steerrec.importing import import_sae
from steerrec.training import SAETraining, train_autoencoder

from ..unit.test_sae_training import write_shards
from ..unit.tiny import random_recommender

D, F, K = 16, 96, 8


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x():
    return randn(200, D, seed=0) * 2 + 1


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def fill(module):
    """Random weights, and decoder rows of many lengths."""
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=number))
    return module


def trained(folder, architecture):
    """A small SAE trained on random rows, and so with thresholds of its own."""
    shards = write_shards(folder / "shards", rows=randn(600, D, seed=7) * 2 + 1)
    training = SAETraining(
        latents=F, k=K, epochs=2, batch_size=100, dead_after=100, architecture=architecture
    )
    return train_autoencoder(shards, training, work=folder)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("topk", "TopKSAE"), ("batchtopk", "JumpReLUSAE"), ("jumprelu", "JumpReLUSAE")],
)
def test_sae_lens_opens_a_sites_folder_and_encodes_to_the_same_latents(
    tmp_path, x, architecture, kind, dtype
):
    sae_lens = pytest.importorskip("sae_lens")
    rec = random_recommender(width=D)
    with torch.enable_grad():
        sae = trained(tmp_path, architecture).to(dtype)
    Artifact.create(rec, sae).save(tmp_path / "artifact")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "artifact" / rec.site.folder))
    assert type(theirs).__name__ == kind
    assert theirs.cfg.metadata.hook_name == "mean"
    vectors = x.to(dtype)
    ours = sae(vectors)
    codes = theirs.encode(vectors)
    assert codes.dtype == dtype
    if dtype != torch.bfloat16:  # so coarse that which latents are active hangs on the rounding
        assert 0 < int((codes > 0).sum()) < codes.numel()
        torch.testing.assert_close(codes, ours.latents.dense(F), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(vectors), ours.x_hat, rtol=1e-5, atol=1e-5)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_what_sae_lens_saves_is_imported(tmp_path, x, apply_b_dec, rescale):
    pytest.importorskip("sae_lens")
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    config = TopKSAEConfig(
        d_in=D,
        d_sae=F,
        k=K,
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
    )
    theirs = fill(TopKSAE(config))
    theirs.save_model(tmp_path)
    torch.testing.assert_close(import_sae(tmp_path)(x).x_hat, theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_a_jumprelu_that_sae_lens_saves_is_imported(tmp_path, x, apply_b_dec):
    pytest.importorskip("sae_lens")
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=apply_b_dec)
    theirs = fill(JumpReLUSAE(config))
    theirs.save_model(tmp_path)
    ours = import_sae(tmp_path)
    assert (ours.architecture, ours.k) == ("jumprelu", None)
    torch.testing.assert_close(ours(x).x_hat, theirs(x), rtol=1e-4, atol=1e-4)


def test_what_sparsify_saves_is_imported(tmp_path, x):
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(expansion_factor=F // D, k=K)
    theirs = fill(sparsify.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["num_latents"] == 0
    expected = theirs.decode(*theirs.encode(x)[:2])
    torch.testing.assert_close(import_sae(tmp_path)(x).x_hat, expected, rtol=1e-4, atol=1e-4)


def test_what_dictionary_learning_saves_is_imported(tmp_path, x):
    top_k = pytest.importorskip("dictionary_learning.trainers.top_k")
    theirs = fill(top_k.AutoEncoderTopK(D, F, K))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": K, "activation_dim": D, "dict_size": F}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.testing.assert_close(import_sae(tmp_path)(x).x_hat, theirs(x), rtol=1e-4, atol=1e-4)


def test_a_batchtopk_that_dictionary_learning_saves_is_imported(tmp_path, x):
    batch = pytest.importorskip("dictionary_learning.trainers.batch_top_k")
    theirs = fill(batch.BatchTopKSAE(D, F, K))
    theirs.threshold.fill_(1.5)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "k": K, "activation_dim": D, "dict_size": F}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.testing.assert_close(import_sae(tmp_path)(x).x_hat, theirs(x), rtol=1e-4, atol=1e-4)


def test_a_jumprelu_that_dictionary_learning_saves_is_imported(tmp_path, x):
    dictionary = pytest.importorskip("dictionary_learning.dictionary")
    theirs = fill(dictionary.JumpReluAutoEncoder(D, F))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D, "dict_size": F}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.testing.assert_close(import_sae(tmp_path)(x).x_hat, theirs(x), rtol=1e-4, atol=1e-4)
