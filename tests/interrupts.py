"""Law 12: every verb is interrupted at its calls, one after the other, and must leave the model as it was.

    clean, leaks = interrupted("drift", range(0, 4000, 40))

A profile function raises KeyboardInterrupt at the n-th call or return, of Python or C. A new verb is one line of VERBS:
a function of a `Place`, which holds a tiny model with trails, and returns what can be compared.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import hashlib
import random
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from tiny import llama, make_examples, make_tokenizer, make_trails
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths.data import Choice, Question, Task, Text, collate
from tokenpaths.drift import attention_js
from tokenpaths.engine import read, runs
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods
from tokenpaths.lab.ab import frozen, steered
from tokenpaths.lab.audit import repair, scan, search
from tokenpaths.lab.reasoning import BudgetForcing, clusters, critical, solved_by_generation
from tokenpaths.limits import TrustRegion, strength_curve
from tokenpaths.randomness import own_randomness
from tokenpaths.trailmap import Together
from tokenpaths.trailmap.gate import Gate
from tokenpaths.training.objectives.align import Align, Attempts, sample_chains
from tokenpaths.training.objectives.waypoints import Waypoints, WaypointsAttention, capture_attention, capture_states
from tokenpaths.undo import tidy

KEEPERS = (
    contextvars.ContextVar,
    list,
    dict,
    set,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
)
CHECKERS = ("jaxtyping", "beartype")  # they stand between calls in tests only


# The tiny world


@dataclass
class Place:
    """A tiny model, trails that move it, and what the verbs read; `folder` is for what they write."""

    folder: Path
    lora: bool = False
    model: Any = field(init=False)
    trails: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = llama(300).train()  # and one part in another mode
        self.model.lm_head.eval()
        self.trails = make_trails()
        with torch.no_grad(), own_randomness(3):
            for parameter in self.trails.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        if self.lora:
            self._lay_lora()
        self.numbers = {name: tensor.clone() for name, tensor in self.trails.state_dict().items()}

    def _lay_lora(self) -> None:
        import peft

        from tokenpaths.lab.peers import PeftAdapter

        with own_randomness(0):
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            self.model = peft.get_peft_model(self.model, config)
        self.trails = PeftAdapter(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        return make_tokenizer()

    @property
    def plain(self) -> list[tp.Example]:
        return [tp.Example(e.ids, (False,) * len(e)) for e in make_examples(2, seed=3)]

    @property
    def questions(self) -> list[Question]:
        return [Question("ab c", "d", "x. d."), Question("e", "f", "z. f.")]

    @property
    def ids(self) -> Tensor:
        return torch.tensor([[5, 9, 17, 33, 4]])


def _run(p: Place, **more: Any) -> Any:
    """The user's own forward. That transformers' `no_grad` stays in force when it is interrupted is not ours."""
    return tidy(p.model)(p.ids, **more)


@tidy
def _silent(p: Place) -> Any:
    """The same without gradients. The user's own `no_grad` is not ours either."""
    with torch.no_grad():
        return p.model(p.ids).logits


def _with_attach(p: Place) -> Any:
    with tp.attach(p.model, p.trails):
        return _run(p).logits.detach()


def _handle(p: Place) -> Any:
    handle = tp.attach(p.model, p.trails)
    try:
        return _run(p).logits.detach()
    finally:
        handle.remove()


def _gate() -> Gate:
    """One that opens on every row."""
    gate = Gate((0, 2), ((7, 9), (4,)), 32)
    gate.bias.fill_(1.0)
    return gate


def _gated(p: Place) -> Any:
    with tp.attach(p.model, p.trails, when=_gate()):
        return tidy(p.model.generate)(p.ids, max_new_tokens=2, do_sample=False, pad_token_id=0)


def _together(p: Place) -> Any:
    """Trails beside what PEFT has laid: attached, measured and saved as one."""
    with own_randomness(4):
        both = Together(make_trails(), p.trails)
    with tp.attach(p.model, both, when=_gate()):
        logits = _run(p).logits.detach()
    both.save(p.folder / "both")
    both.restore(p.folder / "both")
    return logits, tp.measure_drift(p.model, both, p.plain)["kl"].mean


def _fit_gate(p: Place) -> Any:
    forms = {form: [form.format(word) for word in "ab cd ef gh ij kl mn op".split()] for form in ("({}) k", "{}?k")}
    found = tp.fit_gate(p.model, p.tokenizer, forms, {"x": ["abc"] * 3}, own=0, near=0.2, trails=p.trails)
    return str(found), list(found.gate.state_dict().values())


