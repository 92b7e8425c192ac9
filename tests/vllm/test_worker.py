"""What the worker refuses at start, what its hooks reach, and that a hook which does not act stops it."""

from typing import Any

import pytest
import torch

from neuronlens.errors import RunFailed, UsageError
from neuronlens.vllm.offline import steered
from neuronlens.vllm.worker import worker_class
from tests.vllm.tiny import RULES, alone, engine, program_of, save_model, table_for

pytestmark = pytest.mark.vllm
PROMPT = list(range(7, 40))
ALL_POINTS = ("mlp_post", "mlp_out", "attn_out", "resid_post")


def say(llm: Any, program: Any = None, phases: Any = ("prompt", "generation"), n: int = 12) -> tuple[list[int], Any]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=n, temperature=0, stop_token_ids=[1])
    if program is None:
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
        return list(output.outputs[0].token_ids), None
    with steered(llm, program, phases) as request:
        (output,) = llm.generate(request.prompt(PROMPT), request.sampling(params), use_tqdm=False)
    return list(output.outputs[0].token_ids), request.counts


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "qwen2", "mistral", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt_neox", "opt"]
)
def test_hooks__reach_all_hook_points_of_an_architecture(tmp_path, architecture):
    folder = save_model(tmp_path, architecture)
    table = table_for(folder, ALL_POINTS)
    rules = {
        point: [{"concept": "joy", "action": "set", "value": 1.5, "hook_points": [point], "layers": [0, 1]}]
        for point in ALL_POINTS
    }
    # Before vLLM starts: where it has no model of its own, it changes transformers' classes in this process.
    plain, _, _ = alone(folder, PROMPT, 12, None)
    wanted = {point: alone(folder, PROMPT, 12, rules[point], table) for point in ALL_POINTS}
    with engine(folder, neuronlens={"hook_points": ALL_POINTS}, max_num_seqs=2, enable_prefix_caching=False) as llm:
        assert say(llm)[0] == plain
        for point, (ids, tested, changed) in wanted.items():
            got, counts = say(llm, program_of(folder, rules[point], hook_points=ALL_POINTS))
            assert got == ids, point
            assert counts.tested == tested, point
            # A value at a bound may fall on either side of it in two implementations.
            assert abs(counts.changed - changed) <= 0.01 * changed, point
            assert changed > 100, point


@pytest.mark.parametrize("phases", [["prompt"], ["generation"]])
def test_phases__split_by_the_prompts_length(models, phases):
    # What the transformers engine says with these phases is held to `generate` in its own tests; here it is computed
    # with a program that acts in the other part of the positions only.
    folder, rules = models["llama"], RULES[1]
    program = program_of(folder, rules)
    with engine(folder, enable_prefix_caching=False, max_num_batched_tokens=16, max_model_len=128) as llm:
        got, counts = say(llm, program, phases)
        whole, all_counts = say(llm, program)
        other, other_counts = say(llm, program, ["generation"] if phases == ["prompt"] else ["prompt"])
    n_named = sum(int(site.named_N.sum()) for site in program.sites)
    n_tokens = len(PROMPT) if phases == ["prompt"] else len(got) - 1
    assert counts.tested == n_named * n_tokens
    assert all_counts.tested == n_named * (len(PROMPT) + len(whole) - 1)
    assert got != other or counts.tested != other_counts.tested
    assert len({tuple(got), tuple(whole), tuple(alone(folder, PROMPT, 12, None)[0])}) >= 2


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
         "speculative decoding"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both",
                                 "kv_connector_extra_config": {"shared_storage_path": "/tmp/x"}}}, "KV transfer"),
        ({"neuronlens": {"hook_points": ["mlp_pre"]}}, "hook_points"),
        ({"neuronlens": {"slotz": 4}}, "slotz"),
        ({"neuronlens": {"layers": [7]}}, "Layer 7 is out of range"),
    ],
)  # fmt: skip
def test_worker__refuses_at_start_with_a_sentence(models, options, wanted):
    with pytest.raises(UsageError, match=wanted), engine(models["llama"], **options):
        pass


def test_worker__refuses_a_program_for_a_layer_that_is_not_hooked(models):
    with engine(models["llama"], neuronlens={"hook_points": ["mlp_post"], "layers": [0]}) as llm:
        with pytest.raises(UsageError, match="Layer 1 of resid_post is not hooked"):
            say(llm, program_of(models["llama"], RULES[2]))
        assert say(llm)[0] == alone(models["llama"], PROMPT, 12, None)[0]


class LateWorker:
    """Hooks that come after the model was first run, as they do in tools that hook a running server."""

    def load_model(self, **kwargs: Any) -> None:
        import neuronlens.vllm.worker as home

        attach, home.attach_hooks = home.attach_hooks, lambda *_: None
        try:
            super().load_model(**kwargs)  # type: ignore[misc]
        finally:
            home.attach_hooks = attach

    def compile_or_warm_up_model(self) -> Any:
        from neuronlens.vllm.hooks import attach_hooks

        attach_hooks(self.model_runner.model, self.rank_sites)  # type: ignore[attr-defined]
        return super().compile_or_warm_up_model()  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    if name == "Late":
        return type("Late", (LateWorker, worker_class()), {})
    raise AttributeError(name)


def test_compiled__hooks_act_and_come_through_vllms_cache_of_graphs(models, tmp_path, monkeypatch):
    # First plain vLLM fills its cache with a graph that has no hooks; then ours starts, twice, over that cache.
    from vllm import LLM

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    folder = models["llama"]
    compiled = {"enforce_eager": False, "max_num_seqs": 2}
    with engine(folder, **compiled, worker_cls="auto", additional_config={}) as llm:
        assert isinstance(llm, LLM)
    for _ in range(2):
        with engine(folder, **compiled) as llm:
            for rules in (None, RULES[1], RULES[4]):
                program = None if rules is None else program_of(folder, rules)
                assert say(llm, program)[0] == alone(folder, PROMPT, 12, rules)[0]


def test_compiled__late_hooks_are_found_out_by_the_canary(models, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    options = {"enforce_eager": False, "worker_cls": "tests.vllm.test_worker.Late", "max_num_seqs": 2}
    with pytest.raises(RunFailed, match="was never run"), engine(models["llama"], **options):
        pass


def test_half_precision__is_steered_as_transformers_steers_it(models):
    # Greedy tokens of two implementations part sooner or later in bfloat16; the counts of the prompt must not.
    folder, rules = models["llama"], RULES[1]
    program = program_of(folder, [{**rules[0], "layers": [0]}])
    with engine(folder, dtype="bfloat16") as llm:
        _, counts = say(llm, program, n=1)
        plain, _ = say(llm)
        got, _ = say(llm, program_of(folder, RULES[5]))
    from neuronlens import intervene
    from neuronlens.models import load_model

    loaded = load_model(str(folder), dtype="bfloat16")
    with intervene(loaded, table_for(folder), [{**rules[0], "layers": [0]}]) as applied, torch.inference_mode():
        loaded.module(torch.tensor([PROMPT]))
    assert counts.tested == applied.tested
    assert abs(counts.changed - applied.changed) <= 0.02 * applied.changed
    assert got != plain
