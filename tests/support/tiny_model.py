"""A tiny Llama with random float32 weights and a byte-level tokenizer: fast, exact, senseless."""

import json
import os
from pathlib import Path

VOCABULARY = 512
CONTEXT = 2048
WIDTH = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(folder: Path) -> Path:
    """Writes the checkpoint into `folder` (once) and returns it."""
    if (folder / "model.safetensors").is_file():
        return folder
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    words += [f"word{i}" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=8,  # Some milliseconds a token: slow enough to look at a running one.
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        dtype="float32",
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(str(folder))
    return folder


def make_lora(folder: Path, base: Path, rank: int = 4) -> Path:
    """Writes a LoRA adapter with random weights for the tiny model into `folder`."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    torch.manual_seed(11)
    tensors = {}
    width = config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (
            ("q_proj", config["num_attention_heads"] * config["head_dim"]),
            ("v_proj", config["num_key_value_heads"] * config["head_dim"]),
        ):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    adapter = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder
