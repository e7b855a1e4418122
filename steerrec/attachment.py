"""An SAE attached to a live model: it observes or steers, per request where that is asked."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.diagnosis import fires_too_often, refuse_last
from steerrec.errors import SiteError
from steerrec.hooks import SiteHook
from steerrec.nested import describe
from steerrec.positions import Firing
from steerrec.probes import probe
from steerrec.recipes import Recipe
from steerrec.recommender import Recommender
from steerrec.sites import Site
from steerrec.steering import Steering, SteerTransform

Strength = float | Tensor | Callable[[Firing], float | Tensor]
Users = Tensor | Callable[[Firing], Tensor]


@dataclass(eq=False)
class _Scope:
    """What one `with attachment.scope(...)` block asks for; None where it says nothing."""

    attachment: Attachment
    alpha: Strength | None
    users: Users | None
    enabled: bool | None
    over: bool = False


_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("steerrec_scopes", default=())
_keys = itertools.count()
_probing: ContextVar[bool] = ContextVar("steerrec_probing", default=False)


@dataclass(frozen=True)
class _InForce:
    """What an attachment does for every thread, exchanged as a whole."""

    steering: Recipe | None
    transform: SteerTransform
    strength: Strength
    enabled: bool
    elsewhere: dict[torch.device, SteerTransform] = field(default_factory=dict)
    on_cpu: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_cpu", self.transform.bias.is_cpu)

    def transform_for(self, rows: Tensor) -> SteerTransform:
        """The transform on the device of the rows, copied there once."""
        if self.on_cpu and rows.is_cpu:  # asking for a device takes longer
            return self.transform
        device = rows.device
        if self.transform.bias.device == device:
            return self.transform
        found = self.elsewhere.get(device)
        if found is None:
            found = self.elsewhere[device] = copy.deepcopy(self.transform).to(device)
        return found


_strengths: dict[int, Tensor] = {}
"""Strengths that compiled graphs read, by attachment.

