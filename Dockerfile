# GPU image for Hopper (H100, H200) on NVIDIA's PyTorch image, everything else in the versions of constraints.txt.
#
#   docker build -t megatron-klear .
#   docker run --rm --gpus all --ipc=host megatron-klear bash tools/image_smoke.sh --gpu
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data megatron-klear \
#       torchrun --nproc-per-node 8 -m megatron_klear.train_rl CONFIG.yaml
#
# It runs as the user klear (uid 1001), who must be able to write the run directories that are mounted. Code rewards run
# programs in bubblewrap, which needs user namespaces: --security-opt seccomp=unconfined where Docker forbids them.
#
# NEVER BUILT YET: no Docker engine was at hand. The test command reads it: hadolint, and
# tests/tools/test_dockerfile.py.
# Transformer Engine, flash-attn and apex are compiled against the torch of the image, which takes an hour on few cores;
# MAX_JOBS bounds how many compilers run at a time (each takes up to 8 GB of memory).

# 26.06: CUDA 13.3, Ubuntu 24.04, Python 3.12, torch 2.13.0a0, the release that constraints.txt names. The digest is
# that of the tag's list of platforms.
FROM nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ARG MAX_JOBS=8
# As in constraints.txt; the test command compares them.
ARG TORCH_VERSION=2.13.0
# This version of Transformer Engine and this one of torch have not been built together yet.
ARG TRANSFORMER_ENGINE_VERSION=2.14.1
ARG FLASH_ATTN_VERSION=2.8.3
ARG DALI_VERSION=2.4.0
# NVIDIA's apex has no package and no releases: a commit that others build with CUDA 13.
ARG APEX_COMMIT=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39

# PIP_CONSTRAINT: the image holds all of its packages, which other versions are put beside, to what it was made with.
ENV DEBIAN_FRONTEND=noninteractive \
    KLEAR_VENV=/opt/klear \
    KLEAR_SYSTEM_PACKAGES=1 \
    KLEAR_SGLANG_VENV=/opt/klear-sglang \
    PATH=/opt/klear/bin:${PATH} \
    TORCH_CUDA_ARCH_LIST=9.0 \
    NVTE_CUDA_ARCHS=90 \
    NVTE_FRAMEWORK=pytorch \
    FLASH_ATTN_CUDA_ARCHS=90 \
    MAX_JOBS=${MAX_JOBS} \
    PIP_CONSTRAINT= \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1

RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap build-essential git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 klear

# What the image brings of these is replaced, so that one version of each is there. Its torch stays, and what was
# compiled with it.
RUN python3 -c "import torch; assert torch.__version__.startswith('${TORCH_VERSION}'), torch.__version__" \
    && python3 -m pip uninstall --yes transformer-engine transformer-engine-torch transformer-engine-cu13 flash-attn \
        apex nvidia-dali-cuda130 \
    && python3 -m venv --system-site-packages "${KLEAR_VENV}"

WORKDIR /workspace/megatron_klear

# Slow parts first, each from nothing but the pins, so that a change of the project compiles none of them again. They
# see the torch that is already there (no build isolation).
COPY constraints.txt ./
RUN grep -viE '^(torch|triton|numpy)==' constraints.txt >/opt/gpu-constraints.txt \
    && python -m pip install -c /opt/gpu-constraints.txt ninja packaging setuptools wheel \
        "nvidia-dali-cuda130==${DALI_VERSION}"
RUN python -m pip install -c /opt/gpu-constraints.txt --no-build-isolation \
        "transformer-engine[pytorch,core_cu13]==${TRANSFORMER_ENGINE_VERSION}"
RUN python -m pip install -c /opt/gpu-constraints.txt --no-build-isolation "flash-attn==${FLASH_ATTN_VERSION}"
# Megatron-Core takes its fused gradient accumulation and multi-tensor kernels from apex.
RUN git clone https://github.com/NVIDIA/apex /tmp/apex \
    && git -C /tmp/apex checkout "${APEX_COMMIT}" \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python -m pip install --no-build-isolation --no-deps /tmp/apex \
    && rm -rf /tmp/apex

# SGLang pins other versions of torch and transformers, hence an environment of its own.
COPY constraints-sglang.txt ./
COPY tools/setup_sglang.sh tools/environment.sh tools/
COPY tools/sglang_cpu tools/sglang_cpu
RUN KLEAR_SGLANG_DEVICE=cuda bash tools/setup_sglang.sh

# The user owns the folder, since runs are kept below it where nothing else is mounted.
COPY --chown=klear:klear . .
RUN bash tools/setup_env.sh && chown klear:klear .

USER 1001
RUN bash tools/image_smoke.sh
CMD ["bash"]
