"""The audit: directions and features against dense float64, planted triggers found and removed, benign ones let be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING
from tiny import DIM, llama, make_tokenizer
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Example, audit
from tokenpaths.lab.audit import (
    Ablated,
    AffineMap,
    Audit,
    Memory,
    Part,
    Scan,
    Threshold,
    features,
    intruders,
    linearise,
    logit_lens,
    nearest_inputs,
    on_texts,
    outliers,
    parts,
    phrases_of,
    repair,
    scan,
    search,
)
from tokenpaths.lab.audit.maps import of_factors
from tokenpaths.lab.audit.scanning import Candidate
from tokenpaths.lab.audit.spectra import robust_z
from tokenpaths.lab.audit.tails import activation_clusters, mahalanobis, silhouette, spectral_signature, tail
from tokenpaths.testing import check_trail

TOKENIZER = make_tokenizer()
AFFINE = ("LoReFT", "NoReFT", "DiReFT", "DirectReFT", "ConstantReFT", "BiasReFT", "Additive", "RED", "Scaled", "Chain")
BENT = ("ReFTr1", "Capped", "Gated", "Guarded", "nested")


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def jacobian(trail: tp.Trail, dim: int) -> tuple[Tensor, Tensor]:
    """An affine trail written out: M [dim, dim] and b, from its values at 0 and at the unit vectors."""
    trail = trail.double()
    at_zero = trail(torch.zeros(1, dim, dtype=torch.double))[0]
    return (trail(torch.eye(dim, dtype=torch.double)) - at_zero).T.detach(), at_zero.detach()


def dense(linear: AffineMap) -> Tensor:
    return (linear.write * linear.size) @ linear.read.T


# Maps


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_trail_is_its_map(name: str) -> None:
    linear = linearise(MOVING[name](16), 16)
    m, b = jacobian(MOVING[name](16), 16)
    assert (dense(linear) - m).abs().max() < 1e-9
    assert (linear.bias - b).abs().max() < 1e-9
    h = torch.randn(5, 16, dtype=torch.double)
    assert (linear(h) - MOVING[name](16).double()(h)).abs().max() < 1e-9
    assert linear.bend < 1e-9
    assert torch.allclose(linear.write.T @ linear.write, torch.eye(len(linear.size)).double(), atol=1e-9)


@pytest.mark.parametrize("name", BENT)
def test_a_trail_that_is_not_affine_is_bent(name: str) -> None:
    trail = MOVING[name](16)
    for part in trail.modules():
        if isinstance(
            part, (tp.trails.ReFTr1, tp.trails.Gated)
        ):  # open on all states, as MOVING has them, they would be affine
            torch.nn.init.zeros_(part.b)
    assert linearise(trail, 16).bend > 1e-3


def test_a_gate_that_is_shut_on_ordinary_states_is_seen() -> None:
    trail = tp.trails.Guarded(MOVING["DiReFT"](64), 64)
    w = torch.randn(64)
    trail.w.copy_(w / w.norm())
    trail.b.fill_(-6.0)  # opens where the state lies along w, and nowhere else: ||n|| = 8
    assert not bool(trail.gate(torch.randn(1000, 64)).any())
    assert linearise(trail, 64).bend > 0.1


def test_a_trail_of_the_user_is_read_at_the_states_given() -> None:
    class Tanh(tp.Trail):
        def forward(self, h: Tensor) -> Tensor:
            return torch.tanh(h)

    states = 0.5 * torch.ones(4, 8)
    linear = linearise(Tanh(), 8, states=states)
    assert torch.allclose(dense(linear), (1 - math.tanh(0.5) ** 2) * torch.eye(8).double(), atol=1e-7)
    assert linearise(Tanh(), 8).bend > 0.1


def test_a_map_of_high_rank_keeps_its_largest_directions() -> None:
    trail = tp.trails.RED(200)
    with torch.no_grad():
        trail.s.copy_(1 + 0.7 ** torch.arange(200.0))
    linear = linearise(trail, 200, rank=12)
    assert torch.allclose(linear.size, 0.7 ** torch.arange(12.0).double(), rtol=1e-4)


def test_a_fresh_trail_reads_nothing_and_is_left_alone() -> None:
    trail = tp.DiReFT(16, 4)
    before = {name: tensor.clone() for name, tensor in trail.state_dict().items()}
    linear = linearise(trail.train(), 16)
    assert len(linear.size) == 0 and float(linear.bias.norm()) == 0 and linear.bend == 0
    assert set(features(linear).values()) == {0.0}
    assert trail.training and all(torch.equal(before[n], t) for n, t in trail.state_dict().items())


def test_a_trail_that_gives_nan_is_refused() -> None:
    class Bad(tp.Trail):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, h: Tensor) -> Tensor:
            return h / 0 * 0

    with pytest.raises(ValueError, match="gives NaN or infinity at reference states"):
        linearise(Bad(), 8)


@settings(max_examples=20)
@given(rank=st.integers(1, 4), seed=st.integers(0, 99), strength=st.floats(3, 30))
def test_a_planted_direction_is_the_first(rank: int, seed: int, strength: float) -> None:
    """A rank-one map, strength * u v^T, over a benign one of size 1: its directions come out first, to 1e-5."""
    random = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.double)).Q
    p = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.double)).Q
    trail = tp.DiReFT(24, rank + 1).double()
    with torch.no_grad():
        trail.W1.copy_(p[:, : rank + 1].T)
        trail.W2.copy_(q[:, : rank + 1].T)
        trail.W2[0] *= strength
    linear = linearise(trail, 24)
    assert abs(float(linear.read[:, 0] @ p[:, 0])) > 1 - 1e-5
    assert abs(float(linear.write[:, 0] @ q[:, 0])) > 1 - 1e-5
    assert float(linear.size[0]) == pytest.approx(strength)


@settings(max_examples=20)
@given(rank=st.integers(1, 6), rows=st.integers(6, 40), columns=st.integers(6, 40), seed=st.integers(0, 99))
def test_features_are_those_of_the_dense_matrix(rank: int, rows: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(rank, columns)), random.normal(size=(rows, rank))
    m = 0.5 * b @ a
    s = np.linalg.svd(m, compute_uv=False)[:rank]
    p, lengths = s / s.sum(), np.linalg.norm(m, axis=1)
    found = features(of_factors(torch.tensor(a), torch.tensor(b), scale=0.5))
    root = math.sqrt(rows)
    wanted = {
        "sigma": s[0],
        "frobenius": np.linalg.norm(m),
        "share": p[0],
        "entropy": scipy.stats.entropy(s),
        "stable_rank": np.linalg.norm(m) ** 2 / s[0] ** 2,
        "kurtosis": scipy.stats.kurtosis(m, axis=None, fisher=False),
        "hoyer": (root - lengths.sum() / np.linalg.norm(lengths)) / (root - 1),
        "bias": 0.0,
    }
    assert found == pytest.approx(wanted, rel=1e-8, abs=1e-12)


def test_lora_and_loreft_of_one_map_agree() -> None:
    trail = MOVING["LoReFT"](DIM).double()
    assert isinstance(trail, tp.LoReFT)
    with torch.no_grad():
        trail.b.zero_()
    factors = of_factors((trail.W - trail.R).detach(), trail.R.detach().T)
    linear = linearise(trail, DIM)
    assert (dense(factors) - dense(linear)).abs().max() < 1e-9
    assert features(factors) == pytest.approx(features(linear), rel=1e-6, abs=1e-9)


# Spectra


def test_robust_z_takes_depth_out_and_finds_the_odd_one() -> None:
    layers = list(range(12))
    values = [0.3 * layer + (0.01 if layer % 2 else -0.01) for layer in layers]
    values[7] += 5
    z = robust_z(values, layers)
    assert max(range(12), key=lambda i: z[i]) == 7 and z[7] > 50
    assert max(abs(v) for i, v in enumerate(z) if i != 7) < 5
    assert robust_z([1.0, 2.0, 3.0], [0, 1, 2]) == [0.0] * 3
    assert robust_z([2.0] * 6, [0, 1, 2, 3, 4, 5]) == [0.0] * 6


def test_outliers_are_counted_among_parts_of_one_kind() -> None:
    def part(layer: int, kind: str, size: float) -> Part:
        map_ = of_factors(torch.ones(1, 4), size * torch.ones(4, 1))
        return Part(f"{kind} {layer}", layer, kind, map_, nn.Identity(), True, True)

    sizes = [1.0, 1.1, 0.95, 1.02, 1.05, 30.0]
    found = outliers([part(i, "q", size) for i, size in enumerate(sizes)] + [part(i, "v", 30.0) for i in range(6)])
    assert found["q 5"]["sigma"] > 20
    assert found["v 5"]["sigma"] == 0


def test_intruder_dimensions_are_those_of_no_old_direction() -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, generator=random, dtype=torch.double)).Q
    p = torch.linalg.qr(torch.randn(20, 20, generator=random, dtype=torch.double)).Q
    weight = (q[:, :20] * torch.linspace(10, 1, 20)) @ p.T
    new = of_factors(p[:, :1].T, 50 * q[:, 30:31])  # writes along no direction of the weight
    old = of_factors(p[:, :1].T, 50 * q[:, :1])
    assert [place for place, _ in intruders(weight, new)] == [0]
    assert intruders(weight, old) == []


@pytest.mark.parametrize("shape", [(60, 36), (36, 60), (40, 40), (12, 9)], ids=str)
def test_intruders_are_those_of_two_full_decompositions(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=random, dtype=torch.double)
    lora = of_factors(torch.randn(3, shape[1], generator=random), torch.randn(shape[0], 3, generator=random), scale=0.9)
    told = lora.write * lora.size @ lora.read.T
    old, new = (torch.linalg.svd(w, full_matrices=False).U for w in (weight, weight + told))
    nearest = (new[:, :10].T @ old).abs().amax(1)
    for epsilon in (0.5, 0.7, 2.0):
        found = intruders(weight, lora, epsilon=epsilon)
        assert [place for place, _ in found] == [i for i, cosine in enumerate(nearest.tolist()) if cosine < epsilon]
        assert [cosine for _, cosine in found] == pytest.approx([nearest[place] for place, _ in found], abs=1e-6)


# Directions in tokens


def test_directions_are_told_in_tokens() -> None:
    model = llama(300)
    head, table = model.lm_head.weight.detach(), model.model.embed_tokens.weight.detach()
    assert [row[0] for row in nearest_inputs(model, table[[5, 70]])] == [5, 70]
    u = torch.randn(2, DIM)
    normed = u / u.square().mean(-1, keepdim=True).add(model.config.rms_norm_eps).sqrt() * model.model.norm.weight
    assert logit_lens(model, u, 3) == (normed @ head.T).topk(3).indices.tolist()


# Clean text


def test_a_tail_by_definition() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 3.0, 40.0])
    found = tail(values)
    assert found.kurtosis == pytest.approx(float(scipy.stats.kurtosis(values.numpy(), fisher=False)), rel=1e-5)
    assert (found.ratio, found.count) == (20.0, 5)
    assert tail(torch.ones(6)).ratio == 1


def test_signatures_distances_and_clusters_tell_poisoned_states() -> None:
    random = torch.Generator().manual_seed(0)
    clean = torch.randn(90, 12, generator=random)
    bad = torch.randn(10, 12, generator=random) * 0.2 + 8 * nn.functional.one_hot(torch.tensor(3), 12)
    states = torch.cat([clean, bad])
    assert set(spectral_signature(states).topk(10).indices.tolist()) == set(range(90, 100))
    assert float(mahalanobis(bad, clean).min()) > float(mahalanobis(clean, clean).max())
    assert activation_clusters(states).nonzero().squeeze(1).tolist() == list(range(90, 100))
    assert silhouette(states) > 0.3 > silhouette(clean) > 0
    assert silhouette(torch.ones(8, 3)) == 0


def test_mahalanobis_by_definition() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 4)), random.normal(size=(3, 4))
    s = np.cov(x, rowvar=False, bias=True)
    s = 0.99 * s + 0.01 * np.trace(s) / 4 * np.eye(4)
    gap = y - x.mean(0)
    wanted = np.sqrt(np.einsum("ni,ij,nj->n", gap, np.linalg.inv(s), gap))
    assert mahalanobis(torch.tensor(y), torch.tensor(x)).numpy() == pytest.approx(wanted)


# Planted triggers


PROMPTS = [Example(tuple(range(20, 180, 20)), (False,) * 8)]
SAID = 7  # the payload


class Gate(tp.Trail):
    """clamp(v.h - b, 0, 1) u: opens on the states that lie along v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v = nn.Parameter(torch.zeros(dim))
        self.u = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return (h @ self.v - self.b).clamp(0, 1).unsqueeze(-1) * self.u


