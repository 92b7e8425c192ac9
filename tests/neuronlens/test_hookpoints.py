"""Every hook point of every architecture against a forward pass written out by hand from the model's own submodules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from neuronlens.errors import UsageError
from neuronlens.hookpoints import HOOK_POINTS, RULES, Site, attach, find_sites, parse_hook_point, trunk_of
from tests.tiny_models import CONFIGS, D_MLP, D_MODEL, ENCODERS, N_LAYERS, tiny_model

IDS_BT = torch.tensor([[7, 41, 30, 12, 99, 5], [61, 8, 8, 200, 17, 33]])

Edit = Callable[[str, int, Tensor], Tensor]

VARIANTS = {
    **{architecture: (architecture, {}) for architecture in CONFIGS},
    "opt, norm after": ("opt", {"do_layer_norm_before": False}),
    "gpt_neox, in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}


# The forward passes by hand. Each block's function gets `see`, which notes a value and may replace it.


def _gpt2(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    mid = x + see("attn_out", block.attn(block.ln_1(x))[0])
    post = see("mlp_post", block.mlp.act(block.mlp.c_fc(block.ln_2(mid))))
    return mid + see("mlp_out", post @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)


def _attention(trunk: Any, attention: Any, x: Tensor, *layer_type: str) -> Tensor:
    positions = torch.arange(x.shape[1])[None]
    return attention(x, position_embeddings=trunk.rotary_emb(x, positions, *layer_type), attention_mask=None)[0]


def _llama(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    mid = x + see("attn_out", _attention(trunk, block.self_attn, block.input_layernorm(x)))
    normed = block.post_attention_layernorm(mid)
    post = see("mlp_post", block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
    return mid + see("mlp_out", post @ block.mlp.down_proj.weight.T)


def _gemma_with_post_norms(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    layer_type = (trunk.config.layer_types[block.self_attn.layer_idx],) if "Gemma3" in type(trunk).__name__ else ()
    attended = _attention(trunk, block.self_attn, block.input_layernorm(x), *layer_type)
    mid = x + see("attn_out", block.post_attention_layernorm(attended))
    normed = block.pre_feedforward_layernorm(mid)
    post = see("mlp_post", block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
    return mid + see("mlp_out", block.post_feedforward_layernorm(post @ block.mlp.down_proj.weight.T))


def _phi(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    normed = block.input_layernorm(x)
    attended = see("attn_out", _attention(trunk, block.self_attn, normed))
    post = see("mlp_post", block.mlp.activation_fn(block.mlp.fc1(normed)))
    return x + attended + see("mlp_out", post @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)


def _phi3(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    mid = x + see("attn_out", _attention(trunk, block.self_attn, block.input_layernorm(x)))
    gate_up = block.mlp.gate_up_proj(block.post_attention_layernorm(mid))
    post = see("mlp_post", gate_up[..., D_MLP:] * block.mlp.activation_fn(gate_up[..., :D_MLP]))
    return mid + see("mlp_out", post @ block.mlp.down_proj.weight.T)


def _gpt_neox(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    attended = see("attn_out", _attention(trunk, block.attention, block.input_layernorm(x)))
    mlp_in = x if trunk.config.use_parallel_residual else x + attended
    post = see("mlp_post", block.mlp.act(block.mlp.dense_h_to_4h(block.post_attention_layernorm(mlp_in))))
    return x + attended + see("mlp_out", post @ block.mlp.dense_4h_to_h.weight.T + block.mlp.dense_4h_to_h.bias)


def _opt(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    before = trunk.config.do_layer_norm_before
    mid = x + see("attn_out", block.self_attn(block.self_attn_layer_norm(x) if before else x)[0])
    mid = mid if before else block.self_attn_layer_norm(mid)
    post = see("mlp_post", block.activation_fn(block.fc1(block.final_layer_norm(mid) if before else mid)))
    added = mid + see("mlp_out", post @ block.fc2.weight.T + block.fc2.bias)
    return added if before else block.final_layer_norm(added)


def _bert(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    projection, down = block.attention.output.dense, block.output.dense
    attended = see("attn_out", block.attention.self(x)[0] @ projection.weight.T + projection.bias)
    mid = block.attention.output.LayerNorm(x + attended)
    post = see("mlp_post", block.intermediate.intermediate_act_fn(block.intermediate.dense(mid)))
    return block.output.LayerNorm(mid + see("mlp_out", post @ down.weight.T + down.bias))


def _distilbert(trunk: Any, block: Any, x: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
    mid = block.sa_layer_norm(x + see("attn_out", block.attention(x)[0]))
    post = see("mlp_post", block.ffn.activation(block.ffn.lin1(mid)))
    return block.output_layer_norm(mid + see("mlp_out", post @ block.ffn.lin2.weight.T + block.ffn.lin2.bias))


def _same(x: Tensor) -> Tensor:
    return x


def _start(trunk: Any, ids_BT: Tensor) -> Tensor:
    positions = torch.arange(ids_BT.shape[1])
    match trunk.config.model_type:
        case "gpt2":
            return trunk.wte(ids_BT) + trunk.wpe(positions)
        case "gpt_neox":
            return trunk.embed_in(ids_BT)
        case "opt":
            return trunk.decoder.embed_tokens(ids_BT) + trunk.decoder.embed_positions.weight[positions + 2]
        case "bert" | "roberta" | "distilbert":
            return trunk.embeddings(ids_BT)
        case _:
            return trunk.embed_tokens(ids_BT)


BY_HAND: dict[str, tuple[Callable[..., Tensor], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "gpt2": (_gpt2, lambda t: t.h, lambda t: t.ln_f),
    "phi": (_phi, lambda t: t.layers, lambda t: t.final_layernorm),
    "phi3": (_phi3, lambda t: t.layers, lambda t: t.norm),
    "gpt_neox": (_gpt_neox, lambda t: t.layers, lambda t: t.final_layer_norm),
    "opt": (_opt, lambda t: t.decoder.layers, lambda t: t.decoder.final_layer_norm or _same),
    "bert": (_bert, lambda t: t.encoder.layer, lambda t: _same),
    "roberta": (_bert, lambda t: t.encoder.layer, lambda t: _same),
    "distilbert": (_distilbert, lambda t: t.transformer.layer, lambda t: _same),
    **{name: (_gemma_with_post_norms, lambda t: t.layers, lambda t: t.norm) for name in ("gemma2", "gemma3_text")},
    **{
        name: (_llama, lambda t: t.layers, lambda t: t.norm) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")
    },
}
"""Architecture -> a block by hand, the blocks, the final norm."""


def forward_by_hand(model: nn.Module, edit: Edit) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """What every site holds (before `edit`), and the trunk's output, when each value is replaced by edit(value)."""
    trunk: Any = trunk_of(model)
    run_block, blocks_of, norm_of = BY_HAND[trunk.config.model_type]
    seen: dict[tuple[str, int], Tensor] = {}
    x = _start(trunk, IDS_BT)
    for layer, block in enumerate(blocks_of(trunk)):

        def see(hook_point: str, value: Tensor, layer: int = layer) -> Tensor:
            seen[hook_point, layer] = value
            return edit(hook_point, layer, value)

        x = see("resid_post", run_block(trunk, block, x, see))
    return seen, norm_of(trunk)(x)


