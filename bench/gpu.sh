#!/usr/bin/env bash
# Measures everything on a GPU in one call of at most ten minutes; `--help`, `--plan`, `--tiny`.
#
# The machine needs no network, and of our packages torch, numpy, pyarrow and PyYAML. What may lie
# beside the checkout, untracked:
#   .whl/*.whl                            wheels to install for this call, such as bitsandbytes
#   .ref/bdh/bdh.py                       the public reference of BDH
#   .ref/nanogpt/model.py                 nanoGPT
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3

scratch=${TMPDIR:-/tmp}/bench-gpu-$(id -u)
mkdir -p -m 700 "$scratch"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Kept between calls, so that a second one need not compile again.
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton
export XDG_CACHE_HOME=$scratch/cache

if compgen -G ".whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade \
    --target "$scratch/site" .whl/*.whl && export PYTHONPATH=$scratch/site
fi
given=()
[ -f .ref/bdh/bdh.py ] && given+=(--reference .ref/bdh)
[ -f .ref/nanogpt/model.py ] && given+=(--nanogpt .ref/nanogpt)
exec "$python" -m bench.gpu ${OUT:+--out "$OUT"} "${given[@]}" "$@"
