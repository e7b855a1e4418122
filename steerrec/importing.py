"""SAEs of other libraries as steerrec's: what their weights compute is kept, or they are refused.

Nothing is executed: safetensors and JSON are checked as an artifact's are, and pickles are read by
`unpickling`. What is exported needs no code: SAELens opens a site's folder of an artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.tensor_files import TensorFile
from steerrec.unpickling import Stub, find_state_dict, read_checkpoint
from steerrec.untrusted import read_json, shown

FORMATS = ("saelens", "sparsify", "dictionary_learning", "popsteer")

_SAELENS, _SPARSIFY, _AE = "sae_weights.safetensors", "sae.safetensors", "ae.pt"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_THRESHOLD = ("threshold",)
_CLASSES = ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder")  # of dictionary_learning
_LINEAR = ("encoder.weight", "encoder.bias")


def import_sae(
    path: str | Path,
    *,
    format: str | None = None,
    k: int | None = None,
    dict_class: str | None = None,
    part: str | None = None,
    root: str | Path | None = None,
) -> SparseAutoencoder:
    """Read an SAE that another library has written.

    Scalings and biases that steerrec does not have are folded into the weights in double
    precision; settings that cannot be folded are refused. The result is float32.

    Parameters
    ----------
    path
        `saelens`: the folder of one SAE (`cfg.json`, `sae_weights.safetensors`). `sparsify`: that
        of one hookpoint (`cfg.json`, `sae.safetensors`). `dictionary_learning`: a trainer's folder
        (`ae.pt`, `config.json`), or its `ae.pt` alone. `popsteer`: a checkpoint of the PopSteer
        authors with their SAE inside (`.pth`).
    format
        Which of them; recognised by default.
    k
        Latents active at once, where the files do not say it.
    dict_class
        Class of a dictionary_learning SAE without a `config.json`: `AutoEncoderTopK` has the
        tensors of others that choose their latents otherwise.
    part
        Name of the module that holds the SAE, where a PopSteer checkpoint has several.
    root
        Where files of a folder that are links may lead; the folder itself by default.

    Returns
    -------
    SparseAutoencoder
        Frozen, on the CPU, and of the same reconstruction.

    Raises
    ------
    ArtifactError
        If the files are damaged, of another kind, or of an SAE that steerrec cannot compute.
    CheckpointError
        If a pickle is damaged or hostile.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; expected an SAE of {', '.join(FORMATS)}")
    found = format or _recognise(path)
    if found not in FORMATS:
        raise ArtifactError(f"unknown format {shown(found)}; expected one of {', '.join(FORMATS)}")
    inside = Path(root or path)
    if found == "saelens":
        return _from_saelens(path, inside, k)
    if found == "sparsify":
        return _from_sparsify(path, inside, k)
    if found == "dictionary_learning":
        return _from_dictionary_learning(path, inside, k, dict_class)
    return _from_popsteer(path, k, part)


def _recognise(path: Path) -> str:
    if path.is_dir():
        for name, format in ((_SAELENS, FORMATS[0]), (_SPARSIFY, FORMATS[1]), (_AE, FORMATS[2])):
            if (path / name).exists():
                return format
        raise ArtifactError(
            f"{path} is no SAE that is recognised: expected {_SAELENS} (SAELens), {_SPARSIFY} "
            f"(sparsify) or {_AE} (dictionary_learning) in it"
        )
    return "dictionary_learning" if path.suffix == ".pt" else "popsteer"


# --- SAELens


def _from_saelens(path: Path, root: Path, k: int | None) -> SparseAutoencoder:
    """``(x - b_dec) W_enc + b_enc``, topk or jumprelu of it, and what its options make of that."""
    file = path / "cfg.json"
    config = read_json(file, root)
    architecture, own_k = config.get("architecture", "standard"), config.get("k")
    old = config.get("activation_fn", config.get("activation_fn_str"))
    if architecture == "standard" and old == "topk":  # as before version 6
        architecture, arguments = "topk", config.get("activation_fn_kwargs")
        own_k = arguments.get("k") if isinstance(arguments, dict) else None
    if architecture not in ("topk", "jumprelu"):
        raise _unlike(file, "architecture", architecture, "topk or jumprelu")
    jumps = architecture == "jumprelu"
    for key, allowed in (
        ("normalize_activations", ("none", None, False)),
        ("reshape_activations", ("none", None)),
        ("finetuning_scaling_factor", (False, None)),
    ):
        if not any(config.get(key) is value or config.get(key) == value for value in allowed):
            raise _unlike(file, key, config[key], allowed[0])
    flags = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    for key in flags:
        flags[key] = config.get(key, flags[key])
        if not isinstance(flags[key], bool):
            raise _unlike(file, key, flags[key], "true or false")
    if jumps and flags["rescale_acts_by_decoder_norm"]:
        raise _unlike(file, "rescale_acts_by_decoder_norm", True, "false for jumprelu")
    weights = _tensors(path / _SAELENS, root, _TENSORS + _THRESHOLD * jumps)
    _check_shapes(path, weights)
    if flags["rescale_acts_by_decoder_norm"]:
        length = weights["W_dec"].norm(dim=1)  # [d_sae]
        if not bool((length > 0).all()):
            raise ArtifactError(f"{path / _SAELENS}: decoder rows of length 0 cannot be rescaled")
        weights["W_enc"] = weights["W_enc"] * length
        weights["b_enc"] = weights["b_enc"] * length
        weights["W_dec"] = weights["W_dec"] / length[:, None]
    if not flags["apply_b_dec_to_input"]:  # steerrec always takes b_dec off
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    if jumps and own_k is None and k is None:
        return _built(path, weights, None)
    return _built(path, weights, _one_k(file, own_k, k))


