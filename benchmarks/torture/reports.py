"""What people reported of like tools, tried on this one: does it work right, is it refused clearly, or is it wrong?

    run()["public_reports_right"]       # the share that is right or refused

One function for each report of a public thread (REPORTS), on tiny random models: it returns whether what came out is
right, and may let the package refuse, with words that say why. Anything else is wrong: another number, another error.
"""

from __future__ import annotations

import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tokenpaths as tp
from benchmarks.torture import reports_hosts as hosts
from benchmarks.torture.reports_models import (
    IDS,
    SMALL,
    base,
    close,
    examples,
    generated,
    llama,
    moving,
    rendering_tokenizer,
    scores,
    train,
)

Verdict = Literal["right", "refused", "wrong"]
Check = Callable[[], bool]


def dropout_at_inference() -> bool:
    model, trails = llama(), tp.TrailMap({tp.Site(1, tp.Last(1) | tp.Answer()): tp.LoReFT(32, rank=4, dropout=0.5)})
    list(tp.steps(model, trails, [tp.Imitate(examples())], steps=5, lr=3e-2, batch_size=4, progress=False))
    with tempfile.TemporaryDirectory() as folder:
        trails.save(Path(folder) / "a.safetensors", model)
        loaded = tp.TrailMap.load(Path(folder) / "a.safetensors", model=model)
    return all(_equal_calls(model, each) for each in (trails, loaded))


def _equal_calls(model: Any, trails: tp.TrailMap) -> bool:
    with torch.no_grad(), tp.attach(model, trails):
        first = model(IDS).logits
        return all(torch.equal(first, model(IDS).logits) for _ in range(3))


def compiled_before_attach() -> bool:
    model, trails = llama(), moving(tp.All())
    expected = scores(model, trails)
    with torch.no_grad():
        function = torch.compile(lambda ids: model(ids).logits, backend="eager")
        function(IDS)
        with tp.attach(model, trails):
            right = close(function(IDS), expected)
        model.forward = torch.compile(model.forward, backend="eager")
        _ = model(IDS).logits
        return right and close(scores(model, trails), expected)


def threads() -> bool:
    from concurrent.futures import ThreadPoolExecutor

    model, trails = llama(), moving(tp.Last(1) | tp.Answer())
    prompts = [torch.randint(3, 96, (1, n)) for n in (5, 9, 14, 20)]
    with tp.attach(model, trails, everywhere=True):  # as from the main thread: these checks run in one of their own
        wanted = [generated(model, prompt) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            jobs = [
                (pool.submit(generated, model, p), w) for _ in range(8) for p, w in zip(prompts, wanted, strict=True)
            ]
            return all(job.result() == want for job, want in jobs)


def cached_and_not() -> bool:
    return all(_caches(make()) for make in hosts.FAMILIES.values())


def _caches(model: Any) -> bool:
    """Cached decoding against decoding without a cache, as near as the frozen model's own."""
    error = (_logits(model, True) - _logits(model, False)).abs().max()
    for rule in (tp.Answer(), tp.First(1), tp.Prompt(), tp.Last(1)):
        with tp.attach(model, moving(rule, width=model.config.hidden_size)):
            if (_logits(model, True) - _logits(model, False)).abs().max() > 10 * error + 1e-4:
                return False
    return True


def _logits(model: Any, cache: bool) -> Tensor:
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache)
    told = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(told.logits)


