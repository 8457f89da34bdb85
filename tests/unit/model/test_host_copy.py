"""Tensors leave the memory of their device and come back the same."""

import pytest
import torch

from dapo_async.model import HostCopy


def test_a_released_storage_is_empty_and_every_view_of_it_comes_back() -> None:
    joined = torch.arange(12.0).view(3, 4)
    parts, other = joined.split([1, 2]), torch.full((5,), 7, dtype=torch.bfloat16)
    host = HostCopy()

    host.release((joined, *parts, other))

    assert [each.untyped_storage().nbytes() for each in (joined, *parts, other)] == [0, 0, 0, 0]
    assert host.num_bytes == 12 * 4 + 5 * 2
    host.restore()
    assert torch.equal(parts[1], torch.arange(4.0, 12.0).view(2, 4))
    assert other.tolist() == [7.0] * 5
    parts[0].fill_(9.0)  # still a view
    assert joined[0].tolist() == [9.0] * 4
    assert host.num_bytes == 0


def test_released_values_are_read_on_the_host_in_the_form_of_their_view() -> None:
    whole = torch.arange(6).view(2, 3)
    column, turned, free, host = whole[:, 1], whole.T, torch.ones(2), HostCopy()

    host.release([whole])

    assert host.view(column).tolist() == [1, 4]
    assert host.view(turned).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert host.view(free) is free


def test_a_second_release_is_a_mistake_and_a_restore_of_nothing_is_none() -> None:
    host = HostCopy()
    host.restore()
    host.release([torch.ones(3), torch.ones(0)])
    with pytest.raises(AssertionError, match="restore"):
        host.release([torch.ones(3)])
