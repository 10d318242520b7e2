#!/usr/bin/env bash
# Everything on a machine with a GPU: build, tests, a short list under compute-sanitizer, benchmarks; one table at the end.
# Needs Linux, a driver, nvcc, a C++20 compiler and Python >= 3.11 with venv; CuPy, and rivals where they are to be had.
#
#   benchmarks/gpu.sh                      all of it, or some: benchmarks/gpu.sh build test sanitize bench
#   WHEELS=folder benchmarks/gpu.sh        without a network: packages come from there
#   ARCHITECTURES=80-real                  as CMake spells them; by default that of the first GPU
#   RIVALS="torch liger-kernel"            what to install; by default what is not there yet of the list below
#   BENCH="--cases instance --pairs 20"    options of gpu.py
#
# What Python has installed is seen too, so that large packages need not be installed again. Exit status 1 where anything
# failed; later steps are done all the same.
set -ufo pipefail
cd "$(dirname "$0")/.."

work=${WORK:-build/gpu}
steps=${*:-build test sanitize bench}
failed=()
export NORMKIT_CUDA=${NORMKIT_CUDA:-on} PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
source_of_packages=(${WHEELS:+--no-index --find-links "$WHEELS"})
rivals=${RIVALS:-torch nvidia-cudnn-frontend liger-kernel quack-kernels jax[cuda13]}

has() { [[ " $steps " == *" $1 "* ]]; }
must() { "$@" || { echo "failed: $*" >&2; exit 1; }; }
try() {
  echo "=== $* ($SECONDS s)"
  "$@" || failed+=("$*")
}
install() { python -m pip install --quiet "${source_of_packages[@]}" "$@"; }

architecture() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) || return 1
  echo "${capability/./}-real"
}

build() {
  must install scikit-build-core nanobind nanobind-backend cmake ninja "numpy>=2" ml_dtypes pytest hypothesis
  install onnx || echo "onnx left out: its tests are skipped"
  python -c 'import cupy' 2>/dev/null || install cupy-cuda13x || echo "CuPy left out: no tests and no benchmarks on a GPU"
  for package in $rivals; do
    python -m pip show --quiet "${package%%[*}" 2>/dev/null || install "$package" || echo "$package left out"
  done
  local targets
  targets=${ARCHITECTURES:-$(architecture)} || { echo "no GPU: nvidia-smi tells none" >&2; exit 1; }
  must python -m pip install --quiet --no-deps --no-build-isolation --config-settings=build-dir="$work/build" \
    --config-settings=cmake.define.NORMKIT_CUDA_ARCHITECTURES="$targets" .
  python -m normkit
}

# The tests of values, on arrays of the GPU.
values() {
  local files=(tests/test_{values,layouts,out,where,residual,activation,adaptive,extremes,edges,family,phases}.py
    tests/test_{double_backward,streamed,bits,hypothesis,onnx,errors}.py)
  NORMKIT_TEST_ARRAYS=${NORMKIT_TEST_ARRAYS:-cupy} python -m pytest -q "${files[@]}"
}

sanitized() {
  NORMKIT_TEST_POOL=off compute-sanitizer --tool "$1" --error-exitcode 9 \
    python -m pytest -q -m sanitizer tests/test_gpu.py
}

python3 -m venv --system-site-packages "$work/venv" || exit 1
. "$work/venv/bin/activate"
has build && build
if has test; then
  try python -m pytest -q tests/test_gpu.py tests/test_cuda_arrays.py
  try values
fi
if has sanitize; then
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do try sanitized "$tool"; done
  else
    echo "compute-sanitizer left out: it is not there"
  fi
fi
if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[@]}" >&2; fi
if has bench; then
  chip=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -cs '[:alnum:]\n' '-' | tr '[:upper:]' '[:lower:]')
  python benchmarks/gpu.py --json "benchmarks/results/$(date +%F)-${chip:-gpu}.json" ${BENCH:-} || failed+=(benchmarks)
fi
((${#failed[@]} == 0))