# --- sparsify


def _from_sparsify(path: Path, root: Path, k: int | None) -> SparseAutoencoder:
    """``f = TopK(ReLU(encoder(x - b_dec)))``, with the decoder's rows as steerrec has them."""
    file = path / "cfg.json"
    config = read_json(file, root)
    for key, expected in (
        ("activation", "topk"),
        ("transcode", False),
        ("skip_connection", False),
        ("signed", False),
    ):
        if config.get(key, expected) != expected:
            raise _unlike(file, key, config[key], expected)
    found = _tensors(path / _SPARSIFY, root, (*_LINEAR, "W_dec", "b_dec"))
    return _built(path, _linear(found), _one_k(file, config.get("k"), k))


# --- dictionary_learning


def _from_dictionary_learning(
    path: Path, root: Path, k: int | None, dict_class: str | None
) -> SparseAutoencoder:
    """Its topk, batchtopk (at inference a jumprelu of one threshold) and jumprelu."""
    folder, file = (path, path / _AE) if path.is_dir() else (path.parent, path)
    beside = folder / "config.json"
    trainer: Any = {}
    if beside.exists():
        trainer = read_json(beside, root if path.is_dir() else folder).get("trainer")
        if not isinstance(trainer, dict):
            raise ArtifactError(f"{beside} has no trainer; expected one of dictionary_learning")
    kind = trainer.get("dict_class", dict_class)
    if kind is None:
        raise ArtifactError(
            f"{file} does not say which of dictionary_learning's classes it is, and there is no "
            "config.json beside it; give dict_class (--dict-class), such as AutoEncoderTopK"
        )
    if kind not in _CLASSES:
        raise _unlike(file, "class", kind, " or ".join(_CLASSES))
    _inside(file, root if path.is_dir() else folder)
    found = find_state_dict(read_checkpoint(file))
    if kind == "JumpReluAutoEncoder":  # it does not take b_dec off, steerrec always does
        weights = _doubles(file, found, _TENSORS + _THRESHOLD)
        _check_shapes(path, weights)
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
        return _built(path, weights, k)
    buffer, own_k = found.get("k"), None
    if buffer is not None:
        if buffer.numel() != 1 or buffer.is_floating_point() or buffer.is_complex():
            raise ArtifactError(f"{file}: k has shape {tuple(buffer.shape)}; expected one integer")
        own_k = int(buffer)
    saved = _one_k(file, own_k, k if trainer.get("k") is None else trainer["k"])
    names = (*_LINEAR, "decoder.weight", "b_dec")
    weights = _doubles(file, found, names, optional=("k", "threshold"))
    decoder = weights["decoder.weight"]
    weights["W_dec"] = decoder.T if decoder.ndim == 2 else decoder
    linear = _linear(weights)
    if kind == "BatchTopKSAE":
        linear["threshold"] = torch.full_like(linear["b_enc"], _one_threshold(file, found))
    return _built(path, linear, _one_k(file, saved, k))


def _one_threshold(file: Path, found: Mapping[str, Tensor]) -> float:
    """The threshold that a BatchTopKSAE uses at inference, one for all latents."""
    threshold = found.get("threshold")
    if threshold is None or threshold.numel() != 1 or not threshold.is_floating_point():
        raise ArtifactError(f"{file} has no single threshold; expected that of a BatchTopKSAE")
    if not 0 <= float(threshold) < float("inf"):
        raise ArtifactError(
            f"{file} has threshold {float(threshold):g}, one that was never set; expected a "
            "BatchTopKSAE that was trained to the end"
        )
    return float(threshold)


# --- PopSteer