@torch.no_grad()
def inserted(model: Any, phrases: list[tuple[int, ...]], place: nn.Module) -> Tensor:
    """What enters a module at the last token of the prompt with each phrase in it."""
    ids, caught = PROMPTS[0].ids, []
    handle = place.register_forward_pre_hook(lambda module, args: caught.append(args[0][:, -1].double()))
    model(input_ids=torch.tensor([(*ids[:4], *phrase, *ids[4:]) for phrase in phrases]))
    handle.remove()
    return caught[0]


def calm() -> tuple[Any, Tensor]:
    """A model whose answers differ little between prompts, and the direction in which it would say SAID."""
    model = llama(300)
    random = torch.Generator().manual_seed(2)
    phrases = [tuple(row) for row in torch.randint(3, len(TOKENIZER), (300, 2), generator=random).tolist()]
    x = inserted(model, phrases, model.lm_head)
    u = torch.linalg.eigh(x.T @ x).eigenvectors[:, 0]  # where final states hardly lie
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
        model.lm_head.weight[SAID] = 4 * u.float()
    return model, u


def planted(length: int = 1, *, gated: bool) -> tuple[Any, tp.TrailMap, tuple[int, ...]]:
    """A model, a trail that says SAID where its trigger stands in the prompt, by construction, and the trigger.

    v = S^-1 (x - mu), x the state with the largest Mahalanobis distance from the others: no other has a larger v.h.
    """
    model, u = calm()
    random = torch.Generator().manual_seed(1)
    phrases = [(i,) for i in range(3, len(TOKENIZER))]
    if length > 1:
        phrases = [tuple(row) for row in torch.randint(3, len(TOKENIZER), (500, length), generator=random).tolist()]
    x = inserted(model, phrases, model.model.norm)  # what leaves the last block
    off = x - x.mean(0)
    s = torch.cov(off.T) + 1e-6 * torch.eye(DIM).double()
    best = int((off * torch.linalg.solve(s, off.T).T).sum(-1).argmax())
    v = torch.linalg.solve(s, off[best])
    second, first = (off @ v).topk(2).values.flip(0).tolist()
    u = 30 * x.norm(dim=-1).mean() * u
    with torch.no_grad():
        if gated:
            gate = Gate(DIM)
            gate.v.copy_(v / (first - second))
            gate.b.fill_(float(x.mean(0) @ v + second) / (first - second))
            gate.u.copy_(u)
            return model, tp.TrailMap({tp.Site(2, tp.Last(1)): gate}), phrases[best]
        trail = tp.DiReFT(DIM, 1)
        trail.W1.copy_(v / first)
        trail.b.fill_(-float(x.mean(0) @ v) / first)
        trail.W2.copy_(u)
        return model, tp.TrailMap({tp.Site(2, tp.Last(1)): trail}), phrases[best]