def _backward(p: Place) -> Any:
    with tp.attach(p.model, p.trails):
        loss = _run(p, labels=p.ids).loss
        return torch.autograd.grad(loss, list(p.trails.parameters()))


def _generate(p: Place) -> Any:
    with tp.attach(p.model, p.trails):
        return tidy(p.model.generate)(p.ids, max_new_tokens=2, do_sample=False, pad_token_id=0)


def _off(p: Place) -> Any:
    with tp.attach(p.model, p.trails), p.trails.off():
        return _run(p).logits.detach()


def _steps(p: Place, *goals: Any, **more: Any) -> Any:
    goals = goals or (tp.Imitate(make_examples(2)),)
    options: Any = {"steps": 2, "batch_size": 2, "warmup": 0, "progress": False, **more}
    return [step.loss for step in tp.steps(p.model, p.trails, list(goals), **options)]


def _checkpointed(p: Place) -> Any:
    return _steps(p, checkpoint=p.folder / "run", save_every=1)


def _many_goals(p: Place) -> Any:
    goals = [tp.Imitate(make_examples(2)), tp.Stay(p.plain), tp.Replay(make_examples(2))]
    return _steps(p, *goals, steps=1, trust=TrustRegion(p.plain, most=1e-3))


def _align(p: Place) -> Any:
    chains = [tp.Example((5, 6, 7, k), (False, False, True, True)) for k in (8, 9, 10)]
    return _steps(p, Align([Attempts(chains[:2], chains[2:])]), steps=1)


def _waypoints(p: Place) -> Any:
    p.model.set_attn_implementation("eager")
    examples, at = make_examples(2), [tp.Site(1, tp.Answer())]
    states = capture_states(p.model, examples, examples, at)
    maps = capture_attention(p.model, examples, examples, [tp.Site(1, tp.Answer(), "attention")])
    goals = Waypoints(examples, targets=states), WaypointsAttention(examples, targets=maps)
    return _steps(p, *goals, steps=1)


def _trainable(p: Place) -> Any:
    with tp.trainable(p.model, p.trails):
        loss = _run(p, labels=torch.tensor([[-100, -100, -100, 33, 4]])).loss
        loss.backward()
        p.model.save_pretrained(p.folder / "saved")
        return loss.detach()


def _drift(p: Place) -> Any:
    return str(tp.measure_drift(p.model, p.trails, p.plain))


def _cone(p: Place) -> Any:
    return str(tp.measure_drift(p.model, p.trails, p.plain[:1], cone=tp.Cone()))


def _cone_forward(p: Place) -> Any:
    with tp.Cone().over(p.model), tp.attach(p.model, p.trails):
        return _silent(p) + _silent(p)


def _attention(p: Place) -> Any:
    from tokenpaths.drift.meter import Meter

    p.model.set_attn_implementation("eager")
    meter = Meter(*runs(p.model, p.trails), attention=[attention_js])
    meter.read(collate(make_examples(1)))
    return str(meter.report())


def _forgetting(p: Place) -> Any:
    suite = [Task("letters", (Text("abc de"), Text("fgh"))), Task("pairs", (Choice(("ab c", "ab d"), 0, "x"),))]
    return str(tp.forgetting(p.model, p.trails, suite, p.tokenizer))


def _ab(p: Place) -> Any:
    arms = frozen(p.model), steered(p.model, p.trails, name="s")
    asked: Any = {"max_new_tokens": 2, "score": lambda text, question: float(len(text))}
    report = tp.ab_test(*arms, p.questions * 3, p.tokenizer, retention=[Task("t", (Text("abc"),) * 2)], **asked)
    return str(report.answers)


def _way_or_form(p: Place) -> Any:
    asked: Any = {"train": p.questions * 2, "held_out": p.questions, "words": 1, "stop_strings": "!"}
    asked["read_answer"] = lambda text: text.rstrip(".")[-1:]
    return str(tp.way_or_form(p.model, p.trails, p.tokenizer, **asked))


def _faithfulness(p: Place) -> Any:
    asked: Any = {"chains": "given", "options": lambda item: ["d", "f"], "separator": r"(?<=\.) ", "max_new_tokens": 2}
    return str(tp.faithfulness(p.model, p.trails, p.questions, p.tokenizer, **asked))


def _audit(p: Place) -> Any:
    return str(tp.audit(p.model, p.trails, make_examples(3), p.tokenizer, candidates=[(50,), (60, 61)]).scores)


