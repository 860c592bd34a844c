# CPU:   docker build -t nanozhchat .
# CUDA:  docker build -t nanozhchat --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .   (run with --gpus=all)
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN apt-get update \
  && apt-get install -y --no-install-recommends build-essential ca-certificates curl git \
  && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:latest /uv /usr/local/bin/uv
WORKDIR /nanozhchat
COPY . .
RUN UV_NO_DEV=1 bash runs/setup.sh
ENV PATH=/nanozhchat/.venv/bin:$PATH SETUP=0 NANOZHCHAT_BASE_DIR=/data
VOLUME /data
CMD ["bash", "runs/runcpu.sh"]
