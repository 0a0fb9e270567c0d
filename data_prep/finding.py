"""Which files the arguments of `bitlm prep` name, and which files of a folder are left out, so that none is passed over in silence.

Every file of a known kind in a folder is read, and each only once: first the files at their own paths, then what links lead to.
Hidden files and folders (names that begin with a dot) are left out. An argument itself may be hidden.
"""

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bitlm_dist.data_prep.unpacking import PACKED, packing_of

from bitlm_dist.errors import UserError

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
HIDDEN, HIDDEN_FOLDER = "hidden", "hidden folder"
READ_ALREADY, LOOP = "link to what is read anyway", "link to a folder above it"
PACKINGS = f"plain, {', '.join(PACKED[:-1])} or {PACKED[-1]}"
NO_SUFFIX, NO_FILE = "without a suffix", "no regular file"


@dataclass(frozen=True)
class File:
    """One file of the corpus.

    Attributes:
        path: what opens it: a path or a URL.
        name: where it lies below its argument, for messages that must not hold a folder's name.
        source: number of the argument that named it.
        size: bytes as stored; 0 where the server does not say.
    """

    path: str
    name: str
    source: int
    size: int

    @property
    def kind(self) -> str:
        """Which of ``KINDS`` it is."""
        return kind_of(self.plain_path) or ""

    @property
    def plain_path(self) -> str:
        """For messages."""
        return plain(self.path)


def find_files(inputs: Sequence[str | Path], left_out: Counter[str]) -> list[File]:
    """Find the files that ``inputs`` name, in corpus order.

    Args:
        inputs: files, folders or fsspec URLs.
        left_out: gets how many files of these folders are not read, by suffix or reason.

    Raises:
        UserError: an input does not exist or is of another kind, a folder holds no file of text or cannot be searched, a link in it
            leads nowhere, or the package of a protocol is missing.
    """
    files: list[File] = []
    for source, given in enumerate(map(str, inputs)):
        files += _find_remote(given, source, left_out) if "://" in given else _find_local(Path(given), source, left_out)
    return files


def plain(path: str) -> str:
    """A path as it is, a URL without its query, which often holds a key."""
    return path.partition("?")[0] if "://" in path else path


def kind_of(name: str) -> str | None:
    """Which of ``KINDS`` a file's name tells, packed or not, in whatever case; None: none."""
    suffixes = PurePosixPath(name.lower()).suffixes
    if packing_of(name):
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def left_out_in_words(left_out: Counter[str], most: int = 8) -> str:
    """One line: how many files are left out, and why; "" for none."""
    if not left_out:
        return ""
    common = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {reason}" for reason, count in common[:most]]
    if rest := sum(count for _, count in common[most:]):
        parts.append(f"{rest:,} of other kinds")
    total = sum(left_out.values())
    return f"{total:,} file{'s' * (total > 1)} left out: {', '.join(parts)}"


def _find_local(given: Path, source: int, left_out: Counter[str]) -> list[File]:
    if given.is_dir():
        here: Counter[str] = Counter()
        inside = _Search(here).files_of(given)
        if not inside:
            raise UserError(_holds_nothing(str(given), here))
        left_out.update(here)
        return [File(str(p), p.relative_to(given).as_posix(), source, p.stat().st_size) for p in inside]
    if not given.exists():
        raise UserError(f"{given} {_leads_nowhere(given) if given.is_symlink() else 'does not exist'}")
    if not kind_of(given.name):
        raise UserError(f"{given} is none of {', '.join(KINDS)} ({PACKINGS})")
    return [File(str(given), given.name, source, given.stat().st_size)]


class _Search:
    """Searches one folder and what its links lead to; ``left_out`` gets what is not read."""

    def __init__(self, left_out: Counter[str]) -> None:
        self._left_out = left_out
        self._files: list[Path] = []
        self._seen: set[str] = set()  # files and folders, without links in their paths
        self._links: list[Path] = []

    def files_of(self, root: Path) -> list[Path]:
        """Sorted by their paths."""
        self._walk(root)
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                self._follow(link)
        return sorted(self._files)

    def _walk(self, root: Path) -> None:
        waiting = [(str(root), os.path.realpath(root))]
        while waiting:
            folder, target = waiting.pop()
            if target in self._seen:  # part of a folder that another link led to
                continue
            self._seen.add(target)
            try:
                with os.scandir(folder) as found:
                    entries = list(found)
            except OSError as error:
                raise UserError(f"{folder} cannot be searched: {error.strerror}") from None
            for entry in entries:
                if entry.name.startswith("."):
                    self._left_out[HIDDEN_FOLDER if entry.is_dir() else HIDDEN] += 1
                elif entry.is_symlink():
                    self._links.append(Path(entry.path))
                elif entry.is_dir():
                    waiting.append((entry.path, os.path.join(target, entry.name)))
                else:
                    self._take(Path(entry.path), os.path.join(target, entry.name), entry.is_file())

    def _follow(self, link: Path) -> None:
        try:
            target = os.path.realpath(link, strict=True)
        except OSError:
            raise UserError(f"{link} {_leads_nowhere(link)}") from None
        if not os.path.isdir(target):
            self._take(link, target, os.path.isfile(target))
        elif Path(os.path.realpath(link.parent)).is_relative_to(target):
            self._left_out[LOOP] += 1
        elif target in self._seen:
            self._left_out[READ_ALREADY] += 1
        else:
            self._walk(link)

    def _take(self, path: Path, target: str, is_file: bool) -> None:
        if not is_file:  # a pipe or a device, which might never end
            self._left_out[NO_FILE] += 1
        elif not kind_of(path.name):
            self._left_out[_suffix_of(path.name)] += 1
        elif target in self._seen:
            self._left_out[READ_ALREADY] += 1
        else:
            self._seen.add(target)
            self._files.append(path)


def _find_remote(url: str, source: int, left_out: Counter[str]) -> list[File]:
    try:
        system, root = importlib.import_module("fsspec.core").url_to_fs(url)
        if kind_of(plain(url)):
            return [File(url, PurePosixPath(plain(url)).name, source, int(system.info(root)["size"] or 0))]
        found: dict[str, Any] = system.find(root, detail=True)
    except ImportError as error:
        raise UserError(f"{plain(url)}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{plain(url)} does not exist") from None
    except Exception as error:  # each protocol has errors of its own
        raise UserError(f"{plain(url)} cannot be read: {type(error).__name__}: {error}".replace(url, plain(url))) from None
    base = root.rstrip("/") + "/"
    inside, here = [], Counter[str]()
    for path in sorted(found):
        name = path.removeprefix(base)
        if any(part.startswith(".") for part in name.split("/")):
            here[HIDDEN] += 1
        elif kind_of(path):
            inside.append(File(system.unstrip_protocol(path), name, source, int(found[path].get("size") or 0)))
        else:
            here[_suffix_of(path)] += 1
    if not inside:
        raise UserError(_holds_nothing(plain(url), here))
    left_out.update(here)
    return inside


def _suffix_of(name: str) -> str:
    path = PurePosixPath(name.lower())
    return "".join(path.suffixes[-2:] if packing_of(name) else path.suffixes[-1:]) or NO_SUFFIX


def _leads_nowhere(link: Path) -> str:
    return f"is a link to {os.readlink(link)}, which cannot be reached: mend or remove the link"


def _holds_nothing(place: str, left_out: Counter[str]) -> str:
    words = left_out_in_words(left_out)
    return f"{place} holds no {_kinds()}" + (f" ({words})" if words else "")


def _kinds() -> str:
    return f"{', '.join(KINDS[:-1])} or {KINDS[-1]} file ({PACKINGS})"
