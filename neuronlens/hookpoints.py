"""Where in a model the neurons are: four hook points, and one table that finds them in every architecture that we know.

    sites = find_sites(model, ["mlp_post", "resid_post"], "all")
    with attach(model, sites, lambda i, x_BTN: print(sites[i].hook_point, sites[i].layer, x_BTN.shape)):
        model(input_ids)

What the hook points mean, in every architecture:

    mlp_post    the input of the MLP's down projection, after the activation and the gate; d_mlp wide
    attn_out    what attention adds to the residual stream; d_model wide
    mlp_out     what the MLP adds to the residual stream; d_model wide
    resid_post  the whole block's output, which is the next block's input; d_model wide

So where a block normalises the output of attention or of the MLP before adding it (Gemma 2 and 3), attn_out and
mlp_out stand after that norm. Where it adds first and normalises the sum (BERT, DistilBERT, RoBERTa, OPT-350m), they
are the dense projection's output, before the sum, and resid_post is the normalised sum, which TransformerLens calls
hook_normalized_resid_post. Where attention and the MLP stand side by side (Phi, most GPT-NeoX), both add to the same
input: resid_post = input + attn_out + mlp_out. Dropout stands in between in training only, and the final norm is never
part of resid_post.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from neuronlens.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

HOOK_POINTS = ("mlp_post", "mlp_out", "attn_out", "resid_post")

FORWARD_ORDER = ("attn_out", "mlp_post", "mlp_out", "resid_post")

_LLAMA = {
    "mlp_post": "layers.{layer}.mlp.down_proj:input",
    "mlp_out": "layers.{layer}.mlp:output",
    "attn_out": "layers.{layer}.self_attn:output",
    "resid_post": "layers.{layer}:output",
}
_GEMMA_WITH_POST_NORMS = {
    **_LLAMA,
    "mlp_out": "layers.{layer}.post_feedforward_layernorm:output",
    "attn_out": "layers.{layer}.post_attention_layernorm:output",
}
_BERT = {
    "mlp_post": "encoder.layer.{layer}.output.dense:input",
    "mlp_out": "encoder.layer.{layer}.output.dense:output",
    "attn_out": "encoder.layer.{layer}.attention.output.dense:output",
    "resid_post": "encoder.layer.{layer}:output",
}

RULES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "mlp_post": "h.{layer}.mlp.c_proj:input",
        "mlp_out": "h.{layer}.mlp:output",
        "attn_out": "h.{layer}.attn:output",
        "resid_post": "h.{layer}:output",
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA_WITH_POST_NORMS,
    "gemma3_text": _GEMMA_WITH_POST_NORMS,
    "phi": {**_LLAMA, "mlp_post": "layers.{layer}.mlp.fc2:input"},
    "phi3": _LLAMA,
    "gpt_neox": {
        "mlp_post": "layers.{layer}.mlp.dense_4h_to_h:input",
        "mlp_out": "layers.{layer}.mlp:output",
        "attn_out": "layers.{layer}.attention:output",
        "resid_post": "layers.{layer}:output",
    },
    "opt": {
        "mlp_post": "decoder.layers.{layer}.fc2:input",
        "mlp_out": "decoder.layers.{layer}.fc2:output",
        "attn_out": "decoder.layers.{layer}.self_attn:output",
        "resid_post": "decoder.layers.{layer}:output",
    },
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {
        "mlp_post": "transformer.layer.{layer}.ffn.lin2:input",
        "mlp_out": "transformer.layer.{layer}.ffn:output",
        "attn_out": "transformer.layer.{layer}.attention:output",
        "resid_post": "transformer.layer.{layer}:output",
    },
}
"""model_type -> hook point -> module, relative to the trunk (`model.base_model`), and which of its two sides."""

_FLATTENING = frozenset({"opt"})
"""Types whose blocks hand [B * T, N] to their MLP: the shape has to be seen at the block's door."""

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.(?:mlp\.hook_(post)|hook_(mlp_out|attn_out|resid_post))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A hook point of one layer: the module, by its name in the whole model, which side of it, and how many neurons."""

    hook_point: str
    layer: int
    module_name: str
    side: Literal["input", "output"]
    width: int


def parse_hook_point(name: str) -> tuple[str, int | None]:
    """Our name of a hook point, and the layer where the name gives one.

    "mlp_post" -> ("mlp_post", None); TransformerLens's "blocks.3.mlp.hook_post" -> ("mlp_post", 3). Raises UsageError.
    """
    if name in HOOK_POINTS:
        return name, None
    if match := _TRANSFORMER_LENS.fullmatch(name):
        return ("mlp_post" if match[2] else match[3]), int(match[1])
    raise UsageError(
        f"Unknown hook point {name!r}. Known: {', '.join(HOOK_POINTS)}, or TransformerLens's names for them: "
        "blocks.3.mlp.hook_post, blocks.3.hook_mlp_out, blocks.3.hook_attn_out, blocks.3.hook_resid_post."
    )


def trunk_of(module: nn.Module) -> nn.Module:
    """The model without its head; of a model that also sees pictures, the language part."""
    trunk = getattr(module, "base_model", module)
    return getattr(trunk, "language_model", trunk)


def config_of(module: nn.Module) -> Any:
    """The trunk's config; None for a module that has none."""
    return getattr(trunk_of(module), "config", None)


