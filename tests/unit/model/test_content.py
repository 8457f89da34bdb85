"""The 64-bit sum over the content of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dapo_async.model import Mesh, checksum, checksum_of_parts
from dapo_async.model.config import ModelConfig
from dapo_async.model.content import _factor, _part_sum, as_checksum
from dapo_async.model.decoder import Decoder

TINY = ModelConfig.from_dict(
    {
        "model_type": "qwen2",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)
MLP = "model.layers.{}.mlp.{}_proj.weight"


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    decoder = Decoder(TINY)
    return {name: each.detach().to(dtype) for name, each in decoder.named_parameters()}


def one_bit(given: dict[str, Tensor]) -> None:
    each = given["model.norm.weight"]
    bits = each.view(torch.int16 if each.element_size() == 2 else torch.int32)
    bits[3] ^= 1


def one_sign(given: dict[str, Tensor]) -> None:
    given[MLP.format(1, "up")][2, 5] *= -1


def swap_tensors(given: dict[str, Tensor]) -> None:
    gate, up = MLP.format(0, "gate"), MLP.format(0, "up")
    given[gate], given[up] = given[up], given[gate]


def swap_rows(given: dict[str, Tensor]) -> None:
    name = MLP.format(0, "up")
    given[name] = given[name].flip(0)


def swap_columns(given: dict[str, Tensor]) -> None:
    name = MLP.format(0, "up")
    given[name] = given[name].flip(1)


def one_stale_layer(given: dict[str, Tensor]) -> None:
    name = MLP.format(0, "down")
    given[name] = given[name] * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [one_bit, one_sign, swap_tensors, swap_rows, swap_columns, one_stale_layer],
    ids=lambda change: change.__name__,
)
def test_every_change_of_a_bit_a_place_or_a_name_changes_the_sum(
    change: Callable[[dict[str, Tensor]], None], dtype: torch.dtype
) -> None:
    given = weights(dtype)
    before = checksum(given)
    assert checksum(dict(reversed(given.items()))) == before
    change(given)
    assert checksum(given) != before


def test_the_same_bits_under_another_shape_or_dtype_have_another_sum() -> None:
    ones = torch.ones(4, 6)
    sums = {checksum({"w": ones}), checksum({"w": ones.view(6, 4)}), checksum({"v": ones})}
    assert len(sums | {checksum({"w": ones.view(torch.int32)})}) == 4


@pytest.mark.parametrize("cut", [(3, 5), (1, 2), (6, 9)])
def test_the_sums_of_parts_add_up_to_that_of_the_whole(cut: tuple[int, int]) -> None:
    whole = torch.randn(7, 10, dtype=torch.bfloat16)
    rows, columns = cut
    total = torch.zeros((), dtype=torch.int64)
    for part in (slice(0, rows), slice(rows, 7)):
        for other in (slice(0, columns), slice(columns, 10)):
            total += _part_sum("w", whole[part, other], (part, other), shape=whole.shape)
    assert as_checksum(total) == checksum({"w": whole})


def test_a_whole_decoder_has_the_sum_of_its_rounded_weights() -> None:
    torch.manual_seed(1)
    decoder = Decoder(TINY)
    assert checksum_of_parts(decoder, Mesh(), torch.bfloat16) == checksum(weights(torch.bfloat16))


def test_the_sum_is_the_formula_in_unbounded_integers() -> None:
    def odd(seed: int, index: int) -> int:
        most = 2**64

        def shifted(value: int, by: int) -> int:  # of a signed number, as torch shifts
            signed = value - most if value >= most // 2 else value
            return (value ^ (signed >> by)) % most

        mixed = (index + (seed << 40)) * 0x9E3779B97F4A7C15 % most
        mixed = shifted(mixed, 30) * 0xBF58476D1CE4E5B9 % most
        return (shifted(mixed, 27) * 0x9E3779B97F4A7C15 % most) | 1

    values = torch.tensor([[1, -2, 3], [40000, 5, -6]], dtype=torch.int32)
    expected = sum(
        int(values[row, column]) * odd(1, row) * odd(2, column)
        for row in range(2)
        for column in range(3)
    )
    part = _part_sum("w", values, (slice(0, 2), slice(0, 3)), shape=values.shape)
    factor = _factor("w", torch.int32, values.shape)
    assert int(part) % 2**64 == expected * factor % 2**64
