# what: guest to guest: xen-netback and ringback on a bridge, ringback's switch; TCP, small UDP packets, round trips, dom0's CPU
# needs: ringback
# when: named
# timeout: 1200
bridge_up
VCPUS=1 TOOLS=net MEM=320 CMDLINE=xen_netfront.max_queues=1 VIF1=
guest_start g
guest_start h
: > $CTL/bench

attach_to() { # kernel|bridge|switch: both guests
  bridge=labbr script=vif-ringback
  case $1 in
    kernel) must modprobe xen-netback; script=vif-bridge ;;
    switch) bridge=switch:lab ;;
  esac
  n=0
  for guest in g h; do
    n=$((n + 1))
    must xl network-attach $guest script=$script bridge=$bridge mac=00:16:3e:77:00:0$n
    within "eth0 in $guest" 5000 g $guest "test -e /sys/class/net/eth0"
    net_up $guest $n
  done
  within "h answers" 5000 g g "$PING -q -c 1 -W 1 $(guest_v4 2)"
  gm h "iperf3 -s -D -I /tmp/iperf.pid"
}
detach_from() {
  gm h "kill \$(tr -d '\\0' < /tmp/iperf.pid)"
  for guest in g h; do
    vif=$(xenstore-list "$BACKEND_VIF/$(xl domid $guest)" | tail -n 1)
    must xl network-detach $guest "$vif"
    within "no eth0 in $guest" 5000 g $guest "test ! -e /sys/class/net/eth0"
  done
  [ "$1" != kernel ] || within "xen-netback is gone" 5000 rmmod xen-netback
}
dom0_seconds() { xl list | awk '$2 == 0 { print $NF }'; }
note() { echo "$1 $2 $3" | tee -a $CTL/bench; }
transfer() { # WHO WHAT ARGUMENTS...: what iperf3's receiver got, and dom0's CPU time for it
  who=$1 what=$2; shift 2
  cpu=$(dom0_seconds)
  g g "iperf3 -f k -c $(guest_v4 2) -t 5 $*" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 $*"; }
  note "$who" "$what-dom0-s" "$(awk -v a="$cpu" -v b="$(dom0_seconds)" 'BEGIN { printf "%.1f", b - a }')"
  case $what in
    udp*) got=$(awk '/receiver/ { split($(NF - 2), n, "/"); print int((n[2] - n[1]) / 5) }' $CTL/iperf.out) ;;
    *) got=$(awk '/receiver/ { for (i = 1; i <= NF; i++) if ($i == "Kbits/sec") print $(i - 1) }' $CTL/iperf.out) ;;
  esac
  note "$who" "$what" "$got"
}
WAYS="kernel bridge switch"
backend_restart --net-processes one || fail "the daemon does not start"
leaks_daemon_restarted
for round in 1 2 3; do
  for who in $WAYS; do
    step "round $round: $who"
    attach_to $who
    transfer $who tcp
    transfer $who udp -u -l 64 -b 0
    note $who round-trip-us "$(g g "$PING -q -c 300 -i 0.005 $(guest_v4 2)" | awk -F/ '/rtt/ { printf "%d", $5 * 1000 }')"
    detach_from $who
  done
done
step "medians of three rounds"
for what in $(awk '{ print $2 }' $CTL/bench | sort -u); do
  line=
  for who in $WAYS; do
    line="$line $who $(awk -v w="$who" -v k="$what" '$1 == w && $2 == k { print $3 }' $CTL/bench | sort -n | sed -n 2p)"
  done
  echo "BENCH $what$line"
done
guest_stop g
guest_stop h
bridge_down
backend_restart
leaks_daemon_restarted
