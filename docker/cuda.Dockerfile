# paca on NVIDIA GPUs. docker/README.md has the commands. torch's wheels bring their own CUDA libraries, so the base needs
# none; the driver comes from the host through the NVIDIA container toolkit.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
WORKDIR /build
COPY ci/venv.sh ci/
RUN ci/venv.sh python3 /opt/paca "${TORCH}" "${TORCH_INDEX}"
COPY requirements requirements
COPY pyproject.toml README.md LICENSE ./
COPY paca paca
COPY backends backends
RUN PIP_CONSTRAINT=requirements/constraints.txt PIP_BUILD_CONSTRAINT=requirements/constraints.txt \
    /opt/paca/bin/python -m pip install --no-cache-dir -c /opt/paca/torch.txt '.[train,cuda]'

FROM ${BASE_IMAGE}
# Triton and torch.compile build small C programs when they run.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV HOME=/workspace PATH=/opt/paca/bin:${PATH} PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --no-create-home --home-dir /workspace paca && install -d -o paca /workspace
COPY --from=build /opt/paca /opt/paca
USER 1000
WORKDIR /workspace
# No GPU is there while the image is built; `paca parity verify` on the machine itself shows the rest.
RUN paca env && paca parity verify --backend cpu --graph eager
ENTRYPOINT ["paca"]
CMD ["env"]