They are here because torch takes the shape of what it reaches through a module's hooks for a
constant: with one strength per user each new batch size would be compiled anew.
"""


@dataclass
class _Graphed:
    """What else a compiled graph reads, and what changes for it."""

    transform: SteerTransform
    on: Tensor
    function: Callable[[Firing], float | Tensor] | None = None


@dataclass(frozen=True)
class AttachmentReport:
    """How an attachment has fared so far.

    Attributes
    ----------
    site
        Where it is, any pattern replaced by the module that it matched.
    firings, used
        How often the site fired, and how many of those firings the site's call policy counts. A
        compiled model does not count.
    shape
        Shape of what the site emitted last; None before the first firing.
    steering, alpha, enabled
        Name of the recipe in force (None while observing), its strength, and whether it is on.
    mha_fast_path_off
        Whether torch's fast path for multi-head attention is off while this is attached: outputs
        then equal those of the model with it off.
    compiled
        Whether torch.compile or torch.export has taken the attachment into a graph.
    """

    site: Site
    firings: int
    used: int
    shape: tuple[int, ...] | None
    steering: str | None
    alpha: Any
    enabled: bool
    mha_fast_path_off: bool
    compiled: bool


class Attachment:
    """An SAE on a live model, with or without steering; made by `attach`.

    Without steering it observes: the model's outputs stay the very same objects. Setting
    `steering` turns it on, None turns it off again, `remove` takes the hooks off. It is a context
    manager that removes itself on every exit.

    `steering`, `alpha` and `enabled` can change at any time, also after torch.compile; they hold
    for every thread. What `scope` sets holds for the calls of one thread or task only.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SparseAutoencoder,
        site: Site,
        steering: Recipe | None,
        *,
        mha_fast_path: bool | None = None,
        firings: int | None = None,
    ) -> None:
        self.sae = sae
        self.site = site
        self._is_known_to_fire = firings is not None
        self._latest = threading.local()
        first = next(model.parameters(), None)
        home = torch.device("cpu") if first is None else first.device
        nothing = SteerTransform(sae, Steering(torch.zeros(sae.d_sae), alpha=0.0)).to(home)
        self._now = _InForce(None, nothing, 0.0, True)
        self._key = next(_keys)
        with torch.inference_mode(False):  # tensors made under it could not be changed outside
            self._graphed = _Graphed(nothing, torch.zeros((), dtype=torch.bool, device=home))
            _strengths[self._key] = torch.zeros((), device=home)
        weakref.finalize(self, _strengths.pop, self._key, None)
        self._hook = SiteHook(
            model,
            site,
            self._on_firing,
            mha_fast_path=mha_fast_path,
            last_call=None if firings is None else firings - 1,
        )
        self.site = self._hook.site
        try:
            self.steering = steering
        except BaseException:
            self.remove()
            raise

    # --- what is in force

    @property
    def steering(self) -> Recipe | None:
        """The recipe in force; None while observing only. Setting it sets `alpha` too."""
        return self._now.steering

    @steering.setter
    def steering(self, steering: Recipe | None) -> None:
        now = self._now
        if steering is None:
            self._put_in_force(replace(now, steering=None))
            return
        strength = _checked(steering.alpha)  # before anything is exchanged
        transform = now.transform.with_steering(steering)
        if self._hook.traced:
            self._graphed.transform.copy_from(transform)  # the graph keeps these very tensors
        else:
            self._graphed.transform = transform
        self._put_in_force(_InForce(steering, transform, strength, now.enabled))

    @property
    def alpha(self) -> Strength:
        """Strength: a number, one per history of a batch [B], or a function of the `Firing`."""
        return self._now.strength

    @alpha.setter
    def alpha(self, alpha: Strength) -> None:
        if callable(alpha) and self._hook.traced:
            raise SiteError(
                "the model is compiled, and no function can become its alpha any more; expected a "
                "number or a tensor [B]"
            )
        self._put_in_force(replace(self._now, strength=_checked(alpha)))

    @property
    def enabled(self) -> bool:
        """Whether the recipe, if there is one, acts."""
        return self._now.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._put_in_force(replace(self._now, enabled=bool(enabled)))

    @torch.inference_mode(False)
    def _put_in_force(self, new: _InForce) -> None:
        """Exchange everything at once, so that no forward sees half of it."""
        self._now = new
        graphed = self._graphed
        graphed.on.fill_(new.enabled and new.steering is not None)
        graphed.function = new.strength if callable(new.strength) else None
        if isinstance(new.strength, Tensor) and new.strength.ndim:
            strength = new.strength.detach().clone()
            _strengths[self._key] = strength.to(graphed.on.device, torch.float32)
        elif not callable(new.strength):
            if _strengths[self._key].ndim:
                _strengths[self._key] = torch.zeros((), device=graphed.on.device)
            _strengths[self._key].fill_(float(new.strength))

    @contextmanager
    def scope(
        self,
        *,
        alpha: Strength | None = None,
        users: Users | None = None,
        enabled: bool | None = None,
    ) -> Iterator[None]:
        """Steer the calls of this thread or task, inside the block, in their own way.

        Scopes nest: what an inner one does not set comes from the outer one, and from the
        attachment itself. Other threads and tasks do not see them. A compiled model does not see
        them either: set `alpha` there, or steer user vectors with `SteerTransform`.

        Parameters
        ----------
        alpha
            Strength: a number, one per history of the batch [B], or a function of the `Firing`
            (its rows, its token ids) that returns either.
        users
            Which histories of the batch to steer: boolean [B], or a function of the `Firing`. The
            others stay as they are, bit for bit.
        enabled
            Whether to steer at all.
        """
        if self._hook.traced:
            raise SiteError(
                "a compiled model does not see scopes; set the attachment's alpha, or steer user "
                "vectors with SteerTransform"
            )
        if alpha is not None:
            _checked(alpha)
        mine = _Scope(self, alpha, users, enabled)
        _scopes.set((*_scopes.get(), mine))
        try:
            yield
        finally:  # no token: a generator may be closed in another context than it was opened in
            mine.over = True
            _scopes.set(tuple(scope for scope in _scopes.get() if scope is not mine))

    # --- what has happened

    @property
    def firings(self) -> int:
        """How often the site has fired since the SAE was attached."""
        return self._hook.firings

    @property
    def latents(self) -> Latents:
        """Active latents of this thread's latest forward pass, before any steering here."""
        observed: Tensor | None = getattr(self._latest, "rows", None)
        if observed is None:
            reason = (
                "a compiled model keeps none: run the plain model"
                if self._hook.traced
                else "run the model first"
            )
            raise SiteError(
                f"site {self.site.name} has not fired since the SAE was attached; {reason}"
            )
        with torch.no_grad():
            return self.sae.encode(observed.to(self.sae.W_enc))

    def report(self) -> AttachmentReport:
        """How the attachment has fared so far."""
        hook = self._hook
        return AttachmentReport(
            site=self.site,
            firings=hook.firings,
            used=hook.used,
            shape=hook.shape,
            steering=None if self.steering is None else self.steering.name,
            alpha=self.alpha,
            enabled=self.enabled,
            mha_fast_path_off=hook.fast_path_off,
            compiled=hook.traced or hook.exported,
        )

    def require_fired(self) -> None:
        """Raise SiteError, with the likely cause, if the site has not fired."""
        self._hook.require_fired()

    def remove(self) -> None:
        """Take the hooks off the model; harmless when done twice."""
        self._hook.remove()

    # --- at a firing

    def _on_firing(self, firing: Firing) -> Tensor | None:
        rows = firing.rows
        _check_width(self.site, rows, self.sae.d_in)
        if torch.compiler.is_compiling():
            graphed = self._graphed
            function = graphed.function
            alpha = _strengths[self._key] if function is None else function(firing)
            if isinstance(alpha, Tensor) and alpha.ndim:
                alpha = firing.per_row(alpha)
            return torch.where(graphed.on, graphed.transform(rows, alpha), rows)
        if _probing.get():
            return None
        kept = rows.detach() if rows.requires_grad else rows
        self._latest.rows = kept if firing.own else kept.clone()  # the model may write into its own
        now = self._now
        strength, users, enabled = now.strength, None, now.enabled
        for scope in _scopes.get():
            if scope.attachment is self and not scope.over:
                strength = strength if scope.alpha is None else scope.alpha
                users = users if scope.users is None else scope.users
                enabled = enabled if scope.enabled is None else scope.enabled
        if now.steering is None or not enabled:
            return None
        return _steered(now.transform_for(rows), firing, strength, users)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
        if kind is not None or self._is_known_to_fire or self._hook.has_fired:
            return
        if self._hook.model_ran:
            self.require_fired()
        warnings.warn(
            f"the SAE at site {self.site.name} saw nothing: the model was not run inside the "
            "block, or it was compiled before the SAE was attached",
            stacklevel=2,
        )


