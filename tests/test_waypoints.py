"""Waypoints: targets are the helped model's own states, distances are as defined, and files are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIM, assert_equal, assert_slopes, llama, make_examples, state
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Cone, DiReFT, Example, steps
from tokenpaths.data import collate
from tokenpaths.files import TrailFileError
from tokenpaths.training import Step, Targets, Waypoints, WaypointsAttention, capture_attention, capture_states

Watch = Callable[[nn.Module], nn.Module]
HELP = (7, 8, 9, 10)


def with_help(examples: list[Example], help: tuple[int, ...] = HELP) -> list[Example]:
    """The same examples with tokens before them."""
    return [Example((*help, *e.ids), (False,) * len(help) + e.answer) for e in examples]


def sites_of(model: Any, rule: tp.tokens.Rule | None = None) -> list[tp.Site]:
    return tp.sites(model, "all", tp.Last(1) | tp.Answer() if rule is None else rule)


def eager() -> Any:
    model = llama()
    model.set_attn_implementation("eager")
    return model


def moving(init: Any = "paper") -> tp.TrailMap:
    torch.manual_seed(0)
    return tp.TrailMap({site: DiReFT(DIM, 2, init=init) for site in (tp.Site(0), tp.Site(1))})


def train(model: nn.Module, trails: tp.TrailMap, goals: list[Any], **options: Any) -> list[Step]:
    return list(steps(model, trails, goals, **{"steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, **options}))


def block_states(model: Any, example: Example) -> list[Tensor]:
    """What each block gives for one example alone, read by hooks of this test."""
    found: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, o: found.append(o)) for b in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([example.ids]), prompt_mask=torch.arange(len(example))[None] < example.prompt_length)
    for handle in handles:
        handle.remove()
    return [(o[0] if isinstance(o, tuple) else o)[0] for o in found]


def attention_maps(model: Any, example: Example) -> list[Tensor]:
    """The attention of each block to one example alone, read by hooks of this test."""
    found: list[Tensor] = []
    handles = [b.self_attn.register_forward_hook(lambda m, a, o: found.append(o[1][0])) for b in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([example.ids]))
    for handle in handles:
        handle.remove()
    return found


def frozen(model: Any, read: Callable[[Any, Example], list[Tensor]], example: Example) -> list[Tensor]:
    """Read with a `prompt_mask` that nobody takes out when no trails are attached."""
    with tp.attach(model, moving("identity")):
        return read(model, example)


# --- what is captured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("on_disk", [False, True])
def test_targets_are_the_states_of_the_helped_frozen_model(
    on_disk: bool, batch_size: int, tmp_path: Path, watch: Watch
) -> None:
    model, examples = watch(llama()), make_examples(6)
    helped, path = with_help(examples), tmp_path / "targets.safetensors" if on_disk else None
    targets = capture_states(model, examples, helped, sites_of(model), path=path, batch_size=batch_size)
    assert len(targets) == 6 and examples[0].ids in targets and (1, 2) not in targets
    for plain, help in zip(examples, helped, strict=True):
        given = plain.prompt_length
        for site, whole in enumerate(frozen(model, block_states, help)):
            positions, values = targets.of(plain.ids, site)
            assert positions.tolist() == list(range(given - 1, len(plain)))
            torch.testing.assert_close(values, whole[positions + len(HELP)], rtol=1e-4, atol=1e-3)
        assert targets.count(plain.ids) == 3 * (len(plain) - given + 1)


@pytest.mark.parametrize("stream", ["embedding", "attention", "mlp", "head"])
def test_every_stream_is_captured_where_a_trail_would_move_it(stream: str, watch: Watch) -> None:
    """A trail at the same site that adds v moves the states that are matched by v."""
    model, examples = watch(llama()), make_examples(3)
    head = 1 if stream == "head" else None
    site = tp.Site(0 if stream == "embedding" else 1, tp.Answer(), "attention" if head else stream, head)  # type: ignore[arg-type]
    targets = capture_states(model, examples, examples, [site])  # no help: where they are already
    width = tp.width(model, site)
    trails = tp.TrailMap({site: tp.Additive(width)})
    with torch.no_grad():
        next(iter(trails.parameters())).copy_(torch.randn(width))
    v = next(iter(trails.parameters())).detach()
    with tp.attach(model, trails):
        moved = Waypoints(examples, targets=targets, by="mse").loss(model, trails, collate(examples)).detach()
        with trails.off():
            unmoved = Waypoints(examples, targets=targets, by="mse").loss(model, trails, collate(examples)).detach()
    assert float(unmoved) == pytest.approx(0, abs=1e-9)
    assert float(moved) == pytest.approx(float(v.square().mean()), rel=1e-4)


def test_attention_to_the_help_is_counted_at_the_first_token(watch: Watch) -> None:
    model, examples = watch(eager()), make_examples(5)
    helped = with_help(examples)
    layers = tp.sites(model, "all", tp.Answer(), "attention")
    targets = capture_attention(model, examples, helped, layers, batch_size=2)
    for plain, help in zip(examples, helped, strict=True):
        for site, whole in enumerate(attention_maps(model, help)):
            positions, rows = targets.of(plain.ids, site)
            for p, row in zip(positions.tolist(), rows, strict=True):
                seen = whole[:, p + len(HELP)]
                assert torch.allclose(row[:, 1:], seen[:, len(HELP) + 1 :], atol=1e-6)
                assert torch.allclose(row[:, 0], seen[:, : len(HELP) + 1].sum(-1), atol=1e-6)
                assert torch.allclose(row.sum(-1), torch.ones(len(row)), atol=1e-5)


def test_the_last_prompt_token_may_differ_behind_a_chain(watch: Watch) -> None:
    """Question + chain + answer against question + answer: the answer begins behind the chain's last token."""
    model = watch(llama())
    plain = [Example((3, 4, 5, 20, 21), (False,) * 3 + (True,) * 2)]
    chained = [Example((3, 4, 5, 11, 12, 20, 21), (False,) * 5 + (True,) * 2)]
    targets = capture_states(model, plain, chained, sites_of(model))
    (whole, *_) = frozen(model, block_states, chained[0])
    positions, values = targets.of(plain[0].ids, 0)
    assert positions.tolist() == [2, 3, 4]
    torch.testing.assert_close(values, whole[4:7], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"example 0, .*: token 1 \(4\) is 11 in the helped example"):
        capture_states(model, plain, chained, sites_of(model, tp.Last(2)))


