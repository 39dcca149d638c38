#!/usr/bin/env bash
# The GPU tests and gpu_ops.py on a machine that has torch, triton and a GPU, but no network.
#
#   benchmarks/run_bare.sh pack [FOLDER]     on a machine with a network: download the wheels that are carried along
#   benchmarks/run_bare.sh [OPTIONS] [ARGUMENTS OF gpu_ops.py, by default --quick --warm 8]     on the bare machine
#
#   --output FOLDER          of ops.csv, ops.json, plots, tests.log, ops.log; by default bare-results
#   --wheels FOLDER          what pack has written; by default benchmarks/wheels
#   --tests-seconds SECONDS  the most that the tests may take, 0 for none; by default 240
#
# The wheels are for Python $BARE_PYTHON (by default 3.12) on x86-64 and weigh at most 64 MiB. They are installed into an
# environment of their own that sees the packages of $PYTHON (by default python3), which wins where it has one already.
# The exit status is that of gpu_ops.py (0, 1 if results disagree, 2 if something could not be measured), or 1 if tests
# have failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
limit=$((64 << 20))
platforms=(manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_24_x86_64 manylinux_2_27_x86_64 manylinux_2_28_x86_64)
# What gpu_ops.py and the tests of the kernels import, and the peers that are Triton and Python alone.
requirements=(
    numpy pydantic rich httpx prometheus-client platformdirs filelock
    pytest pytest-timeout pytest-xdist safetensors "transformers>=5.16.1,<5.20"
    fla-core einops
)

usage() {
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

die() {
    echo "run_bare.sh: $1" >&2
    exit 2
}

# Download the wheels into a folder, which is emptied of other wheels before.
pack() {
    local folder=${1:-$root/benchmarks/wheels} version=${BARE_PYTHON:-3.12} platform size
    local -a tags=()
    for platform in "${platforms[@]}"; do tags+=(--platform "$platform"); done
    mkdir -p "$folder"
    rm -f "$folder"/*.whl
    "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --only-binary=:all: \
        --python-version "$version" --implementation cp "${tags[@]}" --dest "$folder" pip "${requirements[@]}"
    size=$(du -sb --apparent-size "$folder" | cut -f1)
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels for Python $version in $folder, $((size >> 20)) MiB"
    ((size <= limit)) || die "wheels: expected at most $((limit >> 20)) MiB in $folder, got $((size >> 20)) MiB"
}

# Make or reuse the environment in folder $1 from the wheels in folder $2.
install() {
    local environment=$1 wheels=$2 pip
    pip=$(find "$wheels" -name 'pip-*.whl' 2>/dev/null | head -n 1) || true
    [[ -n $pip ]] || die "--wheels: expected a folder that 'run_bare.sh pack' has filled, got $wheels"
    "${PYTHON:-python3}" -m venv --without-pip --system-site-packages "$environment"
    # Where $PYTHON is an environment itself, the new one sees only the packages of the Python below it.
    "${PYTHON:-python3}" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
        >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    "$environment/bin/python" "$pip/pip" install --quiet --disable-pip-version-check --no-index --no-cache-dir \
        --find-links "$wheels" "${requirements[@]}"
    "$environment/bin/python" -c 'import torch, triton; print(f"torch {torch.__version__}, triton {triton.__version__}")' ||
        die "expected torch and triton in ${PYTHON:-python3}"
}

# Run the tests that need a GPU for at most $2 seconds, with the log in folder $3; 0 where there are none.
run_tests() {
    local python=$1 seconds=$2 output=$3 status=0 processes
    # Most of the time goes into compiling.
    processes=$(($(nproc) < 8 ? $(nproc) : 8))
    (cd "$root" && timeout "$seconds" "$python" -m pytest -m gpu -n "$processes" -q -p no:cacheprovider tests/kernels \
        tests/cli/test_bench_gpu.py) \
        >"$output/tests.log" 2>&1 || status=$?
    tail -n 3 "$output/tests.log"
    case $status in
    0) ;;
    5) echo "tests: none is marked gpu" ;;
    124) echo "tests: stopped after $seconds s, see $output/tests.log" && return 1 ;;
    *) echo "tests: failed, see $output/tests.log" && return 1 ;;
    esac
}

main() {
    local output=bare-results wheels=$root/benchmarks/wheels seconds=240 tests=0 status=0
    local environment=${TMPDIR:-/tmp}/qnext-bare-$(id -u)
    while (($#)); do
        case $1 in
        pack) shift && pack "$@" && return ;;
        -h | --help) usage && return ;;
        --output) output=${2:?--output: expected a folder} && shift 2 ;;
        --wheels) wheels=${2:?--wheels: expected a folder} && shift 2 ;;
        --tests-seconds) seconds=${2:?--tests-seconds: expected a number} && shift 2 ;;
        *) break ;;
        esac
    done
    (($#)) || set -- --quick --warm 8
    mkdir -p "$output"
    output=$(cd "$output" && pwd)
    install "$environment" "$wheels"
    export PYTHONPATH=$root:$root/kernels:$root/vllm_plugin:$root/sglang_plugin PYTHONUNBUFFERED=1
    if ((seconds)); then run_tests "$environment/bin/python" "$seconds" "$output" || tests=1; fi
    "$environment/bin/python" "$root/benchmarks/gpu_ops.py" --csv "$output/ops.csv" --json "$output/ops.json" \
        --plots "$output" "$@" 2>&1 | tee "$output/ops.log" || status=$?
    echo "results in $output"
    return $((tests ? 1 : status))
}

main "$@"
