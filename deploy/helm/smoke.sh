#!/usr/bin/env bash
# Tries the chart on a cluster: installs it, asks what it serves, and takes it away again.
#   smoke.sh VALUES [RELEASE] [NAMESPACE]    kubectl and helm reach the cluster; VLLM_API_KEY has a key
set -euo pipefail
values=${1:?usage: smoke.sh VALUES [RELEASE] [NAMESPACE]}
release=${2:-llumnix-smoke}
namespace=${3:-llumnix-smoke}
chart=$(dirname "$0")/llumnix
name=$release
case $name in *llumnix*) ;; *) name=$name-llumnix ;; esac
auth=()
[ -n "${VLLM_API_KEY:-}" ] && auth=(-H "Authorization: Bearer $VLLM_API_KEY")
forward=
clean_up() { [ -n "$forward" ] && kill "$forward"; helm uninstall "$release" -n "$namespace" --wait; }
trap clean_up EXIT

helm install "$release" "$chart" -n "$namespace" --create-namespace -f "$values" --wait --timeout 30m
kubectl -n "$namespace" port-forward "service/$name" 18000:80 >/dev/null &
forward=$!
for _ in $(seq 30); do curl -sf http://127.0.0.1:18000/ready >/dev/null && break; sleep 1; done
curl -sf http://127.0.0.1:18000/ready
curl -sf "${auth[@]}" http://127.0.0.1:18000/v1/models
echo "smoke: it serves"
