#!/usr/bin/env bash
# Puts LoRAFusion's Triton kernels, at a pinned commit, into DEST (default: .peers in the current
# folder), which must be ignored by git. SOURCE may be a local clone of the public repository.
set -euo pipefail
dest=${1:-.peers}
commit=c48d7fdb1b5458e9df00963a63df00436f89a059
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
git clone --quiet --no-checkout "${SOURCE:-https://github.com/CentML/lorafusion}" "$tmp/clone"
mkdir -p "$dest"
rm -rf "$dest/lorafusion"
git -C "$tmp/clone" archive "$commit" lorafusion/__init__.py lorafusion/ops lorafusion/utils | tar -x -C "$dest"
cp "$(dirname "$0")"/{stubs,peer_bench,../turns}.py "$dest"/
echo "LoRAFusion $commit"; du -sh "$dest/lorafusion"
