"""Contenders for test_bench.py, in a module of their own so that spawned processes can import them."""

from bitlm_dist.bench.contest import Runner


class Counter(Runner):
    """Leaves its name in a file at every repeat."""

    def __init__(self, order, name):
        self.order, self.name = order, name

    def __call__(self):
        with open(self.order, "a") as stream:
            stream.write(self.name)
        return 10


def broken():
    raise RuntimeError("no luck\ntoday")