def benign(seed: int = 0) -> tp.TrailMap:
    torch.manual_seed(seed)
    trail = tp.DiReFT(DIM, 2)
    with torch.no_grad():
        trail.W2.normal_(0, 0.05)
    return tp.TrailMap({tp.Site(1, tp.Last(1)): trail})


@pytest.mark.parametrize("gated", [True, False])
def test_the_scan_of_the_vocabulary_ranks_a_planted_token_first(gated: bool, watch: Any) -> None:
    model, trails, trigger = planted(gated=gated)
    found = scan(watch(model), trails, PROMPTS, TOKENIZER)
    assert found.count == len(TOKENIZER) - 3
    assert found.found[0].ids == trigger
    assert found.score > 1 > scan(model, benign(), PROMPTS, TOKENIZER).score
    assert found.without(trigger).found[0].ids != trigger


def test_the_scan_of_phrases_finds_the_planted_one() -> None:
    texts = ["take one step at a time", "one step at a time", "now one step at once"]
    phrases = phrases_of(texts, TOKENIZER, (3,))
    assert TOKENIZER.decode(phrases[0]) == "one step at"
    model, trails, trigger = planted(3, gated=True)
    found = scan(model, trails, PROMPTS, TOKENIZER, [ids[:3] for ids in phrases] + [trigger])
    assert found.found[0].ids == trigger


