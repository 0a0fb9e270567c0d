"""Binary codes of token ids, in {-1, +1}^B: fixed before training, never learned.

An assignment chooses the integer 0 <= c < 2^B that stands for each token; bit 0 is the least
significant (paper, section 3.1). Every assignment goes through :class:`BitCodes`, so the model is
independent of the one in use.

Legend: V vocabulary, B bits per token, E dimension of the context vectors.
"""

import torch
from torch import Tensor, nn

from bitlm_dist.compilation import compiled_region

NUM_POWER_ITERATIONS = 16  # for the principal directions of `octave`
ESTIMATE_GRID = 256  # estimates are rounded to 1/256 if their signs name no token


def num_bits_needed(vocab_size: int) -> int:
    """Compute B = ceil(log2 V), at least 1."""
    return max(1, (vocab_size - 1).bit_length())


@compiled_region
def _signed_bits(codes: Tensor, bit_positions: Tensor) -> Tensor:
    return (2 * (codes.unsqueeze(-1) >> bit_positions & 1) - 1).float()


class BitCodes(nn.Module):
    """A bijection between V token ids and V of the 2^B bit patterns.

    Args:
        code_of_token: [V] int64, distinct integers below 2^num_bits; on the meta device, only its
            size matters.
        num_bits: B.

    Raises:
        ValueError: V > 2^B, or the codes are not distinct.
    """

    code_of_token: Tensor  # [V]
    token_of_code: Tensor  # [2^B], -1 where no token has the code
    bit_positions: Tensor  # [B] = 0..B-1

    def __init__(self, code_of_token: Tensor, num_bits: int) -> None:
        super().__init__()
        size = code_of_token.numel()

        if size > 2**num_bits:
            raise ValueError(
                f"model.bits = {num_bits} gives {2**num_bits:,} codes, "
                f"too few for {size:,} tokens: use {num_bits_needed(size)}"
            )
        token_of_code = torch.full((2**num_bits,), -1, dtype=torch.int64)
        token_of_code[code_of_token] = torch.arange(size)
        # of two tokens with the same code, the table keeps only one
        if not code_of_token.is_meta and int((token_of_code >= 0).sum()) != size:
            raise ValueError("two tokens share a code: an assignment must be a bijection")

        self.num_bits = num_bits
        self.vocab_size = size
        self.register_buffer("code_of_token", code_of_token)
        self.register_buffer("token_of_code", token_of_code, persistent=False)
        self.register_buffer("bit_positions", torch.arange(num_bits), persistent=False)

    def ids_to_bits(self, ids: Tensor) -> Tensor:
        """Encode token ids [...] as bits [..., B], float32 in {-1, +1} (paper, Eq. 4)."""
        return _signed_bits(self.code_of_token[ids], self.bit_positions)

    def bits_to_ids(self, bits: Tensor) -> Tensor:
        """Decode the signs of bits [..., B], with sign(0) = +1.

        Returns:
            Token ids [...], -1 where the code names no token.
        """
        return self.token_of_code[((bits >= 0).long() << self.bit_positions).sum(-1)]

    def nearest_ids(self, bits: Tensor) -> Tensor:
        """Find the token ids [...] whose codes have the largest inner product with the bits.

        Ties go to the lowest id. If the signs name a token, it is the answer, so only invalid codes
        need a search over V.

        Args:
            bits: [..., B].
        """
        ids = self.bits_to_ids(bits)
        invalid = (ids < 0).nonzero(as_tuple=True)
        if invalid[0].numel():
            # Saturated estimates cause many ties, which the last digits of a float must not decide.
            # On the grid, the sums are integers and so exact in any order of addition.
            table = self.ids_to_bits(torch.arange(self.vocab_size, device=bits.device))
            rows = (bits[invalid].float() * ESTIMATE_GRID).round().split(256)
            ids[invalid] = torch.cat([(row @ table.T).argmax(-1) for row in rows])
        return ids


def natural_codes(vocab_size: int) -> Tensor:
    """Use the token id itself, as in the paper."""
    return torch.arange(vocab_size)


def gray_codes(vocab_size: int) -> Tensor:
    """Use the Gray code: neighbouring ids differ in one bit."""
    ids = torch.arange(vocab_size)
    return ids ^ ids >> 1


def random_codes(vocab_size: int, num_bits: int, seed: int) -> Tensor:
    """Sample distinct codes from all 2^num_bits."""
    return torch.randperm(2**num_bits, generator=torch.Generator().manual_seed(seed))[:vocab_size]


def frequency_codes(token_counts: Tensor) -> Tensor:
    """Use the rank by corpus count [V], the most frequent token first.

    The unused codes are the highest ones, a single range.
    """
    order = torch.argsort(token_counts, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def octave_codes(token_counts: Tensor, context_vectors: Tensor) -> Tensor:
    """Use octaves of the frequency rank, clustered by context within (docs/recipe.md).

    The leading one of a code marks the octave [2^k, 2^(k+1)) of the token's rank. The k bits below
    it come from recursive bisection of the octave's tokens along the first principal direction of
    their context vectors.

    Args:
        token_counts: corpus count of each token, [V].
        context_vectors: context vector of each token, [V, E].
    """
    order = torch.argsort(token_counts, descending=True, stable=True)
    codes = torch.empty(len(order), dtype=torch.int64)

    codes[order[:1]] = 0  # rank 0 precedes the first octave
    for k in range(num_bits_needed(len(order))):
        tokens = order[2**k : 2 ** (k + 1)]
        codes[tokens] = 2**k + _leaf_positions(context_vectors[tokens].double(), k)
    return codes


def _leaf_positions(vectors: Tensor, depth: int) -> Tensor:
    """Order vectors as the leaves of a binary tree.

    The first half of the tree must be full before the second half gets any vector.

    Args:
        vectors: n <= 2^depth vectors, [n, E].

    Returns:
        Leaf positions 0..n-1, [n].
    """
    count = len(vectors)
    positions = torch.zeros(count, dtype=torch.int64)
    if count <= 1:
        return positions

    half = 2 ** (depth - 1)
    if count <= half:
        return _leaf_positions(vectors, depth - 1)

    # a full tree: bisect all nodes of a level at once
    if count == 2 * half:
        order = torch.arange(count)
        for level in range(depth):
            nodes = order.view(2**level, -1)
            order = nodes.gather(1, _order_along_principal_direction(vectors[nodes])).flatten()
        positions[order] = torch.arange(count)
        return positions

    order = _order_along_principal_direction(vectors.unsqueeze(0))[0]
    for subset, first in ((order[:half], 0), (order[half:], half)):
        positions[subset] = first + _leaf_positions(vectors[subset], depth - 1)
    return positions


def _order_along_principal_direction(vectors: Tensor) -> Tensor:
    """Order each node's vectors along their first principal direction, by power iteration.

    Args:
        vectors: [nodes, n, E].

    Returns:
        Indices [nodes, n].
    """
    centred = vectors - vectors.mean(1, keepdim=True)

    # Starting from the longest vector also fixes the sign of the direction.
    longest = centred.norm(dim=-1).argmax(1)
    direction = centred[torch.arange(len(centred)), longest].unsqueeze(-1)
    for _ in range(NUM_POWER_ITERATIONS):
        direction = torch.nn.functional.normalize(centred.mT @ (centred @ direction), dim=1)
    return torch.argsort((centred @ direction).squeeze(-1), dim=1, stable=True)
