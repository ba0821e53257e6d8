#!/usr/bin/env bash
# Lint, types and the whole suite, in a .venv that it makes itself. Arguments go to pytest: bash tests/run.sh -k mask
# TORCH=2.11 bash tests/run.sh runs it on another torch, whose types may differ: there mypy is left out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh" test
# timm asks for torchvision, of which there is no CPU build; its models need none, see tests/support/fake_torchvision.py
python -m pip install --quiet --disable-pip-version-check --no-deps --constraint "$constraints" timm
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests' ranks are processes; more threads only fight for cores
ruff format --check .
ruff check .
[ -n "${TORCH:-}" ] || mypy
unset TORCH # what the tests start uses this interpreter
python -m pytest -n auto "$@"