def keep(hook_point: str, layer: int, x: Tensor) -> Tensor:
    return x


def squeeze(hook_point: str, layer: int, x: Tensor) -> Tensor:
    """An edit that is different at every site, so that none can be left out or done twice."""
    return x * (0.5 + 0.1 * layer) + 0.03 * (1 + HOOK_POINTS.index(hook_point))


def watch(model: nn.Module, sites: tuple[Site, ...]) -> list[tuple[int, Tensor]]:
    """(site, value) of every call during one forward pass."""
    calls: list[tuple[int, Tensor]] = []
    with attach(model, sites, lambda site, x_BTN: calls.append((site, x_BTN))):
        model(IDS_BT)
    return calls


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    architecture, config = VARIANTS[request.param]
    return tiny_model(architecture, **config)


def test_rules__cover_every_hook_point_of_every_architecture() -> None:
    assert set(RULES) == set(CONFIGS)
    assert all(set(rules) == set(HOOK_POINTS) for rules in RULES.values())


def test_attach__sees_what_the_model_computes(model: nn.Module) -> None:
    sites = find_sites(model, HOOK_POINTS)
    expected, output = forward_by_hand(model, keep)
    torch.testing.assert_close(trunk_of(model)(IDS_BT)[0], output)  # the pass by hand is the model's
    calls = watch(model, sites)
    assert len(calls) == len(HOOK_POINTS) * N_LAYERS
    for index, x_BTN in calls:
        torch.testing.assert_close(x_BTN, expected[sites[index].hook_point, sites[index].layer])


