"""A model behind an OpenAI-compatible address: ``python jobs/serve.py runs/demo``; see --help.

/v1/completions and /v1/chat/completions (stream and not), /v1/models, /health, /metrics, and a page at / to chat, or to
try prompts. Only this machine
reaches it unless --host says otherwise; GPT25_SERVE_TOKEN holds the token that clients must send, if there is one.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import print_table, run
from pipeline.config.inference import ServeConfig


def main(config: ServeConfig) -> None:
    from pipeline.serving import serve_job

    with serve_job.serving(config) as address:
        print_table(
            "serve: ready",
            [
                ("page", f"{address.url}/"),
                ("completions", f"{address.url}/v1/completions"),
                ("chat", f"{address.url}/v1/chat/completions" if address.has_chat else "no template in the model"),
                ("metrics", f"{address.url}/metrics"),
                ("model", address.model_name),
                ("token", "from GPT25_SERVE_TOKEN" if address.has_token else "none"),
                ("end", "Ctrl-C"),
            ],
        )
        sys.stdout.flush()
        serve_job.wait()
    print("serve: ended")


if __name__ == "__main__":
    run(ServeConfig, main, section="serve", resume="starts the server again")
