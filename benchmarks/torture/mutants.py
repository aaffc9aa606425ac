"""Damaged files: bytes changed, and what is changed under a right checksum, as one who means harm can write it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from tokenpaths.files.sealing import DIGITS, digest, sealed
from tokenpaths.files.tensors import BLOCK

MARK = "5ea1" * (DIGITS // 4)


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Where its note has a place for checksums, they are the right ones."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    place = MARK + "0" * DIGITS * -(-size // BLOCK)
    text = re.sub('"sha256": "[0-9a-f]*"', f'"sha256": "{place}"', metadata.get("tokenpaths", ""))
    content = safetensors.torch.save(dict(tensors), {**metadata, "tokenpaths": text} if text else dict(metadata))
    begin = 8 + int.from_bytes(content[:8], "little")
    if text.count(MARK) != 1:
        return content
    header, body = content[:begin], content[begin:]
    at = header.index(MARK.encode()) + DIGITS
    blocks = "".join(digest(body[i : i + BLOCK]) for i in range(0, len(body), BLOCK)).encode()
    return sealed(header[:at] + blocks + header[at + len(blocks) :], MARK) + body


def mutant(content: bytes, seed: int) -> bytes:
    """The same file with one to eight bytes changed: a single bit of one, or all of them at random."""
    rng, changed = random.Random(seed), bytearray(content)
    count = rng.randint(1, min(8, len(content)))
    for place in rng.sample(range(len(content)), count):
        changed[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    return bytes(changed)


def resealed(content: bytes, seed: int) -> bytes:
    """A mutant that its checksum does not give away: of a file of ours its note, its numbers or its text is changed.

    A JSON file is mutated after its checksum was taken out. A safetensors file has its note or its numbers mutated, and
    the right checksums. Where that makes no such file, it is the plain mutant.
    """
    if content[:1] in b"{[":
        return mutant(re.sub(rb',?\s*"sha256": "[0-9a-f]{64}"', b"", content), seed)
    begin = 8 + int.from_bytes(content[:8], "little")
    try:
        metadata = json.loads(content[8:begin])["__metadata__"]
        if seed % 2:
            text = mutant(metadata["tokenpaths"].encode(), seed).decode("utf-8", "replace")
            return packed(safetensors.torch.load(content), {"tokenpaths": text})
        changed = content[:begin] + mutant(content[begin:], seed)
        return packed(safetensors.torch.load(changed), metadata)
    except Exception:
        return mutant(content, seed)
