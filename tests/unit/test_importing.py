"""SAEs of other libraries: each reconstructs as its own library's formula, written out here, does.

Formulas: SAELens 6 `TopKSAE`, sparsify 1.3 `SparseCoder`, dictionary_learning 0.1
`AutoEncoderTopK`, PopSteer's `SAE`; all in double precision, with dense codes.
"""

import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from steerrec.errors import ArtifactError, CheckpointError
from steerrec.importing import import_sae

D, F, K = 6, 20, 4


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(50, D, seed=9) + 1.5


def top_k(z, k=K):
    """All but the k largest of each row set to 0, and what is below 0 too."""
    rank = z.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.where((rank < k) & (z > 0), z, 0.0)


def agree(sae, expected, codes):
    """The reconstruction, and which latents are active, are the source library's."""
    out = sae(X.to(sae.W_enc))
    close = float(expected.abs().max()) * 1e-6  # ten ulps of the largest value
    torch.testing.assert_close(out.x_hat, expected.to(out.x_hat), rtol=1e-5, atol=close)
    assert torch.equal(out.latents.dense(sae.d_sae) > 0, codes > 0)
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# --- SAELens

SAELENS = {
    "W_enc": randn(D, F, seed=1),
    "b_enc": randn(F, seed=2),
    "W_dec": randn(F, D, seed=3) * (1 + torch.arange(F)[:, None] / 5),
    "b_dec": randn(D, seed=4),
}
CONFIG = {
    "architecture": "topk",
    "d_in": D,
    "d_sae": F,
    "k": K,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "metadata": {"hook_name": "blocks.0", "sae_lens_version": "6.54.12"},
}


def saelens(folder, weights=SAELENS, **changes):
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    write_json(folder / "cfg.json", config)
    save_file({k: v.clone() for k, v in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def saelens_formula(weights, apply_b_dec=True, rescale=False):
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = X.double()
    z = (x - w["b_dec"] * apply_b_dec) @ w["W_enc"] + w["b_enc"]
    if rescale:
        z = z * w["W_dec"].norm(dim=-1)
    codes = top_k(z)
    scaled = codes / w["W_dec"].norm(dim=-1) if rescale else codes
    return scaled @ w["W_dec"] + w["b_dec"], codes


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_with_every_scaling_that_can_be_folded(tmp_path, apply_b_dec, rescale):
    options = {"apply_b_dec_to_input": apply_b_dec, "rescale_acts_by_decoder_norm": rescale}
    agree(
        import_sae(saelens(tmp_path, **options)),
        *saelens_formula(SAELENS, apply_b_dec, rescale),
    )


def test_the_scalings_make_a_difference():
    """Else the test above would show nothing."""
    found = [saelens_formula(SAELENS, *options)[1] > 0 for options in ((1, 0), (0, 0), (1, 1))]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_saelens_without_the_settings_that_have_defaults(tmp_path):
    bare = dict.fromkeys(CONFIG.keys() - {"architecture", "k", "dtype", "d_in", "d_sae"}, ...)
    agree(import_sae(saelens(tmp_path, **bare)), *saelens_formula(SAELENS))


def test_saelens_of_before_version_6(tmp_path):
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "k": ...}
    folder = saelens(tmp_path, architecture="standard", normalize_activations=False, **old)
    agree(import_sae(folder), *saelens_formula(SAELENS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_become_single(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in SAELENS.items()}
    sae = import_sae(saelens(tmp_path, weights, dtype=str(dtype).removeprefix("torch.")))
    assert sae.W_enc.dtype == torch.float32
    agree(sae, *saelens_formula(weights))


def test_what_steerrec_writes_is_read_as_it_is(tmp_path):
    folder = saelens(tmp_path)
    sae = import_sae(folder)
    for name, tensor in SAELENS.items():
        assert torch.equal(sae.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "gated"}, "has architecture 'gated', which steerrec does not"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"architecture": "standard"}, "has architecture 'standard'"),
        ({"architecture": ...}, "has architecture 'standard'"),
        ({"normalize_activations": "layer_norm"}, "has normalize_activations 'layer_norm'"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'"),
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in'"),
        ({"normalize_activations": True}, "has normalize_activations True"),
        ({"reshape_activations": "hook_z"}, "has reshape_activations 'hook_z'"),
        ({"finetuning_scaling_factor": True}, "has finetuning_scaling_factor True"),
        ({"apply_b_dec_to_input": "no"}, "has apply_b_dec_to_input 'no'"),
        ({"k": ...}, "does not say how many latents are active at once; give k"),
        ({"k": 0}, "k is 0; expected a positive integer"),
        ({"k": True}, "k is True; expected a positive integer"),
        ({"k": F + 1}, "k is 21, more than the 20 latents"),
    ],
)
def test_saelens_settings_that_cannot_be_folded_are_refused(tmp_path, changes, reason):
    with pytest.raises(ArtifactError, match=reason):
        import_sae(saelens(tmp_path, **changes))


