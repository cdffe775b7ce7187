#!/usr/bin/env bash
# Runs another project's own tests over jax-lora: tests/peers/run.sh PROJECT [ARGUMENTS OF PYTEST]
# Its sources, at a pinned commit, are put into .peers/, which git ignores. SOURCE (default: the
# public repository) may be a local clone.
set -euo pipefail
cd "$(dirname "$0")/../.."
project=${1:?which project: sglang-jax}
shift
case $project in
sglang-jax)
    url=https://github.com/sgl-project/sglang-jax
    commit=cddbf6f1cc33cbdd453bd8f36ff7051cf46ca176
    paths=(python/sgl_jax test/srt/lora/test_bgmv_backend.py)
    tests=(test/srt/lora/test_bgmv_backend.py)
    ;;
*) echo "no such project: $project" >&2; exit 2 ;;
esac
home=.peers/$project
if [ "$(cat "$home/COMMIT" 2>/dev/null)" != "$commit" ]; then
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    git clone --quiet --no-checkout "${SOURCE:-$url}" "$tmp/clone"
    rm -rf "$home"
    mkdir -p "$home"
    git -C "$tmp/clone" archive "$commit" "${paths[@]}" | tar -x -C "$home"
    echo "$commit" >"$home/COMMIT"
fi
export PYTHONPATH=tests/peers:$home:$home/python
# Their settings, not ours: no strict promotion, and warnings are theirs.
uv run --with-requirements "tests/peers/$project.txt" python -m pytest -q -c /dev/null \
    --rootdir "$home" -p no:cacheprovider -p "over_${project//-/_}" "${tests[@]/#/$home/}" "$@"
