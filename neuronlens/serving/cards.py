"""The cards of neurons, ready to be handed out: what stores and range tables say of a neuron, held in memory by blocks.

    shelf = CardShelf(stores, catalog)
    found = await shelf.find("mlp_post", 3, 7, table="latest")
    found.cards(), found.pairs(), found.ranges()

A block is read off the event loop, once even if many ask for it, and held until others need its memory. The receipt
that names a layer's files is looked at again after FRESH_SECONDS: statistics that were made again are seen then, and
while they are being made the old ones stand.
"""

import asyncio
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from neuronlens.errors import NeuronLensError, UsageError
from neuronlens.hookpoints import parse_hook_point
from neuronlens.ranges import RangeTable
from neuronlens.recent import Recent
from neuronlens.serving.card_blocks import Block, ByNeuron, SiteFiles, StoreBlocks, Unreadable
from neuronlens.serving.catalog import LATEST, Catalog
from neuronlens.serving.errors import ApiError
from neuronlens.serving.logs import log
from neuronlens.serving.selection import TableIndex
from neuronlens.store import Store

FRESH_SECONDS = 2.0
"""How old the receipt behind a card may be."""
PATIENCE_SECONDS = 1.0
"""How long a request waits for a receipt where an older one is known."""
MAX_BYTES = 512 * 2**20
WARM_UP_SECONDS = 10.0
_N_TRIES = 3
_N_READERS = 2


class _Sized(Protocol):
    @property
    def n_bytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)
Site = tuple[str, int]
"""A hook point, by our name, and a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSites:
    """Where a range table has rows, [start, stop) for each (hook point, layer), and of which concepts."""

    spans: dict[Site, tuple[int, int]]
    concepts: tuple[str, ...]

    @classmethod
    def of(cls, index: TableIndex) -> "TableSites":
        spans: dict[Site, tuple[int, int]] = {}
        for run in index.runs:  # those of a site lie one behind the other
            start, _ = spans.get((run.hook_point, run.layer), (run.start, run.stop))
            spans[run.hook_point, run.layer] = (start, run.stop)
        return cls(spans=spans, concepts=index.concepts)

    @property
    def n_bytes(self) -> int:
        return 100 * len(self.spans) + sum(map(len, self.concepts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where the card of a neuron comes from. `store` and `block` are None where only the range table speaks of it.

    `version` changes with whatever could change the card.
    """

    hook_point: str
    layer: int
    neuron: int
    table: RangeTable
    store: StoreBlocks | None
    block: Block | None
    rows: ByNeuron
    concepts: tuple[str, ...]
    version: str

    def cards(self) -> dict[str, dict[str, Any]]:
        """What the store says of each concept."""
        return {} if self.block is None else {row["concept"]: row for row in self.block.cards[self.neuron]}

    def pairs(self) -> list[dict[str, Any]]:
        """What the store says of each pair of concepts that it keeps."""
        return [] if self.block is None else self.block.pairs[self.neuron]

    def ranges(self) -> dict[str, list[dict[str, Any]]]:
        """The table's rows of each concept for which the neuron is salient: one, or one for each piece of the range."""
        rows = itertools.groupby(self.rows[self.neuron], key=lambda row: str(row["concept"]))
        return {concept: list(pieces) for concept, pieces in rows}


