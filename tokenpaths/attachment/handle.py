"""Put trails to work in a model, and take them away.

`attach` hooks a model in place; it stays the same object, and `model(...)`, `model.generate(...)`, a Trainer or a
pipeline remain the user's own calls. While attached, each forward runs in three steps:

1. the **watcher** of the model finds out which tokens there are, which are padding, and which are the prompt;
2. each attachment turns its token rules into masks over the tokens of this forward: its **plan**;
3. at each place, `h` becomes `h + trail(h)` where the mask is set, and stays bit for bit what it was elsewhere.

Only what moves is paid for: the chosen tokens are gathered, moved and written into a copy of the states; where all are
chosen nothing is gathered, and where none is, as while decoding under `Last(1)`, the states go by untouched.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from tokenpaths.attachment.deciding import check_gate
from tokenpaths.attachment.laid import Attachment, attachments
from tokenpaths.attachment.planning import Spans
from tokenpaths.attachment.rows import Mixed, RowsOfAdapter
from tokenpaths.attachment.runs import close_runs
from tokenpaths.site import Host
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate
from tokenpaths.undo import Undo


def attach(
    model: nn.Module,
    trails: Adapter,
    *,
    when: Gate | None = None,
    alone: bool = False,
    strength: float = 1.0,
    rows: Sequence[int] | None = None,
    spans: Spans | None = None,
    tokenizer: Any = None,
    everywhere: bool | None = None,
) -> Attachment:
    """Put trails to work in a model, in place, until the returned handle is removed or its `with` block ends.

    At the tokens that a site's rule chooses, a state h becomes h + strength * trail(h). A model may carry several
    attachments. A later one reads the states as the earlier ones have moved them, and so do all foreign hooks. Gradient
    checkpointing needs the trails until `backward()` is done.

    Args:
        model: a Hugging Face model. If torch.compile has compiled it, give what torch.compile returned.
        trails: what is laid where, or several adapters as one (`Together`). An adapter of another kind, such as
            `PeftAdapter`, is at work by itself: attached, it is so in the rows alone that a gate opens, or that `rows`
            names.
        when: a gate, which decides once for each prompt: the row is moved, prompt and answer, or it is the frozen
            model's to the bit. Unless given, `trails.gate` if there is one.
        alone: of the attachments that are made so, as for several tasks, a request gets one at most: of those whose
            gates open for it, that of the highest score.
        strength: multiplies every displacement. It may be changed at run time: `handle.strength = 0.5`.
        rows: the rows of the batch that are moved; all unless given. Several maps with different rows give each row its
            own trails.
        spans: for `Span` rules, the (start, stop) of each row, counted in real tokens.
        tokenizer: for `Match` rules, which read the decoded text.
        everywhere: whether forwards of all threads are moved (True), or of this thread or task of an event loop alone
            (False), and of what takes its context along, as `asyncio.to_thread` does. Unless given, what the main
            thread attaches moves all. What another thread attaches moves that thread's forwards, and a forward of a
            third thread, of which it cannot be told whether it is meant, raises `RuntimeError`.

    Raises:
        TypeError: `trails` is no adapter, `when` is no gate, or another argument is not of its kind.
        ValueError: a strength that is not finite, a site that the model does not have or that is named twice, a trail
            of another width, or parameters that are not finite; a gate of another model; an adapter that is no
            `TrailMap` with a strength, with spans, or with neither gate nor rows; `alone` without a gate. Nothing is
            changed then. In a forward: the prompt that a gate must read is not known.
        RuntimeError: this very map is attached already, or another task has attached one. In a forward: a hooked
            module was replaced, or torch.compile meets a gate.
    """
    attachment = _made(model, trails, when, alone, strength, rows, spans, tokenizer, everywhere)
    try:
        attachment.lay()
    except BaseException:
        attachment.remove()
        raise
    return attachment


@contextmanager
def attaching(model: nn.Module, trails: Adapter, *, gated: bool = True, **options: Any) -> Generator[Attachment]:
    """Inside, trails are attached, by the options of `attach`. An interruption at any moment takes them away.

    Not `gated`, their gate is held open.
    """
    with Undo() as undo:
        attachment = _made(model, trails, gated=gated, **options)
        undo.add(attachment.remove)
        attachment.lay()
        yield attachment


def attached(model: nn.Module) -> list[Attachment]:
    """The handles on all trails that are attached to a model, oldest first, whoever attached them."""
    return attachments(model)


def detach(model: nn.Module) -> None:
    """Take away all trails that are attached to a model, whoever attached them, and end the runs that train over it."""
    close_runs(model)
    for attachment in reversed(attachments(model)):
        attachment.remove()


def working(
    model: nn.Module, trails: Adapter, tokenizer: Any = None, *, everywhere: bool | None = False, gated: bool = True
) -> AbstractContextManager[object]:
    """Inside, trails are attached, unless they are already. An adapter of another kind must lie in the model by itself.

    They move the forwards of this thread alone, unless `everywhere` says otherwise, as in `attach`. Not `gated`, their
    gate is held open, as for training.

    Raises `ValueError` as `attach` and `Adapter.check` do, and for trails that are attached behind a gate which is to
    be held open.
    """
    laid = _laid(model, trails)
    if not gated and any(one.gate is not None for one in laid):
        raise ValueError(
            "the trails are attached behind a gate, which would leave out the rows that it shuts: take them away first "
            "(tp.detach(model)), train, and attach them behind the gate again"
        )
    if laid:
        return nullcontext()
    if trails.items():
        return attaching(model, trails, gated=gated, tokenizer=tokenizer, everywhere=everywhere)
    trails.check(model)
    return attaching(model, trails, everywhere=everywhere) if gated and trails.gate is not None else nullcontext()


def is_attached(model: nn.Module, trails: Adapter) -> bool:
    """Whether this very map is attached to the model, and moves the forwards of this thread."""
    return bool(_laid(model, trails))


def _laid(model: nn.Module, trails: Adapter) -> list[Attachment]:
    return [attachment for attachment in attachments(model) if attachment.trails is trails and attachment.acts()]


def _made(
    model: nn.Module, trails: Adapter, gate: Gate | None = None, *args: Any, gated: bool = True, **options: Any
) -> Attachment:
    """An attachment that is not laid yet. Raises as `attach`."""
    if not isinstance(trails, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"attach takes a TrailMap, not {type(trails).__name__}: {_instead(trails)}")
    gate = trails.gate if gate is None and gated else gate
    host = Host.of(model, trails.blocks)
    if gate is not None:
        check_gate(gate, host)
    if trails.items():
        return (Attachment if len(trails.members) == 1 else Mixed)(host, trails, gate, *args, **options)
    return RowsOfAdapter(host, trails, gate, *args, **options)


def _instead(given: object) -> str:
    """What to do with something that is no map of trails."""
    if hasattr(given, "peft_config"):
        return "a PEFT model is made an adapter by tp.lab.peers.PeftAdapter(peft_model), which needs no attach"
    return "wrap a dict as TrailMap({...})"
