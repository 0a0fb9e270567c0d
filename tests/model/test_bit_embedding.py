import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.initialization import draw_weights


def drawn(seed, *sizes):
    embedding = BitEmbedding(*sizes)
    draw_weights(embedding, seed)
    return embedding


def encoded(vocabulary, bits):
    return BitCodes(natural_codes(vocabulary), bits).ids_to_bits(torch.arange(vocabulary))


def test_without_windows_it_is_the_papers_mlp(seed):
    embedding = drawn(seed, 5, 16)
    bits = encoded(32, 5)

    assert {name for name, _ in embedding.named_parameters()} == {
        "up.weight",
        "up.bias",
        "down.weight",
        "down.bias",
    }
    torch.testing.assert_close(
        embedding(bits), embedding.down(torch.nn.functional.gelu(embedding.up(bits)))
    )


@pytest.mark.parametrize(
    ("bits", "window", "starts"), [(12, 8, [0, 2, 4]), (17, 8, [0, 2, 4, 6, 8, 9]), (6, 8, [0])]
)
def test_windows_cover_all_bits_and_add_their_rows(bits, window, starts, seed):
    """Compare with look-ups by integer arithmetic on the token ids, one window at a time."""
    embedding = drawn(seed, bits, 16, window)
    assert embedding.window_bits[:, 0].tolist() == starts

    ids = torch.randint(2**bits, (50,))
    got = embedding((2 * (ids.unsqueeze(-1) >> torch.arange(bits) & 1) - 1).float())

    # the same MLP without windows, plus the rows
    plain = BitEmbedding(bits, 16)
    plain.load_state_dict(
        {n: p for n, p in embedding.state_dict().items() if n.startswith(("up", "down"))}
    )
    expected = plain((2 * (ids.unsqueeze(-1) >> torch.arange(bits) & 1) - 1).float())
    rows = 2 ** min(window, bits)
    for start, table in zip(starts, embedding.table.split(rows), strict=True):
        expected = expected + table[(ids >> start) % rows]

    torch.testing.assert_close(got, expected)


def test_every_row_that_occurs_is_trained(seed):
    embedding = drawn(seed, 10, 8, 8)
    embedding(encoded(1024, 10)).square().sum().backward()
    assert embedding.table.grad.any(-1).all()
