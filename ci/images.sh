#!/usr/bin/env bash
# Build the images for real without an engine: buildah on a Debian base of debootstrap. Run as root, in a scratch folder:
#
#     apt-get install -y buildah crun debootstrap
#     ci/images.sh FOLDER [cpu|cuda|hpu ...]        all three unless told otherwise
#
# The CPU image is built and run. The other two have bases that only registries of images give: their steps are tried on
# the same Debian base, the Gaudi image's with a CPU build of torch that it must keep. That shows that the steps work and
# nothing about the device. DEBIAN_MIRROR names a mirror; pip's own settings (PIP_CONFIG_FILE) hold in the builds, too.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift
wanted=${*:-cpu cuda hpu}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
mkdir -p "$folder"
export BUILDAH_ISOLATION=chroot
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
# The machine's own certificates and pip settings serve the build.
share=(--network host -v /etc/ssl/certs:/etc/ssl/certs:ro)
pip_settings=${PIP_CONFIG_FILE:-/etc/pip.conf}
if [ -f "$pip_settings" ]; then share+=(-v "$pip_settings:/etc/pip.conf:ro"); fi
for links in ${PIP_FIND_LINKS:-}; do if [ -d "$links" ]; then share+=(-v "$links:$links:ro"); fi; done

tell() { printf '\n--> %s\n' "$*"; }

packages=ca-certificates,python3,python3-venv,python3-pip,python3-dev,gcc,libc6-dev
if ! buildah inspect localhost/paca-base >/dev/null 2>&1; then
    tell "a Debian base"
    [ -e "$folder/rootfs/usr/bin/pip3" ] ||
        debootstrap --variant=minbase --include="$packages" bookworm "$folder/rootfs" "$mirror" >"$folder/debootstrap.log"
    container=$(buildah from scratch)
    buildah add -q "$container" "$folder/rootfs" /
    buildah commit -q "$container" localhost/paca-base
    buildah rm "$container" >/dev/null
fi

# build NAME DOCKERFILE BASE [ARGS...]
build() {
    local name=$1 file=$2 base=$3
    shift 3
    tell "$name from $base"
    buildah bud -q "${share[@]}" --build-arg "BASE_IMAGE=$base" "$@" --ignorefile docker/cpu.Dockerfile.dockerignore -f "docker/$file" -t "localhost/$name" .
    buildah images --format '{{.Name}} {{.Size}}' "localhost/$name"
}

# run IMAGE COMMAND...
run() {
    local container
    container=$(buildah from "$1")
    shift
    buildah run --user 1000 "$container" -- "$@"
    buildah rm "$container" >/dev/null
}

cpu() {
    build paca:cpu cpu.Dockerfile localhost/paca-base --build-arg "TORCH_INDEX=$index"
    run localhost/paca:cpu paca env
}

cuda() {
    build paca:cuda-steps cuda.Dockerfile localhost/paca-base --build-arg "TORCH_INDEX=$index"
}

hpu() {
    local container
    tell "a stand-in for the vendor's image: a torch of its own, and pip without ensurepip, as there"
    container=$(buildah from localhost/paca-base)
    buildah run "${share[@]}" "$container" -- python3 -m pip install -q --break-system-packages --no-cache-dir \
        ${index:+--extra-index-url "$index"} torch==2.13.0
    buildah run "$container" -- dpkg --purge --force-depends python3.11-venv python3-venv
    buildah commit -q "$container" localhost/paca-torch
    buildah rm "$container" >/dev/null
    build paca:hpu-steps hpu.Dockerfile localhost/paca-torch
    run localhost/paca:hpu-steps paca env
}

for image in $wanted; do "$image"; done
tell "built: $wanted"