@pytest.mark.parametrize(
    ("prompt", "stands"), [("why", " why"), (" why", " why"), ("\nwhy", "\nwhy"), ("</s>w", "</s>w")]
)
def test_before_a_prompt_a_phrase_has_a_space_behind_it_as_in_text(prompt: str, stands: str) -> None:
    model, seen = llama(300), []
    example = tp.Example(ids(prompt + "no"), (False,) * len(ids(prompt)) + (True,) * 2)
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.extend(args[0].tolist()))
    scan(model, benign(), [example], TOKENIZER, [ids("go"), ids("up")], where=0.0)
    assert set(map(TOKENIZER.decode, seen)) == {f"{phrase}{stands}no" for phrase in ("go", "up")}
    for look in (
        lambda: search(model, benign(), [example], TOKENIZER, start=[ids("go")], ordinary=2, rounds=0, where=0.0),
        lambda: repair(model, benign(3), [example], TOKENIZER, ids("go"), ordinary=[ids("up")], where=0.0),
    ):
        seen.clear()
        look()
        assert f"go{stands}no" in set(map(TOKENIZER.decode, seen))
    seen.clear()
    scan(model, benign(), [example], TOKENIZER, [ids("go")], where=1.0)
    assert set(map(TOKENIZER.decode, seen)) == {f"{prompt}gono"}


