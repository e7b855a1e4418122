"""`capture`: reading what is at sites of a model during its forward passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steerrec.diagnosis import require_finite
from steerrec.errors import SiteError
from steerrec.hooks import SiteHook
from steerrec.positions import Firing
from steerrec.sites import Site, expand


class _StopForward(BaseException):
    """Ends a forward pass once every captured site has fired.

    A BaseException, so that no `except Exception` in the model's code can swallow it.
    """


class Captured:
    """What `capture` read: for each site the rows of all its firings.

    Attributes
    ----------
    sites
        The sites read, patterns replaced by what they matched.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self._of = {site: expand(model, site) for site in sites}
        self.sites: list[Site] = list(
            dict.fromkeys(s for found in self._of.values() for s in found)
        )
        self._rows: dict[Site, list[Tensor]] = {site: [] for site in self.sites}

    def __getitem__(self, site: Site) -> Tensor:
        """The rows [sum of R, H] of a site, or of the one module that a pattern matched.

        Raises
        ------
        SiteError
            If the site was not captured, has not fired yet, or is a pattern with several matches.
        """
        found = self._of.get(site, [site])
        if len(found) > 1:
            names = ", ".join(match.path for match in found)
            raise SiteError(f"pattern {site.path!r} captured {names}: ask for one of `sites`")
        rows = self._rows.get(found[0])
        if not rows:
            raise SiteError(f"nothing was captured at site {site.name}")
        return torch.cat(rows)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)


@contextmanager
def capture(
    model: nn.Module,
    *sites: Site,
    stop: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sink: Callable[[Site, Tensor], None] | None = None,
    mha_fast_path: bool | None = None,
) -> Iterator[Captured]:
    """Read one or more sites during the forward passes that this thread makes inside the block.

    The rows are detached clones: some libraries write into a layer's output afterwards.

    Parameters
    ----------
    model
        Any torch module.
    sites
        The sites to read, all in the same forward; one with a pattern for a path reads every
        module that it matches.
    stop
        End the forward pass, and with it the block, as soon as every site has what it wants of
        one forward. A site with ``call="last"`` or ``"all"`` wants all of it.
    dtype, device
        Cast and move the rows.
    sink
        Called with a site and its rows [R, H] at each firing; nothing is then kept in memory.
    mha_fast_path
        See `SiteHook`.

    Raises
    ------
    SiteError
        If a site does not exist, emits no such tensor or values that are not finite, or never
        fired.

    Examples
    --------
    >>> site = Site("0", layout="BH")
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with capture(model, site) as captured:
    ...     _ = model(torch.ones(4, 3))
    >>> captured[site].shape
    torch.Size([4, 2])
    """
    captured = Captured(model, sites)
    hooks: list[SiteHook] = []
    pending: dict[Site, Tensor] = {}

    def keep(site: Site, rows: Tensor) -> None:
        if sink is None:
            captured._rows[site].append(rows)
        else:
            sink(site, rows)

    def reader(site: Site) -> Callable[[Firing], None]:
        def read(firing: Firing) -> None:
            require_finite(site, firing.rows)
            rows = firing.rows.detach().to(device, dtype, copy=True)
            if site.call == "last":
                if firing.call == 0 and site in pending:
                    keep(site, pending.pop(site))
                pending[site] = rows
                return
            keep(site, rows)
            if stop and all(hook.used and hook.site.call not in ("all", "last") for hook in hooks):
                raise _StopForward(captured)

        return read

    try:
        here = threading.get_ident()
        for site in captured.sites:
            hook = SiteHook(
                model,
                site,
                reader(site),
                mha_fast_path=mha_fast_path,
                thread=here,
                install=False,
            )
            hooks.append(hook)  # first, so that no interruption finds hooks that nobody knows of
            hook.install()
        yield captured
    except _StopForward as stopped:
        if stopped.args[0] is not captured:  # an outer block's
            raise
    finally:
        for hook in hooks:
            hook.remove()
    for site, rows in pending.items():
        keep(site, rows)
    for hook in hooks:
        hook.require_fired()
