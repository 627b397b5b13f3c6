#!/bin/bash
# torchrun on one node. It would answer SIGTERM by ending the workers after half a minute; so it does not hear it, and the workers,
# which Slurm signals as well, save in their own time. Their end is its end.
trap '' TERM
# Slurm may repeat its signal while they save.
export SIVAE_SAME_REQUEST_SEC=86400
# Which node keeps the rendezvous torchrun would tell from the node's name, which need not lead to the address that the job uses.
is_host=0
if ((SLURM_NODEID == 0)); then is_host=1; fi
exec "$SIVAE_PYTHON" -m torch.distributed.run --signals-to-handle=SIGINT --rdzv-conf="is_host=$is_host" "$@"