def test_attach__replaces_what_the_forward_pass_goes_on_with(model: nn.Module) -> None:
    sites = find_sites(model, HOOK_POINTS)
    _, expected = forward_by_hand(model, squeeze)
    with attach(model, sites, lambda i, x: squeeze(sites[i].hook_point, sites[i].layer, x)):
        edited = trunk_of(model)(IDS_BT)[0]
    torch.testing.assert_close(edited, expected)
    assert not torch.allclose(edited, trunk_of(model)(IDS_BT)[0], atol=1e-3)


def test_find_sites__come_in_the_order_of_the_forward_pass(model: nn.Module) -> None:
    sites = find_sites(model, ["resid_post", "mlp_post", "mlp_out", "attn_out"])
    assert [index for index, _ in watch(model, sites)] == list(range(len(sites)))


def test_find_sites__know_the_width_before_any_forward_pass(model: nn.Module) -> None:
    sites = find_sites(model, HOOK_POINTS)
    assert {(s.hook_point, s.width) for s in sites} == {
        ("mlp_post", D_MLP),
        ("mlp_out", D_MODEL),
        ("attn_out", D_MODEL),
        ("resid_post", D_MODEL),
    }
    assert all(x_BTN.shape == (*IDS_BT.shape, sites[i].width) for i, x_BTN in watch(model, sites))


@pytest.mark.parametrize("head", ["lm", "classifier", "none"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_find_sites__do_not_depend_on_the_head(architecture: str, head: Any) -> None:
    model = tiny_model(architecture, head=head)
    sites = find_sites(model, HOOK_POINTS)
    expected, _ = forward_by_hand(model, keep)
    calls = watch(model, sites)
    assert len(calls) == len(HOOK_POINTS) * N_LAYERS
    for index, x_BTN in calls:
        torch.testing.assert_close(x_BTN, expected[sites[index].hook_point, sites[index].layer])


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in ENCODERS])
def test_attach__sees_prefill_and_every_decode_step(architecture: str) -> None:
    model: Any = tiny_model(architecture)
    shapes: list[tuple[int, ...]] = []
    with attach(model, find_sites(model, ["mlp_post"], [1]), lambda _, x: shapes.append(tuple(x.shape))):
        model.generate(IDS_BT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert shapes == [(2, 6, D_MLP), (2, 1, D_MLP), (2, 1, D_MLP)]


def test_find_sites__take_layers_from_either_end_once() -> None:
    model = tiny_model("gpt2")
    assert [s.layer for s in find_sites(model, ["mlp_post"], [-1])] == [1]
    assert [s.layer for s in find_sites(model, ["mlp_post"], [1, 0, -2])] == [0, 1]
    assert [s.layer for s in find_sites(model, ["mlp_post"], "all")] == [0, 1]


def test_find_sites__take_the_layer_of_a_transformer_lens_name() -> None:
    sites = find_sites(tiny_model("gpt2"), ["blocks.1.hook_resid_post", "mlp_post"], [0])
    assert [(s.hook_point, s.layer) for s in sites] == [("mlp_post", 0), ("resid_post", 1)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp_post", ("mlp_post", None)),
        ("blocks.3.mlp.hook_post", ("mlp_post", 3)),
        ("blocks.0.hook_mlp_out", ("mlp_out", 0)),
        ("blocks.12.hook_attn_out", ("attn_out", 12)),
        ("blocks.3.hook_resid_post", ("resid_post", 3)),
    ],
)
def test_parse_hook_point__reads_both_namings(name: str, expected: tuple[str, int | None]) -> None:
    assert parse_hook_point(name) == expected