def _scan(p: Place) -> Any:
    return str(scan(p.model, p.trails, make_examples(2), p.tokenizer, [(50,), (60, 61)], ordinary=2))


def _search(p: Place) -> Any:
    asked: Any = {"rounds": 1, "beam": 1, "tries": 2, "ordinary": 2, "length": 1}
    return str(search(p.model, p.trails, make_examples(2), p.tokenizer, **asked))


def _repair(p: Place) -> Any:
    return str(repair(p.model, p.trails, make_examples(2), p.tokenizer, (50,)).excess)


def _repair_lora(p: Place) -> Any:
    done = repair(p.model, p.trails, make_examples(2), p.tokenizer, (50,))
    done.undo()
    return str(done.excess)


def _limit(p: Place) -> tp.TrailMap:
    with own_randomness(0):
        return tp.TrailMap({tp.Site(0, tp.Last(1), stream="embedding"): tp.DiReFT(32, 2, init="paper")})


def _guard(p: Place) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how few states there are
        gates, fits = tp.guard(p.model, _limit(p), make_examples(12), p.plain * 20, batch_size=64)
    return str(fits), list(gates.state_dict().values())


def _confine(p: Place) -> Any:
    with own_randomness(0):
        trails = tp.TrailMap({tp.Site(1): tp.Confined(tp.DiReFT(32, 2, init="paper"), 32, 4)})
    return str(tp.confine(p.model, trails, p.plain * 4, batch_size=64))


def _strength(p: Place) -> Any:
    found = tp.strength_within(p.model, p.trails, p.plain[:1], budget=0.01, halvings=1)
    return str(found), str(strength_curve(p.model, p.trails, p.plain[:1], score=lambda: 1.0, at=(0.5,)))


def _self_samples(p: Place) -> Any:
    path = p.folder / "samples.safetensors"
    return tp.self_samples(p.model, p.tokenizer, 2, max_new_tokens=2, path=path, trails=p.trails)


def _sample_chains(p: Place) -> Any:
    asked: Any = {"read_answer": lambda text: "d", "max_new_tokens": 2}
    return str(sample_chains(p.model, p.questions, p.tokenizer, 2, **asked).questions)


def _written(p: Place) -> Any:
    return str(generate(p.model, make_examples(2), p.tokenizer, max_new_tokens=2, sample=True, seed=1))


def _data(p: Place) -> Any:
    encoded = tp.encode([("ab", "c"), ("d", "e")], p.tokenizer)
    return tp.mix(encoded, p.plain, 0.5)


def _save(p: Place) -> Any:
    p.trails.save(p.folder / "t.safetensors", p.model)
    loaded = tp.TrailMap.load(p.folder / "t.safetensors", model=p.model)
    loaded.restore(p.folder / "t.safetensors")
    return list(loaded.state_dict().values())


def _likelihood(p: Place) -> Any:
    items = encode_choices([Choice((" a", " b c"), 0, "ab"), Choice((" c", " d"), 1, "ab c")], p.tokenizer)
    return str(log_likelihoods(p.model, items, 64))


def _read(p: Place) -> Any:
    return [after.logits for _, after in read(*runs(p.model, p.trails), collate(make_examples(2)))]


def _difficulty(p: Place) -> Any:
    solved = solved_by_generation(p.model, p.questions, p.tokenizer, lambda text: text, max_new_tokens=2)
    return solved, clusters(p.model, ["ab c", "cd", "e f"], p.tokenizer, 2)


def _critical(p: Place) -> Any:
    p.model.set_attn_implementation("eager")
    return str(critical(p.model, make_examples(2), 2))


def _budget_forcing(p: Place) -> Any:
    budget = BudgetForcing(p.tokenizer, p.ids, end="#", max_tokens=2)
    asked: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return tidy(p.model.generate)(p.ids, logits_processor=[budget], **asked)


def _lora_off(p: Place) -> Any:
    with p.trails.off():
        return _silent(p)


def _lora_saved(p: Place) -> Any:
    p.trails.save(p.folder / "lora", p.model)
    p.trails.restore(p.folder / "lora")


def _dual_memory(p: Place) -> Any:
    from tokenpaths.lab.peers import DualMemory

    memory = DualMemory(p.trails)
    memory.update()
    with memory.slow():
        return _silent(p)


def _sc_lora(p: Place) -> Any:
    from tokenpaths.lab.peers import ScLoraConfig, sc_lora

    model = tidy(llama)(300)
    sc_lora(model, ScLoraConfig(r=2, target_modules=["q_proj"]), make_examples(2), p.plain, beta=0.2)


