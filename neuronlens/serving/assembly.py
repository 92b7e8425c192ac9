"""A service, put together from what a person asks for: by `neuronlens serve`, and by each replica of `deploy`.

spec = ServiceSpec(sources=("STORE",), model="path/or/hub-id")
chosen_model(spec, Catalog(spec.sources))       # cheap: is the model there, and the one that the tables are for?
service = assemble(spec, Keys())                # loads it
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from neuronlens.errors import UsageError
from neuronlens.serving.prompts import PLAIN
from neuronlens.serving.settings import Settings

if TYPE_CHECKING:
    from neuronlens.serving.auth import Keys
    from neuronlens.serving.catalog import Catalog
    from neuronlens.serving.engine import Engine
    from neuronlens.serving.service import Service


class ServiceSpec(BaseModel):
    """What a server serves, and how. Holds no key, so it may stand in a configuration that others read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...] = ()
    """Stores, and folders of single range tables."""
    uploads: str | None = None
    """Where uploaded tables go; None: the first store."""
    model: str | None = None
    """A folder or a hub id; None: the one that the sources name."""
    revision: str | None = None
    engine: Literal["transformers"] = "transformers"
    """In this process. vLLM has a server of its own, which `neuronlens.vllm.launch` starts."""
    tables_only: bool = False
    dtype: str = "auto"
    device: str = "auto"
    max_batch: int = Field(default=32, gt=0)
    threads: int | None = Field(default=None, gt=0)
    """Of the model on a CPU; None: as torch decides, which Ray tells how many cores a replica has."""
    cache_gb: float | None = Field(default=None, gt=0)
    """Memory for keys and values; None: a quarter of a CPU's free memory, four fifths of a GPU's."""
    chat_template: str | None = None
    """A file with a Jinja template, or plain; None: the tokenizer's own."""
    settings: Settings = Settings()

    @model_validator(mode="after")
    def _parts_fit(self) -> "ServiceSpec":
        if not self.sources and self.uploads is None:
            raise ValueError(
                "there is nothing to serve: name a store, such as neuronlens run printed, the folder of a range table, "
                "STORE/ranges/tbl_..., or a folder for uploads"
            )
        if self.tables_only and self.model is not None:
            raise ValueError(f"a server of tables only has no use for the model {self.model}; drop one of the two")
        if self.revision is not None and self.model is None:
            raise ValueError(f"revision {self.revision} is a model's; name that model too")
        return self


def assemble(spec: ServiceSpec, keys: "Keys") -> "Service":
    """The service, its model loaded. Raises UsageError for sources, a model or a template that cannot be had."""
    from neuronlens.serving.cards import CardShelf
    from neuronlens.serving.catalog import Catalog
    from neuronlens.serving.metrics import Metrics
    from neuronlens.serving.service import Service

    template = chat_template_of(spec.chat_template)
    catalog = Catalog(spec.sources, uploads=spec.uploads)
    return Service(
        settings=spec.settings,
        catalog=catalog,
        cards=CardShelf(catalog.stores, catalog),
        keys=keys,
        metrics=Metrics(),
        engine=None if spec.tables_only else load_engine(spec, catalog),
        chat_template=template,
    )


def load_engine(spec: ServiceSpec, catalog: "Catalog") -> "Engine":
    """The engine, once the model is known to be there and to be the one that the tables are for."""
    from neuronlens.serving.logs import log
    from neuronlens.serving.transformers_engine import TransformersEngine

    model, revision = chosen_model(spec, catalog)
    if spec.threads is not None:
        import torch

        torch.set_num_threads(spec.threads)
    log.info("loading", model=model, engine=spec.engine)
    return TransformersEngine.load(
        model,
        revision=revision,
        dtype=spec.dtype,
        device=spec.device,
        limits=spec.settings.limits,
        max_batch=spec.max_batch,
        cache_bytes=None if spec.cache_gb is None else int(spec.cache_gb * 1e9),
        overrides=hook_points_of(catalog),
    )


def hook_points_of(catalog: "Catalog") -> dict[str, str]:
    """Where the hook points are in a model of an architecture that we do not know: as the stores' recipes said."""
    found: dict[str, str] = {}
    for store in catalog.stores:
        found.update(store.describe()["model"].get("modules", {}))
    return found


def chosen_model(spec: ServiceSpec, catalog: "Catalog") -> tuple[str, str | None]:
    """The model's id and revision. Raises UsageError where it is not there, or not the one that the tables are for."""
    from neuronlens.identity import model_identity

    if spec.model is not None:
        model, revision = spec.model, spec.revision
        identity = model_identity(model, revision)
    else:
        model, revision = _model_named_by(catalog)
        try:
            identity = model_identity(model, revision)
        except UsageError as error:
            raise UsageError(
                f"No --model was given, and the one that the tables name cannot be had: {error} Give --model "
                "PATH_OR_ID, or --tables-only."
            ) from error
    fitting = catalog.config_hashes()
    if fitting and identity.config_hash not in fitting:
        names = sorted({f"{entry.header.model.id}" for entry in catalog.entries()})
        raise UsageError(
            f"{model} is not the model that the tables are for ({', '.join(names) or 'another'}): its config differs, "
            "so no table could steer it. Give that one as --model, or --tables-only."
        )
    return model, revision


def chat_template_of(given: str | None) -> str | None:
    """The template's text, or `plain`. Raises UsageError for a file that cannot be read."""
    if given is None or given == PLAIN:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--chat-template {given} cannot be read ({getattr(error, 'strerror', None) or error}). Expected a Jinja "
            "template in a file, or plain."
        ) from error


def _model_named_by(catalog: "Catalog") -> tuple[str, str | None]:
    """The id and the revision of the one model that the stores, or else the tables, are of."""
    named = [store.describe()["model"] for store in catalog.stores]
    found = {(model["id"], model.get("revision")) for model in named}
    found = found or {(entry.header.model.id, entry.header.model.revision) for entry in catalog.entries()}
    if len(found) == 1:
        id, revision = found.pop()
        return id, None if Path(id).expanduser().is_dir() else revision
    if not found:
        raise UsageError("There is no table yet that names a model. Give --model PATH_OR_ID, or --tables-only.")
    names = ", ".join(sorted(id for id, _ in found))
    raise UsageError(
        f"The sources are of several models: {names}. Say which one runs: --model PATH_OR_ID, or --tables-only."
    )
