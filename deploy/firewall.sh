#!/usr/bin/env bash
# Closes this machine's TCP ports, but for ssh, to whoever is no machine of the cluster file. Run as root, before each start of Ray.
# Ray asks everyone for the token, but MLflow, the metrics pages and the training workers' own connections do not.
# Undo it with: nft delete table inet gpt25
set -euo pipefail

if [ -z "$(command -v nft)" ]; then
  echo "warning: no nft on this machine: close its ports to the world in front of it" >&2
  exit 0
fi
ssh_port=${SSH_CONNECTION:-22}
ssh_port=${ssh_port##* }  # the one that this very command came through
node=$(dirname "$0")/..
addresses=$("$node/venv/bin/python" -c 'if True:
    import sys, yaml
    provider = yaml.safe_load(open(sys.argv[1]))["provider"]
    print(", ".join([provider["head_ip"], *provider["worker_ips"]]))' "$node/cluster.yaml")
nft -f - <<RULES || { echo "warning: nft is not allowed here: close this machine's ports in front of it" >&2; exit 0; }
table inet gpt25
delete table inet gpt25
table inet gpt25 {
  chain input {
    type filter hook input priority filter; policy accept;
    iifname "lo" accept
    ct state established,related accept
    ip saddr { $addresses } accept
    tcp dport { 22, $ssh_port } accept
    meta l4proto tcp reject with tcp reset
  }
}
RULES
