"""What is laid where: trails at sites, as one module that is trained, saved and attached."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from tokenpaths import files
from tokenpaths.checking import quoted
from tokenpaths.files import TrailFileError
from tokenpaths.randomness import own_randomness
from tokenpaths.scope import Switch
from tokenpaths.site import Host, Site
from tokenpaths.site.fingerprint import describe
from tokenpaths.trailmap import notes
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate
from tokenpaths.trails.base import Trail, instead_of
from tokenpaths.undo import tidy

FILE_NAME = "trails.safetensors"


class TrailMap(Adapter):
    """Trails at their sites: `TrailMap({Site(15, Last(1)): LoReFT(576, rank=4)})`.

    A trail that is given at two sites is tied: it is trained once and stored once. Trails at sites of one layer and
    stream read the same state, and their displacements are added. A map reads like a dict from sites to trails.

    Args:
        trails: a dict from `Site` to `Trail`, or such pairs.
        blocks: the name of the block list of a model that has several, as in `blocks="encoder.block"`.

    Raises:
        TypeError: `trails` is not made of sites and trails.
        ValueError: there is no trail, or a site is named twice.
    """

    saved_as: ClassVar[str] = FILE_NAME

    def __init__(
        self, trails: Mapping[Site, Trail] | Iterable[tuple[Site, Trail]], *, blocks: str | None = None
    ) -> None:
        super().__init__()
        self._switch = Switch("trails.off()")
        pairs = _pairs(trails)
        self.sites = tuple(site for site, _ in pairs)
        number = {trail: i for i, trail in enumerate(dict.fromkeys(trail for _, trail in pairs))}
        self.trails = nn.ModuleList(number)
        self.index = tuple(number[trail] for _, trail in pairs)
        self.blocks = blocks

    def items(self) -> list[tuple[Site, Trail]]:
        """Each site with its trail, in the order given."""
        return [(site, self._unique[i]) for site, i in zip(self.sites, self.index, strict=True)]

    @property
    def _unique(self) -> list[Trail]:
        return cast("list[Trail]", list(self.trails))

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
        """The number of parameters, also of those that are not trained now."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def enabled(self) -> bool:
        """Whether the trails move states, in the running thread or task.

        Raises `RuntimeError` in a thread of which that cannot be told: the main thread is inside `off()`.
        """
        return self._switch.is_on()

    @contextmanager
    def off(self) -> Generator[None]:
        """Inside `with trails.off():`, a model that the map is attached to is the frozen one.

        It is so in the thread, or the task of an event loop, that is inside: other threads are steered as before.
        """
        with self._switch.off():
            yield

    @contextmanager
    def switched(self, on: bool) -> Generator[None]:
        """Inside, the trails move states of a model that the map is attached to (`on`), or leave them alone.

        As `off`, for code that starts no threads of its own.
        """
        with self._switch.turned(on):
            yield

    def check(self, model: nn.Module) -> None:
        """Raise `ValueError` for a site that the model does not have. `attach` checks widths and rules."""
        host = Host.of(model, self.blocks)
        for site in self.sites:
            host.locate(site)

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: the file.
            model: the base model, to keep its name and the fingerprint of its weights in the file.

        Raises:
            TypeError: an argument of a trail is not of JSON, or a rule is not of `tokenpaths.tokens`.
            ValueError: a parameter is shared inside the trails, a number is not finite, rows span no subspace of their
                number, or something is nested more than 64 deep.
            IsADirectoryError: the path is a folder.
            OSError: the file cannot be written.
        """
        if Path(path).is_dir():
            raise IsADirectoryError(
                f"{os.fspath(path)} is a folder, and a map is one file: save to {Path(path) / FILE_NAME}"
            )
        parameters = list(self.named_parameters(remove_duplicate=False))
        if len({id(parameter) for _, parameter in parameters}) < len(parameters):
            raise ValueError(
                "not saved: a parameter is shared inside the trails; tie whole trails instead, at two sites"
            )
        if fault := notes.fault(self):
            raise ValueError(f"not saved: {fault}")
        note = {
            "trails": [notes.trail_to_note(trail) for trail in self._unique],
            "sites": [{**notes.site_to_note(s), "trail": i} for s, i in zip(self.sites, self.index, strict=True)],
            "blocks": self.blocks,
            "base": None if model is None else describe(model),
            **({} if self.gate is None else {"gate": self.gate.note()}),
        }
        files.write(path, self.state_dict(), note)

    @tidy
    @torch.no_grad()
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Copy the numbers of a file of these trails into this map's parameters.

        A map without a gate takes over that of the file.

        Raises as `load` does, and `TrailFileError` for a file of other trails, of trails at other sites, or of another
        gate or none where the map has one. Then nothing has changed.
        """
        loaded = TrailMap.load(path, *notes.foreign(self))
        if (loaded.sites, loaded.index) != (self.sites, self.index):
            there, here = (", ".join(map(str, each.sites)) for each in (loaded, self))
            raise TrailFileError(f"{os.fspath(path)} has trails at {there:.300}, and this map at {here:.300}")
        self.check_gate(loaded.gate, path)
        gate, loaded.gate = loaded.gate, None if self.gate is None else loaded.gate
        try:
            notes.check_shapes(self.state_dict(), loaded.state_dict())
        except TrailFileError as error:
            raise TrailFileError(f"{os.fspath(path)}: {error}") from None
        self.load_state_dict(loaded.state_dict())
        if self.gate is None:
            self.gate = gate

    @classmethod
    @tidy
    def load(cls, path: str | os.PathLike[str], *classes: type[Trail], model: nn.Module | None = None) -> TrailMap:
        """Read a file that `save` wrote.

        Args:
            path: the file.
            classes: your own `Trail` classes that the file may hold. No name in a file is ever imported.
            model: the base model. A warning is given if the trails were made for other weights.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: the path is a folder.
            TrailFileError: the file is not whole and sound, or holds a trail of a class that is not known.
            TypeError: one of `classes` is no `Trail` class.
            ValueError: two classes have one name.
        """
        known = notes.named(classes)
        if Path(path).is_dir():
            raise IsADirectoryError(
                f"{os.fspath(path)} is a folder: load {Path(path) / FILE_NAME}, or use "
                f"TrailMap.from_pretrained({os.fspath(path)!r})"
            )
        with torch.device("cpu"):
            tensors, note = files.read(path)
        try:
            base = notes.check_map(note)
            with own_randomness(), torch.device("cpu"):
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
                files.printable(
                    f"{os.fspath(path)} was made for {base['name']} (weights {base['fingerprint']}), but the model "
                    f"given is {here['name']} (weights {here['fingerprint']}): measure before you trust the trails on "
                    "it"
                ),
                stacklevel=2,
            )
        return loaded

    @classmethod
    def _from_note(cls, note: dict[str, Any], known: Mapping[str, type[Trail]]) -> TrailMap:
        """Build a map whose note `notes.check_map` has passed, with fresh numbers. Raises `TrailFileError`."""
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
        if "gate" in note:
            loaded.gate = Gate.from_note(note["gate"])
        if len(loaded.trails) != len(trails) or loaded.index != tuple(entry["trail"] for entry in note["sites"]):
            raise TrailFileError("its sites must name every trail, in order")
        return loaded

    def push_to_hub(
        self, repo: str, model: nn.Module | None = None, *, card: str = "", private: bool | None = None
    ) -> str:
        """Upload the trails to the Hugging Face Hub as `trails.safetensors`, and return the address of the commit.

        Args:
            repo: the repository, which is made if it is not there. Without an owner it is one of your own.
            model: the base model, to keep its name and fingerprint in the file.
            card: the README of the repository, in the same commit: `interop.card` writes one from your measurements.
            private: whether a repository that is made is private; by default as your organisation has it.

        Raises as `save` does, and `huggingface_hub.errors.HfHubHTTPError` if the Hub refuses.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE_NAME
            self.save(path, model)
            api = HfApi()
            made = api.create_repo(repo, private=private, exist_ok=True)  # adds the user's name where `repo` has none
            if card:
                files.write_text(Path(folder) / "README.md", card)
            return api.upload_folder(folder_path=folder, repo_id=made.repo_id).commit_url

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike[str],
        *classes: type[Trail],
        model: nn.Module | None = None,
        revision: str | None = None,
    ) -> TrailMap:
        """Load `trails.safetensors` from a folder, or from the Hugging Face Hub.

        The Hub is not asked for a folder that is missing, where a stranger's repository of that name might answer. What
        is no name of a repository (`owner/name`) is a folder; so is a `Path`, what lies in a folder that is there, and
        what begins as a folder of runs mostly does ("runs/best", "outputs/a"). With a `revision` it is the Hub.

        Args:
            repo: a folder, or else a repository on the Hub.
            classes: your own `Trail` classes, as for `load`.
            model: the base model, as for `load`.
            revision: a branch, tag or commit on the Hub.

        Raises as `load` does, and `huggingface_hub.errors.HfHubHTTPError` if the Hub does not have it.
        """
        if revision is None and Path(repo).is_dir():
            return cls.load(Path(repo) / FILE_NAME, *classes, model=model)
        if revision is None and _is_local(repo):
            raise FileNotFoundError(
                f"there is no folder {os.fspath(repo)}. If a repository on the Hub is meant, name it owner/name and "
                'give revision="main"'
            )
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(str(repo), FILE_NAME, revision=revision), *classes, model=model)


_OF_RUNS = ("checkpoints", "experiments", "models", "out", "output", "outputs", "results", "runs", "tmp", "trails")


def _is_local(repo: str | os.PathLike[str]) -> bool:
    """Whether a name can only be that of a folder, or is so much like one that the Hub is not asked."""
    if not isinstance(repo, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", repo, re.ASCII):
        return True
    owner, slash, _ = repo.partition("/")
    return bool(slash) and (owner in _OF_RUNS or Path(owner).is_dir())


def _pairs(trails: Any) -> list[tuple[Site, Trail]]:
    """The sites and trails that a TrailMap is given, checked."""
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
            what = f"a TrailMap maps a Site to a Trail, but was given {site!r:.80}: {quoted(trail)}"
            raise TypeError(f"{what}. {'Write Site(15, Last(1))' if isinstance(trail, Trail) else instead_of(trail)}")
        if site in seen:
            raise ValueError(f"{site} is named twice: use Chain(first, second) for two trails at one site")
        seen.add(site)
    return pairs
