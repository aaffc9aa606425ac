"""The fixtures `smollm2`, `data_folder`, `pyreft`, `unchecked`, and `watch`, which proves what must not change."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jaxtyping
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)
hypothesis.settings.register_profile("tokenpaths", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tokenpaths")

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def watch(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """`watch(model)` returns the model; when the test ends, it must be as it was. `smollm2` is watched unasked."""
    with ExitStack() as stack:
        if "smollm2" in request.fixturenames:
            stack.enter_context(unchanged(request.getfixturevalue("smollm2")[0]))
        yield lambda model: stack.enter_context(unchanged(model))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[nn.Module]:
    """Assert that what runs inside leaves the model's hooks, modes, attributes and numbers as they were, to the bit."""
    settings, numbers = _settings(model), {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    yield model
    assert _settings(model) == settings
    assert [name for name, tensor in _tensors(model) if not torch.equal(_bytes(tensor), _bytes(numbers[name]))] == []


def _settings(model: nn.Module) -> dict[str, Any]:
    modules = {
        name: (module.training, sorted(vars(module)), [dict(getattr(module, hooks)) for hooks in HOOKS])
        for name, module in model.named_modules()
    }
    tensors = {
        name: (id(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
        for name, tensor in _tensors(model)
    }
    return {"modules": modules, "tensors": tensors}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time check of shapes and types, through which torch.compile(fullgraph=True) cannot trace."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def traceable(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is checked at run time cannot be compiled: take the checks out."""
    from tokenpaths import tokens
    from tokenpaths.attachment.moment import Moment
    from tokenpaths.attachment.moving import Plan

    for cls in (tokens.Context, Moment, Plan):
        monkeypatch.setattr(cls, "__init__", inspect.unwrap(cls.__init__))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from tokenpaths.demo import demo_model

    try:
        return demo_model(dtype=torch.float32)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def pyreft() -> Any:
    """The real package; a test that needs it is skipped, with what to install, where it is absent."""
    from pyreft_oracle import load_pyreft

    try:
        return load_pyreft()
    except ImportError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of data sets that are not part of the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TOKENPATHS_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set TOKENPATHS_DATA to the folder that holds trec/, wikitext2/ ...")
    return folder
