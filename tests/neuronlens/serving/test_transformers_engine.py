"""The engine around the batcher: its thread, its streams, what it refuses, and how it ends."""

import asyncio
from typing import Any

import pytest
import torch

from neuronlens.errors import UsageError
from neuronlens.serving.engine import Delta, EngineBusy, GenerationFailed, Sampling
from neuronlens.serving.settings import Limits
from neuronlens.serving.transformers_engine import TransformersEngine
from tests.neuronlens.serving.tiny_engine import RULES, alone, generation, tiny_loaded
from tests.tiny_models import save_tiny


def engine_of(loaded: Any, **options: Any) -> TransformersEngine:
    given = {"model_id": "tiny", "config_hash": "c" * 16, "limits": Limits(), **options}
    return TransformersEngine(loaded, **given)


async def all_of(stream: Any) -> list[Delta]:
    return [delta async for delta in stream]


def test_engine__streams_what_the_bare_model_says():
    loaded = tiny_loaded()

    async def run() -> list[list[Delta]]:
        engine = engine_of(loaded)
        assert not engine.ready
        await engine.start()
        assert engine.ready
        streams = engine.submit([generation([10, 11, 12], 9, rules) for rules in RULES])
        said = await asyncio.gather(*map(all_of, streams))
        assert engine.load_now().running == 0
        await engine.close()
        assert not engine.ready
        return said

    for rules, deltas in zip(RULES, asyncio.run(run()), strict=True):
        ids, tested, changed = alone(loaded, [10, 11, 12], 9, rules)
        assert [i for delta in deltas for i in delta.token_ids] == ids
        assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        counts = deltas[-1].counts
        assert counts is None or (counts.tested, counts.changed) == (tested, changed)


def test_stream__joins_what_nobody_has_read():
    async def run() -> list[Delta]:
        engine = engine_of(tiny_loaded())
        await engine.start()
        (stream,) = engine.submit([generation([10, 11], 12)])
        while engine.load_now().running or engine.load_now().waiting:
            await asyncio.sleep(0.01)
        said = await all_of(stream)
        await engine.close()
        return said

    (delta,) = asyncio.run(run())
    assert len(delta.token_ids) == 12
    assert delta.finish_reason == "length"


def test_submit__takes_all_sequences_or_none():
    async def run() -> None:
        engine = engine_of(tiny_loaded(), limits=Limits(queue=2, programs=2), max_batch=1)
        await engine.start()
        with pytest.raises(EngineBusy) as busy:
            engine.submit([generation([10], 30) for _ in range(4)])
        assert busy.value.reason == "queue_full"
        with pytest.raises(EngineBusy) as busy:
            engine.submit([generation([10], 30, rules) for rules in RULES[1:4]])
        assert busy.value.reason == "too_many_programs"
        assert engine.load_now().waiting == 0
        streams = engine.submit([generation([10], 3, RULES[1]) for _ in range(3)])
        await asyncio.gather(*map(all_of, streams))
        # Programs that are done make room.
        await asyncio.gather(*map(all_of, engine.submit([generation([10], 3, rules) for rules in RULES[2:4]])))
        await engine.close()

    asyncio.run(run())


def test_close__ends_what_runs_with_an_error_and_takes_no_more():
    async def run() -> None:
        engine = engine_of(tiny_loaded())
        await engine.start()
        (stream,) = engine.submit([generation([10], 60)])
        await anext(aiter(stream))
        await engine.close()
        with pytest.raises(GenerationFailed, match="shutting down"):
            await all_of(stream)
        with pytest.raises(EngineBusy) as busy:
            engine.submit([generation([10], 3)])
        assert busy.value.reason == "engine_not_ready"

    asyncio.run(run())


def test_death__of_the_engine_fails_its_streams_and_is_seen(monkeypatch):
    async def run() -> None:
        engine = engine_of(tiny_loaded())
        await engine.start()
        monkeypatch.setattr(engine._batcher, "step", lambda: 1 / 0)
        (stream,) = engine.submit([generation([10], 5)])
        with pytest.raises(GenerationFailed, match="died"):
            await all_of(stream)
        assert not engine.ready
        await engine.close()

    asyncio.run(run())


def test_start__refuses_a_model_that_says_something_else_step_by_step():
    """Its attention looks ahead by what the cache cannot know: every key is scaled by the length of the whole text."""
    loaded = tiny_loaded()
    attention = loaded.module.transformer.h[0].attn.c_attn

    def scaled(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * output.shape[1]

    attention.register_forward_hook(scaled)
    with pytest.raises(UsageError, match="step by step"):
        asyncio.run(engine_of(loaded).start())


def test_load__refuses_a_model_that_generates_no_text(tmp_path):
    save_tiny(tmp_path / "bert", "bert")
    with pytest.raises(UsageError, match="--tables-only"):
        TransformersEngine.load(str(tmp_path / "bert"))


def test_facts__name_the_folder_but_not_its_path(tmp_path):
    path = save_tiny(tmp_path / "deep" / "down" / "tiny-llama", "llama")
    facts = TransformersEngine.load(str(path)).facts
    assert (facts.model_id, facts.aliases) == ("tiny-llama", (str(path),))
    assert facts.sites["mlp_post"] == (0, 1)


def test_memory__that_a_sequence_will_never_fit_is_said_before_it_waits():
    async def run() -> None:
        engine = engine_of(tiny_loaded(), cache_bytes=1000)
        await engine.start()
        with pytest.raises(UsageError, match="--cache-gb"):
            engine.submit([generation([10], 50, sampling=Sampling(max_tokens=50, temperature=0))])
        await engine.close()

    asyncio.run(run())
