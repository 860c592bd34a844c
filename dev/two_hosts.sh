#!/usr/bin/env bash
# Two hosts, made of network namespaces that share the disk: torchrun's rendezvous, training and evaluation over a
# network, compared with one process. Needs root.    sudo bash dev/two_hosts.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
set -euo pipefail
PYTHON="$PWD/.venv/bin/python" STEPS="${STEPS:-20}" FOLDER="$(mktemp -d)"
export NANOZHCHAT_BASE_DIR="$FOLDER" OMP_NUM_THREADS=1
FLAGS=(--depth=1 --vocab-size=300 --max-seq-len=128 --total-batch-size=1024 --device-batch-size=4 --sample-every=0
  --device-type=cpu --dtype=float32 --num-steps="$STEPS")

end() {
  ip netns delete nzc-a 2>/dev/null || true
  ip netns delete nzc-b 2>/dev/null || true
  rm -rf "$FOLDER"
}
trap end EXIT

"$PYTHON" -m scripts.base_train "${FLAGS[@]}" --model-tag=one

ip netns add nzc-a
ip netns add nzc-b
ip link add veth0 netns nzc-a type veth peer name veth0 netns nzc-b
for host in a b; do
  ip -n "nzc-$host" address add "10.77.0.$([ "$host" = a ] && echo 1 || echo 2)/24" dev veth0
  ip -n "nzc-$host" link set veth0 up
  ip -n "nzc-$host" link set lo up
done

on_host() { # on_host a|b number: the same command on both, as runs/slurm.sh starts it
  # is_host: namespaces share a host name, by which torchrun would have told who keeps the rendezvous
  ip netns exec "nzc-$1" env GLOO_SOCKET_IFNAME=veth0 "$PYTHON" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 \
    --rdzv_id=1 --rdzv_backend=c10d --rdzv_endpoint=10.77.0.1:29500 --rdzv_conf="is_host=$((2 - $2))" \
    --local-addr="10.77.0.$2" -m scripts.base_train -- "${FLAGS[@]}" --model-tag=two
}
on_host b 2 &
on_host a 1
wait

"$PYTHON" - <<'END'
from nanozhchat import files, paths

one, two = ([r["train/loss"] for r in files.read_jsonl(paths.base_dir() / "base" / tag / "metrics.jsonl") if "train/loss" in r]
            for tag in ("one", "two"))
assert len(one) == len(two) > 1
print(f"{len(one)} steps on one host and on two: losses differ by {max(abs(a - b) for a, b in zip(one, two)):.1e} at most")
END
