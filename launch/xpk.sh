#!/bin/bash
# jaxdistill train configs/paper_math72b.py
# Written by `jaxdistill launch --target xpk`. xpk makes a JobSet of it: one pod that ends with 75 (preempted), or is
# lost, starts all of them again; it restarts on 42 and 127 to 255 by itself.
set -euo pipefail

xpk workload create \
  --workload=paper-math72b \
  --cluster=my-cluster \
  --tpu-type=v5p-512 \
  --num-slices=1 \
  --docker-image=example.com/jaxdistill:latest \
  --max-restarts=100 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 \
  --command='exec jaxdistill train configs/paper_math72b.py'
