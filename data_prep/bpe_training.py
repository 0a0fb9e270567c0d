"""Train a BPE in a process of its own.

The tokenizers library learns the merges in one call, which neither answers signals nor tells how
far it is. The child can be ended at any moment, and Ctrl-C reaches the parent at once.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from bitlm_dist.data_prep.tokenizer import MIN_BPE_VOCAB_SIZE, train_bpe
from bitlm_dist.data_prep.worker import Usage, process_usage
from bitlm_dist.errors import UserError
from bitlm_dist.processes import die_with_parent

BPE_PREFIX = "bpe:"
MAX_BPE_BYTES = 500_000_000  # of text to train a BPE on
BATCH_BYTES = 1_000_000  # of text sent to the child at once
TRAINER_CODE = "from bitlm_dist.data_prep.bpe_training import main; main()"


def requested_bpe_size(name: str) -> int | None:
    """Read the vocabulary size in ``bpe:SIZE``; None if ``name`` is a tokenizer that exists.

    Raises:
        UserError: The size is no number, or too small.
    """
    if not name.startswith(BPE_PREFIX):
        return None

    size = name.removeprefix(BPE_PREFIX)
    if not (size.isascii() and size.isdigit()) or int(size) < MIN_BPE_VOCAB_SIZE:
        raise UserError(
            f"--tokenizer {name}: write bpe:SIZE with a size of at least {MIN_BPE_VOCAB_SIZE}, "
            "e.g. bpe:4096"
        )
    return int(size)


def train_bpe_in_child(
    texts: Iterable[bytes], vocab_size: int, file: Path, on_all_read: Callable[[], None]
) -> Usage:
    """Run :func:`train_bpe` in a child process, which ends with this call.

    Args:
        texts: Training text, UTF-8; what exceeds MAX_BPE_BYTES is not read.
        vocab_size: Number of entries.
        file: Output file.
        on_all_read: Called when all texts were read and the child learns the merges.

    Returns:
        The resources that the child used.

    Raises:
        UserError: The child was killed.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", TRAINER_CODE, str(vocab_size), str(file), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C reaches only this process, which ends the child
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # A child that dies breaks the pipe; its missing answer tells why.
        with suppress(BrokenPipeError), process.stdin as pipe:
            for batch in _batches(texts):
                pickle.dump(batch, pipe, protocol=5)
        on_all_read()
        answer = process.stdout.read()
    finally:
        process.kill()
        code = process.wait()
        process.stdout.close()

    if not answer:
        raise UserError(
            f"the process that trains the tokenizer ended with code {code} "
            "(-9: perhaps the machine ran out of memory): run the same command again, "
            "where there is more memory"
        )
    result = pickle.loads(answer)
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, Usage)
    return result


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Group texts into batches of about BATCH_BYTES, up to MAX_BPE_BYTES in total."""
    batch: list[bytes] = []
    size = total = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        total += len(text)
        if size >= BATCH_BYTES or total >= MAX_BPE_BYTES:
            yield batch
            batch = []
            size = 0
        if total >= MAX_BPE_BYTES:
            return

    if batch:
        yield batch


def main() -> None:
    """Train on the texts from standard input, and answer on standard output.

    The command line holds the vocabulary size, the output file and the parent's process id.
    """
    die_with_parent(int(sys.argv[3]))
    result: Usage | OSError
    try:
        train_bpe(_received_texts(), int(sys.argv[1]), Path(sys.argv[2]))
        result = process_usage()
    except OSError as error:  # e.g. the disk is full
        result = error
    sys.stdout.buffer.write(pickle.dumps(result))


def _received_texts() -> Iterator[str]:
    while True:
        try:
            batch: list[bytes] = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        for text in batch:
            yield text.decode()