def find_sites(
    module: nn.Module,
    hook_points: Sequence[str],
    layers: Literal["all"] | Sequence[int] = "all",
    overrides: Mapping[str, str] | None = None,
) -> tuple[Site, ...]:
    """The sites of `hook_points` at `layers`, in the order in which the forward pass meets them.

    layers: "all", or numbers from 0; negative ones count from the end. A TransformerLens name brings its own layer.
    overrides: hook point -> "path.to.module.{layer}", relative to the trunk or to the whole model, with ":input" or
    ":output" (default: input for mlp_post, else output). It goes before the table; an unknown architecture needs one.

    Raises UsageError: unknown hook point, no rule for this architecture (lists its modules), layer out of range, an MLP
    that transformers runs in chunks.
    """
    overrides = overrides or {}
    for name in overrides:
        if name not in HOOK_POINTS:
            raise UsageError(f"Unknown hook point {name!r} among the overrides. Known: {', '.join(HOOK_POINTS)}.")
    if n_tokens := getattr(config_of(module), "chunk_size_feed_forward", 0):
        raise UsageError(
            f"This model runs its MLP in chunks of {n_tokens} tokens, so that no hook sees a whole text. "
            "Set chunk_size_feed_forward to 0 in its config.json."
        )
    wanted: dict[tuple[int, int], Site] = {}
    for name in hook_points:
        hook_point, own_layer = parse_hook_point(name)
        modules, side = _modules_of(module, hook_point, overrides)
        for layer in chosen_layers(modules, layers if own_layer is None else [own_layer], hook_point):
            width = _width(module, modules[layer], side, hook_point)
            site = Site(hook_point=hook_point, layer=layer, module_name=modules[layer], side=side, width=width)
            wanted[layer, FORWARD_ORDER.index(hook_point)] = site
    return tuple(wanted[key] for key in sorted(wanted))


def last_projection(module: nn.Module, sites: Sequence[Site]) -> Site | None:
    """The input of the last layer's down projection. From the last MLP on, each token goes its own way, and rows may be
    left out: [B, 1, N] in place of [B, T, N] broadcasts over the residual stream.

    None where every row has to go on: in an architecture that we do not know, where one of `sites` is not where our
    table has it, and where a block flattens its rows.
    """
    model_type = _model_type(module)
    if model_type not in RULES or model_type in _FLATTENING:
        return None
    known = find_sites(module, HOOK_POINTS)
    if not set(sites) <= set(known):
        return None
    return [site for site in known if site.hook_point == "mlp_post"][-1]


