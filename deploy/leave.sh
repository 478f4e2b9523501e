#!/usr/bin/env bash
# Left behind on each machine that is not the head: stops Ray a minute after the head has gone. `ray down` stops Ray on
# the head only, and a machine of ours would go on listening.
set -u
exec 9> "$HOME/gpt-2.5-node/leave.lock"
flock --nonblock 9 || exit 0  # one of these is there already

seconds_gone=0
while [ "$seconds_gone" -lt 60 ]; do
  sleep 5
  if timeout 5 bash -c "exec 3<> /dev/tcp/$RAY_HEAD_IP/6379" 2> /dev/null; then
    seconds_gone=0
  else
    seconds_gone=$((seconds_gone + 5))
  fi
done
exec 9>&-
ray stop --force
