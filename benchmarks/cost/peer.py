"""Steps of adapters 1.3.0's LoReFT, in its own environment: one for each line on stdin, and what it cost on stdout.

    python -m benchmarks.cost.peer '{"model": {...}, "dtype": "bfloat16", ...}'      # `adapters` in arms.py starts it

Its model has the shape that it is told, and random weights. Only torch, transformers and adapters are there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints must not be taken for an answer

import adapters  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.common.process import Memory, now  # noqa: E402

TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}


def main(told: dict[str, Any]) -> None:
    torch.set_num_threads(told["threads"])
    torch.manual_seed(0)
    length, device = told["prompt"] + told["answer"], told["device"]
    warm, _ = training(base(TINY, told), {**told, "layers": [0]})
    warm(torch.zeros(1, length, dtype=torch.long, device=device))  # what every process takes once is not measured
    ids = torch.randint(3, told["model"]["vocab_size"], (told["examples"], length), device=device)
    model = base(told["model"], told)
    memory = Memory()
    step, parameters = training(model, told)
    for count, _ in enumerate(sys.stdin):
        first = count * told["batch"] % told["examples"]
        began = now()
        step(ids[first : first + told["batch"]])
        found = {"seconds": now() - began, **memory.used(), **state(parameters, model)}
        print(json.dumps(found), file=ANSWERS, flush=True)


def base(shape: dict[str, Any], told: dict[str, Any]) -> Any:
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return model.to(told["device"], getattr(torch, told["dtype"]))


def training(model: Any, told: dict[str, Any]) -> tuple[Callable[[torch.Tensor], None], list[torch.nn.Parameter]]:
    """One optimizer step as a function of a batch, and what it trains."""
    adapters.init(model)
    tokens, dtype, device = told["tokens"], getattr(torch, told["dtype"]), told["device"]
    config = adapters.LoReftConfig(
        layers=told["layers"],
        r=told["rank"],
        prefix_positions=0 if told["from_end"] else tokens,
        suffix_positions=tokens if told["from_end"] else 0,
        tied_weights=True,
        dropout=0.0,
    )
    model.add_adapter("trail", config=config)
    model.train_adapter("trail")
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    # its orthogonal R is float32 whatever the model is, so that a coarser model needs autocast, as Trainer(bf16=True)
    mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def step(batch: torch.Tensor) -> None:
        labels = batch.clone()
        labels[:, : told["prompt"]] = -100
        with mixed:
            loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, parameters


def state(parameters: list[torch.nn.Parameter], model: torch.nn.Module) -> dict[str, float]:
    """Bytes of what is learned, and of the buffers that are kept for it."""
    buffers = [tensor for name, tensor in model.named_buffers() if "reft" in name]
    return {
        "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in buffers),
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