@contextmanager
def attach(module: nn.Module, sites: Sequence[Site], fn: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While the context is open, every forward pass calls fn(index in `sites`, x_BTN) at each site, in forward order.

    x_BTN is the model's own tensor, in its dtype and on its device: fn must not write into it. Where fn returns a
    tensor of the same shape, the forward pass goes on with that instead. Hooks that were attached earlier act first,
    transformers' own for `output_hidden_states` included. When the context closes the hooks go, whatever happened.
    """
    handles: list[Any] = []
    try:
        shapes = _watch_shapes(module, sites, handles)
        for index, site in enumerate(sites):
            target = module.get_submodule(site.module_name)
            see = _seer(index, site, fn, shapes)
            if site.side == "input":
                handles.append(target.register_forward_pre_hook(_input_hook(see), with_kwargs=True))
            else:
                handles.append(target.register_forward_hook(_output_hook(see)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(see: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(iter(kwargs))
        new = see(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    return hook


def _output_hook(see: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            new = see(output[0])
            return None if new is None else (new, *output[1:])
        if isinstance(output, dict):
            name = next(iter(output))
            new = see(output[name])
            if new is not None:
                output[name] = new
            return None
        return see(output)

    return hook


def _seer(
    index: int, site: Site, fn: Callable[[int, Tensor], Tensor | None], shapes: dict[str, tuple[int, ...]]
) -> Callable[[Any], Any]:
    """fn at one site, which always sees [B, T, N], also where the block has flattened its rows to [B * T, N]."""
    block = _block_of(site.module_name)

    def see(x: Tensor) -> Tensor | None:
        if x.dim() == 3:
            return fn(index, x)
        shape = shapes.get(block, ())
        if x.dim() != 2 or len(shape) != 3 or x.shape[0] != shape[0] * shape[1]:
            raise UsageError(
                f"{site.hook_point} of layer {site.layer} ({site.module_name}, {site.side}) is a tensor of shape "
                f"{tuple(x.shape)}; expected [batch, tokens, {site.width}]. Name another module in model.modules."
            )
        new = fn(index, x.view(shape[0], shape[1], -1))
        return None if new is None else new.reshape(x.shape)

    return see


def _watch_shapes(module: nn.Module, sites: Sequence[Site], handles: list[Any]) -> dict[str, tuple[int, ...]]:
    """A dict that holds each block's input shape during a forward pass, for models that flatten rows in a block."""
    shapes: dict[str, tuple[int, ...]] = {}
    model_type = _model_type(module)
    if model_type in RULES and model_type not in _FLATTENING:
        return shapes

    def watch(block: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            shapes[block] = tuple(x.shape)

        return hook

    for block in dict.fromkeys(_block_of(site.module_name) for site in sites):
        handles.append(module.get_submodule(block).register_forward_pre_hook(watch(block), with_kwargs=True))
    return shapes


def _block_of(module_name: str) -> str:
    """The outermost numbered module that holds this one: "model.layers.3.mlp.0.fc2" -> "model.layers.3"."""
    match = re.match(r"(.*?\b\d+)(\.|$)", module_name)
    return match[1] if match else ""


def _modules_of(
    module: nn.Module, hook_point: str, overrides: Mapping[str, str]
) -> tuple[dict[int, str], Literal["input", "output"]]:
    """Layer -> name of the module that carries the hook point, layers ascending, and the side to hook."""
    rule = overrides.get(hook_point) or RULES.get(_model_type(module), {}).get(hook_point)
    if rule is None:
        raise UsageError(_no_rule(module, hook_point))
    path, _, side = rule.partition(":")
    side = side or ("input" if hook_point == "mlp_post" else "output")
    if "{layer}" not in path or side not in ("input", "output"):
        raise UsageError(
            f"model.modules.{hook_point} is {rule!r}, which cannot be read. Write the module's path with {{layer}} for "
            f"the layer's number, then :input or :output, such as {_example(module, hook_point)!r}."
        )
    names = [name for name, _ in module.named_modules()]
    for full_path in (_trunk_prefix(module) + path, path):
        pattern = re.compile(re.escape(full_path).replace(r"\{layer\}", r"(\d+)"))
        found = {int(match[1]): name for name in names if (match := pattern.fullmatch(name))}
        if found:
            return dict(sorted(found.items())), "input" if side == "input" else "output"
    raise UsageError(
        f"{type(module).__name__} has no module {path!r} for {hook_point}.\n{_candidates(module, hook_point)}"
    )


def chosen_layers(modules: Mapping[int, str], layers: Literal["all"] | Sequence[int], hook_point: str) -> list[int]:
    """Which of the layers that have the hook point are asked for. Raises UsageError for one that has none."""
    if layers == "all":
        return list(modules)
    n_layers = max(modules) + 1
    chosen = [layer + n_layers if layer < 0 else layer for layer in layers]
    for asked, layer in zip(layers, chosen, strict=True):
        if layer not in modules:
            known = f"0 to {n_layers - 1}" if len(modules) == n_layers else ", ".join(map(str, modules))
            raise UsageError(
                f"Layer {asked} is out of range: this model has {hook_point} in layers {known}. "
                "Choose among these (negative numbers count from the end), or all."
            )
    return chosen


def _width(module: nn.Module, module_name: str, side: str, hook_point: str) -> int:
    """The number of neurons, read from the projection itself where there is one: no forward pass."""
    target = module.get_submodule(module_name)
    width = _features(target)[0 if side == "input" else 1]
    if width is None and hook_point != "mlp_post":
        width = getattr(config_of(module), "hidden_size", None)
    if width is None:
        raise UsageError(
            f"The width of {hook_point} cannot be read from {module_name} ({type(target).__name__}, {side}). "
            f"Name a linear layer in model.modules, such as {_example(module, hook_point)!r}."
        )
    return width


def _features(target: nn.Module) -> tuple[int | None, int | None]:
    """Width in and width out of a projection (torch's Linear, transformers' Conv1D), None where it is not one."""
    if hasattr(target, "in_features"):
        return cast(int, target.in_features), cast(int, target.out_features)
    if hasattr(target, "nx"):
        return cast(int, target.nx), cast(int, target.nf)
    return None, None


def _model_type(module: nn.Module) -> str:
    return getattr(config_of(module), "model_type", "")


def _trunk_prefix(module: nn.Module) -> str:
    trunk = trunk_of(module)
    name = next((name for name, part in module.named_modules() if part is trunk), "")
    return name + "." if name else ""


def _no_rule(module: nn.Module, hook_point: str) -> str:
    return (
        f"No rule finds {hook_point} in a model of type {_model_type(module)!r} "
        f"({type(module).__name__}). Known types: {', '.join(RULES)}.\n{_candidates(module, hook_point)}"
    )


def _candidates(module: nn.Module, hook_point: str) -> str:
    modules = _block_modules(module)
    lines = [
        f"    {path}  ({kind}{f', {n_in} -> {n_out}' if n_in else ''})" for path, (kind, n_in, n_out) in modules.items()
    ]
    mend = f'    model: {{modules: {{{hook_point}: "{_example(module, hook_point)}"}}}}'
    return "\n".join(["  The modules of its blocks:", *lines, "  Name the right one in the recipe, such as", mend])


def _block_modules(module: nn.Module) -> dict[str, tuple[str, int | None, int | None]]:
    """Path in the trunk, with {layer} for the block's number -> class, width in, width out."""
    found: dict[str, tuple[str, int | None, int | None]] = {}
    for name, part in trunk_of(module).named_modules():
        path, n_numbers = re.subn(r"(?<![^.])\d+(?![^.])", "{layer}", name)
        if n_numbers == 1:
            found.setdefault(path, (type(part).__name__, *_features(part)))
    return found


def _example(module: nn.Module, hook_point: str) -> str:
    """A likely module for the hook point: one named for it, or the last projection from another width to d_model."""
    modules, d_model = _block_modules(module), getattr(config_of(module), "hidden_size", None)
    down = [path for path, (_, n_in, n_out) in modules.items() if n_out == d_model and n_in not in (None, d_model)]
    likely = down[-1] if down else "layers.{layer}.mlp.down_proj"
    if hook_point == "mlp_post":
        return f"{likely}:input"
    endings = {"mlp_out": r"(mlp|ffn|feed_forward)$", "attn_out": r"(attn|attention)$", "resid_post": r"\{layer\}$"}
    return f"{next((path for path in modules if re.search(endings[hook_point], path)), likely)}:output"
