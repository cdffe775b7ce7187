#!/usr/bin/env bash
# Runs another project's own tests over jax-lora: tests/peers/run.sh PROJECT [ARGUMENTS OF PYTEST]
# Its sources, at a pinned commit, are put into .peers/, which git ignores. SOURCE (default: the
# public repository) may be a local clone. vllm and sglang need a Hopper GPU; PYTHON names an
# interpreter that has all packages, instead of this project's environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
project=${1:?which project: bonsai, maxtext, qwix, sglang-jax, skyrl, tunix, vllm, sglang}
shift
tests=()
case $project in
bonsai) # its own tests compare with downloaded weights: ours are of its models at a tiny size
    url=https://github.com/jax-ml/bonsai
    commit=36284254cf738d99c1c5d1e3a292d27656a0a365
    paths=(bonsai)
    ;;
maxtext) # it has no tests of several adapters: ours are of its NNX transformer
    url=https://github.com/AI-Hypercomputer/maxtext
    commit=e591f30cbbf217ed67ef71263ec0538239f9c3b8
    paths=(src/maxtext/{__init__,version}.py)
    paths+=(src/maxtext/{checkpoint_conversion,common,configs,inference,input_pipeline,integration})
    paths+=(src/maxtext/{kernels,layers,models,multimodal,optimizers,trainers,utils})
    ;;
qwix)
    url=https://github.com/google/qwix
    commit=aa623acb24c418563265fd8d541c1d51fc285269
    paths=(qwix tests/_src/providers/lora_test.py)
    tests=(tests/_src/providers/lora_test.py)
    ;;
sglang-jax)
    url=https://github.com/sgl-project/sglang-jax
    commit=cddbf6f1cc33cbdd453bd8f36ff7051cf46ca176
    paths=(python/sgl_jax test/srt/lora/test_bgmv_backend.py)
    tests=(test/srt/lora/test_bgmv_backend.py)
    ;;
skyrl)
    url=https://github.com/NovaSky-AI/SkyRL
    commit=a9564572eb8e91076be43c1bd5e4615e3de17265
    paths=(skyrl/__init__.py skyrl/_compat.py skyrl/env_vars.py skyrl/tinker/__init__.py)
    paths+=(skyrl/tinker/types.py skyrl/tx skyrl/utils tests/__init__.py tests/tx)
    tests=(tests/tx/models/test_llama3_lora_training.py tests/tx/models/test_qwen3_lora_training.py)
    ;;
tunix) # it has no tests of several adapters: ours are of its model, trainer and sampler
    url=https://github.com/google/tunix
    commit=c7d8950f12a9c55a976bf2e1a0d8b447d71c20b3
    paths=(tunix)
    ;;
vllm)
    url=https://github.com/vllm-project/vllm
    commit=v0.33.0
    paths=(vllm/lora/__init__.py vllm/lora/lora_weights.py vllm/lora/ops vllm/lora/punica_wrapper)
    paths+=(tests/__init__.py tests/lora/__init__.py tests/lora/utils.py tests/lora/test_punica_ops.py)
    tests=(tests/lora/test_punica_ops.py)
    ;;
sglang)
    url=https://github.com/sgl-project/sglang
    commit=1428bc880cd929147601dad6dd4f229f0b27c695
    test=test/registered/lora/test_chunked_sgmv_backend.py
    paths=(python/sglang/kernels/ops/gemm python/sglang/srt/lora python/sglang/test/lora_utils.py)
    paths+=(python/sglang/test/ci python/sglang/srt/layers/logits_processor.py)
    paths+=(python/sglang/srt/model_executor/forward_batch_info.py "$test")
    tests=("$test")
    ;;
*) echo "no such project: $project" >&2; exit 2 ;;
esac
home=.peers/projects/$project
if [ "$(cat "$home/COMMIT" 2>/dev/null)" != "$commit" ]; then
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    git clone --quiet --no-checkout "${SOURCE:-$url}" "$tmp/clone"
    rm -rf "$home"
    mkdir -p "$home"
    git -C "$tmp/clone" archive "$commit" "${paths[@]}" | tar -x -C "$home"
    echo "$commit" >"$home/COMMIT"
fi
files=("${tests[@]/#/$home/}") plugins=() name=${project//-/_}
[ ! -f "tests/peers/${name}_adapters.py" ] || files+=("tests/peers/${name}_adapters.py")
[ ! -f "tests/peers/over_$name.py" ] || plugins=(-p "over_$name")
export PYTHONPATH=tests/peers:benchmarks/peers:$home:$home/python:$home/src:. XLA_PYTHON_CLIENT_PREALLOCATE=false
runner=(uv run --with-requirements "tests/peers/$project.txt" python)
[ -z "${PYTHON:-}" ] || runner=("$PYTHON")
# Their settings, not ours: no strict promotion, and warnings are theirs.
"${runner[@]}" -m pytest -q -c /dev/null -W ignore --rootdir "$home" --confcutdir tests/peers \
    -p no:cacheprovider "${plugins[@]}" "${files[@]}" "$@"
