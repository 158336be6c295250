#!/bin/bash
# What a GPU machine has to show, in a few minutes: tests against the CPU's numbers, then times.
#     bash bench/gpu_check.sh OUT_FOLDER [part ...]        parts: tests decode variants vision kernels
# A part that fails or takes too long does not stop the next. Every part has a file of its own.
out=$1; shift
parts=${*:-tests decode variants vision kernels}
export NVLM_HOPPER_KERNELS=1 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton_cache}
mkdir -p "$out"
part() { # name, seconds, command
  local name=$1 seconds=$2 started=$SECONDS; shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - started)) s" | tee -a "$out/summary.log"
}
python3 -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' >"$out/summary.log" 2>&1
part tests 90 python3 -m pytest -q -p no:cacheprovider -n 8 --tb=short --maxfail=40 \
  tests/test_kernels.py tests/test_hopper_model.py tests/test_hopper_kernels_model.py \
  tests/test_hopper_executor.py tests/test_hopper_vision.py tests/test_decoder_contract.py -k "not interpreter and not TensorRT and not float32"
part decode 110 bash -c "python3 -m bench.hopper decode prefill --layers 8,16 --prompts 1948,2048 \
    --batch_sizes 1,8,64 --profile '$out/profile.log' ||
  python3 -m bench.hopper decode prefill --layers 8 --prompts 1948 --batch_sizes 1 --no_graphs"
part variants 60 bash -c 'for kb in 8192 24576; do echo "prefetch $kb KB, fast accumulation"
  python3 -m bench.hopper decode prefill --layers 8 --batch_sizes 1,8 --prompts 1948 \
    --prefetch_kb $kb --fast_accum | grep -v "^{"; done'
part vision 50 python3 -m bench.hopper vision
part kernels 60 python3 -m bench.hopper_kernels --batch_sizes 1,64 --prompts 1948
tail -n 25 "$out"/*.log | cut -c 1-400
