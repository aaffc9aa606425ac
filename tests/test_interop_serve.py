"""What an engine does with a hook, chunk by chunk, is what attached trails do; payloads hold the same displacement."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from test_gated import gate_for, opened
from test_interop_weights import LOW_RANK, random
from tiny import DIM, llama

import tokenpaths as tp
from tokenpaths.interop import serve
from tokenpaths.tokens import Rule
from tokenpaths.trails import PSR, ReFTr1

IDS = torch.arange(5, 20)
PROMPT = 9
RULES: dict[str, Rule] = {
    "all": tp.All(),
    "first and last": tp.First(2) | tp.Last(1),
    "answer": tp.Answer(),
    "prompt but the first": tp.Prompt() - tp.First(1),
    "first of the answer": tp.AnswerFirst(2) | tp.Last(3),
}


class Engine:
    """A server with hooks on layers: it hands over states and absolute positions, and knows where the prompt ends."""

    def __init__(self, model: Any, moves: dict[int, serve.Move]) -> None:
        self.model, self.position = model, 0
        for layer, move in moves.items():
            model.model.layers[layer].register_forward_hook(self.hooked(move))

    def hooked(self, move: serve.Move) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.stack([move(row, self.position, PROMPT) for row in output])

        return hook

    def run(self, chunks: list[int]) -> torch.Tensor:
        cache, logits = None, []
        for count in chunks:
            ids = IDS[self.position : self.position + count][None]
            out = self.model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
            self.position += count
        return torch.cat(logits)


@torch.no_grad()
def attached(model: Any, trails: tp.TrailMap, **options: Any) -> torch.Tensor:
    with tp.attach(model, trails, **options):
        return model(IDS[None], prompt_mask=(torch.arange(len(IDS)) < PROMPT)[None]).logits[0]


CHUNKS = {
    "whole": [15],
    "one by one": [1] * 15,
    "threes": [3] * 5,
    "prefill and decode": [9, *[1] * 6],
    "across": [7, 8],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_hook_does_over_chunks_what_attach_does(rule: Rule, chunks: list[int]) -> None:
    trails = tp.TrailMap({tp.Site(1, rule): random(tp.LoReFT(DIM, 3)), tp.Site(2, rule): random(ReFTr1(DIM), 2)})
    expected = attached(llama(), trails, strength=0.7)
    moves = {layer: serve.hook(trails, tp.Site(layer), strength=0.7) for layer in (1, 2)}
    with torch.no_grad():
        found = Engine(llama(), moves).run(chunks)
        frozen = llama()(IDS[None]).logits[0]
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max().item())
    assert (expected - frozen).abs().max() > 0.1


def test_all_trails_at_a_place_read_one_state() -> None:
    places = {tp.Site(1, tp.First(3)): random(tp.LoReFT(DIM, 3)), tp.Site(1, tp.Last(7)): random(tp.DiReFT(DIM, 3), 1)}
    trails = tp.TrailMap(places)
    with torch.no_grad():
        found = Engine(llama(), {1: serve.hook(trails, tp.Site(1))}).run([4, 4, 7])
    assert (found - attached(llama(), trails)).abs().max() < 1e-4


def test_states_where_nothing_is_chosen_are_handed_back_and_half_stays_half() -> None:
    move = serve.hook(tp.TrailMap({tp.Site(1, tp.Last(1)): random(tp.LoReFT(DIM, 3))}), tp.Site(1))
    states = torch.randn(1, DIM, dtype=torch.bfloat16)
    assert move(states, 3, 9) is states
    moved = move(states, 8, 9)
    assert moved.dtype is torch.bfloat16 and not torch.equal(moved, states)


def test_a_gate_is_asked_once_with_the_states_behind_its_probes() -> None:
    model = llama()
    gate = gate_for(model, (2,))
    rows = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [20, 21, 22]]
    seen: list[torch.Tensor] = []
    model.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out[0, -1]))
    found: list[bool] = []
    for row in rows:
        seen.clear()
        with torch.no_grad():
            for probe in gate.probes:
                model(torch.tensor([[*row, *probe]]))
        found.append(serve.opens(gate, list(seen)))
    assert found == opened(llama(), gate, rows)
    with pytest.raises(ValueError, match="one for each probe and layer, and was given 1"):
        serve.opens(gate, seen[:1])


def test_what_a_hook_cannot_know_is_refused() -> None:
    trails = tp.TrailMap({tp.Site(1, tp.Tokens([5])): tp.LoReFT(DIM, 3)})
    with pytest.raises(ValueError, match=r"Tokens\(ids=\(5,\)\) reads the tokens"):
        serve.hook(trails, tp.Site(1))
    with pytest.raises(ValueError, match="no trail lies at"):
        serve.hook(trails, tp.Site(2))
    move = serve.hook(tp.TrailMap({tp.Site(1): tp.LoReFT(DIM, 3)}), tp.Site(1))
    with pytest.raises(ValueError, match=r"given shape \[1, 3, 32\], 0 and 3"):
        move(torch.zeros(1, 3, DIM), 0, 3)


# --- EasySteer


def array(entry: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(entry["data"]), np.float32).reshape(entry["shape"]).copy())


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_payload_holds_the_displacement(name: str) -> None:
    trail = random(LOW_RANK[name]())
    (vector,) = serve.easysteer(tp.TrailMap({tp.Site(2, tp.First(2) | tp.Answer()): trail}))
    assert vector["layers"] == [2] and vector["apply"] == {"prompt_window": [0, 2], "generation": "all"}
    payload, h = vector["payload"], torch.randn(6, DIM)
    tensors = {key: array(entry) for key, entry in payload["tensors"].items()}
    if vector["algorithm"] == "direct":  # h + v
        moved = h + tensors["layer.2"]
    else:  # h + (h W^T + b - h R) R^T, as EasySteer computes it
        turn = tensors["rotate_layer"]
        moved = h + (h @ tensors["learned_source_weight"].T + tensors["learned_source_bias"] - h @ turn) @ turn.T
        assert payload["extra"] == {"layer": 2}
    torch.testing.assert_close(moved, h + trail(h), atol=1e-5, rtol=1e-5)
    digest = hashlib.sha256(f"{payload['kind']}:1".encode())
    for key, entry in sorted(payload["tensors"].items()):
        digest.update(key.encode() + str(tuple(entry["shape"])).encode() + base64.b64decode(entry["data"]))
    for key, value in payload["extra"].items():
        digest.update(f"{key}={value!r}".encode())
    assert digest.hexdigest() == payload["sha256"]


NOT_THERE = {
    "gated trail": ({tp.Site(1): PSR(DIM)}, "by affine trails of low rank, not PSR"),
    "stream": ({tp.Site(1, stream="mlp"): tp.Additive(DIM)}, "EasySteer moves what blocks give"),
    "rule": ({tp.Site(1, tp.Match("a")): tp.Additive(DIM)}, "EasySteer has no clause for Match"),
    "two": ({tp.Site(1, tp.First(1)): tp.Additive(DIM), tp.Site(1, tp.Last(1)): tp.Additive(DIM)}, "two trails lie"),
    "windows": ({tp.Site(1, tp.First(1) | tp.Last(1)): tp.Additive(DIM)}, "takes one prompt_window a vector"),
}


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_easysteer_does_not_have_is_refused(name: str) -> None:
    trails, message = NOT_THERE[name]
    with pytest.raises(ValueError, match=message):
        serve.easysteer(tp.TrailMap(trails))