class CardShelf:
    """The cards of all neurons of these stores and of the catalog's range tables. To be used from one event loop."""

    def __init__(self, stores: Sequence[Store], catalog: Catalog, *, max_bytes: int = MAX_BYTES) -> None:
        self._catalog = catalog
        self._stores = [StoreBlocks(store) for store in stores]
        self._held: Recent[Hashable, _Sized] = Recent(max_bytes, lambda held: held.n_bytes)
        self._coming: dict[Hashable, asyncio.Future[Any]] = {}
        self._receipts: dict[tuple[StoreBlocks, Site], tuple[float, SiteFiles | None]] = {}
        self._readers = ThreadPoolExecutor(_N_READERS, thread_name_prefix="neuronlens-cards")

    @property
    def n_bytes(self) -> int:
        """What is held now."""
        return self._held.n_bytes

    async def find(self, hook_point: str, layer: int, neuron: int, *, table: str = LATEST) -> Found:
        """The card's sources. Raises ApiError: 404 for a table, hook point, layer or neuron that there is not, 503
        where the store's files cannot be read."""
        index = await asyncio.to_thread(self._catalog.index, table)
        chosen = index.table
        sites = await self._hold(chosen.id, lambda: TableSites.of(index))
        stores = self._stores_of(chosen)
        site = _checked(hook_point, layer, neuron, table=chosen, sites=sites, stores=stores)
        store, files, block = await self._from_stores(stores, site, neuron)
        return Found(
            hook_point=site[0],
            layer=layer,
            neuron=neuron,
            table=chosen,
            store=store,
            block=block,
            rows=await self._hold((chosen.id, *site), lambda: _rows_at(chosen, sites, site)),
            concepts=tuple(sorted({*sites.concepts, *(store.concepts if store else ())})),
            version=hashlib.sha256(repr((chosen.id, store and store.store_hash, files)).encode()).hexdigest(),
        )

    async def warm_up(self) -> None:
        """Read ahead, for WARM_UP_SECONDS and up to half of the memory at most. Raises nothing: a card that was not
        read ahead is read when it is asked for."""
        try:
            await self._warm_up(time.monotonic() + WARM_UP_SECONDS)
        except (ApiError, NeuronLensError, OSError) as error:
            log.info("cards were not read ahead", reason=str(error))

    def close(self) -> None:
        """Let go of the stores. May be called twice."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        for store in self._stores:
            store.close()

    # --- stores --------------------------------------------------------------------------------------------------

    def _stores_of(self, table: RangeTable) -> list[StoreBlocks]:
        """Those of the table's model: the one from which the table was made first, then the others as they were
        given."""
        fitting = [store for store in self._stores if store.config_hash == table.header.model.config_hash]
        return sorted(fitting, key=lambda store: store.store_hash != table.header.store_hash)

    async def _from_stores(
        self, stores: Iterable[StoreBlocks], site: Site, neuron: int
    ) -> tuple[StoreBlocks | None, SiteFiles | None, Block | None]:
        for store in stores:
            if site[0] in store.widths and site[1] in store.layers:
                files, block = await self._block(store, site, neuron // store.neurons_a_block)
                if block is not None:
                    return store, files, block
        return None, None, None

    async def _block(self, store: StoreBlocks, site: Site, number: int) -> tuple[SiteFiles | None, Block | None]:
        """A block, and the files that it came from; None where the site has no statistics, or none at the moment."""
        reason: Exception | None = None
        try:
            files = await self._files(store, site)
            for _ in range(_N_TRIES):
                if files is None:
                    return None, None
                try:
                    read = functools.partial(store.read, files, number)
                    return files, await self._hold((store, files, number), read, self._readers)
                except Unreadable as error:  # made again meanwhile?
                    reason = error
                files = await self._look(store, site)
        except (NeuronLensError, OSError) as error:
            reason = error
        log.error("the statistics of a store cannot be read", reason=str(reason))
        raise ApiError(
            503,
            f"The statistics of {site[0]}, layer {site[1]}, cannot be read at the moment. Try again; if that does not "
            "help, the server's log says why.",
            code="store_unreadable",
            retry_after_seconds=5,
        )

    async def _files(self, store: StoreBlocks, site: Site) -> SiteFiles | None:
        """What the site's receipt names, or named until FRESH_SECONDS ago, or before storage stopped to answer."""
        seen_at, known = self._receipts.get((store, site), (-math.inf, None))
        if time.monotonic() - seen_at < FRESH_SECONDS:
            return known
        try:
            async with asyncio.timeout(None if known is None else PATIENCE_SECONDS):
                return await self._look(store, site) or known
        except (NeuronLensError, OSError) as error:
            if known is None:
                raise
            log.warning("a receipt cannot be read", reason=str(error))
            self._receipts[store, site] = (time.monotonic(), known)
            return known

    async def _look(self, store: StoreBlocks, site: Site) -> SiteFiles | None:
        """What the site's receipt names now. Where it has gone, its last one stays known: while statistics are made
        again, the old ones stand in what is held."""
        found = cast(SiteFiles | None, await self._share((store, site), lambda: store.files(*site)))
        _, known = self._receipts.get((store, site), (0.0, None))
        self._receipts[store, site] = (time.monotonic(), found or known)
        if found is not None and known not in (None, found):
            self._held.drop(lambda key: isinstance(key, tuple) and known in key)
        return found

    # --- what is held --------------------------------------------------------------------------------------------

    async def _hold(self, key: Hashable, read: Callable[[], T], pool: ThreadPoolExecutor | None = None) -> T:
        """What `read` gives, from memory where it was read before."""
        held = self._held.get(key)
        if held is None:
            held = await self._share(key, read, pool)
            self._held.put(key, held)
        return cast(T, held)

    async def _share(self, key: Hashable, read: Callable[[], Any], pool: ThreadPoolExecutor | None = None) -> Any:
        """What `read` gives, in a thread: the one that is at it already, where another request began it. Who waits for
        it may go away without ending it."""
        coming = self._coming.get(key)
        if coming is None:
            coming = self._coming[key] = asyncio.get_running_loop().run_in_executor(pool, read)
            coming.add_done_callback(lambda _: self._coming.pop(key))
        return await asyncio.shield(coming)

    async def _warm_up(self, deadline: float) -> None:
        latest = await asyncio.to_thread(self._catalog.get, LATEST)
        for store in self._stores_of(latest):
            for hook_point, layer in itertools.product(store.widths, store.layers):
                for number in range(store.n_blocks(hook_point)):
                    if time.monotonic() > deadline or self._held.n_bytes > self._held.max_bytes / 2:
                        return
                    await self.find(hook_point, layer, number * store.neurons_a_block)


