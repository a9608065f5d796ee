#!/bin/sh
# Everything that is claimed of one H100, measured in one call of less than 10 minutes: benchmarks/gpu/main.py says what.
#   benchmarks/gpu.sh [--smoke] [--out FOLDER] [--budget-s 570] [--parts PART ...] [--models MODEL ...] [--rows TOKENS ...]
# PYTHON names the interpreter that has jax with CUDA (and torch, to compare with); by default python3.
cd "$(dirname "$0")/.." || exit 1
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" benchmarks/gpu/main.py "$@"
