# CPU:  docker build --target cpu -t hybridflow:cpu .        docker run --rm hybridflow:cpu make quickstart
# GPU:  docker build --target gpu -t hybridflow:gpu .        docker run --rm --gpus all --ipc host -it hybridflow:gpu bash
#
# The GPU image starts from vLLM's, which brings torch, CUDA and vLLM in versions that fit each other.

ARG VLLM_IMAGE=vllm/vllm-openai:v0.24.0

FROM python:3.11-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /hybridflow
COPY setup.py pyproject.toml README.md Makefile ./
COPY hybridflow hybridflow
COPY examples examples
COPY configs configs
COPY tests tests
# The stamps of the Makefile see to it that torch's pinned release is taken and nothing is installed twice.
RUN make .venv/.has-package
ENV PATH=/hybridflow/.venv/bin:$PATH
CMD ["make", "help"]

FROM ${VLLM_IMAGE} AS gpu
WORKDIR /hybridflow
COPY setup.py pyproject.toml README.md Makefile ./
COPY hybridflow hybridflow
COPY examples examples
COPY configs configs
COPY tests tests
RUN python3 -m pip install --no-cache-dir -e ".[lora,hub]"
# The base image starts a server; this one starts what the command line names.
ENTRYPOINT []
CMD ["bash"]
