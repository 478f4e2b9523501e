# Read by every shell on a node of the cluster, from ~/.bashrc; Ray's processes, and so all jobs, inherit what it sets.

export PATH="$HOME/gpt-2.5-node/venv/bin:$PATH"
export RAY_AUTH_MODE=token  # whoever has no ~/.ray/auth_token gets no answer
export RAY_USAGE_STATS_ENABLED=0
export MLFLOW_DISABLE_TELEMETRY=true
# A call to a machine that lost its power is given up after 20 + 20 s; Ray's own settings are 300 + 120 s.
export RAY_grpc_client_keepalive_time_ms=20000 RAY_grpc_client_keepalive_timeout_ms=20000

# Your own settings, one NAME=VALUE a line: GPT25_HOME=gs://BUCKET/FOLDER, HF_TOKEN, AWS_ACCESS_KEY_ID and the like.
# The file is data: nothing in it is run. A value may stand in quotes; lines that are empty or begin with # are passed over.
if [ -r "$HOME/.gpt-2.5.env" ]; then
  while IFS= read -r gpt25_line || [ -n "$gpt25_line" ]; do
    if [[ $gpt25_line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
      gpt25_name=${BASH_REMATCH[2]} gpt25_value=${BASH_REMATCH[3]%$'\r'}
      if [[ $gpt25_value =~ ^\"(.*)\"[[:space:]]*$ || $gpt25_value =~ ^\'(.*)\'[[:space:]]*$ ]]; then
        gpt25_value=${BASH_REMATCH[1]}
      fi
      export "$gpt25_name=$gpt25_value"
    fi
  done < "$HOME/.gpt-2.5.env"
  unset gpt25_line gpt25_name gpt25_value
fi