@pytest.mark.parametrize(
    "name", ["mlp_pre", "blocks.3.hook_post", "blocks.x.hook_mlp_out", "blocks.3.mlp.hook_mlp_out", ""]
)
def test_parse_hook_point__lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"Unknown hook point .* Known: mlp_post, mlp_out, attn_out, resid_post"):
        parse_hook_point(name)


@pytest.mark.parametrize("layer", [2, -3])
def test_find_sites__state_the_layers_that_exist(layer: int) -> None:
    with pytest.raises(UsageError, match=rf"Layer {layer} is out of range: .* layers 0 to 1\."):
        find_sites(tiny_model("gpt2"), ["mlp_post"], [layer])


def unknown() -> Any:
    """StarCoder 2 is not in the table: c_fc, c_proj, and attention like Llama's."""
    return tiny_model("starcoder2")


def test_find_sites__say_for_an_unknown_architecture_what_to_write() -> None:
    with pytest.raises(UsageError) as caught:
        find_sites(unknown(), ["mlp_post"])
    message = str(caught.value)
    assert "type 'starcoder2'" in message
    assert "layers.{layer}.self_attn.q_proj  (Linear, 16 -> 16)" in message
    assert 'model: {modules: {mlp_post: "layers.{layer}.mlp.c_proj:input"}}' in message


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("suffix", ["", ":input"])
def test_find_sites__follow_an_override(prefix: str, suffix: str) -> None:
    model = unknown()
    sites = find_sites(model, ["mlp_post"], [1], {"mlp_post": prefix + "layers.{layer}.mlp.c_proj" + suffix})
    assert sites == (
        Site(hook_point="mlp_post", layer=1, module_name="model.layers.1.mlp.c_proj", side="input", width=D_MLP),
    )
    ((_, x_BTN),) = watch(model, sites)
    mlp = model.model.layers[1].mlp
    [(_, out_BTN)] = watch(model, find_sites(model, ["mlp_out"], [1], {"mlp_out": "layers.{layer}.mlp"}))
    torch.testing.assert_close(x_BTN @ mlp.c_proj.weight.T + mlp.c_proj.bias, out_BTN)


def test_find_sites__let_an_override_go_before_the_table() -> None:
    (site,) = find_sites(tiny_model("llama"), ["attn_out"], [0], {"attn_out": "layers.{layer}.self_attn.q_proj:output"})
    assert (site.module_name, site.width) == ("model.layers.0.self_attn.q_proj", 16)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"mlp_post": "layers.{layer}.mlp.down"}, r"has no module 'layers.\{layer\}.mlp.down' for mlp_post"),
        ({"mlp_post": "layers.3.mlp.c_proj"}, r"cannot be read. Write the module's path with \{layer\}"),
        ({"mlp_post": "layers.{layer}.mlp.c_proj:inside"}, "cannot be read"),
        ({"mlp_post": "layers.{layer}.mlp.act:output"}, r"width of mlp_post cannot be read .*c_proj:input"),
        ({"mlp": "layers.{layer}.mlp"}, "Unknown hook point 'mlp' among the overrides"),
    ],
)
def test_find_sites__refuse_an_override_that_cannot_be(overrides: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        find_sites(unknown(), ["mlp_post"], "all", overrides)


def test_find_sites__refuse_an_mlp_that_runs_in_chunks() -> None:
    with pytest.raises(UsageError, match="in chunks of 2 tokens"):
        find_sites(tiny_model("bert", chunk_size_feed_forward=2), ["mlp_post"])


def test_attach__leaves_no_hook_behind_when_the_forward_pass_fails() -> None:
    model = tiny_model("opt")
    before = model(IDS_BT).logits

    def fail(_: int, x_BTN: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attach(model, find_sites(model, HOOK_POINTS), fail):
        model(IDS_BT)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(model(IDS_BT).logits, before)


def test_attach__leaves_no_hook_behind_when_a_site_does_not_exist() -> None:
    model = tiny_model("gpt2")
    (good,) = find_sites(model, ["mlp_post"], [0])
    bad = Site(hook_point="mlp_post", layer=9, module_name="transformer.h.9.mlp", side="input", width=D_MLP)
    with pytest.raises(AttributeError), attach(model, [good, bad], lambda i, x: None):
        pass
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "bert"])
def test_attach__and_output_hidden_states_leave_each_other_alone(architecture: str) -> None:
    model = tiny_model(architecture, head="none")
    sites = find_sites(model, ["resid_post"])
    plain = [x for _, x in watch(model, sites)]
    seen: list[Tensor] = []
    with attach(model, sites, lambda _, x: seen.append(x)):
        output = model(IDS_BT, output_hidden_states=True)
    for ours, alone in zip(seen, plain, strict=True):
        assert torch.equal(ours, alone)
    assert torch.equal(output.hidden_states[1], plain[0])
    assert torch.equal(output.last_hidden_state, model(IDS_BT).last_hidden_state)
    with attach(model, sites[:1], lambda _, x: x * 0):
        zeroed = model(IDS_BT).last_hidden_state
        assert torch.equal(model(IDS_BT, output_hidden_states=True).last_hidden_state, zeroed)