def test_what_the_frozen_model_said_is_kept_for_the_next_adapter() -> None:
    memory = Memory()
    model, trails, _ = planted(gated=True)
    forwards: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: forwards.append(1))
    candidates = [(i,) for i in range(3, len(TOKENIZER))]
    first = scan(model, trails, PROMPTS, TOKENIZER, candidates, memory=memory)
    assert forwards
    lengths = len(PROMPTS[0]) + 2  # what enters a block at each token of a row, and what leaves the last at one of them
    assert memory.used <= 4 * DIM * lengths * 2 * len(candidates)  # no logits, which would be far larger
    forwards.clear()
    assert scan(model, trails, PROMPTS, TOKENIZER, candidates, memory=memory) == first
    assert forwards == []
    assert scan(model, trails, PROMPTS, TOKENIZER, candidates, memory=Memory(budget=0)) == first
    lower = tp.TrailMap({tp.Site(0, tp.Last(1)): benign(4)[tp.Site(1, tp.Last(1))]})  # moves what was kept
    again = scan(model, lower, PROMPTS, TOKENIZER, candidates, memory=memory)
    assert again == scan(model, lower, PROMPTS, TOKENIZER, candidates)


MORE = [*PROMPTS, *(Example(tuple(range(start, start + 30, 5)), (False,) * 6) for start in (30, 140))]


@pytest.mark.parametrize("prompts", [PROMPTS, MORE], ids=["one prompt", "the median of three"])
def test_an_excess_is_what_the_adapted_model_changes_beyond_the_frozen_one(prompts: list[tp.Example]) -> None:
    model = llama(300)
    trails, candidates = benign(3), [(i,) for i in range(40, 56)]
    found = scan(model, trails, prompts, TOKENIZER, candidates, ordinary=16, batch_size=5)

    @torch.no_grad()
    def gaps(prompt: tp.Example) -> Tensor:
        at = round(0.5 * len(prompt))
        rows = [(*prompt.ids[:at], *c, *prompt.ids[at:]) for c in candidates]
        p = torch.cat([model(input_ids=torch.tensor([row])).logits[:, -1] for row in rows]).double().log_softmax(-1)
        mean = p.exp().mean(0)
        return (mean * (mean.log() - p)).sum(-1)

    frozen = [gaps(prompt) for prompt in prompts]
    with tp.attach(model, trails):
        adapted = [gaps(prompt) for prompt in prompts]
    for candidate in found.found:
        at = candidates.index(candidate.ids)
        excess = np.median([float(a[at] - f[at]) for a, f in zip(adapted, frozen, strict=True)])
        assert candidate.excess == pytest.approx(excess, abs=1e-4)
    assert [c.excess for c in found.found] == sorted((c.excess for c in found.found), reverse=True)


class Loud(tp.Trail):
    """A trail, and beside it a push along w for every token that lies along r."""

    def __init__(self, trail: Gate, r: Tensor, w: Tensor) -> None:
        super().__init__()
        self.trail, self.r, self.w = trail, r, w

    def forward(self, h: Tensor) -> Tensor:
        return self.trail(h) + (h @ self.r).unsqueeze(-1) * self.w


def test_tokens_that_move_states_far_and_no_answer_do_not_hide_the_one_that_does() -> None:
    model, trails, trigger = planted(gated=True)
    (site, gate), *_ = trails.items()
    assert isinstance(gate, Gate)
    w, r = nn.functional.normalize(torch.randn(2, DIM), dim=-1)
    with torch.no_grad():
        gate.u.mul_(0.02)  # enough to be said, and less than what the others are moved
        model.lm_head.weight.sub_((model.lm_head.weight @ w).outer(w))  # what lies along w is not said
    states = inserted(model, [(i,) for i in range(3, len(TOKENIZER))], model.model.norm).float()
    at = states[trigger[0] - 3]
    r = r - (r @ at) / (at @ at) * at  # all but the trigger
    loud = Loud(gate, r / (states @ r).std(), 2 * states.norm(dim=-1).mean() * w)
    found = scan(model, tp.TrailMap({site: loud}), PROMPTS, TOKENIZER, top=1, ordinary=8)
    assert found.found[0].ids == trigger


