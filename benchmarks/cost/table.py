"""The table, the claims and the picture of what steering costs."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common.clock import ratio
from benchmarks.common.record import Claim, of_ratio


def claims(found: dict[str, Any], shape: str) -> list[Claim]:
    """Of one model: what has been measured of it."""
    what = f"{shape}, LoReFT rank 4"
    step = "time of a training step, 224 prompt and 32 answer tokens"
    steps = [
        ("train_all_layers_vs_pyreft", "all", "pyreft", f"{step}, all layers and tokens, over pyreft's", "<= 0.80"),
        ("train_all_layers_vs_lora", "all", "lora all linear", f"{step}, all layers and tokens, over LoRA's r=8 on all "
         "linear maps", "<= 0.80"),
        ("train_upper_half_vs_pyreft", "upper", "pyreft", f"{step}, upper half of the layers, second epoch on, over "
         "pyreft's", "<= 0.50"),
        ("train_shared_prompt_vs_pyreft", "shared prompt", "pyreft", f"{step}, Last(1) | Answer(), 200 tokens of the "
         "prompt shared by all, second epoch on, over pyreft's", "<= 0.25"),
    ]  # fmt: skip
    made = [
        of_ratio(name, f"{told}; {what}", part["ratios"][peer], target)
        for name, task, peer, told, target in steps
        if (part := found.get(f"steps/{shape}/{task}"))
    ]
    if part := found.get(f"steps/{shape}/all"):
        counted = part["flops"]["ours"] / part["flops"]["lora all linear"]
        told = f"FLOPs of a training step, all layers and tokens, over those of LoRA r=8 on all linear maps; {what}"
        made.append(Claim("flops_all_layers_vs_lora", told, counted, "ratio", "<= 0.83"))
    if part := found.get(f"stay/{shape}/all"):
        told = f"time of a training step with Stay on 2 x 128 tokens over that without, all layers and tokens; {what}"
        made.append(of_ratio("stay_overhead", told, part["ratios"]["step and Stay"], "<= 1.15"))
        told = "time of a training step with a drift reading of 2 x 128 tokens over that without, all layers and tokens"
        made.append(
            of_ratio("drift_each_step_overhead", f"{told}; {what}", part["ratios"]["step and drift"], "<= 1.15")
        )
        told = "LoRA: time of a training step with KL to disable_adapter() on 2 x 128 tokens over that without; "
        made.append(of_ratio("lora_stay_overhead", told + shape, part["ratios"]["lora and KL"]))
    if part := found.get(f"forward/{shape}"):
        told = f"time of a steered forward over a frozen one, all layers and tokens; {what}"
        made.append(of_ratio("forward_overhead", told, part["ratios"]["frozen"], "<= 1.02"))
    if part := found.get(f"decode/{shape}"):
        lengths = part["lengths"]
        pooled = [[t for n in lengths for t in lengths[n]["seconds"][name]] for name in ("Last(1)", "frozen")]
        told = f"time of a decoded token over the frozen model's, Last(1) on all layers, cache of 64 to 2048; {what}"
        made.append(of_ratio("decode_overhead", told, ratio(*pooled), "<= 1.005"))
    if part := found.get(f"memory/{shape}/all"):
        told = f"peak memory of training over that of LoRA, both above what the process holds before; {what}"
        made.append(Claim("peak_memory_vs_lora", told, part["ratios"]["lora all linear"], "ratio", "< 1"))
    epochs = next((n for n in (3, 1) if f"arms/{shape}/own prompts/{n}" in found), None)
    if part := found.get(f"arms/{shape}/own prompts/{epochs}"):
        # the kinder of the two for a peer: in few epochs a cone that is not shared may cost more than it saves
        apart = min(("separate", "no cone"), key=lambda name: statistics.median(part["seconds"][name]))
        each = "with a cone each" if apart == "separate" else "without one, which took less than with a cone each"
        told = f"time of eight learning rates that share one Cone over eight runs {each}"
        told = f"{told}; Last(1) | Answer(), epochs of two steps: {epochs}; {what}"
        made.append(of_ratio("eight_arms_ratio", told, part["ratios"][apart], "<= 0.6"))
    return made


def picture(found: dict[str, Any]) -> Any:
    """Training steps by arm, the curves of cost, and decoding against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    bars, curves, tokens = figure.subplots(1, 3)
    tasks = [task for task in ("all", "upper", "shared prompt") if f"steps/smollm2/{task}" in found]
    for number, task in enumerate(tasks):
        seconds = found[f"steps/smollm2/{task}"]["seconds"]
        places = [i + 0.27 * (number - 1) for i in range(len(seconds))]
        bars.barh(places, [statistics.median(s) for s in seconds.values()], height=0.25, label=task)
        bars.set_yticks(range(len(seconds)), list(seconds))
    bars.invert_yaxis()
    bars.set_xlabel("CPU seconds of a training step")
    for name, curve in found.get("scale/smollm2", {}).items():
        sizes = [int(n) for n in curve["seconds"]]
        medians = [statistics.median(s) for s in curve["seconds"].values()]
        curves.plot(sizes, medians, "o-", label=f"{name}: exponent {curve['exponent']['slope']:.2f}", markersize=3)
    curves.set(xscale="log", yscale="log", xlabel="tokens, layers, sites or rank", ylabel="CPU seconds of our step")
    curves.set_ylim(top=60)  # room for the legend
    lengths = found.get("decode/smollm2", {}).get("lengths", {})
    for name in ("Last(1)", "Last(1) | Answer()"):
        ratios = [part["ratios"][name] for part in lengths.values()]
        at = [int(n) for n in lengths]
        tokens.plot(at, [r["median"] for r in ratios], "o-", label=name, markersize=3)
        tokens.fill_between(at, [r["low"] for r in ratios], [r["high"] for r in ratios], alpha=0.2)
    tokens.set(xscale="log", xlabel="tokens in the cache", ylabel="a token, steered over frozen")
    tokens.axhline(1, color="grey", linewidth=1, linestyle=":")
    for axes in (bars, curves, tokens):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper left" if axes is curves else "best")
    figure.suptitle("What steering costs (SmolLM2-135M, one thread)")
    return figure
