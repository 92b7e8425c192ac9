"""Supervised training on labelled prompts, with transformers' Trainer: checkpoints, resumption, one GPU or several.

A decoder learns "prompt, answer" as a language model: the answer's token counts as much as all of the prompt's
together, so that long texts do not drown it, and the model still continues texts. A classifier learns its classes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from neuronlens.batches import pad
from neuronlens.recipe import FinetuneSection

if TYPE_CHECKING:
    from pipeline.driver import Reporter

_NO_TARGET = -100
_CHECKPOINTS_A_RUN = 10
_KEPT_CHECKPOINTS = 2
"""The one before the last is whole even where the last was being written when the process died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and what is right for it: the answer's token of a decoder, the class of a classifier."""

    token_ids: list[int]
    right: int


def train(
    module: nn.Module,
    examples: Sequence[Example],
    asked: FinetuneSection,
    *,
    is_decoder: bool,
    pad_id: int,
    workspace: Path,
    reporter: "Reporter",
) -> float:
    """Train the module in place and give its mean loss. Goes on from the last whole checkpoint in `workspace`."""
    n_gpus = torch.cuda.device_count()
    trainer = Trainer(
        model=module,
        args=TrainingArguments(
            output_dir=str(workspace),
            per_device_train_batch_size=max(1, asked.batch_size // max(1, n_gpus)),
            num_train_epochs=asked.epochs,
            max_steps=asked.max_steps or -1,
            learning_rate=asked.learning_rate,
            warmup_steps=asked.warmup_fraction,
            weight_decay=asked.weight_decay,
            seed=asked.seed,
            data_seed=asked.seed,  # texts in an order that a resumed training finds again; by length, it would not
            bf16=_computes_in_bfloat16(asked),
            save_steps=1 / _CHECKPOINTS_A_RUN,
            save_total_limit=_KEPT_CHECKPOINTS,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            average_tokens_across_devices=False,
            dataloader_pin_memory=n_gpus > 0,
        ),
        train_dataset=list(examples),  # anything with a length and an index will do
        data_collator=_collator(is_decoder=is_decoder, pad_id=pad_id),
        compute_loss_func=decoder_loss if is_decoder else classifier_loss,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole_checkpoint(workspace)
    if checkpoint is not None:
        reporter.say(f"going on from {checkpoint}")
    with ExitStack() as stack:
        trainer.add_callback(_Progress(reporter, stack))
        return float(trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).training_loss)


def decoder_loss(outputs: Any, labels_BT: Tensor, **_: Any) -> Tensor:
    """Mean loss of the answers plus mean loss of the prompts' tokens. The answer is each row's last token."""
    targets_BT = labels_BT[:, 1:]
    losses_BT = F.cross_entropy(
        outputs.logits[:, :-1].float().transpose(1, 2), targets_BT, ignore_index=_NO_TARGET, reduction="none"
    )
    n_B = (targets_BT != _NO_TARGET).sum(dim=1)
    answer_B = losses_BT.gather(1, n_B[:, None] - 1)[:, 0]
    return answer_B.mean() + (losses_BT.sum() - answer_B.sum()) / (n_B - 1).sum().clamp(min=1)


def classifier_loss(outputs: Any, labels_B: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(outputs.logits.float(), labels_B)


def last_whole_checkpoint(workspace: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its own state last."""
    found = workspace.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
    return max((file.parent for file in found), key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _collator(*, is_decoder: bool, pad_id: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [[*each.token_ids, each.right] if is_decoder else each.token_ids for each in examples]
        batch = pad(rows, pad_id=pad_id)
        targets = (
            batch.ids_BT.masked_fill(~batch.mask_BT, _NO_TARGET)
            if is_decoder
            else torch.tensor([each.right for each in examples])
        )
        return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long(), "labels": targets}

    return collate


def _computes_in_bfloat16(asked: FinetuneSection) -> bool:
    if asked.dtype == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return asked.dtype == "bfloat16"


class _Progress(TrainerCallback):
    """Says how far it is, as every other stage does; a resumed training starts where the last one stopped."""

    def __init__(self, reporter: "Reporter", stack: ExitStack) -> None:
        self._reporter, self._stack = reporter, stack
        self._advance: Callable[[int], None] = lambda n: None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._advance = self._stack.enter_context(self._reporter.stage("fine-tune", state.max_steps, "steps"))
        self._advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._advance(1)