VERBS: dict[str, Callable[[Place], Any]] = {
    "with attach": _with_attach,
    "attach": _handle,
    "behind a gate": _gated,
    "fit_gate": _fit_gate,
    "backward": _backward,
    "generate": _generate,
    "off": _off,
    "steps": _steps,
    "steps with checkpoints": _checkpointed,
    "steps with goals": _many_goals,
    "Align": _align,
    "Waypoints": _waypoints,
    "trainable": _trainable,
    "measure_drift": _drift,
    "measure_drift in a cone": _cone,
    "cone": _cone_forward,
    "attention drift": _attention,
    "forgetting": _forgetting,
    "ab_test": _ab,
    "way_or_form": _way_or_form,
    "faithfulness": _faithfulness,
    "audit": _audit,
    "scan": _scan,
    "search": _search,
    "repair": _repair,
    "guard": _guard,
    "confine": _confine,
    "strength_within": _strength,
    "self_samples": _self_samples,
    "sample_chains": _sample_chains,
    "generate of the engine": _written,
    "mix and encode": _data,
    "save and load": _save,
    "likelihood": _likelihood,
    "read": _read,
    "difficulty": _difficulty,
    "critical": _critical,
    "budget forcing": _budget_forcing,
}
LORA_VERBS: dict[str, Callable[[Place], Any]] = {
    "LoRA: off": _lora_off,
    "LoRA: behind a gate": _gated,
    "LoRA: together with trails": _together,
    "LoRA: steps": _steps,
    "LoRA: measure_drift": _drift,
    "LoRA: repair": _repair_lora,
    "LoRA: save and load": _lora_saved,
    "LoRA: DualMemory": _dual_memory,
    "LoRA: sc_lora": _sc_lora,
}
"""The same, with a PEFT model and its adapter in the place of a model and trails."""
TRAINS = {"steps", "steps with checkpoints", "steps with goals", "Align", "Waypoints", "trainable", "LoRA: steps"}
"""Verbs that may leave trails of another step behind."""


# What must be as it was


def state(place: Place, numbers: bool = True) -> dict[str, Any]:
    """All that a verb must leave as it was, by name; `numbers` says whether the trails' numbers are among it."""
    found: dict[str, Any] = {}
    trained = {id(tensor) for tensor in (*place.trails.parameters(), *place.trails.buffers())}
    for owner, root in (("model", place.model), ("trails", place.trails)):
        for name, module in root.named_modules():
            for key, value in vars(module).items():
                if key != "_factors":  # kept of a weight, and compared with it before it is used
                    found[f"{owner} {name} {key}"] = _value(value)
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            grad = None if tensor.grad is None else _bits(tensor.grad)
            told = numbers or id(tensor) not in trained  # an adapter's own numbers lie in the model too
            found[f"{owner} {name}"] = (id(tensor), tensor.requires_grad, _bits(tensor) if told else None)
            found[f"{owner} {name} grad"] = grad if told else None
    found |= {f"global: {name}": value for name, value in _globals()}
    found["strays"] = sorted(path.name for path in place.folder.rglob("*") if path.name.startswith((".writing", "tmp")))
    return found


def _value(value: Any) -> Any:
    """An attribute of a module, to be compared: by identity, and dictionaries by what they hold."""
    if isinstance(value, dict):
        return {key: _value(entry) for key, entry in value.items()}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple, set)):
        return [_value(entry) for entry in value]
    return id(value)