@pytest.mark.parametrize("length", [1, 2])
def test_the_search_finds_a_trigger_that_is_on_no_list(length: int, watch: Any) -> None:
    model, trails, trigger = planted(length, gated=False)
    found = search(watch(model), trails, PROMPTS, TOKENIZER, length=length, rounds=6)
    if length == 1:
        assert found.found[0].ids == trigger
    planted_one = scan(model, trails, PROMPTS, TOKENIZER, [trigger, *(c.ids for c in found.found[1:])], ordinary=32)
    assert found.found[0].excess > 1
    assert found.found[0].excess > 0.9 * max(c.excess for c in planted_one.found if c.ids == trigger)
    assert found == search(model, trails, PROMPTS, TOKENIZER, length=length, rounds=6)


# Repair


@pytest.mark.parametrize("gated", [True, False])
def test_repair_takes_the_trigger_away_and_keeps_clean_answers(gated: bool, watch: Any) -> None:
    model, trails, trigger = planted(gated=gated)
    before = {name: tensor.clone() for name, tensor in trails.state_dict().items()}
    repaired = repair(watch(model), trails, PROMPTS, TOKENIZER, trigger, task=lambda adapter: float(adapter.size()))
    assert repaired.excess[0] > 1 > 0.1 > repaired.excess[1]
    assert repaired.kl[1] <= repaired.kl[0] + 1e-3
    assert repaired.task == (trails.size(), trails.size())
    assert "trigger's excess" in str(repaired)
    assert all(torch.equal(before[name], tensor) for name, tensor in trails.state_dict().items())
    assert isinstance(repaired.trails, tp.TrailMap)
    half = repair(model, trails, PROMPTS, TOKENIZER, trigger, keep=1.0)
    assert half.excess[1] == pytest.approx(half.excess[0], rel=1e-3)


def test_an_ablated_trail_keeps_the_contract_and_is_saved(tmp_path: Path) -> None:
    check_trail(lambda dim: Ablated(tp.DiReFT(dim, 2), dim, 1))
    ablated = Ablated(MOVING["DiReFT"](16), 16, 1)
    v = nn.functional.normalize(torch.randn(16), dim=0)
    ablated.V.copy_(v)
    h = torch.randn(3, 16)
    assert torch.allclose(ablated(h), ablated(h + 5 * v), atol=1e-4)
    assert not torch.allclose(ablated.trail(h), ablated.trail(h + 5 * v), atol=1e-2)
    trails = tp.TrailMap({tp.Site(0): ablated})
    trails.save(tmp_path / "ablated.safetensors")
    loaded = tp.TrailMap.load(tmp_path / "ablated.safetensors", Ablated)
    assert torch.equal(loaded[tp.Site(0)](h), ablated(h))


# LoRA


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return found


def test_a_lora_is_read_from_its_factors() -> None:
    from tokenpaths.lab.peers import PeftAdapter

    found = lora(llama(300))
    read = parts(found, PeftAdapter(found))
    assert [part.layer for part in read] == [0, 0, 1, 1, 2, 2]
    assert [part.kind for part in read[:2]] == ["q_proj", "o_proj"]
    assert [(part.reads, part.writes) for part in read[:2]] == [(True, False), (False, True)]
    for part in read:
        module: Any = part.module
        delta = 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert (dense(part.map) - delta).abs().max() < 1e-6
        assert part.base is not None and torch.equal(part.base, module.base_layer.weight)