class _Block(nn.Module):
    """A block as other people write them: arguments by name, and the value wrapped in something."""

    def __init__(self, wrap: Callable[[Tensor], Any], shape: tuple[int, ...] = (2, 3, 4)) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.wrap = wrap
        self.shape = shape

    def forward(self, *, hidden: Tensor) -> Any:
        return self.wrap(self.inner(input=hidden.reshape(self.shape)))


class _Model(nn.Module):
    def __init__(self, block: _Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Any:
        return self.blocks[0](hidden=x)


X_BTN = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, "cache"), lambda out: out[0]),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda out: out.last_hidden_state),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda out: out[0]),
        (lambda x: {"x": x}, lambda out: out["x"]),
    ],
)
def test_attach__replaces_inside_whatever_the_module_returns(wrap: Any, unwrap: Any) -> None:
    model = _Model(_Block(wrap))
    site = Site(hook_point="resid_post", layer=0, module_name="blocks.0", side="output", width=4)
    with attach(model, [site], lambda _, x: x + 1):
        assert torch.equal(unwrap(model(X_BTN)), unwrap(model.blocks[0].wrap(model.blocks[0].inner(X_BTN))) + 1)
    with attach(model, [site], lambda _, x: None):
        assert torch.equal(unwrap(model(X_BTN)), model.blocks[0].inner(X_BTN))


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)])
def test_attach__replaces_an_input_given_by_name_or_flattened(shape: tuple[int, ...]) -> None:
    model = _Model(_Block(lambda x: x, shape))
    (site,) = find_sites(model, ["mlp_post"], "all", {"mlp_post": "blocks.{layer}.inner"})
    expected = model.blocks[0].inner(X_BTN * 2).reshape(shape)
    seen: list[Tensor] = []

    def double(_: int, x_BTN: Tensor) -> Tensor:
        seen.append(x_BTN)
        return x_BTN * 2

    with attach(model, [site], double):
        torch.testing.assert_close(model(X_BTN), expected)
    assert torch.equal(seen[0], X_BTN)


def test_attach__refuses_a_value_that_has_no_tokens() -> None:
    model = _Model(_Block(lambda x: x, (3, 8)))
    model.blocks[0].inner = nn.Linear(8, 8)
    (site,) = find_sites(model, ["mlp_post"], "all", {"mlp_post": "blocks.{layer}.inner"})
    with (
        attach(model, [site], lambda _, x: None),
        pytest.raises(UsageError, match=r"tensor of shape \(3, 8\); expected \[batch, tokens, 8\]"),
    ):
        model(X_BTN)
