#!/bin/sh
# A job on two nodes, tried on one machine: two agents with two workers each.
#
#     examples/two_nodes.sh examples/train.py --checkpoint /tmp/model.pt
#
# On two machines, start the second command of this script on the first machine and the first one on the other machine, with the name of
# the first machine in place of localhost. The exit code is that of the agent that hosts the rendezvous. PORT is the port of the
# rendezvous, 29400 if it is not set. Ctrl-C ends the job.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: $0 SCRIPT [ARGUMENT...]" >&2
    exit 2
fi

agent() {
    is_host=$1
    shift
    exec ferrorun --nnodes=2 --nproc-per-node=2 --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="localhost:${PORT:-29400}" --rdzv-id=two-nodes --rdzv-conf="is_host=$is_host" \
        "$@"
}

trap : INT # Ctrl-C reaches both agents. The script waits for them.
(agent 0 "$@") &
other=$!
code=0
(agent 1 "$@") || code=$?
wait "$other" || true
exit "$code"