def _steered(
    transform: SteerTransform, firing: Firing, strength: Strength, users: Users | None
) -> Tensor:
    rows = firing.rows
    if callable(strength):
        strength = _checked(strength(firing))
    if isinstance(strength, Tensor) and strength.ndim:
        strength = firing.per_row(strength)
    assert not callable(strength)
    steered = transform.forward(rows, strength)
    if users is None:
        return steered
    mask: Any = users(firing) if callable(users) else users
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1:
        kind = describe(mask)
        if isinstance(mask, Tensor):
            kind = f"a {mask.dtype} tensor {tuple(mask.shape)}"
        raise SiteError(
            f"users is {kind}; expected a boolean tensor, one value for each of the "
            f"{firing.batch_size} histories of the batch"
        )
    return torch.where(firing.per_row(mask).to(rows.device)[:, None], steered, rows)


def _checked(alpha: Any) -> Any:
    """A strength that is usable, or an error that says what one is."""
    if callable(alpha):
        return alpha
    if isinstance(alpha, Tensor):
        if alpha.ndim < 2 and bool(alpha.isfinite().all()):
            return alpha
        raise SiteError(
            f"alpha is a tensor {tuple(alpha.shape)}; expected one finite number, or one per "
            "history of the batch [B]"
        )
    if isinstance(alpha, np.floating | np.integer):
        alpha = alpha.item()
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SiteError(
            f"alpha is {alpha!r}; expected a finite number, a tensor [B] or a function of a Firing"
        )
    return alpha


