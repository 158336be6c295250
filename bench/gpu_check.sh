#!/bin/bash
# What a GPU machine has to show, part by part: each has a time limit and a log of its own, whose last
# line is JSON where it measures, and one that fails or takes too long does not stop the next.
#     bash bench/gpu_check.sh OUT_FOLDER [part ...]
# Needs the repository, Python 3.12 with torch for CUDA, Triton, pytest, pytest-xdist and -timeout.
#   one H100 or H200, the first check (3 minutes):
#     tests     every kernel and the whole path against the CPU's numbers
#     decode    8 and 16 layers of 72B width: decode, prefill, slopes per layer; profile.log
#     vision    seven tiles, FP8 and bfloat16
#     kernels   every kernel alone; FP8 linears by cuBLASLt
#     attention  decode attention of one and of two ranks' heads, divided and compiled in many ways
#   and its other results:
#     alone     tests that take the whole GPU: memory that runs out
#     truth     the trained model's answers beside the CPU's. $TRUTH (default .truth): a folder made by
#               python -m bench.hopper.truth --folder .truth --device cpu; what is missing is made
#     memory    16 layers and vision: GPU memory beside the plan, once with limits whose cache takes
#               all that is left
#     load      16 layers from the page cache (19 GB in $CACHED, default /dev/shm): GB/s by several ways, and how soon
#               a server's decoder is ready with kernels compiled anew, kept in the engine, in Triton's cache
#     start     run.py, the trained small model: seconds to the first token by phases, kernels kept in the engine and in
#               Triton's cache; $TRUTH as for truth, $BEFORE another checkout that takes turns
#     disk      16 layers from disk; writes 19 GB below $SCRATCH (default /tmp)
#     peers     Hugging Face transformers, bfloat16; needs transformers
#     vllm      vLLM, FP8; needs vllm (PYTHON=... where it has an environment of its own)
#     conversion  calibrated conversion at 72B width: time of a layer, and where it goes; kept in
#               conversion.json. Writes 13 GB below $SCRATCH and as much below $FAST (default $SCRATCH)
#     exports   vLLM reads our exports of the trained model, below $FAST: $PER_TASK pictures of four tasks
#               with each; kept in exports.json, engine by engine; needs vllm
#     export_logits  vLLM reads two layers of 72B width: its logits beside ours and an oracle's; kept in
#               export_logits.json. 10 GB below $SCRATCH, 21 below $FAST; needs vllm, transformers
#     evaluation  a benchmark task beside the engine alone, $LAYERS (default 80) layers, needs tqdm
#   one H200:
#     h200      80 layers: decode, prefill, first token of a request with seven tiles, serving of 256
#               requests, 64 at a time, through the product's server
#     settings  80 layers: penalties, log probabilities and min_p beside drawn rows, rows held to a JSON
#               schema beside plain ones, in turns; needs llguidance
#     kv        80 layers: decode and prompts with keys and values in bfloat16 beside FP8, in turns; each attention
#               kernel alone. At most 1.03, 1.05 and 1.25 times FP8's step at batch 1, 8, 64, prompts no slower
#     head      80 layers: decode with a head in bfloat16 and in FP8, in turns; both heads alone
#     before    80 layers: decode in this checkout and in $BEFORE, another one, in turns
#     http      80 layers: tokens/s of 64 streams over HTTP beside runtime/serving alone, in turns, and how
#               much later the first token of a request with seven tiles comes; needs requirements/serving.txt
#     beside    80 layers: decode steps while pictures are encoded in five ways (bench/hopper/beside.py)
#     interactive  80 layers: eight texts decode while no, one or two pictures a second arrive
#     gaps      the same with --max_step_ms ${MAX_STEP_MS:-0,33}, at rates of 0, 1 and 2 ($LAYERS, $SHAPE, $GAP_SECONDS)
#     riding    2048/128, 256 requests, 64 at a time ($LOAD), with each of --max_step_ms ${MAX_STEP_MS:-0,33}: prompts whole,
#               and in chunks
#     many      80 layers: 160 requests of 1,000 tokens in and 1,000 out, all at a time ($LOAD)
#     memory80  80 layers, the cache takes all that is left
#   $RANKS GPUs (default 2) of 100 GB or more, mpirun and mpi4py:
#     one       80 layers on one of them: decode, prefill, first token, serving; kept in one.json
#     ranks     the same on all of them, beside one.json; kept in ranks.json, row by row
#     rank_sums  the sum over ranks with residual, norm and quantise alone, beside NCCL and a peer copy
#     rank_truth  the trained model's answers beside one GPU's, graphs and running ahead on and off, the
#               same bits on all ranks after every sum; $TRUTH as for truth
#     rank_ends  run.py and evaluate.py end by themselves, ${ENDS:-10} times each in turns, and within 10 s
#               of a rank killed, an error, SIGTERM, Control-C; kept in rank_ends.json, job by job
known=$(sed -n 's/^part \([a-z0-9_]*\) .*/\1/p' "$0" | tr '\n' ' ')
if [ -z "$1" ]; then echo "gpu_check.sh: no folder for results; give OUT_FOLDER [part ...]" >&2; exit 2; fi
out=$1; shift
parts=${*:-tests decode vision kernels}
for each in $parts; do
  case " $known" in *" $each "*) ;; *)
    echo "gpu_check.sh: $each is no part, expected some of: $known" >&2; exit 2 ;;
  esac
