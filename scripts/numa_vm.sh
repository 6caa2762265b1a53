#!/usr/bin/env bash
# Runs a command in the repository's root on a machine with NUMA nodes, emulated in software: for placement, not speed.
#
#     scripts/numa_vm.sh [--nodes 2|memory-only|4] [--timeout SECONDS] COMMAND...
#
#     2             two nodes of two cpus and 1.5 GB each
#     memory-only   and a third, of memory alone
#     4             four nodes of a cpu each, the second without memory
#
# Prints what the command prints and exits with its code; 77 where no such machine can be made, 124 if time is up. Needs
# root, on Debian; installs what is missing. The machine's disk is kept in the cache folder. Warmfront's kernels are
# compiled outside it, by the machine's Python and for its cpu: inside it would take ten times as long.
set -euo pipefail
cd "$(dirname "$0")/.."

nodes=2 seconds=600
while [[ ${1-} == --* ]]; do
    case $1 in
    --nodes) nodes=$2 ;;
    --timeout) seconds=$2 ;;
    *) echo "numa_vm: no option $1" >&2 && exit 2 ;;
    esac
    shift 2
done
[ $# -gt 0 ] || { echo "numa_vm: no command" >&2 && exit 2; }

unable() {
    echo "numa_vm: no emulated machine here: $1" >&2
    exit 77
}

# The features of `-cpu max` that compiled code may use, since it is also compiled outside the machine.
features=64bit,avx,avx2,bmi,bmi2,cmov,cx16,cx8,f16c,fma,fxsr,lzcnt,mmx,movbe,pclmul,popcnt,sse,sse2,sse3,sse4.1,sse4.2
features+=,ssse3,xsave
inside=(NUMBA_CPU_NAME=haswell "NUMBA_CPU_FEATURES=+${features//,/,+}" PYTHONPATH=/site:/work/build/tree TERM=dumb
    PATH=/usr/local/bin:/usr/bin:/bin HOME=/root XDG_CACHE_HOME=/cache OPENBLAS_NUM_THREADS=1)
python=${PYTHON:-python3}
packages=base-files,bash,busybox,coreutils,dash,grep,libgomp1,libstdc++6,mount,numactl,python3,tar
packages+=,linux-image-cloud-amd64

install_tools() {
    [ "$(uname -m)" = x86_64 ] || unable "not x86-64"
    [ "$(id -u)" = 0 ] || unable "not root"
    unshare --mount true 2>/dev/null || unable "mounting is not allowed"
    type qemu-system-x86_64 mmdebstrap mke2fs flock >/dev/null 2>&1 && return
    type apt-get >/dev/null 2>&1 || unable "no apt-get to install qemu with"
    { apt-get update && apt-get install -y --no-install-recommends \
        debian-archive-keyring e2fsprogs mmdebstrap qemu-system-x86 util-linux; } >/dev/null 2>&1 ||
        unable "apt-get cannot install qemu-system-x86 and mmdebstrap"
}

# The first process of the machine: writes the exit code to the second serial line and switches off. The kernel writes
# to the third.
write_init() {
    cat >"$1" <<'INIT'
#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm
for folder in /dev/shm /tmp /run /root /work /cache; do mount -t tmpfs tmpfs $folder; done
busybox ip link set lo up
tar -xf /dev/nvme0n2 -C /
cd /work
stty -opost </dev/ttyS0
env -i $(cat /inside) bash /work/.command </dev/null >/dev/ttyS0 2>&1
echo $? >/dev/ttyS1
echo o >/proc/sysrq-trigger
sleep 60
INIT
}

make_machine() {
    mkdir -p "$1"
    mmdebstrap --quiet --mode=root --variant=extract --include="$packages" bookworm "$1/root" ||
        unable "mmdebstrap cannot fetch Debian"
    local requirements
    requirements=$("$python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(each for each in project["dependencies"] if not each.startswith("torch")), "pytest")')
    # shellcheck disable=SC2086
    "$python" -m pip install -qq --disable-pip-version-check --target "$1/root/site" --python-version 3.11 \
        --only-binary=:all: $requirements || unable "pip cannot fetch the packages"
    (
        cd "$1/root"
        mv boot/vmlinuz-* ../kernel
        rm -rf lib/modules boot usr/share/{doc,man,locale}
        mkdir -p work cache usr/local/bin
        echo 127.0.0.1 localhost >etc/hosts
        echo root:x:0:0:root:/root:/bin/bash >etc/passwd
        echo root:x:0: >etc/group
        printf '#!/bin/sh\nexec python3 -m pytest "$@"\n' >usr/local/bin/pytest
        printf '#!/bin/sh\nexec python3 -c "from warmfront.coordinator.cli.main import main; main()" "$@"\n' \
            >usr/local/bin/warmfront
        chmod +x usr/local/bin/*
        ln -s python3 usr/bin/python
        printf '%s\n' "${inside[@]}" >inside
        write_init init
        chmod +x init
    )
    # Compiling imports everything and leaves bytecode on the disk, which halves the start of every process there.
    copy_repository "$1"
    mke2fs -q -t ext4 -d "$1/root" "$1/root.ext4" $(($(du -sm "$1/root" | cut -f1) * 3 / 2))M >/dev/null
}

# Copy the repository, with links through which its packages are imported, unless it is there unchanged.
copy_repository() {
    git ls-files -z --cached --others --exclude-standard |
        tar --create --null --ignore-failed-read --sort=name --files-from=- >"$scratch/repository.tar" 2>/dev/null
    local stamp
    stamp=$(sha256sum <"$scratch/repository.tar")
    [ "$(cat "$1/stamp" 2>/dev/null)" != "$stamp" ] || return 0
    rm -rf "$1/stamp" "$1/root/work"
    mkdir -p "$1/root/work/build/tree/warmfront"
    tar --extract --no-same-owner --directory "$1/root/work" --file "$scratch/repository.tar"
    for package in shared coordinator cpu_worker gpu_worker; do
        ln -s ../../../$package "$1/root/work/build/tree/warmfront/$package"
    done
    compile_kernels "$1/root"
    echo "$stamp" >"$1/stamp"
}

# With the machine's own Python, on this processor.
compile_kernels() {
    unshare --mount bash -c 'cd "$0" && mount -t proc proc proc && mount --rbind /dev dev &&
        exec chroot . env -i "$@" bash -c "cd /work && exec python3 -m tests.numa.model"' "$1" "${inside[@]}"
}

machine() {
    case $nodes in
    2) echo -m 3G -smp 4 $(node 0 1536M 0-1) $(node 1 1536M 2-3) ;;
    memory-only) echo -m 3G -smp 4 $(node 0 1G 0-1) $(node 1 1G 2-3) $(node 2 1G) \
        -numa dist,src=0,dst=1,val=21 -numa dist,src=0,dst=2,val=17 -numa dist,src=1,dst=2,val=28 ;;
    4) echo -m 3G -smp 4 $(node 0 1G 0) -numa node,nodeid=1,cpus=1 $(node 2 1G 2) $(node 3 1G 3) \
        -numa dist,src=0,dst=1,val=21 -numa dist,src=0,dst=2,val=21 -numa dist,src=0,dst=3,val=31 \
        -numa dist,src=1,dst=2,val=16 -numa dist,src=1,dst=3,val=31 -numa dist,src=2,dst=3,val=21 ;;
    *) echo "numa_vm: no machine $nodes" >&2 && return 2 ;;
    esac
}

node() {
    echo -object memory-backend-ram,id=m$1,size=$2 -numa node,nodeid=$1,memdev=m$1${3:+,cpus=$3}
}

boot() {
    local kernel="root=/dev/nvme0n1 rootfstype=ext4 ro rootwait init=/init console=ttyS2 panic=-1"
    local drive=if=none,format=raw,readonly=on
    # shellcheck disable=SC2046
    setpriv --pdeathsig TERM timeout --kill-after=5 "$seconds" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max,la57=off $(machine) \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$1/kernel" -append "$kernel mitigations=off numa_balancing=disable" \
        -serial stdio -serial file:"$2/code" -serial file:"$2/log" \
        -drive $drive,id=root,file="$1/root.ext4" -drive $drive,id=files,file="$2/files.tar" \
        -device nvme,serial=1 -device nvme-ns,drive=root -device nvme-ns,drive=files </dev/null
}

machine >/dev/null
install_tools
cache=${XDG_CACHE_HOME:-$HOME/.cache}/warmfront/numa-vm
digest=$(cat scripts/numa_vm.sh pyproject.toml | sha256sum | cut -c1-16)
folder=$cache/$digest
mkdir -p "$cache"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

exec 9>"$cache/lock"
flock 9
if [ ! -e "$folder" ]; then
    find "$cache" -mindepth 1 -maxdepth 1 ! -name lock -exec rm -rf {} +
    echo "numa_vm: making the machine (first run only)" >&2
    make_machine "$folder.new"
    mv "$folder.new" "$folder"
fi
copy_repository "$folder"
printf '%q ' "$@" >"$folder/root/work/.command"
tar --create --file "$scratch/files.tar" --directory "$folder/root" work cache/warmfront/kernels
flock -u 9

code=0
boot "$folder" "$scratch" || code=$?
[ $code != 124 ] || echo "numa_vm: not done after $seconds s" >&2
[ $code = 0 ] || exit $code
code=$(tr -d '\r\n' <"$scratch/code")
if [ -z "$code" ]; then
    tail -n 30 "$scratch/log" >&2
    echo "numa_vm: the machine ended before the command" >&2
    exit 70
fi
exit "$code"
