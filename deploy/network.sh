# Read before `ray start`: which address this node has for the others, and where MLflow is.
# Workers get RAY_HEAD_IP from Ray. The head takes the head_ip of the cluster file, or its first address.

if [ -z "${RAY_HEAD_IP:-}" ]; then
  RAY_HEAD_IP=$(sed -n 's/.*"head_ip": *"\([^"]*\)".*/\1/p' "$HOME/ray_bootstrap_config.yaml" 2>/dev/null)
  RAY_HEAD_IP=${RAY_HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
  NODE_IP=$RAY_HEAD_IP
  # Nodes that are always there: jobs wait a little for those that still start.
  export GPT25_NODES=$(python -c 'if True:
    import json, pathlib
    config = json.loads((pathlib.Path.home() / "ray_bootstrap_config.yaml").read_text())
    print(1 + sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values()))')
else
  NODE_IP=$(ip -o route get "$RAY_HEAD_IP" | sed -n 's/.* src \([^ ]*\).*/\1/p')
fi
export RAY_HEAD_IP NODE_IP

# gloo would take the address that the host's name has, which is often 127.0.1.1.
NODE_INTERFACE=$(ip -o addr show | awk -v ip="$NODE_IP" 'index($4, ip "/") == 1 { print $2; exit }')
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NODE_INTERFACE}"

# A server of your own may be named in ~/.gpt-2.5.env; else the head has one.
export GPT25_OWN_MLFLOW="${MLFLOW_TRACKING_URI:+1}"
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-http://$RAY_HEAD_IP:5000}"