def test_a_k_that_is_not_in_the_files_can_be_given_and_one_that_is_must_agree(tmp_path):
    agree(import_sae(saelens(tmp_path, k=...), k=K), *saelens_formula(SAELENS))
    with pytest.raises(ArtifactError, match="k is 4, not 5"):
        import_sae(saelens(tmp_path), k=5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threshold": torch.ones(F)}, r"has 'threshold' +; expected the tensors W_enc, b_enc"),
        ({"b_dec": None}, "lacks b_dec"),
        ({"b_dec": None, "bias": torch.ones(D)}, "has 'bias' and lacks b_dec"),
        ({"W_enc": torch.ones(F, D)}, r"W_enc has shape \(20, 6\), which does not fit"),
        ({"W_dec": torch.ones(F)}, "does not fit a decoder"),
        ({"b_enc": torch.ones(F, dtype=torch.int32)}, "'b_enc' has values that are no finite"),
        ({"b_enc": torch.full((F,), torch.nan)}, "'b_enc' has values that are not finite"),
        ({"b_enc": torch.full((F,), 1e300, dtype=torch.float64)}, "too large for single"),
    ],
)
def test_weights_that_do_not_make_an_sae_are_refused(tmp_path, changes, reason):
    weights = {k: v for k, v in {**SAELENS, **changes}.items() if v is not None}
    with pytest.raises(ArtifactError, match=reason):
        import_sae(saelens(tmp_path, weights))


def test_a_decoder_row_of_no_length_cannot_be_rescaled(tmp_path):
    weights = {**SAELENS, "W_dec": SAELENS["W_dec"].clone()}
    weights["W_dec"][3] = 0
    with pytest.raises(ArtifactError, match="length 0"):
        import_sae(saelens(tmp_path, weights, rescale_acts_by_decoder_norm=True))


THRESHOLD = randn(F, seed=5).abs() * 2


def jump(z, threshold=THRESHOLD):
    """What is above its threshold, and above 0."""
    return torch.where(z > threshold, z.clamp_min(0), 0.0)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_saelens_jumprelu(tmp_path, apply_b_dec):
    settings = {"architecture": "jumprelu", "k": ..., "rescale_acts_by_decoder_norm": ...}
    weights = {**SAELENS, "threshold": THRESHOLD}
    folder = saelens(tmp_path, weights, apply_b_dec_to_input=apply_b_dec, **settings)
    w = {name: tensor.double() for name, tensor in weights.items()}
    z = (X.double() - w["b_dec"] * apply_b_dec) @ w["W_enc"] + w["b_enc"]
    sae = import_sae(folder)
    agree(sae, jump(z) @ w["W_dec"] + w["b_dec"], jump(z))
    assert (sae.architecture, sae.k) == ("jumprelu", None)
    assert import_sae(folder, k=3).k == 3


def test_saelens_jumprelu_that_is_rescaled_is_refused(tmp_path):
    settings = {"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True}
    folder = saelens(tmp_path, {**SAELENS, "threshold": THRESHOLD}, **settings)
    with pytest.raises(ArtifactError, match="has rescale_acts_by_decoder_norm True"):
        import_sae(folder)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_saelens_weights_of_other_shapes_are_refused_before_they_are_folded(tmp_path, apply_b_dec):
    weights = {**SAELENS, "W_enc": torch.ones(F, D), "W_dec": torch.ones(F)}
    folder = saelens(tmp_path, weights, apply_b_dec_to_input=apply_b_dec)
    with pytest.raises(ArtifactError, match="does not fit a decoder"):
        import_sae(folder)


# --- sparsify

LINEAR = {
    "encoder.weight": randn(F, D, seed=1),
    "encoder.bias": randn(F, seed=2),
    "W_dec": randn(F, D, seed=3),
    "b_dec": randn(D, seed=4),
}
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 4,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def linear_formula(weights):
    w = {name: tensor.double() for name, tensor in weights.items()}
    codes = top_k((X.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return codes @ w["W_dec"] + w["b_dec"], codes


def sparsify(folder, weights=LINEAR, **changes):
    write_json(folder / "cfg.json", {**SPARSIFY, **changes})
    save_file({k: v.clone() for k, v in weights.items()}, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsify_whose_number_of_latents_is_0(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in LINEAR.items()}
    agree(import_sae(sparsify(tmp_path, weights)), *linear_formula(weights))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "groupmax"}, "has activation 'groupmax'"),
        ({"transcode": True}, "has transcode True"),
        ({"skip_connection": True}, "has skip_connection True"),
        ({"signed": True}, "has signed True"),
    ],
)
def test_sparsify_of_other_kinds_is_refused(tmp_path, changes, reason):
    with pytest.raises(ArtifactError, match=reason):
        import_sae(sparsify(tmp_path, **changes))


