"""python -m jobs.train_demo_model [--out neuronlens/demo/model] [--steps N] [--seed 0]

Trains the demo's model from nothing: tokenizer and weights, on the training split that jobs.make_demo_corpus wrote, in
about five minutes of one core. The model is a small GPT-2 that learns "text<sep><answer><eos>" as a language model: it
continues texts and names their concept with one token.

The run is deterministic: the same corpus, seed and torch build give the same weights, bit for bit.
Another torch build or another kind of processor rounds differently and gives a different, equally good model.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

DEMO = Path(__file__).resolve().parents[1] / "neuronlens" / "demo"
PAD, EOS, SEP = "<pad>", "<eos>", "<sep>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the weights, the corpus apart."""

    seed: int = 0
    n_steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    n_warmup_steps: int = 60
    dropout: float = 0.2
    # One answer stands against some twenty tokens of text: it gets the weight of several.
    answer_weight: float = 4.0
    vocab_size: int = 1536
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    n_positions: int = 64
    # One thread keeps sums in one order on any number of cores; on a busy machine it is also the fastest.
    n_threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the trained model does on texts that it has not seen."""

    accuracy: float
    answer_loss: float
    text_perplexity: float


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_token(concept: str) -> str:
    return f"<{concept}>"


def train_tokenizer(rows: Sequence[dict[str, str]], config: TrainingConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the texts, with one token for each concept's answer."""
    concepts = sorted({row["label"] for row in rows})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[PAD, EOS, SEP, *map(answer_token, concepts)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        sep_token=SEP,
        padding_side="right",
        model_max_length=config.n_positions,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]], n_positions: int) -> torch.Tensor:
    """Token ids [n_rows, longest], int64, of "text<sep><answer><eos>", padded on the right."""
    prompts = [row["text"] + SEP + answer_token(row["label"]) + EOS for row in rows]
    ids = [torch.tensor(each) for each in tokenizer(prompts)["input_ids"]]
    longest = max(map(len, ids))
    if longest > n_positions:
        raise ValueError(f"The longest text has {longest} tokens, but the model has {n_positions} positions.")
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)


def build_model(tokenizer: PreTrainedTokenizerFast, config: TrainingConfig) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.n_positions,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # The same function as GPT-2's own "gelu_new", in one fused kernel.
            activation_function="gelu_pytorch_tanh",
            dtype="float32",
        )
    )


def next_token_logits(model: GPT2LMHeadModel, ids_BT: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Logits [B, T - 1, vocab]: row t is about token t + 1."""
    return model(input_ids=ids_BT, attention_mask=(ids_BT != pad_id).long(), use_cache=False).logits[:, :-1]


def token_losses(logits_BTV: torch.Tensor, ids_BT: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Cross-entropy [B, T - 1] of every token but the first, 0 at pads."""
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=pad_id, reduction="none")
    return losses.view(len(ids_BT), -1)


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth."""
    if step < config.n_warmup_steps:
        return (step + 1) / config.n_warmup_steps
    done = (step - config.n_warmup_steps) / max(1, config.n_steps - config.n_warmup_steps)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def build_optimizer(model: GPT2LMHeadModel, config: TrainingConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def endless_batches(ids_NT: torch.Tensor, length_N: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Token ids [batch_size, longest in the batch], epoch after epoch, texts of similar length together."""
    while True:
        # Sorting whole epochs would put the same texts together every time; sixteen batches at a time stay well mixed.
        pools = torch.randperm(len(ids_NT)).split(16 * batch_size)
        batches = [b for pool in pools for b in pool[length_N[pool].argsort(stable=True)].split(batch_size)]
        for i in torch.randperm(len(batches)).tolist():
            yield ids_NT[batches[i], : length_N[batches[i]].max()]


