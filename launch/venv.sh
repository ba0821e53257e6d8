#!/usr/bin/env bash
# Sourced by the scripts: makes .venv once, installs syncbn with the extras named, and activates it.
#   source launch/venv.sh train,test
# PYTHON chooses the interpreter (default: python3.11, else python3), TORCH another version of torch, such as 2.11:
# that has a folder of its own, .venv-torch-2.11.
set -euo pipefail
extras=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-$(command -v python3.11 || command -v python3 || echo python3)}
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "venv.sh: syncbn needs Python 3.10 or newer with venv and ensurepip; got '$python', which is none." >&2
    echo "Install one (Debian and Ubuntu: the package python3-venv), or set PYTHON to one." >&2
    exit 2
fi
venv=.venv${TORCH:+-torch-$TORCH}
[ -f "$venv/bin/activate" ] || "$python" -m venv "$venv" # its last file: an interrupted one is made again
source "$venv/bin/activate"
constraints=launch/constraints.txt
if [ -n "${TORCH:-}" ]; then # with the Triton that this torch wants
    constraints=$venv/constraints.txt
    { grep -vE '^(torch|triton)==' launch/constraints.txt && echo "torch==$TORCH.*"; } >"$constraints"
fi
# The CPU library is compiled by an installation, where there is a compiler; it is made anew when its source changes.
sources=$(cat pyproject.toml "$constraints" syncbn/backends/native/*.[ch] 2>/dev/null | cksum || true)
wanted="$extras $sources"
if [ "$(cat "$venv/installed-$extras" 2>/dev/null)" != "$wanted" ]; then
    echo "installing syncbn[$extras] into $root/$venv ..."
    python -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable ".[$extras]"
    echo "$wanted" >"$venv/installed-$extras"
fi
