#!/bin/sh
# The first process of the machine that `cargo xtask vm` boots. What it runs writes to the first
# serial port; the kernel's messages, and whatever goes wrong before, go to the second.

export PATH=/usr/sbin:/usr/bin HOME=/root NO_COLOR=1 RUST_BACKTRACE=1 CARNET_TESTS_ROUNDS=4
busybox mount -t proc none /proc
busybox --install -s
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mount -t tmpfs none /tmp
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf none /sys/fs/bpf
chmod 1777 /tmp
for module in "/modules/$(uname -r)"/*; do
    insmod "$module"
done
ip link set lo up
exec </dev/null >/dev/ttyS0 2>&1

# Marks a step, in a line of its own.
mark() {
    printf '\ncarnet-vm: %s\n' "$*"
}

cd /carnet || poweroff -f
mark kernel "$(uname -r)"

# A kernel that is too old is to be named as such, by the command that examines and by the one that acts,
# and nothing is to be left on it.
refusal() {
    for command in doctor "up --cgroup /sys/fs/cgroup"; do
        # Words.
        said=$(./carnet $command 2>&1) && return 1
        echo "$said"
        case $said in
            *"is too old"*"Carnet needs 6.1 or newer"*) ;;
            *) return 1 ;;
        esac
    done
    [ -z "$(ls -A /sys/fs/bpf)" ]
}
case $(cat /proc/cmdline) in
    *carnet.refusal*)
        mark begin refusal
        refusal
        mark end refusal $?
        mark tainted "$(cat /proc/sys/kernel/tainted)"
        poweroff -f
        ;;
esac

mark begin demo
timeout 300 ./carnet demo
mark end demo $?

mark begin programs
mkdir /sys/fs/cgroup/measured
./carnet up --cgroup /sys/fs/cgroup/measured && ./carnet status --json | tr -d '\n'
mark end programs $?
./carnet down
rmdir /sys/fs/cgroup/measured

set --
while IFS= read -r argument; do
    set -- "$@" "$argument"
done <arguments
while read -r suite given; do
    mark begin "$suite"
    # Words, or none.
    "./$suite" --color never $given "$@"
    mark end "$suite" $?
done <suites

mark tainted "$(cat /proc/sys/kernel/tainted)"
poweroff -f
