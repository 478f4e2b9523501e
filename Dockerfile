# The image of a cluster's nodes and of jobs/serve.py: the packages of deploy/requirements.lock on CUDA, and the code, in
# /gpt-2.5. docs/cluster.md says how it is built and started; tests/test_container_image.py holds its versions to those of
# the lock and of cluster.yaml. No data, no model and no secret: they are mounted, or come by environment at the start.

# The version of cuda-toolkit in the lock, and the system of cluster.yaml's nodes. torch brings its own CUDA libraries.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# Python 3.12. gcc and Python's headers: Triton builds a small library at its first start. iproute2 and rsync: `ray up` and
# deploy/network.sh. wget: KubeRay asks by it whether a pod is ready.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends \
    python3 python3-venv python3-dev gcc libc6-dev iproute2 openssh-client rsync wget \
 && rm -rf /var/lib/apt/lists/*

# Packages before the code: a change of the code does not install them anew.
COPY deploy/requirements.lock /gpt-2.5/deploy/requirements.lock
RUN python3 -m venv /gpt-2.5/.venv \
 && /gpt-2.5/.venv/bin/python -m pip install --no-cache-dir --only-binary :all: --require-hashes \
    --requirement /gpt-2.5/deploy/requirements.lock

COPY LICENSE README.md /gpt-2.5/
COPY configs /gpt-2.5/configs
COPY deploy /gpt-2.5/deploy
COPY model /gpt-2.5/model
COPY pipeline /gpt-2.5/pipeline
COPY jobs /gpt-2.5/jobs

# The commit that runs name, as there is no .git here: docker build --build-arg COMMIT=$(git rev-parse HEAD)
ARG COMMIT=unknown
ENV GPT25_COMMIT=$COMMIT \
    PATH=/gpt-2.5/.venv/bin:$PATH \
    PYTHONPATH=/gpt-2.5 \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true

# For login shells, which begin with a PATH of their own: KubeRay starts Ray in one.
RUN echo 'export PATH=/gpt-2.5/.venv/bin:$PATH' > /etc/profile.d/gpt-2.5.sh

# A user who may write to its home alone; packages and code are root's. 1001: Ubuntu's image has a user 1000 already.
RUN useradd --uid 1001 --create-home --shell /bin/bash gpt25
USER gpt25
WORKDIR /home/gpt25

# A server of the model that is mounted at /model; any other command may be given instead. It is reached from outside the
# container with --host 0.0.0.0, which asks for GPT25_SERVE_TOKEN.
CMD ["python", "/gpt-2.5/jobs/serve.py", "/model"]