def test_a_skip_connection_is_refused_by_its_tensor_too(tmp_path):
    with pytest.raises(ArtifactError, match="has 'W_skip'"):
        import_sae(sparsify(tmp_path, {**LINEAR, "W_skip": torch.ones(D, D)}))


# --- dictionary_learning

DICTIONARY = {name: LINEAR[name] for name in ("encoder.weight", "encoder.bias", "b_dec")}
DICTIONARY |= {
    "decoder.weight": LINEAR["W_dec"].T.contiguous(),
    "k": torch.tensor(K, dtype=torch.int32),
    "threshold": torch.tensor(-1.0),
}


def dictionary(folder, state=DICTIONARY, dict_class="AutoEncoderTopK", k=K):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(state), folder / "ae.pt")
    if dict_class is not None:
        trainer = {"dict_class": dict_class, "k": k, "activation_dim": D, "dict_size": F}
        write_json(folder / "config.json", {"trainer": trainer, "buffer": {"d_submodule": D}})
    return folder


def test_dictionary_learning_by_its_folder_or_its_file(tmp_path):
    folder = dictionary(tmp_path / "trainer_0")
    agree(import_sae(folder), *linear_formula(LINEAR))
    agree(import_sae(folder / "ae.pt"), *linear_formula(LINEAR))


def test_dictionary_learning_that_says_neither_class_nor_k(tmp_path):
    state = {name: tensor for name, tensor in DICTIONARY.items() if name not in ("k", "threshold")}
    file = dictionary(tmp_path, state, dict_class=None) / "ae.pt"
    with pytest.raises(ArtifactError, match="does not say which of dictionary_learning's classes"):
        import_sae(file, k=K)
    with pytest.raises(ArtifactError, match="give k"):
        import_sae(file, dict_class="AutoEncoderTopK")
    agree(import_sae(file, dict_class="AutoEncoderTopK", k=K), *linear_formula(LINEAR))


BATCH = DICTIONARY | {"threshold": torch.tensor(1.2)}


def test_dictionary_learning_batchtopk_is_a_jumprelu_of_its_threshold(tmp_path):
    w = {name: tensor.double() for name, tensor in LINEAR.items()}
    z = (X.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    sae = import_sae(dictionary(tmp_path, BATCH, "BatchTopKSAE"))
    agree(
        sae,
        jump(z, float(BATCH["threshold"])) @ w["W_dec"] + w["b_dec"],
        jump(z, float(BATCH["threshold"])),
    )
    assert (sae.architecture, sae.k) == ("jumprelu", K)


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        (torch.tensor(-1.0), "has threshold -1, one that was never set"),
        (torch.tensor(torch.nan), "has threshold nan"),
        (torch.ones(2), "has no single threshold"),
        (torch.tensor(1), "has no single threshold"),
        (None, "has no single threshold"),
    ],
)
def test_dictionary_learning_batchtopk_without_a_threshold_is_refused(tmp_path, threshold, reason):
    state = {k: v for k, v in (BATCH | {"threshold": threshold}).items() if v is not None}
    with pytest.raises(ArtifactError, match=reason):
        import_sae(dictionary(tmp_path, state, "BatchTopKSAE"))


def test_dictionary_learning_jumprelu(tmp_path):
    state = {**SAELENS, "threshold": THRESHOLD}
    w = {name: tensor.double() for name, tensor in SAELENS.items()}
    z = X.double() @ w["W_enc"] + w["b_enc"]  # b_dec is not taken off
    sae = import_sae(dictionary(tmp_path, state, "JumpReluAutoEncoder"))
    agree(sae, jump(z) @ w["W_dec"] + w["b_dec"], jump(z))


