# rlhf_toolkit on NVIDIA GPUs:
#
#   docker build -t rlhf_toolkit .
#   docker run --rm --gpus all --ipc=host -v "$PWD":/work -v "$HOME/.cache/huggingface":/root/.cache/huggingface \
#     rlhf_toolkit train experiment.yaml
#
# CUDA's libraries come with PyTorch's wheel, so the image needs the driver of the machine alone. A C compiler and
# Python's headers are there for Triton, which builds kernels when they are first called.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/rlhf
ENV PATH=/opt/rlhf/bin:$PATH TOKENIZERS_PARALLELISM=false

WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY accelerate_configs accelerate_configs
RUN pip install --no-cache-dir '.[quantized,tasks]'

WORKDIR /work
ENTRYPOINT ["rlhf"]
CMD ["--help"]
