"""What is laid where: trails at sites, as one module that is trained, saved and attached."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from tokenpaths import files
from tokenpaths.files import TrailFileError
from tokenpaths.site import Host, Site
from tokenpaths.site.fingerprint import describe
from tokenpaths.trailmap import notes
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trails.base import Trail

FILE_NAME = "trails.safetensors"


class TrailMap(Adapter):
    """Trails at their sites: `TrailMap({Site(15, Last(1)): LoReFT(576, rank=4)})`.

    The same trail at two sites is one trail, tied: trained once and stored once. Trails at sites of one layer and
    stream read the same state, and their displacements are added. `blocks` names the block list of a model that has
    several, as in `blocks="encoder.block"`.
    """

    saved_as: ClassVar[str] = FILE_NAME

    def __init__(
        self, trails: Mapping[Site, Trail] | Iterable[tuple[Site, Trail]], *, blocks: str | None = None
    ) -> None:
        super().__init__()
        pairs = _pairs(trails)
        self.sites = tuple(site for site, _ in pairs)
        number = {trail: i for i, trail in enumerate(dict.fromkeys(trail for _, trail in pairs))}
        self.trails = nn.ModuleList(number)
        self.index = tuple(number[trail] for _, trail in pairs)
        self.blocks = blocks
        self.enabled = True

    def items(self) -> list[tuple[Site, Trail]]:
        unique = [trail for trail in self.trails if isinstance(trail, Trail)]
        return [(site, unique[i]) for site, i in zip(self.sites, self.index, strict=True)]

    def __getitem__(self, site: Site) -> Trail:
        found = dict(self.items())
        if site not in found:
            raise KeyError(f"no trail lies at {site}; the sites are {', '.join(map(str, self.sites))}")
        return found[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        blocks = f", blocks={self.blocks!r}" if self.blocks else ""
        return "TrailMap({" + ", ".join(f"{site}: {trail}" for site, trail in self.items()) + "}" + blocks + ")"

    def size(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def off(self) -> AbstractContextManager[None]:
        """Wherever the map is attached, the model is the frozen one while this lasts: `with trails.off(): ...`."""
        return self.switched(False)

    @contextmanager
    def switched(self, on: bool) -> Generator[None]:
        """Inside, the trails move states where the map is attached, or do not."""
        before, self.enabled = self.enabled, on
        try:
            yield
        finally:
            self.enabled = before

    def check(self, model: nn.Module) -> None:
        """Raises `ValueError` for a site that the model does not have; `attach` checks the rest."""
        host = Host.of(model, self.blocks)
        for site in self.sites:
            host.locate(site)

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write one safetensors file, whole or not at all. With `model`, note which base the trails were made for."""
        parameters = list(self.named_parameters(remove_duplicate=False))
        if len({id(parameter) for _, parameter in parameters}) < len(parameters):
            raise ValueError(
                "not saved: a parameter is shared inside the trails; tie whole trails instead, at two sites"
            )
        if fault := notes.fault(self):
            raise ValueError(f"not saved: {fault}")
        note = {
            "trails": [notes.trail_to_note(trail) for trail in self.trails if isinstance(trail, Trail)],
            "sites": [{**notes.site_to_note(s), "trail": i} for s, i in zip(self.sites, self.index, strict=True)],
            "blocks": self.blocks,
            "base": None if model is None else describe(model),
        }
        files.write(path, self.state_dict(), note)

    @torch.no_grad()
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the numbers of a file of these trails, in place. Raises as `load` does."""
        tensors, _ = files.read(path)
        notes.check_shapes(self.state_dict(), tensors)
        self.load_state_dict(tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *classes: type[Trail], model: nn.Module | None = None) -> TrailMap:
        """Read a file that `save` wrote. Pass your own `Trail` classes; no name in a file is ever imported.

        With `model`, warns when the trails were made for other weights. Raises `FileNotFoundError`, and
        `TrailFileError` for a file that is not whole and sound.
        """
        known = notes.named(classes)
        with torch.device("cpu"):
            tensors, note = files.read(path)
        try:
            if set(note) != {"trails", "sites", "blocks", "base"}:
                raise TrailFileError(f"its note has the keys {', '.join(sorted(note)):.120}")
            base = note["base"]
            if base is not None and not (
                isinstance(base, dict)
                and set(base) == {"name", "fingerprint"}
                and all(isinstance(value, str) for value in base.values())
            ):
                raise TrailFileError(f"its base must have a name and a fingerprint, but is {base!r:.80}")
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                # first without memory: a damaged note may ask for any size
                try:
                    with torch.device("meta"):
                        shapes = cls._from_note(note, known).state_dict()
                except TrailFileError:
                    if not classes:  # a class of the caller may need real tensors in its constructor
                        raise
                else:
                    notes.check_shapes(shapes, tensors)
                loaded = cls._from_note(note, known)
                notes.load_parameters(loaded, tensors)
        except (TrailFileError, RecursionError) as error:
            raise TrailFileError(f"{os.fspath(path)}: {error}") from error.__cause__
        if model is not None and base is not None and base["fingerprint"] != (here := describe(model))["fingerprint"]:
            warnings.warn(
                f"{os.fspath(path)} was made for {base['name']} (weights {base['fingerprint']}), but the model given "
                f"is {here['name']} (weights {here['fingerprint']}): measure before you trust the trails on it",
                stacklevel=2,
            )
        return loaded

    @classmethod
    def _from_note(cls, note: dict[str, Any], known: Mapping[str, type[Trail]]) -> TrailMap:
        if not isinstance(note["trails"], list) or not isinstance(note["sites"], list):
            raise TrailFileError("its trails and sites must be lists")
        if note["blocks"] is not None and not isinstance(note["blocks"], str):
            raise TrailFileError(f"its blocks must be a string or null, not {note['blocks']!r:.80}")
        trails = [notes.trail_from_note(trail, known) for trail in note["trails"]]
        pairs: list[tuple[Site, Trail]] = []
        for entry in note["sites"]:
            number = entry.get("trail") if isinstance(entry, dict) else None
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(trails):
                raise TrailFileError(f"a site must name one of the {len(trails)} trails, but is {entry!r:.80}")
            site = notes.site_from_note({key: value for key, value in entry.items() if key != "trail"})
            pairs.append((site, trails[number]))
        try:
            loaded = cls(pairs, blocks=note["blocks"])
        except ValueError as error:
            raise TrailFileError(str(error)) from None
        if len(loaded.trails) != len(trails) or loaded.index != tuple(entry["trail"] for entry in note["sites"]):
            raise TrailFileError("its sites must name every trail, in order")
        return loaded

    def push_to_hub(self, repo: str, model: nn.Module | None = None, *, private: bool | None = None) -> str:
        """Upload the trails to the Hugging Face Hub as `trails.safetensors`; returns the address of the commit."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE_NAME
            self.save(path, model)
            api = HfApi()
            made = api.create_repo(repo, private=private, exist_ok=True)  # with the user's name, where `repo` has none
            commit = api.upload_file(path_or_fileobj=path, path_in_repo=FILE_NAME, repo_id=made.repo_id)
            return commit.commit_url

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike[str],
        *classes: type[Trail],
        model: nn.Module | None = None,
        revision: str | None = None,
    ) -> TrailMap:
        """Load `trails.safetensors` from a folder, or from the Hugging Face Hub."""
        if Path(repo).is_dir():
            return cls.load(Path(repo) / FILE_NAME, *classes, model=model)
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(str(repo), FILE_NAME, revision=revision), *classes, model=model)


def _pairs(trails: Any) -> list[tuple[Site, Trail]]:
    """What a TrailMap is made of, checked."""
    try:
        pairs = [(site, trail) for site, trail in (trails.items() if isinstance(trails, Mapping) else trails)]
    except (TypeError, ValueError):
        raise TypeError(
            f"a TrailMap is made of a dict {{Site: Trail}}, or of such pairs, not of {trails!r:.80}"
        ) from None
    if not pairs:
        raise ValueError("a TrailMap needs at least one trail: TrailMap({Site(15, Last(1)): LoReFT(576, rank=4)})")
    seen: set[Site] = set()
    for site, trail in pairs:
        if not isinstance(site, Site) or not isinstance(trail, Trail):
            raise TypeError(f"a TrailMap maps a Site to a Trail, but was given {site!r:.80}: {trail!r:.80}")
        if site in seen:
            raise ValueError(f"{site} is named twice: use Chain(first, second) for two trails at one site")
        seen.add(site)
    return pairs
