"""Which rows of a site's tensor are its users', in every layout; and those rows (`Firing`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steerrec.errors import SiteError
from steerrec.graphs import has_values
from steerrec.nested import describe
from steerrec.sites import Lengths, RealMask, Site, TokenIds


class Firing(NamedTuple):  # made at every firing: a frozen dataclass takes three times as long
    """What a site gives at one firing.

    Attributes
    ----------
    rows
        The vectors at the site's positions, [R, H]. Not to be written to.
    own
        Whether they are in memory of their own, and not in that of the model.
    batch_size
        Number of histories B in this forward.
    call
        Which firing of this forward it is, from 0.
    tokens
        The token ids [B, L] of this forward where the site knows them.
    owners
        For each row the number of its history, [R]; a number where each history has that many
        rows, one history after another.
    """

    rows: Tensor
    batch_size: int
    call: int = 0
    tokens: Tensor | None = None
    owners: Tensor | int = 1
    own: bool = False

    def per_row(self, values: Tensor) -> Tensor:
        """`values` [B], one per history, spread over the rows: [R].

        Raises
        ------
        SiteError
            If there are more or fewer than histories.
        """
        if values.shape[0] != self.batch_size:
            raise SiteError(
                f"{values.shape[0]} values for a batch of {self.batch_size} histories; expected "
                "one number or one per history"
            )
        if isinstance(self.owners, int):
            return values if self.owners == 1 else values.repeat_interleave(self.owners, dim=0)
        return values[self.owners.to(values.device)]


_TOLD = TokenIds, RealMask  # a tuple: a union would be made anew at each firing


@dataclass(slots=True)  # not frozen, which takes twice as long: they are made at every firing
class Place:
    """Where a site's rows are in its tensor.

    Attributes
    ----------
    index
        What picks them out; None for all of them.
    last
        Where there is one row for each history: its position, [B]; a number for all of them.
    items
        How many real positions each history has (or 1 for some), where that is known, [B]: the row
        of one without any is never replaced.
    """

    index: tuple[Tensor, ...] | None = None
    last: Tensor | int | None = None
    items: Tensor | int | None = None


def find_rows(
    site: Site, tensor: Tensor, seen: tuple[Tensor, ...], call: int
) -> tuple[Place, Firing]:
    """Where a site's rows are in its tensor, and what they are.

    Parameters
    ----------
    site
        The site.
    tensor
        What it emitted, its axes in the order [B, L, H] (see `oriented`), [B, H], or jagged.
    seen
        What came by at `site.positions_from` in this forward, the latest last.
    call
        Number of the firing.
    """
    source = site.positions_from
    ids = seen[-1] if seen and isinstance(source, TokenIds) else None
    if site.layout == "BH":
        return Place(), Firing(tensor, tensor.shape[0], call, ids)
    if site.layout == "jagged":
        return _jagged_rows(site, tensor, seen, call)
    batch, length, width = tensor.shape
    if site.positions == "all":
        return Place(), Firing(tensor.reshape(-1, width), batch, call, ids, owners=length)
    if length == 0:
        raise SiteError(f"site {site.name} emits histories of length 0; expected items in them")
    if source == "last":
        return Place(last=-1), Firing(tensor.select(1, -1), batch, call)
    if batch == 1 and site.positions == "user":
        found = _last_of_one(site, seen, length)
        if found is not None:  # a single request: Python is faster than five kernels
            place = Place(last=found[0], items=found[1])
            rows = tensor.view(1, width) if length == 1 else tensor.select(1, found[0])
            return place, Firing(rows, 1, call, ids)
    if length == 1 and site.positions == "user" and isinstance(source, _TOLD):
        return _only_row(site, tensor, seen, call, ids)
    if isinstance(source, Lengths):
        steps = torch.arange(length, device=tensor.device)
        real = steps < _lengths(site, source, seen, batch, tensor.device)[:, None]
    else:
        real = _real(site, seen, (batch, length)).to(tensor.device)
    if site.positions == "real":
        owners, places = real.nonzero(as_tuple=True)
        rows = tensor[owners, places]
        return Place((owners, places)), Firing(rows, batch, call, ids, owners, own=True)
    items, last = real.cumsum(dim=1).max(dim=1)  # the first of several maxima: the last real one
    rows = tensor.gather(1, _at(last, width)).squeeze(1)
    return Place(last=last, items=items), Firing(rows, batch, call, ids, own=True)


def _last_of_one(site: Site, seen: tuple[Tensor, ...], length: int) -> tuple[int, int] | None:
    """The last real position of a single history, and 0 if it has none; None to ask tensors."""
    source = site.positions_from
    latest = seen[-1] if seen else None
    if latest is None or not has_values(latest) or not isinstance(source, _TOLD):
        return None
    shape = latest.shape
    if len(shape) != 2 or shape[0] != 1 or length not in (1, shape[1]) or not latest.is_cpu:
        return None
    told = latest.tolist()[0]
    if isinstance(source, RealMask):
        told = [bool(number) is not source.padding for number in told]
    pad = source.pad_id if isinstance(source, TokenIds) else False
    padded, last = told.count(pad), len(told) - 1
    if padded == len(told):
        return 0, 0
    if length == 1:
        return 0, 1
    if padded and told[last] == pad:
        first = told.index(pad)
        if padded == len(told) - first:  # at the end alone, as usual
            return first - 1, 1
        while told[last] == pad:
            last -= 1
    return last, 1


def _only_row(
    site: Site, tensor: Tensor, seen: tuple[Tensor, ...], call: int, ids: Tensor | None
) -> tuple[Place, Firing]:
    """The user's row where a layer was run for the newest item alone: [B, 1, H]."""
    batch = tensor.shape[0]
    shape = next((tuple(found.shape) for found in reversed(seen) if len(found) == batch), None)
    if shape is None or len(shape) != 2:
        shape = (batch, 1)
    items = _real(site, seen, shape).sum(dim=1).to(tensor.device)
    return Place(last=torch.zeros_like(items), items=items), Firing(tensor[:, 0], batch, call, ids)


