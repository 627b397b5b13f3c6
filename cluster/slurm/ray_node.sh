#!/bin/bash
# A node of the job's Ray: waits for the head at $1 (host:port), then joins it. What follows goes to `ray start`.
address=$1
shift
for _ in $(seq 120); do
    if (exec 3<>"/dev/tcp/${address%:*}/${address##*:}") 2>/dev/null; then break; fi
    sleep 1
done
exec "$SIVAE_PYTHON" -m ray.scripts.scripts start --address="$address" --block --disable-usage-stats "$@"
