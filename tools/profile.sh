#!/usr/bin/env bash
# Trains a few steps under a profiler and prints the top of its report: ranges (phases, layers, microbatches) and kernels.
#
#   tools/profile.sh [--entry sft|rl] [--processes N] [--torch] CONFIG.yaml [section.field=value ...]
#
#   --entry      which entry to run (default sft)
#   --processes  processes on this machine (default: the number of GPUs, 1 without any)
#   --torch      torch's own profiler in place of Nsight Systems; works on a CPU, writes a trace for ui.perfetto.dev
#
# profile.first_step, profile.num_steps and profile.ranks say what is recorded. The run is cut short behind the last
# recorded step and lives in a directory of its own, KLEAR_PROFILE_DIR (default profile_run): no other run is touched.
# Exit status: 0 done; 2 nsys is missing or an argument or setting is wrong; 1 the profiled run failed.
set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
python=${KLEAR_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}

refuse() {
    echo "profile: $*" >&2
    exit 2
}

entry=sft processes='' tool=nsys
while (($#)); do
    case $1 in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --entry)
            (($# > 1)) || refuse "--entry: expected sft or rl"
            entry=$2 && shift 2
            ;;
        --processes)
            (($# > 1)) || refuse "--processes: expected a number"
            processes=$2 && shift 2
            ;;
        --torch) tool=torch && shift ;;
        -*) refuse "$1: unknown option (--help lists them)" ;;
        *) break ;;
    esac
done
(($#)) || refuse "CONFIG.yaml: the settings file is missing (--help says more)"
config=$1
shift
[[ $entry =~ ^(sft|rl)$ ]] || refuse "--entry: got '$entry', allowed sft, rl"
[[ -f $config ]] || refuse "no file $config"
if [[ $tool == nsys ]] && ! command -v nsys >/dev/null; then
    refuse "nsys is not on PATH. Install Nsight Systems (in NVIDIA's container images, or package nsight-systems of" \
        "NVIDIA's repository), or use torch's own profiler, which needs nothing more: tools/profile.sh --torch $config"
fi
if [[ -z $processes ]]; then
    processes=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
[[ $processes =~ ^[1-9][0-9]*$ ]] || refuse "--processes: got '$processes', allowed whole numbers above 0"

dir=${KLEAR_PROFILE_DIR:-profile_run}
settings=("$config" "$@" "run.dir=$dir" "profile.tool=$tool" checkpoint.every_steps=0 checkpoint.export_hf=false
    evaluation.every_steps=0 evaluation.at_end=false observe.report=false)
[[ $entry == rl ]] || settings+=(sft.epochs=null)
# Judged with more steps than any window needs; then the run gets just those that it has.
outlook=$(WORLD_SIZE=$processes "$python" -m "megatron_klear.train_$entry" --check "${settings[@]}" \
    "$entry.steps=1000000000") || exit 2
last=$(sed -n 's/^profile: .* steps [0-9]* to \([0-9]*\),.*/\1/p' <<<"$outlook")
settings+=("$entry.steps=$last")
[[ ! -e $dir/config.yaml ]] || refuse "$dir holds a run already; remove it, or set KLEAR_PROFILE_DIR to another directory"
mkdir -p "$dir"

run=("$python" -m torch.distributed.run --standalone --nproc-per-node "$processes"
    -m "megatron_klear.train_$entry" "${settings[@]}")
if [[ $tool == torch ]]; then
    "${run[@]}" || exit 1
    for trace in "$dir"/profile/*.json.gz; do
        [[ -f $trace ]] || { echo "profile: the run wrote no trace to $dir/profile" >&2 && exit 1; }
        echo "$trace"
        "$python" -m megatron_klear.observe.trace "$trace"
    done
    exit 0
fi
report=$dir/profile
nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \
    --output="$report" "${run[@]}" || exit 1
[[ -f $report.nsys-rep ]] || { echo "profile: nsys wrote no $report.nsys-rep" >&2 && exit 1; }
echo "$report.nsys-rep (open it with Nsight Systems)"
for table in nvtx_pushpop_sum cuda_gpu_kern_sum; do
    nsys stats --quiet --force-export=true --format=column --report "$table" "$report.nsys-rep" | sed -n '1,24p'
done
