#!/usr/bin/env bash
# Tries every kind of install from a copy of the checkout, each in a throw-away environment that
# borrows the dependencies of PYTHON's: check_install.sh PYTHON
#
# Covered: `pip install .`, `pip install -e .`, sdist -> wheel from an archive without symlinks,
# and an install without any compiler, which must succeed and run on the reference.
set -euo pipefail

python=$(realpath -s "$1")
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
log="$work/log"

quietly() {
    "$@" >"$log" 2>&1 || { cat "$log"; echo "FAILED: $*" >&2; exit 1; }
}

# copy NAME: the sources, without what builds leave behind.
copy() {
    mkdir -p "$work/$1"
    tar -C "$root" -c --exclude=./.venv* --exclude=./.git --exclude=./build --exclude=./dist \
        --exclude=./runs --exclude='*.so' --exclude='*.egg-info' --exclude='./.*_cache' \
        --exclude=./.benchmarks --exclude=./.hypothesis . | tar -C "$work/$1" -x
}

# environment NAME: a new venv that sees the borrowed dependencies, but no installed rlhf-fast: a
# .pth file adds their folder to sys.path without reading the .pth files in it.
environment() {
    quietly "$python" -m venv --without-pip "$work/$1-venv"
    echo "$site" >"$("$work/$1-venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
}

pip_install() {
    local name=$1
    shift
    quietly "$work/$name-venv/bin/python" -m pip install --disable-pip-version-check --no-deps "$@"
}

# check NAME BACKEND PLACE: outside of any checkout the package comes from PLACE, gae runs on
# BACKEND, and the doctor answers.
check() {
    (
        cd "$work"
        "$work/$1-venv/bin/python" - "$2" "$3" <<'PYTHON'
import sys
from pathlib import Path

import torch

import rlhf_fast
from rlhf_fast import backends
from rlhf_fast.ops import gae

backend, place = sys.argv[1:]
home = Path(rlhf_fast.__file__).resolve()
assert home.is_relative_to(Path(place).resolve()), f"imported {home}, not from {place}"
assert (home.parent / "py.typed").exists()
import rlhf_fast.cli  # noqa: E402, F401
import rlhf_fast.kernels.gae  # noqa: E402, F401
chosen = backends.chosen("gae", torch.device("cpu"), torch.float32)
assert chosen == backend, f"gae runs on {chosen}, expected {backend}"
advantages, _ = gae(torch.ones(1, 2), torch.zeros(1, 2), lam=1.0)
assert advantages.tolist() == [[2.0, 1.0]]
PYTHON
        quietly "$work/$1-venv/bin/rlhf-fast" doctor
    )
    echo "ok: $4"
}

# Only the first build compiles for the GPU, where nvcc is; it must then load.
export RLHF_FAST_CUDA=OFF

copy plain
environment plain
RLHF_FAST_CUDA=AUTO pip_install plain "$work/plain"
check plain cpp "$work/plain-venv" "pip install ."
if command -v nvcc >/dev/null; then
    (cd "$work" && "$work/plain-venv/bin/python" -c "import rlhf_fast._cuda")
    echo "ok: nvcc builds rlhf_fast._cuda, which loads without a driver"
else
    echo "not checked: rlhf_fast._cuda (no nvcc here)"
fi

copy editable
environment editable
pip_install editable -e "$work/editable"
check editable cpp "$work/editable" "pip install -e ."

copy bare
environment bare
CC=/nonexistent CXX=/nonexistent CUDACXX=/nonexistent pip_install bare "$work/bare"
check bare reference "$work/bare-venv" "pip install . without a compiler"

# An archive that lost the symlink, made into an sdist and that into a wheel.
copy archive
rm "$work/archive/rlhf_fast/kernels"
environment archive
quietly "$python" -m build --sdist --outdir "$work/sdist" "$work/archive"
quietly "$python" -m pip wheel --disable-pip-version-check --no-deps \
    --wheel-dir "$work/wheels" "$work"/sdist/*.tar.gz
pip_install archive "$work"/wheels/*.whl
check archive cpp "$work/archive-venv" "sdist -> wheel from an archive without symlinks"
