#!/bin/sh
# compute-sanitizer over a short run of each kernel: PYTHONPATH=. sh tools/sanitize.sh [tool...]
# The platform allocator gives each buffer its own cudaMalloc, so that memcheck sees its bounds.
export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_PYTHON_CLIENT_PREALLOCATE=false
# Our kernels alone, and none that XLA would run to choose among: under a tool each takes long.
export XLA_FLAGS=--xla_gpu_autotune_level=0
# The first run compiles; under a tool that would take minutes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
python3 tools/short_run.py >/dev/null || exit
status=0
for tool in ${*:-memcheck synccheck racecheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --kernel-name kernel_substring=lora_ \
        --print-limit 20 --error-exitcode 1 python3 tools/short_run.py || status=1
done
exit $status
