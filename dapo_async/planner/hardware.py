"""GPUs by name: peaks, memory and links. A YAML file can add others.

The cost model reads them. Sources of the peaks are in `dapo_async.model.peak`. Memory and NVLink
(one direction, per GPU) come from the same datasheets. A GPU without NVLink has the speed of its
PCIe. The network is that of NVIDIA's own machines: 200 Gb/s per GPU with A100 (DGX A100), 400 Gb/s
with later ones (DGX H100, GB200 NVL72), 200 Gb/s for two L40S. NVLink joins all GPUs of a machine;
with GB200 those of a rack, which are in machines of four.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_async.model.peak import TERA, Peak, known_peak

GIGA = 1e9
NODE_GPUS = 8  # of a machine, where nothing else is known
# By the start of its name: memory in GB, GB/s to another GPU of its node, to one of another node.
KNOWN: Mapping[str, tuple[float, float, float]] = {
    "GB200": (186, 900, 50),
    "B200": (180, 900, 50),
    "H200": (141, 450, 50),
    "H20": (96, 450, 50),
    "H800": (80, 200, 50),
    "H100": (80, 450, 50),
    "A100": (80, 300, 25),
    "L40S": (48, 32, 12.5),
}
# GPUs of a machine, and GPUs that the link joins.
MACHINES: Mapping[str, tuple[int, int]] = {"GB200": (4, 72)}
FILE_KEYS = ("tflops", "tb_per_s", "memory_gb", "link_gb_per_s")
MORE_KEYS: Mapping[str, float] = {"network_gb_per_s": 50, "node_gpus": 8, "link_gpus": 8}
EXAMPLE = "{MI300X: {tflops: 1307, tb_per_s: 5.3, memory_gb: 192, link_gb_per_s: 448}}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks, memory and links of one device."""

    name: str
    peak: Peak
    memory_bytes: float
    link_bytes_per_s: float  # to another of the `link_gpus`, one direction
    network_bytes_per_s: float  # to all others, one direction
    node_gpus: int = NODE_GPUS  # of a machine: they are lost together
    link_gpus: int = NODE_GPUS


def find_gpu(name: str, file: Path | None = None) -> Gpu:
    """The figures of a GPU, from the file if it has them, else from the datasheet.

    Raises ValueError for an unknown one, or for a file of another form.
    """
    others = {} if file is None else read_hardware(file)
    if name in others:
        return others[name]
    peak = known_peak(name)
    kind = next((start for start in KNOWN if name.upper().startswith(start)), None)
    if peak is None or kind is None:
        names = ", ".join([*others, *KNOWN])
        raise ValueError(
            f"model.gpu ({name!r}) is not known; give one of {names}, or describe it in the file "
            "of model.hardware"
        )
    memory, link, network = (GIGA * each for each in KNOWN[kind])
    return Gpu(name, peak, memory, link, network, *MACHINES.get(kind, (NODE_GPUS, NODE_GPUS)))


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
    if not isinstance(values, Mapping) or not (
        set(FILE_KEYS) <= set(values) <= {*FILE_KEYS, *MORE_KEYS}
    ):
        raise ValueError(
            f"{path}: {name} must have {', '.join(FILE_KEYS)}, may have {', '.join(MORE_KEYS)}, "
            f"and nothing else, such as {EXAMPLE}"
        )
    numbers: dict[str, float] = {}
    for key, value in {**MORE_KEYS, **values}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ValueError(f"{path}: {name}.{key} ({value!r}) must be a number above 0")
        numbers[key] = float(value)
    return Gpu(
        name,
        Peak(numbers["tflops"] * TERA, numbers["tb_per_s"] * TERA),
        numbers["memory_gb"] * GIGA,
        numbers["link_gb_per_s"] * GIGA,
        numbers["network_gb_per_s"] * GIGA,
        max(1, round(numbers["node_gpus"])),
        max(1, round(numbers["link_gpus"])),
    )