def test_rules_that_read_text_and_spans_choose_what_is_captured(watch: Watch) -> None:
    model = watch(llama())
    plain = [Example((3, 4, 5, 20), (False,) * 3 + (True,), {"cue": (1, 2)})]
    targets = capture_states(model, plain, with_help(plain), [tp.Site(0, tp.Span("cue")), tp.Site(1, tp.Tokens([5]))])
    assert [targets.of(plain[0].ids, site)[0].tolist() for site in (0, 1)] == [[1], [2]]


# --- the distances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["relative", "mse", "cosine"])
def test_distances_are_those_of_the_definition(by: Any, watch: Watch) -> None:
    """From plain forwards, example by example, in float64."""
    model, trails, examples = watch(llama()), moving(), make_examples(6)
    helped = with_help(examples)
    rules = [tp.Last(1) | tp.Answer(), tp.Answer(), tp.All()]
    targets = capture_states(model, examples, helped, [tp.Site(i, rule) for i, rule in enumerate(rules)])
    found: list[float] = []
    for plain, help in zip(examples, helped, strict=True):
        whole = frozen(model, block_states, help)
        with tp.attach(model, trails):
            moved = block_states(model, plain)
        for site, start in enumerate((plain.prompt_length - 1, plain.prompt_length, 0)):
            for p in range(start, len(plain)):
                h, t = moved[site][p].double(), whole[site][p + len(HELP)].double()
                if by == "cosine":
                    found.append(float(1 - (h @ t) / (h.norm() * t.norm())))
                else:
                    found.append(float((h - t).norm() ** 2 / (t.norm() ** 2 if by == "relative" else DIM)))
    goal = Waypoints(examples, targets=targets, by=by)
    for side in ("right", "left"):
        with tp.attach(model, trails):
            loss = goal.loss(model, trails, collate(examples, side=side)).detach()
        assert float(loss) == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert goal.terms(examples) == len(found)