def left_padding() -> bool:
    model, trails = llama(), moving(tp.Last(1) | tp.Answer())
    short = IDS[:, 3:]
    both = torch.cat([IDS, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.ones_like(both)
    mask[1, :3] = 0
    with tp.attach(model, trails):
        alone = [generated(model, IDS), generated(model, short)]
        told = model.generate(both, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return [row.tolist()[IDS.shape[1] :] for row in told] == [a[0][-6:] for a in alone]


def packed_rows() -> bool:
    model, seen = llama().train(), list[int]()
    trails = tp.TrailMap({tp.Site(1, tp.Last(1)): tp.LoReFT(32, rank=2)})
    trails.trails[0].register_forward_hook(lambda trail, args, out: seen.append(args[0].numel() // 32))
    ids = torch.randint(3, 96, (1, 11))
    labels = ids.clone()
    labels[0, :4] = labels[0, 6:9] = -100
    row = dict(input_ids=ids, position_ids=torch.tensor([[*range(6), *range(5)]]), attention_mask=torch.ones_like(ids))
    with tp.trainable(model, trails):
        model(**row, labels=labels)
    return sum(seen) == 2


def packed_rows_attached() -> bool:
    with tp.attach(llama(), moving(tp.Last(1))) as handle:
        handle.host.model(torch.randint(3, 96, (1, 11)), position_ids=torch.tensor([[*range(6), *range(5)]]))
    return False


def labels_without_a_prompt() -> bool:
    rows = [dict(input_ids=row, labels=row) for row in torch.randint(3, 96, (8, 9)).tolist()]
    trails = tp.TrailMap({tp.Site(1, tp.Last(1)): tp.LoReFT(32, rank=2)})
    before = [p.detach().clone() for p in trails.parameters()]
    train(llama(), trails, rows)
    return any(not torch.equal(a, b) for a, b in zip(before, trails.parameters(), strict=True))


def assistant_turns() -> bool:
    tokenizer = rendering_tokenizer()
    chat = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}, {"role": "assistant", "content": "yo"}]
    (example,) = tp.encode([chat], tokenizer)
    return sum(example.answer) >= 1 and example.ids[0] == tokenizer.bos_token_id


def classification() -> bool:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).eval()
    model.config.pad_token_id = 0
    rows = torch.cat([IDS, torch.cat([IDS[:, 2:], torch.zeros(1, 2, dtype=torch.long)], 1)])
    mask = torch.ones_like(rows)
    mask[1, -2:] = 0
    with torch.no_grad(), tp.attach(model, moving(tp.Last(1))):
        both = model(rows, attention_mask=mask).logits
        alone = torch.cat([model(IDS).logits, model(IDS[:, 2:]).logits])
    return close(both, alone)


def new_head() -> bool:
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=2)).eval()
    trails = tp.TrailMap({tp.Site(1, tp.Last(1)): tp.LoReFT(32, rank=2)})
    rows = [dict(input_ids=torch.randint(3, 96, (6,)).tolist(), attention_mask=[1] * 6, labels=i % 2) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        head = model.score.weight.detach().clone()
        train(model, trails, rows, folder, learns=model.score)
        changed = not torch.equal(head, model.score.weight)
        files = list(Path(folder).rglob("*.safetensors"))
        saved = any("score" in key for file in files for key in safe_open(file, "pt").keys())  # noqa: SIM118
    return saved or not changed


def resized_vocabulary() -> bool:
    model = llama()
    trails = moving(tp.Tokens([97]))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trails.save(Path(folder) / "a.safetensors", model)
        model.resize_token_embeddings(100)
        tp.TrailMap.load(Path(folder) / "a.safetensors", model=model)
    ids = torch.cat([IDS, torch.tensor([[97]])], 1)
    return any("was made for" in str(w.message) for w in caught) and not close(
        scores(model, trails, ids), base(model, ids)
    )


REPORTS: dict[int, tuple[Check, str]] = {  # what is done, and what a refusal must say; "" where it must work
    1: (dropout_at_inference, ""),
    2: (compiled_before_attach, "compile"),
    4: (threads, ""),
    5: (cached_and_not, "cache"),
    6: (left_padding, ""),
    7: (packed_rows, "pack"),
    8: (packed_rows_attached, "pack"),
    9: (labels_without_a_prompt, "prompt|label|chooses no token"),
    10: (assistant_turns, ""),
    11: (classification, ""),
    12: (new_head, "also|requires? a gradient|frozen"),
    13: (resized_vocabulary, ""),
    14: (hosts.vision_without_a_prompt_mask, ""),
    15: (hosts.vision_generates, ""),
    16: (hosts.shared_keys_and_values, ""),
    17: (hosts.four_dimensional_states, "residual streams side by side"),
    18: (hosts.hidden_states_and_drift, ""),
    19: (hosts.states_while_writing, ""),
    20: (hosts.preference_loss, ""),
    21: (hosts.continuous_batching, "generate_batch|continuous batching"),
    22: (hosts.shared_layers, "blocks"),
    23: (hosts.encoder_and_decoder, ""),
    24: (hosts.rendered_prompt, ""),
    25: (hosts.forgetful_template, "does not extend"),
    27: (hosts.behind_a_frozen_cache, "cache"),
    28: (hosts.second_turn_on_a_kept_cache, ""),
    29: (hosts.thinking_budget, ""),
    30: (hosts.trails_keep_their_dtype, ""),
    31: (hosts.one_token_of_ragged_rows, ""),
    32: (hosts.merged_while_attached, "module|merge"),
    33: (hosts.a_reward_head_runs, ""),
    34: (hosts.drift_without_a_cone, "cone"),
    35: (hosts.guidance_and_lookup, ""),
}


def verdict(check: Check, words: str, seconds: float = 300) -> tuple[Verdict, str]:
    """What becomes of a report, and what was said. A check that does not return is wrong, and left behind."""
    found: list[tuple[Verdict, str]] = []
    worker = threading.Thread(target=lambda: found.append(_tried(check, words)), daemon=True)
    worker.start()
    worker.join(seconds)
    return found[0] if found else ("wrong", f"it did not return within {seconds:g} s")


def _tried(check: Check, words: str) -> tuple[Verdict, str]:
    torch.manual_seed(0)
    try:
        return ("right", "") if check() else ("wrong", "another result")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        refused = (
            words and isinstance(error, (ValueError, TypeError, RuntimeError)) and re.search(words, str(error), re.I)
        )
        return ("refused" if refused and _is_ours(error) else "wrong"), said


def _is_ours(error: BaseException) -> bool:
    """Whether the package itself raised it, and not what it called."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and "/tokenpaths/" in last.tb_frame.f_code.co_filename


def run() -> dict[str, Any]:
    """Every report tried, and the share that is right or refused."""
    found = {number: (check.__name__, *verdict(check, words)) for number, (check, words) in REPORTS.items()}
    good = sum(what != "wrong" for _, what, _ in found.values())
    listed = [dict(report=n, name=name, verdict=what, said=said[:200]) for n, (name, what, said) in found.items()]
    return {"public_reports_right": good / len(found), "reports": listed}


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=1))
