#!/bin/sh
# A pod: an application and its service, two processes in a network namespace of their own.
#
# As root, with `carnet` in the path or in CARNET, and iproute2, util-linux, curl and Python:
#     sh examples/namespaces/pod.sh
# It makes network namespaces, a cgroup and a BPF file system of its own and takes them away again.
set -eu

carnet=${CARNET:-carnet}
pod=pod$$ other=other$$ server=server$$
work=$(mktemp -d)
cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)/carnet-pod-$$
# The processes that run meanwhile. They are started without functions, which would be subshells.
started=

clean() {
    trap - EXIT
    for process in $started; do
        kill "$process" 2> /dev/null || true
        wait "$process" 2> /dev/null || true
    done
    administer down > /dev/null 2>&1 || true
    for namespace in "$pod" "$other" "$server"; do
        ip netns del "$namespace" 2> /dev/null || true
    done
    rmdir "$cgroup" 2> /dev/null || true
    umount "$work/bpf" 2> /dev/null || true
    rm -r "$work"
}
trap clean EXIT
trap 'exit 1' INT TERM

say() {
    printf '\n# %s\n' "$1"
}

administer() {
    "$carnet" --bpffs "$work/bpf" --instance pod "$@"
}

# Not `ip netns exec`: that hides the mounts below /sys, which `carnet` needs.
within() {
    namespace=$1
    shift
    nsenter --net="/run/netns/$namespace" "$@"
}

# A network namespace with a cable to the server: cable NAMESPACE NUMBER
cable() {
    ip link add "$1" netns "$server" type veth peer name eth0 netns "$1"
    ip -n "$1" address add "192.0.2.$(($2 * 4 + 1))/30" dev eth0
    ip -n "$server" address add "192.0.2.$(($2 * 4 + 2))/30" dev "$1"
    ip -n "$1" address add "2001:db8:$2::1/64" dev eth0 nodad
    ip -n "$server" address add "2001:db8:$2::2/64" dev "$1" nodad
    ip -n "$server" link set "$1" up
    ip -n "$1" link set eth0 up
    ip -n "$1" link set lo up
    ip -n "$1" route add default via "192.0.2.$(($2 * 4 + 2))"
    ip -n "$1" route add default via "2001:db8:$2::2"
}

# What an application gets from the server: ask NAMESPACE HOST
ask() {
    # In the scope of the instance.
    within "$1" "$carnet" --bpffs "$work/bpf" --instance pod run -- \
        curl --silent --show-error --max-time 20 "http://$2:8080/page"
}

# Waits until the service has logged so many flows, each at its end: logged NUMBER
logged() {
    tries=0
    until [ "$(grep -c 8080 "$work/log")" -eq "$1" ]; do
        tries=$((tries + 1))
        test "$tries" -lt 100
        sleep 0.1
    done
    cat "$work/log"
}

for namespace in "$pod" "$other" "$server"; do
    ip netns add "$namespace"
done
ip -n "$server" link set lo up
cable "$pod" 1
cable "$other" 2
echo hello > "$work/page"
for address in 192.0.2.6 192.0.2.10 2001:db8:1::2 2001:db8:2::2; do
    nsenter --net="/run/netns/$server" python3 -m http.server --directory "$work" --bind "$address" 8080 \
        > /dev/null 2>&1 &
    started="$started $!"
done
for address in 192.0.2.6 192.0.2.10 '[2001:db8:1::2]' '[2001:db8:2::2]'; do
    within "$server" curl --silent --output /dev/null --retry 30 --retry-delay 1 \
        --retry-connrefused "http://$address:8080/page"
done

say "an instance, and a service that runs in the pod"
mkdir "$cgroup" "$work/bpf"
mount -t bpf none "$work/bpf"
administer up --cgroup "$cgroup"
administer provider add acme
administer sublayer add first --provider acme
mkfifo "$work/ready"
nsenter --net="/run/netns/$pod" "$carnet" --bpffs "$work/bpf" --instance pod \
    service run scan --provider acme --on-failure block -- \
    "$carnet" inspect --log-file "$work/log" --ready-fd 1 > "$work/ready" &
started="$! $started"
read -r ready < "$work/ready"
echo "scan: $ready"
administer filter add --sublayer first --redirect scan --port 8080
administer service ls

say "the application in the pod goes through it"
test "$(ask "$pod" 192.0.2.6)" = hello
test "$(ask "$pod" '[2001:db8:1::2]')" = hello
logged 2

say "an application in a network namespace without a listener is refused, as --on-failure says"
for host in 192.0.2.10 '[2001:db8:2::2]'; do
    if ask "$other" "$host"; then
        echo "it was not refused" >&2
        exit 1
    fi
done
administer explain --to 192.0.2.10:8080 --netns "/run/netns/$other" | tee "$work/why"
grep -q 'no live listener in this network namespace, only in others' "$work/why"
