"""Variants for test_bench.py, in a separate module that spawned processes can import."""

from bitlm_dist.bench.interleaved import BenchRunner


class Counter(BenchRunner):
    """Appends its name to a file at every repeat."""

    def __init__(self, order, name):
        self.order, self.name = order, name

    def __call__(self):
        with open(self.order, "a") as stream:
            stream.write(self.name)
        return 10


def broken():
    raise RuntimeError("no luck\ntoday")
