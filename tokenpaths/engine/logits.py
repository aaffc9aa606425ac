"""Logits only where they are needed, and never many at once.

    logits = logits_at(model, lambda: model(**inputs), rows)     # nothing has gone through the output embedding yet
    loss = logits.sum(cross_entropy, targets) / len(logits)      # it does here, a few tokens at a time

A batch of 8 x 2048 tokens and 128 000 words has 8 GiB of logits in float32, and as much again for their softmax and
their gradient, while what is wanted of them is one number a token. So the output embedding W is given the chosen hidden
states alone, a chunk at a time, and each chunk's gradient W^T dterm/dlogits is formed beside its value: what is kept
for the backward is as large as the hidden states, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.hooks import Hook
from tokenpaths.site.host import is_compiled_itself, output_embedding
from tokenpaths.undo import Undo

CHUNK = 64 * 2**20  # bytes of float32 logits at one time


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits of n tokens, made when they are asked for: `logits[2:5]`, `logits.sum(term)`.

    `head` makes them of `states`, as the model's own forward would have; `vocab` is the number of words.
    """

    states: Float[Tensor, "n width"]
    head: Callable[[Tensor], Tensor]
    vocab: int

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> Float[Tensor, "m vocab"]:
        """The logits of a stretch of tokens, in float32 at least. `logits[:]` is all of them, at once."""
        logits = self.head(self.states[rows])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def chunks(self, at_once: int | None = None) -> list[slice]:
        """Stretches of at most `at_once` tokens, or as many as fill 64 MiB in float32, that are all tokens in turn."""
        size = at_once or max(1, CHUNK // (4 * self.vocab))
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def sum(
        self, term: Callable[..., Tensor], *targets: Tensor | Logits, at_once: int | None = None
    ) -> Float[Tensor, ""]:
        """sum_i term(logits_i, targets_i), its gradient flowing to the model, with few rows of logits at any time.

        Args:
            term: a function of (logits [m, vocab], targets [m, ...]) that gives one number a row, shape [m]. It is
                differentiated by its logits and by nothing else.
            targets: what it is given beside the logits, an entry a token. Other `Logits` become their rows of logits.
            at_once: the most rows of logits at one time; as many as fill 64 MiB in float32 unless given.

        There is no second derivative.

        Raises:
            ValueError: `at_once` below 1, targets for another number of tokens or such as require a gradient, which
                would be lost, or a `term` that gives other than one number a row.
        """
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once={at_once} must be at least 1, or None for as many rows as fill 64 MiB")
        for target in targets:
            if len(target) != len(self):
                raise ValueError(f"{len(target)} targets for the logits of {len(self)} tokens: give one for each")
            needs = target if isinstance(target, Tensor) else target.states
            if torch.is_grad_enabled() and needs.requires_grad:
                raise ValueError("a target requires a gradient, which it would not get: detach it")
        states, chunks = self.states, self.chunks(at_once)
        parts = [target.to(states.device) if isinstance(target, Tensor) else target for target in targets]

        def value(some: Tensor, chunk: slice) -> Tensor:
            each = term(Logits(some, self.head, self.vocab)[:], *(part[chunk] for part in parts))
            if each.shape != some.shape[:1]:
                raise ValueError(
                    f"the term gave shape {list(each.shape)} for {len(some)} rows: one number a row is due"
                )
            return each.sum()

        if torch.is_grad_enabled() and states.requires_grad:
            total: Any = _Sum.apply(states, value, chunks)
            return total
        return _added((value(states[chunk], chunk) for chunk in chunks), states)


def logits_at(model: nn.Module, call: Callable[[], Any], rows: Bool[Tensor, "batch seq"]) -> Logits:
    """The logits of chosen tokens, in order of row and column. `call()` runs the model once and returns its output.

    Where a model's output is what its output embedding returned, that embedding runs when the `Logits` are used. Where
    the model does more to it (a soft cap, a scale), where the embedding is trained or hooked, and inside DDP or FSDP,
    the chosen logits are made in the forward, as one matrix. Where the model is compiled or has no output embedding,
    the logits of all tokens are.

    Raises:
        ValueError: the logits that the model gave are not those of the tokens that `rows` is a mask of.
    """
    head = _output_embedding(model)
    with _choosing(head, rows, later=head is not None and _is_free(model, head)):
        output = call()
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    if isinstance(logits, _Later):
        if logits.made is None:
            return logits.logits
        logits = logits.made
    if logits.ndim == 3 and logits.shape[:2] == rows.shape:  # no hook of ours has seen the output embedding
        logits = logits[rows.to(logits.device)]
    elif logits.ndim != 2 or len(logits) != int(rows.sum()):
        raise ValueError(
            f"{type(model).__name__} gave logits of shape {list(logits.shape)}, where {int(rows.sum())} of "
            f"{list(rows.shape)} tokens were asked for: let it give the logits of every token"
        )
    return Logits(logits, _unchanged, logits.shape[-1])


def cross_entropy(logits: Float[Tensor, "m vocab"], targets: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """-log p(target), in nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def kl_from(logits: Float[Tensor, "m vocab"], frozen: Float[Tensor, "m vocab"]) -> Float[Tensor, " m"]:
    """KL(p || q) = sum p (log p - log q), in nats, where p is that of the logits `frozen` and q that of `logits`."""
    return F.kl_div(logits.log_softmax(-1), frozen.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def top_k_kl(
    steered: Float[Tensor, "n vocab"],
    top: Float[Tensor, "n k"],
    words: Int[Tensor, "n k"],
    rest: Float[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """KL(p || q) from the k likeliest words of p and one word for all others, and the most that it can be too low by.

        sum_top p log(p / q)  +  p_rest log(p_rest / q_rest)   <=   KL   <=   the same + missed
        missed = p_rest (max_{i in rest} log(q_rest / q_i) + min(0, log(min_top p / p_rest)))

    By the log-sum inequality what it lacks is p_rest KL(p | rest || q | rest), whose entropy is log(p_rest / min_top p)
    at least, since no word of the rest is likelier than one of the top.

    Args:
        steered: log q.
        top: the k largest of log p, in any order.
        words: their ids.
        rest: log p_rest, the log-probability of all other words together.

    Raises:
        ValueError: k is not less than the number of words, so that nothing rests: take `kl_from`.
    """
    if top.shape[-1] >= steered.shape[-1]:
        raise ValueError(f"the top {top.shape[-1]} of {steered.shape[-1]} words leave no rest: compare all, by kl_from")
    others = steered.scatter(-1, words, -torch.inf)
    rest_q, p_rest = others.logsumexp(-1), rest.exp()
    known = (top.exp() * (top - steered.gather(-1, words))).sum(-1)
    known = known + torch.where(p_rest > 0, p_rest * (rest - rest_q), 0)
    least = steered.scatter(-1, words, torch.inf).amin(-1)
    missed = p_rest * (rest_q - least + (top.amin(-1) - rest).clamp_max(0))
    return known, torch.where(p_rest > 0, missed, 0).clamp_min(0)


class _Sum(torch.autograd.Function):
    """The sum of a value over chunks of states. The gradient of each is formed beside it, so none waits in a graph."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, value: Callable[[Tensor, slice], Tensor], chunks: list[slice]) -> Tensor:
        gradient = torch.empty_like(states)

        def values() -> Generator[Tensor]:
            for chunk in chunks:
                with torch.enable_grad():
                    some = states[chunk].detach().requires_grad_()
                    found = value(some, chunk)
                    (gradient[chunk],) = torch.autograd.grad(found, some)
                yield found.detach()

        ctx.save_for_backward(gradient)
        return _added(values(), states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would be taken for a constant
            raise RuntimeError("Logits.sum has no second derivative: apply the term to logits[:], which are whole")
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None


def _added(values: Iterable[Tensor], states: Tensor) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device))


class _Later(Tensor):
    """Stands in a model's output for logits that are not made, until something is done to it.

    Whatever a model does to its logits after the output embedding (a soft cap, a scale, a hook that reads them) is thus
    done to the chosen ones, whole; and that nothing was done is known from their not being made.
    """

    logits: Logits
    learning: bool
    made: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.contiguous:  # what OPT does to its logits
            return args[0]
        return func(*map(_real, args), **{name: _real(value) for name, value in (kwargs or {}).items()})


def _real(value: Any) -> Any:
    """A value in which each `_Later` is the logits it stands for."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_real, value))
    if not isinstance(value, _Later):
        return value
    if value.made is None:
        with torch.set_grad_enabled(value.learning):  # a hook may look at them under no_grad, and they are needed after
            value.made = value.logits.head(value.logits.states)
    return value.made


@contextmanager
def _choosing(head: nn.Module | None, rows: Bool[Tensor, "batch seq"], later: bool) -> Generator[None]:
    """Inside, the output embedding is given the chosen hidden states only, as one matrix: or, later, none of them."""
    if head is None:
        yield
        return
    waiting: list[Tensor] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or args[0].ndim != 3 or args[0].shape[:2] != rows.shape:
            return None
        states: Tensor = args[0][rows.to(args[0].device)]
        if later:
            waiting.append(states)
        return (states[:0] if later else states, *args[1:])

    def stand_in(module: nn.Module, args: Any, output: Any) -> Any:
        if not waiting:
            return None
        states = waiting.pop()
        result = torch.empty(0).as_subclass(_Later)
        result.logits = Logits(states, _as_now(module, states.device.type), output.shape[-1])
        result.learning = torch.is_grad_enabled()
        return result

    with Undo() as undo:
        undo.hook(head.register_forward_pre_hook, Hook(choose))
        undo.hook(head.register_forward_hook, Hook(stand_in))
        yield


def _as_now(head: nn.Module, kind: str) -> Callable[[Tensor], Tensor]:
    """The head, run under the autocast that there is now on this kind of device, wherever it is called."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run(states: Tensor) -> Tensor:
        with torch.autocast(kind, dtype, enabled=enabled):
            return head(states)

    return run


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The output embedding; None if there is none, or it is inside a compiled graph, which sees no hook come and go."""
    head = output_embedding(model)
    graphs = [module for module in model.modules() if is_compiled_itself(module)]
    return None if any(part is head for graph in graphs for part in graph.modules()) else head


def _is_free(model: nn.Module, head: nn.Module) -> bool:
    """Whether the head may run apart from the forward: it is frozen, whole and unhooked, in a model that is bare."""
    wrapped = type(model).__module__.startswith("torch.")  # DDP and FSDP read what the forward returns
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = any(getattr(module, name) for module in head.modules() for name in hooks)
    ours = all(type(p) is nn.Parameter and not p.requires_grad for p in head.parameters())  # else sharded or quantised
    return ours and not hooked and not wrapped
