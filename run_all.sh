#!/usr/bin/env bash
# ./run_all.sh                  the whole method on the built-in dataset `shapes`, on a CPU in about three minutes
# ./run_all.sh test             the tests
# ./run_all.sh DATASET [IPC]    the real thing: teachers, distill and eval with the paper's settings (IPC 1)
# ./run_all.sh paper            the commands of the paper's tables; those that have been run are marked
# ./run_all.sh paper CELL ...   runs those of a table, a column or a cell, such as table1/cifar10/ipc1 or table4/iadd
# Options on data, files and the machine go to every step, here after --: ./run_all.sh paper table4 -- --data-dir covid.zip
# What was interrupted goes on when it is started again. GPUS=4 ./run_all.sh ... uses four GPUs of this machine.
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
    iadd=("$python")
    [ "${GPUS:-1}" = 1 ] || iadd+=(-m torch.distributed.run --nproc-per-node "$GPUS")
    iadd+=("$PWD/iadd.py")
}

# The cells of Tables 1, 3 and 4 that we can measure, "name iadd.py's arguments", a line for each step. (Table 2
# compares the IADD of Table 1 with numbers of others.) What exists already is not trained or distilled again.
cells() {
    local table setting dataset ipc method arch on
    for setting in cifar10:1 cifar10:10 cifar10:50 cifar100:1 cifar100:10 cifar100:50 \
        tinyimagenet:1 tinyimagenet:10 cross:10 covid:20; do
        dataset=${setting%:*} ipc=${setting#*:} table=table1/$dataset/ipc$ipc arch=
        case $dataset in
            cross) table=table3 dataset=cifar10 arch=" --arch convnet alexnet vgg11 resnet18" ;;
            covid) table=table4 ;;
        esac
        for method in random herding full mtt ddpp iadd; do
            on="--dataset $dataset --ipc $ipc"
            case $table/$method in
                table[34]/random | table[34]/herding | table3/full | */ipc10/full | */ipc50/full) ;;
                */random | */full) echo "$table/$method eval $on --on $method" ;;
                */herding)
                    echo "$table/$method teachers $on --teachers 1 --epochs 50"
                    echo "$table/$method eval $on --on $method"
                    ;;
                *)
                    echo "$table/$method teachers $on"
                    echo "$table/$method distill $on --method $method"
                    echo "$table/$method eval $on --method $method$arch"
                    ;;
            esac
        done
    done
}

paper() {
    local wanted=() options=() finished=runs/paper_done.txt name arguments line
    while [ $# -gt 0 ]; do
        [ "$1" = -- ] && { shift; options=("$@"); break; }
        wanted+=("$1")
        cells | awk -v wanted="$1/" 'index($1 "/", wanted) == 1 { found = 1 } END { exit !found }' || {
            echo "run_all.sh: the paper has no cell $1, see ./run_all.sh paper" >&2
            exit 2
        }
        shift
    done
    [ ${#wanted[@]} = 0 ] || set_up
    cd "$caller"
    while read -r name arguments <&3; do
        if [ ${#wanted[@]} = 0 ]; then
            line=$(grep -s "^$arguments --" "$finished" | tail -n 1 || true)
            printf '%-34spython iadd.py %s%s\n' "$name" "$arguments" "${line:+  # done:${line#"$arguments"}}"
        fi
        line="$arguments --${options[*]:+ ${options[*]}}"
        for prefix in ${wanted[@]+"${wanted[@]}"}; do
            [[ $name/ = "$prefix"/* ]] || continue
            if grep -sqxF -e "$line" "$finished"; then
                echo "done already: $line"
            else
                echo "== $name: python iadd.py $arguments ${options[*]:-}"
                # shellcheck disable=SC2086  # the arguments are words
                "${iadd[@]}" $arguments ${options[@]+"${options[@]}"}
                mkdir -p runs && echo "$line" >>"$finished"
            fi
            break
        done
    done 3< <(cells)
}

case "${1:-}" in
    -h | --help)
        sed -n '2,9s/^# //p' run_all.sh
        ;;
    test)
        set_up
        shift
        exec "$python" -m pytest -q "$@"
        ;;
    paper)
        shift
        paper "$@"
        ;;
    "")
        set_up
        "${iadd[@]}" teachers --dataset shapes --ipc 1
        "${iadd[@]}" distill --dataset shapes --ipc 1
        "${iadd[@]}" eval --dataset shapes --ipc 1 --on distilled random full
        echo "the distilled images: $(ls "$PWD"/runs/shapes_*/ipc1_iadd_seed0/images_*.png | tail -n 1)"
        ;;
    *)
        set_up
        dataset=$1 ipc=1
        shift
        case ${1:-} in [0-9]*) ipc=$1 && shift ;; esac
        cd "$caller" # so that paths mean what they mean to the caller
        "${iadd[@]}" teachers --dataset "$dataset" --ipc "$ipc" "$@"
        "${iadd[@]}" distill --dataset "$dataset" --ipc "$ipc" "$@"
        "${iadd[@]}" eval --dataset "$dataset" --ipc "$ipc" --on distilled random "$@"
        ;;
esac