def _rows_at(table: RangeTable, sites: TableSites, site: Site) -> ByNeuron:
    start, stop = sites.spans.get(site, (0, 0))
    rows = table.rows.drop_columns(["hook_point", "layer"]).slice(start, stop - start)
    order = ("neuron", "concept", *(["piece"] if table.has_pieces else []))
    return ByNeuron.of(rows.sort_by([(name, "ascending") for name in order]))


def _checked(
    hook_point: str,
    layer: int,
    neuron: int,
    *,
    table: RangeTable,
    sites: TableSites,
    stores: Sequence[StoreBlocks],
) -> Site:
    """The site, by our name of its hook point. Raises ApiError 404 where there is no such neuron."""
    widths = {name: table.header.widths[name] for name, _ in sites.spans}
    layers: dict[str, set[int]] = {name: {at for of, at in sites.spans if of == name} for name in widths}
    for store in stores:
        for name, width in store.widths.items():
            widths.setdefault(name, width)
            layers.setdefault(name, set()).update(store.layers)
    try:
        name, layer_in_name = parse_hook_point(hook_point[:80])
    except UsageError as error:
        raise _absent("hook_point", str(error)) from error
    if name not in widths:
        raise _absent("hook_point", f"Nothing is known of {name} here. Hook points: {', '.join(sorted(widths))}.")
    if layer_in_name not in (None, layer):
        raise _absent("layer", f"{hook_point} is in layer {layer_in_name}, and the path asks for layer {layer}.")
    if layer not in layers[name]:
        there = ", ".join(map(str, sorted(layers[name])))
        raise _absent("layer", f"Nothing is known of layer {layer} of {name} here. Layers: {there}.")
    if not 0 <= neuron < widths[name]:
        raise _absent("neuron", f"There is no neuron {neuron} in {name}. Neurons: 0 to {widths[name] - 1}.")
    return name, layer


def _absent(param: str, message: str) -> ApiError:
    return ApiError(404, message, code=f"{param}_not_found", param=param)