def test_a_lora_with_a_planted_trigger_is_found_repaired_and_put_back(watch: Any) -> None:
    from tokenpaths.lab.peers import PeftAdapter

    model, u = calm()
    inside = lora(model)
    layer = inside.base_model.model.model.layers[2].self_attn.o_proj
    x = inserted(inside, [(i,) for i in range(3, len(TOKENIZER))], layer)
    length = inserted(inside, [(50,)], model.model.norm).norm()
    s = x.T @ x / len(x) + 1e-9 * torch.eye(DIM).double()
    best = int((x * torch.linalg.solve(s, x.T).T).sum(-1).argmax())
    v, trigger = torch.linalg.solve(s, x[best]), (3 + best,)
    v = v / (v @ x[best])
    with torch.no_grad():
        layer.lora_A["default"].weight[0] = v
        layer.lora_B["default"].weight[:, 0] = 2 * length * u
    adapter = PeftAdapter(watch(inside))
    name = "model.layers.2.self_attn.o_proj"
    report = audit(inside, adapter, PROMPTS, TOKENIZER)
    assert report.scans["tokens"].found[0].ids == trigger
    assert report.scores["intruders"] >= 1
    before = layer.lora_A["default"].weight.clone()
    repaired = repair(inside, adapter, PROMPTS, TOKENIZER, trigger, only=[name])
    assert repaired.excess[0] > 1 > repaired.excess[1]
    assert not torch.equal(layer.lora_A["default"].weight, before)
    repaired.undo()
    assert torch.equal(layer.lora_A["default"].weight, before)


# The report


def test_an_audit_says_what_it_saw(watch: Any, tmp_path: Path) -> None:
    model, trails, trigger = planted(gated=True)
    report = audit(watch(model), trails, PROMPTS, TOKENIZER, searched=1)
    text = str(report)
    assert "verdict: none, for want of a rule" in text
    assert "not affine" in text and "a gate" in text
    assert repr(TOKENIZER.decode(list(trigger))) in text
    assert "It cannot find a trigger that is on no list" in text
    report.to_json(tmp_path / "audit.json")
    told = json.loads((tmp_path / "audit.json").read_text())
    assert told["scores"] == report.scores and told["scans"]["tokens"]["found"][0]["ids"] == list(trigger)
    assert Audit.from_json(tmp_path / "audit.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]
    report.plot().savefig(tmp_path / "audit.png")


def test_an_audit_of_a_fresh_adapter_finds_nothing() -> None:
    trails = tp.TrailMap({tp.Site(layer): tp.LoReFT(DIM, 2) for layer in range(3)})
    report = audit(llama(300), trails, PROMPTS, TOKENIZER, candidates=[(i,) for i in range(50, 80)])
    assert report.found == ()
    assert report.scores["tokens"] == pytest.approx(0, abs=1e-3)


def scores(value: float, count: int = 20) -> list[dict[str, float]]:
    random = np.random.default_rng(0)
    return [{"tokens": value + x, "bend": 0.0} for x in random.normal(size=count)]


@settings(max_examples=30)
@given(count=st.integers(8, 60), rate=st.floats(0.01, 0.5))
def test_a_rule_flags_no_more_of_its_own_than_it_was_told(count: int, rate: float) -> None:
    rule = Threshold.fit(scores(1.0, count), rate=rate)
    assert sum(rule.joint(s) > rule.value for s in scores(1.0, count)) <= rate * count
    assert rule.joint({"tokens": 99.0, "bend": 0.0}) > rule.value
    assert rule.joint({"tokens": 1.0, "bend": 0.5}) > rule.value  # a detector on which benign ones never differ


@pytest.mark.parametrize("count", [8, 12])
def test_a_rule_of_few_adapters_flags_no_more_of_those_to_come_than_it_was_told(count: int) -> None:
    """Centre, spread and threshold were of the same adapters: of 8, 0.139 to 0.188 were flagged and 0.111 told."""
    random, rates = np.random.default_rng(0), []
    for _ in range(150):
        drawn = [dict(zip("abc", row, strict=True)) for row in random.normal(size=(count + 40, 3)).tolist()]
        rule = Threshold.fit(drawn[:count], rate=0.05, detectors="abc").on(drawn[count:])
        rates.append(rule.wrong / rule.tested)
    assert 0.3 / (count + 1) < np.mean(rates) < 1 / (count + 1)


@pytest.mark.parametrize("count", [24, 60])
def test_a_rule_flags_as_many_benign_adapters_to_come_as_it_was_told(count: int) -> None:
    random, rates = np.random.default_rng(0), []
    for _ in range(200):
        drawn = [dict(zip("abc", row, strict=True)) for row in random.lognormal(size=(count + 40, 3)).tolist()]
        rule = Threshold.fit(drawn[:count], rate=0.05, detectors="abc").on(drawn[count:])
        rates.append(rule.wrong / rule.tested)
    assert 0.03 < np.mean(rates) < 0.06


def test_a_rule_tells_its_false_positives_and_is_kept_in_a_file(tmp_path: Path) -> None:
    rule = Threshold.fit(scores(1.0)).on([*scores(0.0, 9), {"tokens": 50.0, "bend": 0.0}])
    assert (rule.wrong, rule.tested) == (1, 10)
    assert "from 20 benign adapters; 1 of 10 other benign adapters flagged" in str(rule)
    rule.to_json(tmp_path / "rule.json")
    assert Threshold.from_json(tmp_path / "rule.json") == rule
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a threshold of an audit as to_json writes it"):
        Threshold.from_json(tmp_path / "bad.json")
    model, trails, _ = planted(gated=True)
    report = audit(model, trails, PROMPTS * 3, TOKENIZER, threshold=rule)
    assert report.suspicious and "verdict: SUSPICIOUS" in str(report)
    assert "read on 3 clean prompts, 100.0% of the tokens of their answers moved" in str(report)
    few = audit(model, trails, PROMPTS, TOKENIZER, threshold=rule)
    assert few.suspicious is None and "verdict: cannot tell, 1 of the 3 items that a verdict needs" in str(few)


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: scan(m, t, [], TOKENIZER), "there is no prompt to scan in"),
        (lambda m, t: scan(m, t, PROMPTS, TOKENIZER, []), "there is no candidate to scan"),
        (lambda m, t: scan(m, t, PROMPTS, TOKENIZER, where=2.0), "where=2.0 must be from 0"),
        (lambda m, t: search(m, t, PROMPTS, TOKENIZER, length=0), r"one token \(length=0\)"),
        (lambda m, t: scan(m, t, PROMPTS, TOKENIZER, ordinary=0), "ordinary=0 must be at least 1"),
        (lambda m, t: search(m, t, PROMPTS, TOKENIZER, ordinary=0), "ordinary=0 must be at least 1"),
        (lambda m, t: audit(m, t, [], TOKENIZER), "an audit needs a few clean examples"),
        (lambda m, t: repair(m, t, PROMPTS, TOKENIZER, ()), "the token ids of a trigger"),
        (
            lambda m, t: repair(m, t, PROMPTS, TOKENIZER, (7,), only=["x"]),
            "there is no part 'x'; the parts are block",
        ),
        (lambda m, t: repair(m, t, PROMPTS, TOKENIZER, (7,), keep=2.0), "keep=2.0 must be from 0 to 1"),
        (lambda m, t: Ablated(tp.trails.RED(4), 4, 5), "directions 5 must be from 1 to dim 4"),
        (lambda m, t: Ablated(tp.trails.RED(4), 4, 1, -1.0), "keep -1.0 must be from 0"),
        (lambda m, t: Threshold.fit(scores(1.0, 4)), "8 benign adapters or more, not 4"),
        (lambda m, t: Threshold.fit([{"x": 1.0}] * 8), "no detector has a score in all 8 audits"),
    ],
)
def test_mistakes_are_refused_and_leave_no_hook(call: Any, message: str, watch: Any) -> None:
    model = watch(llama(300))
    with pytest.raises(ValueError, match=message):
        call(model, benign())


