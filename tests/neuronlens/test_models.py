"""Loading models, running batches of them, and telling one model from another."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from neuronlens import identity
from neuronlens.batches import TokenBatch, pad
from neuronlens.errors import UsageError
from neuronlens.hookpoints import HOOK_POINTS, find_sites, trunk_of
from neuronlens.models import LoadedModel, load_model, model_identity, tokenizer_hash
from tests.tiny_models import (
    CONFIGS,
    D_MODEL,
    DECODERS,
    ENCODERS,
    LABELS,
    WINDOW,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)

# Longer than the sliding window of 8; a single token; the pad's and the end's ids as real tokens; and another.
TEXTS = ([7, 41, 30, 12, 99, 5, 60, 61, 250, 8, 19, 77], [33], [0, 14, 1, 0, 26], [200, 17, 9, 9, 9, 54, 3])


def loaded(architecture: str, **options: Any) -> LoadedModel:
    return LoadedModel.of(tiny_model(architecture, **options), tiny_tokenizer())


def per_text(values_BT: torch.Tensor, batch: TokenBatch) -> list[torch.Tensor]:
    """The rows of real tokens, text by text."""
    return [row[mask] for row, mask in zip(values_BT, batch.mask_BT, strict=True)]


def one_by_one(run: Callable[[TokenBatch], torch.Tensor]) -> list[torch.Tensor]:
    return [run(pad([text], pad_id=0))[0] for text in TEXTS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", "gpt2")


# Batches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_hidden__of_a_batch_equals_its_texts_one_by_one(architecture: str, side: Any) -> None:
    model = loaded(architecture)
    batch = pad(TEXTS, pad_id=0, side=side)
    together = per_text(model.hidden(batch), batch)
    for got, alone in zip(together, one_by_one(model.hidden), strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_hidden__of_one_text_is_what_transformers_gives(architecture: str) -> None:
    model = loaded(architecture)
    for text in TEXTS:
        # RoBERTa reads positions off the ids, and takes a real <pad> for padding: only there the two may differ.
        if architecture == "roberta" and 0 in text:
            continue
        whole = trunk_of(model.module)(input_ids=torch.tensor([text]))[0]
        torch.testing.assert_close(model.hidden(pad([text], pad_id=0)), whole)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "opt"])
def test_hidden__without_a_mask_equals_eager_attention_with_one(architecture: str) -> None:
    batch = pad(TEXTS, pad_id=0)
    eager: Any = tiny_model(architecture, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    masked = eager.base_model(batch.ids_BT, attention_mask=batch.mask_BT.long(), position_ids=batch.positions_BT)[0]
    got = per_text(loaded(architecture).hidden(batch), batch)
    for fast, slow in zip(got, per_text(masked, batch), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "masks"), [("right", False), ("left", True)])
def test_hidden__gives_a_causal_model_a_mask_only_where_it_needs_one(
    side: Any, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    trunk: Any = trunk_of(model.module)
    given: dict[str, Any] = {}
    forward = trunk.forward
    monkeypatch.setattr(trunk, "forward", lambda **inputs: (given.update(inputs), forward(**inputs))[1])
    model.hidden(pad(TEXTS, pad_id=0, side=side))
    assert ("attention_mask" in given) is masks
    assert given["use_cache"] is False


def test_hidden__does_not_look_for_pads_that_no_token_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(*_: Any) -> None:
        raise AssertionError("transformers looked for pads: a wait for the device, and a warning")

    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", looked)
    loaded("gpt2").hidden(pad(TEXTS, pad_id=0))


# Heads


@pytest.mark.parametrize("architecture", DECODERS)
def test_logits__of_chosen_rows_equal_the_whole_models(architecture: str) -> None:
    model = loaded(architecture)
    assert model.kind == "decoder"
    batch = pad(TEXTS, pad_id=0)
    last_BD = model.hidden(batch)[torch.arange(len(TEXTS)), batch.last_B]
    whole = torch.stack([model.module(torch.tensor([text])).logits[0, -1] for text in TEXTS])
    torch.testing.assert_close(model.logits(last_BD), whole, rtol=1e-4, atol=1e-5)


def _causal_roberta() -> Any:
    config: Any = tiny_model("roberta", is_decoder=True).config
    return AutoModelForCausalLM.from_config(config)


def test_logits__are_not_read_where_the_head_does_more_than_we_know(caplog: pytest.LogCaptureFixture) -> None:
    assert loaded("granite").kind == "decoder"
    assert LoadedModel.of(_causal_roberta(), tiny_tokenizer()).kind == "encoder"  # its head has a layer of its own
    with caplog.at_level(logging.WARNING, logger="neuronlens"):
        scaled = loaded("granite", logits_scaling=4.0)
    assert scaled.kind == "encoder"
    assert "GraniteForCausalLM does more after its last layer" in caplog.text
    with pytest.raises(UsageError, match="no next-token logits"):
        scaled.logits(torch.zeros(1, D_MODEL))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", [*ENCODERS, "gpt2", "llama", "opt", "gemma3_text"])
def test_class_logits__of_a_batch_equal_transformers_one_by_one(architecture: str, side: Any) -> None:
    model = loaded(architecture, head="classifier")
    assert model.kind == "classifier"
    assert model.label_ids == {label: i for i, label in enumerate(LABELS)}
    texts = [text for text in TEXTS if 0 not in text]  # transformers takes the pad's id in a text for padding
    whole = torch.cat([model.module(torch.tensor([text])).logits for text in texts])
    got = model.class_logits(pad(texts, pad_id=0, side=side))
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)


def test_class_logits__are_a_classifiers_only() -> None:
    with pytest.raises(UsageError, match="GPT2LMHeadModel is no classifier"):
        loaded("gpt2").class_logits(pad(TEXTS, pad_id=0))


def test_loaded_model__of_one_that_also_sees_pictures_is_its_language_part() -> None:
    text = {**CONFIGS["gemma3_text"], "vocab_size": 320, "pad_token_id": 0, "final_logit_softcapping": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config={**vision, **sizes}, mm_tokens_per_image=1)
    model = LoadedModel.of(Gemma3ForConditionalGeneration(config), tiny_tokenizer())
    assert model.kind == "decoder"
    assert find_sites(model.module, ["mlp_post"], [1])[0].module_name == "model.language_model.layers.1.mlp.down_proj"
    batch = pad(TEXTS[:1], pad_id=0)
    torch.testing.assert_close(model.logits(model.hidden(batch)), model.module(batch.ids_BT).logits)


# Loading


@pytest.mark.parametrize(
    ("architecture", "head", "kind"),
    [
        ("gpt2", "lm", "decoder"),
        ("opt", "lm", "decoder"),
        ("gpt2", "none", "encoder"),
        ("llama", "classifier", "classifier"),
        ("bert", "classifier", "classifier"),
        ("bert", "lm", "encoder"),
        ("distilbert", "none", "encoder"),
        ("roberta", "lm", "encoder"),
    ],
)
def test_load_model__finds_the_kind_and_the_same_weights(
    architecture: str, head: Any, kind: str, tmp_path: Path
) -> None:
    model = load_model(str(save_tiny(tmp_path / "m", architecture, head=head)))
    assert (model.kind, model.dtype, model.device) == (kind, torch.float32, torch.device("cpu"))
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    batch = pad(TEXTS, pad_id=model.pad_id)
    torch.testing.assert_close(model.hidden(batch), loaded(architecture, head=head).hidden(batch))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_load_model__on_meta_knows_the_structure_without_the_weights(architecture: str, tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path / "m", architecture))
    skeleton, whole = load_model(path, device="meta"), load_model(path)
    assert all(part.is_meta for part in skeleton.module.parameters())
    assert find_sites(skeleton.module, HOOK_POINTS) == find_sites(whole.module, HOOK_POINTS)
    assert (skeleton.kind, skeleton.dtype, skeleton.window) == (whole.kind, whole.dtype, whole.window)


def test_load_model__is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(folder))
    load_model(str(save_tiny(folder.parent / "bert", "bert")))  # an LM head that goes unused
    capfd.readouterr()
    load_model(str(folder.parent / "bert"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "float16", torch.float32),
    ],
)
def test_load_model__takes_a_dtype_that_the_cpu_can_do(
    stored: torch.dtype, asked: str, got: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tiny(tmp_path / "m", "gpt2")
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model.to(stored).save_pretrained(path)
    with caplog.at_level(logging.WARNING, logger="neuronlens"):
        assert load_model(str(path), dtype=asked).dtype == got
    assert ("computing in float32" in caplog.text) is (asked == "float16" or stored == torch.float16)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_window__is_the_longest_text_that_the_model_takes(architecture: str) -> None:
    model = loaded(architecture)
    assert model.window == WINDOW - (architecture == "roberta")  # there, position 0 is the pad's
    model.hidden(pad([[9] * model.window], pad_id=0))
    if architecture in ("gpt2", "opt", "bert", "distilbert", "roberta"):
        with pytest.raises((IndexError, RuntimeError)):
            model.hidden(pad([[9] * (model.window + 1)], pad_id=0))


def test_window__is_the_tokenizers_where_that_is_smaller() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 12
    assert LoadedModel.of(tiny_model("gpt2"), tokenizer).window == 12
    tokenizer.model_max_length = int(1e30)
    assert LoadedModel.of(tiny_model("gpt2"), tokenizer).window == WINDOW


@pytest.mark.parametrize(
    ("pad_token", "eos_token", "expected"),
    [("<pad>", "<eos>", 0), (None, "<eos>", 1), (None, None, 0), ("<a new one>", "<eos>", 1)],
)
def test_pad_id__is_always_one_that_the_model_can_embed(
    pad_token: str | None, eos_token: str | None, expected: int
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = pad_token, eos_token
    if pad_token == "<a new one>":
        tokenizer.add_special_tokens({"pad_token": pad_token})
        assert tokenizer.pad_token_id == 320
    assert LoadedModel.of(tiny_model("gpt2"), tokenizer).pad_id == expected


# What cannot be loaded


def refusal(id: Path | str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_model(str(id), **options)
    return str(caught.value)


def test_load_model__says_what_a_wrong_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "has no config.json; it holds notes.txt" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "has no weights" in refusal(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_model__refuses_what_it_cannot_run(folder: Path) -> None:
    edit_config(folder, model_type="perceptron9000")
    assert "config of type 'perceptron9000'" in refusal(folder)
    edit_config(folder, model_type="t5")
    assert "is an encoder-decoder (t5)" in refusal(folder)


def test_load_model__refuses_a_head_that_was_never_saved(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "bert", head="none")
    edit_config(folder, architectures=["BertForSequenceClassification"])
    message = refusal(folder)
    assert "the weights lack classifier.bias, classifier.weight" in message
    assert "random numbers" in message


def test_load_model__refuses_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "the weights cannot be loaded" in refusal(folder)


def test_load_model__needs_a_tokenizer_that_fits(folder: Path) -> None:
    grown = tiny_tokenizer()
    grown.add_tokens(["<more>"])
    grown.save_pretrained(folder)
    assert "the tokenizer knows 321 tokens, the model 320" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "there is no tokenizer's vocabulary beside the model" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be loaded" in refusal(folder)


def test_load_model__refuses_unknown_dtypes_devices_and_revisions(folder: Path) -> None:
    assert "model.dtype is 'int4'; expected auto, float32" in refusal(folder, dtype="int4")
    assert "'tpu9' is not a device" in refusal(folder, device="tpu9")
    assert "is a local folder, which has none" in refusal(folder, revision="main")


# The hub, played by a function


def test_load_model__takes_a_hub_model_from_its_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder.rename(folder.parent / "0123abcd")
    asked: list[tuple[str, str | None]] = []

    def download(id: str, *, revision: str | None, **_: Any) -> str:
        asked.append((id, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("someone/tiny", revision="v1").kind == "decoder"
    found = model_identity("someone/tiny", "v1")
    assert (found.id, found.revision) == ("someone/tiny", "0123abcd")
    assert set(asked) == {("someone/tiny", "v1")}


def test_load_model__without_a_network_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal("someone/tiny")
    assert message == (
        "model.id 'someone/tiny' is not a folder on this machine, is not in the Hugging Face cache, and the hub "
        "cannot be reached (Got: ConnectError: Name or service not known). "
        "Give a local folder, or run `hf download someone/tiny` where there is a network."
    )


def test_load_model__tells_a_missing_folder_from_a_hub_id() -> None:
    assert "is not a folder on this machine, and not a hub id either" in refusal("./models/no/such")


# Identity


def test_model_identity__stays_the_same_when_nothing_that_matters_changes(folder: Path) -> None:
    before = model_identity(str(folder))
    assert (before.architecture, before.dtype, before.revision) == ("GPT2LMHeadModel", "float32", None)
    config = json.loads((folder / "config.json").read_text())
    shuffled = {**dict(reversed(config.items())), "transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(shuffled))
    moved = shutil.copytree(folder, folder.parent / "moved")
    after = model_identity(str(moved))
    assert (after.config_hash, after.weights_fingerprint) == (before.config_hash, before.weights_fingerprint)


def test_model_identity__tells_models_apart(folder: Path) -> None:
    before = model_identity(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    retrained = model_identity(str(folder))
    assert retrained.weights_fingerprint != before.weights_fingerprint
    assert retrained.config_hash == before.config_hash
    edit_config(folder, activation_function="relu")
    assert model_identity(str(folder)).config_hash != before.config_hash


@pytest.mark.parametrize("place", [0, 900_000, 30_000_000, 59_000_001, 60_000_000 - 1])
def test_model_identity__samples_a_large_file_at_its_ends_and_between(place: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "dtype": "bfloat16"}')
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as stream:
        stream.truncate(60_000_000)
    before = model_identity(str(tmp_path))
    assert (before.architecture, before.dtype) == ("gpt2", "bfloat16")
    with weights.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\1" * 500_000)
    assert model_identity(str(tmp_path)).weights_fingerprint != before.weights_fingerprint


def test_model_identity__reads_little_of_a_large_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as stream:
        stream.truncate(8_000_000_000)  # sparse: takes no room on the disk
    assert sum(len(piece) for piece in identity._sampled(weights)) < 11_000_000


@pytest.mark.parametrize(("stored", "named"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_model_identity__reads_the_dtype_off_the_weights_where_the_config_is_silent(
    stored: torch.dtype, named: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"a": torch.arange(3), "b": torch.zeros(2, dtype=stored)}, tmp_path / "model.safetensors")
    assert model_identity(str(tmp_path)).dtype == named


def test_tokenizer_hash__is_of_what_decides_the_ids() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a text", "another one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(tiny_tokenizer())
    tokenizer.sep_token = "<eos>"
    assert tokenizer_hash(tokenizer) != before
    grown = tiny_tokenizer()
    grown.add_tokens(["<more>"])
    assert tokenizer_hash(grown) != before


def test_loaded_model__computes_a_fused_activation_that_is_the_same_function():
    plain, loaded = tiny_model("gpt2"), LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer())
    ids_BT = torch.arange(10, 30).reshape(2, 10)
    assert type(plain.transformer.h[0].mlp.act) is not type(loaded.module.transformer.h[0].mlp.act)
    torch.testing.assert_close(loaded.module(input_ids=ids_BT).logits, plain(input_ids=ids_BT).logits)
