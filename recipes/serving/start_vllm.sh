#!/usr/bin/env bash
# Start two vLLM servers, the policy's (theta) and the target's (t), check them, and stop both on Ctrl-C.
# `start_vllm.sh --help` lists the options; docs/serving.md says what each vLLM flag is for.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: start_vllm.sh [options] THETA_MODEL [T_MODEL] [-- VLLM_FLAG...]

Serves THETA_MODEL on port 8000 and T_MODEL (by default the same model) on port 8001, waits until both are
healthy, checks them with `dual-rollout doctor`, and stops both on Ctrl-C. Flags after -- go to both servers.

where
  --host ADDRESS             address to listen on (127.0.0.1; the servers can be reconfigured over HTTP, so
                             let no other address be reached from outside)
  --theta-port N, --t-port N                       (8000, 8001)
  --theta-devices IDS, --t-devices IDS             GPUs of each server, such as 0 or 2,3 (0, 0)
  --theta-tp N, --t-tp N     tensor parallel size (the number of its devices)
  --theta-memory F, --t-memory F                   share of each GPU's memory (0.45 on a shared GPU, else 0.9)
model
  --dtype TYPE               of weights and activations (auto)
  --theta-quantization Q, --t-quantization Q       such as fp8 (none)
  --max-model-len N          context length in tokens (the model's own)
  --max-num-seqs N           sequences in one step (128 with sessions, each of which holds a place; else 64)
  --max-logprobs N           most candidates a client may ask for; at least its top_k (200)
  --processed-logprobs       report log-probabilities at the request's temperature; for temperature != 1
speed
  --sessions, --no-sessions  keep each text in the engine and send it one token at a time (docs/serving.md). By
                             default where it can be done: it needs dual_rollout in vLLM's environment
weights
  --lora RANK                let theta load LoRA adapters of up to this rank while it runs
  --lora-modules NAMES       modules that adapters may change, comma-separated (all; with --cpu the linear
                             layers of a Llama)
  --nccl                     let theta take weights over NCCL, for TRL's use_vllm: true (TRL 1.16: vLLM 0.22 to 0.31)
running
  --cpu                      vLLM's CPU build: float32, eager, blocks of 32 tokens, half of the cores each
  --theta-cores LIST, --t-cores LIST               with --cpu, such as 0-3 (the first half, the second half)
  --kv-cache-gib N           with --cpu, memory for keys and values of each server (2)
  --python PATH              an interpreter that has vLLM (python, or $VLLM_PYTHON)
  --log-dir DIR              where theta.log and t.log go (outputs/serving)
  --timeout SECONDS          how long a server may take to become healthy, and then to answer the check (900)
  --no-check                 do not run dual-rollout doctor
  --dry-run                  print the two commands and exit
  --help

If DUAL_ROLLOUT_API_KEY is set, the servers ask for that key, and the client sends it.
HELP
}

fail() { echo "start_vllm.sh: $*" >&2; exit 2; }

declare -A port=([theta]=8000 [t]=8001) devices=([theta]=0 [t]=0) tp=() memory=() quantization=() cores=() model=() pid=()
host=127.0.0.1 dtype= max_model_len= max_num_seqs= max_logprobs=200 processed= lora= lora_modules= nccl= cpu= sessions=
flags= kv_cache_gib=2 python=${VLLM_PYTHON:-python} log_dir=outputs/serving timeout=900 check=yes dry_run=
models=() extra=()

while (($#)); do
    case $1 in
        --host | --dtype | --max-model-len | --max-num-seqs | --max-logprobs | --lora | --lora-modules | \
            --kv-cache-gib | --python | --log-dir | --timeout | --theta-* | --t-*)
            (($# > 1)) || fail "$1 needs a value"
            ;;&
        --host) host=$2; shift 2 ;;
        --theta-port | --t-port) side=${1#--}; port[${side%-port}]=$2; shift 2 ;;
        --theta-devices | --t-devices) side=${1#--}; devices[${side%-devices}]=$2; shift 2 ;;
        --theta-tp | --t-tp) side=${1#--}; tp[${side%-tp}]=$2; shift 2 ;;
        --theta-memory | --t-memory) side=${1#--}; memory[${side%-memory}]=$2; shift 2 ;;
        --theta-quantization | --t-quantization) side=${1#--}; quantization[${side%-quantization}]=$2; shift 2 ;;
        --theta-cores | --t-cores) side=${1#--}; cores[${side%-cores}]=$2; shift 2 ;;
        --dtype) dtype=$2; shift 2 ;;
        --max-model-len) max_model_len=$2; shift 2 ;;
        --max-num-seqs) max_num_seqs=$2; shift 2 ;;
        --max-logprobs) max_logprobs=$2; shift 2 ;;
        --processed-logprobs) processed=yes; shift ;;
        --sessions) sessions=yes; shift ;;
        --no-sessions) sessions=no; shift ;;
        --lora) lora=$2; shift 2 ;;
        --lora-modules) lora_modules=$2; shift 2 ;;
        --nccl) nccl=yes; shift ;;
        --cpu) cpu=yes; shift ;;
        --kv-cache-gib) kv_cache_gib=$2; shift 2 ;;
        --python) python=$2; shift 2 ;;
        --log-dir) log_dir=$2; shift 2 ;;
        --timeout) timeout=$2; shift 2 ;;
        --no-check) check=; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; extra=("$@"); break ;;
        -*) fail "unknown option $1 (--help lists them)" ;;
        *) models+=("$1"); shift ;;
    esac
