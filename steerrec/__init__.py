"""steerrec: find the neurons behind a recommender's biases, and steer them at inference.

Everything public is here, and is imported when first used: `import steerrec` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerrec.ablations import Ablations as Ablations
    from steerrec.ablations import ablate as ablate
    from steerrec.activations import ActivationSampling as ActivationSampling
    from steerrec.agreement import AttributionStudy as AttributionStudy
    from steerrec.agreement import attribution_study as attribution_study
    from steerrec.ann import AnnRecall as AnnRecall
    from steerrec.ann import ann_recall as ann_recall
    from steerrec.ann import faiss_index as faiss_index
    from steerrec.artifacts import Artifact as Artifact
    from steerrec.artifacts import load_artifact as load_artifact
    from steerrec.attachment import Attachment as Attachment
    from steerrec.attachment import attach as attach
    from steerrec.attribution import AttributionTable as AttributionTable
    from steerrec.attribution import score_groups as score_groups
    from steerrec.attribution import score_neurons as score_neurons
    from steerrec.attribution_columns import add_columns as add_columns
    from steerrec.autoencoder import SparseAutoencoder as SparseAutoencoder
    from steerrec.capturing import capture as capture
    from steerrec.causal import causal_effects as causal_effects
    from steerrec.comparison import compare as compare
    from steerrec.comparison_plots import plot_frontiers as plot_frontiers
    from steerrec.comparison_plots import plot_who_loses as plot_who_loses
    from steerrec.comparison_results import Comparison as Comparison
    from steerrec.conformance import check_conformance as check_conformance
    from steerrec.contrasts import item_contrast as item_contrast
    from steerrec.data import Catalogue as Catalogue
    from steerrec.data import Histories as Histories
    from steerrec.data import build_histories as build_histories
    from steerrec.data import leave_one_out as leave_one_out
    from steerrec.data import read_interactions as read_interactions
    from steerrec.data import simulate as simulate
    from steerrec.describing import describe_neuron as describe_neuron
    from steerrec.describing import describe_neurons as describe_neurons
    from steerrec.effects import grad_attribution as grad_attribution
    from steerrec.errors import SteerrecError as SteerrecError
    from steerrec.evaluation import evaluate as evaluate
    from steerrec.evaluation import recommend as recommend
    from steerrec.explaining import neuron_effects as neuron_effects
    from steerrec.explaining import strongest_alone as strongest_alone
    from steerrec.exporting import export_artifact as export_artifact
    from steerrec.exporting import export_transform as export_transform
    from steerrec.expressions import recipe_of as recipe_of
    from steerrec.gates import GatedSteering as GatedSteering
    from steerrec.gates import NeuronGate as NeuronGate
    from steerrec.gates import TasteGate as TasteGate
    from steerrec.gates import fit_taste as fit_taste
    from steerrec.gates import gated as gated
    from steerrec.hooks import edit as edit
    from steerrec.importing import import_sae as import_sae
    from steerrec.item_properties import item_values as item_values
    from steerrec.layers import layer_report as layer_report
    from steerrec.layers import site_at as site_at
    from steerrec.layers import site_report as site_report
    from steerrec.learning import SteeringTraining as SteeringTraining
    from steerrec.learning import learn_path as learn_path
    from steerrec.learning import learn_steering as learn_steering
    from steerrec.loading import load_recommender as load_recommender
    from steerrec.neurons import NeuronDescription as NeuronDescription
    from steerrec.neurons import NeuronDescriptions as NeuronDescriptions
    from steerrec.operations import LatentSteering as LatentSteering
    from steerrec.operations import ResponseSteering as ResponseSteering
    from steerrec.profiles import Contrast as Contrast
    from steerrec.profiles import popularity_contrast as popularity_contrast
    from steerrec.profiles import users_by_taste as users_by_taste
    from steerrec.pulling import pull as pull
    from steerrec.pushing import push as push
    from steerrec.quantiles import latent_quantiles as latent_quantiles
    from steerrec.recipes import Recipe as Recipe
    from steerrec.recommender import ItemHead as ItemHead
    from steerrec.recommender import Recommender as Recommender
    from steerrec.recommender import user_vectors as user_vectors
    from steerrec.report import plot_ablations as plot_ablations
    from steerrec.report import plot_tradeoff as plot_tradeoff
    from steerrec.report_page import write_report as write_report
    from steerrec.reporting import report_data as report_data
    from steerrec.rerank import Candidates as Candidates
    from steerrec.rerank import gather_candidates as gather_candidates
    from steerrec.rerank import reranker as reranker
    from steerrec.served_fitting import ServedTraining as ServedTraining
    from steerrec.served_learning import learn_for_users as learn_for_users
    from steerrec.serving import RetrievalVectors as RetrievalVectors
    from steerrec.serving import retrieval_vectors as retrieval_vectors
    from steerrec.shares import slot_shares as slot_shares
    from steerrec.sites import Lengths as Lengths
    from steerrec.sites import RealMask as RealMask
    from steerrec.sites import Site as Site
    from steerrec.sites import TokenIds as TokenIds
    from steerrec.steered_users import describe_users as describe_users
    from steerrec.steering import Steering as Steering
    from steerrec.steering import SteerTransform as SteerTransform
    from steerrec.strengths import ChosenStrength as ChosenStrength
    from steerrec.strengths import choose_strength as choose_strength
    from steerrec.study_plot import plot_attribution_study as plot_attribution_study
    from steerrec.sums import SteeringSum as SteeringSum
    from steerrec.tradeoff import Sweep as Sweep
    from steerrec.tradeoff import sweep as sweep
    from steerrec.training import SAETraining as SAETraining
    from steerrec.training import fit_autoencoder as fit_autoencoder
    from steerrec.wrapping import wrap as wrap

_HOME = {
    "Ablations": "ablations",
    "ActivationSampling": "activations",
    "AnnRecall": "ann",
    "Artifact": "artifacts",
    "Attachment": "attachment",
    "AttributionStudy": "agreement",
    "AttributionTable": "attribution",
    "Candidates": "rerank",
    "Catalogue": "data",
    "ChosenStrength": "strengths",
    "Comparison": "comparison_results",
    "Contrast": "profiles",
    "GatedSteering": "gates",
    "Histories": "data",
    "ItemHead": "recommender",
    "LatentSteering": "operations",
    "Lengths": "sites",
    "NeuronDescription": "neurons",
    "NeuronDescriptions": "neurons",
    "NeuronGate": "gates",
    "RealMask": "sites",
    "Recipe": "recipes",
    "Recommender": "recommender",
    "ResponseSteering": "operations",
    "RetrievalVectors": "serving",
    "SAETraining": "training",
    "Site": "sites",
    "SparseAutoencoder": "autoencoder",
    "SteerTransform": "steering",
    "Steering": "steering",
    "SteeringSum": "sums",
    "ServedTraining": "served_fitting",
    "SteeringTraining": "learning",
    "SteerrecError": "errors",
    "Sweep": "tradeoff",
    "TasteGate": "gates",
    "TokenIds": "sites",
    "ablate": "ablations",
    "add_columns": "attribution_columns",
    "ann_recall": "ann",
    "attach": "attachment",
    "attribution_study": "agreement",
    "build_histories": "data",
    "capture": "capturing",
    "causal_effects": "causal",
    "check_conformance": "conformance",
    "choose_strength": "strengths",
    "compare": "comparison",
    "describe_neuron": "describing",
    "describe_neurons": "describing",
    "describe_users": "steered_users",
    "edit": "hooks",
    "evaluate": "evaluation",
    "export_artifact": "exporting",
    "export_transform": "exporting",
    "faiss_index": "ann",
    "fit_autoencoder": "training",
    "fit_taste": "gates",
    "gated": "gates",
    "gather_candidates": "rerank",
    "grad_attribution": "effects",
    "import_sae": "importing",
    "item_contrast": "contrasts",
    "latent_quantiles": "quantiles",
    "item_values": "item_properties",
    "layer_report": "layers",
    "learn_for_users": "served_learning",
    "learn_path": "learning",
    "learn_steering": "learning",
    "leave_one_out": "data",
    "load_artifact": "artifacts",
    "load_recommender": "loading",
    "neuron_effects": "explaining",
    "strongest_alone": "explaining",
    "plot_ablations": "report",
    "plot_attribution_study": "study_plot",
    "plot_frontiers": "comparison_plots",
    "plot_tradeoff": "report",
    "plot_who_loses": "comparison_plots",
    "popularity_contrast": "profiles",
    "pull": "pulling",
    "push": "pushing",
    "read_interactions": "data",
    "recipe_of": "expressions",
    "recommend": "evaluation",
    "report_data": "reporting",
    "reranker": "rerank",
    "retrieval_vectors": "serving",
    "score_groups": "attribution",
    "score_neurons": "attribution",
    "simulate": "data",
    "site_at": "layers",
    "site_report": "layers",
    "slot_shares": "shares",
    "sweep": "tradeoff",
    "user_vectors": "recommender",
    "users_by_taste": "profiles",
    "wrap": "wrapping",
    "write_report": "report_page",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("steerrec")
        except PackageNotFoundError:
            return "0+unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'steerrec' has no attribute {name!r}")
    value = getattr(import_module(f"steerrec.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
