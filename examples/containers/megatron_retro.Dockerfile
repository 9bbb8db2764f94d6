# The same image for Enroot/Pyxis (and Docker, Podman), made from a checkout of this repository:
#
#     docker build --file examples/containers/megatron_retro.Dockerfile --tag megatron_retro .
#     enroot import --output megatron_retro.sqsh dockerd://megatron_retro
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
COPY . /opt/megatron_retro
WORKDIR /opt/megatron_retro
RUN /opt/venv/bin/pip install --no-cache-dir --constraint .ci/constraints.txt setuptools wheel pybind11 torch \
    && /opt/venv/bin/pip install --no-cache-dir --constraint .ci/constraints.txt --no-build-isolation . \
    && /opt/venv/bin/python -m megatron_retro.cli.main --version
ENV PATH=/opt/venv/bin:$PATH
ENTRYPOINT ["megatron-retro"]
