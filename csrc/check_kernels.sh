#!/usr/bin/env bash
# Compiles every CUDA kernel for each architecture and prints what it takes of a multiprocessor. A spilled register or a use of
# local memory is an error: such a kernel would be slow without a word. Needs nvcc and no device.
#
#   csrc/check_kernels.sh [ARCHITECTURE...]     default: 80 90
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/cuda"
architectures=("$@")
if [[ $# -eq 0 ]]; then architectures=(80 90); fi

nvcc="${CUDA_HOME:+$CUDA_HOME/bin/}nvcc"
if ! command -v "$nvcc" > /dev/null; then
  echo "check_kernels: no nvcc (set CUDA_HOME or PATH): the CUDA kernels are not compiled on this machine"
  exit 0
fi

objects="$(mktemp -d)"
trap 'rm -rf "$objects"' EXIT

# Lines of ptxas -v -> kernel | registers | shared memory in bytes (without what is asked for at run time) | spilled bytes.
tabulate() {
  awk -v architecture="$1" '
    /Compiling entry function/ { split($0, parts, "\047"); kernel = parts[2] }
    /spill stores/ { for (k = 1; k <= NF - 2; ++k) if ($(k + 1) == "bytes" && $(k + 2) == "spill") spills[kernel] += $k }
    /Used [0-9]+ registers/ {
      registers = $0; sub(/.*Used /, "", registers); sub(/ registers.*/, "", registers)
      shared = 0
      if (match($0, /[0-9]+ bytes smem/)) { shared = substr($0, RSTART, RLENGTH); sub(/ bytes smem/, "", shared) }
      printf "%s|sm_%s|%d|%d|%d\n", kernel, architecture, registers, shared, spills[kernel]
    }' | c++filt \
    | sed -e 's/(anonymous namespace):://g' -e 's/drift_accel::cuda:://g' -e 's/^void //' -e 's/([A-Za-z]*)|/|/' | sort
}

failed=0
printf '%-44s %-6s %9s %13s %7s\n' kernel arch registers "static shared" spilled
for architecture in "${architectures[@]}"; do
  for source in *.cu; do
    log="$objects/$source.$architecture.log"
    if ! "$nvcc" -std=c++17 -O3 -gencode "arch=compute_$architecture,code=sm_$architecture" \
        -Xptxas -v,-warn-spills,-warn-lmem-usage,-Werror -c "$source" -o "$objects/$source.o" > "$log" 2>&1; then
      failed=1
      echo "check_kernels: $source does not pass for sm_$architecture:" >&2
      grep -v "ptxas info" "$log" >&2 || true
    fi
    tabulate "$architecture" < "$log" | while IFS='|' read -r kernel name registers shared spilled; do
      printf '%-44s %-6s %9d %13d %7d\n' "$kernel" "$name" "$registers" "$shared" "$spilled"
    done
  done
done
exit "$failed"
