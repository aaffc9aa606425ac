"""A control vector in llama.cpp itself does what attached trails do: slow, with the wheel xllamacpp, on SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def test_llama_cpp_reads_a_control_vector_and_steers_as_attach_does(smollm2: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install --no-deps xllamacpp==2026.10.11549")
    from benchmarks.interop.__main__ import of_llama_cpp
    from tokenpaths.demo import demo_model

    model, _ = demo_model(dtype=torch.float32)
    found = of_llama_cpp(model, tmp_path)
    assert found["loaded to the bit"] and found["cleared to the bit"]
    assert found["vector"] < 2 * found["frozen"] < 1e-3 < found["moved"]
