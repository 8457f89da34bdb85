#!/usr/bin/env bash
# Installs the real SGLang for machines without a GPU into the Python environment that is active: wheels from PyPI only, about a minute.
# Usage, after the project itself is installed: bash cluster/sglang_cpu/install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
pinned() { grep -m1 "^$1==" "$root/constraints.txt" || { echo "constraints.txt has no pin for $1, which this recipe was tried with" >&2; exit 1; }; }
site=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

# Without their dependencies: SGLang names some 25 CUDA packages that its CPU path never imports, torchvision another build of torch.
python -m pip install -q --no-deps "$(pinned sglang)" "$(pinned torchvision)"
# What the CPU path does import; versions by constraints.txt.
python -m pip install -q -c "$root/constraints.txt" "$(pinned torch)" "$(pinned transformers)" -r "$here/requirements.txt"

# PyPI's torchvision is linked against CUDA: its operators can't be loaded beside a CPU torch, so the decorators that describe them are skipped.
meta="$site/torchvision/_meta_registrations.py"
python - "$meta" <<'PYTHON'
import re
import sys

path = sys.argv[1]
with open(path, encoding="utf-8") as file:
    text = file.read()
guard = "torchvision.extension._has_ops()"
found = re.findall(r'^@torch\.library\.register_fake\("torchvision::\w+"\)$', text, re.MULTILINE)
if not found and guard not in text:
    sys.exit(f"{path} has changed: nothing to guard was found; try this recipe anew with that version of torchvision")
text = re.sub(
    r'^@(torch\.library\.register_fake\("torchvision::\w+"\))$', rf"@(\1 if {guard} else lambda function: function)", text, flags=re.MULTILINE
)
with open(path, "w", encoding="utf-8") as file:
    file.write(text)
PYTHON
mkdir -p "$site/sgl_kernel"
cp "$here/sgl_kernel/__init__.py" "$site/sgl_kernel/__init__.py"

# From a folder without the stand-in beside it: what is imported is what was installed.
cd / && SGLANG_USE_CPU_ENGINE=1 python -W ignore - "$(pinned sglang)" "$(pinned torch)" <<'PYTHON'
import sys

import sglang
import sglang.srt.entrypoints.http_server
import torch

found = [f"sglang=={sglang.__version__}", f"torch=={torch.__version__.partition('+')[0]}"]
if found != sys.argv[1:]:
    sys.exit(f"installed {' and '.join(found)}, pinned are {' and '.join(sys.argv[1:])}")
print("the real SGLang for CPU is installed:", *found)
PYTHON
