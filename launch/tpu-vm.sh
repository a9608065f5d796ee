#!/bin/bash
# jaxdistill train configs/paper_math72b.py
# Written by `jaxdistill launch --target tpu-vm`. Creates v5p-512 where it is not there, runs on all of its
# 64 hosts, and starts again what was preempted. The repository and the recipe must be on every host:
# give their installation as --setup.
set -uo pipefail

name=paper-math72b
place=(--zone=us-east5-a)
tpu=(gcloud compute tpus tpu-vm)

# On every host, which learns its number and the others from the metadata server. All of them are preempted together
# (exit code 75) while the machines stay, so that each starts again by itself. SIGTERM goes on to the process.
read -r -d '' on_host <<'SCRIPT' || true
status=75
while [ "$status" -eq 75 ]; do
  jaxdistill train configs/paper_math72b.py &
  process=$!
  trap 'kill -TERM "$process"' TERM
  wait "$process"
  status=$?
  while kill -0 "$process" 2>/dev/null; do # the signal ended the wait, not the process
    wait "$process"
    status=$?
  done
done
exit "$status"
SCRIPT

restarts=0
while true; do
  state=$("${tpu[@]}" describe "$name" "${place[@]}" --format='value(state)' 2>/dev/null)
  if [ -n "$state" ] && [ "$state" != READY ]; then # taken away: what is left must go first
    "${tpu[@]}" delete "$name" "${place[@]}" --quiet
    state=
  fi
  if [ -z "$state" ]; then
    "${tpu[@]}" create "$name" "${place[@]}" --accelerator-type=v5p-512 \
      --version=v2-alpha-tpuv5 --spot
  fi
  "${tpu[@]}" ssh "$name" "${place[@]}" --worker=all --command="$on_host"
  status=$?
  case $status in
    0 | 2) exit "$status" ;;
  esac
  if [ "$restarts" -ge 100 ]; then
    exit "$status"
  fi
  restarts=$((restarts + 1))
  echo "ended with exit code $status; start $((restarts + 1)) in 30 seconds" >&2
  sleep 30
done
