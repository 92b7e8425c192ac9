"""A model with random weights whose layers are as wide as those that people run in vLLM, and a recipe for it.

    python -m tests.benchmarks.wide_model FOLDER [--layers 6]
    neuronlens run FOLDER/recipe.yaml --store FOLDER/store

Layers of Qwen2.5-0.5B (d_model 896, d_mlp 4,864, 14 heads, 2 of them for keys and values), with the demo's vocabulary
and texts: what a hook costs beside a forward pass depends on the widths, not on the weights. FOLDER must be new.
"""

import argparse
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DEMO = Path(__file__).parents[2] / "neuronlens" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=896,
        intermediate_size=4_864,
        num_hidden_layers=asked.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = asked.folder / "model"
    Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    recipe = {
        "model": {"id": "model"},
        "data": {"source": str(DEMO / "corpus" / "train.jsonl"), "max_per_concept": 50},
        "collect": {"raw": "none"},
    }
    (asked.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


if __name__ == "__main__":
    main()