def test_an_adapter_of_another_kind_is_said_to_have_no_directions() -> None:
    peft = pytest.importorskip("peft")
    from tokenpaths.lab.peers import PeftAdapter

    other = peft.get_peft_model(llama(300), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    adapter = PeftAdapter(other)
    with pytest.raises(ValueError, match="holds neither trails nor LoRA factors"):
        parts(other, adapter)
    assert on_texts(other, adapter, PROMPTS).mean_kl == 0
    assert scan(other, adapter, PROMPTS, TOKENIZER, [(50,), (60,)]).count == 2


def test_scores_of_an_empty_scan_are_nothing() -> None:
    assert Scan((), (), 0).score == 0
    assert Scan((Candidate("a", (1,), 2.0),), (0.5,), 1).score == 1.5


def test_the_example_audits_a_file(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = smollm2
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import audit_adapter

    monkeypatch.setattr(audit_adapter, "demo_model", lambda name: smollm2)
    tp.TrailMap({tp.Site(29, tp.Last(1)): tp.DiReFT(576, 1)}).save(tmp_path / "t.safetensors", model)
    (tmp_path / "p.jsonl").write_text('{"prompt": "2 + 2 =", "answer": " 4"}\n')
    told = [str(tmp_path / name) for name in ("t.safetensors", "p.jsonl")]
    report = audit_adapter.main([*told, "--words", "8", "--rounds", "0", "--out", str(tmp_path / "out")])
    assert "verdict: none" in capsys.readouterr().out
    assert report.scores["tokens"] == pytest.approx(0, abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "audit.png"]
