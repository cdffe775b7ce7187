#!/usr/bin/env bash
# Puts the headers of FlashInfer's LoRA of experts, at a pinned commit, into DEST (default: .peers in the
# current folder), which must be ignored by git. SOURCE may be a local clone of the public repository.
set -euo pipefail
dest=${1:-.peers}
commit=fb28d7242b3506a2348265962041acc1fb56cca4
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
git clone --quiet --bare "${SOURCE:-https://github.com/flashinfer-ai/flashinfer}" "$tmp/clone"
rm -rf "$dest/flashinfer"
mkdir -p "$dest/flashinfer"
git -C "$tmp/clone" archive "$commit" csrc/bgmv_moe/{kernel_config.h,moe_bgmv_config.h,moe_bgmv_impl.cuh} \
  include/flashinfer/vec_dtypes.cuh | tar -x -C "$dest/flashinfer"
# The kernels start on stream 0, which no CUDA graph can capture. Here the caller names the stream.
kernels=$dest/flashinfer/csrc/bgmv_moe/moe_bgmv_impl.cuh
sed -i 's/^#define BGMV_MOE_GET_STREAM() 0$/#define BGMV_MOE_GET_STREAM() bgmv_moe_stream/' "$kernels"
grep -q '^#define BGMV_MOE_GET_STREAM() bgmv_moe_stream$' "$kernels"
cp "$(dirname "$0")"/{stubs,peer_bench,../turns}.py "$dest"/
echo "FlashInfer $commit"; du -sh "$dest/flashinfer"
