# paca on the CPU. docker/README.md has the commands.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY ci/venv.sh ci/
RUN ci/venv.sh python3 /opt/paca "${TORCH}" "${TORCH_INDEX}"
COPY requirements requirements
COPY pyproject.toml README.md LICENSE ./
COPY paca paca
COPY backends backends
# Not editable, so that the second stage needs nothing from here but the environment.
RUN PIP_CONSTRAINT=requirements/constraints.txt PIP_BUILD_CONSTRAINT=requirements/constraints.txt \
    /opt/paca/bin/python -m pip install --no-cache-dir -c /opt/paca/torch.txt '.[train]'

FROM ${BASE_IMAGE}
# HOME is where the user's folder is mounted: caches stay there between runs, under whatever user id the container runs.
ENV HOME=/workspace PATH=/opt/paca/bin:${PATH} PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --no-create-home --home-dir /workspace paca && install -d -o paca /workspace
COPY --from=build /opt/paca /opt/paca
USER 1000
WORKDIR /workspace
RUN paca env && paca parity verify --backend cpu --graph eager
ENTRYPOINT ["paca"]
CMD ["env"]
