#!/usr/bin/env bash
# ./run_all.sh                  the whole method on the built-in dataset `shapes`, on a CPU in about three minutes
# ./run_all.sh test             the tests
# ./run_all.sh DATASET [IPC]    the real thing: teachers, distill and eval with the paper's settings (IPC 1)
# Further options go to all three steps, for example: ./run_all.sh cifar10 1 --runs /big/disk
# Everything is installed into .venv; PYTHON=python3.12 ./run_all.sh chooses the interpreter that makes it.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

set_up() {
    if ! cmp -s requirements.txt .venv/installed; then
        echo "setting up .venv: PyTorch is a download of several GB, once"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "run_all.sh: Python 3.10 or newer is needed; PYTHON=python3.12 ./run_all.sh chooses one" >&2
            exit 2
        }
        "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed
    fi
    python=$PWD/.venv/bin/python
    script=$PWD/iadd.py
}

case "${1:-}" in
    -h | --help)
        sed -n '2,6s/^# //p' run_all.sh
        ;;
    test)
        set_up
        shift
        exec "$python" -m pytest -q "$@"
        ;;
    "")
        set_up
        "$python" "$script" teachers --dataset shapes --ipc 1
        "$python" "$script" distill --dataset shapes --ipc 1
        "$python" "$script" eval --dataset shapes --ipc 1 --on distilled random full
        echo "the distilled images: $(ls "$PWD"/runs/shapes_*/ipc1_iadd_seed0/images_*.png | tail -n 1)"
        ;;
    *)
        set_up
        dataset=$1 ipc=${2:-1}
        shift $(($# < 2 ? $# : 2))
        cd "$caller" # so that paths mean what they mean to the caller
        "$python" "$script" teachers --dataset "$dataset" --ipc "$ipc" "$@"
        "$python" "$script" distill --dataset "$dataset" --ipc "$ipc" "$@"
        "$python" "$script" eval --dataset "$dataset" --ipc "$ipc" --on distilled random "$@"
        ;;
esac
