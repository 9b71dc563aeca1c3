# what: xen-netback beside ringback: one guest, re-attached to each in turns; TCP and small UDP packets both ways, round trips, dom0's CPU
# needs: ringback
# when: named
# timeout: 1200
bridge_up
VCPUS=1 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=1 VIF1=
guest_start g
: > $CTL/bench

# The kernel's backend takes every vif of dom0 while its module is there.
attach_to() { # kernel|ringback
  case $1 in
    kernel) must modprobe xen-netback; script=vif-bridge ;;
    ringback) script=vif-ringback ;;
  esac
  must xl network-attach g script=$script bridge=labbr mac=00:16:3e:77:00:01
  within "eth0 in the guest" 5000 g g "test -e /sys/class/net/eth0"
  vif=$(xenstore-list "$BACKEND_VIF/$(xl domid g)" | tail -n 1)
  within "the vif is connected" 5000 state_is "$(backend_vif g "$vif")" 4
  net_up g 1
  g g "$PING -q -c 3 -i 0.2 $DOM0_V4" > /dev/null
}
detach_from() {
  must xl network-detach g "$vif"
  within "no eth0 in the guest" 5000 g g "test ! -e /sys/class/net/eth0"
  [ "$1" != kernel ] || within "xen-netback is gone" 5000 rmmod xen-netback
}
dom0_seconds() { xl list | awk '$2 == 0 { print $NF }'; }
# note WHO WHAT VALUE: a line of the table
note() { echo "$1 $2 $3" | tee -a $CTL/bench; }
# transfer WHO WHAT ARGUMENTS...: what iperf3's receiver got, and dom0's CPU time for it
transfer() {
  who=$1 what=$2; shift 2
  cpu=$(dom0_seconds)
  g g "iperf3 -f k -c $DOM0_V4 -t 5 $*" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 $*"; }
  note "$who" "$what-dom0-s" "$(awk -v a="$cpu" -v b="$(dom0_seconds)" 'BEGIN { printf "%.1f", b - a }')"
  case $what in
    udp*) got=$(awk '/receiver/ { split($(NF - 2), n, "/"); print int((n[2] - n[1]) / 5) }' $CTL/iperf.out) ;;
    *) got=$(awk '/receiver/ { for (i = 1; i <= NF; i++) if ($i == "Kbits/sec") print $(i - 1) }' $CTL/iperf.out) ;;
  esac
  note "$who" "$what" "$got"
}
server_start
for round in 1 2 3; do
  for who in kernel ringback; do
    step "round $round: $who"
    attach_to $who
    transfer $who tcp-from-guest
    transfer $who tcp-to-guest -R
    transfer $who udp-from-guest -u -l 64 -b 0
    transfer $who udp-to-guest -u -l 64 -b 0 -R
    note $who round-trip-us "$(g g "$PING -q -c 300 -i 0.005 $DOM0_V4" | awk -F/ '/rtt/ { printf "%d", $5 * 1000 }')"
    detach_from $who
  done
done
server_stop
step "medians of three rounds"
for what in $(awk '{ print $2 }' $CTL/bench | sort -u); do
  median() { awk -v w="$1" -v k="$what" '$1 == w && $2 == k { print $3 }' $CTL/bench | sort -n | sed -n 2p; }
  a=$(median kernel) b=$(median ringback)
  above "$what of ringback, in thousandths" 0 "$(awk -v b="$b" 'BEGIN { print int(b * 1000) }')"
  awk -v w="$what" -v a="$a" -v b="$b" 'BEGIN { printf "BENCH %-24s kernel %10s ringback %10s ratio %.2f\n", w, a, b, b / a }'
done
guest_stop g
bridge_down