def _jagged_rows(
    site: Site, tensor: Tensor, seen: tuple[Tensor, ...], call: int
) -> tuple[Place, Firing]:
    source, device = site.positions_from, tensor.device
    rows = tensor.values() if tensor.is_nested else tensor
    ids = seen[-1] if seen and isinstance(source, TokenIds) else None
    if tensor.is_nested:
        lengths = _offsets(tensor).diff()
    elif isinstance(source, Lengths):
        lengths = _lengths(site, source, seen, None, device)
    elif isinstance(source, _TOLD):
        lengths = _real(site, seen, None).sum(dim=1).to(device)
    elif site.positions == "all":
        return Place(), Firing(rows, rows.shape[0], call)
    else:
        raise SiteError(
            f"site {site.name} emits {describe(tensor)} without offsets; expected positions_from="
            "Lengths(...) or TokenIds(...) to say where each history ends"
        )
    if int(lengths.sum()) != len(rows):
        raise SiteError(
            f"site {site.name} emits {len(rows)} rows for histories of {int(lengths.sum())} items; "
            "expected one row per item: is positions_from the right tensor?"
        )
    if site.positions != "user":
        owners = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        return Place(), Firing(rows, len(lengths), call, ids, owners)
    if bool((lengths == 0).any()):
        raise SiteError(
            f"site {site.name}: a history without items has no user position in a jagged layout; "
            "expected at least one item in each"
        )
    last = lengths.cumsum(0) - 1
    return Place((last,)), Firing(rows[last], len(lengths), call, ids, own=True)


