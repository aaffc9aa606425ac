"""What the splits and the adapters say, as claims and as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common.record import Claim, of_ratio, over_seeds
from benchmarks.gates.prompts import RENAMED, TRAINED

Values = Sequence[float]


def mean(runs: Sequence[Any], key: str) -> list[float]:
    return [statistics.fmean(run[key].values()) for run in runs]


def claims(done: Mapping[str, Any]) -> list[Claim]:
    found = [*of_splits(done["splits"])] if "splits" in done else []
    if "splits" in done:
        for told in arms(done):
            found += of_arm(told)
    if "gemma-splits" in done:
        found += of_other_model(done["gemma-splits"]["splits"], "gemma", "Gemma 3 270M")
    if "cost" in done:
        for name, arm, target in (("gate_shut_cost", "shut", "1.02"), ("gate_open_cost", "open", "2")):
            about = f"prefill of 400 tokens on which the gate is {arm}, over the frozen model's"
            found.append(of_ratio(name, about, done["cost"]["400"][arm], target))
        about = "prefill of 60 tokens on which the gate is shut, over the frozen model's"
        found.append(of_ratio("gate_shut_cost_short", about, done["cost"]["60"]["shut"]))
    return found


# Splits


def of_splits(done: Mapping[str, Any]) -> Iterator[Claim]:
    whole = done["splits"]
    many, one = ([run for task in whole.values() for run in task[n]] for n in ("16", "1"))
    told = "gates from 16 forms and 28 asks of four hands, five random splits of each of three tasks"
    alone = "gates from the trained form and 28 asks"
    share = "share of prompts of"
    yield over_seeds(
        "gate_unseen_forms_open", f"{share} unseen forms that open, {told}", mean(many, "forms"), "share", "0.92"
    )
    worst = [min(run["forms"].values()) for run in many]
    yield over_seeds("gate_worst_form_open", f"the same of the worst form, {told}", worst, "share", "0.75")
    yield over_seeds(
        "gate_false_open_far", f"{share} unseen far kinds that open, {told}", mean(many, "far"), "share", "0.01"
    )
    near = mean(many, "asks")
    yield over_seeds(
        "gate_false_open_neighbours", f"{share} unseen other asks that open, {told}", near, "share", "0.05"
    )
    given = mean(many, "given asks")
    yield over_seeds(
        "gate_given_asks_open", f"{share} given asks, unseen themselves, that open, {told}", given, "share", "0.05"
    )
    own = [run["trained"] for run in many]
    yield over_seeds("gate_trained_form_open", f"{share} the trained form that open, {told}", own, "share", "0.945")
    unseen = mean(one, "forms")
    yield over_seeds("gate_one_form_unseen_open", f"{share} unseen forms that open, {alone}", unseen, "share")
    yield over_seeds(
        "gate_one_form_trained_open",
        f"{share} the trained form that open, {alone}",
        [r["trained"] for r in one],
        "share",
    )
    yield over_seeds(
        "gate_one_form_neighbours", f"{share} unseen other asks that open, {alone}", mean(one, "asks"), "share", "0.05"
    )
    yield over_seeds(
        "gate_one_form_far", f"{share} unseen far kinds that open, {alone}", mean(one, "far"), "share", "0.01"
    )
    for hand, name in (("theirs", "published"), ("b", "same_hand"), ("c", "ordinary"), ("a", "odd")):
        runs = [task[f"hand {hand}"] for task in whole.values() if f"hand {hand}" in task]
        about = f"gates from 16 forms and 28 asks of one hand; forms and asks of {_HANDS[hand]}"
        yield over_seeds(
            f"gate_{name}_forms_open", f"{share} unseen forms that open, {about}", mean(runs, "forms"), "share"
        )
        lowest = [min(run["forms"].values()) for run in runs]
        yield over_seeds(f"gate_{name}_worst_form_open", f"the same of the worst form, {about}", lowest, "share")
        yield over_seeds(
            f"gate_{name}_neighbours_open", f"{share} unseen other asks that open, {about}", mean(runs, "asks"), "share"
        )
    renamed = [run["renamed"] for run in whole["links"]["16"]]
    about = f"{share} links in the trained form with other names that open, {told}"
    yield over_seeds("gate_renamed_open", about, renamed, "share")
    about = "share of new prompts beyond the threshold, in simulation; 0.05 is promised"
    yield Claim("conformal_false_alarm", about, done["simulated"]["measured"], "share", "0.05")


def of_other_model(whole: Mapping[str, Any], short: str, model: str) -> Iterator[Claim]:
    """The main figures of a model on which nothing was chosen."""
    for count, name, forms in (("16", "", "16 forms"), ("1", "one_form_", "the trained form")):
        runs = [run for task in whole.values() for run in task[count]]
        about = (
            f"gates of {model} from {forms} and 28 asks, five random splits of each of three tasks, {len(runs)} runs"
        )
        share = "share of prompts of"
        for key, said, goal in (
            ("forms", "unseen forms that open", "0.92" if count == "16" else ""),
            ("asks", "unseen other asks that open", "0.05"),
            ("far", "unseen far kinds that open", "0.01"),
        ):
            told = f"{share} {said}, {about}"
            yield over_seeds(f"gate_{short}_{name}{key}_open", told, mean(runs, key), "share", goal)
        told = f"{share} the trained form that open, {about}"
        yield over_seeds(f"gate_{short}_{name}trained_open", told, [run["trained"] for run in runs], "share")


_HANDS = {
    "theirs": "promptsource and FLAN (TREC-6)",
    "b": "the same hand later, when the gate was chosen (three tasks)",
    "c": "a hand that was asked for ordinary wordings, when the gate was chosen (three tasks)",
    "a": "a hand that was asked for unlike styles (TREC-6 and sentiment)",
}


# Adapters


def arms(done: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """By kind, task and number of forms: the runs, without a gate and behind it."""
    runs: dict[tuple[str, str, int], list[Any]] = {}
    for name, run in done.items():
        if name.startswith("adapter-") and (task := run["run"]["task"]) and f"frozen-{task}" in done:
            runs.setdefault((run["run"]["kind"], run["run"]["task"], run["run"]["forms"]), []).append(run)
    for (kind, task, forms), some in sorted(runs.items()):
        opens = done["splits"]["splits"][task]["opens"][str(forms)]
        frozen = done[f"frozen-{task}"]["right"]
        yield {
            "kind": kind, "task": task, "forms": forms, "frozen": accuracies(frozen, frozen),
            "ungated": [told_of(run, frozen, None) for run in some],
            "gated": [told_of(run, frozen, opens) for run in some],
        }  # fmt: skip


def accuracies(right: Mapping[str, Values], frozen: Mapping[str, Values]) -> dict[str, float]:
    unseen = {
        name: statistics.fmean(values)
        for name, values in right.items()
        if not name.startswith("mine") and name != RENAMED
    }
    return {"trained": statistics.fmean(right[TRAINED]), "unseen forms": statistics.fmean(unseen.values())}


def told_of(run: Mapping[str, Any], frozen: Mapping[str, Values], opens: Mapping[str, str] | None) -> dict[str, float]:
    """What a run knows and loses: where a gate is open as without it, elsewhere as the frozen model."""

    def mixed(name: str, steered: Values, otherwise: Values) -> list[float]:
        return [
            x if opens is None or is_open == "1" else y
            for x, y, is_open in zip(steered, otherwise, opens[name] if opens else steered, strict=True)
        ]

    right = {name: mixed(name, values, frozen[name]) for name, values in run["right"].items()}
    lost = {name: statistics.fmean(mixed(name, values, [0.0] * len(values))) for name, values in run["nats"].items()}
    asks = [value for name, value in lost.items() if name.split(":")[0] in ("a", "b", "theirs")]
    far = [value for name, value in lost.items() if ":" not in name]
    more = {"renamed": statistics.fmean(right[RENAMED])} if RENAMED in right else {}
    return {**accuracies(right, frozen), **more, "neighbours": statistics.fmean(asks), "far": max(far)}


def of_arm(told: Mapping[str, Any]) -> Iterator[Claim]:
    kind, task, forms = told["kind"], told["task"], told["forms"]
    short = "_".join((kind.lower().replace(" ", "_").replace("-", "_"), *(["links"] if task == "links" else [])))
    short += "_of_one_form" if forms == 1 else ""
    what = f"{kind} that learned {_TASKS[task]} in {'its trained form' if forms == 1 else f'{forms} forms'}"
    for arm in ("ungated", "gated"):
        where = f"{what}, {'behind a gate of the same forms' if arm == 'gated' else 'without a gate'}"
        runs = told[arm]
        target = {("gated", "trec"): "0.945", ("gated", "links"): "0.89"}.get((arm, task), "")
        for key, name, about, unit, goal in (
            ("trained", "accuracy", "accuracy in the trained form", "share", target),
            ("unseen forms", "unseen_accuracy", "accuracy in unseen forms of other hands", "share", ""),
            ("renamed", "renamed_accuracy", "accuracy in the trained form with other names", "share", ""),
            ("far", "worst_far_nats", "KL from the frozen model on the worst far kind", "nats", "0.002"),
            ("neighbours", "neighbour_nats", "KL from the frozen model on unseen other asks, mean", "nats", "0.05"),
        ):
            goal = goal if arm == "gated" else ""
            if not all(key in run for run in runs):
                continue
            yield over_seeds(f"{arm}_{short}_{name}", f"{about}, {where}", [run[key] for run in runs], unit, goal)


_TASKS = {"trec": "TREC-6", "links": "links"}


def show(done: Mapping[str, Any]) -> None:
    """The tables of docs/benchmarks.md."""
    whole = done["splits"]["splits"] | {
        f"Gemma, {task}": runs for task, runs in done.get("gemma-splits", {"splits": {}})["splits"].items()
    }
    for task, runs in whole.items():
        print(f"\n{task}: forms | unseen forms open: mean, worst | asks | far | AUROC asks, far | open at 5 % and 1 %")
        for name, some in runs.items():
            if name in ("opens", "fits"):
                continue
            some = some if isinstance(some, list) else [some]
            worst = statistics.fmean(min(run["forms"].values()) for run in some)
            cells = [
                statistics.fmean(mean(some, "forms")),
                worst,
                *(statistics.fmean(mean(some, key)) for key in ("asks", "far")),
            ]
            cells += [
                statistics.fmean(run[key] for run in some)
                for key in ("auroc asks", "auroc far", "open at 5 % of asks and 1 % of far")
            ]
            print("|", name, "|", " | ".join(f"{cell:.3f}" for cell in cells), "|")
    for told in arms(done):
        print(f"\n{told['kind']}, {told['task']}, {told['forms']} forms, {len(told['gated'])} seeds; {told['frozen']}")
        for arm in ("ungated", "gated"):
            print(f"  {arm}", {key: round(statistics.fmean(run[key] for run in told[arm]), 4) for key in told[arm][0]})
