# Read by every shell on a node of the cluster, from ~/.bashrc; Ray's processes, and so all jobs, inherit what it sets.

export PATH="$HOME/gpt-2.5-node/venv/bin:$PATH"
export RAY_AUTH_MODE=token  # whoever has no ~/.ray/auth_token gets no answer
export RAY_USAGE_STATS_ENABLED=0
export MLFLOW_DISABLE_TELEMETRY=true
# A call to a machine that lost its power is given up after 20 + 20 s; Ray's own settings are 300 + 120 s.
export RAY_grpc_client_keepalive_time_ms=20000 RAY_grpc_client_keepalive_timeout_ms=20000

# Your own settings, one NAME=VALUE a line: GPT25_HOME=gs://BUCKET/FOLDER, HF_TOKEN, AWS_ACCESS_KEY_ID and the like.
if [ -r "$HOME/.gpt-2.5.env" ]; then
  set -a
  . "$HOME/.gpt-2.5.env"
  set +a
fi
