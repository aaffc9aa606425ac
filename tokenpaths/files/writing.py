"""Writing whole or not at all: beside the place, onto the disk, then moved there at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_STRAY = ".writing-"
_UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what a file system says of a thing that it does not do


@contextmanager
def whole(path: str | os.PathLike[str], *, replace: bool = True) -> Generator[Path]:
    """Write a file or a folder, whole or not at all.

    Inside `with whole("run/report.json") as beside:`, write to `beside`, a path of the same name in another folder.
    On leaving, it is brought onto the disk and moved to `path`. After an error or an interruption, what stood at `path`
    before is still there. A link stays a link, and what it leads to is replaced; what is replaced keeps its mode. What
    a killed writer of that name has left behind is cleared away.

    Args:
        path: where the file or folder belongs. The folders above it are made.
        replace: whether a folder takes the place of what stands at `path`; if not, a folder that holds something there
            stays, and `OSError` is raised. A file always replaces a file.

    Raises:
        ValueError: `path` does not end in a name, as ".." does not.
        OSError: nothing was written, or it cannot be moved: a file replaces neither a folder nor a device.
    """
    target = _place(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_STRAY}{hashlib.sha256(target.name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}-"
    sweep(target.parent, prefix)
    with _staging(target.parent, prefix) as staging:
        beside, earlier = staging / "new" / target.name, staging / "earlier" / target.name
        beside.parent.mkdir()
        yield beside
        if beside.is_file() and target.is_dir():
            raise IsADirectoryError(f"{target} is a folder, which a file does not replace: name a file in it")
        _to_disk(beside)
        if target.exists():
            os.chmod(beside, stat.S_IMODE(target.stat().st_mode))
        try:
            if replace and beside.is_dir() and target.exists():  # a folder cannot be renamed over another
                earlier.parent.mkdir()
                target.rename(earlier)
            os.replace(beside, target)
        except BaseException:
            if earlier.exists() and not target.exists():
                earlier.rename(target)
            raise
        _folder_to_disk(target.parent)


def sweep(folder: str | os.PathLike[str], prefix: str = _STRAY) -> None:
    """Clear away what killed writers have left behind in a folder, and put back what one was about to replace.

    A writer that lives holds a lock, and is left alone. So is everything where the system has no such locks.
    """
    for stray in Path(folder).glob(f"{prefix}*"):
        with _locked(stray) as dead:
            if dead:
                for earlier in stray.glob("earlier/*"):
                    if not (there := Path(folder, earlier.name)).exists():
                        earlier.rename(there)
                shutil.rmtree(stray, ignore_errors=True)


def check_room(folder: str | os.PathLike[str], size: int) -> None:
    """Raise `OSError` unless `size` bytes can be written into a folder, which is made. Nothing is left there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            except (AttributeError, OSError) as error:
                if getattr(error, "errno", errno.ENOTSUP) not in _UNABLE:
                    raise
                file.write(bytes(max(1, size)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        told = f"{os.fspath(folder)} cannot hold the {size:,} bytes that are to be written there ({error.strerror})"
        raise type(error)(error.errno, f"{told}: make room, or name another folder") from error


def _place(path: str | os.PathLike[str]) -> Path:
    """The place that a path leads to, through links. Raises as `whole`."""
    target = Path(path)
    if target.name in ("", ".."):
        raise ValueError(f"{os.fspath(path)!r} does not end in the name of a file or a folder")
    if target.is_symlink():
        target = Path(os.path.realpath(target))
        if target.is_symlink():
            raise OSError(errno.ELOOP, "links that lead in a circle", os.fspath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(f"{os.fspath(path)} is a pipe, a device or a socket, and cannot be replaced: name a file")
    return target


@contextmanager
def _staging(parent: Path, prefix: str) -> Generator[Path]:
    """A folder to write in, locked as long as this process lives."""
    while True:
        made = tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
        staging = Path(made.name)
        try:
            with made, _locked(staging) as mine:
                # another writer may have taken it for a stray before it was locked
                if (mine or mine is None) and staging.exists():
                    yield staging
                    return
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)  # an interruption may have cut its clearing away short
            raise


@contextmanager
def _locked(folder: Path) -> Generator[bool | None]:
    """Inside, a folder is locked for others. Gives whether it could be, or None where the system has no such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        except OSError:  # a file system without locks
            locked = None
        yield locked
    finally:
        os.close(handle)


def _to_disk(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, onto the disk."""
    if path.is_dir():
        for part in path.iterdir():
            _to_disk(part)
        _folder_to_disk(path)
    elif path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _folder_to_disk(path: Path) -> None:
    """Bring the names in a folder onto the disk, where the system can."""
    with contextlib.suppress(PermissionError):  # Windows opens no folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
        finally:
            os.close(handle)