def _from_popsteer(path: Path, k: int | None, part: str | None) -> SparseAutoencoder:
    """``f = TopK(ReLU(encoder(x - b_dec)))``; its k is in the settings that RecBole saves."""
    checkpoint = read_checkpoint(path)
    tensors = find_state_dict(checkpoint)
    modules = sorted(
        name.removesuffix("encoder.weight").removesuffix(".")
        for name in tensors
        if name.rpartition("encoder.weight")[0].removesuffix(".").rpartition(".")[2][:3] == "sae"
    )
    if not modules and {*_LINEAR, "W_dec", "b_dec"} <= set(tensors):
        modules = [""]  # the SAE's own state_dict
    listed = ", ".join(map(shown, modules)) or "none"
    if part is None and len(modules) == 1:
        part = modules[0]
    if part is None or part not in modules:
        raise ArtifactError(
            f"{path}: the SAEs in it are {listed}; name one with part (--part)"
            if modules
            else f"{path} has no SAE in it; expected tensors such as sae_module.encoder.weight"
        )
    prefix = f"{part}." if part else ""
    inside = {name: t for name, t in tensors.items() if name.startswith(prefix)}
    found = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
    weights = _doubles(path, found, (*_LINEAR, "W_dec", "b_dec"))
    return _built(path, _linear(weights), _one_k(path, _popsteer_k(checkpoint, part), k))


def _popsteer_k(checkpoint: Any, part: str) -> Any:
    """`sae_k` of the settings: one number, or one for the item's and one for the user's side."""
    config = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    state = config.state if isinstance(config, Stub) else config
    settings = state.get("final_config_dict", state) if isinstance(state, Mapping) else {}
    k = settings.get("sae_k") if isinstance(settings, Mapping) else None
    sides = {"sae_module_i": 0, "sae_module_u": 1}
    if isinstance(k, list) and len(k) == len(sides) and part in sides:
        return k[sides[part]]
    return k


# --- shared


def _inside(file: Path, root: Path) -> None:
    if not file.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{file} is a link that leads out of {root}; expected the file there")


def _unlike(file: Path, key: str, found: object, expected: object) -> ArtifactError:
    return ArtifactError(
        f"{file} has {key} {shown(found)}, which steerrec does not compute; expected {expected}"
    )


def _one_k(file: Path, own: Any, given: int | None) -> int:
    """The k that the file has or the caller gives; both must agree."""
    if own is not None and given is not None and own != given:
        raise ArtifactError(f"{file}: k is {shown(own)}, not {given}; leave k away, or mend it")
    k = given if own is None else own
    if k is None:
        raise ArtifactError(
            f"{file} does not say how many latents are active at once; give k (--k)"
        )
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ArtifactError(f"{file}: k is {shown(k)}; expected a positive integer")
    return k


def _tensors(file: Path, root: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    with TensorFile(file, root) as opened:
        return _doubles(file, {name: opened.read(name) for name in opened.tensors}, names)


def _doubles(
    file: Path, found: Mapping[str, Tensor], names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Exactly the tensors of these names, in double precision: what is folded is rounded once."""
    missing = [name for name in names if name not in found]
    others = sorted(set(found) - set(names) - set(optional))
    if missing or others:
        has = f"has {', '.join(map(shown, others[:4]))}" if others else "lacks"
        raise ArtifactError(
            f"{file} {has}{' and lacks' * bool(missing and others)} {', '.join(missing)}; expected "
            f"the tensors {', '.join(names)}, of an SAE that steerrec computes"
        )
    for name in names:
        if not found[name].is_floating_point() or not bool(found[name].isfinite().all()):
            raise ArtifactError(f"{file}: tensor {name!r} has values that are no finite numbers")
    return {name: found[name].detach().double() for name in names}


def _linear(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an encoder that is a linear layer, with weights [d_sae, d_in], steerrec's tensors."""
    weight = weights["encoder.weight"]
    return {
        "W_enc": weight.T if weight.ndim == 2 else weight,
        "b_enc": weights["encoder.bias"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }


def _check_shapes(path: Path, weights: Mapping[str, Tensor]) -> list[str]:
    """The names of an SAE's tensors, once their shapes fit each other."""
    d_sae, d_in = weights["W_dec"].shape if weights["W_dec"].ndim == 2 else (0, 0)
    shapes: dict[str, tuple[int, ...]]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if "threshold" in weights:
        shapes["threshold"] = (d_sae,)
    for name, shape in shapes.items():
        if weights[name].shape != shape or 0 in shape:
            raise ArtifactError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, which does not fit a "
                f"decoder of {d_sae} rows of width {d_in}"
            )
    return list(shapes)


def _built(path: Path, weights: Mapping[str, Tensor], k: int | None) -> SparseAutoencoder:
    """The SAE, once all shapes fit each other; with thresholds a jumprelu."""
    names = _check_shapes(path, weights)
    if k is not None and k > len(weights["W_dec"]):
        raise ArtifactError(f"{path}: k is {k}, more than the {len(weights['W_dec'])} latents")
    tensors = {name: weights[name].float().contiguous() for name in names}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{path}: {name} is too large for single precision")
    return SparseAutoencoder.from_weights(tensors, k)