@pytest.mark.parametrize("head", [None, 2])
def test_attention_distances_are_those_of_the_definition(head: int | None, watch: Watch) -> None:
    model, trails, examples = watch(eager()), moving(), make_examples(5)
    helped = with_help(examples)
    layers = [tp.Site(layer, tp.Answer(), "attention", head) for layer in (1, 2)]
    goal = WaypointsAttention(examples, targets=capture_attention(model, examples, helped, layers))
    found: list[float] = []
    for plain, help in zip(examples, helped, strict=True):
        whole = attention_maps(model, help)
        with tp.attach(model, trails):
            moved = attention_maps(model, plain)
        for layer in (1, 2):
            for p in range(plain.prompt_length, len(plain)):
                seen = whole[layer][:, p + len(HELP)].double()
                target = torch.cat([seen[:, : len(HELP) + 1].sum(-1, keepdim=True), seen[:, len(HELP) + 1 :]], -1)
                q = moved[layer][:, p].double()
                kl = (torch.xlogy(target, target) - torch.xlogy(target, q)).sum(-1)
                found.append(float(kl.mean() if head is None else kl[head]))
    for side in ("right", "left"):
        with tp.attach(model, trails):
            loss = goal.loss(model, trails, collate(examples, side=side)).detach()
        assert float(loss) == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_mse_is_the_error_of_the_displacement_of_a_psr_trail(watch: Watch) -> None:
    """The PSR recipe at one layer: h + d against t is d against the activation difference t - h."""
    model, examples = watch(llama()), make_examples(4)
    helped = with_help(examples)
    trail = tp.PSR(DIM, init="paper")
    trails = tp.TrailMap({tp.Site(1): trail})
    targets = capture_states(model, examples, helped, [tp.Site(1)])
    errors: list[Tensor] = []
    for plain, help in zip(examples, helped, strict=True):
        h, t = (frozen(model, block_states, e)[1] for e in (plain, help))
        errors.append((trail(h) - (t[len(HELP) :] - h)).square().mean(-1).detach())
    with tp.attach(model, trails):
        found = Waypoints(examples, targets=targets, by="mse").loss(model, trails, collate(examples)).detach()
    assert float(found) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-4)


