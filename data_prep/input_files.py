"""Search for the input files of `bitlm prep`, with counts of the files that are left out.

Every file of a known format in a folder is read exactly once: first the files at their own paths,
then the targets of links. Hidden files and folders (names that begin with a dot) are left out,
unless an argument names them itself. No file is left out silently.
"""

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bitlm_dist.data_prep.decompression import COMPRESSED_SUFFIXES, compression_suffix
from bitlm_dist.data_prep.remote_errors import remote_problem
from bitlm_dist.errors import UserError
from bitlm_dist.formatting import plural

FILE_FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS_IN_WORDS = f"plain, {', '.join(COMPRESSED_SUFFIXES[:-1])} or {COMPRESSED_SUFFIXES[-1]}"

# Reasons why a file is left out, as reported to the user. Other files are counted by suffix.
HIDDEN = "hidden"
HIDDEN_FOLDER = "hidden folder"
ALREADY_READ = "link to what is read anyway"
LOOP = "link to a folder above it"
NO_SUFFIX = "without a suffix"
NO_FILE = "no regular file"
PLURALS = {
    HIDDEN_FOLDER: "hidden folders",
    ALREADY_READ: "links to what is read anyway",
    LOOP: "links to folders above them",
    NO_FILE: "no regular files",
}


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus.

    Attributes:
        path: path or URL that opens the file.
        name: path relative to its argument, for output that must not depend on where the folder is.
        source_index: position of the argument that named it.
        size: stored size in bytes; 0 if the server does not tell.
    """

    path: str
    name: str
    source_index: int
    size: int

    @property
    def file_format(self) -> str:
        """Format of the file, one of ``FILE_FORMATS``."""
        return file_format_of(self.display_path) or ""

    @property
    def display_path(self) -> str:
        """Path for messages, without credentials."""
        return without_query(self.path)


def find_files(inputs: Sequence[str | Path], left_out: Counter[str]) -> list[InputFile]:
    """Find the files that ``inputs`` name, in corpus order.

    Args:
        inputs: files, folders or fsspec URLs.
        left_out: counts of the files in these folders that are not read, by suffix or reason;
            updated in place.

    Raises:
        UserError: An input does not exist or has an unknown format, a folder holds no file of a
            known format or cannot be searched, a link in it is broken, or the package for a
            protocol is missing.
    """
    files: list[InputFile] = []
    for source_index, argument in enumerate(map(str, inputs)):
        files += (
            _find_remote(argument, source_index, left_out)
            if "://" in argument
            else _find_local(Path(argument), source_index, left_out)
        )
    return files


def without_query(path: str) -> str:
    """Strip the query from a URL, which often holds a key. Other paths are returned unchanged."""
    return path.partition("?")[0] if "://" in path else path


def file_format_of(name: str) -> str | None:
    """Return the format of a file by its name, one of ``FILE_FORMATS``, or None if unknown.

    A compression suffix and case are ignored.
    """
    suffixes = PurePosixPath(name.lower()).suffixes
    if compression_suffix(name):
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_FORMATS else None


def left_out_summary(left_out: Counter[str], max_reasons: int = 8) -> str:
    """Summarize in one line how many files are left out, by reason; "" if none are."""
    if not left_out:
        return ""

    common = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [
        plural(count, reason, PLURALS.get(reason, reason)) for reason, count in common[:max_reasons]
    ]
    if rest := sum(count for _, count in common[max_reasons:]):
        parts.append(f"{rest:,} of other kinds")

    total = sum(left_out.values())
    return f"{plural(total, 'file')} left out: {', '.join(parts)}"


def _find_local(path: Path, source_index: int, left_out: Counter[str]) -> list[InputFile]:
    """Find the files of a local file or folder. See :func:`find_files`."""
    if path.is_dir():
        here: Counter[str] = Counter()
        inside = _FolderSearch(here).files_of(path)
        if not inside:
            raise UserError(_no_files_message(str(path), here))
        left_out.update(here)
        return [
            InputFile(str(p), p.relative_to(path).as_posix(), source_index, p.stat().st_size)
            for p in inside
        ]

    if not path.exists():
        raise UserError(
            f"{path} {_broken_link_message(path) if path.is_symlink() else 'does not exist'}"
        )
    if not file_format_of(path.name):
        raise UserError(f"{path} is none of {', '.join(FILE_FORMATS)} ({COMPRESSIONS_IN_WORDS})")
    return [InputFile(str(path), path.name, source_index, path.stat().st_size)]


class _FolderSearch:
    """Searches one folder and the targets of its links.

    Args:
        left_out: counts of the files that are not read, updated in place.
    """

    def __init__(self, left_out: Counter[str]) -> None:
        self._left_out = left_out
        self._files: list[Path] = []
        self._seen: set[str] = set()  # real paths of files and folders
        self._links: list[Path] = []

    def files_of(self, root: Path) -> list[Path]:
        """Return all files below ``root``, sorted by path."""
        # Links last, so that a file in the folder is read at its own path. Sorted, as the order in
        # which a folder lists its entries must not matter.
        self._walk(root)
        while self._links:
            links = sorted(self._links)
            self._links = []
            for link in links:
                self._follow_link(link)
        return sorted(self._files)

    def _walk(self, root: Path) -> None:
        """Add the files below ``root``, and put off its links."""
        # Pairs of a path and its real path.
        waiting = [(str(root), os.path.realpath(root))]
        while waiting:
            folder, target = waiting.pop()

            # A link may have led into this folder before.
            if target in self._seen:
                continue
            self._seen.add(target)

            try:
                with os.scandir(folder) as listing:
                    entries = list(listing)
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
                    self._add_file(
                        Path(entry.path), os.path.join(target, entry.name), entry.is_file()
                    )

    def _follow_link(self, link: Path) -> None:
        """Add the target of a link, unless it is read anyway."""
        try:
            target = os.path.realpath(link, strict=True)
        except OSError:
            raise UserError(f"{link} {_broken_link_message(link)}") from None

        if not os.path.isdir(target):
            self._add_file(link, target, os.path.isfile(target))
        elif Path(os.path.realpath(link.parent)).is_relative_to(target):
            self._left_out[LOOP] += 1
        elif target in self._seen:
            self._left_out[ALREADY_READ] += 1
        else:
            self._walk(link)

    def _add_file(self, path: Path, target: str, is_file: bool) -> None:
        """Add a file, or count why it is left out.

        Args:
            path: path of the file or of a link to it.
            target: its real path.
            is_file: whether it is a regular file.
        """
        # A pipe or a device might never end.
        if not is_file:
            self._left_out[NO_FILE] += 1
        elif not file_format_of(path.name):
            self._left_out[_suffix_of(path.name)] += 1
        elif target in self._seen:
            self._left_out[ALREADY_READ] += 1
        else:
            self._seen.add(target)
            self._files.append(path)


def _find_remote(url: str, source_index: int, left_out: Counter[str]) -> list[InputFile]:
    """Find the files below a URL, or the file at it. See :func:`find_files`."""
    try:
        system, root = importlib.import_module("fsspec.core").url_to_fs(url)
        if file_format_of(without_query(url)):
            return [
                InputFile(
                    url,
                    PurePosixPath(without_query(url)).name,
                    source_index,
                    int(system.info(root)["size"] or 0),
                )
            ]

        listing: dict[str, Any] = system.find(root, detail=True)
        if not listing:
            system.info(root)  # raises where find takes a lost connection for an empty folder
    # Each protocol has exceptions of its own.
    except Exception as error:
        raise UserError(remote_problem(url, error)) from None

    # Sorted, as the order in which a server lists its files must not matter.
    base = root.rstrip("/") + "/"
    inside = []
    here = Counter[str]()
    for path in sorted(listing):
        name = path.removeprefix(base)
        if any(part.startswith(".") for part in name.split("/")):
            here[HIDDEN] += 1
        elif file_format_of(path):
            inside.append(
                InputFile(
                    system.unstrip_protocol(path),
                    name,
                    source_index,
                    int(listing[path].get("size") or 0),
                )
            )
        else:
            here[_suffix_of(path)] += 1

    if not inside:
        raise UserError(_no_files_message(without_query(url), here))
    left_out.update(here)
    return inside


def _suffix_of(name: str) -> str:
    """Return the suffix by which a file that is left out is counted, e.g. ".tar.gz"."""
    path = PurePosixPath(name.lower())
    return (
        "".join(path.suffixes[-2:] if compression_suffix(name) else path.suffixes[-1:]) or NO_SUFFIX
    )


def _broken_link_message(link: Path) -> str:
    return f"is a link to {os.readlink(link)}, which cannot be reached: mend or remove the link"


def _no_files_message(location: str, left_out: Counter[str]) -> str:
    words = left_out_summary(left_out)
    return f"{location} holds no {_formats_in_words()}" + (f" ({words})" if words else "")


def _formats_in_words() -> str:
    return f"{', '.join(FILE_FORMATS[:-1])} or {FILE_FORMATS[-1]} file ({COMPRESSIONS_IN_WORDS})"