def _real(site: Site, seen: tuple[Tensor, ...], shape: tuple[int, int] | None) -> Tensor:
    """Which positions are real, [B, L], by the latest ids or mask that fit the site's tensor."""
    source = site.positions_from
    assert isinstance(source, _TOLD)  # Site.__post_init__ saw to it
    what = "token ids" if isinstance(source, TokenIds) else "mask"
    if not seen:
        raise SiteError(
            f"site {site.name} fired before module {source.path!r} saw any {what}; expected "
            "positions_from to name a module that runs earlier in the same forward"
        )
    for found in reversed(seen):
        if shape in (None, tuple(found.shape)):
            if isinstance(source, TokenIds):
                return found != source.pad_id
            return (found == 0) if source.padding else (found != 0)
    raise SiteError(
        f"site {site.name} has positions {shape}, but the {what} at {source.path!r} has shape "
        f"{tuple(seen[-1].shape)}; expected the same batch"
    )


def _lengths(
    site: Site,
    source: Lengths,
    seen: tuple[Tensor, ...],
    batch: int | None,
    device: torch.device,
) -> Tensor:
    """How long each history is, [B]."""
    if not seen:
        raise SiteError(
            f"site {site.name} fired before any lengths were seen at {source.path!r}; expected "
            "positions_from to name a module that runs earlier in the same forward"
        )
    lengths = seen[-1].to(device)
    if source.offsets:
        lengths = lengths.diff()
    if lengths.ndim != 1 or batch not in (None, len(lengths)):
        raise SiteError(
            f"site {site.name}: positions_from gives shape {tuple(seen[-1].shape)}; expected one "
            f"length for each of {batch or 'the'} histories"
        )
    return lengths


def oriented(site: Site, tensor: Tensor) -> Tensor:
    """The tensor with its axes in the order [B, L, H]; [B, H] and jagged as they are."""
    if site.layout == "LBH":
        return tensor.transpose(0, 1)
    if site.layout == "BHL":
        return tensor.transpose(1, 2)
    return tensor


def put_rows(site: Site, emitted: Tensor, place: Place, rows: Tensor, new_rows: Tensor) -> Tensor:
    """A new tensor like `emitted` with the site's rows exchanged."""
    if type(place.last) is int and site.layout == "BLH" and emitted.shape[1] == place.items == 1:
        return new_rows.unsqueeze(1)  # a single request, and nothing but its row
    if emitted.is_nested:
        values = _put(emitted.values(), place, rows, new_rows)
        return torch.nested.nested_tensor_from_jagged(values, _offsets(emitted))
    # a swap of two axes undoes itself
    return oriented(site, _put(oriented(site, emitted), place, rows, new_rows))


def _put(tensor: Tensor, place: Place, rows: Tensor, new_rows: Tensor) -> Tensor:
    """A tensor of its own like this one, which is not written to, with the rows exchanged."""
    if isinstance(place.last, int):
        if place.items == 0:
            return tensor.clone()
        if tensor.shape[1] == 1:
            return new_rows.unsqueeze(1)
        new = tensor.clone()
        new.select(1, place.last).copy_(new_rows)
        return new
    if place.last is not None:
        if isinstance(place.items, Tensor):
            new_rows = torch.where((place.items > 0).unsqueeze(1), new_rows, rows)
        if tensor.shape[1] == 1:
            return new_rows.unsqueeze(1)
        return tensor.scatter(1, _at(place.last, tensor.shape[2]), new_rows.unsqueeze(1))
    if place.index is not None:
        return tensor.index_put(place.index, new_rows)
    if tensor.is_contiguous():
        return new_rows.reshape(tensor.shape)
    # laid out as the module did: the model may ask for a view of it
    return torch.empty_like(tensor).copy_(new_rows.reshape(tensor.shape))


def _at(last: Tensor, width: int) -> Tensor:
    """Positions [B] as an index into [B, L, H] along L."""
    return last.view(-1, 1, 1).expand(-1, 1, width)


def _offsets(nested: Tensor) -> Tensor:
    offsets: Tensor = nested.offsets()  # type: ignore[attr-defined]
    return offsets
