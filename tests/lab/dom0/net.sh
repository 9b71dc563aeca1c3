# Guests with a network (sourced): a bridge in dom0, vifs on it, addresses, traffic both ways.

# busybox's shell prefers its own applets to programs of the same name; these are Debian's.
IP=/usr/sbin/ip PING=/usr/bin/ping
ip() { $IP "$@"; }

BACKEND_VIF=/local/domain/0/backend/vif
DOM0_V4=10.77.0.1
DOM0_V6=fd77::1

# vif [KEYS]: an xl vif line on the lab's bridge
vif() { echo "script=vif-ringback,bridge=labbr${1:+,$1}"; }
# guest_v4 N, guest_v6 N: addresses of the Nth guest
guest_v4() { echo "10.77.0.$((10 + $1))"; }
guest_v6() { echo "fd77::$((10 + $1))"; }

# bridge_up: the lab's bridge with dom0's addresses
bridge_up() {
  modprobe tun && modprobe bridge || fail "no tun or no bridge in dom0's kernel"
  [ -c /dev/net/tun ] || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }
  [ ! -e /sys/class/net/labbr ] || return 0
  must ip link add labbr type bridge stp_state 0 forward_delay 0
  echo 0 > /sys/class/net/labbr/bridge/multicast_snooping
  must ip addr add $DOM0_V4/24 dev labbr
  must ip -6 addr add $DOM0_V6/64 dev labbr nodad
  must ip link set labbr up
}
bridge_down() { ip link del labbr; }

backend_vif() { echo "$BACKEND_VIF/$(xl domid "$1")/${2:-0}"; }
vif_name() { echo "vif$(xl domid "$1").${2:-0}"; }

# net_up GUEST N [MTU]: addresses of the Nth guest on its eth0
net_up() {
  gm "$1" "$IP link set lo up; $IP link set eth0 mtu ${3:-1500} up && $IP addr replace $(guest_v4 "$2")/24 dev eth0 && $IP -6 addr replace $(guest_v6 "$2")/64 dev eth0 nodad"
}

# echoes GUEST: the guest kernel's own counts of pings sent and answered. ping itself ends before late answers come.
echoes() {
  g "$1" "awk '/^Icmp:/ { if (!n++) { split(\$0, h) } else { for (i in h) if (h[i] == \"OutEchos\" || h[i] == \"InEchoReps\") print h[i], \$i } }' /proc/net/snmp" | sort
}
# all_answered GUEST SENT: the guest has sent that many, and has as many answers
all_answered() {
  echoes "$1" > $CTL/echoes
  [ "$(awk '{ printf "%s=%s ", $1, $2 }' $CTL/echoes)" = "InEchoReps=$2 OutEchos=$2 " ]
}
# pings GUEST ADDRESS SIZE...: ten of each size, none lost
pings() {
  guest=$1 address=$2; shift 2
  sent=$(echoes "$guest" | awk '$1 == "OutEchos" { print $2 }')
  for size; do
    g "$guest" "$PING -q -c 10 -i 0.1 -s $size $address" | grep -E 'packets|rtt'
    sent=$((sent + 10))
    within "all pings of $size bytes are answered" 5000 all_answered "$guest" "$sent"
  done
}

# vif_stat GUEST COUNTER [DEVID]: a counter of all queues of a vif
vif_stat() {
  ringback stats --device "$(xl domid "$1")/vif${3:-0}" > $CTL/stats.out || fail "ringback stats ended with status $?"
  awk -v k="$2" '$1 == k { n += $2; seen = 1 } END { print seen ? n : "none" }' $CTL/stats.out
}
vif_stat_each() {
  ringback stats --device "$(xl domid "$1")/vif${3:-0}" > $CTL/stats.out || fail "ringback stats ended with status $?"
  awk -v k="$2" '$1 == k { printf "%s ", $2 }' $CTL/stats.out
}

# server_start: iperf3 in dom0
server_start() {
  iperf3 -s -D -I $CTL/iperf.pid --logfile $CTL/iperf.log
  within "iperf3 listens" 3000 test -s $CTL/iperf.pid
}
server_stop() { kill "$(tr -d '\0' < $CTL/iperf.pid)"; }

# iperf GUEST ARGUMENTS...: a run against dom0 that must end well; its last lines
iperf() {
  guest=$1; shift
  g "$guest" "iperf3 -f m -c $*" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 $*"; }
  echo "iperf3 $*: $(grep -E 'sender|receiver' $CTL/iperf.out | tail -n 2 | tr -s ' ' | tr '\n' ';')"
}

# file_both_ways GUEST MIB: a file to dom0 and back, with equal checksums
file_both_ways() {
  gm "$1" "head -c $(($2 * 1048576)) /dev/urandom > /tmp/f && sha256sum < /tmp/f" 60 > $CTL/file.sha
  want=$(grep -oE '^[0-9a-f]{64}' $CTL/file.sha)
  (nc -l -p 7001 > /scratch/got < /dev/null) & reader=$!
  usleep 500000
  gm "$1" "nc $DOM0_V4 7001 < /tmp/f" 60
  wait $reader
  same "a file from the guest" "$want" "$(sha /scratch/got)"
  (nc -l -p 7002 < /scratch/got > /dev/null) & writer=$!
  usleep 500000
  gm "$1" "nc $DOM0_V4 7002 < /dev/null > /tmp/back; sha256sum < /tmp/back" 60 > $CTL/file.sha
  wait $writer
  same "a file to the guest" "$want" "$(grep -oE '^[0-9a-f]{64}' $CTL/file.sha)"
  rm -f /scratch/got
}
