#!/usr/bin/env bash
# Puts LoRAX's Triton ops, at a pinned commit, into DEST (default: .lorax in the current folder), for
# benchmarks/lorax/judge.py. DEST must be ignored by git: LoRAX is measured, never committed.
# SOURCE (default: its public repository) may be a local clone.
set -euo pipefail
dest=${1:-.lorax}
source=${2:-https://github.com/predibase/lorax}
commit=a7394ba386ece427d5a6125b419aa38b46d966dc
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
git clone --quiet --no-checkout "$source" "$tmp/lorax"
mkdir -p "$dest"
git -C "$tmp/lorax" archive "$commit" server/lorax_server/utils/ops | tar -x -C "$dest" --strip-components=1
touch "$dest"/lorax_server/{,utils/}__init__.py
# A stray comma makes a tuple of a pointer there, which Triton refuses: (pointers,) -> pointers
sed -i 's/^\(    a_ptr = \)(\(.*\),)$/\1\2/' "$dest"/lorax_server/utils/ops/sgmv_expand{,_slice}.py
echo "$commit" >"$dest/VERSION"
