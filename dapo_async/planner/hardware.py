"""GPUs by name: peaks, memory and links. A YAML file can add others.

The cost model reads them. Sources of the peaks are in `dapo_async.model.peak`. Memory and NVLink
(one direction, per GPU) come from the same datasheets. A GPU without NVLink has the speed of its
PCIe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.model.peak import TERA, Peak, known_peak

GIGA = 1e9
# By the start of its name: memory in GB, bytes per second to another GPU of its node in GB.
KNOWN: Mapping[str, tuple[float, float]] = {
    "GB200": (186, 900),
    "B200": (180, 900),
    "H200": (141, 450),
    "H20": (96, 450),
    "H800": (80, 200),
    "H100": (80, 450),
    "A100": (80, 300),
    "L40S": (48, 32),
}
FILE_KEYS = ("tflops", "tb_per_s", "memory_gb", "link_gb_per_s")
EXAMPLE = "{MI300X: {tflops: 1307, tb_per_s: 5.3, memory_gb: 192, link_gb_per_s: 448}}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks, memory and link of one device."""

    name: str
    peak: Peak
    memory_bytes: float
    link_bytes_per_s: float  # to another GPU of its node, one direction


def find_gpu(name: str, file: Path | None = None) -> Gpu:
    """The figures of a GPU, from the file if it has them, else from the datasheet.

    Raises ValueError for an unknown one, or for a file of another form.
    """
    others = {} if file is None else read_hardware(file)
    if name in others:
        return others[name]
    peak = known_peak(name)
    known = next((each for start, each in KNOWN.items() if name.upper().startswith(start)), None)
    if peak is None or known is None:
        names = ", ".join([*others, *KNOWN])
        raise ValueError(
            f"model.gpu ({name!r}) is not known; give one of {names}, or describe it in the file "
            "of model.hardware"
        )
    memory, link = known
    return Gpu(name, peak, memory * GIGA, link * GIGA)


def read_hardware(path: Path) -> dict[str, Gpu]:
    """The GPUs of a YAML file, by name. Raises ValueError with one line that names the file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"model.hardware ({path}) can't be read ({error.strerror}); give a YAML file such as "
            f"{EXAMPLE}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {what}; correct it") from error
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{path} must hold GPUs by name, such as {EXAMPLE}")
    return {str(name): _gpu(path, str(name), each) for name, each in values.items()}


def _gpu(path: Path, name: str, values: Any) -> Gpu:
    if not isinstance(values, Mapping) or set(values) != set(FILE_KEYS):
        raise ValueError(
            f"{path}: {name} must have exactly {', '.join(FILE_KEYS)}, such as {EXAMPLE}"
        )
    numbers = []
    for key in FILE_KEYS:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ValueError(f"{path}: {name}.{key} ({value!r}) must be a number above 0")
        numbers.append(float(value))
    tflops, terabytes, memory, link = numbers
    return Gpu(name, Peak(tflops * TERA, terabytes * TERA), memory * GIGA, link * GIGA)