def test_dictionary_learning_jumprelu_of_other_shapes_is_refused(tmp_path):
    state = {**SAELENS, "threshold": THRESHOLD, "W_enc": torch.ones(F, D)}
    with pytest.raises(ArtifactError, match="does not fit a decoder"):
        import_sae(dictionary(tmp_path, state, "JumpReluAutoEncoder"))


@pytest.mark.parametrize("name", ["GatedAutoEncoder", 3])
def test_dictionary_learning_of_other_classes_is_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match=f"has class {name!r}, which steerrec does not compute"):
        import_sae(dictionary(tmp_path, dict_class=name))


def test_dictionary_learning_whose_k_differ_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="k is 4, not 5"):
        import_sae(dictionary(tmp_path, k=5))
    with pytest.raises(ArtifactError, match="k has shape"):
        import_sae(dictionary(tmp_path, {**DICTIONARY, "k": torch.tensor([1.5])}))


class Gadget:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_pickle_is_executed(tmp_path):
    folder = dictionary(tmp_path, {**DICTIONARY, "gadget": Gadget(tmp_path / "opened")})
    with pytest.raises((ArtifactError, CheckpointError, Exception)) as caught:
        import_sae(folder)
    assert "steerrec.errors" in type(caught.value).__module__
    assert not (tmp_path / "opened").exists()


def test_a_pickle_that_is_a_link_out_of_its_folder_is_refused(tmp_path):
    folder = dictionary(tmp_path / "trainer_0")
    (folder / "ae.pt").rename(tmp_path / "ae.pt")
    (folder / "ae.pt").symlink_to("../ae.pt")
    with pytest.raises(ArtifactError, match="is a link that leads out of"):
        import_sae(folder)
    agree(import_sae(folder, root=tmp_path), *linear_formula(LINEAR))


# --- PopSteer


class Config:
    """As RecBole pickles its settings: an object with dicts inside."""

    def __init__(self, **settings):
        self.final_config_dict = settings
        self.internal_config_dict = {"sae_k": 8}


def popsteer(file, *, parts=("sae_module",), config=None, wrap=True):
    state = {"item_embedding.weight": torch.ones(5, D), "LayerNorm.bias": torch.ones(D)}
    for number, part in enumerate(parts):
        state |= {f"{part}.{name}": tensor * (number + 1) for name, tensor in LINEAR.items()}
    saved = {"config": config, "epoch": 3, "state_dict": OrderedDict(state)}
    torch.save(saved if wrap else dict(LINEAR), file)
    return file


def test_popsteer_takes_its_k_from_the_settings_in_force(tmp_path):
    file = popsteer(tmp_path / "SASRec_SAE.pth", config=Config(sae_k=K, sae_scale_size=32))
    agree(import_sae(file), *linear_formula(LINEAR))


def test_popsteer_with_an_sae_for_the_items_and_one_for_the_users(tmp_path):
    parts = ("sae_module_i", "sae_module_u")
    file = popsteer(tmp_path / "both.pth", parts=parts, config=Config(sae_k=[7, K]))
    with pytest.raises(ArtifactError, match=r"are 'sae_module_i', 'sae_module_u'; name one"):
        import_sae(file)
    doubled = {name: 2 * tensor for name, tensor in LINEAR.items()}
    agree(import_sae(file, part="sae_module_u"), *linear_formula(doubled))
    assert import_sae(file, part="sae_module_i").k == 7


def test_popsteer_without_settings_or_by_its_own_weights_needs_a_k(tmp_path):
    for wrap in (True, False):
        file = popsteer(tmp_path / f"{wrap}.pth", wrap=wrap)
        with pytest.raises(ArtifactError, match="give k"):
            import_sae(file)
        agree(import_sae(file, k=K), *linear_formula(LINEAR))


def test_a_checkpoint_without_an_sae_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="has no SAE in it; expected tensors such as"):
        import_sae(popsteer(tmp_path / "plain.pth", parts=()))


# --- recognised, or not


def test_an_unknown_folder_file_or_format_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is no SAE that is recognised: expected sae_weights"):
        import_sae(tmp_path)
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        import_sae(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="unknown format 'gemma'; expected one of saelens, sp"):
        import_sae(tmp_path, format="gemma")
    with pytest.raises(ArtifactError, match=r"cfg\.json does not exist"):
        import_sae(tmp_path, format="saelens")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(CheckpointError):
        import_sae(tmp_path / "noise.pth")
