# GPU image for Hopper (H100, H200): CUDA 13, and torch, Megatron-Core and all else in the versions of constraints.txt.
#
#   docker build -t megatron-klear .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data megatron-klear \
#       torchrun --nproc-per-node 8 -m megatron_klear.train_rl CONFIG.yaml
#
# Transformer Engine, flash-attn and apex are compiled against the torch of the image, which takes an hour on few cores;
# MAX_JOBS bounds how many compilers run at a time (each takes up to 8 GB of memory).
# The fused head, packing and the trainer need none of the three: without them attention is torch's SDPA.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE_IMAGE}

ARG MAX_JOBS=8
# A commit or tag of NVIDIA/apex. Name one for an image that can be built again; the one taken is kept in /opt/apex.commit.
ARG APEX_REF=master

ENV DEBIAN_FRONTEND=noninteractive \
    KLEAR_VENV=/opt/klear \
    PATH=/opt/klear/bin:${PATH} \
    TORCH_CUDA_ARCH_LIST=9.0 \
    NVTE_CUDA_ARCHS=90 \
    NVTE_FRAMEWORK=pytorch \
    FLASH_ATTN_CUDA_ARCHS=90 \
    MAX_JOBS=${MAX_JOBS} \
    PIP_NO_CACHE_DIR=1

# Ubuntu 24.04 has Python 3.12.
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap build-essential git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/megatron_klear
COPY . .
RUN bash tools/setup_env.sh

# Compiled parts see the torch that is already there (no build isolation), one at a time so that a failure is cheap.
RUN python -m pip install -c constraints.txt ninja packaging nvidia-dali-cuda130
RUN python -m pip install -c constraints.txt --no-build-isolation "transformer-engine[pytorch,core_cu13]"
RUN python -m pip install -c constraints.txt --no-build-isolation flash-attn

# NVIDIA's apex has no package; the one of that name in package indexes is something else. Megatron-Core takes its fused
# gradient accumulation and multi-tensor kernels from it.
RUN git clone https://github.com/NVIDIA/apex /tmp/apex \
    && git -C /tmp/apex checkout "${APEX_REF}" \
    && git -C /tmp/apex rev-parse HEAD > /opt/apex.commit \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python -m pip install --no-build-isolation --no-deps /tmp/apex \
    && rm -rf /tmp/apex

RUN python -c "import transformer_engine.pytorch, flash_attn, apex, amp_C, megatron.core, megatron_klear, klear_kernels._cuda"
