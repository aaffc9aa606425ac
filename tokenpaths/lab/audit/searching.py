"""A search for triggers that are on no list: short phrases, improved token by token along the gradient.

HotFlip (Ebrahimi et al. 2018, arXiv 1712.06751) and GCG (Zou et al. 2023, arXiv 2307.15043), turned against the
adapter: they climb its excess (`tokenpaths.lab.audit.excess`).
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.hooks import only_here
from tokenpaths.data.examples import Example
from tokenpaths.engine.divergence import kl_of_logs
from tokenpaths.lab.audit.excess import Probe, insert, position
from tokenpaths.lab.audit.respond import Ids, Memory, responding
from tokenpaths.lab.audit.scanning import Candidate, Scan, vocabulary
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import Undo, tidy


@tidy
def search(
    model: nn.Module,
    trails: Adapter,
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

    Each round takes the `beam` best phrases and the gradient of KL(a_0 || a_c) in the input embeddings of their tokens.
    The gradient says which replacements would raise it most: those of largest E_new . grad. The excess of `tries`
    replacements is read: three in four are the most promising ones of each place, the others are drawn at random. About
    rounds * tries phrases are read in each prompt.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: an adapter of any kind.
        prompts: clean examples of the adapter's task.
        tokenizer: the model's tokenizer.
        length: the length of the phrase, in tokens.
        start: phrases to begin with, such as the first of a `scan`; shorter ones are filled up, longer ones cut.
        where: as for `scan`.
        rounds: how often to improve.
        beam: how many phrases are kept in a round.
        tries: how many phrases are read in a round.
        ordinary: how many random phrases of that length are read for comparison, at least 1.
        seed: the seed of every draw.
        memory: as for `scan`.

    Raises:
        ValueError: no prompt, a length or `ordinary` below 1, or `where` outside [0, 1].
    """
    if not prompts or length < 1:
        raise ValueError(f"a search needs at least one prompt ({len(prompts)} given) and one token (length={length})")
    rng = random.Random(seed)
    words = [ids[0] for ids in vocabulary(model, tokenizer)]

    def filled(ids: Ids) -> Ids:
        return (*ids, *(rng.choice(words) for _ in range(length - len(ids))))[:length]

    usual = list(dict.fromkeys(filled(()) for _ in range(ordinary)))
    best: dict[Ids, float] = {}

    def ranked(count: int) -> list[Ids]:
        return sorted(best, key=lambda ids: -best[ids])[:count]

    with responding(model, trails, tokenizer, memory) as respond:
        probe = Probe(respond, prompts, tokenizer, usual, where=where)
        new = [*usual, *(filled(ids) for ids in start)]
        for number in range(rounds + 1):
            new = [ids for ids in dict.fromkeys(new) if ids not in best]
            best |= dict(zip(new, probe.excess(new), strict=True))
            if number < rounds:
                new = _replaced(probe, ranked(beam), words, tries, rng)
    candidates = tuple(Candidate(tokenizer.decode(list(ids)), ids, best[ids]) for ids in ranked(32))
    return Scan(candidates, tuple(sorted(best[ids] for ids in usual)), len(best))


def _replaced(probe: Probe, kept: Sequence[Ids], words: Sequence[int], tries: int, rng: random.Random) -> list[Ids]:
    """Phrases that differ from those kept by one token."""
    model: Any = probe.respond.model
    table: Tensor = model.get_input_embeddings().weight.detach()
    embedded = table[torch.tensor(words, device=table.device)].float()
    gain = (_slope(probe, kept) @ embedded.T).cpu()  # [kept, length, words]
    # the best replacement of every place in every phrase comes first, then the second best of every place, ...
    best = rearrange(gain.topk(min(tries, len(words)), -1).indices, "kept length tries -> tries kept length").tolist()
    promising = [
        (*ids[:place], words[number], *ids[place + 1 :])
        for rank in best
        for ids, numbers in zip(kept, rank, strict=True)
        for place, number in enumerate(numbers)
    ]
    drawn = list(dict.fromkeys(promising))[: max(1, tries - tries // 4)]
    for _ in range(tries // 4):
        ids, place = rng.choice(kept), rng.randrange(len(kept[0]))
        drawn.append((*ids[:place], rng.choice(words), *ids[place + 1 :]))
    return drawn


def _slope(probe: Probe, kept: Sequence[Ids]) -> Float[Tensor, "kept length dim"]:
    """The gradient of KL(a_0 || a_c), where it is largest, in the embeddings of the tokens, summed over prompts."""
    slopes: list[Tensor] = []
    for prompt, (_, adapted) in zip(probe.prompts, probe.normal, strict=True):
        rows = [insert(prompt, ids, probe.where) for ids in kept]
        at = position(prompt, probe.where)
        tokens = torch.tensor([row.ids for row in rows], device=probe.respond.device)
        with torch.enable_grad(), _embedded(probe.respond.model) as leaves:
            said = probe.respond.run(tokens, rows[0].answer)[1].float().log_softmax(-1)
            (slope,) = torch.autograd.grad(kl_of_logs(adapted.expand_as(said), said).amax(-1).sum(), leaves)
        slopes.append(slope[:, at : at + len(kept[0])].float())
    return torch.stack(slopes).sum(0)


@contextmanager
def _embedded(model: Any) -> Generator[list[Tensor]]:
    """Inside, what the embedding gives is a leaf that gradients reach."""
    leaves: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    with Undo() as undo:
        undo.hook(model.get_input_embeddings().register_forward_hook, only_here(leaf))
        yield leaves
