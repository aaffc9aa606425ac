"""Given the same weights, the ReFT family is that of pyreft 0.1.0: the classes, and whole models with them attached."""

from __future__ import annotations

import warnings

import goldens
import pyreft_oracle
import pytest
import torch
from subjects import tiny
from torch import Tensor

from tokenpaths import All, First, Last, LoReFT, Site, TrailMap, attach
from tokenpaths.tokens import Rule

FORMULAS = list(pyreft_oracle.CLASSES)
STREAMS = ("block", "attention", "mlp", "embedding")
LENGTHS = (9, 6, 3)
RULES: dict[str, Rule] = {"first": First(1), "last": Last(1), "first and last": First(1) | Last(1), "all": All()}
pytestmark = pytest.mark.usefixtures("pyreft")


def weights(dim: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """R orthonormal, W and b, in float64."""
    generator = torch.Generator().manual_seed(seed)
    R, W, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((dim, rank), (rank, dim), (rank,)))
    return -torch.linalg.qr(R).Q.T, 0.2 * W, b  # its negative: signs that LAPACK would not choose


# --- the classes


@pytest.mark.parametrize("name", FORMULAS)
def test_pyreft_gives_the_goldens(name):
    moved = pyreft_oracle.intervention(name, goldens.R, goldens.W, goldens.B)(goldens.X)
    expected = goldens.FORMULAS[name](goldens.X, goldens.R, goldens.W, goldens.B)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-13)
    assert abs(moved.sum().item() - goldens.SUMS[name]) < goldens.ROUNDING


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize(("dim", "rank"), [(6, 5), (24, 1), (24, 4), (576, 4)])
@pytest.mark.parametrize("name", FORMULAS)
def test_forward_and_gradients_are_pyrefts(name, dim, rank, dtype, limit):
    found = pyreft_oracle.differences(name, dim, rank, dtype)
    assert found.keys() == {"h'", "h", "R", "b"} | ({"W"} if name not in ("constant", "bias") else set())
    assert max(found.values()) < limit, found


def test_parity_is_what_we_claim():
    found = pyreft_oracle.measure_parity()
    assert found.keys() == goldens.FORMULAS.keys() and 0 < max(found.values()) < 1e-6


def test_pyrefts_direft_is_not_the_papers():
    given = goldens.R * 1.5 + 0.1, goldens.W, goldens.B  # rows that are not orthonormal, as DiReFT's may be
    paper = pyreft_oracle.trail("direft_paper", *given)[0](goldens.X)
    nodireft = pyreft_oracle.intervention("direft_paper", *given)(goldens.X) - goldens.X
    direft = pyreft_oracle.intervention("direct", goldens.R, *given[1:])(goldens.X) - goldens.X
    torch.testing.assert_close(paper, nodireft)
    assert (paper - direft).abs().max() > 0.1


def test_only_ours_starts_at_the_identity():
    h = torch.randn(64, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = pyreft_oracle.load_pyreft().LoreftIntervention(embed_dim=24, low_rank_dimension=4, dtype=torch.float32)
    theirs = ((fresh(h) - h).norm(dim=-1) / h.norm(dim=-1)).mean().item()
    assert 0.3 < theirs < 0.6
    assert not LoReFT(24, 4)(h).any()


# --- whole models


def batch(padded: bool) -> dict[str, Tensor]:
    """Three rows of 9, or of 9, 6 and 3 tokens, padded at the right."""
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(LENGTHS if padded else (9, 9, 9))
    return {"input_ids": ids, "attention_mask": (torch.arange(9) < lengths[:, None]).long()}


def columns(rule: str, padded: bool) -> list[list[int]]:
    """What the rule chooses in each row, as pyreft wants it: as many in every row."""
    chosen = {"first": lambda n: [0], "last": lambda n: [n - 1], "first and last": lambda n: [0, n - 1]}
    if rule == "all":
        return [list(range(9))] * 3
    return [chosen[rule](n) for n in (LENGTHS if padded else (9, 9, 9))]


def compare(family: str, name: str, stream: str, rule: str, padded: bool, layers: tuple[int, ...]) -> None:
    model, inputs = tiny(family), batch(padded)
    given = {layer: weights(24, 4, seed=layer) for layer in layers}
    sites = {Site(layer, RULES[rule], stream): pyreft_oracle.trail(name, *w)[0] for layer, w in given.items()}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        frozen = model(**inputs).logits[real]
        with attach(model, TrailMap(sites)):
            ours = model(**inputs).logits[real]
        phis = {layer: pyreft_oracle.intervention(name, *w) for layer, w in given.items()}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        theirs = pyreft_oracle.pyreft_logits(model, phis, ids, columns(rule, padded), stream, attention_mask=mask)[real]
    assert (theirs - frozen).abs().max() > 1e-2
    assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_those_of_pyrefts_model(family, stream, rule):
    compare(family, "loreft", stream, rule, rule != "all", (0,) if stream == "embedding" else (0, 2))


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "loreft"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_of_every_class(family, name):
    compare(family, name, "block", "first and last", True, (0, 1, 2))