def train(
    rows: Sequence[dict[str, str]], config: TrainingConfig, console: Console
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The trained model, in evaluation mode, and its tokenizer. Sets torch's threads, seed and deterministic mode."""
    torch.set_num_threads(config.n_threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(rows, config)
    ids_NT = encode(tokenizer, rows, config.n_positions)
    length_N = (ids_NT != tokenizer.pad_token_id).sum(dim=1)
    answers = sorted({answer_token(row["label"]) for row in rows})
    weight_V = torch.ones(len(tokenizer))
    weight_V[tokenizer.convert_tokens_to_ids(answers)] = config.answer_weight
    weight_V[tokenizer.pad_token_id] = 0.0
    model = build_model(tokenizer, config).train()
    optimizer = build_optimizer(model, config)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("train", total=config.n_steps)
        for step, ids_BT in enumerate(islice(endless_batches(ids_NT, length_N, config.batch_size), config.n_steps)):
            weight_BT = weight_V[ids_BT[:, 1:]]
            logits_BTV = next_token_logits(model, ids_BT, tokenizer.pad_token_id)
            loss_BT = token_losses(logits_BTV, ids_BT, tokenizer.pad_token_id)
            loss = (loss_BT * weight_BT).sum() / weight_BT.sum()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_factor(step, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1, description=f"train, loss {loss.item():.3f}")
    return model.eval(), tokenizer


@torch.inference_mode()
def score(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]]) -> Scores:
    """Accuracy of the answer among the whole vocabulary, its loss, and the perplexity of the texts."""
    ids_NT = encode(tokenizer, rows, model.config.n_positions)
    answer_N = torch.tensor(tokenizer.convert_tokens_to_ids([answer_token(row["label"]) for row in rows]))
    n_right, answer_loss, text_loss, n_text_tokens = 0, 0.0, 0.0, 0
    for ids_BT, answer_B in zip(ids_NT.split(128), answer_N.split(128), strict=True):
        logits_BTV = next_token_logits(model, ids_BT, tokenizer.pad_token_id)
        loss_BT = token_losses(logits_BTV, ids_BT, tokenizer.pad_token_id)
        at_sep_BT = ids_BT[:, :-1] == tokenizer.sep_token_id
        is_text_BT = at_sep_BT.cumsum(dim=1) == 0
        n_right += int((logits_BTV[at_sep_BT].argmax(dim=-1) == answer_B).sum())
        answer_loss += loss_BT[at_sep_BT].sum().item()
        text_loss += loss_BT[is_text_BT].sum().item()
        n_text_tokens += int(is_text_BT.sum())
    return Scores(
        accuracy=n_right / len(rows),
        answer_loss=answer_loss / len(rows),
        text_perplexity=math.exp(text_loss / n_text_tokens),
    )


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(prog="python -m jobs.train_demo_model", description="Train the demo's model.")
    parser.add_argument("--out", type=Path, default=DEMO / "model", help="folder for the model and its tokenizer")
    parser.add_argument("--corpus", type=Path, default=DEMO / "corpus", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=defaults.n_steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="0 gives the model that the package ships")
    args = parser.parse_args(argv)

    disable_progress_bar()
    console = Console(stderr=True)
    config = TrainingConfig(seed=args.seed, n_steps=args.steps)
    train_rows, test_rows = (read_rows(args.corpus / f"{split}.jsonl") for split in ("train", "test"))
    started = time.perf_counter()
    model, tokenizer = train(train_rows, config, console)
    seconds = time.perf_counter() - started
    save(model, tokenizer, args.out)
    scores = {"train": score(model, tokenizer, train_rows), "test": score(model, tokenizer, test_rows)}
    print_summary(console, args.out, seconds, scores)


def print_summary(console: Console, folder: Path, seconds: float, scores: dict[str, Scores]) -> None:
    weights = folder / "model.safetensors"
    for split, each in scores.items():
        console.print(
            f"{split}: accuracy {each.accuracy:.4f}, loss of the answer {each.answer_loss:.4f}, "
            f"perplexity of the text {each.text_perplexity:.2f}",
            soft_wrap=True,
        )
    console.print(
        f"{seconds:.0f} s; {weights}, {weights.stat().st_size:,} bytes, sha256 {sha256(weights)}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
