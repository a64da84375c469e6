#!/usr/bin/env bash
# ./run_all.sh                        the whole method on the built-in dataset `shapes`, on a CPU in about three minutes
# ./run_all.sh test                   the tests
# ./run_all.sh bench [--quick]        how fast each part is beside the obvious way to write it
# ./run_all.sh DATASET [IPC] [...]    teachers, distill and eval with the paper's settings (IPC 1); options go to all three
# ./run_all.sh paper [CELL ...] [...] the commands of the paper's tables; runs those of the named tables, columns or cells,
#                                     such as table1/cifar10/ipc1 or table4/iadd, with options such as --data-dir
# What teachers and distill have made is not made again, and what was interrupted goes on. GPUS=4 ./run_all.sh ... uses
# four GPUs.
# Everything is installed into .venv; PYTHON=python3.12 ./run_all.sh chooses the interpreter that makes it.
set -euo pipefail
unset MPLBACKEND # a notebook's, which .venv does not have
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

set_up() {
    if ! cmp -s "$here/requirements.txt" "$here/.venv/installed"; then
        echo "setting up .venv: PyTorch is a download of several GB, once"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "run_all.sh: Python 3.10 or newer is needed; PYTHON=python3.12 ./run_all.sh chooses one" >&2
            exit 2
        }
        "${PYTHON:-python3}" -m venv "$here/.venv"
        venv_python -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
        cp "$here/requirements.txt" "$here/.venv/installed"
    fi
}

venv_python() { # Git Bash on Windows has Scripts/python.exe
    local python=$here/.venv/bin/python
    [ -x "$python" ] || python=$here/.venv/Scripts/python.exe
    "$python" "$@"
}

iadd() { # a command of iadd.py, in GPUS processes
    local several=()
    if ! [[ ${GPUS:-1} =~ ^[1-9][0-9]*$ ]]; then
        echo "run_all.sh: GPUS=$GPUS is not a number of GPUs" >&2
        exit 2
    fi
    if [ "${GPUS:-1}" != 1 ]; then
        several=(-m torch.distributed.run --nproc-per-node "$GPUS" --local-addr 127.0.0.1)
        [ "$1" != distill ] || set -- distill --segments "$GPUS" "${@:2}"
    fi
    echo "== python iadd.py $*"
    venv_python ${several[@]+"${several[@]}"} "$here/iadd.py" "$@"
}

# The cells of Tables 1, 3 and 4 that we can measure: "name arguments of iadd.py", a line for each command. (Table 2
# compares the IADD of Table 1 with numbers of others.)
cells() {
    local setting dataset ipc method on name arch
    for setting in table1/{cifar10,cifar100}/ipc{1,10,50} table1/tinyimagenet/ipc{1,10} table3 table4; do
        IFS=/ read -r _ dataset ipc <<<"$setting"
        ipc=${ipc#ipc} arch=
        case $setting in
            table3) dataset=cifar10 ipc=10 arch=" --arch convnet alexnet vgg11 resnet18" ;;
            table4) dataset=covid ipc=20 ;;
        esac
        on="--dataset $dataset --ipc $ipc"
        for method in random herding full mtt ddpp iadd; do
            name=$setting/$method
            case $name in
                table[34]/random | table[34]/herding | table3/full | */ipc10/full | */ipc50/full) ;;
                */random | */full) echo "$name eval $on --on $method" ;;
                */herding)
                    echo "$name teachers $on --teachers 1 --epochs 50"
                    echo "$name eval $on --on $method"
                    ;;
                *)
                    echo "$name teachers $on"
                    echo "$name distill $on --method $method"
                    echo "$name eval $on --method $method$arch"
                    ;;
            esac
        done
    done
}

paper() {
    local wanted=() name arguments prefix
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
        wanted+=("$1")
        [ -n "$(cells | awk -v wanted="$1/" 'index($1 "/", wanted) == 1')" ] || {
            echo "run_all.sh: the paper has no cell $1, see ./run_all.sh paper" >&2
            exit 2
        }
        shift
    done
    if [ ${#wanted[@]} != 0 ]; then
        set_up
    elif [ $# != 0 ]; then
        echo "run_all.sh: cells come first, options after them" >&2
        exit 2
    fi
    while read -r name arguments <&3; do
        [ ${#wanted[@]} != 0 ] || printf '%-32s python iadd.py %s\n' "$name" "$arguments"
        for prefix in ${wanted[@]+"${wanted[@]}"}; do
            if [[ $name/ = "$prefix"/* ]]; then
                # shellcheck disable=SC2086  # the arguments are words
                iadd $arguments "$@"
                break
            fi
        done
    done 3< <(cells)
}

case "${1:-}" in
    -h | --help)
        sed -n '2,10s/^# //p' "$here/run_all.sh"
        ;;
    test)
        set_up
        shift
        cd "$here"
        venv_python -m pytest -q "$@"
        ;;
    bench)
        set_up
        shift
        venv_python "$here/test_iadd.py" "$@"
        ;;
    paper)
        shift
        paper "$@"
        ;;
    teachers | distill | eval | plot)
        echo "run_all.sh: one command alone is python iadd.py $*" >&2
        exit 2
        ;;
    "")
        set_up
        cd "$here"
        iadd teachers --dataset shapes --ipc 1
        iadd distill --dataset shapes --ipc 1
        iadd eval --dataset shapes --ipc 1 --on distilled random full
        echo "the distilled images: $(ls "$here"/runs/shapes_*/ipc1_iadd_seed0/images_*.png | tail -n 1)"
        ;;
    *)
        set_up
        dataset=$1 ipc=1
        shift
        case ${1:-} in [0-9]*) ipc=$1 && shift ;; esac
        iadd teachers --dataset "$dataset" --ipc "$ipc" "$@"
        iadd distill --dataset "$dataset" --ipc "$ipc" "$@"
        iadd eval --dataset "$dataset" --ipc "$ipc" --on distilled random "$@"
        ;;
esac