done
((${#models[@]} == 1 || ${#models[@]} == 2)) || fail "name one or two models (--help explains)"
[[ -z $cpu || -z $nccl ]] || fail "--nccl needs GPUs"
model=([theta]=${models[0]} [t]=${models[1]:-${models[0]}})

# Whether the two servers share a GPU: then they share its memory, and must not start side by side.
shared=
for id in ${devices[theta]//,/ }; do
    [[ ,${devices[t]}, == *",$id,"* ]] && shared=yes
done

# The cores this process may use, one per line.
allowed_cores() {
    local range
    for range in $(awk '/^Cpus_allowed_list/ { gsub(",", " ", $2); print $2 }' /proc/self/status); do
        seq "${range%-*}" "${range#*-}"
    done
}

# The first or the second half of the cores, comma-separated. A single core is shared.
half_of_cores() {
    local all half
    mapfile -t all < <(allowed_cores)
    half=$((${#all[@]} / 2))
    ((half > 0)) || { echo "${all[0]}"; return; }
    if [[ $1 == theta ]]; then all=("${all[@]:0:half}"); else all=("${all[@]:half}"); fi
    local IFS=,
    echo "${all[*]}"
}

# Sets `flags`: what this vLLM's own --help lists, each between spaces. Without vLLM there is none, and a dry run
# prints every flag.
ask_for_flags() {
    local help
    if help=$("$python" -m vllm.entrypoints.openai.api_server --help=all 2>&1); then
        flags=" $(grep -oE -- '--[a-z][a-z0-9-]+' <<<"$help" | sort -u | tr '\n' ' ') "
    elif [[ -z $dry_run ]]; then
        fail "$python cannot run vLLM (--python names another interpreter): ${help##*$'\n'}"
    fi
}

has() { [[ -z $flags || $flags == *" $1 "* ]]; }

needs() { has "$1" || fail "this vLLM has no $1, which $2 needs: take a newer one (docs/serving.md says from which on)"; }

# Why the servers cannot have sessions; nothing where they can.
sessions_lack() {
    local flag
    for flag in --middleware --scheduler-cls; do
        has "$flag" || { echo "this vLLM has no $flag, which --sessions needs"; return; }
    done
    for flag in "${extra[@]}"; do
        case ${flag//_/-} in
            --api-server-count* | -asc* | --data-parallel* | -dp*)
                echo "with $flag the next token of a session may reach another process"; return ;;
            --scheduler-cls*) echo "sessions bring a scheduler of their own, and $flag names another"; return ;;
            --pipeline-parallel* | -pp* | --speculative-config* | -sc* | --kv-transfer-config* | --config*)
                echo "sessions were never run with $flag"; return ;;
        esac
    done
    "$python" -c 'import dual_rollout.sessions' 2>/dev/null ||
        echo "dual_rollout is not in vLLM's environment: $python -m pip install --no-deps dual_rollout"
}

# Sets `sessions` to yes for both servers, or to nothing for both.
decide_on_sessions() {
    local lack asked=$sessions
    sessions=
    [[ $asked != no ]] || return 0
    lack=$(sessions_lack)
    if [[ -z $lack ]]; then
        sessions=yes
        echo "With sessions: texts stay in the engines (--no-sessions leaves them out)" >&2
    elif [[ $asked == yes ]]; then
        fail "no sessions: $lack"
    else
        echo "Without sessions, with which lockstep is 2 to 3 times as fast: $lack" >&2
    fi
}

# Sets `environment` and `command` for one side.
build() {
    local side=$1 ids
    # The first opens /collective_rpc, /reset_prefix_cache, /pause and /resume; by default vLLM closes a connection
    # that was idle for 5 s, which a training step is.
    environment=(VLLM_SERVER_DEV_MODE=1 VLLM_HTTP_TIMEOUT_KEEP_ALIVE=60)
    command=("$python" -m vllm.entrypoints.openai.api_server --model "${model[$side]}"
        --host "$host" --port "${port[$side]}" --max-logprobs "$max_logprobs" --max-num-seqs "$max_num_seqs")
    local flag
    for flag in --enable-scale-out --enable-prompt-tokens-details --disable-uvicorn-access-log; do
        if has "$flag"; then command+=("$flag"); else echo "this vLLM has no $flag: left out for $side" >&2; fi
    done
    [[ -z $max_model_len ]] || command+=(--max-model-len "$max_model_len")
    [[ -z $processed ]] || { needs --logprobs-mode --processed-logprobs; command+=(--logprobs-mode processed_logprobs); }
    if [[ -n $sessions ]]; then
        command+=(--middleware dual_rollout.sessions.route.SessionMiddleware
            --scheduler-cls dual_rollout.sessions.scheduler.session_scheduler)
    fi
    [[ -z ${quantization[$side]:-} ]] || command+=(--quantization "${quantization[$side]}")
    if [[ -n $cpu ]]; then
        environment+=("VLLM_CPU_OMP_THREADS_BIND=${cores[$side]:-$(half_of_cores "$side")}"
            "VLLM_CPU_KVCACHE_SPACE=$kv_cache_gib")
        command+=(--dtype "${dtype:-float32}" --block-size 32 --enforce-eager)
    else
        IFS=, read -ra ids <<<"${devices[$side]}"
        environment+=("CUDA_VISIBLE_DEVICES=${devices[$side]}")
        command+=(--dtype "${dtype:-auto}" --tensor-parallel-size "${tp[$side]:-${#ids[@]}}"
            --gpu-memory-utilization "${memory[$side]:-$([[ -n $shared ]] && echo 0.45 || echo 0.9)}")
    fi
    if [[ $side == theta && -n $lora ]]; then
        environment+=(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)
        command+=(--enable-lora --max-loras 1 --max-lora-rank "$lora")
        # The CPU build dies of prompt_logprobs while the output layer is open to adapters.
        local names=${lora_modules:-${cpu:+q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj}}
        # shellcheck disable=SC2206  # module names hold no spaces
        [[ -z $names ]] || { needs --lora-target-modules "--lora"; command+=(--lora-target-modules ${names//,/ }); }
    fi
    if [[ $side == theta && -n $nccl ]]; then
        needs --weight-transfer-config --nccl
        command+=(--weight-transfer-config '{"backend": "nccl"}')
    fi
    ((${#extra[@]} == 0)) || command+=("${extra[@]}")
}

start() {
    local side=$1
    build "$side"
    if [[ -n $dry_run ]]; then
        printf '%q ' "${environment[@]}" "${command[@]}"
        echo
        return
    fi
    echo "Starting $side: ${model[$side]} on http://$host:${port[$side]} (log: $log_dir/$side.log)"
    # A process group of its own, so that the engine's processes end with the server.
    env "${environment[@]}" setsid "${command[@]}" >"$log_dir/$side.log" 2>&1 </dev/null &
    pid[$side]=$!
}

healthy() {
    # No proxy reaches a server of this machine, whatever http_proxy says.
    no_proxy='*' "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "http://$host:${port[$1]}/health" 2>/dev/null
}

wait_until_healthy() {
    local side=$1 deadline=$((SECONDS + timeout))
    [[ -z $dry_run ]] || return 0
    until healthy "$side"; do
        kill -0 "${pid[$side]}" 2>/dev/null || give_up "$side" "died while starting"
        ((SECONDS < deadline)) || give_up "$side" "was not healthy within $timeout s (--timeout)"
        sleep 1
    done
    # Another server may answer on the port of one that has just died of finding it taken.
    kill -0 "${pid[$side]}" 2>/dev/null || give_up "$side" "died while starting"
    echo "$side is healthy"
}

give_up() {
    echo "start_vllm.sh: $1 $2. The end of $log_dir/$1.log:" >&2
    tail -n 30 "$log_dir/$1.log" >&2
    exit 1
}

stop() {
    trap - EXIT INT TERM
    local group
    for group in "${pid[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
    for group in "${pid[@]}"; do
        for _ in {1..100}; do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.1; done
        kill -KILL -- "-$group" 2>/dev/null || true
    done
}

check_with_doctor() {
    if ! command -v dual-rollout >/dev/null; then
        echo "dual-rollout is not on the PATH: the servers are not checked (--no-check silences this)" >&2
        return
    fi
    echo "Checking both; with cold caches the first requests compile"
    dual-rollout doctor --timeout "$timeout" --theta-url "http://$host:${port[theta]}" --t-url "http://$host:${port[t]}" \
        --top-k $((max_logprobs < 100 ? max_logprobs : 100)) || {
        echo "start_vllm.sh: a rollout would fail, see above; --no-check starts the servers nevertheless" >&2
        exit 1
    }
}

[[ -z ${DUAL_ROLLOUT_API_KEY:-} ]] || export VLLM_API_KEY=$DUAL_ROLLOUT_API_KEY
if [[ -z $dry_run ]]; then
    mkdir -p "$log_dir"
    trap stop EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
fi
ask_for_flags
decide_on_sessions
[[ -n $max_num_seqs ]] || max_num_seqs=$([[ -n $sessions ]] && echo 128 || echo 64)
start theta
# vLLM measures the free memory of its GPU while it starts; two at once would disturb each other.
[[ -n $cpu || -z $shared ]] || wait_until_healthy theta
start t
[[ -z $cpu && -n $shared ]] || wait_until_healthy theta
wait_until_healthy t
[[ -z $dry_run ]] || exit 0
[[ -z $check ]] || check_with_doctor
echo "Both servers are ready. Ctrl-C stops them."
wait -n "${pid[@]}" || true
for side in theta t; do
    kill -0 "${pid[$side]}" 2>/dev/null || give_up "$side" "has ended"
done
