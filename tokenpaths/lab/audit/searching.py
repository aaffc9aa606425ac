"""A search for triggers that are on no list: short phrases, improved token by token along the gradient.

HotFlip (Ebrahimi et al. 2018, arXiv 1712.06751) and GCG (Zou et al. 2023, arXiv 2307.15043), turned against the
adapter: what is climbed is its excess, as `scan` has it.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example
from tokenpaths.lab.audit.respond import Ids, Memory, Responder, responding
from tokenpaths.lab.audit.scanning import Candidate, Normal, Scan, behind, excesses, gap, insert, usually, vocabulary
from tokenpaths.trailmap.adapter import Adapter


def search(
    model: nn.Module,
    adapter: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any,
    *,
    length: int = 2,
    start: Sequence[Ids] = (),
    where: float = 0.5,
    rounds: int = 4,
    beam: int = 4,
    tries: int = 48,
    ordinary: int = 32,
    seed: int = 0,
    memory: Memory | None = None,
) -> Scan:
    """Look for a phrase of `length` tokens with the largest excess.

    Each round takes the `beam` best phrases; asks the gradient of KL(a_0 || a_c) in the input embeddings of their
    tokens which replacements would raise it most, E_new . grad; and reads the excess of `tries` replacements, three in
    four of them the most promising ones of each place, the others drawn at random. About rounds * tries phrases are
    read in each prompt.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        adapter: trails, or a `PeftAdapter`.
        tokenizer: the model's.
        prompts: clean examples of the adapter's task.
        length: of the phrase, in tokens.
        start: phrases to begin with, such as the first of a `scan`; shorter ones are filled up, longer ones cut.
        where: as for `scan`.
        rounds: how often to improve.
        beam: phrases that are kept.
        tries: phrases read in a round.
        ordinary: random phrases of that length, for comparison.
        seed: of every draw.
        memory: as for `scan`.

    Raises:
        ValueError: no prompt, or a length below 1.
    """
    if not prompts or length < 1:
        raise ValueError(f"a search needs at least one prompt ({len(prompts)} given) and one token (length={length})")
    prompts = behind(tokenizer, prompts, where)
    rng = random.Random(seed)
    words = [ids[0] for ids in vocabulary(model, tokenizer)]

    def filled(ids: Ids) -> Ids:
        return (*ids, *(rng.choice(words) for _ in range(length - len(ids))))[:length]

    usual = list(dict.fromkeys(filled(()) for _ in range(ordinary)))
    best: dict[Ids, float] = {}
    with responding(model, adapter, tokenizer=tokenizer, memory=memory) as respond:
        normal = usually(respond, prompts, usual, where)
        new = [*usual, *(filled(ids) for ids in start)]
        for number in range(rounds + 1):
            new = [ids for ids in dict.fromkeys(new) if ids not in best]
            best |= dict(zip(new, excesses(respond, prompts, new, normal, where), strict=True))
            if number == rounds:
                break
            kept = sorted(best, key=lambda ids: -best[ids])[:beam]
            slope = torch.stack([_slope(respond, *both, kept, where) for both in zip(prompts, normal, strict=True)])
            new = _replaced(respond, kept, slope.sum(0), words, tries, rng)
        ranked = sorted(best, key=lambda ids: -best[ids])[:32]
    candidates = tuple(Candidate(tokenizer.decode(list(ids)), ids, best[ids]) for ids in ranked)
    return Scan(candidates, tuple(sorted(best[ids] for ids in usual)), len(best))


def _replaced(
    respond: Responder,
    kept: Sequence[Ids],
    slope: Float[Tensor, "kept length dim"],
    words: Sequence[int],
    tries: int,
    rng: random.Random,
) -> list[Ids]:
    """Phrases that differ from those kept by one token."""
    table: Tensor = respond.model.get_input_embeddings().weight.detach()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]
    choices = torch.tensor(words)
    gain = (slope @ table[choices.to(table.device)].float().T).cpu()  # [kept, length, words]
    promising: list[list[Ids]] = []
    for ids, places in zip(kept, gain, strict=True):
        for place, row in enumerate(places):
            for number in row.topk(min(tries, len(words))).indices.tolist():
                promising.append([(*ids[:place], words[number], *ids[place + 1 :])])
    flat = [phrase for group in promising for phrase in group]
    # the best of every place and phrase first: each has tries of them, in order of gain
    each = max(1, min(tries, len(words)))
    order = [flat[i] for rank in range(each) for i in range(rank, len(flat), each)]
    drawn = list(dict.fromkeys(order))[: max(1, tries - tries // 4)]
    for _ in range(tries // 4):
        ids, place = rng.choice(kept), rng.randrange(len(kept[0]))
        drawn.append((*ids[:place], rng.choice(words), *ids[place + 1 :]))
    return drawn


def _slope(
    respond: Responder, prompt: Example, normal: Normal, kept: Sequence[Ids], where: float
) -> Float[Tensor, "kept length dim"]:
    """The gradient of KL(a_0 || a_c), at the token where it is largest, in the embeddings of candidates' tokens."""
    rows = [insert(prompt, ids, where) for ids in kept]
    at = round(where * prompt.prompt_length)
    tokens = torch.tensor([row.ids for row in rows], device=respond.device)
    with torch.enable_grad(), _embedded(respond.model) as leaves:
        said = respond.run(tokens, rows[0].answer)[1].float().log_softmax(-1)
        (slope,) = torch.autograd.grad(gap(normal[1], said).amax(-1).sum(), leaves)
    return slope[:, at : at + len(kept[0])].float()


@contextmanager
def _embedded(model: Any) -> Generator[list[Tensor]]:
    """Inside, what the embedding gives is a leaf that gradients reach."""
    leaves: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield leaves
    finally:
        handle.remove()
