"""The instruments themselves: a watch that cannot fail would prove nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import unchanged
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from tokenpaths.demo import fast_dtype


def freeze(model):
    model[0].weight.requires_grad_(False)


def hook(model):
    model[1].register_forward_pre_hook(lambda module, args: None)


def write(model):
    model[0].weight.data[0, 0] += 1


def write_a_minus(model):
    model[0].bias.data.neg_()


def write_a_buffer(model):
    model[1].num_batches_tracked += 1


def replace(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def switch(model):
    model[1].eval()


def attach_an_attribute(model):
    model[0].forward = model[0].forward


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    nn.init.zeros_(model[0].bias)
    return model


CHANGES = [freeze, hook, write, write_a_minus, write_a_buffer, replace, switch, attach_an_attribute]


@pytest.mark.parametrize("change", CHANGES)
def test_the_watch_sees(model, change):
    with pytest.raises(AssertionError), unchanged(model):
        change(model)


def test_the_watch_lets_reading_pass(model, watch):
    model.eval()
    handle = watch(model)[0].register_forward_hook(lambda *_: None)
    model(torch.randn(2, 3)).sum().backward()
    handle.remove()


@given(st.integers())
def test_the_watch_goes_with_hypothesis(number):
    assert isinstance(number, int)


def test_signatures_are_checked_at_run_time():
    with pytest.raises(TypeCheckError):
        fast_dtype(3.5)


def test_torch_compile_works_unchecked(unchecked):
    compiled = torch.compile(lambda device: torch.zeros(1, dtype=fast_dtype(device)), fullgraph=True, backend="eager")
    assert compiled("meta").dtype == torch.float32
