# paca on Intel Gaudi. docker/README.md has the commands. The image of the Gaudi software 1.24.0 brings the vendor's torch,
# which nothing here may replace: it is seen by the virtual environment, and its version is a constraint.
ARG BASE_IMAGE=vault.habana.ai/gaudi-docker/1.24.0/ubuntu24.04/habanalabs/pytorch-installer-2.10.0:latest

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
ARG OPTIMUM_HABANA=optimum-habana==1.21.2
WORKDIR /build
COPY ci/venv.sh ci/
RUN ci/venv.sh python3 /opt/paca system ""
COPY requirements requirements
COPY pyproject.toml README.md LICENSE ./
COPY paca paca
COPY backends backends
# What the vendor's image has is left as it is wherever it suffices; the rest is pinned. torch is compared afterwards.
RUN /opt/paca/bin/python requirements/lacking.py requirements/hpu-image.txt >/opt/paca/constraints.txt && \
    /opt/paca/bin/python -m pip install --no-cache-dir -c /opt/paca/torch.txt -c /opt/paca/constraints.txt '.[train]' "${OPTIMUM_HABANA}" && \
    before="$(cat /opt/paca/torch.txt)" && /opt/paca/bin/python -c \
    'import sys; from importlib.metadata import version; sys.exit(sys.argv[1] != "torch==" + version("torch"))' "${before}"
ENV HOME=/workspace PATH=/opt/paca/bin:${PATH} PYTHONUNBUFFERED=1 PT_HPU_LAZY_MODE=0
WORKDIR /workspace
# No device is there while the image is built: the hpu line says so, everything else has to work.
RUN paca env && paca parity verify --backend cpu --graph eager
# The device files belong to root on most hosts; `docker run --user` works where the host grants them to others.
ENTRYPOINT ["paca"]
CMD ["env"]
