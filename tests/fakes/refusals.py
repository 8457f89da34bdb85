"""What a command answers to wrong input."""

import pytest
from paths import QUICKSTART

from dapo_async import config as knobs
from dapo_async.runtime.preflight import check_inputs


def refusal(*overrides: str) -> str:
    """The one line of the input check."""
    with pytest.raises(ValueError) as error:
        check_inputs(knobs.load(QUICKSTART, ["ray.address=local", *overrides]))
    assert "\n" not in str(error.value)
    return str(error.value)