done
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton_cache}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_hwloc_base_binding_policy=none
scratch=${SCRATCH:-/tmp} fast=${FAST:-${SCRATCH:-/tmp}}
mkdir -p "$out"
part() { # name, seconds, command
  local name=$1 seconds=$2 started=$SECONDS; shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - started)) s" | tee -a "$out/summary.log"
}
python=${PYTHON:-python3}
mpirun="mpirun -n ${RANKS:-2} $python"
pytest="$python -m pytest -q -p no:cacheprovider --tb=short"
$python -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' >>"$out/summary.log" 2>&1

part tests 150 $pytest -n 8 --maxfail=40 \
  tests/decoder/test_kernels.py tests/decoder/test_change_logits.py tests/decoder/test_hopper_model.py tests/decoder/test_hopper_kernels_model.py \
  tests/decoder/test_hopper_executor.py tests/vision/test_hopper_vision.py tests/decoder/test_decoder_contract.py \
  -k "not alone_ and not TensorRT and not float32"
part decode 150 bash -c "$python -m bench.hopper decode prefill --layers 8,16 --prompts 1948,2048 \
    --batch_sizes 1,8,64 --profile '$out/profile.log' ||
  $python -m bench.hopper decode prefill --layers 8 --prompts 1948 --batch_sizes 1 --no_graphs"
part vision 60 $python -m bench.hopper vision
part kernels 80 $python -m bench.hopper.kernels --batch_sizes 1,8,64 --prompts 1948

part attention 420 $python -m bench.hopper.attention

part alone 60 $pytest tests/decoder/test_hopper_executor.py -k alone_
part truth 220 $python -m bench.hopper.truth --folder "${TRUTH:-.truth}"
part memory 120 bash -c "$python -m bench.hopper.memory --vision_precision bfloat16
  $python -m bench.hopper.memory
  $python -m bench.hopper.memory --max_batch_size 64 --max_seq_len 32768"
part load 200 bash -c "$python -m bench.hopper.load --folder '${CACHED:-/dev/shm}/nvlm_load'
  code=\$?; rm -rf '${CACHED:-/dev/shm}/nvlm_load'; exit \$code"
part start 240 $python -m bench.serving.start --folder "${TRUTH:-.truth}" --device cuda --repeats ${STARTS:-3} \
  ${BEFORE:+--before "$BEFORE"}
part disk 200 $python -m bench.hopper.load --disk --folder "${SCRATCH:-/tmp}/nvlm_load"
part peers 120 $python -m bench.peers.hugging_face
part vllm 420 $python -m bench.peers.vllm_engine
part conversion 240 $python -m bench.conversion.gpu --folder "$scratch/nvlm_wide" --output_folder "$fast/nvlm_converted" \
  --depths 2 4 --results "$out/conversion.json"
