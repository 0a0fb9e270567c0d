"""`bitlm prep`: text files -> a folder of MDS shards that training reads.

The text is cut into units of whole documents, about ``UNIT_BYTES`` each, keyed by their content. A unit is written beside its
place and renamed into it, its record last; a rerun after any kill skips the units that have a record and gives the same tree
to the byte. The folder then holds::

    manifest.json            counts, tokenizer, fingerprint; written last: without it the folder is not ready
    tokenizer/               the tokenizer's file
    statistics.npz           token counts and context vectors of the training split (for codes), bytes of each token
    units/NNNNN-KEY.json     what one unit holds
    train/index.json         one index over all units; lengths.npy: tokens of each document
    train/NNNNN-KEY/         shards of one unit, zstd, with hashes
    validation/              the same for held-out documents
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bitlm_dist.data_prep import sources, statistics
from bitlm_dist.data_prep.tokenizer import SMALLEST_BPE, Tokenizer, train_bpe
from numpy.typing import NDArray

from bitlm_dist.data.shards import MANIFEST, SPLITS, Shards
from bitlm_dist.data.streaming_import import import_streaming
from bitlm_dist.data.vocabulary import STATISTICS
from bitlm_dist.errors import UserError
from bitlm_dist.files import write_atomically

UNIT_BYTES = 2_000_000
BPE = "bpe:"
STATISTICS_TOKENS = 50_000_000  # of the training split, for counts and context vectors
VERSION = 1


@dataclass(frozen=True)
class Report:
    """What a preparation did."""

    documents: int
    tokens: int
    text_bytes: int
    units: int
    units_reused: int
    unigram_nats: float


@dataclass(frozen=True)
class _Unit:
    name: str
    texts: list[str]


def prepare(inputs: Sequence[Path], tokenizer: str, out: Path, validation: float = 0.05) -> Report:
    """Write the shards of ``inputs`` to ``out``; a second call with the same arguments finds everything done.

    Args:
        inputs: files or folders, see :mod:`bitlm_dist.data_prep.sources`.
        tokenizer: a file, or ``bpe:SIZE`` to train a byte-level BPE on the inputs.
        out: folder; new, or one that the same call began.
        validation: share of documents held out, chosen by a hash of their text.

    Raises:
        UserError: an input, the tokenizer or ``out`` does not fit; nothing that exists is altered.
    """
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: expected a share from 0 to below 1")
    files = sources.find_files(inputs)
    _check_tokenizer(tokenizer)
    _claim(out, {"version": VERSION, "tokenizer": tokenizer, "validation": validation, "inputs": _survey(files)})
    coder = _tokenizer(tokenizer, files, out)
    records, reused = [], 0
    for unit in _units(files, coder):
        record = out / "units" / f"{unit.name}.json"
        if record.is_file():
            reused += 1
        else:
            _write_unit(unit, coder, out, validation)
        records.append(json.loads(record.read_text()))
    names = [record["name"] for record in records]
    for split in SPLITS:
        _merge(out / split, names)
    return _finish(out, coder, records, reused)


def _survey(files: Sequence[Path]) -> str:
    """Read every document once, so that a bad one is found before anything is written -> hash of all their texts."""
    seen, empty = hashlib.sha256(), True
    for file in files:
        for text in sources.documents(file):
            seen.update(hashlib.sha256(text.encode()).digest())
            empty = False
    if empty:
        raise UserError(f"{', '.join(map(str, files))}: no document has any text")
    return seen.hexdigest()


def _check_tokenizer(name: str) -> None:
    if not name.startswith(BPE):
        Tokenizer(Path(name))
    elif not name[len(BPE) :].isdigit() or int(name[len(BPE) :]) < SMALLEST_BPE:
        raise UserError(f"--tokenizer {name}: write bpe:SIZE with a size of at least {SMALLEST_BPE}, e.g. bpe:4096")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make ``out`` ours, or refuse a folder of other origin."""
    claim = out / "settings.json"
    if claim.is_file():
        found = json.loads(claim.read_text())
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(f"{out} was prepared with another {key}: choose another --out or remove the folder")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and was not written by `bitlm prep`: choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(claim, json.dumps(settings, indent=1) + "\n")


def _tokenizer(name: str, files: Sequence[Path], out: Path) -> Tokenizer:
    folder = out / "tokenizer"
    if folder.is_dir():
        return Tokenizer.of_folder(folder)
    building = out / ".tokenizer"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    if name.startswith(BPE):
        texts = (text for file in files for text in sources.documents(file))
        train_bpe(texts, int(name[len(BPE) :]), building / "tokenizer.json")
    else:
        Tokenizer(Path(name)).save(building)
    building.rename(folder)
    return Tokenizer.of_folder(folder)


