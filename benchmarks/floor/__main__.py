"""How far is each arm from what this machine could do at best?

The floor of an arm is its FLOPs (torch's counter, from results/cost.json) at the peak of matrix products that is
measured here, in the dtype of the arm; the floor of a decoded token is the bytes of the weights at the peak of reading.
Run it on the machine that ran `benchmarks.cost`, as quiet.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch

from benchmarks.common.clock import timed
from benchmarks.common.folders import RESULTS
from benchmarks.common.options import parser
from benchmarks.common.record import environment, write
from benchmarks.cost.setups import DEVICE, load
from tokenpaths.demo import fast_dtype


def matmul(dtype: torch.dtype, size: int, rounds: int) -> float:
    """FLOPs a second of a square product, the best round."""
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b, rounds)


def linear(dtype: torch.dtype, rows: int, rounds: int) -> float:
    """FLOPs a second of the largest linear map of SmolLM2 that is in every block: what its shape allows."""
    x, weight = torch.randn(rows, 576, device=DEVICE).to(dtype), torch.randn(1536, 576, device=DEVICE).to(dtype)
    return 2 * rows * 576 * 1536 / best(lambda: torch.nn.functional.linear(x, weight), rounds)


def copy(mebibytes: int, rounds: int) -> float:
    """Bytes a second that a copy moves: each is read once and written once."""
    a = torch.ones(mebibytes << 18, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * (mebibytes << 20) / best(lambda: b.copy_(a), rounds)


def read(mebibytes: int, rounds: int) -> float:
    """Bytes a second that a matrix-vector product reads: a decoded token is little else."""
    rows = mebibytes * (1 << 20) // (4096 * torch.finfo(fast_dtype(DEVICE)).bits // 8)
    a, x = (torch.ones(*s, device=DEVICE, dtype=fast_dtype(DEVICE)) for s in ((rows, 4096), (1, 4096)))
    return a.numel() * a.element_size() / best(lambda: torch.nn.functional.linear(x, a), rounds)


def best(call: Any, rounds: int) -> float:
    run = timed(call)
    run()
    return min(run() for _ in range(rounds))


def distances(cost: dict[str, Any], peak: float, bandwidth: float) -> dict[str, dict[str, float]]:
    """For each arm of each part its seconds, its floor, and how many times the floor it takes."""
    found: dict[str, dict[str, float]] = {}
    for name, part in cost.items():
        if name.startswith("steps/"):
            for arm, seconds in part["seconds"].items():
                if arm in part["flops"]:
                    found[f"{name}, {arm}"] = against(seconds, part["flops"][arm] / peak)
        elif name == "decode/smollm2":
            model = load("smollm2")
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            for length, figures in part["lengths"].items():
                for arm, seconds in figures["seconds"].items():
                    found[f"{name}, {length} tokens, {arm}"] = against(seconds, weights / bandwidth)
    return found


def against(seconds: list[float], floor: float) -> dict[str, float]:
    taken = statistics.median(seconds)
    return {"seconds": taken, "floor": floor, "times": taken / floor}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="small sizes, few rounds, and no result file")
    quick = options.parse_args().quick
    torch.set_num_threads(1)
    size, rows, mebibytes, rounds = (256, 256, 16, 3) if quick else (2048, 2048, 512, 15)
    peaks = {
        "matmul_bf16_flops": matmul(torch.bfloat16, size, rounds),
        "matmul_fp32_flops": matmul(torch.float32, size, rounds),
        "linear_bf16_flops": linear(torch.bfloat16, rows, rounds),
        "linear_fp32_flops": linear(torch.float32, rows, rounds),
        "copy_bytes": copy(mebibytes, rounds),
        "read_bytes": read(mebibytes, rounds),
    }
    for name, value in peaks.items():
        print(f"{name}: {value / 1e9:.1f} G a second")
    file = RESULTS / "cost.json"
    if not file.exists():
        raise SystemExit(f"{file} has the FLOPs and seconds of the arms, and is not there: run `benchmarks.cost`")
    cost = json.loads(file.read_text())
    if (here := environment()["hardware"]) != cost["hardware"]:
        raise SystemExit(f"cost.json was measured on {cost['hardware']}, and this is {here}: run both on one machine")
    measured = {name: part["measured"] for name, part in cost["raw"].items()}
    name = "bf16" if fast_dtype(DEVICE) == torch.bfloat16 else "fp32"
    found = distances(measured, peaks[f"matmul_{name}_flops"], peaks["read_bytes"])
    print("\n| arm | seconds | floor | times |\n|---|---|---|---|")
    for arm, d in found.items():
        print(f"| {arm} | {d['seconds']:.4f} | {d['floor']:.4f} | {d['times']:.2f} |")
    if not quick:
        write("floor", {"peaks": peaks, "distances": found}, [], seed=0)


if __name__ == "__main__":
    main()
