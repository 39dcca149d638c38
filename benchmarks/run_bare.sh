#!/usr/bin/env bash
# The GPU tests and gpu_ops.py, or gpu_engines.py, on a machine that has torch, triton and a GPU, but no network.
#
#   benchmarks/run_bare.sh pack [OPTIONS] [FOLDER [PART...]]     on a machine with a network: download the wheels that are
#                                                              carried along; see run_bare.sh pack --help
#   benchmarks/run_bare.sh [OPTIONS] [ARGUMENTS OF gpu_ops.py, by default --quick --warm 8]     on the bare machine
#   benchmarks/run_bare.sh [OPTIONS] --engines [ARGUMENTS OF gpu_engines.py, by default --quick]
#
#   --output FOLDER          of ops.csv, ops.json, plots and logs, or of engines.csv; by default bare-results
#   --wheels FOLDER          what pack has written; by default benchmarks/wheels; none: what is installed already
#   --environment FOLDER     to install into, or where other wheels are already; by default one in $TMPDIR
#   --tests-seconds SECONDS  the most that the tests may take, 0 for none; by default 240; no tests before engines
#   --install-only           runs nothing: the first of several folders of wheels
#
# The wheels are for Python 3.12 on x86-64. They are installed into an environment of their own that sees the packages of
# $PYTHON (by default python3), which wins where it has one already.
# The exit status is that of gpu_ops.py (0, 1 if results disagree, 2 if something could not be measured), or 1 if tests
# have failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

die() {
    echo "run_bare.sh: $1" >&2
    exit 2
}

# Make or reuse the environment in folder $1 with the wheels in folder $2, or with none.
install() {
    local environment=$1 wheels=$2 pip
    if [[ $wheels != none ]]; then
        pip=$(find "$wheels" -name 'pip-*.whl' 2>/dev/null | head -n 1) || true
        [[ -n $pip ]] || die "--wheels: expected a folder that 'run_bare.sh pack' has filled, got $wheels"
        "${PYTHON:-python3}" -m venv --without-pip --system-site-packages "$environment"
        # Where $PYTHON is an environment itself, the new one sees only the packages of the Python below it.
        "${PYTHON:-python3}" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
            >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        # Without what they require: the folder has what is wanted of that, the machine the rest.
        "$environment/bin/python" "$pip/pip" install --quiet --disable-pip-version-check --no-index --no-cache-dir \
            --no-deps --find-links "$wheels" -r "$wheels/requirements.txt"
        cat "$wheels/environment.txt" >>"$environment/environment.txt"
    fi
    [[ -x $environment/bin/python ]] || die "--wheels: none: expected an environment in $environment, where is none"
    set -a
    # shellcheck source=/dev/null
    source "$environment/environment.txt"
    set +a
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
    local output=bare-results wheels=$root/benchmarks/wheels seconds=240 tests=0 status=0 run=ops
    local environment=${TMPDIR:-/tmp}/qnext-bare-$(id -u)
    while (($#)); do
        case $1 in
        pack) shift && exec "${PYTHON:-python3}" "$root/benchmarks/pack_bare.py" "$@" ;;
        -h | --help) usage && return ;;
        --output) output=${2:?--output: expected a folder} && shift 2 ;;
        --wheels) wheels=${2:?--wheels: expected a folder} && shift 2 ;;
        --environment) environment=${2:?--environment: expected a folder} && shift 2 ;;
        --tests-seconds) seconds=${2:?--tests-seconds: expected a number} && shift 2 ;;
        --install-only) run=nothing && shift ;;
        --engines) run=engines && shift && break ;;
        *) break ;;
        esac
    done
    install "$environment" "$wheels"
    mkdir -p "$output"
    output=$(cd "$output" && pwd)
    export PYTHONPATH=$root:$root/kernels:$root/vllm_plugin:$root/sglang_plugin PYTHONUNBUFFERED=1
    case $run in
    nothing) return ;;
    engines)
        (($#)) || set -- --quick
        # Engines look for the plugin among what is installed.
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation \
            --no-deps --editable "$root"
        "$environment/bin/python" "$root/benchmarks/gpu_engines.py" --csv "$output/engines.csv" --logs "$output" "$@" \
            2>&1 | tee "$output/engines.log" || status=$?
        ;;
    ops)
        (($#)) || set -- --quick --warm 8
        if ((seconds)); then run_tests "$environment/bin/python" "$seconds" "$output" || tests=1; fi
        "$environment/bin/python" "$root/benchmarks/gpu_ops.py" --csv "$output/ops.csv" --json "$output/ops.json" \
            --plots "$output" "$@" 2>&1 | tee "$output/ops.log" || status=$?
        ;;
    esac
    echo "results in $output"
    return $((tests ? 1 : status))
}

main "$@"
