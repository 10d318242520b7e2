#!/usr/bin/env bash
# All that a GPU is asked, on Linux with Python >= 3.11; what that is and what can be set, gpu_run.py says.
#
#   benchmarks/gpu.sh pack FOLDER        where there is a network: gathers what the machine with the GPU may lack
#   benchmarks/gpu.sh --wheels FOLDER    there, without a network: tests, times, sanitizers, rivals, one table
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_run.py" "$@"
