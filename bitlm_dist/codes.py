"""Token ids and their B-bit codes in {-1, +1}^B: fixed before training, never learned.

The codes are a choice of which integer 0 <= c < 2^B stands for which token; bit 0 is the least significant (paper, section 3.1).
Every assignment goes through :class:`BitCodes`, so the model never knows which one is in use.
"""

import torch
from torch import Tensor, nn

from bitlm_dist.compilation import region

POWER_STEPS = 16  # of the power iteration behind `octave`
ESTIMATE_GRID = 256  # an estimate is read to 1/256 where its signs name no token


def bits_needed(vocabulary: int) -> int:
    """B = ceil(log2 V), at least 1."""
    return max(1, (vocabulary - 1).bit_length())


@region
def _signed_bits(codes: Tensor, places: Tensor) -> Tensor:
    return (2 * (codes.unsqueeze(-1) >> places & 1) - 1).float()


class BitCodes(nn.Module):
    """A bijection between V token ids and V of the 2^B bit patterns.

    Args:
        code_of_token: [V] int64, distinct integers below 2^bits; on the meta device only its size counts.
        bits: B.

    Raises:
        ValueError: V > 2^B, or the codes are not distinct.
    """

    code_of_token: Tensor  # [V]
    token_of_code: Tensor  # [2^B], -1 where no token has the code
    places: Tensor  # [B] = 0..B-1

    def __init__(self, code_of_token: Tensor, bits: int) -> None:
        super().__init__()
        size = code_of_token.numel()
        if size > 2**bits:
            raise ValueError(f"model.bits = {bits} gives {2**bits:,} codes, too few for {size:,} tokens: use {bits_needed(size)}")
        token_of_code = torch.full((2**bits,), -1, dtype=torch.int64)
        token_of_code[code_of_token] = torch.arange(size)
        if not code_of_token.is_meta and int((token_of_code >= 0).sum()) != size:
            raise ValueError("two tokens share a code: an assignment must be a bijection")
        self.bits, self.vocabulary = bits, size
        self.register_buffer("code_of_token", code_of_token)
        self.register_buffer("token_of_code", token_of_code, persistent=False)
        self.register_buffer("places", torch.arange(bits), persistent=False)

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> bits [..., B], float32 in {-1, +1} (paper, Eq. 4)."""
        return _signed_bits(self.code_of_token[ids], self.places)

    def decode(self, bits: Tensor) -> Tensor:
        """Bits [..., B], read by sign with sign(0) = +1 -> token ids [...], -1 where the code names no token."""
        return self.token_of_code[((bits >= 0).long() << self.places).sum(-1)]

    def project(self, bits: Tensor) -> Tensor:
        """Token ids [...] whose codes have the largest inner product with ``bits`` [..., B], the lowest id at a tie.

        Where the signs name a token that token is the answer, so only invalid codes cost a search over V. There the bits are
        rounded to 1/256: saturated estimates make many ties, which the last digits of a float must not decide, and the sums
        become integers, exact in any order of addition.
        """
        ids = self.decode(bits)
        invalid = (ids < 0).nonzero(as_tuple=True)
        if invalid[0].numel():
            table = self.encode(torch.arange(self.vocabulary, device=bits.device))
            rows = (bits[invalid].float() * ESTIMATE_GRID).round().split(256)
            ids[invalid] = torch.cat([(row @ table.T).argmax(-1) for row in rows])
        return ids


def natural(vocabulary: int) -> Tensor:
    """The token id itself: the literal paper."""
    return torch.arange(vocabulary)


def gray(vocabulary: int) -> Tensor:
    """Gray code: neighbouring ids differ in one bit."""
    ids = torch.arange(vocabulary)
    return ids ^ ids >> 1


def random(vocabulary: int, bits: int, seed: int) -> Tensor:
    """Distinct codes drawn from all 2^bits."""
    return torch.randperm(2**bits, generator=torch.Generator().manual_seed(seed))[:vocabulary]


def frequency(counts: Tensor) -> Tensor:
    """Rank by corpus count [V], the most frequent token first: unused codes stay one top range."""
    order = torch.argsort(counts, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def octave(counts: Tensor, contexts: Tensor) -> Tensor:
    """Octaves of the frequency rank, clustered inside by context (method, section 9, item 0).

    The leading one of a code marks the octave [2^k, 2^(k+1)) of the token's rank; the k bits below it come from recursive
    bisection of the octave's tokens along the first principal direction of their context vectors.

    Args:
        counts: corpus count of each token, [V].
        contexts: context vector of each token, [V, E].
    """
    order = torch.argsort(counts, descending=True, stable=True)
    codes = torch.empty(len(order), dtype=torch.int64)
    codes[order[:1]] = 0
    for k in range(bits_needed(len(order))):
        tokens = order[2**k : 2 ** (k + 1)]
        codes[tokens] = 2**k + _bisect(contexts[tokens].double(), k)
    return codes


def _bisect(vectors: Tensor, depth: int) -> Tensor:
    """Places 0..n-1 of n <= 2^depth vectors [n, E] in a binary tree; the first half fills up before the second begins."""
    count = len(vectors)
    places = torch.zeros(count, dtype=torch.int64)
    if count <= 1:
        return places
    half = 2 ** (depth - 1)
    if count <= half:
        return _bisect(vectors, depth - 1)
    if count == 2 * half:  # a full tree: all nodes of a level at once
        order = torch.arange(count)
        for level in range(depth):
            nodes = order.view(2**level, -1)
            order = nodes.gather(1, _along_principal(vectors[nodes])).flatten()
        places[order] = torch.arange(count)
        return places
    order = _along_principal(vectors.unsqueeze(0))[0]
    for part, first in ((order[:half], 0), (order[half:], half)):
        places[part] = first + _bisect(vectors[part], depth - 1)
    return places


def _along_principal(vectors: Tensor) -> Tensor:
    """Order of each node's vectors [nodes, n, E] along their first principal direction, by power iteration: [nodes, n]."""
    centred = vectors - vectors.mean(1, keepdim=True)
    longest = centred.norm(dim=-1).argmax(1)
    direction = centred[torch.arange(len(centred)), longest].unsqueeze(-1)  # fixes the sign too
    for _ in range(POWER_STEPS):
        direction = torch.nn.functional.normalize(centred.mT @ (centred @ direction), dim=1)
    return torch.argsort((centred @ direction).squeeze(-1), dim=1, stable=True)
