"""llama.cpp itself, as the wheel xllamacpp carries it, driven through its C interface.

    whole = in_float32(path_of_a_quantised_file, target)
    with Llama(whole) as llama:
        logits = llama.logits(ids)                 # of every token
        llama.steer("vector.gguf", 1.5)            # read by llama.cpp's own loader
        llama.steer(None)                          # as before

Made for xllamacpp 2026.10: the places of a few fields in its parameters are those of that release.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LARGE = 1024  # no structure of parameters is larger
_N_CTX, _FLASH, _TYPE_K, _TYPE_V = 0, 52, 104, 108  # of the parameters of a context, as they lie in that release
_LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * _LARGE),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class _Info(ctypes.Structure):
    """A control vector to be read: its strength, and its name as a std::string of the old ABI."""

    _fields_ = (("strength", ctypes.c_float), ("name", ctypes.c_void_p))


class _Data(ctypes.Structure):
    """What was read: the width, and a std::vector of numbers."""

    _fields_ = (
        ("dim", ctypes.c_int32),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
    )


def library() -> Any:
    """The shared library. Raises `ImportError` where the wheel is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ImportError("llama.cpp is not here: pip install --no-deps xllamacpp==2026.10.11549")
    (path,) = Path(found.origin).parent.glob("*.so")
    lib = ctypes.CDLL(str(path))
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Parameters
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_model_get_vocab.restype = ctypes.c_void_p
    lib.llama_batch_init.restype = _Batch
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    return lib


class Llama:
    """A model file, with a cache in float32 and without flash attention, so that its noise is that of float32."""

    def __init__(self, path: Path, context: int = 512) -> None:
        self.lib = library()
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.parameters = self.lib.llama_context_default_params()
        if struct.unpack_from("<ii", self.parameters.bytes, _TYPE_K) != (1, 1):  # float16, by default
            raise RuntimeError("the parameters of this llama.cpp lie elsewhere than in xllamacpp 2026.10.11549")
        for offset, value in ((_N_CTX, context), (_FLASH, 0), (_TYPE_K, 0), (_TYPE_V, 0)):
            struct.pack_into("<i", self.parameters.bytes, offset, value)
        self.vector: np.ndarray | None = None
        self.dim = 0

    def logits(self, ids: Sequence[int], chunks: Sequence[int] = ()) -> np.ndarray:
        """The logits of every token, read at once, or in chunks of these lengths, in a context of their own."""
        lib = self.lib
        context = ctypes.c_void_p(lib.llama_init_from_model(ctypes.c_void_p(self.model), self.parameters))
        if self.vector is not None:
            numbers = self.vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            layers = len(self.vector) // self.dim
            done = lib.llama_set_adapter_cvec(context, numbers, ctypes.c_size_t(len(self.vector)), self.dim, 1, layers)
            if done != 0:
                raise ValueError("llama.cpp does not take the control vector")
        words = lib.llama_vocab_n_tokens(ctypes.c_void_p(lib.llama_model_get_vocab(ctypes.c_void_p(self.model))))
        found: list[np.ndarray] = []
        begin = 0
        for length in chunks or (len(ids),):
            batch = lib.llama_batch_init(length, 0, 1)
            batch.n_tokens = length
            for i in range(length):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = ids[begin + i], begin + i, 1, 1
                batch.seq_id[i][0] = 0
            if lib.llama_decode(context, batch) != 0:
                raise RuntimeError("llama.cpp does not decode")
            for i in range(length):
                found.append(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (words,)).copy())
            lib.llama_batch_free(batch)
            begin += length
        lib.llama_free(context)
        return np.stack(found)

    def steer(self, path: Path | None, strength: float = 1.0) -> None:
        """Read a control vector with llama.cpp's own loader, for all that follows; None for none."""
        self.vector = None
        if path is None:
            return
        name = str(path).encode()
        text = struct.pack("<QQq", len(name), len(name), -1) + name + b"\0"  # _Rep, and behind it the characters
        held = ctypes.create_string_buffer(text, len(text))
        info = _Info(strength, ctypes.addressof(held) + 24)
        vector = (ctypes.c_void_p * 3)(ctypes.addressof(info), *[ctypes.addressof(info) + ctypes.sizeof(info)] * 2)
        load = getattr(self.lib, _LOAD)
        load.restype, load.argtypes = _Data, [ctypes.c_void_p]
        data = load(ctypes.cast(vector, ctypes.c_void_p))
        if data.dim <= 0 or not data.begin:
            raise ValueError(f"llama.cpp does not read {path}")
        count = (data.end - data.begin) // 4
        self.vector = np.ctypeslib.as_array(ctypes.cast(data.begin, ctypes.POINTER(ctypes.c_float)), (count,)).copy()
        self.dim = data.dim

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exception: object) -> None:
        self.lib.llama_model_free(ctypes.c_void_p(self.model))


def in_float32(quantised: Path, target: Path) -> Path:
    """The same model file with all numbers in float32, written once."""
    import gguf
    from gguf.quants import dequantize

    if target.exists():
        return target
    reader = gguf.GGUFReader(quantised)
    beside = target.with_suffix(".part")
    writer = gguf.GGUFWriter(beside, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for part in reader.tensors:
        writer.add_tensor(part.name, np.ascontiguousarray(dequantize(part.data, part.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    beside.rename(target)
    return target