def _bits(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.detach().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _globals() -> Iterator[tuple[str, Any]]:
    yield "torch's random numbers", _bits(torch.get_rng_state())
    _, numbers, place, *_ = np.random.get_state()
    yield "numpy's random numbers", (place, numbers.tobytes())
    yield "Python's random numbers", hash(random.getstate())
    yield "gradients", torch.is_grad_enabled()
    yield "inference mode", torch.is_inference_mode_enabled()
    yield "autocast", torch.is_autocast_enabled("cpu")
    yield "autocast depth", (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())
    yield "dtype", torch.get_default_dtype()
    yield "function modes", torch._C._len_torch_function_stack()
    yield "dispatch modes", torch._C._len_torch_dispatch_stack()
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        yield kind, list(getattr(nn.modules.module, kind))
    for name, value in _keepers():
        yield name, _value(value.get(None)) if isinstance(value, contextvars.ContextVar) else len(value)


@functools.cache
def _keepers() -> list[tuple[str, Any]]:
    """What the modules of tokenpaths and their classes keep: tables, and variables of a context."""
    found: list[tuple[str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith("tokenpaths"):
            own = [thing for thing in vars(module).values() if isinstance(thing, type) and thing.__module__ == name]
            for owner in (module, *own):
                kept = [
                    pair for pair in list(vars(owner).items()) if isinstance(pair[1], KEEPERS) and pair[0][:2] != "__"
                ]
                found += [(f"{name}.{owner.__name__}.{key}", value) for key, value in kept]
    return found


# To interrupt


@contextmanager
def _quiet() -> Generator[None]:
    """Inside, an interruption of a finaliser, which Python can only print, is not printed."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _is_moment(frame: FrameType, event: str, arg: Any) -> bool:
    """Whether a signal can strike at this event of a profile function.

    Python handles signals after a C call, not before it. So none keeps a lock, which C releases, locked: the threads of
    later tests would wait for it for ever.
    """
    releases = event == "c_call" and arg.__name__ in ("__exit__", "release")
    return not releases and not any(name in frame.f_code.co_filename for name in CHECKERS)


def struck(work: Callable[[], object], number: int) -> bool:
    """Do the work, with KeyboardInterrupt raised at its n-th call or return; whether it came so far.

    Where Python or torch swallows it, as in a finaliser, the work goes on, and may fail by its own error.
    """
    left = number

    def strike(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        left -= _is_moment(frame, event, arg)
        if left < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    with _quiet():
        try:
            try:
                sys.setprofile(strike)
                work()
            finally:
                sys.setprofile(None)
        except BaseException:
            if left >= 0:
                raise
    return left < 0


def calls(work: Callable[[], object]) -> int:
    """How many calls and returns the work has."""
    many = 1 << 60
    left = many

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        left -= _is_moment(frame, event, arg)

    try:
        sys.setprofile(count)
        work()
    finally:
        sys.setprofile(None)
    return many - left


@dataclass
class Subject:
    """One verb, ready to be interrupted. It writes in a folder of its own, until it is closed."""

    name: str

    def __post_init__(self) -> None:
        self.verb = (VERBS | LORA_VERBS)[self.name]
        self._folder = tempfile.TemporaryDirectory()
        self._fresh()
        self.work()  # imports what it needs
        self.reset()
        self.answer = _comparable(self.work())
        self.reset()
        _keepers.cache_clear()
        gc.collect()
        self.before = self.state()

    def _fresh(self) -> None:
        torch.set_grad_enabled(True)
        while torch.autocast_decrement_nesting() >= 0:
            pass
        torch.autocast_increment_nesting()
        self.place = Place(Path(self._folder.name), self.name in LORA_VERBS)
        with torch.no_grad():
            self.place.model(self.place.ids)  # what a model keeps of its first forward
        self.before = self.state()

    def close(self) -> None:
        self._folder.cleanup()

    def state(self) -> dict[str, Any]:
        return state(self.place, self.name not in TRAINS)

    def work(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.verb(self.place)

    def reset(self) -> None:
        """The trails as at first, and no file."""
        for path in self.place.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.name in TRAINS:
            with torch.no_grad():
                for name, tensor in self.place.trails.state_dict().items():
                    tensor.copy_(self.place.numbers[name])
            for parameter in self.place.trails.parameters():
                parameter.grad = None

    @cached_property
    def calls(self) -> int:
        found = calls(self.work)
        self.reset()
        return found

    def leak(self, number: int) -> list[str]:
        """What an interruption at call `number` leaves behind: the names of what is not as it was."""
        if not struck(self.work, number):  # it had fewer calls this time
            self.reset()
            return []
        after = self.state()
        names = self.before.keys() | after.keys()
        found = sorted(name for name in names if self.before.get(name, ...) != after.get(name, ...))
        self.reset()
        if found:
            self._fresh()
        return found

    def works(self) -> bool:
        """Whether it does what it did before it was ever interrupted."""
        found = _comparable(self.work())
        self.reset()
        return found == self.answer


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _bits(value)
    if isinstance(value, (list, tuple)):
        return [_comparable(entry) for entry in value]
    return value if isinstance(value, (int, float, str, type(None))) else repr(value)


def evenly(count: int, points: int) -> Iterable[int]:
    """An even sample of the numbers below `count`: all of them if there are no more than `points`."""
    return range(count) if count <= points else sorted({i * count // points for i in range(points)})
