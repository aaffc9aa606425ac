"""Drift over any number of texts, measured in one pass and in memory that does not grow.

    meter = Meter(*runs(model, trails), sets=(cka,))
    print(meter.over(batches).report())

The report does not depend on the order of the texts, on how they are split into batches, or on which of several meters,
merged afterwards, reads which text. Measures are plain functions, and any of them may be your own:

    measures                (before: Reading, after: Reading) -> [n] or [layers, n]
    quantities              (reading) -> [n] or [layers, n]: of both runs, and its change
    sets                    (x: [tokens, d], y: [tokens, d]) -> float: of each layer, on a sample of tokens
    set_quantities          (x: [tokens, d]) -> float: of both runs
    attention               (p: [heads, n, n], q: [heads, n, n]) -> [heads, n]: of the maps of each layer
    attention_quantities    (p: [heads, n, n]) -> [heads, n]: of both runs, and its change

NaN means that a token has no such number. In the report a function goes by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tokenpaths.attachment.handle import working
from tokenpaths.checking import as_whole, quoted
from tokenpaths.data.examples import Batch, Example, collate
from tokenpaths.drift.attention import read_attention
from tokenpaths.drift.measures import (
    confidence,
    correct,
    cosine_shift,
    displacement,
    flips,
    kl,
    layer_names,
    massive,
    moved,
    nll,
)
from tokenpaths.drift.report import Drift, Measured, MeasuredSet, RunName
from tokenpaths.drift.sample import Sample
from tokenpaths.drift.tally import Numbers, Tally, text_key, text_weights
from tokenpaths.drift.texts import check_functions, examples_of
from tokenpaths.drift.totals import Totals
from tokenpaths.engine.batches import by_length, shown
from tokenpaths.engine.cone.cone import Cone
from tokenpaths.engine.forwards import check_known
from tokenpaths.engine.reach import reached
from tokenpaths.engine.readings import Reading, Run, read, runs
from tokenpaths.site.host import check_model
from tokenpaths.trailmap.adapter import Adapter, check_adapter
from tokenpaths.undo import tidy

Measure: TypeAlias = Callable[[Reading, Reading], Tensor]
Quantity: TypeAlias = Callable[[Reading], Tensor]
SetMeasure: TypeAlias = Callable[[Tensor, Tensor], float]
SetQuantity: TypeAlias = Callable[[Tensor], float]
AttentionMeasure: TypeAlias = Callable[[Tensor, Tensor], Tensor]
AttentionQuantity: TypeAlias = Callable[[Tensor], Tensor]
_Named: TypeAlias = dict[tuple[str, RunName], Tensor]  # what was measured, by name and run

MEASURES: tuple[Measure, ...] = (kl, flips, displacement, cosine_shift)
QUANTITIES: tuple[Quantity, ...] = (nll,)


class Meter:
    """Reads two runs over batches, and keeps running summaries of what its functions measure.

    Args:
        before: the frozen run.
        after: the run to be compared with it.
        measures: functions of two readings.
        quantities: functions of one reading.
        sets: functions of two sets of states.
        set_quantities: functions of one set of states.
        attention: functions of two attention maps.
        attention_quantities: functions of one attention map.
        sample: the number of tokens that set measures are computed on.
        keep_massive: sample also tokens with massive activations after a block (Sun et al. 2024). Most models have them
            at the first token, and a set measure would see little else. The report counts them in any case.
        seed: draws the sample and the bootstrap.

    Raises:
        ValueError: two functions have one name, a function has no name, or `sample` is below 1.
    """

    def __init__(
        self,
        before: Run,
        after: Run,
        *,
        measures: Sequence[Measure] = MEASURES,
        quantities: Sequence[Quantity] = QUANTITIES,
        sets: Sequence[SetMeasure] = (),
        set_quantities: Sequence[SetQuantity] = (),
        attention: Sequence[AttentionMeasure] = (),
        attention_quantities: Sequence[AttentionQuantity] = (),
        sample: int = 1024,
        keep_massive: bool = False,
        seed: int = 0,
    ) -> None:
        check_functions(
            measures=measures,
            quantities=quantities,
            sets=sets,
            set_quantities=set_quantities,
            attention=attention,
            attention_quantities=attention_quantities,
        )
        self.before, self.after = before, after
        self.measures, self.quantities = tuple(measures), tuple(quantities)
        self.sets, self.set_quantities = tuple(sets), tuple(set_quantities)
        self.attention, self.attention_quantities = tuple(attention), tuple(attention_quantities)
        every = (measures, quantities, sets, set_quantities, attention, attention_quantities)
        names = tuple(_name(function) for functions in every for function in functions)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two functions go by the name {twice[0]!r}: a report could not tell them apart")
        if as_whole("sample", sample, None) < 1:
            raise ValueError(f"sample is {sample}, but it is the number of tokens for set measures: at least 1")
        self.totals = Totals(names, seed, keep_massive, Sample(sample if sets or set_quantities else 0))

    def read(self, batch: Batch) -> None:
        """Run both models over a batch, and measure.

        Raises `ValueError` as `engine.read` does, for a function that gives another shape or infinity, and for
        a model whose layers are not those of earlier batches.
        """
        seen: dict[int, dict[str, _Named]] = {}

        def see(layer: str, row: int, p: Tensor, q: Tensor) -> None:
            found: _Named = {(_name(f), ""): f(p, q) for f in self.attention}
            for f in self.attention_quantities:
                found |= _both(_name(f), f(p), f(q))
            seen.setdefault(row, {})[layer] = found

        if self.attention or self.attention_quantities:
            pairs = read_attention(self.before, self.after, batch, see)
        else:
            pairs = read(self.before, self.after, batch)
        self.totals.counts["reached"] += int(reached(self.before, self.after, batch).sum())
        for row in range(len(pairs)):
            before, after = pairs.pop(0)  # so that the log-probabilities of one text live at a time
            self._add(before, after, {**self._measure(before, after), **self._by_head(seen.get(row, {}))})

    def over(self, batches: Iterable[Batch], *, progress: bool = False) -> Meter:
        """Read batch after batch, with trails laid in once, and with a progress bar if asked."""
        with self.before.ready(), self.after.ready():
            for batch in shown(batches, "drift", progress):
                self.read(batch)
        return self

    def merge(self, other: Meter | Totals) -> None:
        """Add what another meter has read of other texts. A meter in another process sends its `totals`.

        Raises `ValueError` if it has other functions, settings or layers.
        """
        self.totals.merge(other.totals if isinstance(other, Meter) else other)

    def report(self) -> Drift:
        """What was found until now. Raises `ValueError` if nothing was read."""
        totals, tokens = self.totals, self.totals.counts["tokens"]
        if not tokens:
            raise ValueError("the meter has read no texts: call read(batch) or over(batches) first")
        return Drift(
            figures=tuple(
                Measured(name, run, totals.layers[name], tally.summaries(), tally.by_position())
                for (name, run), tally in totals.tallies.items()
            ),
            sets=tuple(self._set_figures()),
            calibration=(totals.before.error(), totals.after.error()),
            answers=int(totals.before.count.sum()),
            moved=totals.counts["moved"] / tokens,
            massive=totals.counts["massive"] / tokens,
            tokens=tokens,
            texts=totals.counts["texts"],
            reached=max(totals.counts["reached"], totals.counts["moved"]) / tokens,
        )

    def _measure(self, before: Reading, after: Reading) -> _Named:
        found: _Named = {(_name(f), ""): f(before, after) for f in self.measures}
        for f in self.quantities:
            found |= _both(_name(f), f(before), f(after))
        for (name, _), values in found.items():
            if values.shape[-1:] != before.ids.shape or values.ndim > 2:
                raise ValueError(
                    f"{name} gave shape {list(values.shape)} for a text of {len(before.ids)} tokens: a measure gives "
                    "one number a token, or one a layer and token"
                )
            names = layer_names(before, len(values)) if values.ndim == 2 else ()
            self._check(name, tuple(names), values)
        return found

    def _by_head(self, seen: dict[str, _Named]) -> _Named:
        """The figures of all layers of a text, a row for each layer and head."""
        found: _Named = {}
        for key in next(iter(seen.values()), {}):
            parts = {layer: figures[key] for layer, figures in seen.items()}
            rows = tuple(f"{layer} head {head}" for layer, part in parts.items() for head in range(len(part)))
            found[key] = torch.cat(list(parts.values()))
            self._check(key[0], rows, found[key])
        return found

    def _check(self, name: str, layers: tuple[str, ...], values: Tensor) -> None:
        earlier = self.totals.layers.setdefault(name, layers)
        if earlier != layers:
            raise ValueError(f"{name} has the layers {layers}, but had {earlier} for earlier texts")
        if bool(values.isinf().any()):
            raise ValueError(f"{name} is infinite at a token: return NaN where a token has no such number")

    def _add(self, before: Reading, after: Reading, found: _Named) -> None:
        totals = self.totals
        key = text_key(_content(before), totals.seed)
        weights = text_weights(key)
        offsets = np.arange(len(before.ids)) - (int(before.prompt.sum()) - 1)
        for figure, values in found.items():
            rows = _numbers(torch.atleast_2d(values))
            if figure not in totals.tallies:
                totals.tallies[figure] = Tally.empty(len(rows))
            totals.tallies[figure].add(rows, offsets, weights)
        large = _massive(before)
        if self.sets or self.set_quantities:
            totals.sample.add(key, before, after, torch.ones_like(large) if totals.keep_massive else ~large)
        answered = before.answer.roll(-1)  # the tokens that predict an answer token; the first one never is such
        if bool(answered.any()):
            for calibration, reading in ((totals.before, before), (totals.after, after)):
                calibration.add(*(_numbers(f(reading)[answered]) for f in (confidence, correct)))
        totals.counts.update(
            texts=1, tokens=len(before.ids), moved=int(moved(before, after).sum()), massive=int(large.sum())
        )

    def _set_figures(self) -> list[MeasuredSet]:
        found: list[MeasuredSet] = []
        for layer, (x, y) in self.totals.sample.sets().items():
            for f in self.sets:
                found.append(_set_figure(_name(f), "", layer, f, x, y))
            for f in self.set_quantities:
                found += [_set_figure(_name(f), "before", layer, f, x), _set_figure(_name(f), "after", layer, f, y)]
        return found


@tidy
def measure_drift(
    model: nn.Module,
    trails: Adapter,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    max_length: int = 256,
    batch_size: int = 4,
    progress: bool = False,
    measures: Sequence[Measure] = MEASURES,
    quantities: Sequence[Quantity] = QUANTITIES,
    sets: Sequence[SetMeasure] = (),
    cone: Cone | bool | None = None,
) -> Drift:
    """Measure how far `trails` move `model` on `texts`. A `Meter` has more kinds of measures.

    The model is left as it was, with the trails attached or not.

    Args:
        model: the model.
        trails: a `TrailMap`, attached or not, or an adapter of another kind that lies in the model.
        texts: a string is prompt throughout: `Last(1) | Answer()` moves its last token only, and the report then says
            "cannot tell". An `Example` keeps its border between prompt and answer; `data.split_texts` makes such of
            texts, and `encode` of pairs. LoRA moves every token: compare on examples.
        tokenizer: for strings, and for `Match` rules.
        max_length: strings are cut to this many tokens.
        batch_size: texts in one forward.
        progress: show a progress bar.
        measures: functions of two readings, such as those of `tokenpaths.drift`, or your own.
        quantities: functions of one reading.
        sets: functions of two sets of states, which are sampled (see `Meter`).
        cone: a `Cone` keeps what the frozen model makes of the texts, for when they are read again: after more steps,
            or with other trails. An adapter without sites is measured without it. None and False compute everything.

    Raises:
        ValueError: no texts, strings without a tokenizer, a text of fewer than two tokens, or tokens that the model
            does not know.
        TypeError: an argument is of another kind.
    """
    check_model(model)
    check_adapter(trails)
    if cone is not None and cone is not False and not isinstance(cone, Cone):
        raise TypeError(f"cone={quoted(cone)} must be a Cone, which keeps states for the next call, or None or False")
    texts = examples_of(texts, tokenizer, max_length)
    check_known("drift", model, texts)  # before anything is attached
    sparing = cone.over(model, trails.blocks) if isinstance(cone, Cone) and trails.sites else nullcontext()
    with working(model, trails, tokenizer), sparing:
        meter = Meter(*runs(model, trails), measures=measures, quantities=quantities, sets=sets)
        return _measured(meter, texts, tokenizer, max_length, batch_size, progress)


@tidy
def compare(
    before: nn.Module | Run,
    after: nn.Module | Run,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    max_length: int = 256,
    batch_size: int = 4,
    progress: bool = False,
    measures: Sequence[Measure] = MEASURES,
    quantities: Sequence[Quantity] = QUANTITIES,
    sets: Sequence[SetMeasure] = (),
) -> Drift:
    """Measure how far a model or run is from any other: two checkpoints, a merged model, an adapter on and off.

        compare(Run(lora, lora.disable_adapter), lora, texts, tokenizer)

    Args:
        before: the model or run that is compared with.
        after: the model or run whose drift is measured.
        texts: as in `measure_drift`, and so are the arguments that follow.
        tokenizer: for strings.
        max_length: strings are cut to this many tokens.
        batch_size: texts in one forward.
        progress: show a progress bar.
        measures: functions of two readings.
        quantities: functions of one reading.
        sets: functions of two sets of states.

    Raises:
        ValueError: as `measure_drift`, and for models whose layers, widths or vocabularies differ.
    """
    for model in (before, after):
        if not isinstance(model, Run):
            check_model(model)
    first, second = (run if isinstance(run, Run) else Run(run) for run in (before, after))
    meter = Meter(first, second, measures=measures, quantities=quantities, sets=sets)
    return _measured(meter, texts, tokenizer, max_length, batch_size, progress)


def _measured(
    meter: Meter,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    progress: bool,
) -> Drift:
    examples = examples_of(texts, tokenizer, max_length)
    for run in (meter.before, meter.after):
        check_known("drift", run.model, examples)
    rows = by_length([len(example) for example in examples], as_whole("drift: batch_size", batch_size))
    batches = [collate([examples[i] for i in batch]) for batch in rows]
    return meter.over(batches, progress=progress).report()


def _both(name: str, before: Tensor, after: Tensor) -> _Named:
    return {(name, "before"): before, (name, "after"): after, (name, "change"): after - before}


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise ValueError(f"{function!r} has no __name__ to go by in the report: define it with def")
    return name


def _numbers(values: Tensor) -> Numbers:
    return values.detach().to("cpu", torch.float64).numpy()


def _content(reading: Reading) -> bytes:
    """What tells a text from others: its tokens, and which are of the prompt and of the answer."""
    marks = 2 * reading.prompt.long() + reading.answer.long()
    return torch.stack([reading.ids.long(), marks]).cpu().numpy().tobytes()


def _massive(reading: Reading) -> Tensor:
    """Tokens [n] with massive activations after some block."""
    blocks = [name.startswith("block") for name in reading.states]
    return massive(reading.norms[torch.tensor(blocks, device=reading.norms.device)]).any(0)


def _set_figure(name: str, run: RunName, layer: str, f: Callable[..., float], *states: Tensor) -> MeasuredSet:
    try:
        return MeasuredSet(name, run, layer, float(f(*states)), len(states[0]))
    except ValueError as error:  # too few tokens for this measure, say: the others stand
        return MeasuredSet(name, run, layer, float("nan"), len(states[0]), str(error))
