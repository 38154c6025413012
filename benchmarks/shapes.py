"""Checkpoints without weights: a config.json and a tokenizer, for `--load-format dummy`.

Right for everything about time and memory. A token decodes to a word of its own."""

import json
from pathlib import Path
from typing import Any

CONTEXT = 36864
SHAPES: dict[str, dict[str, Any]] = {
    "mini": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
             "vocab_size": 4096, "torch_dtype": "float32"},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
             "vocab_size": 4096, "torch_dtype": "float32"},
    "slim": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
             "vocab_size": 32000, "torch_dtype": "bfloat16"},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                 "vocab_size": 128256, "torch_dtype": "bfloat16"},
    "qwen-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
                "vocab_size": 152064, "torch_dtype": "bfloat16"},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
                 "vocab_size": 32000, "torch_dtype": "bfloat16"},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                 "vocab_size": 128256, "torch_dtype": "bfloat16"},
}  # fmt: skip


def write_weights(folder: Path) -> None:
    """Adds random weights to a shape's folder, for `--load-format auto`. vLLM's dummy weights are
    so small that a token hangs on the one before it alone; with these it hangs on all of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(folder)))
    model.to(torch.float32).save_pretrained(str(folder))


def write_shape(name: str, folder: Path) -> Path:
    """Writes the shape's files into `folder` and returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(shape["vocab_size"] - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(str(folder))
    return folder