part exports 420 $python -m bench.peers.read_exports --folder "$fast/nvlm_exports" --per_task ${PER_TASK:-50} \
  --output "$out/exports.json"
part export_logits 420 $python -m bench.peers.export_logits --model_folder "$scratch/nvlm_wide" \
  --folder "$fast/nvlm_wide_exports" --output "$out/export_logits.json"

part h200 460 $python -m bench.hopper decode prefill first_token serving --layers 80 \
  --batch_sizes 1,8,32,64 --prompts 1948 --serving 2048/128/256/64
part settings 300 $python -m bench.hopper settings --layers 80 --batch_sizes 1,64
part kv 500 bash -c "$python -m bench.hopper.kernels --batch_sizes 1,8,64 --shape ${SHAPE:-72b}
  $python -m bench.hopper.kv_cache --shape ${SHAPE:-72b} --layers ${LAYERS:-80}"
part head 500 bash -c "$python -m bench.hopper.kernels --batch_sizes 1,8,64 --shape ${SHAPE:-72b}
  for turn in 1 2; do for head in '' --fp8_head; do
    $python -m bench.hopper decode --shape ${SHAPE:-72b} --layers ${LAYERS:-80} --batch_sizes 1,8,64 \$head
  done; done"
part before 400 bash -c "for turn in 1 2; do for checkout in '${BEFORE:-.}' .; do
    (cd \$checkout && echo \$checkout && $python -m bench.hopper decode --layers 80 --batch_sizes 1,8,64)
  done; done"
part http 300 $python -m bench.hopper.http --load 1000/256/128/64 --output "$out/http.json"
part beside 480 bash -c "for way in whole tiles stream priority green; do
    $python -m bench.hopper.beside \$way --layers ${LAYERS:-80}; done"
part interactive 200 $python -m bench.hopper interactive --layers 80 --batch_sizes 8 --prompts 1948 \
  --picture_rate 0,1,2 --seconds 15
part gaps 300 $python -m bench.hopper interactive --layers ${LAYERS:-80} --shape ${SHAPE:-72b} --batch_sizes 8 \
  --prompts 1948 --picture_rate 0,1,2 --seconds ${GAP_SECONDS:-15} --max_step_ms ${MAX_STEP_MS:-0,33} --output "$out/gaps.json"
part riding 560 $python -m bench.hopper serving --layers ${LAYERS:-80} --shape ${SHAPE:-72b} --batch_sizes 8 \
  --prompts 1948 --serving ${LOAD:-2048/128/256/64} --max_step_ms ${MAX_STEP_MS:-0,33} --output "$out/riding.json"
part many 240 $python -m bench.hopper serving --layers ${LAYERS:-80} --shape ${SHAPE:-72b} --batch_sizes 8 \
  --prompts 1000 --serving ${LOAD:-1000/1000/160/160}
part memory80 90 $python -m bench.hopper.memory --layers 80 --max_batch_size 112
part evaluation 150 $python -m bench.serving.evaluation --engine_dir "${TRUTH:-.truth}/engine" --device cuda \
  --shape 72b --layers ${LAYERS:-80} --num_samples 24 --repeats 2
part one 180 $python -m bench.hopper decode prefill first_token serving --layers 80 --batch_sizes 1,8,64 \
  --prompts 1948 --precisions FP8 --serving 2048/128/256/64 --output "$out/one.json"
beside=; [ -f "$out/one.json" ] && beside="--one $out/one.json"
part ranks 260 $mpirun -m bench.ranks decode prefill first_token serving --layers 80 --batch_sizes 1,8,64 \
  --prompts 1948 --precisions FP8 --serving 2048/128/256/64 $beside --output "$out/ranks.json"
part rank_sums 120 $mpirun -m bench.ranks.sums
part rank_truth 400 $mpirun -m bench.ranks.truth --folder "${TRUTH:-.truth}"
part rank_ends 560 $python -m bench.ranks.ends --folder "${TRUTH:-.truth}" --num_ranks ${RANKS:-2} \
  --repeats ${ENDS:-10} --output "$out/rank_ends.json"
tail -n 25 "$out"/*.log | cut -c 1-400