def attach(
    model: nn.Module | Recommender,
    sae: SparseAutoencoder,
    *,
    site: Site | None = None,
    steering: Recipe | None = None,
    mha_fast_path: bool | None = None,
) -> Attachment:
    """Attach an SAE to a layer of a frozen model through a forward hook.

    Several attachments on one model, or on one site, act in the order in which they were made.
    Attach before torch.compile: torch ignores hooks that come later.

    Parameters
    ----------
    model
        A torch module, or a `Recommender`, whose recommended site is then the default. With a
        `Recommender` one short history is scored at once, to see that the site fires as it should.
    sae
        The SAE; it must read vectors of the site's width.
    site
        Where to attach it.
    steering
        What to do there; observe only if None.
    mha_fast_path
        False takes torch's fast path for multi-head attention off while attached, True leaves it
        alone; by default it is taken off where the site is a `nn.TransformerEncoderLayer` or
        inside one, which needs that. The switch is global to the process.

    Returns
    -------
    Attachment
        Live until its `remove`, or the end of its `with` block.

    Raises
    ------
    SiteError
        If the site does not exist, never fires, fires more often than its `call` says, emits
        nothing that the SAE can read, or the model is already compiled.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4))
    >>> sae = SparseAutoencoder(4, 8, k=2)
    >>> with attach(model, sae, site=Site("0", layout="BH")) as attachment:
    ...     _ = model(torch.ones(5, 3))
    >>> attachment.firings
    1
    """
    if isinstance(model, nn.Module):
        if site is None:
            raise SiteError("a bare torch module has no recommended site; pass site=Site(...)")
        refuse_last(site)
        return Attachment(model, sae, site, steering, mha_fast_path=mha_fast_path)
    site = site or model.site
    firings = count_firings(model, site, width=sae.d_in, mha_fast_path=mha_fast_path)
    return Attachment(
        model.model,
        sae,
        site,
        steering,
        mha_fast_path=mha_fast_path,
        firings=firings,
    )


@torch.no_grad()
def count_firings(
    rec: Recommender,
    site: Site,
    *,
    width: int | None = None,
    mha_fast_path: bool | None = None,
) -> int:
    """How often a site fires while a recommender scores one short history.

    Raises
    ------
    SiteError
        If the site does not fire as its `call` says, or emits values that are not finite or, where
        that is given, not of this width.
    """
    short = probe(rec, [list(range(min(3, len(rec.catalogue))))])

    def look(firing: Firing) -> None:
        if width is not None:
            _check_width(site, firing.rows, width)

    token = _probing.set(True)  # other attachments on the model neither see nor steer this
    try:
        with (
            torch.random.fork_rng(devices=[]),
            SiteHook(
                rec.model, site, look, mha_fast_path=mha_fast_path, thread=threading.get_ident()
            ) as hook,
        ):
            rec.score(rec.make_batch(short))
    finally:
        _probing.reset(token)
    hook.require_fired()
    forwards = hook.forwards
    uncounted = site.call == "only" and not forwards.counts_apart and site.method is None
    if uncounted and hook.firings > 1:
        raise SiteError(fires_too_often(site, hook.firings))
    return forwards.most_calls


def _check_width(site: Site, rows: Tensor, width: int) -> None:
    if rows.shape[-1] != width:
        raise SiteError(
            f"site {site.name} gives vectors of width {rows.shape[-1]}, the SAE reads {width}; "
            "attach it where it was trained"
        )
