"""How the worker is set up: `--additional-config '{"neuronlens": {"hook_points": ["resid_post"], "slots": 8}}'`.

vLLM hands this one mapping to every process and counts it when it looks for a compiled graph, so a graph without our
hooks can never be taken for one with them.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuronlens.errors import UsageError
from neuronlens.hookpoints import HOOK_POINTS

KEY = "neuronlens"
"""Our name in vLLM's mappings: additional_config, extra_args and the forward context."""

HookPoint = Literal["mlp_post", "mlp_out", "attn_out", "resid_post"]
assert HookPoint.__args__ == HOOK_POINTS  # type: ignore[attr-defined]


class WorkerConfig(BaseModel):
    """What the worker hooks, and for how many programs it has room.

    slots: programs at work at the same time. rules: how many rules one program may have. rule_rows: room for the rules
    of all programs together at one site, where a rule takes one for each piece of its ranges; each costs 24 bytes a
    neuron.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["steer", "collect"] = "steer"
    hook_points: tuple[HookPoint, ...] = Field(default=("mlp_post",), min_length=1)
    layers: Literal["all"] | tuple[int, ...] = "all"
    modules: dict[str, str] = Field(default_factory=dict)
    """Where hook points are in an architecture that we do not know, as the recipe's model.modules."""
    slots: int = Field(default=16, ge=1, le=1024)
    rules: int = Field(default=8, ge=1, le=1000)
    rule_rows: int = Field(default=32, ge=1)
    v2_model_runner: bool = False
    """Allow vLLM's V2 model runner, where CI tests our adapter against its interface only (docs/vllm.md)."""
    stamp: str = ""
    """Set by the worker: the version of what it hooks with."""

    @model_validator(mode="after")
    def _one_program_fits(self) -> "WorkerConfig":
        if self.rule_rows < self.rules:
            raise ValueError(f"a program of {self.rules} rules needs as many rule_rows, found {self.rule_rows}")
        return self

    @classmethod
    def of(cls, additional_config: Any) -> "WorkerConfig":
        """Our part of vLLM's additional_config. Raises UsageError for a key or a value that cannot be."""
        asked = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        try:
            return cls.model_validate(asked)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, (KEY, *fault["loc"])))
            raise UsageError(
                f"additional_config: {where} is {fault['input']!r}: {fault['msg']}. Known keys: "
                f"{', '.join(name for name in cls.model_fields if name != 'stamp')}."
            ) from error

    def stamped(self) -> dict[str, Any]:
        """As plain data, for additional_config, with what would make another compiled graph."""
        return self.model_copy(update={"stamp": _stamp()}).model_dump(mode="json")


@cache
def _stamp() -> str:
    """Our version, and a hash of the code that a compiled graph holds."""
    digest = hashlib.sha256()
    for name in ("hooks.py", "ops.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"{version('neuronlens')}-{digest.hexdigest()[:12]}"
