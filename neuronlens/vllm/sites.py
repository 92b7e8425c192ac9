"""Where the hook points are in a model as vLLM builds it, and which part of their neurons a rank holds.

vLLM keeps the names that the weights have, so the table of `neuronlens.hookpoints` finds the modules here too. What
differs: tokens of all sequences lie in a row, x_TN; a block may hand on its output as a pair whose sum is the residual
stream; and under tensor parallelism a rank sees its slice of the MLP's neurons.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from neuronlens.errors import UsageError
from neuronlens.hookpoints import FORWARD_ORDER, RULES, chosen_layers
from neuronlens.vllm.config import WorkerConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSite:
    """A hook point of one layer, as one rank sees it: neurons `first` to `first + width` of `full_width`.

    `is_sliced` is False where every rank sees all of them, with the same values.
    """

    hook_point: str
    layer: int
    module_name: str
    side: Literal["input", "output"]
    full_width: int
    width: int
    first: int

    @property
    def is_sliced(self) -> bool:
        return self.width < self.full_width

    @property
    def part(self) -> slice:
        return slice(self.first, self.first + self.width)


def in_a_row(x: "Tensor") -> "Tensor":
    """x_TN: vLLM's own models have tokens in a row; those that it takes from transformers, in a batch of one."""
    return x[0] if x.dim() == 3 else x


def find_rank_sites(model: "nn.Module", model_type: str, d_model: int, config: WorkerConfig) -> tuple[RankSite, ...]:
    """The sites that the configuration asks for, in forward order.

    Raises UsageError: an architecture without a rule, MoE blocks, layers out of range, a module that is not what the
    rule expects.
    """
    names = [name for name, _ in model.named_modules()]
    found: dict[tuple[int, int], RankSite] = {}
    for hook_point in config.hook_points:
        path, side = _rule(model_type, hook_point, config)
        pattern = re.compile(r"(?:.*\.)?" + re.escape(path).replace(r"\{layer\}", r"(\d+)"))
        matching = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
        modules = dict(matching)
        if not modules:
            raise UsageError(_not_there(model, model_type, hook_point, path))
        if len(modules) < len(matching):
            raise UsageError(
                f"{type(model).__name__} has {path} in more than one part ({matching[0][1]}, {matching[-1][1]}), so it "
                "is not plain which is meant. Name the whole path in additional_config.neuronlens.modules."
            )
        for layer in chosen_layers(modules, config.layers, hook_point):
            site = _site(model, hook_point, layer, modules[layer], side, d_model)
            found[layer, FORWARD_ORDER.index(hook_point)] = site
    return tuple(found[key] for key in sorted(found))


def _rule(model_type: str, hook_point: str, config: WorkerConfig) -> tuple[str, Literal["input", "output"]]:
    rule = config.modules.get(hook_point) or RULES.get(model_type, {}).get(hook_point)
    if rule is None:
        raise UsageError(
            f"No rule finds {hook_point} in a model of type {model_type!r}. Known types: {', '.join(RULES)}. Name its "
            f'module: --additional-config \'{{"neuronlens": {{"modules": {{"{hook_point}": '
            '"layers.{layer}.mlp.down_proj:input"}}}\''
        )
    path, _, side = rule.partition(":")
    return path, "input" if side == "input" or (not side and hook_point == "mlp_post") else "output"


def _site(
    model: "nn.Module", hook_point: str, layer: int, name: str, side: Literal["input", "output"], d_model: int
) -> RankSite:
    target: Any = model.get_submodule(name)
    full_width, width, first = d_model, d_model, 0
    if side == "input":
        if not hasattr(target, "input_size_per_partition"):
            raise UsageError(
                f"{name} is a {type(target).__name__}, expected a linear layer whose input is the neurons. Leave "
                f"{hook_point} out, or name another module in additional_config.neuronlens.modules."
            )
        full_width, width = int(target.input_size), int(target.input_size_per_partition)
        first = int(getattr(target, "tp_rank", 0)) * width if width < full_width else 0
    return RankSite(
        hook_point=hook_point,
        layer=layer,
        module_name=name,
        side=side,
        full_width=full_width,
        width=width,
        first=first,
    )


def _not_there(model: "nn.Module", model_type: str, hook_point: str, path: str) -> str:
    if any("experts" in name for name, _ in model.named_modules()):
        return (
            f"{type(model).__name__} ({model_type}) has no {path}: its MLP is a mixture of experts, whose neurons are "
            f"not supported in vLLM. Leave {hook_point} out; resid_post is there: "
            '--additional-config \'{"neuronlens": {"hook_points": ["resid_post"]}}\''
        )
    return (
        f"{type(model).__name__} ({model_type}) has no module {path} for {hook_point} in vLLM. Name the right one in "
        "additional_config.neuronlens.modules."
    )
