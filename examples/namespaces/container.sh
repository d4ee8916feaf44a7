#!/bin/sh
# A container whose flows the host's service gets, through the host's end of a veth pair.
#
# As root, with `carnet` in the path or in CARNET, and iproute2, util-linux, curl and Python:
#     sh examples/namespaces/container.sh
# It makes network namespaces (one of them plays the host), a cgroup and a BPF file system of its
# own and takes them away again.
set -eu

carnet=${CARNET:-carnet}
host=host$$ container=box$$ server=server$$
work=$(mktemp -d)
cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)/carnet-box-$$
# The processes that run meanwhile. They are started without functions, which would be subshells.
started=

clean() {
    trap - EXIT
    for process in $started; do
        kill "$process" 2> /dev/null || true
        wait "$process" 2> /dev/null || true
    done
    administer down > /dev/null 2>&1 || true
    for namespace in "$container" "$host" "$server"; do
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

# Not `ip netns exec`: that hides the mounts below /sys, which `carnet` needs.
within() {
    namespace=$1
    shift
    nsenter --net="/run/netns/$namespace" "$@"
}

# On the host.
administer() {
    within "$host" "$carnet" --bpffs "$work/bpf" --instance box "$@"
}

# Lays a cable between two network namespaces, whose second one gets the second addresses:
# cable FIRST SECOND NUMBER
cable() {
    ip link add "to$3" netns "$1" type veth peer name "to$3" netns "$2"
    end=1
    for namespace in "$1" "$2"; do
        ip -n "$namespace" address add "192.0.2.$(($3 * 4 + end))/30" dev "to$3"
        ip -n "$namespace" address add "2001:db8:$3::$end/64" dev "to$3" nodad
        end=2
    done
    ip -n "$1" link set "to$3" up
    ip -n "$2" link set "to$3" up
}

# What an application in the container gets from the server: ask HOST
ask() {
    # In the scope of the instance.
    within "$container" "$carnet" --bpffs "$work/bpf" --instance box run -- \
        curl --silent --show-error --max-time 20 "http://$1:8080/page"
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

for namespace in "$host" "$container" "$server"; do
    ip netns add "$namespace"
    ip -n "$namespace" link set lo up
done
cable "$container" "$host" 1
cable "$host" "$server" 2
# The host forwards nothing and translates nothing: the container reaches it alone.
ip -n "$container" route add default via 192.0.2.6
ip -n "$container" route add default via 2001:db8:1::2
echo hello > "$work/page"
for address in 192.0.2.10 2001:db8:2::2; do
    nsenter --net="/run/netns/$server" python3 -m http.server --directory "$work" --bind "$address" 8080 \
        > /dev/null 2>&1 &
    started="$started $!"
done
for address in 192.0.2.10 '[2001:db8:2::2]'; do
    within "$host" curl --silent --output /dev/null --retry 30 --retry-delay 1 \
        --retry-connrefused "http://$address:8080/page"
done

say "an instance, and a service of the host that listens on its end of the veth pair"
mkdir "$cgroup" "$work/bpf"
mount -t bpf none "$work/bpf"
administer up --cgroup "$cgroup"
administer provider add acme
administer sublayer add first --provider acme
mkfifo "$work/ready"
nsenter --net="/run/netns/$host" "$carnet" --bpffs "$work/bpf" --instance box \
    service run scan --provider acme --on-failure block -- \
    "$carnet" inspect --listen 192.0.2.6:0 --listen '[2001:db8:1::2]:0' \
    --log-file "$work/log" --ready-fd 1 > "$work/ready" &
started="$! $started"
read -r ready < "$work/ready"
echo "scan: $ready"
administer filter add --sublayer first --redirect scan --port 8080

say "the container's flows reach it there"
for address in ${ready#ready }; do
    administer service register scan --netns "/run/netns/$container" --listen "$address"
done
administer service ls
test "$(ask 192.0.2.10)" = hello
test "$(ask '[2001:db8:2::2]')" = hello
logged 2

say "taken back, they follow the failure policy"
for address in ${ready#ready }; do
    administer service unregister scan --netns "/run/netns/$container" --listen "$address"
done
for server_address in 192.0.2.10 '[2001:db8:2::2]'; do
    if ask "$server_address"; then
        echo "it was not refused" >&2
        exit 1
    fi
done
administer explain --to 192.0.2.10:8080 --netns "/run/netns/$container" | tee "$work/why"
grep -q 'no live listener in this network namespace, only in others' "$work/why"
