"""How many model families hold all laws: every law of `tests/laws.py` on a tiny random model of each."""

from __future__ import annotations

from families import FAMILIES
from laws import holds_all_laws

from benchmarks.common.record import Claim, write


def main() -> None:
    failed = {name: holds_all_laws(name) for name in FAMILIES}
    for name, laws in failed.items():
        print(name, "holds all laws" if not laws else f"fails {', '.join(laws)}", flush=True)
    claim = Claim(
        id="families_holding_all_laws",
        claim=f"model families, of {len(FAMILIES)} tried, whose tiny random model holds every law",
        measured=sum(not laws for laws in failed.values()),
        unit="families",
        target="at least 24 decoders, 3 encoders, an encoder-decoder and ViT",
    )
    write("families", failed, [claim], seed=0)


if __name__ == "__main__":
    main()
