#!/bin/bash
# Trains on a TPU pod slice: runs the same command on every host, and JAX connects the hosts.
#
#   export TPU=my-pod ZONE=europe-west4-a
#   run="--workdir=/mnt/shared/runs/resnet50 --config=configs/imagenet_resnet50.py"
#   CHECK=1 experiments/launch/tpu_pod.sh $run     # the preflight, first
#   experiments/launch/tpu_pod.sh $run
#
# First, on every host: clone the repository into ~/flax_cnns, run `pip install -e . "jax[tpu]"`, and
# mount one NFS share (such as Filestore) for the run directory. A bucket has no locks and no renames.
# With LOGS=/mnt/shared/logs, each host has a log of its own there, and the errors of all hosts are in
# /mnt/shared/logs/errors.

set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"

launcher=()
if [ -n "${CHECK:-}${LOGS:-}" ]; then
  launcher=(python3 -m flax_cnns.launch ${CHECK:+--check} ${LOGS:+"--logs=$LOGS"} --)
fi
command=("${launcher[@]}" python3 -m experiments.train "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/flax_cnns && $(printf '%q ' "${command[@]}")"