@pytest.mark.parametrize("stream", ["embedding", "block", "attention", "mlp"])
def test_what_a_cone_keeps_changes_no_waypoint(stream: Any, watch: Watch) -> None:
    """The second time, blocks below the trails are known, and their insides are looked at all the same."""
    model, trails, examples = watch(llama()), tp.TrailMap({tp.Site(1): DiReFT(DIM, 2, init="paper")}), make_examples(4)
    layers = range(1) if stream == "embedding" else range(3)
    targets = capture_states(model, examples, with_help(examples), tp.sites(model, layers, tp.Answer(), stream))
    goal, found = Waypoints(examples, targets=targets), list[float]()
    with tp.attach(model, trails):
        plainly = float(goal.loss(model, trails, collate(examples)).detach())
        with Cone().over(model):
            found += [float(goal.loss(model, trails, collate(examples)).detach()) for _ in range(3)]
    assert found == pytest.approx([plainly] * 3, rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_trail_reaches_its_waypoints(on_disk: bool, tmp_path: Path, watch: Watch) -> None:
    model, examples = watch(llama()), make_examples(6)
    path = tmp_path / "t.safetensors" if on_disk else None
    targets = capture_states(model, examples, with_help(examples), sites_of(model), path=path)
    torch.manual_seed(0)
    trails = tp.TrailMap({site: DiReFT(DIM, 4) for site in sites_of(model)})
    done = train(model, trails, [Waypoints(examples, targets=targets)], steps=16, batch_size=6, lr=4e-2)
    assert done[-1].losses[0] < 0.5 * done[0].losses[0]


def test_attention_comes_nearer_to_its_waypoints(watch: Watch) -> None:
    model, examples = watch(eager()), make_examples(6)
    layers = tp.sites(model, [1, 2], tp.Answer(), "attention")
    goal = WaypointsAttention(examples, targets=capture_attention(model, examples, with_help(examples), layers))
    trails = tp.TrailMap({tp.Site(0): DiReFT(DIM, 4)})
    done = train(model, trails, [goal], steps=12, batch_size=6, lr=4e-2)
    assert done[-1].losses[0] < 0.9 * done[0].losses[0]


def test_how_examples_are_split_changes_nothing() -> None:
    """Sites of different rules: the loss is a mean over tokens and sites, not over examples."""
    model, examples = llama(), make_examples(8)
    places = [tp.Site(1, tp.Last(1)), tp.Site(2, tp.Answer())]
    targets = capture_states(model, examples, with_help(examples), places)
    trained: list[dict[str, Tensor]] = []
    for shape in (dict(batch_size=4), dict(batch_size=1, accumulate=4)):
        trails = moving("identity")
        train(model, trails, [Waypoints(examples, targets=targets)], steps=2, **shape)
        trained.append(state(trails))
    assert_equal(*trained, 1e-5)


def test_a_goal_that_has_run_may_be_resumed(tmp_path: Path) -> None:
    model, examples = llama(), make_examples(4)
    goal = Waypoints(examples, targets=capture_states(model, examples, with_help(examples), sites_of(model)))
    options: Any = dict(steps=4, checkpoint=tmp_path / "run", save_every=2, progress=False)
    for step in steps(model, moving("identity"), [goal], **options):
        if step.step == 3:
            break
    assert [step.step for step in steps(model, moving("identity"), [goal], resume=True, **options)] == [3, 4]


def test_gradients_agree_with_finite_differences(unchecked: None) -> None:
    model, examples = llama().double(), make_examples(3)
    targets = capture_states(model, examples, with_help(examples), sites_of(model))
    trails = moving().double()
    goal = Waypoints(examples, targets=targets)
    assert_slopes(model, trails, goal, examples)


# --- files ------------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_file_holds_what_memory_holds(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch_size: int, dtype: torch.dtype, attention: bool
) -> None:
    model, examples = eager().to(dtype), make_examples(count)
    layers = tp.sites(model, [0, 2], tp.Answer(), "attention")
    capture = capture_attention if attention else capture_states
    path = tmp_path_factory.mktemp("targets") / "deeper" / "t.safetensors"
    kept = capture(model, examples, with_help(examples), layers, batch_size=batch_size)
    capture(model, examples, with_help(examples), layers, batch_size=batch_size, path=path)
    stored = Targets.load(path)
    assert (stored.kind, stored.sites, stored.widths, stored.base) == (kept.kind, kept.sites, kept.widths, kept.base)
    for example in examples:
        for site in range(2):
            for a, b in zip(stored.of(example.ids, site), kept.of(example.ids, site), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_safetensors_itself_can_read_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load

    model, examples, path = llama(), make_examples(4), tmp_path / "t.safetensors"
    targets = capture_states(model, examples, with_help(examples), sites_of(model), path=path)
    tensors = load(path.read_bytes())
    assert set(tensors) == {
        "keys",
        "lengths",
        "counts",
        *(f"{n} {s}" for n in ("positions", "values") for s in range(3)),
    }
    assert tensors["values 0"].numel() == sum(len(targets.of(e.ids, 0)[0]) for e in examples) * DIM


def test_a_capture_that_fails_leaves_nothing_and_harms_no_older_file(tmp_path: Path, watch: Watch) -> None:
    model, examples, path = watch(llama()), make_examples(6), tmp_path / "t.safetensors"
    capture_states(model, examples, with_help(examples), sites_of(model), path=path)
    before, calls = path.read_bytes(), 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        capture_states(model, examples, with_help(examples), sites_of(model), path=path, batch_size=2)
    handle.remove()
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model, examples, path = llama(), make_examples(4), tmp_path / "t.safetensors"
    capture_states(model, examples, with_help(examples), sites_of(model), path=path)
    whole, damaged = path.read_bytes(), tmp_path / "damaged.safetensors"
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def changed(**note: Any) -> bytes:
        outer = json.loads(header["__metadata__"]["tokenpaths"])
        outer["waypoints"] |= note
        text = json.dumps({**header, "__metadata__": {"tokenpaths": json.dumps(outer)}}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    for content in (
        b"",
        whole[: len(whole) // 2],
        b"\xff" * 100,
        changed(examples=3),
        changed(widths=[DIM, DIM, DIM - 1]),
        changed(sites=[]),
        changed(sites=[{"class": "os.system"}]),
        changed(kind="attention"),
    ):
        damaged.write_bytes(content)
        with pytest.raises(TrailFileError, match=r"damaged.safetensors is no whole file of targets"):
            Targets.load(damaged)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Targets.load(tmp_path / "nowhere")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_captured_is_refused(watch: Watch) -> None:
    model, examples = watch(llama()), make_examples(3)
    helped = with_help(examples)

    def refused(message: str, *, plain: Any = examples, help: Any = helped, at: Any = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            capture_states(model, plain, help, sites_of(model) if at is None else at, **options)

    refused("a helped example for each plain one, not 2 for 3", help=helped[:2])
    refused("not 0 for 0", plain=[], help=[])
    refused("at least one site", at=[])
    refused("example 0 has .* tokens, helped .*: help makes it longer", plain=helped, help=examples)
    refused("example 0: no token of it is chosen", at=[tp.Site(0, tp.Tokens([95]))])
    refused("same tokens, but are not helped or answered alike", plain=[examples[0]] * 2, help=[helped[0], examples[0]])
    with tp.attach(model, moving()) as handle:
        refused(r"trails are at work in the model.*trails.off\(\)")
        with handle.trails.off():
            capture_states(model, examples, helped, sites_of(model))
    with pytest.raises(ValueError, match="captured at sites of stream 'attention'"):
        capture_attention(model, examples, helped, sites_of(model))
    with pytest.raises(ValueError, match=r'set_attn_implementation\("eager"\)'):
        capture_attention(model, examples, helped, tp.sites(model, 0, tp.Answer(), "attention"))


def test_attention_is_looked_at_in_the_layers_of_the_targets_alone() -> None:
    """So that the cone can leave the blocks below out, and no other map is held."""
    model, examples = eager(), make_examples(4)
    targets = capture_attention(model, examples, with_help(examples), tp.sites(model, 2, tp.Answer(), "attention"))
    trails, cone = tp.TrailMap({tp.Site(1, tp.Answer()): tp.Additive(DIM)}), tp.Cone()
    calls: list[int] = []
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    goal = WaypointsAttention(examples, targets=targets)
    list(tp.steps(model, trails, [goal], steps=6, batch_size=4, lr=1e-3, progress=False, cone=cone))
    assert cone.kept.used > 0
    assert len(calls) <= 5  # once for each row, and a short look


def test_the_same_example_twice_is_stored_once() -> None:
    model, examples = llama(), make_examples(2)
    doubled = [*examples, examples[0]]
    targets = capture_states(model, doubled, with_help(doubled), sites_of(model))
    assert len(targets) == 2
    assert float(Waypoints(doubled, targets=targets).terms(doubled)) == sum(targets.count(e.ids) for e in doubled)


def test_goals_that_do_not_fit_their_targets_are_refused(unchecked: None) -> None:
    model, examples = eager(), make_examples(3)
    layers = tp.sites(model, 0, tp.Answer(), "attention")
    states = capture_states(model, examples, with_help(examples), layers)
    maps = capture_attention(model, examples, with_help(examples), layers)
    with pytest.raises(ValueError, match="Waypoints needs targets of capture_states, not of attention"):
        Waypoints(examples, targets=maps)
    with pytest.raises(ValueError, match="WaypointsAttention needs targets of capture_attention, not of states"):
        WaypointsAttention(examples, targets=states)
    with pytest.raises(ValueError, match="example 3 has no targets"):
        Waypoints([*examples, make_examples(4, seed=9)[3]], targets=states)
    with pytest.raises(ValueError, match="by must be 'relative', 'mse' or 'cosine', not 'l1'"):
        Waypoints(examples, targets=states, by="l1")  # type: ignore[arg-type]


def test_targets_of_another_base_are_warned_of_once() -> None:
    model, other, examples = llama(), llama(), make_examples(3)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    targets = capture_states(model, examples, with_help(examples), sites_of(model))
    goal, trails = Waypoints(examples, targets=targets), moving()
    with tp.attach(other, trails):
        with pytest.warns(UserWarning, match="captured from LlamaForCausalLM .* but the model is"):
            goal.loss(other, trails, collate(examples))
        goal.loss(other, trails, collate(examples))