def _units(files: Iterable[Path], tokenizer: Tokenizer) -> Iterator[_Unit]:
    texts: list[str] = []
    size = number = 0
    for file in files:
        for text in sources.documents(file):
            texts.append(text)
            size += len(text.encode())
            if size >= UNIT_BYTES:
                yield _unit(number, texts, tokenizer)
                texts, size, number = [], 0, number + 1
    if texts:
        yield _unit(number, texts, tokenizer)


def _unit(number: int, texts: list[str], tokenizer: Tokenizer) -> _Unit:
    key = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    return _Unit(f"{number:05d}-{key.hexdigest()[:16]}", texts)


def _is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _write_unit(unit: _Unit, tokenizer: Tokenizer, out: Path, validation: float) -> None:
    encoded = tokenizer.encode_batch(unit.texts)
    record: dict[str, Any] = {"name": unit.name}
    for split in SPLITS:
        chosen = [i for i, text in enumerate(unit.texts) if _is_held_out(text, validation) == (split == "validation")]
        lengths = [len(encoded[i]) for i in chosen]
        record[split] = {
            "documents": len(chosen),
            "tokens": sum(lengths),
            "bytes": sum(len(unit.texts[i].encode()) for i in chosen),
        }
        folder = out / split / unit.name
        shutil.rmtree(folder, ignore_errors=True)  # no record: whatever lies there is half a unit
        if chosen:
            building = folder.with_name(f".{unit.name}")
            shutil.rmtree(building, ignore_errors=True)
            _write_shards(building, [encoded[i] for i in chosen], tokenizer.vocabulary)
            np.save(building / "lengths.npy", np.array(lengths, dtype=np.int64))
            building.rename(folder)
    write_atomically(out / "units" / f"{unit.name}.json", json.dumps(record, indent=1) + "\n")


def _write_shards(folder: Path, documents: Sequence[NDArray[np.uint32]], vocabulary: int) -> None:
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    writer = import_streaming().MDSWriter(
        out=str(folder), columns={"tokens": f"ndarray:{dtype}"}, compression="zstd:9", hashes=["sha1", "xxh64"]
    )
    with writer:
        for tokens in documents:
            writer.write({"tokens": tokens.astype(dtype)})


def _merge(split: Path, names: Sequence[str]) -> None:
    """One index.json and one lengths.npy over the units of a split."""
    shards, lengths = [], []
    for name in names:
        if not (split / name).is_dir():
            continue
        for shard in json.loads((split / name / "index.json").read_text())["shards"]:
            for part in ("raw_data", "zip_data"):
                if shard.get(part):
                    shard[part]["basename"] = os.path.join(name, shard[part]["basename"])
            shards.append(shard)
        lengths.append(np.load(split / name / "lengths.npy"))
    if not shards:
        return
    partial = split / ".lengths.npy"
    np.save(partial, np.concatenate(lengths))
    partial.rename(split / "lengths.npy")
    write_atomically(split / "index.json", json.dumps({"version": 2, "shards": shards}) + "\n")


def _sample(shards: Shards) -> Iterator[NDArray[np.integer[Any]]]:
    seen = 0
    for document in range(len(shards.lengths)):
        tokens = shards.tokens(document)
        seen += len(tokens)
        yield tokens
        if seen >= STATISTICS_TOKENS:
            return


def _finish(out: Path, tokenizer: Tokenizer, records: list[dict[str, Any]], reused: int) -> Report:
    totals = {
        split: {key: sum(record[split][key] for record in records) for key in ("documents", "tokens", "bytes")} for split in SPLITS
    }
    if not totals["train"]["documents"]:
        raise UserError(f"{out}: every document fell into the validation split: lower --validation or give more documents")
    if not (out / STATISTICS).is_file():
        with Shards(out, "train") as shards:
            counts, contexts = statistics.token_statistics(_sample(shards), tokenizer.vocabulary)
        partial = out / f".{STATISTICS}"
        statistics.write(partial, counts, contexts, tokenizer.byte_lengths())
        partial.rename(out / STATISTICS)
    manifest = {
        "version": VERSION,
        "vocabulary": tokenizer.vocabulary,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "tokenizer": {"file": tokenizer.file.name, "fingerprint": tokenizer.fingerprint},
        "splits": totals,
    }
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    counts = np.load(out / STATISTICS)["counts"]
    share = counts[counts > 0] / counts.sum()
    return Report(
        documents=sum(t["documents"] for t in totals.values()),
        tokens=sum(t["tokens"] for t in totals.values()),
        text_bytes=sum(t["bytes"] for t in totals.values()),
        units=len(records),
        units_reused=reused,
        unigram_nats=float(-(share * np.log(share)).sum()),
    )
